"""Stage 3, phase 1: train the encoding head on the frozen trunk (report, Table 2).

Reads DATA_DIR (prepared data, PCA); writes RUN_DIR/head.pt, the checkpoint that is best by
validation median R², train_head.jsonl, one JSON object per validation, and train_head.png, the
loss curves (report, Figure 3). Stopped at any moment, the same command continues.

The loss is the mean squared error over all vertices, computed in PCA space (fit_pca.py): same
value, same gradients, no decoder in the step. finetune.py runs the same loop, train().
"""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fit_pca
import prepare_data
from common import (
    Problem, check_disk, check_least, choose_device, choose_precision, constants, fingerprint, load_torch,
    run_script, versions, write_whole,
)  # fmt: skip
from model import (
    Crops, Encoder, Head, Trunk, autocast, median_r2, predict_latents, r2_score, random_boxes, save_checkpoint,
    smallest_crop, trunk_fingerprint,
)  # fmt: skip

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = "runs/base"  # checkpoint, log and curves are written there

TRUNK = "eva02_base_patch14_224.mim_in22k"  # timm name (report, Table 1; others: Table 4)
PRETRAINED = True  # false: random weights, for tests
LAYERS = "blocks.{0,2,4,6,8,10}"  # module names or patterns (report, Table 1)
IMAGE_SIZE = 224  # px, input of the trunk (report, Trunk model)
LATENT_DIM = 1024  # (report, Table 1); PCA_DIM is set in fit_pca.py

BATCH_SIZE = 512  # samples per optimiser step (report, Table 2)
MICRO_BATCH = 0  # samples at a time; 0: the whole batch. Less needs less GPU memory; batch norm sees it
STEPS = 5000  # optimiser steps (report, Table 2)
WARMUP_STEPS = 250  # linear from MIN_LEARNING_RATE (report, Table 2)
LEARNING_RATE = 6e-4  # peak, then cosine decay (report, Table 2)
MIN_LEARNING_RATE = 3e-5  # at the end (report, Table 2)
BETAS = (0.9, 0.99)  # AdamW (report, Table 2)
WEIGHT_DECAY = 0.8  # on everything trainable (report, Table 2)
FEATURE_DROPOUT = 0.9  # of single trunk features (report, Table 2)
CROP_SCALE = 0.8  # smallest area of the random square crop (report, Table 2)
TRAIN_EMBEDDING = False  # true: train the PCA embedding too, loss in vertex space (report: frozen)

VALIDATE_EVERY = 0  # steps; 0: once per epoch-equivalent
SEED = prepare_data.SEED  # governs initialisation, order, crops and dropout
PRECISION = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
COMPILE = False  # true: torch.compile the trunk, which takes minutes first and a compiler; pays on a CPU (README)
OVERWRITE = False  # start anew although RUN_DIR holds this stage's results

# what may differ between a run and its continuation
unimportant = ("DATA_DIR", "RUN_DIR", "CHECKPOINT", "DEVICE", "COMPILE", "OVERWRITE")


# ---- batches ------------------------------------------------------------------------------------


