"""Training: step, validation, loop and resume of both phases, for one head or many on one trunk, in
one process or many.

At every step the batch, its crops and the trunk's forward pass are made once; then each learner (a head; in
phase 2 with the trunk's attention) takes its own step. A learner among others ends as the same learner alone.

Under torchrun every process takes its share of the pictures through crops, trunk and feature projection; the
projections p of all are gathered (12 MB at batch 512), and from there every process does batch norm, maps and
loss on the whole batch, and its gradients are averaged. The result is that of one process, to rounding.

The loss is the mean squared error over all vertices, computed in PCA space (fit_pca.py): same value, same
gradients, no decoder in the step.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import processes
from batches import Batches, read_pictures
from checkpoint import mark_finished, read_checkpoint, save_checkpoint, trunk_fingerprint
from common import (
    Problem, check_disk, check_least, choose_device, choose_precision, load_torch, progress, say, sole_writer,
    versions, write_whole,
)  # fmt: skip
from model import Crops, autocast, feature_latents, smallest_crop
from scores import median_r2, r2_score

# what may differ between a run and its continuation
unimportant = ("DATA_DIR", "RUN_DIR", "CHECKPOINT", "DEVICE", "PRECISION", "COMPILE", "OVERWRITE", "ALLOW_UNFINISHED")
most_skipped = 100  # steps in a row that loss scaling may skip; it starts too high and needs some twenty
seconds_between_drawings = 10.0  # of a figure, in a run that goes on


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
    """Mean squared error over samples and vertices; in PCA space (|z - z*|² + r*) / n_vertices.

    A head of the first k components counts what is left of z* with r*: the loss stays that over all vertices.
    """
    if "activity" in batch:
        return F.mse_loss(head.decode(z), batch["activity"].float())
    latents = batch["latents"].float()
    squared = (z - latents[:, : z.shape[1]]).square().sum(1) + batch["residual"]
    if latents.shape[1] > z.shape[1]:
        squared = squared + latents[:, z.shape[1] :].square().sum(1)
    return squared.mean() / len(head.embed_bias)


@dataclasses.dataclass
class Progress:
    """How far a learner is; saved and loaded whole."""

    step: int = 0
    best: float = -math.inf  # validation median R² of its checkpoint
    saved: bool = False  # whether the checkpoint under its name is this run's
    log: list = dataclasses.field(default_factory=list)  # one dict a validation
    loss_sum: float = 0.0  # since the last validation
    n_losses: int = 0
    n_skipped: int = 0  # steps in a row that loss scaling skipped
    failed: str = ""  # why it ended early, where others go on


class Learner:
    """One encoder, its optimiser and its progress. In phase 1 several share a trunk; what requires gradients
    of the encoder is trained.

    settings: the stage's constants; name: of the checkpoint below RUN_DIR, log and curves beside it;
    made_from: fingerprints of data, PCA and starting checkpoint.
    """

    def __init__(self, encoder, settings, name, made_from, device, precision):
        self.encoder, self.settings = encoder.to(device), SimpleNamespace(**settings)
        s = self.settings
        self.output = Path(s.RUN_DIR) / name
        self.precision, self.progress = precision, Progress()
        self.replaces = False  # whether a trained checkpoint of an earlier run lies there until this one has a better
        if s.TRAIN_EMBEDDING:
            head = encoder.head  # a copy: on a CPU it is the PCA's own memory, which other heads use
            head.set_embedding(head.embed_weight.detach().clone(), head.embed_bias.detach().clone())
            head.embed_weight.requires_grad_(True)
            head.embed_bias.requires_grad_(True)
        encoder.head.dropout = s.FEATURE_DROPOUT
        important = {k: v for k, v in settings.items() if k not in unimportant}
        self.inputs = {**important, **made_from, "precision": str(precision).removeprefix("torch.")}
        self.inputs["trunk_fingerprint"] = trunk_fingerprint(encoder.trunk_state(), encoder.trunk.stored)
        self.trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        # fused: one pass over the weights (benchmark.py, part step, has the other beside it)
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=s.LEARNING_RATE, betas=s.BETAS, weight_decay=s.WEIGHT_DECAY, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    def active(self, step):
        return not self.progress.failed and step < self.settings.STEPS

    def begin(self, step):
        """Before the batch's first part."""
        self.encoder.train()
        self.loss = 0.0
        if self.scaler.is_enabled():
            self.statistics = [b.clone() for b in self.encoder.head.buffers()]

    def accumulate(self, features, part, step, first, share):
        """Gradients of the mean loss over one part of the batch, share of it; first: place in the batch of this
        process's first sample."""
        head = self.encoder.head
        with autocast(features[0].device, self.precision):
            p = head.project(self.encoder.choose(features), (self.settings.SEED, 3, step), first)
        z = head.encode(head.combine(processes.gather_rows(p)), part["subject"])
        loss = loss_of(head, z, part) * share
        self.scaler.scale(loss).backward()
        self.loss = self.loss + loss.detach()

    def update(self, step):
        """The optimiser's step with the gradients accumulated."""
        processes.average_gradients(self.trainable.values())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        progress.step = step + 1
        if self.scaler.is_enabled() and self.scaler.get_scale() < scale:  # skipped: nothing of it may stay
            for buffer, before in zip(self.encoder.head.buffers(), self.statistics):
                buffer.copy_(before)
            progress.n_skipped += 1
            return
        progress.n_skipped = 0
        progress.loss_sum, progress.n_losses = progress.loss_sum + self.loss, progress.n_losses + 1

    def is_finite(self):
        """Whether the last step was one to go on from."""
        return math.isfinite(self.loss) if not self.progress.n_skipped else self.progress.n_skipped < most_skipped

    def state(self):
        """All that a continuation needs, on the CPU."""
        progress = dataclasses.asdict(self.progress) | {"loss_sum": float(self.progress.loss_sum)}
        state = {"inputs": self.inputs, "progress": progress}
        if self.active(self.progress.step):
            state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            frozen = {name for name, p in self.encoder.named_parameters() if not p.requires_grad}
            kept = {k: v for k, v in self.encoder.state_dict().items() if k not in frozen}  # and batch norm's buffers
            state["model"] = {
                k: v.detach().cpu() for k, v in kept.items() if k in self.trainable or not k.startswith("trunk.")
            }
        return state

    def restore(self, state):
        self.progress = Progress(**state["progress"])
        if "model" in state:
            self.encoder.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])


