"""Many heads on one trunk, the search, and the comparison of trunks."""

import csv
import json
import os
import shlex
import signal
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from PIL import Image

import compare_trunks
import demo
import fit_pca
import prepare_data
import search
import train_head
import training
from checkpoint import load_checkpoint
from common import Problem, constants, parse_constant
from model import Trunk
from shared_fixtures import another_process, assert_equal, both, finish, on_command_line, run, small, start, tiny


def train_together(settings, run_dir):
    """The heads of these constants on one pass of the trunk -> the training."""
    settings = [constants(vars(train_head)) | both | small | {"RUN_DIR": str(run_dir)} | own for own in settings]
    first = settings[0]
    data = prepare_data.load(first["DATA_DIR"])
    pca = fit_pca.load(first["DATA_DIR"], data)
    layers = " ".join(s["LAYERS"] for s in settings)
    trunk = Trunk(first["TRUNK"], layers, image_size=first["IMAGE_SIZE"], pretrained=False, seed=first["SEED"])
    learners = [
        train_head.new_learner(trunk, s, f"{i}.pt", data, pca, torch.device("cpu"), torch.float32)
        for i, s in enumerate(settings)
    ]
    together = training.Training("together", learners, data, pca, first, tolerant=True)
    together.run()
    return together


def test_heads_together_end_as_each_alone(fitted, tmp_path, monkeypatch):
    """Bit for bit, whatever they differ in, and stopped and continued in between."""
    shared = dict(DATA_DIR=str(fitted), VALIDATE_EVERY=4, SEED=5, BATCH_SIZE=24, MICRO_BATCH=12)
    settings = [
        shared | dict(STEPS=11, LEARNING_RATE=0.01, LAYERS="blocks.{0,2}", FEATURE_DROPOUT=0.3),
        shared | dict(STEPS=6, LEARNING_RATE=0.03, LAYERS="blocks.1", LATENT_DIM=8, PCA_DIM=10, FEATURE_DROPOUT=0.0),
        shared | dict(STEPS=9, LEARNING_RATE=0.02, LAYERS="blocks.{1,2}", MIN_LEARNING_RATE=0.001, WARMUP_STEPS=4,
                      WEIGHT_DECAY=0.9, BETAS=(0.8, 0.9)),
    ]  # fmt: skip
    for i, own in enumerate(settings):
        run(train_head, **both | small | own, RUN_DIR=str(tmp_path / f"alone_{i}"))
    train_together(settings, tmp_path / "together")
    n_steps, step = 0, torch.optim.AdamW.step

    def stopped(*arguments, **options):
        nonlocal n_steps
        n_steps += 1
        if n_steps in (2, 22):  # before the first head's end and, of the continuation, between two ends
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", stopped)
    for _ in range(2):
        with pytest.raises(SystemExit):
            train_together(settings, tmp_path / "stopped")
    train_together(settings, tmp_path / "stopped")
    for i in range(len(settings)):
        alone = tmp_path / f"alone_{i}"
        for name in ("together", "stopped"):
            assert (tmp_path / name / f"{i}.jsonl").read_bytes() == (alone / "train_head.jsonl").read_bytes()
            assert_equal(torch.load(tmp_path / name / f"{i}.pt"), torch.load(alone / "head.pt"))


# ---- the search ---------------------------------------------------------------------------------

ranges = dict(
    LEARNING_RATE_RANGE=(1e-3, 3e-2), WEIGHT_DECAY_RANGE=(0.01, 1.0), FEATURE_DROPOUT_RANGE=(0.0, 0.9),
    LATENT_DIM_RANGE=(8, 32), LAYERS_CHOICES="blocks.{0,1}; blocks.0",
)  # fmt: skip
quick = dict(TRUNK=tiny, PRETRAINED=False, IMAGE_SIZE=56, BATCH_SIZE=48, PRECISION="float32", DEVICE="cpu", SEED=7)


def trials_of(folder):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return search.read_study(folder / "study.journal").get_trials()


def files_of(folder):
    return {path.name for path in folder.glob("[!.]*")}


