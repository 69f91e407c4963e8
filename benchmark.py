"""Where the time goes, as one table: python benchmark.py (CPU or GPU; --help lists the settings).

Ratios are measured side by side in one run, every repeat in turn, medians quoted. Pictures and
activity are random at full resolution: no data is needed. Parts:

    step      a phase-1 step against the trunk's own forward pass, and against the arrangement of the
              authors' code (whole trunk, crops in loader workers, loss in vertex space)
    heads     a phase-1 step of many heads on one pass of the trunk, against as many runs of one head
    memory    peak GPU memory of both phases' steps, the process capped; on a CPU what autograd keeps
    pca       group PCA against scikit-learn's randomised PCA, each in a process of its own
    prepare   decoding and resizing on one core and on all
    predict   own pictures, nine predictions of each as arrays, against the trunk's own forward pass
    host      peak host memory of stages 1 to 4 on a simulated challenge folder of HOST_SIZE
    processes a phase-1 step in 1, 2, … processes (torchrun), what they say to each other, and memory
    search    what Optuna's samplers find on simulated data, in real searches (an hour on two cores: not among
              the defaults)
    adapt     how good a model of a new person is, against training on everybody together, and its time: the
              demo's people, the eighth of them new (five minutes on two cores: not among the defaults)
    scaling   cost at 1/8, 1/4, 1/2 and full size, as far as MAX_SIZE lets it
"""

import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import adapt
import batches
import demo
import finetune
import fit_pca
import predict
import prepare_data
import processes
import ridge
import train_head
import training
from checkpoint import load_checkpoint
from common import Problem, choose_device, choose_precision, constants, peak_resident, run_script, versions
from ensemble import Ensemble
from model import Crops, Encoder, Head, Space, Trunk, autocast, picture_size, random_boxes, smallest_crop
from scores import r2_score

PARTS = "step,heads,memory,pca,prepare,predict,host,processes,scaling"  # which of these to run
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
PRECISION = "auto"  # auto, bfloat16, float16 or float32
TRUNK = train_head.TRUNK  # timm name; weights are random, which costs the same
LAYERS = train_head.LAYERS  # module names or patterns
BATCH_SIZE = 0  # samples; 0: 512 on a GPU, 32 on a CPU
REPEATS = 5  # of every timing; medians are quoted
FLOAT16_STEPS = 200  # steps with loss scaling that must stay finite (part memory)
GPU_LIMIT = 30.0  # GiB, cap of the process's GPU memory (part memory)
PCA_SIZE = 0.125  # of the full 63,800 samples, for the comparison with scikit-learn
HOST_SIZE = 0.02  # of the challenge's samples, for part host; 1 needs 32 GB of disk and some 20 GB of RAM
MAX_SIZE = 0.25  # of the full size, the largest in part scaling; 1 needs 16 GB of RAM
SCALING_PCA_DIM = 256  # components of the PCA in part scaling
N_PICTURES = 512  # PNG files of parts prepare, host and scaling
HEAD_COUNTS = (1, 2, 4, 8, 16)  # heads on one pass of the trunk (part heads)
SEARCH_RUNS = 6  # searches with each sampler (part search)
TEMPORARY = ""  # folder for simulated data (5 GB at full size, part host 32 GB); empty: the system's

process_pictures = 8192  # of part processes: 1.6 GB
n_vertices = {"lh": 19_004, "rh": 20_544}  # subjects 6 and 8 of the challenge lack some of them
n_missing = {6: {"lh": 26, "rh": 324}, 8: {"lh": 23, "rh": 14}}
full = SimpleNamespace(
    samples=63_800, vertices=sum(n_vertices.values()), images=68_000, subjects=8, pca_dim=2048, latent_dim=1024
)


def row(what, value, note=""):
    print(f"{what:58} {value:>14}  {note}", flush=True)


