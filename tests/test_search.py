"""Many heads on one trunk, the search, and the comparison of trunks."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from optuna.trial import TrialState
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

import fit_pca
import prepare_data
import train_head
from core import training
from core.checkpoint import load_checkpoint
from core.settings import constants, parse
from core.space import Space
from model import Crops, Trunk, UserError, trunk_outputs
from tools import compare_trunks, ridge, search

TINY = "eva02_tiny_patch14_224.mim_in22k"
ROOT = Path(__file__).parents[1]
N_PICTURES, N_LH, N_VERTICES = 120, 20, 36
TRAINING = dict(
    TRUNK=TINY, PRETRAINED=False, IMAGE_SIZE=56, BATCH_SIZE=32, PRECISION="float32", DEVICE="cpu", SEED=7
)  # fmt: skip


def run(script, **values):
    """The script's main() with these constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(script, name, value)  # refuses a name that the script does not have
        script.main()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Prepared data and PCA of three people who saw overlapping pictures, whose colours drive the activity."""
    folder = tmp_path_factory.mktemp("search") / "data"
    rng = np.random.default_rng(0)
    colours = rng.uniform(0, 1, (N_PICTURES, 3))
    images = np.rint(255 * np.clip(colours[:, None, None] + rng.normal(0, 0.1, (N_PICTURES, 256, 256, 3)), 0, 1))
    seen = [np.arange(80), np.arange(30, 110), np.arange(40, 120)]
    mask = np.ones((3, N_VERTICES), bool)
    mask[1, 5:8], mask[2, 30:] = False, False
    labels = np.stack([rng.permutation(np.repeat([0, 1, 2], N_VERTICES // 3)) for _ in seen]).astype(np.int16)
    streams = {"names": {0: "Unknown", 1: "early", 2: "ventral"}, "labels": torch.from_numpy(labels * mask)}
    vertices = torch.cat([torch.arange(N_LH), torch.arange(N_VERTICES - N_LH)])
    subjects = ["subj01", "subj02", "subj05"]
    space = Space(subjects, vertices, N_LH, torch.from_numpy(mask), {"streams": streams})
    tuning = rng.normal(0, 1, (3, 3, N_VERTICES)) + 2 * rng.normal(0, 1, (3, N_VERTICES))
    activity = [(colours[own] - 0.5) @ tuning[s] * mask[s] for s, own in enumerate(seen)]
    activity = np.concatenate(activity)
    activity = activity / activity.std() + rng.normal(0, 0.7, activity.shape) * np.repeat(mask, 80, axis=0)
    split = prepare_data.split_pictures(np.stack([np.isin(np.arange(N_PICTURES), own) for own in seen], 1), 0)
    image = np.concatenate(seen)
    samples = {
        "subject": np.repeat([0, 1, 2], 80), "image": image, "split": split[image], "test_subject": [], "test_image": []
    }  # fmt: skip
    prepare_data.write_prepared(
        folder, space=space, samples=samples, nsd_ids=1000 + np.arange(N_PICTURES), n_training_images=N_PICTURES,
        activity=[activity], images=images.astype(np.uint8), splits="pictures", made_with={},
    )  # fmt: skip
    run(fit_pca, DATA_DIR=str(folder), PCA_DIM=16, DEVICE="cpu")
    return folder


# ---- many heads on one trunk ---------------------------------------------------------------------


def assert_same_head(path, other):
    heads = [load_checkpoint(p)[0].head.state_dict() for p in (path, other)]
    for name, value in heads[0].items():
        assert torch.equal(value, heads[1][name]), name


def test_heads_together_end_as_each_alone(fitted, tmp_path):
    """Bit for bit, whatever they differ in."""
    shared = constants(vars(train_head)) | TRAINING | dict(DATA_DIR=str(fitted), VALIDATE_EVERY=4, WARMUP_STEPS=2)
    differing = [
        dict(STEPS=11, LEARNING_RATE=0.01, LAYERS="0,2", FEATURE_DROPOUT=0.3, LATENT_DIM=16),
        dict(STEPS=6, LEARNING_RATE=0.03, LAYERS="1", FEATURE_DROPOUT=0.0, LATENT_DIM=8, PCA_DIM=10),
        dict(STEPS=9, LEARNING_RATE=0.02, LAYERS="1,2", LATENT_DIM=16, WEIGHT_DECAY=0.3, BETAS=(0.8, 0.9)),
    ]
    settings = [shared | own | dict(RUN_DIR=str(tmp_path / "together")) for own in differing]
    data = prepare_data.load(fitted)
    pca = fit_pca.load(fitted, data)
    trunk = Trunk(TINY, "0,1,2", image_size=56, pretrained=False, seed=7)
    learners = [
        train_head.new_learner(trunk, s, f"{i}.pt", data, pca, torch.device("cpu"), torch.float32)
        for i, s in enumerate(settings)
    ]
    training.Run("together", learners, data, pca, settings[0], tolerant=True).run()
    for i, own in enumerate(settings):
        run(train_head, **own | dict(RUN_DIR=str(tmp_path / f"alone_{i}")))
        assert_same_head(tmp_path / f"together/{i}.pt", tmp_path / f"alone_{i}/head.pt")


# ---- the search ----------------------------------------------------------------------------------

RANGES = dict(
    LEARNING_RATE_RANGE=(1e-3, 3e-2), WEIGHT_DECAY_RANGE=(0.01, 1.0), FEATURE_DROPOUT_RANGE=(0.0, 0.9),
    LATENT_DIM_RANGE=(8, 32), PCA_DIM_RANGE=(4, 16), LAYERS_CHOICES="0,1; 0",
)  # fmt: skip
SEARCH = TRAINING | RANGES | dict(STEPS=12, VALIDATE_EVERY=12)


def trials_of(folder):
    storage = search.JournalStorage(search.JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(storage=storage, study_name="search").get_trials()


def assert_is_best(folder, trials, fitted, tmp_path):
    """head.pt is the best complete trial's, as train_head.py trains it with the constants of that row."""
    best = max((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    made = load_checkpoint(folder / "head.pt")[2]
    assert made["scores"]["val_r2"] == best.value and made["finished"]
    values = best.params | dict(MIN_LEARNING_RATE=best.params["LEARNING_RATE"] / 20, WARMUP_STEPS=0)
    values |= TRAINING | dict(STEPS=12, VALIDATE_EVERY=12, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "single"))
    run(train_head, **values)
    assert_same_head(tmp_path / "single/head.pt", folder / "head.pt")
    return best


def test_search(fitted, tmp_path, capsys):
    """Finds a trial better than the first; a diverged one fails; the study continues, and is not mixed with others."""
    settings = SEARCH | dict(DATA_DIR=str(fitted), HEADS=2, LEARNING_RATE_RANGE=(5e-4, 1e12))
    folder = tmp_path / "study"
    run(search, **settings, RUN_DIR=str(folder), TRIALS=2)
    run(search, **settings, RUN_DIR=str(folder), TRIALS=7)
    trials = trials_of(folder)
    assert trials[0].params == dict(LEARNING_RATE=6e-4, WEIGHT_DECAY=0.8, FEATURE_DROPOUT=0.9, PCA_DIM=16,
                                    LATENT_DIM=trials[0].params["LATENT_DIM"], LAYERS=trials[0].params["LAYERS"])
    states = [trial.state for trial in trials]
    assert len(trials) == 7 and set(states) == {TrialState.COMPLETE, TrialState.FAIL}
    best = assert_is_best(folder, trials, fitted, tmp_path)
    assert best.number > 0
    table = pd.read_csv(folder / "search.csv")
    assert table["trial"].tolist() == list(range(7)) and table["state"].tolist() == [s.name for s in states]
    assert table["val_r2"].isna().tolist() == [s == TrialState.FAIL for s in states]
    row = table.loc[table["val_r2"].idxmax()]
    assert row["LEARNING_RATE"] == best.params["LEARNING_RATE"] and str(row["LAYERS"]) == best.params["LAYERS"]
    wanted = {"head.pt", "search.csv", "search.png", "search_history.png", "study.journal"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert f"best: trial {best.number}" in capsys.readouterr().out

    run(search, **settings, RUN_DIR=str(folder), TRIALS=7)  # finished: nothing is trained
    assert len(trials_of(folder)) == 7
    with pytest.raises(UserError, match="STEPS 12, now 13"):
        run(search, **settings | dict(STEPS=13), RUN_DIR=str(folder), TRIALS=7)
    with pytest.raises(UserError, match="head.pt of another run"):
        run(search, **settings, RUN_DIR=str(tmp_path / "single"), TRIALS=7)
    run(search, **settings | dict(STEPS=13), RUN_DIR=str(folder), TRIALS=2, OVERWRITE=True)
    assert len(trials_of(folder)) == 2
    assert load_checkpoint(folder / "head.pt")[2]["made_with"]["STEPS"] == 13


KILLED_IN_TRAINING = """
import os, signal, torch
steps, step = 0, torch.optim.AdamW.step
def mortal(*arguments, **options):
    global steps
    steps += 1
    return step(*arguments, **options) if steps < 30 else os.kill(os.getpid(), signal.SIGKILL)
torch.optim.AdamW.step = mortal
"""


def start(settings, before=""):
    words = []
    for name, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.lower()}", text]
    code = f"{before}\nimport runpy, sys\nsys.argv = {['search', *words]!r}\n"
    code += "runpy.run_module('tools.search', run_name='__main__', alter_sys=False)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_processes_share_a_study_and_a_killed_round_does_not_count(fitted, tmp_path):
    settings = SEARCH | dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "study"), HEADS=2, TRIALS=6)
    killed = start(settings, KILLED_IN_TRAINING)  # in its second round
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [t.state for t in trials_of(tmp_path / "study")] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING] * 2
    processes = [start(settings) for _ in range(2)]
    for process in processes:
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
    trials = trials_of(tmp_path / "study")
    states = [t.state for t in trials]
    assert states.count(TrialState.COMPLETE) == 6 and states.count(TrialState.RUNNING) == 2
    assert len({tuple(t.params.items()) for t in trials}) == 8
    assert_is_best(tmp_path / "study", trials, fitted, tmp_path)
    assert not list((tmp_path / "study").glob("round-*")) and not (tmp_path / "study/.lock").exists()