def sample_order(step, batch_size, n_samples, seed):
    """Positions (batch_size,) of the step's samples: every epoch a new permutation of all, batches
    run across its end. Depends on seed and step only, so that a run can continue anywhere."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n_samples
    order = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        shuffled = np.random.default_rng([seed, 1, epoch]).permutation(n_samples)
        order[epochs == epoch] = shuffled[positions[epochs == epoch] % n_samples]
    return order


class Batches:
    """Training batches from RAM on the device, the next one prepared while the current one computes.

    Each is a dict of images (n, 256, 256, 3) uint8, subject (n,), boxes and the sample's targets:
    latents z*, residual r* or, for the loss in vertex space, activity (n, n_vertices).
    """

    def __init__(self, data, pca, images, settings, device, vertex_space):
        self.data, self.settings, self.device = data, settings, device
        self.images = torch.from_numpy(images)
        self.rows = data.samples("train")
        self.vertex_space = vertex_space
        self.latents, self.residual = pca.latents, pca.residual
        pinned = device.type == "cuda"
        shape = (settings.BATCH_SIZE, *images.shape[1:])
        self.buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.stream = torch.cuda.Stream(device) if pinned else None

    def prepare(self, step):
        s = self.settings
        rows = self.rows[sample_order(step, s.BATCH_SIZE, len(self.rows), s.SEED)]
        image, subject = (torch.from_numpy(v[rows]) for v in (self.data.image, self.data.subject))
        boxes = random_boxes(len(rows), s.CROP_SCALE, np.random.default_rng([s.SEED, 2, step]))
        batch = {"subject": subject, **dict(zip(("top", "left", "size"), boxes))}
        if self.vertex_space:
            batch["activity"] = torch.from_numpy(self.data.read_activity(rows))
        else:
            batch |= {"latents": self.latents[rows], "residual": self.residual[rows]}
        if self.stream is None:
            return batch | {"images": self.images[image]}
        torch.index_select(self.images, 0, image, out=self.buffer)
        with torch.cuda.stream(self.stream):
            batch = {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
            batch["images"] = self.buffer.to(self.device, non_blocking=True)
            self.stream.synchronize()  # waits in the loader's thread only; the buffer is free again
        return batch

    def __call__(self, first, last):
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.prepare, first)
            for step in range(first, last):
                batch = coming.result()
                if step + 1 < last:
                    coming = pool.submit(self.prepare, step + 1)
                if self.stream is not None:
                    for tensor in batch.values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield step, batch


# ---- one step -----------------------------------------------------------------------------------


def compile_trunk(trunk, images, precision):
    """torch.compile the trunk in place; its weights keep their names. images as Trunk.forward takes them."""
    trunk.compile()
    try:
        with torch.inference_mode(), autocast(images.device, precision):
            trunk(images)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Problem(f"COMPILE is true, but torch.compile fails here ({reason}); --compile false runs without")


def learning_rate(step, s):
    """Linear warm-up from the minimum, then cosine decay to it."""
    if step < s.WARMUP_STEPS:
        part = step / s.WARMUP_STEPS
    else:
        progress = (step - s.WARMUP_STEPS) / max(1, s.STEPS - s.WARMUP_STEPS)
        part = 0.5 * (1 + math.cos(math.pi * progress))
    return s.MIN_LEARNING_RATE + (s.LEARNING_RATE - s.MIN_LEARNING_RATE) * part


def loss_of(head, z, batch):
    """Mean squared error over samples and vertices; in PCA space (|z - z*|² + r*) / n_vertices."""
    if "activity" in batch:
        return F.mse_loss(head.decode(z), batch["activity"].float())
    squared = (z - batch["latents"].float()).square().sum(1) + batch["residual"]
    return squared.mean() / len(head.embed_bias)


def backward(encoder, crops, batch, precision, scaler, micro_batch):
    """Gradients of the batch's mean loss, accumulated over micro-batches -> the loss, detached."""
    n, total = len(batch["subject"]), 0.0
    for start in range(0, n, micro_batch or n):
        part = {name: v[start : start + (micro_batch or n)] for name, v in batch.items()}
        images = crops(part["images"], part["top"], part["left"], part["size"])
        with autocast(images.device, precision):
            z = encoder(images, part["subject"])
        loss = loss_of(encoder.head, z, part) * (len(z) / n)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


# ---- validation ---------------------------------------------------------------------------------


class Validation:
    """Scores an encoder on one split; its activity is read anew each time, a subject at a time.

    images: (n_images, 256, 256, 3) uint8 in RAM or mapped.
    """

    def __init__(self, data, images, split, batch_size):
        self.data, self.images, self.batch_size = data, images, batch_size
        self.rows = [data.samples(split, s) for s in range(len(data.space.subjects))]

    def batches(self):
        for s, rows in enumerate(self.rows):
            for start in range(0, len(rows), self.batch_size):
                image = self.data.image[rows[start : start + self.batch_size]]
                yield torch.from_numpy(self.images[image]), torch.full((len(image),), s)

    def __call__(self, encoder, crops, precision, name):
        """-> {name_loss, name_r2, name_loss_subj01, name_r2_subj01, …}: mean squared error over all
        vertices of the common space, as in training, and median R² over the existing ones."""
        latents = predict_latents(encoder, crops, self.batches(), precision) if any(map(len, self.rows)) else []
        losses, scores, start = [], [], 0
        for s, rows in enumerate(self.rows):
            z = latents[start : start + len(rows)]
            start += len(rows)
            if not len(rows):
                scores.append(None)
                losses.append(float("nan"))
                continue
            with torch.inference_mode():
                activity = torch.from_numpy(self.data.read_activity(rows)).to(z.device)
                prediction = encoder.head.decode(z)
                parts = list(zip(activity.split(4096, 1), prediction.split(4096, 1)))  # bounds what the sums need
                squared = sum(F.mse_loss(p, a.float(), reduction="sum").item() for a, p in parts)
                losses.append(squared / prediction.numel())
                scores.append(torch.cat([r2_score(a, p) for a, p in parts])[self.data.space.mask[s]])
        subjects, counts = self.data.space.subjects, [len(rows) for rows in self.rows]
        total = sum(loss * n for loss, n in zip(losses, counts) if n)
        result = {f"{name}_loss": total / sum(counts) if sum(counts) else float("nan")}
        result |= median_r2(scores, subjects, f"{name}_r2")
        return result | {f"{name}_loss_{subject}": loss for subject, loss in zip(subjects, losses)}