def run_quietly(script, **arguments):
    """A stage as a user starts it, on DEVICE, without what it prints."""
    arguments = [f"--{key}={value}" for key, value in arguments.items()]
    arguments += [f"--device={DEVICE}"] * (script != "prepare_data.py")
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def clock(device, work):
    """Seconds that work() takes, the GPU's share included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def side_by_side(device, works, repeats=None):
    """{name: median seconds} of several pieces of work, run in turn; the first round is not counted."""
    times = {name: [] for name in works}
    for i in range((repeats or REPEATS) + 1):
        for name, work in works.items():
            seconds = clock(device, work)
            if i:
                times[name].append(seconds)
    return {name: float(np.median(t)) for name, t in times.items()}


# ---- simulated inputs ---------------------------------------------------------------------------


class RandomData:
    """Stands for prepare_data.Prepared, with random pictures and activity."""

    def __init__(self, n_samples, n_images, n_vertices=full.vertices, path=None):
        rng = np.random.default_rng(0)
        self.space = SimpleNamespace(n_vertices=n_vertices, subjects=[f"subj{i:02}" for i in range(1, 9)])
        self.subject = rng.integers(0, full.subjects, n_samples)
        self.image = rng.integers(0, n_images, n_samples)
        self.activity = np.load(path, mmap_mode="r") if path else np.empty((0, n_vertices), np.float16)
        self.row = None if path else rng.standard_normal((1024, n_vertices), dtype=np.float32).astype(np.float16)

    def samples(self, split):
        return np.arange(len(self.subject))

    def read_activity(self, rows):
        if len(self.activity):
            return prepare_data.Prepared.read_activity(self, rows)
        return self.row[rows % len(self.row)]


def random_images(n):
    images = np.empty((n, picture_size, picture_size, 3), np.uint8)
    rng = np.random.default_rng(0)
    for start in range(0, n, 512):  # drawn in blocks: no second copy of all
        part = images[start : start + 512]
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    return images


def write_activity(path, n_samples, n_vertices):
    """Low rank plus noise: 300 components of falling size carry 40 % of the variance, as fMRI does."""
    rng = np.random.default_rng(0)
    maps = (
        rng.standard_normal((300, n_vertices), dtype=np.float32) * np.arange(1, 301, dtype=np.float32)[:, None] ** -0.7
    )
    maps *= np.sqrt(0.4 / np.square(maps).sum(0))
    with open(path, "wb") as file:
        prepare_data.write_npy_header(file, (n_samples, n_vertices), np.float16)
        for start in range(0, n_samples, 1024):
            n = min(1024, n_samples - start)
            y = rng.standard_normal((n, 300), dtype=np.float32) @ maps
            y += np.float32(0.6**0.5) * rng.standard_normal((n, n_vertices), dtype=np.float32)
            file.write(y.astype(np.float16).data)


# ---- part step ----------------------------------------------------------------------------------


class Phase:
    """One phase's step, built from the real parts."""

    def __init__(self, stage, batch_size, device, precision, n_images, images=None):
        self.settings = SimpleNamespace(**constants(vars(stage)) | {"BATCH_SIZE": batch_size})
        self.device, self.precision = device, precision
        trunk = Trunk(TRUNK, LAYERS, pretrained=False)
        if stage is finetune:
            for name in trunk.attention_parameters():
                trunk.get_parameter(name).requires_grad_(True)
        head = Head(trunk.feature_shapes, full.latent_dim, full.pca_dim, full.subjects, full.vertices, 0.9)
        self.encoder = Encoder(trunk, head).to(device).train()
        self.learner = training.Learner(self.encoder, vars(self.settings), "head.pt", {}, device, precision)
        self.data = RandomData(8 * batch_size, n_images)
        n = len(self.data.subject)
        pca = SimpleNamespace(latents=torch.randn(n, full.pca_dim).half(), residual=torch.rand(n))
        self.images = random_images(n_images) if images is None else images
        self.batches = batches.Batches(self.data, pca, self.images, self.settings, device, vertex_space=False)
        self.stream = self.batches(0, 10**9)
        self.crops = Crops(trunk, smallest_crop(0.8), device=device)

    def step(self, batch):
        training.train_step([self.learner], self.crops, batch, 0)
        return self.learner.loss

    def run(self, n):
        """n whole steps, the data coming in as in training, out of a stream that is never started anew."""
        for _ in range(n):
            self.step(next(self.stream)[1])


def part_step(device, precision, batch_size):
    phase = Phase(train_head, batch_size, device, precision, n_images=4 * batch_size)
    batch = next(iter(phase.batches(0, 1)))[1]
    trunk, head = phase.encoder.trunk, phase.encoder.head
    pictures = phase.crops(batch["images"], batch["top"], batch["left"], batch["size"])

    def forward(module):
        with torch.no_grad(), autocast(device, precision):
            return module(pictures)

    features = forward(trunk)

    def head_both_ways():
        with autocast(device, precision):
            z = head(features, batch["subject"])
        phase.learner.scaler.scale(training.loss_of(head, z, batch)).backward()

    n = 3  # steps in a row, so that the next batch's preparation overlaps
    authors = AuthorsArrangement(phase)
    trained = [p for p in phase.encoder.parameters() if p.requires_grad]
    unfused = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.8)
    works = {
        "trunk": lambda: forward(trunk),
        "crop": lambda: phase.crops(batch["images"], batch["top"], batch["left"], batch["size"]),
        "head": head_both_ways,
        "optimiser": phase.learner.optimizer.step,
        "unfused": unfused.step,
        "alone": lambda: phase.batches.prepare(1),
        "resident": lambda: [phase.step(batch) for _ in range(n)],
        "whole": lambda: phase.run(n),
        "authors": lambda: authors.run(n),
    }
    compiled = Trunk(TRUNK, LAYERS, pretrained=False).to(device)
    try:
        compiling = clock(device, lambda: training.compile_trunk(compiled, pictures, precision))
        works["compiled"] = lambda: forward(compiled)
    except Problem as problem:
        failure = str(problem)
    seconds = side_by_side(device, works)
    unit = seconds["trunk"]
    whole, resident = seconds["whole"] / n, seconds["resident"] / n
    rate = f"{batch_size / unit:.0f} images/s"
    row(f"trunk forward to its last used block, batch {batch_size}", f"{unit * 1e3:.0f} ms", f"= 1, {rate}")
    if "compiled" in works:
        row("  with torch.compile", f"{seconds['compiled'] / unit:.3f}", f"after {compiling:.0f} s of compiling")
    else:
        row("  with torch.compile", "not available", failure)
    limit = 1.20 if device.type == "cuda" else 1.35
    row("whole phase-1 step", f"{whole / unit:.3f}", f"of the trunk's forward; wanted {limit} at most")
    row(
        "  data: step from RAM less step with the batch on the device",
        f"{(whole - resident) / unit:.3f}",
        "wanted 0.03 at most on a GPU",
    )
    row("  (preparing a batch alone, hidden behind the step before)", f"{seconds['alone'] / unit:.3f}")
    for name in ("crop", "head", "optimiser"):
        row(f"  {name}", f"{seconds[name] / unit:.3f}")
    row("  (an optimiser that is not fused)", f"{seconds['unfused'] / unit:.3f}")
    row(
        "the authors' arrangement, whole step",
        f"{seconds['authors'] / n / unit:.3f}",
        f"{seconds['authors'] / n / whole:.2f} of ours",
    )