def train_step(learners, crops, batch, step, micro_batch=0):
    """One optimiser step of every learner on one batch; crops and trunk run once for all.

    Parts of the batch (micro_batch samples a process; 0: all at once) add up their gradients; one learner's
    graph is gone before the next one's begins.
    """
    trunk, precision = learners[0].encoder.trunk, learners[0].precision
    n, n_own = len(batch["subject"]), len(batch["images"])
    at_once, own_at_once = (micro_batch * processes.world_size(), micro_batch) if micro_batch else (n, n_own)
    for learner in learners:
        learner.begin(step)
    for k in range(n // at_once):
        own = slice(k * own_at_once, (k + 1) * own_at_once)  # of this process's pictures
        images = crops(*(batch[name][own] for name in ("images", "top", "left", "size")))
        targets = {k: v for k, v in batch.items() if k not in ("images", "top", "left", "size")}
        part = {name: v[k * at_once : (k + 1) * at_once] for name, v in targets.items()}
        with autocast(images.device, precision):
            features = trunk(images)
        first = k * at_once + processes.rank() * own_at_once
        for learner in learners:
            learner.accumulate(features, part, step, first, at_once / n)
            if (k + 1) * at_once == n:
                learner.update(step)


# ---- validation ---------------------------------------------------------------------------------


class Validation:
    """Scores encoders that share a trunk on one split. The trunk runs once on every picture; the activity is
    read anew each time, a subject at a time. Processes share pictures, then subjects, between them.

    images: (n_images, 256, 256, 3) uint8 in RAM or mapped.
    """

    def __init__(self, data, images, split, batch_size):
        self.data, self.images, self.batch_size = data, images, batch_size
        self.rows = [data.samples(split, s) for s in range(len(data.space.subjects))]
        self.pictures = np.unique(data.image[np.concatenate(self.rows)])  # rows of images
        self.size = data.count_pictures(split)

    def __call__(self, encoders, precision, name):
        """-> for each encoder {name_loss, name_r2, name_loss_subj01, name_r2_subj01, …}: mean squared error over
        all vertices of the common space, as in training, and median R² over the existing ones; name_pictures: how
        many they rest on, in words."""
        start, stop = processes.own_part(len(self.pictures))
        latents = [torch.zeros(0, e.head.shared.shape[1], device=e.head.shared.device) for e in encoders]
        if stop > start:
            images = self.images[self.pictures[start:stop]]
            latents = feature_latents(encoders, images, batch_size=self.batch_size, precision=precision)
        latents = [processes.gather_parts(h, len(self.pictures)) for h in latents]
        own = [s for s in range(len(self.rows)) if s % processes.world_size() == processes.rank()]
        mine = {s: self.score_subject(s, encoders, latents) for s in own if len(self.rows[s])}
        found = {s: scored for part in processes.gather_objects(mine) for s, scored in part.items()}
        return [
            self.summary([found.get(s, {}).get(i) for s in range(len(self.rows))], name) for i in range(len(encoders))
        ]

    @torch.inference_mode()
    def score_subject(self, s, encoders, latents):
        """-> {encoder's place: (mean squared error, R² (n_vertices of the subject,))}."""
        rows = self.rows[s]
        device = latents[0].device
        activity = torch.from_numpy(self.data.read_activity(rows)).to(device)
        where = torch.from_numpy(np.searchsorted(self.pictures, self.data.image[rows])).to(device)
        found = {}
        for i, (encoder, h) in enumerate(zip(encoders, latents)):
            prediction = encoder.decode(h[where], s)
            parts = list(zip(activity.split(4096, 1), prediction.split(4096, 1)))  # bounds what the sums need
            squared = sum(F.mse_loss(p, a.float(), reduction="sum").item() for a, p in parts)
            r2 = torch.cat([r2_score(a, p) for a, p in parts])[self.data.space.mask[s]]
            found[i] = squared / prediction.numel(), r2
        return found

    def summary(self, scored, name):
        """scored: per subject (loss, R²), None without pictures."""
        subjects, counts = self.data.space.subjects, [len(rows) for rows in self.rows]
        losses = [float("nan") if found is None else found[0] for found in scored]
        total = sum(loss * n for loss, n in zip(losses, counts) if n)
        result = {f"{name}_loss": total / sum(counts) if sum(counts) else float("nan")}
        result |= median_r2([None if found is None else found[1] for found in scored], subjects, f"{name}_r2")
        result |= {f"{name}_loss_{subject}": loss for subject, loss in zip(subjects, losses)}
        return result | {f"{name}_pictures": self.size}


# ---- the loop -----------------------------------------------------------------------------------


class Training:
    """The learners of one run on one trunk, and what they share.

    stage: name of the state file in RUN_DIR. settings: the stage's constants, those shared by all learners.
    tolerant: a learner whose loss is not finite is marked failed and told by the caller, as is the end; else it
    ends the run.
    """

    def __init__(self, stage, learners, data, pca, settings, tolerant=False):
        self.stage, self.learners, self.data, self.pca, self.tolerant = stage, learners, data, pca, tolerant
        self.settings = s = SimpleNamespace(**settings)
        self.run_dir = Path(s.RUN_DIR)
        self.state_path = self.run_dir / f"{stage}.state.pt"
        self.encoders = [learner.encoder for learner in learners]
        self.trunk = self.encoders[0].trunk
        self.device, self.precision = self.encoders[0].head.embed_bias.device, learners[0].precision
        self.steps = max(learner.settings.STEPS for learner in learners)
        self.saved_at, self.stop = -1, StopRequest()
        self.drawn_at = time.monotonic()

    def run(self):
        """Train to the end, from where an earlier run with the same inputs stopped."""
        with sole_writer(self.run_dir, f"{self.stage}.py") if processes.is_first() else contextlib.nullcontext():
            self.train()

    def train(self):
        if not self.resume():
            return
        s, step = self.settings, max(learner.progress.step for learner in self.learners)
        if s.COMPILE:
            size = self.trunk.image_size
            n = s.MICRO_BATCH or s.BATCH_SIZE // processes.world_size()
            compile_trunk(self.trunk, torch.zeros(n, 3, size, size, device=self.device), self.precision)
        images = read_pictures(self.data)
        # the loss is the same in PCA space as long as the embedding is the PCA's
        vertex_space = any(not embeds_pca(e.head, self.pca) or s.TRAIN_EMBEDDING for e in self.encoders)
        batches = Batches(self.data, self.pca, images, s, self.device, vertex_space)
        crops = Crops(self.trunk, smallest_crop(s.CROP_SCALE), device=self.device)
        self.validation = Validation(self.data, images, "val", s.MICRO_BATCH or s.BATCH_SIZE)
        self.validate_every = s.VALIDATE_EVERY or math.ceil(len(batches.rows) / s.BATCH_SIZE)
        self.describe(len(batches.rows))
        if not any(learner.progress.log for learner in self.learners):
            self.check_disk()
            self.validate(0)
        self.meter = Meter(self.stage, step, self.steps)
        with self.stop, self.meter:
            for step, batch in batches(step, self.steps):
                active = [learner for learner in self.learners if learner.active(step)]
                if not active:
                    break
                train_step(active, crops, batch, step, s.MICRO_BATCH)
                step += 1
                self.meter.update(len(batch["subject"]))
                if step % 10 == 0 or step == self.steps:  # reading the loss waits for the GPU
                    self.check_losses(active, step)
                if any(self.is_due(learner, step) for learner in active):
                    self.validate(step)
                self.stop.agree()
                if self.stop.signal and step < self.steps:
                    if self.saved_at != step:
                        self.save(step)
                    if processes.is_first():
                        say(self.stop.message(step), file=sys.stderr)
                    processes.barrier()  # torchrun kills the others soon after the first has gone
                    raise SystemExit(128 + self.stop.signal)
        self.conclude()

    def describe(self, n_samples):
        s, n = self.settings, len(self.learners)
        n_trainable = sum(p.numel() for p in self.learners[0].trainable.values())
        together = f", {processes.world_size()} processes" if processes.world_size() > 1 else ""
        print(
            f"{f'{n} heads, the first with ' if n > 1 else ''}{n_trainable:,} trainable parameters, head "
            f"{self.encoders[0].n_parameters()[1]:,} in all; {n_samples} training samples, {self.steps} steps of "
            f"{s.BATCH_SIZE}, {str(self.precision).removeprefix('torch.')} on {self.device}{together}"
        )
        epochs = self.steps * s.BATCH_SIZE / n_samples
        if epochs < 10:
            print(
                f"{self.steps} steps of {s.BATCH_SIZE} are {epochs:.1f} epochs of these samples (report: "
                f"{'40' if self.stage != 'finetune' else '6'}): with little data more steps or a smaller "
                "batch may help (README)"
            )

    def check_disk(self):
        # head or encoder twice (best and last) with Adam's two moments, and as much again for the new beside the old
        need = 0
        for learner in self.learners:
            total = sum(p.numel() for p in learner.encoder.head.parameters())
            need += 2 * 4 * (2 * total + 3 * sum(p.numel() for p in learner.trainable.values()))
        if processes.is_first():
            check_disk(self.run_dir, need)

    def is_due(self, learner, step):
        """Whether a learner is scored after this step, which does not depend on the others."""
        progress = learner.progress
        now = step % self.validate_every == 0 or step == learner.settings.STEPS
        return now and not progress.failed and progress.step == step

    def validate(self, step):
        """Score every learner that is due, keep those that are better than before, save."""
        current = [learner for learner in self.learners if self.is_due(learner, step)]
        found = self.validation([learner.encoder for learner in current], self.precision, "val") if current else []
        for learner, scores in zip(current, found):
            progress = learner.progress
            train_loss = float(progress.loss_sum) / progress.n_losses if progress.n_losses else None
            progress.log.append({"step": step, "train_loss": train_loss, **scores})
            if step == 0:
                progress.log[0] |= {"made_with": learner.inputs, "versions": versions()}
            progress.loss_sum, progress.n_losses = 0.0, 0
            if not math.isfinite(scores["val_loss"]):
                self.fail(learner, step)
                continue
            # an earlier run's result stays until this one has something better to keep than untrained weights
            worth_keeping = step > 0 or not learner.replaces
            if worth_keeping and not scores["val_r2"] <= progress.best:  # NaN, with single pictures, counts as better
                progress.best, progress.saved = scores["val_r2"], True
                self.keep(learner, scores, step)
            if processes.is_first():
                write_log(learner.output, progress.log, draw=self.draws(step))
        if current:
            self.tell(current, step)
        self.save(step)

    def draws(self, step):
        """Whether to draw the curves: at the end, before it not all the time, which takes half a second."""
        if self.tolerant or step < self.steps and time.monotonic() - self.drawn_at < seconds_between_drawings:
            return False
        self.drawn_at = time.monotonic()
        return True

    def keep(self, learner, scores, step):
        if processes.is_first():
            made_with = {**vars(learner.settings), **learner.inputs}
            trained = self.data.nsd_id[self.data.image[self.data.samples("train")]]
            save_checkpoint(
                learner.output, learner.encoder, space=self.data.space, made_with=made_with, scores=scores, step=step,
                trained_nsd_ids=trained,
            )  # fmt: skip

    def tell(self, current, step):
        best = max(current, key=lambda learner: learner.progress.log[-1]["val_r2"])
        scores, n = best.progress.log[-1], len(self.learners)
        text = f"step {step}: {f'best of {n} heads: ' if n > 1 else ''}val loss {scores['val_loss']:.5f}, "
        text += f"val median R² {scores['val_r2']:.4f} ({self.validation.size})"
        say(text + standing_out(scores, self.data.space.subjects))

    def check_losses(self, active, step):
        for learner in active:
            if not learner.is_finite():
                self.fail(learner, step)
        self.meter.describe(float(active[0].loss), learning_rate(step - 1, active[0].settings))

    def fail(self, learner, step):
        problem = not_finite(step, learner.output)
        if not self.tolerant:
            raise problem
        learner.progress.failed = str(problem)
        say(f"{learner.output}: {problem}; the other heads go on")

    def save(self, step):
        self.saved_at = step
        if processes.is_first():
            for learner in self.learners:
                if learner.progress.saved and learner.progress.step == learner.settings.STEPS:
                    mark_finished(learner.output)  # first: a state that says finished is never continued
            content = {"format": state_format, "learners": [learner.state() for learner in self.learners]}
            with write_whole(self.state_path) as file:
                torch.save(content, file)

    def resume(self):
        """Restore an earlier run's learners; -> whether there is anything left to train."""
        states = find_state(self.state_path, self.learners, self.settings.OVERWRITE)
        processes.barrier()
        if states is None:
            for learner in self.learners:
                learner.replaces = is_trained(learner.output)
            return True
        if all(
            s["progress"]["step"] == learner.settings.STEPS or s["progress"]["failed"]
            for s, learner in zip(states, self.learners)
        ):
            for learner, state in zip(self.learners, states):
                learner.progress = Progress(**state["progress"])
            if not self.tolerant:
                names = ", ".join(str(learner.output) for learner in self.learners)
                print(f"{names} is finished with these inputs; --overwrite true trains it anew")
            return False
        for learner, state in zip(self.learners, states):
            learner.restore(state)
            learner.replaces = not learner.progress.saved
        print(f"continuing after step {max(learner.progress.step for learner in self.learners)} of {self.steps}")
        return True

    def conclude(self):
        processes.barrier()
        for learner in [] if self.tolerant else self.learners:
            chosen = max(learner.progress.log, key=lambda entry: entry["val_r2"])
            print(f"best at step {chosen['step']}: val median R² {chosen['val_r2']:.4f} ({self.validation.size})")
            if not chosen["val_r2"] > 0:
                print("which is not above zero: no better than predicting every vertex's mean (README, small data)")
            paths = [learner.output, log_path(learner.output), curves_path(learner.output)]
            print(f"wrote {', '.join(str(path) for path in paths if path.exists())}")


class Meter:
    """The bar: step, loss, learning rate, images/s."""

    def __init__(self, stage, first, steps):
        self.bar = progress(total=steps, initial=first, desc=stage, unit="step", disable=not processes.is_first())
        self.clock, self.n_images = time.perf_counter(), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def update(self, n_images):
        self.n_images += n_images
        self.bar.update()

    def describe(self, loss, rate):
        images = self.n_images / (time.perf_counter() - self.clock)
        self.bar.set_postfix_str(f"loss {loss:.5f}, lr {rate:.1e}, {images:.0f} images/s")
        self.clock, self.n_images = time.perf_counter(), 0


def embeds_pca(head, pca):
    """Whether the head decodes with the first components of this PCA, so that its loss can be taken in their space."""
    k = head.embed_weight.shape[1]
    components, mean = pca.components[:, :k], pca.mean
    device = head.embed_weight.device
    same = head.embed_weight.shape == components.shape and torch.equal(head.embed_weight, components.to(device))
    return same and torch.equal(head.embed_bias, mean.to(device)) and head.bias_count == 1


def standing_out(scores, subjects):
    """Names the subject whose validation loss is far from the others': wrong scaling or broken data show here."""
    losses = np.array([scores[f"val_loss_{subject}"] for subject in subjects])
    known = losses[~np.isnan(losses)]
    if len(known) < 3:
        return ""
    middle = np.median(known)
    worst = int(np.nanargmax(losses))
    if losses[worst] < middle + max(5 * np.median(np.abs(known - middle)), 0.5 * middle):
        return ""
    return f"; {subjects[worst]} stands out with val loss {losses[worst]:.5f}, the subjects' median is {middle:.5f}"


# ---- stop and continue --------------------------------------------------------------------------

state_format = "training-2"


def find_state(path, learners, overwrite):
    """The learners' states of an earlier run with the same inputs; None where there is none, or where OVERWRITE
    gives up what is there: a finished run, or one with other inputs."""
    try:
        states = read_state(path, learners)
    except Problem:
        if not overwrite:
            raise
        return None
    steps = [learner.settings.STEPS for learner in learners]
    if states and overwrite and [s["progress"]["step"] for s in states] == steps:
        return None
    return states


def is_trained(path):
    """Whether the checkpoint of a training lies there, or something that this version does not read."""
    try:
        made = path.exists() and read_checkpoint(path)
        return bool(made) and (made["step"] > 0 or made["finished"])
    except Problem:
        return True


def read_state(path, learners):
    if path.exists():
        hint = "the state of a run of this version; --overwrite true starts anew"
        states = load_torch(path, state_format, hint)["learners"]
        check_same_inputs(path, [state["inputs"] for state in states], learners)
        for state, learner in zip(states, learners):
            if state["progress"]["saved"]:
                check_checkpoint_of(path, learner)
        return states
    for learner in learners:  # killed before its first state, or the state was deleted
        if learner.output.exists():
            made = read_checkpoint(learner.output)
            if made["step"] > 0:
                raise Problem(
                    f"{learner.output} is there (step {made['step']}) without {path}, which a run needs to continue: "
                    "choose another RUN_DIR, or start anew with --overwrite true"
                )
            check_same_inputs(learner.output, [made["made_with"]], [learner])
    return None


def check_checkpoint_of(path, learner):
    """A state is of no use without the best checkpoint that it speaks of."""
    if not learner.output.exists():
        raise Problem(
            f"{path} belongs to a run whose checkpoint {learner.output} is gone: put it back, choose another "
            "RUN_DIR, or start anew with --overwrite true"
        )
    check_same_inputs(learner.output, [read_checkpoint(learner.output)["made_with"]], [learner])


def check_same_inputs(path, before, learners):
    if len(before) != len(learners):
        raise Problem(f"{path} holds {len(before)} heads, expected {len(learners)}; --overwrite true starts anew")
    for there, learner in zip(before, learners):
        now = learner.inputs
        changed = [k for k in now | there if k in now and now[k] != there.get(k)]
        if not changed:
            continue
        listed = "\n".join(f"  {k}: {there.get(k)} there, {now.get(k)} now" for k in changed)
        mend = "with their former values the same command continues it; "
        if changed == ["precision"]:
            arguments = [a for a in sys.argv[1:] if not a.startswith("--precision")]
            command = shlex.join(["python", Path(sys.argv[0]).name, *arguments, "--precision", there["precision"]])
            mend = f"this hardware chose another one; {command} continues it; "
        raise Problem(
            f"{path} belongs to a run with other inputs:\n{listed}\n{mend}or choose another RUN_DIR, or start anew "
            "with --overwrite true"
        )


class StopRequest:
    """SIGTERM (pre-emption) and Ctrl-C end the run after the current step; a second one at once. Under torchrun,
    which passes signals on, all processes end after the same step, and a second one changes nothing."""

    signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal and not processes.launched():
            raise KeyboardInterrupt
        self.signal = number

    def agree(self):
        """Every process learns of a signal that one of them got."""
        self.signal = processes.highest(self.signal)

    def message(self, step):
        return f"stopped by {signal.Signals(self.signal).name} after step {step}, saved; the same command continues"


def not_finite(step, output):
    kept = f"{output} keeps the best checkpoint before it" if output.exists() else "nothing was kept"
    return Problem(
        f"the loss is not finite at step {step}; {kept}. Lower LEARNING_RATE, or PRECISION float32 if it was float16"
    )


def check_settings(settings):
    """Refuse what cannot work, before anything is read. settings: the stage's constants."""
    s = SimpleNamespace(**settings)
    choose_precision(s.PRECISION, choose_device(s.DEVICE))
    smallest_crop(s.CROP_SCALE)
    check_least(
        settings, BATCH_SIZE=2, STEPS=1, MICRO_BATCH=0, VALIDATE_EVERY=0, WARMUP_STEPS=0, SEED=0, LATENT_DIM=1,
        PCA_DIM=0, IMAGE_SIZE=16, LEARNING_RATE=0, MIN_LEARNING_RATE=0, WEIGHT_DECAY=0, FEATURE_DROPOUT=0,
    )  # fmt: skip
    n = processes.world_size()
    if s.BATCH_SIZE % n:
        raise Problem(
            f"BATCH_SIZE is {s.BATCH_SIZE}, which {n} processes do not divide; --nproc_per_node needs a divisor"
        )
    if s.MICRO_BATCH and (s.MICRO_BATCH == 1 or s.BATCH_SIZE % (s.MICRO_BATCH * n)):
        whole = f"BATCH_SIZE {s.BATCH_SIZE}" + (f" over {n} processes" if n > 1 else "")
        raise Problem(f"MICRO_BATCH is {s.MICRO_BATCH}, expected 0 or a divisor of {whole} above 1")
    if s.WARMUP_STEPS >= s.STEPS:
        raise Problem(
            f"WARMUP_STEPS is {s.WARMUP_STEPS} of {s.STEPS} STEPS, expected fewer; the report's share is a twentieth: "
            f"--warmup_steps {s.STEPS // 20}"
        )
    if s.FEATURE_DROPOUT > 0.999:
        raise Problem(f"FEATURE_DROPOUT is {s.FEATURE_DROPOUT}, expected 0 to 0.999")
    if len(s.BETAS) != 2 or not all(0 <= beta < 1 for beta in s.BETAS):
        raise Problem(f"BETAS is {s.BETAS}, expected two numbers from 0 to below 1, such as 0.9,0.99")


# ---- log and curves -----------------------------------------------------------------------------


def log_path(output):
    """Beside the checkpoint: head.pt -> train_head.jsonl, finetuned.pt -> finetune.jsonl, else its own name."""
    output = Path(output)
    return output.with_name({"head": "train_head", "finetuned": "finetune"}.get(output.stem, output.stem) + ".jsonl")


def curves_path(output):
    return log_path(output).with_suffix(".png")


def write_log(output, log, draw=True):
    with write_whole(log_path(output)) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in log).encode())
    if draw:
        plot_curves(log, curves_path(output), log_path(output).stem)


def read_log(path):
    """The entries of a log, one dict per validation."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def curves(log):
    """Report, Figure 3: {"train": (steps, losses), "validation": (steps, losses), "r2": (steps, R²)} of a log."""
    trained = [entry for entry in log if entry["train_loss"] is not None]
    columns = {"train": ("train_loss", trained), "validation": ("val_loss", log), "r2": ("val_r2", log)}
    return {name: ([e["step"] for e in part], [e[key] for e in part]) for name, (key, part) in columns.items()}


def plot_curves(log, path, title):
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    drawn = curves(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(*drawn["train"], label="train")
    left.plot(*drawn["validation"], label="validation")
    left.set(xlabel="step", ylabel="mean squared error")
    left.legend()
    right.plot(*drawn["r2"], color="C1")
    right.set(xlabel="step", ylabel="validation median R²")
    figure.suptitle(title)
    with write_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
