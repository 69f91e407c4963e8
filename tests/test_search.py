"""Many heads on one trunk, the search, and the comparison of trunks."""

import copy
import json
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import filelock
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
from core.settings import constants, override
from core.space import Space
from model import Crops, Trunk, UserError
from tests.conftest import TINY, assert_equal, read_log, run_process, run_stage, set_constants
from tools import compare_trunks, ridge, search

N_PICTURES, N_LH, N_VERTICES = 120, 20, 36
TRAINING = dict(TRUNK=TINY, PRETRAINED=False, IMAGE_SIZE=28, BATCH_SIZE=24, PRECISION="float32", DEVICE="cpu", SEED=7)


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
    activity = np.concatenate([(colours[own] - 0.5) @ tuning[s] * mask[s] for s, own in enumerate(seen)])
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
    run_stage(fit_pca, DATA_DIR=folder, PCA_DIM=16, DEVICE="cpu")
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(training, "save_curves", lambda *_: None)  # slow


# ---- many heads on one trunk ---------------------------------------------------------------------


def assert_same_head(path, other):
    assert_equal(*(load_checkpoint(p)[0].head.state_dict() for p in (path, other)))


def new_learners(fitted, different):
    """A learner for each dict of constants, and data, PCA and constants for training.Run."""
    shared = constants(vars(train_head)) | TRAINING | dict(DATA_DIR=fitted, STEPS=11, VALIDATE_EVERY=4, WARMUP_STEPS=2)
    settings = [shared | own for own in different]
    data = prepare_data.load(fitted)
    pca = fit_pca.load(fitted, data)
    trunk = Trunk(TINY, "0,1,2", image_size=28, pretrained=False, seed=7)
    device = torch.device("cpu"), torch.float32
    learners = [train_head.new_learner(trunk, s, f"{i}.pt", data, pca, *device) for i, s in enumerate(settings)]
    return learners, data, pca, settings


def test_heads_together_end_as_each_alone(fitted, tmp_path):
    """Bit for bit, whatever they differ in."""
    different = [
        dict(LEARNING_RATE=0.01, LAYERS="0,2", FEATURE_DROPOUT=0.3, LATENT_DIM=16),
        dict(LEARNING_RATE=0.03, LAYERS="1", FEATURE_DROPOUT=0.0, LATENT_DIM=8, PCA_DIM=10),
        dict(LEARNING_RATE=0.02, LAYERS="1,2", LATENT_DIM=16, WEIGHT_DECAY=0.3, BETAS=(0.8, 0.9)),
    ]
    different = [own | dict(RUN_DIR=str(tmp_path / "together")) for own in different]
    learners, data, pca, settings = new_learners(fitted, different)
    training.Run("together", learners, data, pca, settings[0]).run()
    for i, own in enumerate(settings):
        run_stage(train_head, **own | dict(RUN_DIR=str(tmp_path / f"alone_{i}")))
        assert_same_head(tmp_path / f"together/{i}.pt", tmp_path / f"alone_{i}/head.pt")


# ---- the search ----------------------------------------------------------------------------------

RANGES = dict(
    LEARNING_RATE_RANGE=(1e-3, 3e-2), WEIGHT_DECAY_RANGE=(0.01, 1.0), FEATURE_DROPOUT_RANGE=(0.0, 0.9),
    LATENT_DIM_RANGE=(8, 32), PCA_DIM_RANGE=(8, 16), LAYERS_CHOICES="0,1; 0",
)  # fmt: skip
SEARCH = TRAINING | RANGES | dict(STEPS=12, VALIDATE_EVERY=6)


