"""Is everything right, fast and small on this machine? One Markdown table, written line by line.

    python -m tools.benchmark --parts gpu     all that has to be known about a GPU, at most 8 minutes on an H100
    python -m tools.benchmark --parts run     both phases at full size on random data
    python -m tools.benchmark --parts prepare,pca,step,heads,predict --other FOLDER

The last is for CPUs: it times whole commands of this version and of another checkout in alternation, less their
start-up. No part needs data or a network; gpu and run need only the packages above the line in requirements.txt, and
with --device cpu they run the same code at toy size. A check that fails says why, and the next one begins.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import finetune
import fit_pca
import prepare_data
import train_head
from core import training
from core.files import load_torch
from core.settings import choose_device, choose_precision, constants, run, versions
from core.space import HEMIS, N_FSAVERAGE, Space
from model import Crops, Trunk, UserError, autocast, smallest_crop
from predict import load_encoder

PARTS: str = "gpu"  # gpu, run, and for CPUs prepare, pca, step, heads, predict; separated by commas
OUTPUT: str = "benchmark.md"  # the table
MINUTES: float = 8.0  # no check begins later (part gpu)
RUN_SHARE: float = 1.0  # of the report's 5,000 and 2,000 steps (part run)
PEAK_TFLOPS: float = 990.0  # of the card, dense bfloat16: H100 and H200
OTHER: str = ""  # folder of another checkout to compare with (parts for CPUs)
TRUNK: str = train_head.TRUNK  # timm name (parts for CPUs)
BATCH_SIZE: int = 16  # samples (parts for CPUs)
COMPARE_STEPS: int = 10  # training steps that are timed (part step)
PCA_SIZE: float = 0.03125  # of the challenge's 75,086 samples (parts for CPUs)
REPEATS: int = 3  # timings of which the median counts
PRECISION: str = "auto"  # of what is timed: auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N

ROOT = Path(__file__).parents[1]
FULL = dict(
    TRUNK=train_head.TRUNK, LAYERS=train_head.LAYERS, IMAGE_SIZE=224, LATENT_DIM=1024, pca_dim=2048, n_vertices=39548,
    n_train=2560, n_val=6700, batch=512, finetune_batch=192, n_steps=10, n_small_steps=200, n_samples=63800,
    n_images=68000, n_files=2048, n_reference=304, gflop=42.5,
)  # fmt: skip
TOY = dict(
    TRUNK="eva02_tiny_patch14_224.mim_in22k", LAYERS="0,1", IMAGE_SIZE=56, LATENT_DIM=16, pca_dim=12, n_vertices=60,
    n_train=48, n_val=24, batch=16, finetune_batch=8, n_steps=1, n_small_steps=8, n_samples=96,
    n_images=112, n_files=16, n_reference=32, gflop=0.031,
)  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One measurement. most, least: its limit, if it has one."""

    what: str
    value: float | str
    unit: str = ""
    most: float | None = None
    least: float | None = None

    def cells(self, judged):
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        limit, verdict = "", ""
        if self.most is not None or self.least is not None:
            limit = f"≤ {self.most:g}" if self.least is None else f"≥ {self.least:g}"
            passed = self.value <= self.most if self.least is None else self.value >= self.least
            verdict = ("ok" if passed else "MISSED") if judged else ""
        return self.what, f"{value} {self.unit}".strip(), limit, verdict


class Table:
    """Markdown, printed and written to OUTPUT line by line."""

    def __init__(self, path, title):
        self.path, self.lines = Path(path), []
        for line in (title, "", "| check | measured | limit | |", "| --- | --- | --- | --- |"):
            self.add(line)

    def add(self, line):
        print(line, flush=True)
        self.lines.append(line)
        self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def run(self, name, check, bench, judged):
        """Add the rows that check(bench) yields; if it fails, a row that says why. judged: by their limits."""
        start = time.perf_counter()
        try:
            for row in check(bench):
                self.add(f"| {' | '.join(row.cells(judged))} |")
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[-300:].replace("|", "/")
            self.add(f"| {name} | {reason} | | FAILED |")
        bench.free()
        self.add(f"| *{name}, in all* | {time.perf_counter() - start:.0f} s | | |")


# ---- random data and what the checks share -------------------------------------------------------


