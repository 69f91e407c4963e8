"""Check correctness, speed and memory on this machine; writes one Markdown table, row by row.

    python -m tools.benchmark --parts gpu     all that has to be known about a GPU, at most 8 minutes on an H100
    python -m tools.benchmark --parts run     both phases at full size on random data; 20 GB of disk
    python -m tools.benchmark --parts prepare,pca,step,heads,predict --other FOLDER --device cpu

The last is for CPUs; prepare, pca and step time whole commands here and in another checkout, in alternation. gpu and
run need no data and only the first packages of requirements.txt; with --device cpu they run the same code at toy size.
"""

import contextlib
import gc
import io
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import finetune
import fit_pca
import prepare_data
import train_head
from core import training
from core.files import load_torch
from core.settings import choose_device, choose_precision, constants, run, versions
from core.space import Space
from model import Crops, Trunk, autocast
from predict import load_encoder
from tools import contributions, pictures

PARTS: str = "gpu"  # gpu, run, and for CPUs prepare, pca, step, heads, predict; separated by commas
OUTPUT: str = "benchmark.md"  # the table
PEAK_TFLOPS: float = 990.0  # of the card, dense bfloat16: H100 and H200
RUN_SHARE: float = 1.0  # of the report's 5,000 and 2,000 steps (part run)
OTHER: str = ""  # folder of another checkout (parts prepare, pca, step)
CHALLENGE_DIR: str = "demo/challenge"  # challenge folder (parts prepare, pca, step); the demo leaves a simulated one
TRUNK: str = train_head.TRUNK  # timm name (parts for CPUs)
BATCH_SIZE: int = 16  # samples (parts for CPUs)
PCA_DIM: int = 256  # components (part pca)
REPEATS: int = 3  # of every timing; the median counts
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N

ROOT = Path(__file__).parents[1]
LAST_START = 420  # s after which no check of part gpu begins, so that it ends within 8 minutes
GPU_SIZES = dict(
    TRUNK=train_head.TRUNK, LAYERS=train_head.LAYERS, IMAGE_SIZE=224, LATENT_DIM=1024, pca_dim=2048, n_vertices=39548,
    n_train=2560, n_val=6700, batch=512, finetune_batch=192, n_steps=10, n_float16=200, n_samples=63800,
    n_images=68000, n_files=2048, n_reference=304, gflop=42.5,
)  # fmt: skip
TOY_SIZES = dict(
    TRUNK="eva02_tiny_patch14_224.mim_in22k", LAYERS="0,1", IMAGE_SIZE=56, LATENT_DIM=16, pca_dim=12, n_vertices=60,
    n_train=48, n_val=24, batch=16, finetune_batch=8, n_steps=1, n_float16=8, n_samples=96,
    n_images=112, n_files=16, n_reference=32, gflop=0.031,
)  # fmt: skip
CPU_SIZES = GPU_SIZES | dict(n_train=600, n_val=24, pca_dim=256, n_steps=2, n_files=64, n_reference=32)