def test_search_learns_from_its_trials(fitted, tmp_path, monkeypatch):
    """On a known objective the Gaussian process ends near the optimum, which eight random trials miss."""

    def new_learner(trunk, settings, name, *_):
        rate, decay = np.log10(settings["LEARNING_RATE"]), np.log10(settings["WEIGHT_DECAY"])
        output = tmp_path / name
        output.write_text(name)
        return SimpleNamespace(best=0.3 - (rate + 2) ** 2 - (decay + 1) ** 2 / 4, failed="", output=output)

    monkeypatch.setattr(train_head, "new_learner", new_learner)
    monkeypatch.setattr(training, "Run", lambda *_, **__: SimpleNamespace(run=lambda: None))
    settings = SEARCH | dict(DATA_DIR=str(fitted), LATENT_DIM_RANGE=(16, 16), LEARNING_RATE_RANGE=(1e-4, 1e-1))
    run(search, **settings, RUN_DIR=str(tmp_path / "study"), TRIALS=24, HEADS=8)
    values = [trial.value for trial in trials_of(tmp_path / "study")]
    assert max(values) > 0.29 > max(values[:8]) + 0.01
    best = int(np.argmax(values))
    assert (tmp_path / "study/head.pt").read_text() == f"trial-{best:04d}.pt"
    assert (tmp_path / "study/search_importance.png").exists()