class Bench:
    """Device, sizes, and random data with their PCA, written when a check first asks for them."""

    def __init__(self, device, folder, sizes):
        self.device, self.folder, self.sizes = device, Path(folder), SimpleNamespace(**sizes)
        self.precision, self.seconds = choose_precision(PRECISION, device), {}
        self.is_gpu = device.type == "cuda"

    @functools.cached_property
    def small_dir(self):
        vertices = min(self.sizes.n_vertices, 600)
        return self.write_data("small", n_train=48, n_images=72, n_val=24, n_vertices=vertices, pca_dim=12)

    @functools.cached_property
    def data(self):
        s = self.sizes
        options = dict(n_train=s.n_train, n_images=s.n_train + s.n_val, n_val=s.n_val)
        return prepare_data.load(self.write_data("data", **options, n_vertices=s.n_vertices, pca_dim=s.pca_dim))

    @functools.cached_property
    def pca(self):
        return fit_pca.load(self.folder / "data", self.data)

    @functools.cached_property
    def images(self):
        return training.read_pictures(self.data)

    def write_data(self, name, *, n_train, n_images, n_val, n_vertices, pca_dim):
        """DATA_DIR of eight subjects: n_train samples, and n_val validation samples each with a picture of its own."""
        image = np.concatenate([np.arange(n_train) % (n_images - n_val), np.arange(n_images - n_val, n_images)])
        half, none, rng = n_vertices // 2, np.empty(0, np.int64), np.random.default_rng(0)
        vertices = torch.cat([torch.arange(half), torch.arange(n_vertices - half)])
        subjects = [f"subj{i:02d}" for i in range(1, 9)]
        space = Space(subjects, vertices, half, torch.ones(8, n_vertices, dtype=torch.bool), {})
        split = np.repeat(np.int8([0, 1]), [n_train, n_val])
        samples = dict(subject=np.arange(len(image)) % 8, image=image, split=split, test_subject=none, test_image=none)
        colours = (rng.integers(0, 256, (4, 4, 3), np.uint8) for _ in range(n_images))
        pictures = (np.repeat(np.repeat(colour, 64, 0), 64, 1) for colour in colours)
        torch.manual_seed(0)
        maps = torch.randn(50, n_vertices, device=self.device) / 10
        sizes = np.diff(np.append(np.arange(0, len(image), 1024), len(image))).tolist()
        noise = (torch.randn(n, n_vertices, device=self.device) for n in sizes)
        activity = ((torch.randn(len(y), 50, device=self.device) @ maps + y).half().cpu().numpy() for y in noise)
        folder = self.folder / name
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_data.write_prepared(
                folder, space=space, samples=samples, nsd_ids=np.arange(n_images), n_training_images=n_images,
                activity=activity, images=pictures, splits="pictures", made_with={},
            )  # fmt: skip
        call(fit_pca, DATA_DIR=str(folder), PCA_DIM=pca_dim, DEVICE=str(self.device))
        return folder

    def settings(self, stage=train_head, **changes):
        """The stage's constants with the sizes of this bench."""
        own = dict(PRETRAINED=False, RUN_DIR=str(self.folder / "run"), WARMUP_STEPS=2, DEVICE=str(self.device))
        own |= vars(self.sizes) | {"BATCH_SIZE": self.sizes.batch if stage is train_head else self.sizes.finetune_batch}
        return {name: own.get(name, value) for name, value in constants(vars(stage)).items()} | changes

    def trunk(self, device=None):
        s = self.sizes
        return Trunk(s.TRUNK, s.LAYERS, s.IMAGE_SIZE, pretrained=False).to(device or self.device)

    def learner(self, trunk, device=None, precision=None, **changes):
        options = self.data, self.pca, device or self.device, precision or self.precision
        return train_head.new_learner(trunk, self.settings(**changes), "head.pt", *options)

    def batches(self, learner, device=None):
        return training.Batches(self.data, self.pca, self.images, learner.settings, device or self.device)

    def batch(self, learner, device=None):
        """The first batch of a training, on the device."""
        return self.batches(learner, device).prepare(0)

    def crops(self, trunk):
        return Crops(trunk, smallest_crop(0.8), next(trunk.parameters()).device)

    def clock(self, work, n=1):
        """Seconds that work() takes, mean over n calls in a row."""
        self.wait()
        start = time.perf_counter()
        for _ in range(n):
            work()
        self.wait()
        return (time.perf_counter() - start) / n

    def wait(self):
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def medians(self, works):
        """{name: median seconds} of {name: function}, in alternation, each after two calls that do not count."""
        times = {name: [] for name in works}
        for _ in range(REPEATS):
            for name, work in works.items():
                self.clock(work, 2)
                times[name].append(self.clock(work, self.sizes.n_steps))
        return {name: statistics.median(seconds) for name, seconds in times.items()}

    def free(self):
        """Give unused memory back, and start to measure the peak anew."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self, what, limit=None):
        if not self.is_gpu:
            return Row(f"{what}: peak GPU memory", "needs a GPU")
        return Row(f"{what}: peak GPU memory", torch.cuda.max_memory_reserved(self.device) / 2**30, "GiB", most=limit)


def call(script, **values):
    """A script's main() with these constants, without its output."""
    before = {name: vars(script)[name] for name in values}
    try:
        vars(script).update(values)
        with contextlib.redirect_stdout(io.StringIO()):
            script.main()
    finally:
        vars(script).update(before)