def trials_of(folder):
    storage = optuna.storages.JournalStorage(search.JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(storage=storage, study_name="search").get_trials()


def assert_is_best(folder, fitted, tmp_path):
    """head.pt is the best scored trial's, as train_head.py trains it with the constants of that row."""
    best = max((t for t in trials_of(folder) if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    info = load_checkpoint(folder / "head.pt")[2]
    assert info["scores"]["val_r2"] == best.value and info["finished"]
    values = best.params | dict(MIN_LEARNING_RATE=best.params["LEARNING_RATE"] / 20, WARMUP_STEPS=0)
    values |= TRAINING | dict(STEPS=12, VALIDATE_EVERY=6, DATA_DIR=fitted, RUN_DIR=tmp_path / "single")
    run_stage(train_head, **values)
    assert_same_head(tmp_path / "single/head.pt", folder / "head.pt")
    return best


def test_search(fitted, tmp_path, capsys, monkeypatch):
    """Finds a trial better than the first; diverged ones count; the study continues and is not mixed with others."""
    is_finite, diverged = training.Learner.is_finite, ("trial-0002.pt", "trial-0003.pt", "trial-0005.pt")
    monkeypatch.setattr(training.Learner, "is_finite", lambda l: l.output.name not in diverged and is_finite(l))
    written, save = [], training.save_checkpoint
    settings = SEARCH | dict(DATA_DIR=fitted, HEADS=2, LEARNING_RATE_RANGE=(5e-4, 3e-2))
    folder = tmp_path / "study"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", lambda path, *a, **k: written.append(path) or save(path, *a, **k))
        patch.setattr(training, "save_torch", None)  # would hold the embedding once per head
        run_stage(search, **settings, RUN_DIR=folder, TRIALS=2)
        run_stage(search, **settings, RUN_DIR=folder, TRIALS=7)
    assert set(written) == {folder / "head.pt"} and len(written) <= 4  # at most once per round
    trials = trials_of(folder)
    assert set(trials[0].params) == {name.removesuffix("_RANGE").removesuffix("_CHOICES") for name in RANGES}
    usual = dict(LEARNING_RATE=6e-4, WEIGHT_DECAY=0.8, FEATURE_DROPOUT=0.9, PCA_DIM=16)
    assert usual.items() <= trials[0].params.items()
    states = [trial.state.name for trial in trials]
    assert states == ["PRUNED" if i in (2, 3, 5) else "COMPLETE" for i in range(7)]
    best = assert_is_best(folder, fitted, tmp_path)
    assert best.number > 0
    table = pd.read_csv(folder / "search.csv")
    assert table["trial"].tolist() == list(range(7)) and table["state"].tolist() == states
    row = table.loc[table["val_r2"].idxmax()]
    assert row["trial"] == best.number and row["LEARNING_RATE"] == best.params["LEARNING_RATE"]
    assert {path.name for path in folder.iterdir()} == {"head.pt", "search.csv", "study.journal"}
    assert f"best: trial {best.number}" in capsys.readouterr().out

    run_stage(search, **settings, RUN_DIR=folder, TRIALS=7)  # finished: nothing is trained
    assert len(trials_of(folder)) == 7
    with pytest.raises(UserError, match="STEPS: 12 before, 13 now"):
        run_stage(search, **settings | dict(STEPS=13), RUN_DIR=folder, TRIALS=7)
    with pytest.raises(UserError, match="head.pt of another run"):
        run_stage(search, **settings, RUN_DIR=tmp_path / "single", TRIALS=7)
    new = settings | dict(STEPS=13, RUN_DIR=folder, TRIALS=2, OVERWRITE=True)
    with search.trial_lock(folder / ".trial-3"), pytest.raises(filelock.Timeout):  # another process is training it
        run_stage(search, **new)
    run_stage(search, **new)
    assert len(trials_of(folder)) == 2
    assert load_checkpoint(folder / "head.pt")[2]["made_with"]["STEPS"] == 13


def test_head_of_the_best_validation(fitted, tmp_path, monkeypatch):
    """Is written, not that of the last; later steps do not change it."""
    [learner], *rest, [settings] = new_learners(fitted, [dict(RUN_DIR=str(tmp_path), LAYERS="1", LATENT_DIM=8)])
    scores, states = [0.1, 0.3, 0.2, 0.1], []

    def validate(encoders, *_):
        states.append(copy.deepcopy(encoders[0].head.state_dict()))
        return [{"val_loss": 1.0, "val_r2": scores[len(states) - 1]}]

    monkeypatch.setattr(training, "validate", validate)
    search.Round("search", [learner], *rest, settings).train()
    search.write_head(tmp_path / "head.pt", learner, rest[0])
    encoder, _, info = load_checkpoint(tmp_path / "head.pt")
    assert len(states) == 4 and info["step"] == 4 and info["scores"]["val_r2"] == 0.3
    assert_equal(dict(encoder.head.state_dict()), dict(states[1]))


def test_processes_share_a_study_and_a_killed_round_does_not_count(fitted, tmp_path):
    folder = tmp_path / "study"
    settings = SEARCH | dict(DATA_DIR=fitted, RUN_DIR=folder, HEADS=2, TRIALS=6)
    second_round = ("core.training", "train_step", 15)
    assert run_process("tools/search.py", dies_at=second_round, **settings)[0] == -signal.SIGKILL
    killed = trials_of(folder)
    assert [trial.state.name for trial in killed] == ["COMPLETE"] * 2 + ["RUNNING"] * 2
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda _: run_process("tools/search.py", **settings), range(2)))
    assert [code for code, _ in ends] == [0, 0], ends
    trials = trials_of(folder)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2 + ["FAIL"] * 2 + ["COMPLETE"] * 4
    assert [t.value for t in trials[:2]] == [t.value for t in killed[:2]]
    assert len({tuple(t.params.items()) for t in trials}) == 8
    assert_is_best(folder, fitted, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"head.pt", "search.csv", "study.journal"}


def test_search_learns_from_its_trials(fitted, tmp_path, monkeypatch):
    """On a known objective most trials of the third round are near its maximum 0.3, unlike the random first ones."""
    winners = []

    def new_learner(trunk, settings, *_):
        rate, decay = np.log10(settings["LEARNING_RATE"]), np.log10(settings["WEIGHT_DECAY"])
        return SimpleNamespace(best=0.3 - (rate + 2) ** 2 - (decay + 1) ** 2 / 4, failed="")

    monkeypatch.setattr(train_head, "new_learner", new_learner)
    monkeypatch.setattr(search, "Round", lambda *_, **__: SimpleNamespace(train=lambda: None))
    monkeypatch.setattr(search, "write_head", lambda path, learner, data: winners.append(learner.best))
    settings = SEARCH | dict(DATA_DIR=fitted, LEARNING_RATE_RANGE=(1e-4, 1e-1), FEATURE_DROPOUT_RANGE=(0.5, 0.5))
    settings |= dict(LATENT_DIM_RANGE=(16, 16), PCA_DIM_RANGE=(16, 16), LAYERS_CHOICES="0")
    run_stage(search, **settings, RUN_DIR=tmp_path / "study", TRIALS=24, HEADS=8)
    values = [trial.value for trial in trials_of(tmp_path / "study")]
    assert np.median(values[:8]) < 0 and np.median(values[16:]) > 0.25
    best_so_far = np.maximum.accumulate(np.reshape(values, (3, 8)).max(1))
    assert winners == sorted(set(best_so_far.tolist()))


def test_winner_is_trained_in_full(tmp_path):
    """With train_head.py's schedule, and its share of MIN_LEARNING_RATE."""
    params = dict(LEARNING_RATE=0.004, WEIGHT_DECAY=0.3, LATENT_DIM=96, LAYERS="1,2")
    namespace = dict(vars(train_head))
    override(namespace, shlex.split(search.winner_command(params, tmp_path / "a b"))[2:])
    expected = params | dict(MIN_LEARNING_RATE=0.0002, RUN_DIR=f"{tmp_path}/a b_full")
    for name, value in (constants(vars(train_head)) | expected).items():
        assert namespace[name] == pytest.approx(value) if isinstance(value, float) else namespace[name] == value, name


# ---- the comparison of trunks --------------------------------------------------------------------

OTHER = "vit_small_patch14_reg4_dinov2.lvd142m"
TRUNKS = TRAINING | dict(LAYERS="0", LATENT_DIM=16, LEARNING_RATE=0.03, STEPS=30, VALIDATE_EVERY=5,
                         FEATURE_DROPOUT=0.2, SEEDS=2, RESAMPLES=20)  # fmt: skip
del TRUNKS["TRUNK"]


@pytest.fixture(scope="module")
def compared(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunks")
    run_stage(compare_trunks, **TRUNKS, DATA_DIR=fitted, RUN_DIR=folder, TRUNKS=(TINY, OTHER))
    return folder


@torch.no_grad()
def expected_predictions(folder, data):
    """{(method, seed): per subject (n_val_samples, n_vertices of the subject)}, by scikit-learn and predict()."""
    heads = [load_checkpoint(folder / TINY / f"seed-{i}.pt")[0] for i in range(2)]
    trunk, pictures = heads[0].trunk, torch.from_numpy(np.array(data.images[: data.n_training_images]))
    images = Crops(trunk).whole(pictures)
    tokens = trunk(images)[0].double().numpy()
    features = np.concatenate([tokens[:, 0], tokens[:, trunk.n_prefix :].mean(1)], axis=1)  # class, mean patch token
    predictions = {("head", 0): [], ("head", 1): [], ("ridge", 0): []}
    for s in range(3):
        mask, train, val = data.space.mask[s].numpy(), data.samples("train", s), data.samples("val", s)
        for i, encoder in enumerate(heads):
            z = encoder(images[data.image[val]], torch.full((len(val),), s))
            predictions["head", i].append(encoder.head.decode(z).numpy()[:, mask])
        x = features[data.image[train]]
        mean, deviation = x.mean(0), x.std(0)
        model = RidgeCV(np.array(ridge.PENALTIES) * x.shape[1], alpha_per_target=True)
        model.fit((x - mean) / deviation, data.activity[train][:, mask].astype(np.float64))
        predictions["ridge", 0].append(model.predict((features[data.image[val]] - mean) / deviation))
    return predictions


def test_trunk_table_against_an_independent_computation(compared, fitted):
    """Scores of the best checkpoints, ridge fitted on training samples, streams, and resamples of pictures."""
    data = prepare_data.load(fitted)
    rows = json.loads((compared / TINY / "scores.json").read_text())["rows"]
    logs = [read_log(compared / TINY / f"seed-{i}.jsonl") for i in range(2)]
    assert any(max(entry["val_r2"] for entry in log) > log[-1]["val_r2"] + 1e-3 for log in logs)  # the best is not last
    val = [data.samples("val", s) for s in range(3)]
    activity = [data.activity[own][:, data.space.mask[s]].astype(np.float64) for s, own in enumerate(val)]
    labels = data.space.rois["streams"]["labels"].numpy()
    pictures = sorted({int(image) for own in val for image in data.image[own]})
    n = len(pictures)
    counts = np.random.default_rng(TRAINING["SEED"]).multinomial(n, np.full(n, 1 / n), TRUNKS["RESAMPLES"])
    predictions = expected_predictions(compared, data)
    assert [(row["method"], row["seed"]) for row in rows] == list(predictions)
    for row in rows:
        prediction = predictions[row["method"], row["seed"]]
        scores = [r2_score(y, p, multioutput="raw_values") for y, p in zip(activity, prediction)]
        assert row["val_r2"] == pytest.approx(np.median(np.concatenate(scores)), abs=1e-3)
        for label, name in ((1, "early"), (2, "ventral")):
            inside = [scores[s][labels[s][data.space.mask[s]] == label] for s in range(3)]
            assert row[f"val_r2_{name}"] == pytest.approx(np.median(np.concatenate(inside)), abs=1e-3)
        for draw, value in zip(counts, row["resampled"], strict=True):
            resampled = []
            for s in range(3):
                times = [draw[pictures.index(image)] for image in data.image[val[s]]]
                chosen = np.repeat(np.arange(len(times)), times)
                if len(set(chosen)) > 1:
                    resampled.append(r2_score(activity[s][chosen], prediction[s][chosen], multioutput="raw_values"))
            assert value == pytest.approx(np.median(np.concatenate(resampled)), abs=2e-3)


def test_trunks_csv(compared):
    table = pd.read_csv(compared / "trunks.csv")
    assert sorted(table["trunk"] + table["method"]) == [t + m for t in (TINY, OTHER) for m in ("head", "ridge")]
    assert table["val_r2"].is_monotonic_decreasing and table["report"].isna().all()
    for line in table.itertuples():
        rows = json.loads((compared / line.trunk / "scores.json").read_text())["rows"]
        values, early = zip(*((row["val_r2"], row["val_r2_early"]) for row in rows if row["method"] == line.method))
        assert line.n_seeds == len(values) and line.val_r2 == pytest.approx(np.mean(values))
        assert line.val_r2_early == pytest.approx(np.mean(early))
        assert np.isnan(line.deviation) or line.deviation == pytest.approx(np.std(values, ddof=1))
        assert line.low <= line.difference <= line.high


def test_finished_trunks_are_kept(compared, fitted, capsys):
    """And other settings refused; names are checked before anything trains."""
    checkpoint = compared / TINY / "seed-1.pt"
    before, table = checkpoint.stat().st_mtime_ns, (compared / "trunks.csv").read_bytes()
    settings = TRUNKS | dict(DATA_DIR=fitted, RUN_DIR=compared)
    run_stage(compare_trunks, **settings, TRUNKS=(TINY,))  # the others stay in the table
    assert checkpoint.stat().st_mtime_ns == before and (compared / "trunks.csv").read_bytes() == table
    output = capsys.readouterr().out
    assert "too short to compare" in output and "does not cover seeds" in output
    made = [load_checkpoint(compared / TINY / f"seed-{i}.pt")[2]["made_with"] for i in range(2)]
    assert {name for name in made[0] if made[0][name] != made[1][name]} == {"SEED"}
    assert (made[0]["LATENT_DIM"], made[0]["LAYERS"], made[0]["LEARNING_RATE"]) == (16, "0", 0.03)
    with pytest.raises(UserError, match="STEPS: 30 before, 7 now"):
        run_stage(compare_trunks, **settings | dict(STEPS=7), TRUNKS=(TINY,))
    for changes in (dict(LAYERS="12", TRUNKS=(TINY,)), dict(TRUNKS=(TINY, "vit_nothing"))):
        with pytest.raises(UserError, match="blocks 0 to 11|build vit_nothing"):
            run_stage(compare_trunks, **settings | dict(RUN_DIR=compared / "new") | changes)
    assert not (compared / "new").exists()


def test_a_trunk_that_fails_leaves_the_others(fitted, tmp_path, monkeypatch):
    create = compare_trunks.Trunk

    def without_weights(name, layers, image_size, pretrained, *seed):
        if name == OTHER and pretrained:
            raise UserError("no pretrained weights")
        return create(name, layers, image_size, False, *seed)

    monkeypatch.setattr(compare_trunks, "Trunk", without_weights)
    settings = TRUNKS | dict(DATA_DIR=fitted, PRETRAINED=True, SEEDS=1, STEPS=2, RIDGE=False)
    with pytest.raises(UserError, match=f"{OTHER}: no pretrained weights"):
        run_stage(compare_trunks, **settings, RUN_DIR=tmp_path, TRUNKS=(OTHER, TINY))
    assert pd.read_csv(tmp_path / "trunks.csv")["trunk"].tolist() == [TINY]
    monkeypatch.setattr(training.Learner, "is_finite", lambda learner: learner.output.name != "seed-1.pt")
    with pytest.raises(UserError, match="seed-1.pt: the loss is not finite"):
        run_stage(compare_trunks, **settings | dict(SEEDS=2), RUN_DIR=tmp_path / "diverged", TRUNKS=(TINY,))
    assert not (tmp_path / "diverged/trunks.csv").exists()


def test_differences_between_trunks_are_paired():
    """Resamples that move two trunks alike leave their difference as it is; the ends are low and high."""
    moves = np.random.default_rng(0).normal(0, 0.1, 1000)

    def rows(value, scatter):
        resampled = value + moves + np.random.default_rng(1).gamma(1, scatter, 1000)
        return [{"method": "head", "seed": 0, "val_r2": value, "val_r2_early": value, "resampled": resampled.tolist()}]

    table = compare_trunks.summarise({"b": rows(0.1, 0), "a": rows(0.2, 0), "c": rows(0.19, 0.01)})
    assert table["trunk"].tolist() == ["a", "c", "b"]
    assert (table[["difference", "low", "high"]].iloc[0] == 0).all()
    assert table["low"][1] == pytest.approx(-0.01 + 0.01 * (np.log(1 / 0.975) - np.log(2)), abs=0.001)
    assert table["high"][1] == pytest.approx(-0.01 + 0.01 * (np.log(1 / 0.025) - np.log(2)), abs=0.005)
    assert table["low"][2] == pytest.approx(-0.1) and table["high"][2] == pytest.approx(-0.1)


def test_reports_numbers_stand_beside_its_settings_only(monkeypatch):
    def data(n_subjects):
        return SimpleNamespace(space=SimpleNamespace(subjects=[""] * n_subjects))

    pca = SimpleNamespace(components=torch.empty(1, 2048))
    assert compare_trunks.has_report_settings(data(8), pca)
    assert not compare_trunks.has_report_settings(data(2), pca)
    assert not compare_trunks.has_report_settings(data(8), SimpleNamespace(components=torch.empty(1, 64)))
    for name, value in dict(STEPS=1000, LAYERS="0,2,4", IMAGE_SIZE=448, LEARNING_RATE=1e-3, PCA_DIM=64).items():
        with monkeypatch.context() as patch:
            set_constants(patch, compare_trunks, **{name: value})
            assert not compare_trunks.has_report_settings(data(8), pca), name
    rows = [{"method": m, "seed": 0, "val_r2": 0.2, "resampled": [0.2]} for m in ("head", "ridge")]
    results = {"vit_base_patch16_224.mae": rows, TINY: rows}
    for with_report, expected in ((True, [0.1832]), (False, [])):
        table = compare_trunks.summarise(results, with_report)
        assert table["report"].dropna().tolist() == expected