# dies as by kill -9 in the middle of the n-th line whose text holds this
dies_while_writing = """
import os, signal
from optuna.storages.journal import JournalFileBackend
lines, append = 0, JournalFileBackend.append_logs
def half(self, logs):
    global lines
    lines += '{text}' in str(logs)
    if lines < {n}:
        return append(self, logs)
    self._lock.acquire()
    with open(self._file_path, "a") as file:
        file.write(str(logs)[:20])
    os.kill(os.getpid(), signal.SIGKILL)
JournalFileBackend.append_logs = half
"""
dies_in_training = """
import os, signal, torch
steps, step = 0, torch.optim.AdamW.step
def mortal(*arguments, **options):
    global steps
    steps += 1
    return step(*arguments, **options) if steps < 9 else os.kill(os.getpid(), signal.SIGKILL)
torch.optim.AdamW.step = mortal
"""


def test_killed_search_continues(fitted, subset, tmp_path, capsys):
    """Killed while drawing a round, while training, while telling a round: the end is that of a search left alone,
    with a trial that fails. The last head is one that train_head.py makes with the row's constants."""
    settings = quick | ranges | dict(DATA_DIR=str(fitted), TRIALS=5, HEADS=2, STEPS=6, VALIDATE_EVERY=3)
    settings |= dict(LEARNING_RATE_RANGE=(5e-4, 1e12), WEIGHT_DECAY_RANGE=(1.0, 1.0))
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    run(search, **settings, RUN_DIR=str(alone))
    trials = trials_of(alone)
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    states = [trial.state for trial in trials]
    assert TrialState.FAIL in states and states.count(TrialState.COMPLETE) >= 2
    command = ("search.py", "--run_dir", killed, *on_command_line(settings))
    for trap in (
        dies_while_writing.format(text="FEATURE_DROPOUT", n=2), dies_in_training,
        dies_while_writing.format(text="datetime_complete", n=2),
    ):  # fmt: skip
        assert finish(start(*command, before=trap))[0] == -signal.SIGKILL
    capsys.readouterr()
    run(search, **settings, RUN_DIR=str(killed))
    assert f"python train_head.py --data_dir {fitted} --run_dir {killed}_full" in capsys.readouterr().out
    for a, b in zip(trials, trials_of(killed), strict=True):
        assert (a.params, a.state, a.value) == (b.params, b.state, b.value)
    assert (alone / "search.csv").read_bytes() == (killed / "search.csv").read_bytes()
    assert_equal(torch.load(alone / "head.pt"), torch.load(killed / "head.pt"))
    assert files_of(alone) == files_of(killed) == {"head.pt", "search.csv", "search.png", "study.journal"}
    assert Image.open(killed / "search.png").format == "PNG"

    rows = list(csv.DictReader((killed / "search.csv").open()))
    assert [row["val_r2"] != "" for row in rows] == [state == TrialState.COMPLETE for state in states]
    best = max(rows, key=lambda row: float(row["val_r2"] or "-inf"))
    row = {k: text for k, text in best.items() if k not in ("trial", "val_r2", "state") and text}
    values = {name: parse_constant(name, text, getattr(train_head, name)) for name, text in row.items()}
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "single"))
    run(train_head, **values, **folders, DEVICE="cpu", PRECISION="float32")
    assert_equal(torch.load(killed / "head.pt"), torch.load(tmp_path / "single/head.pt"))
    made = load_checkpoint(killed / "head.pt")[2]
    assert made["scores"]["val_r2"] == float(best["val_r2"]) and made["finished"]

    run(search, **settings, RUN_DIR=str(killed))  # finished: nothing is trained, nothing lost
    assert len(trials_of(killed)) == 5
    with pytest.raises(Problem, match="BATCH_SIZE: 48 there, 40 now"):
        run(search, **settings | dict(BATCH_SIZE=40), RUN_DIR=str(killed))
    with pytest.raises(Problem, match="pca_fingerprint: .* there"):
        run(search, **settings | dict(DATA_DIR=str(subset)), RUN_DIR=str(killed))
    with pytest.raises(Problem, match="holds the head.pt of another run"):
        run(search, **settings, RUN_DIR=str(tmp_path / "single"))