class Bench:
    """Device, sizes, and random data with their PCA, written when a check first asks for them."""

    def __init__(self, device, folder, sizes):
        self.device, self.folder, self.sizes = device, Path(folder), SimpleNamespace(**sizes)
        self.limit = (lambda text: "") if sizes is TOY_SIZES else str  # of speed: toy sizes have none
        self.precision, self.is_gpu, self.seconds = choose_precision("auto", device), device.type == "cuda", {}
        self.compiler = {"backend": "inductor" if self.is_gpu else "eager"}  # at toy size without one

    @cached_property
    def inputs(self):
        """Prepared data, PCA, and training pictures in RAM."""
        s = self.sizes
        options = dict(n_val=s.n_val, n_vertices=s.n_vertices, pca_dim=s.pca_dim)
        data = prepare_data.load(self.write_data("data", n_train=s.n_train, n_images=s.n_train + s.n_val, **options))
        return data, fit_pca.load(self.folder / "data", data), training.read_pictures(data)

    def write_data(self, name, *, n_train, n_images, n_val, n_vertices, pca_dim):
        """DATA_DIR of eight subjects: n_train training samples, and n_val validation samples of different pictures."""
        image = np.concatenate([np.arange(n_train) % (n_images - n_val), np.arange(n_images - n_val, n_images)])
        half, none, split = n_vertices // 2, np.empty(0, np.int64), np.repeat(np.int8([0, 1]), [n_train, n_val])
        vertices, mask = torch.arange(n_vertices) % half, torch.ones(8, n_vertices, dtype=torch.bool)
        space = Space([f"subj{i:02d}" for i in range(1, 9)], vertices, half, mask, {})
        samples = dict(subject=np.arange(len(image)) % 8, image=image, split=split, test_subject=none, test_image=none)
        parts = np.array_split(image, len(image) // 1024 + 1)
        colours = np.random.default_rng(0).integers(0, 256, (n_images, 4, 4, 3), np.uint8)
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_data.write_prepared(
                self.folder / name, space=space, samples=samples, splits="pictures", made_with={},
                nsd_ids=np.arange(n_images), n_training_images=n_images,
                activity=(torch.randn(len(p), n_vertices, device=self.device).half().cpu().numpy() for p in parts),
                images=(colour.repeat(64, 0).repeat(64, 1) for colour in colours),
            )  # fmt: skip
        call(fit_pca, DATA_DIR=str(self.folder / name), PCA_DIM=pca_dim, DEVICE=str(self.device))
        return self.folder / name

    def settings(self, stage=train_head, **changes):
        """The stage's constants with the sizes of this bench."""
        s = self.sizes
        own = dict(PRETRAINED=False, RUN_DIR=str(self.folder / "run"), WARMUP_STEPS=2, DEVICE=str(self.device))
        own |= vars(s) | {"BATCH_SIZE": s.batch if stage is train_head else s.finetune_batch}
        return {name: own.get(name, value) for name, value in constants(vars(stage)).items()} | changes

    def learner(self, trunk=None, precision=None, device=None, **changes):
        """A new head, on a new trunk by default."""
        s, (data, pca, _), device = self.sizes, self.inputs, torch.device(device or self.device)
        trunk = trunk or Trunk(s.TRUNK, s.LAYERS, s.IMAGE_SIZE, pretrained=False).to(device)
        options = "head.pt", data, pca, device, precision or self.precision
        return train_head.new_learner(trunk, self.settings(**changes), *options)

    def batches(self, learner):
        """-> Batches for a learner, the first of them on its device, Crops."""
        (data, pca, images), device = self.inputs, learner.encoder.head.embed_bias.device
        batches = training.Batches(data, pca, images, learner.settings, device)
        return batches, batches.prepare(0), Crops(learner.encoder.trunk, learner.settings.CROP_SCALE, device)

    def clock(self, work, n=1):
        """Seconds that work() takes, mean of n calls in a row."""
        wait = partial(torch.cuda.synchronize, self.device) if self.is_gpu else lambda: None
        wait()
        start = time.perf_counter()
        for _ in range(n):
            work()
        wait()
        return (time.perf_counter() - start) / n

    def medians(self, *works, n=1):
        """Median seconds of each function, n calls in a row, in alternation, each after a call that does not count."""
        times = [[] for _ in works]
        for _ in range(REPEATS):
            for work, seconds in zip(works, times):
                work()
                seconds.append(self.clock(work, n))
        return [statistics.median(seconds) for seconds in times]

    def free(self):
        """Give unused memory back, and start to measure the peak anew."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self, limit):
        return "peak GPU memory", torch.cuda.max_memory_reserved() / 2**30 or np.nan, "GiB", limit * self.is_gpu


def say(line):
    print(line, flush=True)
    with open(OUTPUT, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def report(name, check, bench):
    """Add what check(bench) yields: (what, value, unit, limit such as "≤ 30" or none)."""
    start = time.perf_counter()
    try:
        for what, value, unit, limit in check(bench):
            bound = float(limit[2:] or "nan")
            verdict = "ok" if value <= bound and limit[0] == "≤" or value >= bound and limit[0] == "≥" else "MISSED"
            say(f"| {name}: {what} | {value:.4g} {unit} | {limit} | {verdict if limit else ''} |")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[-300:].replace("|", "/")
        say(f"| {name} | {reason} | | FAILED |")
    bench.free()
    say(f"| *{name}, all of it* | {time.perf_counter() - start:.0f} s | | |")


def call(script, **values):
    """A script's main() with these constants, without its output."""
    with patch.multiple(script, **values), contextlib.redirect_stdout(io.StringIO()):
        script.main()


def command(folder, words):
    """Run python in a folder -> (seconds, seconds of processor time, its output); errors go to the terminal."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    after = os.times()
    return time.perf_counter() - start, sum(after[2:4]) - sum(before[2:4]), done.stdout


def difference(a, b):
    """Largest relative difference |a - b| / |b| over pairs of tensors."""
    pairs = [(x.detach().double().cpu(), y.detach().double().cpu()) for x, y in zip(a, b, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in pairs)


def tensors_of(state):
    """Copies of weights, buffers and the optimiser's moments in a Learner's state."""
    moments = [value for each in state["optimizer"]["state"].values() for value in each.values()]
    return [tensor.clone() for tensor in [*state["weights"].values(), *moments]]


def check_numbers(bench):
    """One batch without dropout against float32 on the CPU."""
    expected = one_batch(bench, "cpu", torch.float32)
    for precision, limit in ((torch.float32, "≤ 1e-4"), (torch.bfloat16, "≤ 0.05"), (torch.float16, "≤ 0.006")):
        for what, tensors in one_batch(bench, bench.device, precision).items():
            yield f"{what}, {precision}, relative error", difference(tensors, expected[what]), "", limit


def one_batch(bench, device, precision):
    learner = bench.learner(None, precision, device, BATCH_SIZE=16, FEATURE_DROPOUT=0.0)
    (_, batch, crops), encoder = bench.batches(learner), learner.encoder
    with torch.no_grad(), autocast(device, precision):
        features = encoder.trunk(crops(*(batch[name] for name in training.IMAGE_KEYS)))
        z = encoder.train().head(features, batch["subject"])
    learner.loss = 0.0
    learner.accumulate(features, batch, 0, 1.0)
    gradients = [p.grad / learner.scaler.get_scale() for p in learner.trainable.values()]
    with torch.no_grad(), autocast(device, precision):
        y = encoder.eval().predict(encoder.latents(features), 0)
    return {"features": features, "head": [z], "loss": [learner.loss], "gradients": gradients, "predictions": [y]}


def check_float16(bench):
    """Steps with loss scaling on one batch, then one whose gradients overflow."""
    n, losses = bench.sizes.n_float16, []
    learner = bench.learner(precision=torch.float16, BATCH_SIZE=min(64, bench.sizes.batch), STEPS=n + 1)
    _, batch, crops = bench.batches(learner)
    for _ in range(n):
        training.train_step([learner], crops, batch)
        losses.append(float(learner.loss))
    yield "losses that are not finite", sum(~np.isfinite(losses)), f"of {n}", "≤ 0"
    yield "steps that were skipped", n - learner.n_losses, f"of {n}", ""
    before, learner.scaler = tensors_of(learner.state()), torch.amp.GradScaler(bench.device.type, 2.0**100)
    training.train_step([learner], crops, batch)
    yield "scale after an overflow / before", learner.scaler.get_scale() / 2.0**100, "", "≤ 0.5"
    yield "change of weights and optimiser in this step", difference(tensors_of(learner.state()), before), "", "≤ 0"


def check_loader(bench):
    """50 batches as they are after their step, while the loader's stream copies the next one."""
    learner, (data, pca, images), measured = bench.learner(BATCH_SIZE=bench.sizes.batch // 2), bench.inputs, []
    batches, _, crops = bench.batches(learner)
    for step, batch in batches(0, 50):
        training.train_step([learner], crops, batch)
        rows = batches.rows[training.sample_order(step, len(batch["subject"]), len(batches.rows), 0)]
        measured.append((rows, batch["images"].flatten(1).sum(1), batch["latents"].clone()))
    expected = [torch.from_numpy(images[data.image[rows]]).flatten(1).sum(1) for rows, _, _ in measured]
    wrong = sum(int((sums.cpu() != other).sum()) for (_, sums, _), other in zip(measured, expected))
    yield "wrong pictures", wrong, "", "≤ 0"
    yield "wrong targets", sum(int((z.cpu() != pca.latents[rows]).sum()) for rows, _, z in measured), "", "≤ 0"


def check_runs(bench):
    """train_head.py to the end; interrupted after a validation and continued; by torchrun in one process."""
    names, root = ("whole", "continued", "torchrun"), str(bench.folder)
    data_dir = bench.write_data("small", n_train=48, n_images=72, n_val=24, n_vertices=60, pca_dim=12)
    options = dict(DATA_DIR=str(data_dir), BATCH_SIZE=16, STEPS=6, VALIDATE_EVERY=3)
    whole, continued, single = (bench.settings(RUN_DIR=f"{root}/{name}", **options) for name in names)
    call(train_head, **whole)
    steps = iter(4 * [training.train_step])  # the fifth step raises StopIteration
    with patch.object(training, "train_step", lambda *each: next(steps)(*each)), contextlib.suppress(StopIteration):
        call(train_head, **continued)
    call(train_head, **continued)
    single["DEVICE"] = "auto" if bench.is_gpu else "cpu"
    words = [f"--{name.lower()}={value}" for name, value in single.items() if not isinstance(value, tuple)]
    command(ROOT, "-m torch.distributed.run --standalone --nproc_per_node=1".split() + [train_head.__file__] + words)
    states = [load_torch(f"{root}/{name}/train_head.state.pt", training.FORMAT, "")["learners"][0] for name in names]
    whole, *others = map(tensors_of, states)
    for what, tensors in zip(("interrupted and continued", "by torchrun in one process"), others):
        yield f"{what}, change of the result", difference(tensors, whole), "", "≤ 0"


def check_pca(bench):
    """Small data with 30 strong axes against the CPU; then the full size."""
    torch.manual_seed(0)
    y = torch.randn(600, 30) @ torch.randn(30, 300) + torch.randn(600, 300)
    ours, cpu = (fit_pca.fit(y.to(device), 30, fit_pca.PASSES, 0).cpu() for device in (bench.device, "cpu"))
    yield "smallest cosine between the subspaces", float(torch.linalg.svdvals(ours.T @ cpu).min()), "", "≥ 0.9999"
    data, pca, _ = bench.inputs
    error = difference([pca.latents, pca.residual], fit_pca.project(data, pca.components, pca.mean))
    yield "targets, relative error", error, "", "≤ 1e-4"
    bench.free()
    y = torch.randn(bench.sizes.n_samples, bench.sizes.n_vertices, device=bench.device)
    seconds = bench.clock(lambda: fit_pca.fit(y, bench.sizes.pca_dim, fit_pca.PASSES, 0))
    yield f"{bench.sizes.pca_dim} components of {' x '.join(map(str, y.shape))}", seconds, "s", "≤ 120"
    yield bench.peak("≤ 32")


def check_phase(bench, stage, compiled=False):
    """Whole training steps, data loading included, against what the trunk alone takes."""
    is_first, learner = stage is train_head, bench.learner()
    trunk = learner.encoder.trunk
    if not is_first:
        for name in trunk.attention_parameters():
            trunk.get_parameter(name).requires_grad_(True)
        options = bench.settings(stage), "finetuned.pt", {}, bench.device, bench.precision
        learner = training.Learner(learner.encoder, *options)
    (batches, resident, crops), n = bench.batches(learner), learner.settings.BATCH_SIZE
    stream, cropped = batches(0, 10**6), crops(*(resident[name] for name in training.IMAGE_KEYS))

    def trunk_alone():
        with autocast(bench.device, bench.precision):
            features = trunk(cropped)
        if not is_first:
            torch.autograd.backward(features, [torch.ones_like(x) for x in features])
            trunk.zero_grad(set_to_none=True)
        return [x[:8].detach().clone() for x in features]

    if compiled:
        expected = trunk_alone()
        trunk.compile(**bench.compiler)
        yield "first pass", bench.clock(trunk_alone), "s", ""
        yield "features, relative difference", difference(trunk_alone(), expected), "", "≤ 0.05"
    bench.free()
    step = partial(training.train_step, [learner], crops)
    works = trunk_alone, lambda: step(resident), lambda: step(next(stream)[1])
    alone, without_loader, whole = bench.medians(*works, n=bench.sizes.n_steps)
    bench.seconds[stage, compiled] = whole
    yield bench.peak("≤ 30")
    flops = n * bench.sizes.gflop / 1e3  # of the trunk's forward pass
    for what, t in (("trunk alone", alone), ("whole step", whole)):
        share = f", {flops / t:.1f} TFLOP/s, {flops / t / PEAK_TFLOPS:.1%} of the card's" if is_first else ""
        yield f"{what}, batch {n}", 1e3 * t, f"ms, {n / t:.0f} pictures/s{share}", ""
    yield "whole step / trunk alone", whole / alone, "", bench.limit("≤ 1.1" * is_first)
    yield "lost to the loader", whole / without_loader - 1, "", bench.limit("≤ 0.03")
    stream.close()
    torch.compiler.reset()


def check_heads(bench):
    """Eight heads on one pass of the trunk: the same as alone, and faster."""
    trunk = bench.learner().encoder.trunk
    *learners, alone = (bench.learner(trunk, SEED=seed) for seed in (*range(8), 7))
    _, batch, crops = bench.batches(alone)
    bench.free()
    works = [partial(training.train_step, each, crops, batch) for each in (learners, [alone])]
    eight, one = bench.medians(*works, n=bench.sizes.n_steps)
    changed = difference(tensors_of(learners[-1].state()), tensors_of(alone.state()))
    yield "change of one against alone", changed, "", "≤ 0"
    yield "step of eight", 1e3 * eight, "ms", ""
    yield "step of eight / eight runs", eight / (8 * one), "", bench.limit("≤ 0.25")
    yield bench.peak("≤ 40")


def check_pictures(bench, compiled=False):
    """JPEG files to an array of one subject, and receptive fields, against the trunk on pictures on the device."""
    s, images = bench.sizes, bench.inputs[2][: bench.sizes.n_reference]
    call(train_head, **bench.settings(DATA_DIR=str(bench.folder / "data"), STEPS=1, WARMUP_STEPS=0))
    predictor = load_encoder(bench.folder / "run/head.pt", str(bench.device))
    if compiled:
        predictor.encoders[0].trunk.compile(**bench.compiler)
    files, n = [bench.folder / f"{i}.jpg" for i in range(s.n_files)], min(predictor.batch_size, s.n_files)
    for file, colours in zip(files, np.random.default_rng(0).integers(0, 256, (s.n_files, 32, 32, 3), np.uint8)):
        if not file.exists():  # the compiled check reads the same
            Image.fromarray(colours).resize((425, 425)).save(file)
    resident = torch.zeros(n, 3, s.IMAGE_SIZE, s.IMAGE_SIZE, device=bench.device)
    array = np.lib.format.open_memmap(bench.folder / "own.npy", "w+", "<f4", (s.n_files, s.n_vertices))

    @torch.inference_mode()
    def trunk_alone():
        with autocast(bench.device, predictor.precision):
            for _ in range(s.n_files // n):
                predictor.encoders[0].trunk(resident)

    def from_files():
        _, latents = pictures.predict_files(predictor, files, [])
        array[:] = predictor.decode(latents, 0)

    alone, whole = bench.medians(trunk_alone, from_files)
    yield "from files to an array", s.n_files / whole, "pictures/s", ""
    yield "of the trunk's rate", alone / whole, "", bench.limit("≥ 0.5" if bench.is_gpu else "≥ 0.8")
    if compiled:
        return
    with torch.inference_mode():
        decomposition = contributions.Decomposition(predictor.encoders[0], 0, np.arange(s.n_vertices))
        fields = partial(contributions.measure_covariance, decomposition, images, predictor.precision)
        fields, predicting = bench.medians(fields, lambda: predictor.decode(predictor.latents(images), 0))
    yield f"receptive fields by {len(images)} pictures / predicting these", fields / predicting, "", bench.limit("≤ 3")


def check_headline(bench):
    """Validation, and minutes at full size estimated from it and the steps above."""
    s, (data, _, images), encoder = bench.sizes, bench.inputs, bench.learner().encoder
    [validation] = bench.medians(partial(training.validate, [encoder], data, images, "val", s.batch, bench.precision))
    yield f"validation, {s.n_val} pictures x {s.n_vertices} vertices", validation, "s", ""
    for (stage, compiled), step in bench.seconds.items():
        ours = (stage.STEPS * step + (1 + stage.STEPS * stage.BATCH_SIZE / 63800) * validation) / 60
        yield f"{stage.__name__}.py{', compiled' * compiled}", ours, "min", ""


def check_run(bench):
    """Both phases at full size on random data, as their commands run, compiled."""
    s, start = bench.sizes, time.perf_counter()
    options = dict(n_train=s.n_samples, n_images=s.n_images, n_val=s.n_val, n_vertices=s.n_vertices, pca_dim=s.pca_dim)
    paths = dict(DATA_DIR=str(bench.write_data("full", **options)), RUN_DIR=str(bench.folder / "full_run"))
    yield f"data of {s.n_images} pictures, and PCA", (time.perf_counter() - start) / 60, "min", ""
    for stage in (train_head, finetune):
        steps = round(stage.STEPS * RUN_SHARE) if bench.is_gpu else 3
        settings = bench.settings(stage, **paths, STEPS=steps, WARMUP_STEPS=steps // 20, COMPILE=bench.is_gpu)
        bench.free()
        ours = bench.clock(partial(call, stage, **settings)) / 60
        yield f"{stage.__name__}.py, {steps} steps", ours, "min", ""
        yield bench.peak("≤ 30")


def compare(bench, stage, needs="", longer="", limit=""):
    """Time a command here and in OTHER in alternation, less its start-up or, if it has a longer form, its short one."""
    trunk = f"--trunk {TRUNK} --pretrained false --layers blocks.{{0,2,4,6,8,10}} --batch_size {BATCH_SIZE}"
    texts = {
        "prepare": f"prepare_data.py --challenge_dir {Path(CHALLENGE_DIR).resolve()} --data_dir data --overwrite true",
        "pca": f"fit_pca.py --data_dir data --pca_dim {PCA_DIM} --device cpu --overwrite true",
        "step": f"train_head.py --data_dir data {trunk} --device cpu --overwrite true --warmup_steps 1 --steps 2",
    }
    roots, times = {"here": ROOT} | ({"there": Path(OTHER).resolve()} if OTHER else {}), {}
    for repeat, (where, root) in itertools.product(range(REPEATS), roots.items()):
        folder, words = bench.folder / where, {name: f"{root}/{text}".split() for name, text in texts.items()}
        folder.mkdir(exist_ok=True)
        for need in needs.split() if repeat == 0 else ():
            command(folder, words[need])
        *short, _ = command(folder, words[stage] + ([] if longer else ["--help"]))
        *whole, output = command(folder, words[stage] + longer.split())
        times.setdefault(where, []).append(np.subtract(whole, short))
        memory = re.search(r"peak memory ([\d.]+ GB)", output)[1]
        yield f"{where}, peak memory {memory}", times[where][-1][0], "s", ""
    if OTHER:
        wall, processor = np.median(times["here"], 0) / np.median(times["there"], 0)
        yield "here / there", wall, "", limit
        yield "here / there, processor time", processor, "", ""


CHECKS = {
    "gpu": {
        "numbers": check_numbers, "float16": check_float16, "loader": check_loader, "runs": check_runs,
        "phase 1": partial(check_phase, stage=train_head), "phase 2": partial(check_phase, stage=finetune),
        "heads": check_heads, "own pictures": check_pictures,
        "phase 1, compiled": partial(check_phase, stage=train_head, compiled=True),
        "phase 2, compiled": partial(check_phase, stage=finetune, compiled=True),
        "own pictures, compiled": partial(check_pictures, compiled=True),
        "headline": check_headline, "PCA": check_pca,
    },
    "run": {"full run": check_run},
    "prepare": {"preparation": partial(compare, stage="prepare", limit="≤ 1")},
    "pca": {"PCA": partial(compare, stage="pca", needs="prepare", limit="≤ 1.5")},
    "step": {"10 steps": partial(compare, stage="step", needs="prepare pca", longer="--steps 12", limit="≤ 1.03")},
    "heads": {"heads": check_heads},
    "predict": {"own pictures": check_pictures},
}  # fmt: skip


def main():
    start, device = time.perf_counter(), choose_device(DEVICE)
    checks = [item for part in PARTS.split(",") for item in CHECKS[part.strip()].items()]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    if device.type == "cuda":
        name, sizes = torch.cuda.get_device_name(device), GPU_SIZES
    else:
        sizes = TOY_SIZES if {"gpu", "run"} & set(PARTS.split(",")) else CPU_SIZES | dict(TRUNK=TRUNK, batch=BATCH_SIZE)
        name = "CPU"
    Path(OUTPUT).write_text("")
    facts = f"{versions()}, {choose_precision('auto', device)}, {time.strftime('%Y-%m-%d')}"
    say(f"{name}, {os.cpu_count()} cores, {facts}\n\n| check | measured | limit | |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, folder, sizes)
        for name, check in checks:
            if PARTS == "gpu" and time.perf_counter() - start > LAST_START:
                say(f"| {name} | no time left | | |")
            else:
                report(name, check, bench)
    say(f"| *all* | {time.perf_counter() - start:.0f} s | | |")


if __name__ == "__main__":
    run(main, globals())