def difference(a, b):
    """Largest relative difference |a - b| / |b| over pairs of tensors."""
    pairs = [(x.detach().double().cpu(), y.detach().double().cpu()) for x, y in zip(a, b, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in pairs)


def count_unequal(a, b):
    """How many of these pairs of tensors differ in any bit."""
    return sum(not torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


def write_photographs(folder, n, ending):
    """n different files of 425 x 425 px, cut out of photographs -> paths."""
    folder.mkdir(parents=True)
    photographs, rng, paths = load_sample_images().images, np.random.default_rng(0), []
    for i in range(n):
        photograph = photographs[i % 2]
        top, left = (rng.integers(0, side - 424) for side in photograph.shape[:2])
        paths.append(folder / f"{i:05d}.{ending}")
        Image.fromarray(photograph[top : top + 425, left : left + 425]).save(paths[-1])
    return paths


# ---- right ---------------------------------------------------------------------------------------


def check_numbers(bench):
    """Features, head, loss and gradients of one batch without dropout, against float32 on the CPU."""
    devices = ("cpu", torch.float32), (bench.device, torch.float32), (bench.device, torch.bfloat16)
    expected, *measured = (one_batch(bench, *each) for each in (*devices, (bench.device, torch.float16)))
    for name, values, limit in zip(("float32", "bfloat16", "float16"), measured, (1e-4, 0.1, 0.02)):
        for what, tensors in values.items():
            yield Row(f"{what} in {name}, relative error", difference(tensors, expected[what]), most=limit)


def one_batch(bench, device, precision):
    trunk = bench.trunk(device)
    options = dict(BATCH_SIZE=16, FEATURE_DROPOUT=0.0, DEVICE=str(device))
    learner = bench.learner(trunk, torch.device(device), precision, **options)
    batch = bench.batch(learner, torch.device(device))
    learner.encoder.train()
    with autocast(device, precision):
        with torch.no_grad():
            features = trunk(bench.crops(trunk)(*(batch[name] for name in training.IMAGE_KEYS)))
            z = learner.encoder.head(features, batch["subject"])
    learner.loss = 0.0
    learner.accumulate(features, batch, 0, 1.0)
    gradients = [p.grad / learner.scaler.get_scale() for p in learner.trainable.values()]
    return {"features": features, "head's output": [z], "loss": [learner.loss], "gradients": gradients}


def check_loss_scaling(bench):
    """Many steps on one batch in float16; then one whose gradients overflow."""
    n = bench.sizes.n_small_steps
    learner = bench.learner(bench.trunk(), precision=torch.float16, BATCH_SIZE=min(64, bench.sizes.batch), STEPS=n + 1)
    batch, crops, losses = bench.batch(learner), bench.crops(learner.encoder.trunk), []
    for _ in range(n):
        training.train_step([learner], crops, batch)
        losses.append(float(learner.loss))
    yield Row(f"{n} float16 steps: steps skipped", n - learner.n_losses)
    yield Row("losses that are not finite", sum(not np.isfinite(losses)), most=0)
    yield Row("last loss / first", losses[-1] / losses[0], most=1)
    before = tensors_of(copy.deepcopy(learner.state()))
    learner.scaler = torch.amp.GradScaler(bench.device.type, init_scale=2.0**100)
    training.train_step([learner], crops, batch)
    yield Row("a skipped step: tensors of weights and optimiser changed", count_unequal(tensors_of(learner.state()), before), most=0)
    yield Row("a skipped step: scale after it, of before", learner.scaler.get_scale() / 2.0**100, most=0.5)


def tensors_of(state):
    """Weights, buffers and the optimiser's moments in a Learner's state."""
    return [*state["weights"].values(), *(v for each in state["optimizer"]["state"].values() for v in each.values())]


def check_loader(bench):
    """Pictures and targets of 50 batches as they are after each step, while the loader's stream copies the next."""
    learner = bench.learner(bench.trunk(), BATCH_SIZE=bench.sizes.batch // 2)
    batches, crops, measured, expected = bench.batches(learner), bench.crops(learner.encoder.trunk), [], []
    for step, batch in batches(0, 50):
        training.train_step([learner], crops, batch)
        measured.append((batch["images"].flatten(1).sum(1, dtype=torch.int64), batch["latents"].clone()))
        expected.append(batches.rows[training.sample_order(step, len(batch["subject"]), len(batches.rows), 0)])
    images, data = bench.images.reshape(len(bench.images), -1), bench.data
    wrong_images = wrong_latents = 0
    for (sums, latents), rows in zip(measured, expected):
        wrong_images += int((sums.cpu().numpy() != images[data.image[rows]].sum(1, dtype=np.int64)).sum())
        wrong_latents += int((latents.cpu() != bench.pca.latents[rows]).any(1).sum())
    yield Row("wrong pictures in 50 batches", wrong_images, most=0)
    yield Row("wrong targets in 50 batches", wrong_latents, most=0)


def check_runs(bench):
    """train_head.py to the end; interrupted after a validation and continued; started by torchrun."""
    options = dict(DATA_DIR=str(bench.small_dir), BATCH_SIZE=16, STEPS=6, VALIDATE_EVERY=3, PRECISION=PRECISION)
    folders = {name: bench.folder / name for name in ("whole", "continued", "torchrun")}
    settings = {name: bench.settings(**options, RUN_DIR=str(folder)) for name, folder in folders.items()}
    call(train_head, **settings["whole"])
    expected = final_weights(folders["whole"])
    train_step, steps = training.train_step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        train_step(*arguments)

    training.train_step = interrupted
    try:
        with contextlib.suppress(KeyboardInterrupt):
            call(train_head, **settings["continued"])
    finally:
        training.train_step = train_step
    call(train_head, **settings["continued"])
    weights = final_weights(folders["continued"])
    yield Row("interrupted and continued: tensors that differ", count_unequal(weights, expected), most=0)
    values = settings["torchrun"] | {"DEVICE": "auto" if bench.is_gpu else "cpu"}
    words = [f"--{name.lower()}={value}" for name, value in values.items() if not isinstance(value, tuple)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train_head.py"]
    command(ROOT, [*torchrun, *words])
    weights = final_weights(folders["torchrun"])
    backend = "NCCL" if bench.is_gpu else "gloo"
    yield Row(f"one process of torchrun ({backend}): relative difference", difference(weights, expected), most=1e-6)


def final_weights(run_dir):
    return list(load_torch(run_dir / "train_head.state.pt", training.FORMAT, "")["learners"][0]["weights"].values())


def check_heads(bench):
    """Two heads on one pass of the trunk against each alone, three steps."""
    trunk, changes = bench.trunk(), (dict(SEED=1), dict(SEED=2, LEARNING_RATE=1e-3))
    together, alone = ([bench.learner(trunk, BATCH_SIZE=16, **each) for each in changes] for _ in range(2))
    batch, crops = bench.batch(together[0]), bench.crops(trunk)
    for learners in (together, *([learner] for learner in alone)):
        for _ in range(3):
            training.train_step(learners, crops, batch)
    for k, (a, b) in enumerate(zip(together, alone), start=1):
        differing = count_unequal(tensors_of(a.state()), tensors_of(b.state()))
        yield Row(f"head {k} of two: tensors that differ from alone", differing, most=0)


def check_pca(bench):
    """The PCA of small data against the CPU, and the variance it explains against an exact one."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(600, 40, generator=generator) @ torch.randn(40, 300, generator=generator)
    y += torch.randn(600, 300, generator=generator)
    y -= y.mean(0)
    ours, cpu = (fit_pca.fit(y.to(device), 30, fit_pca.PASSES, 0).cpu() for device in (bench.device, "cpu"))
    exact = torch.linalg.svdvals(y.double())[:30].square().sum()
    yield Row("explained variance / exact", float((y @ ours).double().square().sum() / exact), least=0.9999)
    yield Row("smallest cosine between axes and the CPU's", float(torch.linalg.svdvals(ours.T @ cpu).min()), least=0.99)
    data = prepare_data.load(bench.small_dir)
    pca = fit_pca.load(bench.small_dir, data)
    z, residual = fit_pca.project(data, pca.components, pca.mean)
    error = difference([pca.latents, pca.residual], [z, residual])
    yield Row("targets against the CPU, relative error", error, most=1e-4)


def check_predictions(bench):
    """Activity in float32 against the CPU, by the checkpoint of a short training."""
    run_dir = bench.folder / "predictions"
    call(train_head, **bench.settings(DATA_DIR=str(bench.small_dir), RUN_DIR=str(run_dir), BATCH_SIZE=16, STEPS=3))
    images = prepare_data.load(bench.small_dir).images[:16]
    predictors = [load_encoder(run_dir / "head.pt", str(device), "float32") for device in (bench.device, "cpu")]
    for subject in ("subj02", "group"):
        ours, cpu = (torch.from_numpy(predictor.predict(images, subject).lh) for predictor in predictors)
        yield Row(f"{subject}, relative error", difference([ours], [cpu]), most=1e-4)


# ---- fast and small ------------------------------------------------------------------------------


def check_phase(bench, stage, compiled=False):
    """Whole training steps, data loading included, against the trunk's own share of them."""
    s, is_first = bench.sizes, stage is train_head
    trunk = bench.trunk()
    learner = bench.learner(trunk)
    if not is_first:
        for name in trunk.attention_parameters():
            trunk.get_parameter(name).requires_grad_(True)
        settings = bench.settings(finetune)
        learner = training.Learner(learner.encoder, settings, "finetuned.pt", {}, bench.device, bench.precision)
    learner.settings.STEPS = 10**9
    n, crops, batches = learner.settings.BATCH_SIZE, bench.crops(trunk), bench.batches(learner)
    stream, resident = batches(0, 10**9), batches.prepare(0)
    pictures = crops(*(resident[name] for name in training.IMAGE_KEYS))

    def trunk_alone():
        with torch.set_grad_enabled(not is_first), autocast(bench.device, bench.precision):
            features = trunk(pictures)
        if not is_first:
            torch.autograd.backward(features, [torch.ones_like(x) for x in features])
            trunk.zero_grad(set_to_none=True)
        return features

    name = f"phase {1 if is_first else 2}, batch {n}"
    if compiled:
        name += ", compiled"
        expected = [x[:8].detach().clone() for x in trunk_alone()]
        trunk.compile(backend="inductor" if bench.is_gpu else "eager")  # at toy size no compiler is needed
        yield Row(f"{name}: first pass", bench.clock(trunk_alone), "s")
        features = [x[:8] for x in trunk_alone()]
        yield Row(f"{name}: features, relative difference", difference(features, expected), most=0.05)
        del features, expected
    works = {
        "trunk": trunk_alone,
        "step": lambda: training.train_step([learner], crops, resident),
        "whole": lambda: training.train_step([learner], crops, next(stream)[1]),
    }
    bench.free()
    bench.clock(works["whole"], 3)
    yield bench.peak(name, 30)
    seconds = bench.medians(works)
    bench.seconds[stage, compiled] = whole = seconds["whole"]
    alone = "trunk forward" if is_first else "trunk forward and backward"
    yield Row(f"{name}: {alone}", 1e3 * seconds["trunk"], "ms")
    yield Row(f"{name}: whole step", 1e3 * whole, "ms")
    yield Row(f"{name}: whole step / {alone}", whole / seconds["trunk"], most=1.10 if is_first else None)
    yield Row(f"{name}: whole step", n / whole, "pictures/s")
    yield Row(f"{name}: lost to the loader", whole / seconds["step"] - 1, most=0.03)
    for what, each in ((alone, "trunk"), ("whole step", "whole")) if is_first else ():
        tflops = n * s.gflop / 1e3 / seconds[each]
        yield Row(f"{name}: {what}, the trunk's operations", tflops, "TFLOP/s")
        yield Row(f"{name}: {what}, share of the card's peak", tflops / PEAK_TFLOPS)
    stream.close()
    torch.compiler.reset()


def check_eight_heads(bench):
    """A step of eight heads on one pass of the trunk."""
    trunk = bench.trunk()
    learners = [bench.learner(trunk, SEED=seed) for seed in range(8)]
    batch, crops = bench.batch(learners[0]), bench.crops(trunk)
    bench.free()
    bench.clock(lambda: training.train_step(learners, crops, batch), 2)
    yield bench.peak("eight heads", 40)
    seconds = bench.medians({
        "one": lambda: training.train_step(learners[:1], crops, batch),
        "eight": lambda: training.train_step(learners, crops, batch),
    })  # fmt: skip
    yield Row("eight heads: step", 1e3 * seconds["eight"], "ms")
    yield Row("eight heads: of eight runs", seconds["eight"] / (8 * seconds["one"]), most=0.25)


def validated(bench):
    """A new head after its first validation: the checkpoint is written. -> (its path, seconds of all)."""
    path = bench.folder / "run/head.pt"
    learner = bench.learner(bench.trunk())
    Path(learner.settings.RUN_DIR).mkdir(exist_ok=True)
    whole_run = training.Run("train_head", [learner], bench.data, bench.pca, vars(learner.settings))
    whole_run.clock, whole_run.clock_step, images = time.perf_counter(), 0, bench.images
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = bench.clock(lambda: whole_run.validate([learner], images))
    return path, learner, seconds


def check_validation(bench):
    """Validation as in training."""
    size = f"{bench.sizes.n_val} pictures x {bench.sizes.n_vertices} vertices"
    _, learner, bench.seconds["validation"] = validated(bench)
    arguments = [learner.encoder], bench.data, bench.images, "val", bench.sizes.batch, bench.precision
    yield Row(f"validation, {size}", bench.clock(lambda: training.validate(*arguments)), "s")
    yield Row("first validation, with checkpoint and state written", bench.seconds["validation"], "s")
    yield bench.peak("validation")


def check_full_pca(bench):
    """fit() at full size."""
    s = bench.sizes
    y = torch.randn(s.n_samples, s.n_vertices, device=bench.device)
    fit_pca.fit(y[:64], 4, 1, 0)  # starts the GPU's libraries
    bench.free()
    seconds = bench.clock(lambda: fit_pca.fit(y, s.pca_dim, fit_pca.PASSES, 0))
    yield Row(f"PCA, {s.n_samples} x {s.n_vertices}, {s.pca_dim} components", seconds, "s", most=120)
    yield bench.peak("PCA", 32)


def import_tool(name):
    """A tool whose tables and maps are not needed here: what only these need may be missing."""
    for package in ("pandas", "nilearn", "nibabel"):
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = MagicMock()
    return importlib.import_module(f"tools.{name}")


def check_pictures(bench):
    """Own pictures, from JPEG files to one subject's array, against the trunk on pictures that lie on the device."""
    s, (path, _, _) = bench.sizes, validated(bench)
    predictor = load_encoder(path, str(bench.device), PRECISION)
    trunk, n_vertices = predictor.encoders[0].trunk, predictor.space.n_vertices
    files = write_photographs(bench.folder / "jpg", min(s.n_files, 256), "jpg")
    files = [files[i % len(files)] for i in range(s.n_files)]
    n = min(predictor.batch_size, s.n_files)
    pictures = torch.zeros(n, 3, s.IMAGE_SIZE, s.IMAGE_SIZE, device=bench.device)
    predict_batches = import_tool("predict_pictures").predict_batches

    def trunk_alone():
        with torch.inference_mode(), autocast(bench.device, predictor.precision):
            for _ in range(s.n_files // n):
                trunk(pictures)

    def from_files():
        array, row = np.lib.format.open_memmap(bench.folder / "own.npy", "w+", "<f4", (s.n_files, n_vertices)), 0
        for batch, latents in predict_batches(predictor, files, []):
            array[row : row + len(batch)] = predictor.decode(latents, 0)
            row += len(batch)

    trunk_alone()
    seconds = {work: statistics.median(bench.clock(work) for _ in range(REPEATS)) for work in (trunk_alone, from_files)}
    yield Row("own pictures, from files to an array", s.n_files / seconds[from_files], "pictures/s")
    rate = seconds[trunk_alone] / seconds[from_files]
    yield Row("own pictures: of the trunk's rate", rate, least=0.5 if bench.is_gpu else 0.8)


def check_fields(bench):
    """Receptive fields of every vertex (tools/explain.py) against predicting the same pictures."""
    path, _, _ = validated(bench)
    explain, predictor = import_tool("explain"), load_encoder(path, str(bench.device), PRECISION)
    images, columns = bench.data.images[: bench.sizes.n_reference], np.arange(predictor.space.n_vertices)
    works = {"predict": lambda: predictor.decode(predictor.latents(images), 0)}
    with torch.inference_mode():
        decomposition = explain.Decomposition(predictor.encoders[0], 0, columns)
        works["fields"] = lambda: explain.measure_covariance(decomposition, images, predictor.precision)
        times = {name: [bench.clock(work) for _ in range(REPEATS)] for name, work in works.items()}
    seconds = {name: statistics.median(each) for name, each in times.items()}
    yield Row(f"receptive fields, {len(images)} pictures", seconds["fields"], "s")
    yield Row("receptive fields: of predicting", seconds["fields"] / seconds["predict"], most=3)


def check_headline(bench):
    """Minutes at full size, from the steps and the validation above."""
    for stage, report in ((train_head, 120), (finetune, 60)):
        steps, batch = stage.STEPS, stage.BATCH_SIZE
        n_validations = 1 + steps * batch // 63800
        for compiled in (False, True):
            seconds = steps * bench.seconds[stage, compiled] + n_validations * bench.seconds["validation"]
            what = f"{stage.__name__}.py, {steps} steps" + ", compiled" * compiled
            yield Row(f"{what} (the report on a V100: {report} min)", seconds / 60, "min, estimated")


GPU = {
    "numbers": check_numbers, "loss scaling": check_loss_scaling, "loader": check_loader, "runs": check_runs,
    "two heads": check_heads, "PCA": check_pca, "predictions": check_predictions,
}  # fmt: skip
FAST = {
    "phase 1": functools.partial(check_phase, stage=train_head),
    "phase 2": functools.partial(check_phase, stage=finetune),
    "eight heads": check_eight_heads, "validation": check_validation, "full PCA": check_full_pca,
    "own pictures": check_pictures, "receptive fields": check_fields,
    "phase 1, compiled": functools.partial(check_phase, stage=train_head, compiled=True),
    "phase 2, compiled": functools.partial(check_phase, stage=finetune, compiled=True),
    "headline": check_headline,
}  # fmt: skip


def check_run(bench):
    """Both phases at full size on random data, compiled, as their commands run."""
    s, folder = bench.sizes, bench.folder / "full"
    start = time.perf_counter()
    options = dict(n_train=s.n_samples, n_images=s.n_images, n_val=s.n_val, n_vertices=s.n_vertices)
    bench.write_data("full", **options, pca_dim=s.pca_dim)
    yield Row(f"data of {s.n_images} pictures, {s.n_samples} samples, and PCA", (time.perf_counter() - start) / 60, "min")
    for stage, report in ((train_head, 120), (finetune, 60)):
        steps = max(3, round(stage.STEPS * RUN_SHARE)) if bench.is_gpu else 3
        values = dict(DATA_DIR=str(folder), RUN_DIR=str(bench.folder / "full_run"), STEPS=steps, COMPILE=bench.is_gpu)
        settings = bench.settings(stage, **values, WARMUP_STEPS=steps // 20, PRECISION=PRECISION)
        bench.free()
        seconds = bench.clock(lambda stage=stage, settings=settings: call(stage, **settings))
        what = f"{stage.__name__}.py, {steps} steps"
        yield Row(f"{what} (the report on a V100: {report} min for {stage.STEPS})", seconds / 60, "min")
        yield bench.peak(what, 30)