# ---- the loop -----------------------------------------------------------------------------------


def train(stage, output, encoder, data, pca, settings, made_from):
    """Train what requires gradients; keep the best checkpoint by validation median R².

    stage: name of log, curves and state in RUN_DIR; output: name of the checkpoint; settings: the
    stage's constants; made_from: fingerprints of data, PCA and starting checkpoint.
    """
    s = SimpleNamespace(**settings)
    device, run_dir = choose_device(s.DEVICE), Path(s.RUN_DIR)
    precision = choose_precision(s.PRECISION, device)
    state_path, log_path = run_dir / f"{stage}.state.pt", run_dir / f"{stage}.jsonl"
    important = {k: v for k, v in settings.items() if k not in unimportant}
    made_from["trunk_fingerprint"] = trunk_fingerprint(encoder.trunk)
    inputs = {**important, **made_from, "precision": str(precision)[6:]}

    state = None if s.OVERWRITE else load_state(state_path, run_dir / output, inputs)
    if state and state["step"] == s.STEPS:
        print(f"{run_dir / output} is finished with these inputs; --overwrite true trains it anew")
        return
    encoder.to(device)
    if s.COMPILE:
        size = encoder.trunk.image_size
        compile_trunk(encoder.trunk, torch.zeros(s.MICRO_BATCH or s.BATCH_SIZE, 3, size, size, device=device), precision)
    head = encoder.head
    if s.TRAIN_EMBEDDING:
        head.embed_weight.requires_grad_(True)
        head.embed_bias.requires_grad_(True)
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    # the loss is the same in PCA space as long as the embedding is the PCA's
    is_pca = fingerprint(head.embed_weight, head.embed_bias) == pca.fingerprint
    vertex_space = s.TRAIN_EMBEDDING or not is_pca or head.bias_count != 1
    # fused: one pass over the weights; on a CPU 0.008 of the trunk's forward, else 0.027 (benchmark.py)
    optimizer = torch.optim.AdamW(
        trainable.values(), lr=s.LEARNING_RATE, betas=s.BETAS, weight_decay=s.WEIGHT_DECAY, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    images = data.read_training_images()
    batches = Batches(data, pca, images, s, device, vertex_space)
    validation = Validation(data, images, "val", s.MICRO_BATCH or s.BATCH_SIZE)
    crops = Crops(encoder.trunk, smallest_crop(s.CROP_SCALE), device=device)
    whole = Crops(encoder.trunk, device=device)
    every = s.VALIDATE_EVERY or math.ceil(len(batches.rows) / s.BATCH_SIZE)

    first, best, log, loss_sum, n_losses = 0, -math.inf, [], 0.0, 0
    if state:
        restore(encoder, optimizer, scaler, state)
        first, best, log, loss_sum, n_losses = (state[k] for k in ("step", "best", "log", "loss_sum", "n_losses"))
        print(f"continuing after step {first} of {s.STEPS}")
        state = None  # lets go of its mapped file
    n_trainable = sum(p.numel() for p in trainable.values())
    print(
        f"{n_trainable:,} trainable parameters, head {encoder.n_parameters()[1]:,} in all; {len(batches.rows)} training "
        f"samples, {s.STEPS} steps of {s.BATCH_SIZE}, {str(precision)[6:]} on {device}"
    )

    def save(step):
        with write_whole(state_path) as file:
            torch.save(
                {
                    "format": "training-1", "inputs": inputs, "step": step, "best": best, "log": log,
                    "loss_sum": float(loss_sum), "n_losses": n_losses, "scaler": scaler.state_dict(),
                    "optimizer": optimizer.state_dict() if step < s.STEPS else None,
                    "model": resumable(encoder) if step < s.STEPS else None,
                },
                file,
            )  # fmt: skip

    def validate(step):
        nonlocal best, loss_sum, n_losses
        scores = validation(encoder, whole, precision, "val")
        train_loss = float(loss_sum) / n_losses if n_losses else None
        log.append({"step": step, "train_loss": train_loss, **scores})
        if step == 0:
            log[0] |= {"made_with": inputs, "versions": versions()}
        loss_sum, n_losses = 0.0, 0
        if not math.isfinite(scores["val_loss"]):
            raise not_finite(step, run_dir / output)
        if not scores["val_r2"] <= best:  # NaN, with single pictures, counts as better
            best = scores["val_r2"]
            made_with = {**settings, **inputs}
            save_checkpoint(run_dir / output, encoder, space=data.space, made_with=made_with, scores=scores, step=step)
        write_log(log_path, log)
        plot_curves(log, run_dir / f"{stage}.png", stage)
        save(step)
        tqdm.write(f"step {step}: val loss {scores['val_loss']:.5f}, val median R² {scores['val_r2']:.4f}", file=sys.stdout)

    if not log:
        # head or encoder twice (best and last) with Adam's two moments, and as much again for the new beside the old
        total = sum(p.numel() for p in head.parameters())
        check_disk(run_dir, 2 * 4 * (2 * total + 3 * n_trainable))
        state_path.unlink(missing_ok=True)  # an overwritten run's: it says nothing of the checkpoint to come
        validate(0)
    stop = StopRequest()
    bar = tqdm(total=s.STEPS, initial=first, desc=stage, unit="step")
    with stop, bar:
        clock, n_images = time.perf_counter(), 0
        for step, batch in batches(first, s.STEPS):
            encoder.train()
            torch.manual_seed(int(np.random.default_rng([s.SEED, 3, step]).integers(2**62)))  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            loss = backward(encoder, crops, batch, precision, scaler, s.MICRO_BATCH)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss_sum, n_losses, n_images = loss_sum + loss, n_losses + 1, n_images + len(batch["subject"])
            bar.update()
            step += 1
            if step % 10 == 0 or step == s.STEPS:  # reading the loss waits for the GPU
                if not math.isfinite(loss.item()):
                    raise not_finite(step, run_dir / output)
                rate = n_images / (time.perf_counter() - clock)
                bar.set_postfix_str(f"loss {loss:.5f}, lr {learning_rate(step - 1, s):.1e}, {rate:.0f} images/s")
                clock, n_images = time.perf_counter(), 0
            if step % every == 0 or step == s.STEPS:
                validate(step)
                clock, n_images = time.perf_counter(), 0
            elif stop.signal:
                save(step)
            if stop.signal and step < s.STEPS:
                tqdm.write(stop.message(step), file=sys.stderr)
                raise SystemExit(128 + stop.signal)
    chosen = max(log, key=lambda entry: entry["val_r2"])
    print(f"best at step {chosen['step']}: val median R² {chosen['val_r2']:.4f}")
    print(f"wrote {run_dir / output}, {log_path}, {run_dir / stage}.png")


def resumable(encoder):
    """Trained parameters and batch norm statistics, on the CPU."""
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    state = {k: v for k, v in encoder.state_dict().items() if k not in frozen}
    return {k: v.detach().cpu() for k, v in state.items() if not k.startswith("trunk.") or k in dict(encoder.named_parameters())}


def restore(encoder, optimizer, scaler, state):
    encoder.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])