@pytest.fixture
def drawn(monkeypatch):
    """How many trials plot_search() was given, at every call; it takes a second: test_killed_search_continues has
    the figure."""
    calls = []

    def count(found, path):
        calls.append(len(found["number"]))
        path.touch()

    monkeypatch.setattr(search, "plot_search", count)
    monkeypatch.setattr(training, "seconds_between_drawings", 1e9)
    return calls


def test_a_round_too_large_goes_on_with_fewer_heads(fitted, tmp_path, drawn, monkeypatch):
    """And search.png is drawn at the end, and before it where the last one is some seconds old."""
    settings = quick | ranges | dict(DATA_DIR=str(fitted), TRIALS=3, STEPS=2, VALIDATE_EVERY=1)
    run(search, **settings, HEADS=3, RUN_DIR=str(tmp_path / "whole"))
    step, n_heads = training.train_step, []

    def small_memory(learners, *arguments):
        n_heads.append(len(learners))
        if len(learners) > 2:
            raise MemoryError
        step(learners, *arguments)

    monkeypatch.setattr(training, "train_step", small_memory)
    with pytest.raises(MemoryError):
        run(search, **settings, HEADS=3, RUN_DIR=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        patch.setattr(training, "seconds_between_drawings", 0)
        run(search, **settings, HEADS=2, RUN_DIR=str(tmp_path / "parts"))
    assert drawn == [3, 3, 3]  # once, and twice
    assert n_heads == [3, 2, 2, 1, 1]
    assert (tmp_path / "whole/search.csv").read_bytes() == (tmp_path / "parts/search.csv").read_bytes()
    assert_equal(torch.load(tmp_path / "whole/head.pt"), torch.load(tmp_path / "parts/head.pt"))
    assert files_of(tmp_path / "parts") == {"head.pt", "search.csv", "search.png", "study.journal"}


def test_two_processes_share_a_study(fitted, tmp_path):
    """Each waits in its first round until the other one has begun; every trial is trained once."""
    settings = quick | ranges | dict(DATA_DIR=str(fitted), TRIALS=7, HEADS=2, STEPS=4, RUN_DIR=str(tmp_path))
    waits = f"""
import pathlib, time, training
train = training.Training.run
def run(self):
    while not all(pathlib.Path({str(tmp_path)!r}, name).exists() for name in ("worker-0", "worker-1")) and not done:
        time.sleep(0.05)
    done.append(1)
    train(self)
    print("trained", *(learner.output.stem for learner in self.learners))
done, training.Training.run = [], run
"""
    processes = [start("search.py", *on_command_line(settings), before=waits) for _ in range(2)]
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [0, 0]
    trained = [[line.split()[1:] for line in out.splitlines() if line.startswith("trained")] for _, out, _ in ends]
    assert all(trained)
    everything = [name for rounds in trained for names in rounds for name in names]
    assert sorted(everything) == [f"trial-{i:04d}" for i in range(7)]
    trials = trials_of(tmp_path)
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len({tuple(trial.params.items()) for trial in trials}) == 7
    crop_scales = []
    for names in sorted(names for rounds in trained for names in rounds):  # one for all heads that share their pictures
        [crop_scale] = {trials[int(name[-4:])].params["CROP_SCALE"] for name in names}
        crop_scales.append(crop_scale)
    assert crop_scales[:2] == [train_head.CROP_SCALE] * 2
    assert min(np.diff(sorted(crop_scales[1:]))) > 0.1  # of 0.5 to 1: no sampler stays at the first
    best = max(trials, key=lambda trial: trial.value)
    made = load_checkpoint(tmp_path / "head.pt")[2]
    assert made["scores"]["val_r2"] == best.value and made["made_with"]["LEARNING_RATE"] == best.params["LEARNING_RATE"]
    assert len(list(csv.DictReader((tmp_path / "search.csv").open()))) == 7
    assert files_of(tmp_path) == {"head.pt", "search.csv", "search.png", "study.journal"}


def test_search_beats_the_reports_constants(tmp_path, drawn):
    """16 trials on two people: the first with the constants of train_head.py, which few steps undertrain, seven drawn
    at random, eight from the Gaussian process, which gain where random ones gain 0.002."""
    challenge, data = tmp_path / "challenge", str(tmp_path / "data")
    demo.simulate(challenge, subjects=(1, 2), n_train=240, n_test=5, picture_size=80, vertex_step=16, seed=1)
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=data, SEED=3)
    run(fit_pca, DATA_DIR=data, PCA_DIM=32)
    settings = quick | dict(DATA_DIR=data, TRIALS=16, HEADS=8, BATCH_SIZE=32, STEPS=24, VALIDATE_EVERY=24)
    settings |= ranges | dict(LATENT_DIM_RANGE=(16, 16), LEARNING_RATE_RANGE=(5e-4, 3e-2))
    run(search, **settings, RUN_DIR=str(tmp_path))
    assert drawn == [16]  # at the end
    trials = trials_of(tmp_path)
    first = trials[0].params
    assert (first["LEARNING_RATE"], first["WEIGHT_DECAY"], first["FEATURE_DROPOUT"]) == (6e-4, 0.8, 0.9)
    best = max(trials, key=lambda trial: trial.value)
    assert best.value > max(trials[0].value, 0) + 0.1
    assert best.value > max(trial.value for trial in trials[:8]) + 0.04
    found = search.search_curves(search.read_study(tmp_path / "study.journal"))
    assert found["best"][-1] == best.value and (np.diff(found["best"]) >= 0).all()
    assert "LATENT_DIM" not in found["constants"]  # its ends are equal
    assert sum(found["importance"].values()) == pytest.approx(1)