class AuthorsArrangement(torch.utils.data.Dataset):
    """Baseline: all trunk blocks, PIL crops in loader workers, decoding to all vertices, loss there."""

    def __init__(self, phase):
        self.phase = phase
        self.vit = Trunk(TRUNK, "blocks.*", pretrained=False).to(phase.device)
        self.crop = v2.Compose([
            v2.RandomResizedCrop(224, (0.8, 1.0), (1.0, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.vit.mean, self.vit.std),
        ])  # fmt: skip
        self.loader = torch.utils.data.DataLoader(
            self, phase.settings.BATCH_SIZE, num_workers=os.cpu_count(), prefetch_factor=1,
            pin_memory=phase.device.type == "cuda",
        )  # fmt: skip
        self.stream = iter(self.loader)
        self.used = [self.vit.layers.index(layer) for layer in phase.encoder.trunk.layers]

    def __len__(self):
        return 1 << 30

    def __getitem__(self, i):
        data, row = self.phase.data, np.array([i % len(self.phase.data.subject)])
        image = self.crop(Image.fromarray(self.phase.images[data.image[row[0]]]))
        return image, int(data.subject[row[0]]), data.read_activity(row)[0].astype(np.float32)

    def run(self, n):
        phase, head = self.phase, self.phase.encoder.head
        for images, subject, activity in itertools.islice(self.stream, n):
            images, subject, activity = (v.to(phase.device, non_blocking=True) for v in (images, subject, activity))
            with autocast(phase.device, phase.precision):
                with torch.no_grad():
                    features = self.vit(images)
                h = []
                for i, projection in zip(self.used, head.projections):
                    y = F.linear(F.dropout(features[i], 0.9), projection.channel)
                    h.append(projection.norm(torch.einsum("ntd,dt->nd", y, projection.spatial.to(y.dtype))))
                h = torch.stack(h).mean(0)
                own = F.linear(h, head.subject_weight.flatten(0, 1), head.subject_bias.flatten())
                own = own.view(len(h), full.subjects, full.pca_dim)
                z = F.linear(h, head.shared) + own[torch.arange(len(h), device=h.device), subject]
                loss = F.mse_loss(head.decode(z).float(), activity)
            phase.learner.scaler.scale(loss).backward()
            phase.learner.scaler.step(phase.learner.optimizer)
            phase.learner.scaler.update()
            phase.learner.optimizer.zero_grad(set_to_none=True)


# ---- part heads ---------------------------------------------------------------------------------


def part_heads(device, precision, batch_size):
    if min(HEAD_COUNTS) < 1:
        raise Problem(f"HEAD_COUNTS is {HEAD_COUNTS}, expected numbers of 1 or more")
    counts = sorted({1, *HEAD_COUNTS})
    phase = Phase(train_head, batch_size, device, precision, n_images=4 * batch_size)
    trunk, first = phase.encoder.trunk, phase.encoder.head
    learners = [phase.learner]
    for _ in range(counts[-1] - 1):
        head = Head(trunk.feature_shapes, full.latent_dim, full.pca_dim, full.subjects, full.vertices)
        head.set_embedding(first.embed_weight, first.embed_bias)
        settings = vars(phase.settings)
        learners.append(training.Learner(Encoder(trunk, head), settings, "head.pt", {}, device, precision))
    batch = next(iter(phase.batches(0, 1)))[1]
    pictures = phase.crops(batch["images"], batch["top"], batch["left"], batch["size"])

    def forward():
        with torch.no_grad(), autocast(device, precision):
            trunk(pictures)

    def step(n):
        training.train_step(learners[:n], phase.crops, batch, 0)

    seconds = side_by_side(device, {"trunk": forward} | {n: lambda n=n: step(n) for n in counts})
    row(f"trunk forward to its last used block, batch {batch_size}", f"{seconds['trunk'] * 1e3:.0f} ms", "= 1")
    for n in counts:
        note = f"{seconds[n] / n / seconds[1]:.3f} of {n} runs" + ("; wanted 0.25 at most" if n == 8 else "")
        row(f"step of {n} {'heads' if n > 1 else 'head'} on one pass", f"{seconds[n] / seconds['trunk']:.3f}", note)
    if device.type == "cuda":
        n = min(8, len(learners))
        del learners[n:]
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step(n)
        own = (n - 1) * first.embed_weight.numel() * 4  # these heads share an embedding, a run's have one each
        peak = (torch.cuda.max_memory_reserved(device) + own) / 2**30
        row(f"  peak GPU memory of {n}", f"{peak:.1f} GiB", "wanted 40 at most")


# ---- part memory --------------------------------------------------------------------------------


def kept_for_backward(stage, batch_size, device, precision):
    """Bytes of activations that autograd keeps in one step of the stage."""
    phase = Phase(stage, batch_size, device, precision, n_images=batch_size)
    own = {p.untyped_storage().data_ptr() for p in phase.encoder.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        phase.step(next(phase.stream)[1])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def part_memory(device, precision):
    if device.type != "cuda":
        for name, stage in (("phase 1", train_head), ("phase 2", finetune)):
            kept = (kept_for_backward(stage, 4, device, precision) - kept_for_backward(stage, 2, device, precision)) / 2
            size = f"{kept * stage.BATCH_SIZE / 2**30:.1f} GiB at batch {stage.BATCH_SIZE}"
            row(f"{name}: kept for the backward pass, a picture", f"{kept / 1e6:.1f} MB", size)
        return row("peak GPU memory of both phases, float16 steps", "not measured", "needs a GPU")
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, GPU_LIMIT / total), device)
    for name, stage in (("phase 1", train_head), ("phase 2", finetune)):
        gc.collect()  # data loader and hooks refer back to their owners
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        phase = Phase(stage, stage.BATCH_SIZE, device, precision, n_images=2048)
        seconds = clock(device, lambda: phase.run(5)) / 5
        peak = torch.cuda.max_memory_reserved(device) / 2**30
        note = f"capped at {GPU_LIMIT:.0f}; {seconds * 1e3:.0f} ms a step, "
        note += f"{stage.STEPS * seconds / 60:.0f} min for {stage.STEPS}"
        row(f"{name}, batch {stage.BATCH_SIZE}: peak GPU memory", f"{peak:.1f} GiB", note)
        del phase
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    phase = Phase(train_head, 64, device, torch.float16, n_images=256)
    losses = [phase.step(batch).item() for _, batch in phase.batches(0, FLOAT16_STEPS)]
    row(
        f"float16 with loss scaling, {FLOAT16_STEPS} steps",
        f"{np.isfinite(losses).sum()} finite",
        f"scale {phase.learner.scaler.get_scale():.0f}",
    )