def load_state(path, output, inputs):
    """The state of an earlier run with the same inputs, None where there is none."""
    if path.exists():
        state = load_torch(path, "training-1", "the state of an interrupted run; --overwrite true starts anew")
        before = state["inputs"]
    elif output.exists():  # killed before its first state, or the state was deleted
        state = None
        made = load_torch(output, "encoder-1", "a checkpoint; --overwrite true starts anew")
        if made["step"] > 0:
            raise Problem(
                f"{output} is there (step {made['step']}) without {path}, which a run needs to continue: choose another "
                "RUN_DIR, or start anew with --overwrite true"
            )
        before = {k: v for k, v in made["made_with"].items() if k not in unimportant}
    else:
        return None
    changed = [k for k in inputs | before if inputs.get(k) != before.get(k)]
    if changed:
        listed = "\n".join(f"  {k}: {before.get(k)} there, {inputs.get(k)} now" for k in changed)
        raise Problem(
            f"{path if state else output} belongs to a run with other inputs:\n{listed}\nset them back to continue "
            "it, choose another RUN_DIR, or start anew with --overwrite true"
        )
    return state


class StopRequest:
    """SIGTERM (pre-emption) and Ctrl-C end the run after the current step; a second one at once."""

    signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def message(self, step):
        return f"stopped by {signal.Signals(self.signal).name} after step {step}, saved; the same command continues"