def test_winner_is_trained_in_full(tmp_path):
    """With the report's shares: warm-up of a twentieth of the steps, down to a twentieth of the learning rate."""
    found = dict(LEARNING_RATE=0.004, WEIGHT_DECAY=0.3, LATENT_DIM=96, LAYERS="1,2")
    words = shlex.split(search.winner_command(found, tmp_path / "a b"))
    options = {name.removeprefix("--").upper(): text for name, text in zip(words[2::2], words[3::2])}
    kinds = train_head.__annotations__
    wanted = found | dict(STEPS=5000, WARMUP_STEPS=250, MIN_LEARNING_RATE=0.0002, RUN_DIR=f"{tmp_path}/a b_full")
    for name, value in wanted.items():  # defaults of train_head.py are left out
        parsed = parse(name, options[name], kinds[name]) if name in options else getattr(train_head, name)
        assert parsed == pytest.approx(value) if isinstance(value, float) else parsed == value, name


@pytest.mark.parametrize("settings", [
    dict(WEIGHT_DECAY_RANGE=(0.0, 1.0)), dict(LATENT_DIM_RANGE=(9, 5)), dict(FEATURE_DROPOUT_RANGE=(0.5, 1.0)),
    dict(LAYERS_CHOICES=";"),
])  # fmt: skip
def test_search_refuses(settings, fitted, tmp_path):
    with pytest.raises(UserError):
        run(search, **SEARCH | settings, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
