"""Shared fixtures and helpers: a tiny simulated challenge folder, what the stages make of it, and ways to run stages.

Fixtures (session scope, built once for all pytest-xdist workers; read-only: tests copy what they change):

    challenge      challenge folder of subj01 … subj08, 40 training pictures of subj01, every 16th vertex
    subjects       {name: its files, read plainly}
    data_dir       DATA_DIR: prepared data (SEED 3) and a PCA of 24 components
    run_dir        RUN_DIR: head.pt and its log, a tiny trunk with random weights, trained for 8 steps
    finetuned_dir  RUN_DIR: the same, and finetuned.pt, fine-tuned for 5 steps

Helpers: from tests.conftest import run_stage, run_process, on_command_line, assert_equal, TINY, HEAD, TRAINING
"""

import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several tests run at a time

import filelock
import numpy as np
import pytest
import torch

import finetune
import fit_pca
import prepare_data
import train_head
from core.settings import owners
from core.space import HEMIS
from tools.simulate import simulate

ROOT = Path(__file__).parents[1]
TINY = "eva02_tiny_patch14_224.mim_in22k"
SIMULATED = dict(n_train=40, n_test=5, picture_size=80, vertex_step=16, seed=1)
TRAINING = dict(BATCH_SIZE=48, WARMUP_STEPS=2, FEATURE_DROPOUT=0.2, WEIGHT_DECAY=0.1, PRECISION="float32", DEVICE="cpu")
HEAD = dict(TRUNK=TINY, PRETRAINED=False, LAYERS="0,2", IMAGE_SIZE=56, LATENT_DIM=16)


# ---- running scripts -----------------------------------------------------------------------------


def set_constants(patch, module, **constants):
    """Set constants of a script, in the script that owns them; refuses unknown names. Paths become text."""
    known = dict.fromkeys(vars(module), vars(module)) | owners(vars(module))
    for name, value in constants.items():
        patch.setitem(known[name], name, str(value) if isinstance(value, Path) else value)


def run_stage(module, **constants):
    """The script's real main() with these constants, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, module, **constants)
        with torch.enable_grad():
            module.main()


def on_command_line(constants):
    """Constants as the options that a user types: [--name, text, …]."""
    words = []
    for name, value in constants.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.lower()}", text.lower() if isinstance(value, bool) else text]
    return words


def run_process(script, dies_at=None, seconds=200, **constants):
    """Run a script ("train_head.py", "tools/search.py") in a process of its own -> (exit code, its output and errors).

    dies_at: (module, function, n) kills it, as kill -9, at the n-th call of that function, such as
    ("core.training", "train_step", 4). It is forked from a process that has imported the stages, which saves seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "predict"])
    with tempfile.NamedTemporaryFile("r") as output:
        arguments = (script, on_command_line(constants), dies_at, output.name)
        process = context.Process(target=run_script, args=arguments)
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{script} still runs after {seconds} s: {output.read()}")
        return process.exitcode, output.read()


def run_script(script, arguments, dies_at, output):
    """What run_process() does in the new process."""
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.argv = [script, *arguments]
    if dies_at:
        die_at(*dies_at)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def die_at(module, function, n):
    """From now on the n-th call of a function kills this process. function: may be a method, "Class.method"."""
    *classes, name = function.split(".")
    owner = importlib.import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    def trap(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, trap)


def read_log(path):
    """One dict per validation of a training's log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_equal(a, b):
    """Equal bit for bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    else:
        assert a == b or a != a and b != b


# ---- the simulated folder and what the stages make of it -----------------------------------------


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """build_once(name, build) -> folder that build(folder) filled; the first pytest-xdist worker to ask builds it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def build_folder(name, build):
        with filelock.FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                aside = root / f"{name}.part"
                build(aside)
                aside.rename(root / name)
        return root / name

    return build_folder


@pytest.fixture(scope="session")
def challenge(build_once):
    return build_once("challenge", lambda folder: simulate(folder, **SIMULATED))


@pytest.fixture(scope="session")
def subjects(challenge):
    """{name: pictures, test_pictures (sorted paths), activity {hemi: (n_pictures, n_vertices)}, mask {hemi: fsaverage
    bool}, columns {hemi: of the common space}, present: both hemispheres' columns, common: activity in it}."""
    subjects = {}
    for folder in sorted(challenge.iterdir()):
        train, masks = folder / "training_split", folder / "roi_masks"
        subjects[folder.name] = SimpleNamespace(
            pictures=sorted((train / "training_images").iterdir()),
            test_pictures=sorted((folder / "test_split/test_images").iterdir()),
            activity={h: np.load(train / f"training_fmri/{h}_training_fmri.npy") for h in HEMIS},
            mask={h: np.load(masks / f"{h}.all-vertices_fsaverage_space.npy") == 1 for h in HEMIS},
        )
    union = {h: np.logical_or.reduce([s.mask[h] for s in subjects.values()]) for h in HEMIS}
    for s in subjects.values():
        start = {"lh": 0, "rh": union["lh"].sum()}
        s.columns = {h: start[h] + np.flatnonzero(s.mask[h][union[h]]) for h in HEMIS}
        s.present = np.concatenate([s.columns[h] for h in HEMIS])
        s.common = np.zeros((len(s.pictures), sum(u.sum() for u in union.values())), np.float32)
        for h in HEMIS:
            s.common[:, s.columns[h]] = s.activity[h]  # missing vertices: zero
    return subjects


@pytest.fixture(scope="session")
def data_dir(build_once, challenge):
    def build(folder):
        run_stage(prepare_data, CHALLENGE_DIR=challenge, DATA_DIR=folder, SEED=3)
        run_stage(fit_pca, DATA_DIR=folder, PCA_DIM=24, PASSES=20, DEVICE="cpu")

    return build_once("data", build)


@pytest.fixture(scope="session")
def run_dir(build_once, data_dir):
    settings = HEAD | TRAINING | dict(STEPS=8, VALIDATE_EVERY=3, LEARNING_RATE=0.003, DATA_DIR=data_dir)
    return build_once("run", lambda folder: run_stage(train_head, RUN_DIR=folder, **settings))


@pytest.fixture(scope="session")
def finetuned_dir(build_once, data_dir, run_dir):
    settings = TRAINING | dict(STEPS=5, VALIDATE_EVERY=2, LEARNING_RATE=0.0005, SEED=6, DATA_DIR=data_dir)

    def build(folder):
        shutil.copytree(run_dir, folder)
        run_stage(finetune, RUN_DIR=folder, **settings)

    return build_once("finetuned", build)