# ---- part pca -----------------------------------------------------------------------------------


def in_process(function, *arguments):
    """Run it in a new process -> (its result, its peak resident memory in GB)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(with_peak, (function, *arguments))


def with_peak(function, *arguments):
    result = function(*arguments)
    return result, peak_resident()


def pca_ours(path, n_samples, pca_dim, device):
    """-> (seconds, explained part of the variance)."""
    data = RandomData(n_samples, 1, path=path)
    activity = fit_pca.Activity(data, np.arange(n_samples), device)
    start = time.perf_counter()
    components, total = fit_pca.fit(activity, pca_dim, fit_pca.PASSES, 0)
    fitted = time.perf_counter() - start
    latents, _ = fit_pca.project(activity, components)
    whole = time.perf_counter() - start
    return fitted, float(latents.double().var(0).sum() / total), whole


def pca_sklearn(path, n_samples, pca_dim):
    from sklearn.decomposition import PCA

    start = time.perf_counter()
    pca = PCA(pca_dim, svd_solver="randomized", random_state=0).fit(np.load(path)[:n_samples].astype(np.float32))
    return time.perf_counter() - start, float(pca.explained_variance_ratio_.sum())


def part_pca(device, folder):
    n = int(full.samples * PCA_SIZE)
    path = Path(folder) / "activity.npy"
    write_activity(path, n, full.vertices)
    pca_dim = min(full.pca_dim, n // 2)
    (ours, explained, whole), memory = in_process(pca_ours, path, n, pca_dim, device)
    size = f"{n} x {full.vertices}, {pca_dim} components"
    row(
        f"group PCA, {size}",
        f"{ours:.0f} s",
        f"{whole:.0f} s with the targets, {memory:.1f} GB host memory, explains {explained:.4f}",
    )
    if PCA_SIZE > 0.25:
        return row(
            "  of scikit-learn's randomised PCA", "not measured", "its copies of the activity take too much memory"
        )
    (theirs, expected), their_memory = in_process(pca_sklearn, path, n, pca_dim)
    row("  of scikit-learn's randomised PCA: time", f"{ours / theirs:.2f}", f"{theirs:.0f} s; wanted 1 at most")
    row("  memory", f"{memory / their_memory:.2f}", f"{their_memory:.1f} GB; wanted 0.5 at most")
    row(
        "  explained variance", f"{explained / expected:.4f}", f"{explained:.4f}, {expected:.4f}; wanted 0.999 at least"
    )


# ---- part prepare -------------------------------------------------------------------------------


def write_pictures(folder, n):
    """n challenge-like files: 425 px RGB PNGs of photographs."""
    from sklearn.datasets import load_sample_images

    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(n):
        photograph = photographs[i % 2]
        top, left = rng.integers(0, np.array(photograph.shape[:2]) - 424)
        Image.fromarray(photograph[top : top + 425, left : left + 425]).save(folder / f"{i}.png")
    return [[folder / f"{i}.png"] for i in range(n)]


def drain(pictures):
    for _ in pictures:
        pass


def part_prepare(folder):
    paths = write_pictures(Path(folder), N_PICTURES)
    cores = os.cpu_count()
    works = {k: lambda k=k: drain(prepare_data.decode_pictures(paths, k)) for k in (1, cores)}
    seconds = side_by_side(torch.device("cpu"), works)
    row("decode and resize on one core", f"{N_PICTURES / seconds[1]:.0f} pictures/s")
    row(f"  on {cores} cores", f"{seconds[1] / seconds[cores]:.2f}", "times that rate; wanted 1.8 at least on two")


# ---- part predict -------------------------------------------------------------------------------


def random_space():
    """The challenge's vertices with random areas of its names."""
    sizes, rng = list(n_vertices.values()), np.random.default_rng(0)
    vertices = np.concatenate([np.sort(rng.choice(prepare_data.n_fsaverage, n, replace=False)) for n in sizes])
    names = {group: dict(enumerate(["Unknown", *areas])) for group, areas in demo.areas.items()}
    shape = (full.subjects, len(vertices))
    rois = {g: {"names": n, "labels": torch.from_numpy(rng.integers(0, len(n), shape))} for g, n in names.items()}
    subjects = [f"subj{i:02}" for i in range(1, full.subjects + 1)]
    return Space(subjects, torch.from_numpy(vertices), sizes[0], torch.ones(shape, dtype=torch.bool), rois)