def not_finite(step, output):
    return Problem(
        f"the loss is not finite at step {step}; {output} keeps the best checkpoint before it. "
        "Lower LEARNING_RATE, or PRECISION float32 if it was float16"
    )


def check_settings(settings):
    """Refuse what cannot work, before anything is read. settings: the stage's constants."""
    s = SimpleNamespace(**settings)
    choose_precision(s.PRECISION, choose_device(s.DEVICE))
    smallest_crop(s.CROP_SCALE)
    check_least(
        settings, BATCH_SIZE=2, STEPS=1, MICRO_BATCH=0, VALIDATE_EVERY=0, WARMUP_STEPS=0, SEED=0, LATENT_DIM=1,
        IMAGE_SIZE=16, LEARNING_RATE=0, MIN_LEARNING_RATE=0, WEIGHT_DECAY=0, FEATURE_DROPOUT=0,
    )  # fmt: skip
    if s.MICRO_BATCH and (s.MICRO_BATCH == 1 or s.BATCH_SIZE % s.MICRO_BATCH):
        raise Problem(f"MICRO_BATCH is {s.MICRO_BATCH}, expected 0 or a divisor of BATCH_SIZE {s.BATCH_SIZE} above 1")
    if s.FEATURE_DROPOUT > 0.999:
        raise Problem(f"FEATURE_DROPOUT is {s.FEATURE_DROPOUT}, expected 0 to 0.999")
    if len(s.BETAS) != 2 or not all(0 <= beta < 1 for beta in s.BETAS):
        raise Problem(f"BETAS is {s.BETAS}, expected two numbers from 0 to below 1, such as 0.9,0.99")


def write_log(path, log):
    with write_whole(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in log).encode())


def read_log(path):
    """The entries of a log that train() wrote, one dict per validation."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def plot_curves(log, path, title):
    """Report, Figure 3: loss on both splits and validation median R² over steps."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    steps = [entry["step"] for entry in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    trained = [entry for entry in log if entry["train_loss"] is not None]
    left.plot([e["step"] for e in trained], [e["train_loss"] for e in trained], label="train")
    left.plot(steps, [e["val_loss"] for e in log], label="validation")
    left.set(xlabel="step", ylabel="mean squared error")
    left.legend()
    right.plot(steps, [e["val_r2"] for e in log], color="C1")
    right.set(xlabel="step", ylabel="validation median R²")
    figure.suptitle(title)
    with write_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def main():
    check_settings(constants(globals()))
    data = prepare_data.load(DATA_DIR)
    pca = fit_pca.load(DATA_DIR, data)
    trunk = Trunk(TRUNK, LAYERS, image_size=IMAGE_SIZE, pretrained=PRETRAINED, seed=SEED)
    torch.manual_seed(SEED)
    pca_dim = pca.components.shape[1]
    head = Head(
        trunk.feature_shapes, LATENT_DIM, pca_dim, len(data.space.subjects), data.space.n_vertices, FEATURE_DROPOUT
    )
    head.set_embedding(pca.components, pca.mean)
    made_from = {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    train("train_head", "head.pt", Encoder(trunk, head), data, pca, constants(globals()), made_from)


if __name__ == "__main__":
    run_script(main, globals())