def test_what_overwrite_gives_up(tmp_path, monkeypatch):
    """A study that is finished or has other inputs, not one that goes on or that another process works on."""
    for name, value in dict(OVERWRITE=True, TRIALS=1).items():
        monkeypatch.setattr(search, name, value)
    study = search.open_study(tmp_path, {"SEED": 1})
    study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
    assert len(search.open_study(tmp_path, {"SEED": 1}).trials) == 1
    (tmp_path / "worker-0").mkdir()
    with another_process(tmp_path / "worker-0"), pytest.raises(Problem, match="is being written to by"):
        search.open_study(tmp_path, {"SEED": 2})
    assert len(search.read_study(tmp_path / "study.journal").trials) == 1
    assert search.open_study(tmp_path, {"SEED": 2}).trials == []
    study = search.open_study(tmp_path, {"SEED": 2})
    study.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.1))
    assert search.open_study(tmp_path, {"SEED": 2}).trials == []


def test_the_winner_is_trained_in_full(tmp_path):
    """With the report's shares: a warm-up of a twentieth of the steps, down to a twentieth of the learning rate."""
    found = dict(LEARNING_RATE=0.004, WEIGHT_DECAY=0.3, LATENT_DIM=96, BETAS=(0.8, 0.9), LAYERS="blocks.{1,2}")
    [python, script, *words] = shlex.split(search.winner_command(SimpleNamespace(params=found), tmp_path / "a b"))
    values = {name.removeprefix("--").upper(): text for name, text in zip(words[::2], words[1::2])}
    n_steps = search.FULL_SCHEDULE * search.STEPS
    wanted = found | dict(STEPS=n_steps, WARMUP_STEPS=n_steps // 20, MIN_LEARNING_RATE=0.0002)
    wanted["RUN_DIR"] = f"{tmp_path}/a b_full"
    for name, value in wanted.items():  # a constant that is train_head.py's own goes without saying
        read = parse_constant(name, values[name], value) if name in values else getattr(train_head, name)
        assert read == pytest.approx(value) if isinstance(value, float) else read == value, name


@pytest.mark.parametrize("constant, value, message", [
    ("WEIGHT_DECAY_RANGE", (0.0, 1.0), "logarithmic"),
    ("CROP_SCALE_RANGE", (0.9, 0.5), "the smaller one first"),
    ("FEATURE_DROPOUT_RANGE", (0.5, 1.0), "expected 0 to 0.999"),
    ("LAYERS_CHOICES", ";", "LAYERS_CHOICES is empty"),
    ("HEADS", 0, "expected 1 or more"),
])  # fmt: skip
def test_search_refuses(constant, value, message, tmp_path):
    with pytest.raises(Problem, match=message):
        run(search, **{constant: value}, DEVICE="cpu", RUN_DIR=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- the comparison of trunks -------------------------------------------------------------------


def test_trunks_are_compared(fitted, subset, tmp_path, capsys):
    """A table of what can be had; what is finished stays; heads of one trunk differ by their seed alone."""
    other = "vit_tiny_patch16_224.augreg_in21k"
    settings = dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path), PRETRAINED=False, IMAGE_SIZE=112, LAYERS="blocks.0",
                    BATCH_SIZE=24, STEPS=6, SEEDS=2, DEVICE="cpu", PRECISION="float32")  # fmt: skip
    run(compare_trunks, **settings, TRUNKS=tiny)
    checkpoint, alone = tmp_path / tiny / "seed-1.pt", (tmp_path / "trunks.csv").read_bytes()
    before = checkpoint.stat().st_mtime_ns
    with pytest.raises(Problem, match="1 of 3 trunks are not in the table:\n  vit_nothing: unknown trunk"):
        run(compare_trunks, **settings, TRUNKS=f"{tiny} vit_nothing {other}")
    assert checkpoint.stat().st_mtime_ns == before and f"{tiny} is finished" in capsys.readouterr().out
    rows = {(row["trunk"], row["method"]): row for row in csv.DictReader((tmp_path / "trunks.csv").open())}
    assert set(rows) == {(trunk, method) for trunk in (tiny, other) for method in ("head", "ridge")}
    assert [float(row["val_r2"]) for row in rows.values()] == sorted((float(r["val_r2"]) for r in rows.values()))[::-1]
    logs = [[json.loads(x) for x in (tmp_path / tiny / f"seed-{i}.jsonl").read_text().splitlines()] for i in range(2)]
    best = [max(entry["val_r2"] for entry in log) for log in logs]
    assert best[0] != best[1]
    assert float(rows[tiny, "head"]["val_r2"]) == pytest.approx(np.mean(best), abs=1e-6)
    assert float(rows[tiny, "head"]["deviation"]) == pytest.approx(np.std(best, ddof=1), abs=1e-6)
    table = (tmp_path / "trunks.csv").read_bytes()
    run(compare_trunks, **settings, TRUNKS=other)  # by itself it leaves the others in the table
    assert (tmp_path / "trunks.csv").read_bytes() == table != alone
    made = [log[0]["made_with"] for log in logs]
    assert {name for name in made[0] if made[0][name] != made[1][name]} == {"SEED"}
    others = {"STEPS: 6 there, 7 now": dict(STEPS=7), "data_fingerprint: .* there": dict(DATA_DIR=str(subset))}
    for message, other in others.items():
        with pytest.raises(Problem, match=message):
            run(compare_trunks, **settings | other, TRUNKS=tiny)


def test_differences_between_trunks_are_paired():
    """Resamples that move two trunks alike leave their difference as it is."""
    moves = np.random.default_rng(0).normal(0, 0.1, 1000)

    def rows(value, scatter):
        resampled = value + moves + np.random.default_rng(1).normal(0, scatter, 1000)
        return [{"method": "head", "seed": 0, "val_r2": value, "val_r2_early": value, "resampled": resampled.tolist()}]

    lines = compare_trunks.summarise({"a": rows(0.2, 0), "b": rows(0.1, 0), "c": rows(0.19, 0.01)})
    assert [line["trunk"] for line in lines] == ["a", "c", "b"]
    assert (lines[0]["difference"], lines[0]["low"], lines[0]["high"]) == (0, 0, 0)
    assert lines[1]["low"] == pytest.approx(-0.01 - 1.96 * 0.01, abs=0.003)
    assert lines[1]["high"] == pytest.approx(-0.01 + 1.96 * 0.01, abs=0.003)
    assert (lines[2]["low"], lines[2]["high"]) == pytest.approx((-0.1, -0.1))