def part_predict(device, precision, folder):
    folder, batch_size = Path(folder), predict.BATCH_SIZE
    n = (64 if device.type == "cuda" else 2) * batch_size
    (folder / "files").mkdir()
    files = write_pictures(folder / "files", min(n, N_PICTURES))
    (folder / "pictures").mkdir()
    for i in range(n):
        os.link(files[i % len(files)][0], folder / "pictures" / f"{i:06}.png")
    trunk = Trunk(TRUNK, LAYERS, pretrained=False)
    head = Head(trunk.feature_shapes, full.latent_dim, full.pca_dim, full.subjects, full.vertices)
    torch.nn.init.normal_(head.embed_weight, std=full.vertices**-0.5)
    encoder, made = (
        Encoder(trunk, head).to(device).eval(),
        dict(fingerprint="", step=0, finished=True, scores={}, made_with={}),
    )
    ensemble = Ensemble([encoder], random_space(), [("random weights", made)], precision)
    constants_of = dict(
        IMAGES=str(folder / "pictures"), OUTPUT_DIR=str(folder / "predictions"), OVERWRITE=True, MAPS=0, GIFTI=0
    )
    vars(predict).update(constants_of)
    images = torch.zeros(batch_size, 3, trunk.image_size, trunk.image_size, device=device)

    def forward():
        for _ in range(n // batch_size):
            with torch.inference_mode(), autocast(device, precision):
                trunk(images)

    def everything():
        with contextlib.redirect_stdout(io.StringIO()):
            predict.predict_pictures(ensemble)

    seconds = side_by_side(device, {"trunk": forward, "predict": everything})
    row(f"trunk forward, {n} pictures in batches of {batch_size}", f"{n / seconds['trunk']:.1f} images/s", "= 1")
    wanted = 0.5 if device.type == "cuda" else 0.8
    share = seconds["trunk"] / seconds["predict"]
    row(
        "predict.py: from files to arrays of all nine predictions",
        f"{share:.3f}",
        f"of that rate; wanted {wanted} at least",
    )


# ---- part host ----------------------------------------------------------------------------------


def write_challenge(folder):
    """A challenge folder of HOST_SIZE with random activity; a few pictures under many names."""
    (folder / "files").mkdir()
    files = [path for [path] in write_pictures(folder / "files", N_PICTURES)]
    challenge, rng = folder / "challenge", np.random.default_rng(0)
    n_train, n_test = (max(20, round(n * HOST_SIZE)) for n in (demo.n_training[1], demo.n_held_out[1]))
    chosen = {s: splits for s, splits in demo.choose_pictures(0, n_train, n_test, shared=0.1).items() if s <= 8}
    for nsd_id, paths in demo.picture_paths(challenge, chosen).items():
        for path in paths:
            os.link(files[nsd_id % len(files)], path)
    for subject, splits in chosen.items():
        for side, n in n_vertices.items():
            vertices = np.arange(n - n_missing.get(subject, {}).get(side, 0))
            labels = dict.fromkeys(demo.areas, np.zeros(len(vertices), int))
            activity = [rng.standard_normal((len(ids), len(vertices)), dtype=np.float32) for ids in splits]
            demo.write_hemisphere(
                challenge / f"subj{subject:02}", side, vertices, labels, activity, np.ones(len(vertices))
            )
    return challenge


def part_host(folder):
    folder = Path(folder)
    data = f"--data_dir={folder / 'data'}"
    training = (
        data,
        f"--run_dir={folder / 'run'}",
        "--steps=2",
        "--warmup_steps=1",
        "--batch_size=2",
        f"--device={DEVICE}",
    )
    stages = {
        "prepare_data": (f"--challenge_dir={write_challenge(folder)}", data),
        "fit_pca": (data, f"--pca_dim={min(full.pca_dim, int(full.samples * HOST_SIZE) // 2)}", "--passes=1",
                    f"--device={DEVICE}"),
        "train_head": (*training, f"--trunk={TRUNK}", f"--layers={LAYERS}", "--pretrained=false"),
        "finetune": training,
    }  # fmt: skip
    limits = {"prepare_data": 4, "fit_pca": 12}
    on_cpu = choose_device(DEVICE).type == "cpu"
    wanted = "with model and activations of batch 2" if on_cpu else "wanted 3 at most"
    for stage, arguments in stages.items():
        script = Path(__file__).with_name(f"{stage}.py")
        done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
        found = re.search(r"(\d+) s, peak memory ([\d.]+) GB", done.stdout)
        if not found:
            raise Problem(f"{script.name} failed, its message is above")
        if stage in limits:
            note = f"{found[1]} s; wanted {limits[stage]} GB at most"
        else:
            pictures = prepare_data.load(folder / "data").n_training_images * picture_size**2 * 3 / 1e9
            note = f"{float(found[2]) - pictures:.1f} GB without the pictures; {wanted}"
        row(f"{stage}.py at {HOST_SIZE:g} of the full size: peak host memory", f"{found[2]} GB", note)


# ---- part processes -----------------------------------------------------------------------------


def part_processes(device, batch_size, folder):
    """Every arrangement is a run of this part under torchrun, in turn, twice; the faster run of each counts."""
    np.save(Path(folder) / "images.npy", random_images(process_pictures))
    cores = os.cpu_count()
    if device.type == "cuda":
        counts = [n for n in (1, 2, 4, 8, 16) if n <= torch.cuda.device_count() and batch_size % n == 0]
        arrangements = {f"{n} GPUs": (n, 0) for n in counts}
    else:
        counts = [n for n in (2, 4, 8, 16, 32) if n <= cores and batch_size % n == 0]
        arrangements = {"1 process of 1 thread": (1, 1), f"1 process of {cores} threads": (1, cores)}
        arrangements |= {f"{n} processes of 1 thread": (n, 1) for n in counts}
    best = {}
    for name, (n, threads) in 2 * list(arrangements.items()):
        run = run_processes(n, threads, batch_size, folder)
        best[name] = min(best.get(name, run), run, key=lambda run: run["step"])
    unit = next(iter(best.values()))["step"]
    for name, run in best.items():
        note = f"times as fast ({run['step']:.2f} s), {run['said'] / run['step']:.3f} of it for what processes exchange"
        row(f"phase-1 step, batch {batch_size}, {name}", f"{unit / run['step']:.2f}", note)
    if device.type != "cuda" and counts:
        ratio = best["2 processes of 1 thread"]["step"] / best[f"1 process of {cores} threads"]["step"]
        row(
            f"  two processes of one thread, of one of {cores}",
            f"{ratio:.3f}",
            "of the time; wanted 1.1 at most on two cores",
        )
    pictures = process_pictures * picture_size**2 * 3 / 1e9
    memory = {name: run["memory"] for name, run in best.items()}
    if device.type != "cuda" and 4 not in counts:  # on fewer cores it takes its time, and as much memory
        memory["4 processes of 1 thread"] = run_processes(4, 1, batch_size, folder)["memory"]
    for name, used in memory.items():
        row(f"memory of {name}", f"{used:.1f} GB", f"together; {used - pictures:.1f} GB without the pictures")


def run_processes(n, threads, batch_size, folder):
    """-> what measure_processes() found in n processes of so many threads each (0: torchrun's choice)."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", __file__, "--parts=processes"]
    command += [f"--temporary={folder}", f"--batch_size={batch_size}", f"--device={DEVICE}", f"--precision={PRECISION}"]
    command += [f"--trunk={TRUNK}", f"--layers={LAYERS}", f"--repeats={REPEATS}"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Problem(f"{n} processes failed: {done.stderr[-2000:]}")
    return json.loads(re.search(r"measured: (.*)", done.stdout)[1])


def measure_processes(device, precision):
    """One of the processes of an arrangement: seconds a step, of it for what they exchange, GB of all together."""
    pictures = np.load(Path(TEMPORARY) / "images.npy", mmap_mode="r")
    data = SimpleNamespace(
        images=pictures, n_training_images=len(pictures), read_training_images=lambda: np.array(pictures)
    )
    phase = Phase(train_head, BATCH_SIZE, device, precision, len(pictures), batches.read_pictures(data))
    exchanged = []

    def timed(function):
        def call(*arguments):
            results = []
            exchanged.append(clock(device, lambda: results.append(function(*arguments))))
            return results[0]

        return call

    phase.run(1)
    processes.barrier()
    seconds = clock(device, lambda: phase.run(REPEATS)) / REPEATS
    for name in ("gather_rows", "average_gradients"):
        setattr(processes, name, timed(getattr(processes, name)))
    phase.run(REPEATS)
    found = re.search(r"Pss:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    memory = sum(processes.gather_objects(int(found[1]) * 1024 / 1e9))  # proportional: shared pages count once
    print("measured:", json.dumps({"step": seconds, "said": sum(exchanged) / REPEATS, "memory": memory}))


# ---- part search --------------------------------------------------------------------------------


def part_search(folder):
    """What each sampler finds, on two problems: one whose good constants are the usual ones, one whose are far away."""
    import optuna

    import search

    def tpe(**options):
        return lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, constant_liar=True, **options)

    samplers = {
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "TPE, one constant at a time": tpe(multivariate=False),
        "TPE, multivariate": tpe(multivariate=True),
        "Gaussian process": search.new_sampler,
    }
    shared = dict(
        TRUNK=demo.TRUNK, PRETRAINED=False, IMAGE_SIZE=56, DEVICE=DEVICE, PRECISION="float32", TRIALS=32, HEADS=8
    )
    problems = {
        "eight people, 60 steps": (range(1, 9), 160, 64, dict(
            LAYERS_CHOICES="blocks.{0,1}; blocks.0; blocks.1", LATENT_DIM_RANGE=(16, 128), PCA_DIM_RANGE=(8, 64),
            BATCH_SIZE=64, STEPS=60, VALIDATE_EVERY=30,
        )),
        "two people, 24 steps": (range(1, 3), 240, 32, dict(
            LAYERS_CHOICES="blocks.{0,1}; blocks.0", LATENT_DIM_RANGE=(16, 16), PCA_DIM_RANGE=(8, 32),
            LEARNING_RATE_RANGE=(5e-4, 3e-2), FEATURE_DROPOUT_RANGE=(0.0, 0.9), BATCH_SIZE=32, STEPS=24,
            VALIDATE_EVERY=24,
        )),
    }  # fmt: skip
    usual = dict(vars(search))
    for n, (problem, (subjects, n_train, pca_dim, settings)) in enumerate(problems.items()):
        place = Path(folder) / str(n)
        demo.simulate(
            place / "challenge", subjects=subjects, n_train=n_train, n_test=5, picture_size=80, vertex_step=16
        )
        run_quietly("prepare_data.py", challenge_dir=place / "challenge", data_dir=place / "data")
        run_quietly("fit_pca.py", data_dir=place / "data", pca_dim=pca_dim)
        vars(search).update(usual | shared | settings | {"DATA_DIR": str(place / "data")})
        for name, new_sampler in samplers.items():
            found = [search_once(search, new_sampler, seed, place / f"{seed}-{name}") for seed in range(SEARCH_RUNS)]
            after = {n: np.array(found)[:, n - 1] for n in (8, 16, 24, 32)}
            error = after[32].std(ddof=1) / SEARCH_RUNS**0.5 if SEARCH_RUNS > 1 else np.nan
            note = f"± {error:.4f} over {SEARCH_RUNS}; after "
            note += ", ".join(f"{n}: {values.mean():.4f}" for n, values in after.items())
            row(f"{problem}: {name}", f"{after[32].mean():.4f}", note)


def search_once(search, new_sampler, seed, folder):
    """Best R² so far, after every trial."""
    search.new_sampler, search.SEED, search.RUN_DIR = new_sampler, seed, str(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        search.main()
    trials = search.read_study(folder / "study.journal").get_trials()
    return np.maximum.accumulate([-np.inf if trial.value is None else trial.value for trial in trials])


# ---- part adapt ---------------------------------------------------------------------------------


def part_adapt(device, precision, folder):
    """The demo's eighth person, scored on the test pictures, which nobody was trained on."""
    folder = Path(folder)
    challenge, name = folder / "challenge", "subj08"
    demo.simulate(challenge, n_train=demo.N_TRAIN, n_test=demo.N_TEST, picture_size=demo.PICTURE_SIZE)

    def train(people, subjects=""):
        demo.train(run_quietly, challenge, folder / f"data_{people}", folder / f"run_{people}", subjects)

    seven = ",".join(f"subj{i:02}" for i in range(1, 8))
    train("seven", seven)
    seconds = {"eight": clock(device, lambda: train("eight"))}
    values = dict(challenge_dir=challenge, subject=name, run_dir=folder / "run_seven", output_dir=folder / "new")
    seconds["adapt"] = clock(device, lambda: run_quietly("adapt.py", **values))
    quick = values | dict(output_dir=folder / "quick", hold_out="false")
    seconds["no curve"] = clock(device, lambda: run_quietly("adapt.py", **quick))

    pictures = sorted((challenge / name / "test_split/test_images").iterdir())
    sides = [challenge / name / f"test_split/test_fmri/{hemi}_test_fmri.npy" for hemi in prepare_data.hemis]
    activity = torch.from_numpy(np.concatenate([np.load(path) for path in sides], 1))

    def r2(prediction):
        return float(r2_score(activity, prediction).median())

    def of_checkpoint(path):
        found = predict.load_encoder(path, DEVICE, PRECISION).activity(pictures, [name])[name]
        return r2(torch.from_numpy(np.concatenate([found.lh, found.rh], 1)))

    together, adapted = (of_checkpoint(folder / path) for path in ("run_eight/finetuned.pt", "new/adapted.pt"))
    row(f"{name}, median R² on {len(pictures)} test pictures: trained on with seven others", f"{together:.4f}")
    part = f"{adapted / together:.3f} of it; wanted 0.95 at least"
    row("  trained on the seven, adapted to all its training pictures", f"{adapted:.4f}", part)

    adapt.CHALLENGE_DIR, adapt.SUBJECT = str(challenge), name
    encoder, space, made = load_checkpoint(folder / "run_seven/finetuned.pt", device)
    files, _ = adapt.read_person()
    person = adapt.match(files, space, (), "the seven's")
    n, train_rows = len(files.pictures), np.flatnonzero(person.train)
    images = [prepare_data.decode_picture([path]) for path in files.pictures + files.test_pictures]
    h, x = adapt.read_latents(encoder, files.pictures + files.test_pictures, precision)
    crops = crop_latents(encoder, np.stack(images[:n]), precision)
    solver, cropped = adapt.Solver(encoder, person, h[:n]), adapt.Solver(encoder, person, crops)
    h_test = h[n:].to(device)

    def each_component(solver, rows):
        """A penalty for every component by itself."""
        parts = []
        for k in range(len(solver.basis.values)):
            one = adapt.Basis(None, solver.basis.vectors[:, k : k + 1], solver.basis.values[k : k + 1])
            parts.append(adapt.fit(solver.h[rows], solver.targets[rows, k : k + 1], one)[:2])
        return [sum(part).float() for part in zip(*parts)]

    def by_ridge(rows):
        fitted = ridge.fit(x[rows].to(device), person.read_activity(rows).to(device))
        return ridge.predict(fitted, x[n:].to(device))

    methods = {
        "adapted": lambda rows: solver.predict(h_test, *solver.fit(rows)[:2]),
        "  a penalty for each component": lambda rows: solver.predict(h_test, *each_component(solver, rows)),
        "  h averaged over four random crops": lambda rows: solver.predict(h_test, *cropped.fit(rows)[:2]),
        "ridge regression": by_ridge,
    }
    for size in (10, 30, 100, len(train_rows)):
        n_draws = 5 if 2 * size < len(train_rows) else 1
        draws = [np.random.default_rng([0, size, k]).choice(train_rows, size, replace=False) for k in range(n_draws)]
        group = r2(solver.predict_group(h_test).cpu())
        row(f"{size} pictures, {n_draws} draws: the group's prediction", f"{group:.4f}")
        for title, predicted in methods.items():
            found = [r2(predicted(rows).cpu()) for rows in draws]
            row(f"  {title}", f"{np.mean(found):.4f}", f"{min(found):.4f} to {max(found):.4f}" if n_draws > 1 else "")
    for title, key in (
        ("adapting with its curve, of training on all eight", "adapt"),
        ("  without the curve", "no curve"),
    ):
        row(title, f"{seconds[key] / seconds['eight']:.2f}", f"{seconds[key]:.0f} s, {seconds['eight']:.0f} s")


@torch.inference_mode()
def crop_latents(encoder, images, precision, n_crops=4):
    """h (n_images, latent_dim), mean over random crops as in training."""
    crops, total = Crops(encoder.trunk, smallest_crop(0.8), device=encoder.head.embed_bias.device), 0.0
    for k in range(n_crops):
        boxes, parts = random_boxes(len(images), 0.8, np.random.default_rng([0, k])), []
        for rows in torch.arange(len(images)).split(64):
            batch = [v[rows].to(crops.device) for v in (torch.from_numpy(images), *boxes)]
            with autocast(crops.device, precision):
                parts.append(encoder.latents(encoder.trunk(crops(*batch))))
        total = total + torch.cat(parts)
    return (total / n_crops).cpu()


# ---- part scaling -------------------------------------------------------------------------------


def growth(sizes, seconds):
    """Exponent of time against size."""
    return f"time ~ size^{np.polyfit(np.log(sizes), np.log(seconds), 1)[0]:.2f}" if len(sizes) > 1 else "one size only"


def part_scaling(device, batch_size, folder):
    sizes = [size for size in (0.125, 0.25, 0.5, 1.0) if size <= MAX_SIZE]
    pictures = write_pictures(Path(folder), N_PICTURES)
    path = Path(folder) / "activity.npy"
    write_activity(path, int(full.samples * sizes[-1]), full.vertices)
    images = random_images(int(full.images * sizes[-1]))
    settings = SimpleNamespace(**constants(vars(train_head)) | {"BATCH_SIZE": batch_size})
    pca_name = f"PCA of {SCALING_PCA_DIM} components"
    costs = {"batch from RAM": [], pca_name: [], "prepare": []}
    for size in sizes:
        n = int(full.samples * size)
        data = RandomData(n, int(full.images * size))
        pca = SimpleNamespace(latents=torch.zeros(n, full.pca_dim, dtype=torch.float16), residual=torch.zeros(n))
        loader = batches.Batches(data, pca, images, settings, device, vertex_space=False)
        steps = iter(range(10**6))
        costs["batch from RAM"].append(side_by_side(device, {"": lambda: loader.prepare(next(steps))}, 20)[""])
        costs[pca_name].append(in_process(pca_ours, path, n, SCALING_PCA_DIM, device)[0][0])
        part = pictures[: int(N_PICTURES * size)]
        works = {"": lambda: drain(prepare_data.decode_pictures(part))}
        costs["prepare"].append(side_by_side(torch.device("cpu"), works)[""])
    for name, seconds in costs.items():
        unit = f"of {N_PICTURES} pictures" if name == "prepare" else "of the full size"
        for size, s in zip(sizes, seconds):
            row(f"{name}, {size:g} {unit}", f"{s * 1e3:.1f} ms" if s < 1 else f"{s:.0f} s")
        row(f"  {name} grows as", growth(sizes, seconds))


def main():
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    if processes.launched():
        return measure_processes(device, precision)
    batch_size = BATCH_SIZE or (512 if device.type == "cuda" else 32)
    parts = {  # each takes a folder for what it writes
        "step": lambda folder: part_step(device, precision, batch_size),
        "heads": lambda folder: part_heads(device, precision, batch_size),
        "memory": lambda folder: part_memory(device, precision),
        "pca": lambda folder: part_pca(device, folder),
        "prepare": part_prepare,
        "predict": lambda folder: part_predict(device, precision, folder),
        "host": part_host,
        "processes": lambda folder: part_processes(device, batch_size, folder),
        "search": part_search,
        "adapt": lambda folder: part_adapt(device, precision, folder),
        "scaling": lambda folder: part_scaling(device, batch_size, folder),
    }
    chosen = [name.strip() for name in PARTS.split(",")]
    if not set(chosen) <= parts.keys():
        raise Problem(f"PARTS is {PARTS!r}, expected some of {', '.join(parts)}")
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{hardware}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {str(precision)[6:]}, {versions()}")
    print(f"trunk {TRUNK}, layers {LAYERS}")
    for name in chosen:
        with tempfile.TemporaryDirectory(dir=TEMPORARY or None) as folder:
            parts[name](folder)


if __name__ == "__main__":
    run_script(main, globals(), many_processes=True)
