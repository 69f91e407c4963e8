"""What several test files share: the simulated folder and what the stages make of it, built once, when the
first test asks for it, and plain helpers. No network, no GPU. conftest.py makes pytest know the fixtures."""

import atexit
import contextlib
import copy
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from PIL import Image
from sklearn.metrics import r2_score

import demo
import evaluate
import finetune
import fit_pca
import prepare_data
import scores
import train_head
import training

tiny = "eva02_tiny_patch14_224.mim_in22k"
hemis = ("lh", "rh")
here = Path(__file__).parent
beit_attention = ["q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"]  # EVA02-tiny's too


def run(stage, **values):
    """The stage's real main() with these constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(stage, name, value)  # refuses a name that the stage does not have
        stage.main()


def on_command_line(settings):
    """The constants as a user types them."""
    words = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v).lower() if isinstance(v, bool) else str(v)
             for k, v in settings.items()}  # fmt: skip
    return [part for name, text in words.items() for part in (f"--{name.lower()}", text)]


# ---- stages in processes of their own -----------------------------------------------------------

# Importing what the stages import takes seconds. So they are forked from a process that was forked itself when
# all test files were imported and no test had run.
forks = SimpleNamespace(server=None)


def pytest_collection_finish():
    if hasattr(os, "fork"):
        context = multiprocessing.get_context("fork")
        forks.server, end = context.Pipe()
        context.Process(target=serve_forks, args=(context, forks.server, end)).start()
        atexit.register(forks.server.close)  # which ends it
        end.close()


def serve_forks(context, other_end, connection):
    """A request is the arguments of run_forked, answered by the process's number, or such a number, answered by
    its exit code, None while it runs."""
    other_end.close()
    processes = {}
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            if isinstance(request, int):
                connection.send(processes[request].exitcode)
            else:
                process = context.Process(target=run_forked, args=request)
                process.start()
                processes[process.pid] = process
                connection.send(process.pid)


def run_forked(command, before, *outputs):
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # not what pytest put there
    sys.argv = command
    exec(before, {})
    runpy.run_path(str(here / command[0]), run_name="__main__")


def start(script, *arguments, before=""):
    """A stage as a process of its own; before: code that runs ahead of it, such as a trap."""
    outputs = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]
    forks.server.send(([script, *map(str, arguments)], before, *(file.name for file in outputs)))
    return SimpleNamespace(pid=forks.server.recv(), outputs=outputs)


def finish(started, seconds=200):
    """-> (exit code, what it printed, its errors without progress bars)."""
    end = time.monotonic() + seconds
    while (code := exit_code(started)) is None:
        if time.monotonic() > end:
            os.kill(started.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s")
        time.sleep(0.02)
    out, err = (file.read() for file in started.outputs)
    assert "Traceback" not in err, err
    return code, out, err


def exit_code(started):
    forks.server.send(started.pid)
    return forks.server.recv()


holds_a_folder = """
import os, time
from common import sole_writer
with sole_writer({folder!r}, "prepare_data.py"):
    open(os.path.join({folder!r}, ".pca.pt.partial"), "wb").write(bytes(1000))
    print("writing", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_process(folder):
    """Another process that writes to folder and is killed at the end, its partial file left behind."""
    process = start("prepare_data.py", before=holds_a_folder.format(folder=str(folder)))
    try:
        while not process.outputs[0].read():
            assert exit_code(process) is None
            time.sleep(0.02)
        yield process
    finally:
        os.kill(process.pid, signal.SIGKILL)
        finish(process)


@torch.enable_grad()  # a test that computes no gradients may be the first to ask
def trained(stage, **values):
    """Run a training stage -> the encoder it trained, its weights before, names of what was trainable,
    the batches it saw."""
    seen = SimpleNamespace(batches=[])
    run_training, train_step = training.Training.run, training.train_step

    def spy(self):
        [seen.encoder] = self.encoders
        seen.before = copy.deepcopy(seen.encoder.state_dict())
        run_training(self)
        seen.trainable = {n for n, p in seen.encoder.named_parameters() if p.requires_grad}

    def spy_batch(learners, crops, batch, *arguments):
        seen.batches.append({name: values.clone() for name, values in batch.items()})
        train_step(learners, crops, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "run", spy)
        patch.setattr(training, "train_step", spy_batch)
        run(stage, **values)
    after = seen.encoder.state_dict()
    seen.changed = {name for name, before in seen.before.items() if not torch.equal(before, after[name])}
    return seen


def assert_equal(a, b):
    """Equal to the bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"DATA_DIR", "RUN_DIR"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b or a != a and b != b


def r2_of_vertices(activity, prediction):
    """(n_vertices,), by scikit-learn in float64."""
    return r2_score(activity.astype(float), prediction.astype(float), multioutput="raw_values")


@torch.no_grad()
def block_outputs(vit, images):
    """{block: (n, n_tokens, n_channels)} of a whole timm model, by hooks."""
    outputs = {}
    for i, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda block, args, output, i=i: outputs.update({i: output}))
    vit.eval().forward_features(images)
    return outputs


def plain_input(picture, trunk, box=None):
    """torchvision: picture (256, 256, 3) uint8, box (top, left, size) or None -> (3, size, size)."""
    # in float64: its float32 is off by 1e-4
    x = torch.tensor(np.asarray(picture)).permute(2, 0, 1).double()
    options = dict(size=[trunk.image_size] * 2, interpolation=vision.InterpolationMode.BICUBIC, antialias=True)
    x = vision.resize(x, **options) if box is None else vision.resized_crop(x, *box, box[2], **options)
    return vision.normalize(x / 255, trunk.mean, trunk.std).float()


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def png_claiming(size):
    """A small PNG whose header says size x size: a decompression bomb."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()[:16] + 2 * size.to_bytes(4, "big") + file.getvalue()[24:]


# ---- the simulated folder and what the stages make of it ----------------------------------------


@pytest.fixture(scope="session")
def challenge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "challenge"
    demo.simulate(folder, n_train=40, n_test=5, picture_size=80, vertex_step=16, seed=1)
    return folder


@pytest.fixture(scope="session")
def subjects(challenge):
    """{name: the subject's files, read plainly; columns: of the common space, per hemisphere}."""
    found = {}
    for folder in sorted(challenge.iterdir()):
        train, masks = folder / "training_split", folder / "roi_masks"
        found[folder.name] = SimpleNamespace(
            pictures=sorted((train / "training_images").iterdir()),
            test_pictures=sorted((folder / "test_split/test_images").iterdir()),
            activity={h: np.load(train / f"training_fmri/{h}_training_fmri.npy") for h in hemis},
            mask={h: np.load(masks / f"{h}.all-vertices_fsaverage_space.npy") == 1 for h in hemis},
        )
    union = {h: np.logical_or.reduce([s.mask[h] for s in found.values()]) for h in hemis}
    for s in found.values():
        start = {"lh": 0, "rh": union["lh"].sum()}
        s.columns = {h: start[h] + np.flatnonzero(s.mask[h][union[h]]) for h in hemis}
        s.present = np.concatenate([s.columns[h] for h in hemis])
        s.common = np.zeros((len(s.pictures), sum(u.sum() for u in union.values())), np.float32)
        for h in hemis:
            s.common[:, s.columns[h]] = s.activity[h]  # missing vertices: zero
    return found


@pytest.fixture(scope="session")
def pair(challenge):
    """A folder with two subjects, to be damaged."""
    folder = challenge.parent / "pair"
    for name in ("subj01", "subj06"):
        shutil.copytree(challenge / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def prepared(challenge):
    folder = challenge.parent / "data"
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(folder), SEED=3)
    return folder


@pytest.fixture(scope="session")
def fitted(prepared):
    run(fit_pca, DATA_DIR=str(prepared), PCA_DIM=24, PASSES=30, chunk_rows=50)
    return prepared


@pytest.fixture(scope="session")
def subset(challenge):
    """Two subjects' data, one without test pictures, with fewer samples than vertices."""
    folder, data = challenge.parent / "subset", challenge.parent / "subset_data"
    for name in ("subj06", "subj08"):
        shutil.copytree(challenge / name, folder / name)
    shutil.rmtree(folder / "subj08" / "test_split")
    run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data), SEED=4)
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=58, chunk_rows=40)
    return data


both = dict(BATCH_SIZE=48, WARMUP_STEPS=2, FEATURE_DROPOUT=0.2, WEIGHT_DECAY=0.1, PRECISION="float32", DEVICE="cpu")
small = dict(TRUNK=tiny, PRETRAINED=False, LAYERS="blocks.{0,2}", IMAGE_SIZE=56, LATENT_DIM=16)


@pytest.fixture(scope="session")
def phase_1(fitted):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"))
    return trained(train_head, **folders, **both, **small, STEPS=8, VALIDATE_EVERY=3, LEARNING_RATE=0.01)


@pytest.fixture(scope="session")
def phase_2(phase_1, fitted):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"))
    return trained(finetune, **folders, **both, STEPS=4, LEARNING_RATE=0.001)


@pytest.fixture(scope="session")
def submission(phase_2, fitted):
    """Predictions of finetuned.pt by the script with constants on its command line."""
    folder, run_dir = fitted.parent / "submission", fitted.parent / "run"
    options = ["--data_dir", fitted, "--run-dir", run_dir, "--submission_dir", folder, "--batch-size", 5]
    code, out, err = finish(start("predict.py", *options, "--precision=float32", "--device", "cpu"))
    assert code == 0, err
    assert f"predicting with {run_dir / 'finetuned.pt'}" in out
    shutil.copy(run_dir / "finetuned_scores.json", fitted.parent / "submission_scores.json")  # others predict here too
    return folder


@pytest.fixture(scope="session")
def evaluation(phase_2, challenge, fitted):
    """evaluate.py on the organisers' held-out pictures: its folder, and what was drawn into every figure:
    {file name: [(title, list of arrays shown)] of its panels, with the texts on it}."""
    folder, drawn = fitted.parent / "evaluation", {}
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"), CHALLENGE_DIR=str(challenge), DEVICE="cpu")
    save_figure = evaluate.save_figure

    def spy(figure, path):
        save_figure(figure, path)
        panels = [
            SimpleNamespace(
                title=axes.get_title(), shown=[np.ma.filled(image.get_array(), np.nan) for image in axes.images],
                lines=[path.vertices for lines in axes.collections for path in lines.get_paths()],
            )
            for axes in figure.axes
        ]  # fmt: skip
        drawn[path.name] = SimpleNamespace(panels=panels, note=figure.get_supxlabel())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "save_figure", spy)
        patch.setattr(scores, "fewest_pictures", 5)
        run(evaluate, **folders, SPLIT="challenge", OUTPUT_DIR=str(folder), PRECISION="float32", RESAMPLES=50,
            EXAMPLE_SUBJECT="subj06", OUTLINES="streams")  # fmt: skip
    return SimpleNamespace(folder=folder, figures=drawn)
