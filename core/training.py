"""Training, for both phases: batches, one step, validation, the loop, and resuming.

One head or many train on one pass of the trunk; each ends bit for bit as it would alone. Under torchrun every process
takes its share of the pictures through crops, trunk and feature projection; these are gathered, so that batch norm and
loss see the whole batch, and gradients are averaged: the result of one process, to rounding.
"""

import contextlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from core import distributed
from core.checkpoint import SOURCE, mark_finished, read_checkpoint, save_checkpoint
from core.files import atomic_write, load_torch, lock, save_torch
from core.scores import median_r2, r2_score
from core.settings import check_same, progress
from model import Crops, UserError, autocast, random_boxes, trunk_outputs

FORMAT = "training-3"
# settings that may differ between a run and its continuation
FREE = ("DATA_DIR", "RUN_DIR", "CHECKPOINT", "DEVICE", "PRECISION", "COMPILE", "OVERWRITE")
STATE = ("made_with", "step", "best", "saved", "log", "failed", "n_losses", "loss_sum")
IMAGE_KEYS = ("images", "top", "left", "size")


def sample_order(step, batch_size, n_samples, seed):
    """Positions (batch_size,) of a step's samples: a new permutation each epoch; batches may span two epochs.

    Depends on seed and step alone, so that a run can continue anywhere.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n_samples)
    orders = {epoch: np.random.default_rng([seed, 1, epoch]).permutation(n_samples) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places)])


class Batches:
    """Training batches from RAM, the next one prepared while the current one computes.

    Each is a dict of this process's images (n_local, 256, 256, 3) uint8 and boxes (top, left, size), and of the whole
    batch's subject (n,) and targets: latents z*, residual r*, or activity (n, n_vertices) for a trained embedding.
    """

    def __init__(self, data, pca, images, settings, device):
        self.data, self.pca, self.settings, self.device = data, pca, settings, device
        self.images, self.rows = torch.from_numpy(images), data.samples("train")
        n, world = settings.BATCH_SIZE, distributed.world_size()
        at_once = settings.MICRO_BATCH * world or n
        self.local = np.arange(n).reshape(-1, world, at_once // world)[:, distributed.rank()].ravel()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare(self, step):
        s = self.settings
        rows = self.rows[sample_order(step, s.BATCH_SIZE, len(self.rows), s.SEED)]
        boxes = random_boxes(len(rows), s.CROP_SCALE, np.random.default_rng([s.SEED, 2, step]))
        batch = {"images": self.images[torch.from_numpy(self.data.image[rows[self.local]])]}
        batch |= {name: box[self.local] for name, box in zip(IMAGE_KEYS[1:], boxes)}
        batch["subject"] = torch.from_numpy(self.data.subject[rows])
        if s.TRAIN_EMBEDDING:
            batch["activity"] = torch.from_numpy(self.data.activity[rows])
        else:
            batch |= {"latents": self.pca.latents[rows], "residual": self.pca.residual[rows]}
        if self.stream is None:
            return batch
        torch.cuda.set_device(self.device)  # a new thread starts on GPU 0
        with torch.cuda.stream(self.stream):
            batch = {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in batch.items()}
            self.stream.synchronize()  # waits in this thread only
        return batch

    def __call__(self, first, last):
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self.prepare, first)
            for step in range(first, last):
                batch = pending.result()
                if step + 1 < last:
                    pending = pool.submit(self.prepare, step + 1)
                for tensor in batch.values() if self.stream else ():
                    tensor.record_stream(torch.cuda.current_stream(self.device))
                yield step, batch


def read_pictures(data):
    """Training pictures (n, 256, 256, 3) uint8, read into RAM; all processes of a machine share one copy."""
    images = np.load(data.images.filename, mmap_mode="c")[: data.n_training_images]
    for start in range(0, len(images), 1024):
        images[start : start + 1024, ::4].sum()  # reads every page in before the first step
    return images


def learning_rate(step, s):
    """Linear warm-up from the minimum, then cosine decay to it (report, Table 2)."""
    decay = 0.5 * (1 + math.cos(math.pi * (step - s.WARMUP_STEPS) / max(1, s.STEPS - s.WARMUP_STEPS)))
    part = step / s.WARMUP_STEPS if step < s.WARMUP_STEPS else decay
    return s.MIN_LEARNING_RATE + (s.LEARNING_RATE - s.MIN_LEARNING_RATE) * part


def loss_of(head, z, batch):
    """Mean squared error over samples and vertices; in PCA space (|z - z*|² + r*) / n_vertices.

    A head of the first k components counts the rest of z* with r*. To train with another loss, change this function.
    """
    if "activity" in batch:
        return F.mse_loss(head.decode(z), batch["activity"].float())
    latents = batch["latents"]
    outside = batch["residual"] + latents[:, z.shape[1] :].square().sum(1)
    return ((z - latents[:, : z.shape[1]]).square().sum(1) + outside).mean() / len(head.embed_bias)


class Learner:
    """Trains the parameters of an encoder that require gradients. settings: the stage's constants; name: of the
    checkpoint in RUN_DIR; made_from: fingerprints of data, PCA and starting checkpoint."""

    def __init__(self, encoder, settings, name, made_from, device, precision):
        self.encoder, self.settings, self.precision = encoder.to(device), SimpleNamespace(**settings), precision
        s = self.settings
        self.output = Path(s.RUN_DIR) / name
        self.log_path = log_path(self.output)
        self.made_with = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in FREE}
        self.made_with |= made_from | {"precision": str(precision).removeprefix("torch.")}
        if s.TRAIN_EMBEDDING:
            for name in ("embed_weight", "embed_bias"):  # copies: other heads share the PCA's memory
                setattr(encoder.head, name, torch.nn.Parameter(getattr(encoder.head, name).detach().clone()))
        encoder.head.dropout = s.FEATURE_DROPOUT
        self.trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        rates = {"lr": s.LEARNING_RATE, "betas": s.BETAS, "weight_decay": s.WEIGHT_DECAY}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), **rates, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.step, self.best, self.saved, self.log, self.failed = 0, -math.inf, False, [], ""
        self.loss_sum, self.n_losses = 0.0, 0

    def active(self):
        return not self.failed and self.step < self.settings.STEPS

    def accumulate(self, features, part, first, share):
        """Gradients of one part of the batch, which is share of it. first: number of the part's first sample."""
        head, device = self.encoder.head, features[0].device
        seed = np.random.default_rng([self.settings.SEED, 3, self.step, first]).integers(2**62)
        generator = torch.Generator(device).manual_seed(int(seed))
        with autocast(device, self.precision):
            p = head.project(self.encoder.choose(features), generator)
        z = head.encode(head.combine(distributed.gather_rows(p)), part["subject"])
        loss = loss_of(head, z, part) * share
        self.scaler.scale(loss).backward()
        self.loss = self.loss + loss.detach()

    def update(self):
        """The optimiser's step. If loss scaling skips the step, batch norm's buffers are restored."""
        distributed.average_gradients(self.trainable.values())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.scaler.get_scale() < scale:
            for buffer, before in zip(self.encoder.head.buffers(), self.buffers):
                buffer.copy_(before)
        else:
            self.loss_sum, self.n_losses = self.loss_sum + self.loss, self.n_losses + 1

    def is_finite(self):
        """Loss scaling starts too high: until the scale is small, a step that it skips is no failure."""
        scale = self.scaler.get_scale()
        return scale > 1e-6 and (math.isfinite(self.loss) or scale > 1)

    def state(self):
        """Everything needed to resume."""
        changing = self.trainable | {f"head.{name}": value for name, value in self.encoder.head.named_buffers()}
        state = {name: getattr(self, name) for name in STATE} | {"loss_sum": float(self.loss_sum), "source": SOURCE}
        state["weights"] = {name: value.detach().cpu() for name, value in changing.items()}
        return state | {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state):
        check_same(self.output.parent, state["made_with"], self.made_with)
        changed = sorted(set(self.state()["weights"]) ^ set(state["weights"]))
        if changed:
            raise UserError(f"the head in model.py has changed since this run began ({', '.join(changed)}).")
        if state["source"] != SOURCE:
            print("note: model.py has changed since this run began")
        for name in STATE[1:]:
            setattr(self, name, state[name])
        self.encoder.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def save(self, path, data, scores, step, finished=False):
        """Write the encoder as a checkpoint."""
        trained = data.nsd_ids[data.image[data.samples("train")]]
        content = dict(scores=scores, step=step, finished=finished, train_nsd_ids=trained)
        save_checkpoint(path, self.encoder, space=data.space, made_with=self.made_with, **content)

    def clear_files(self, overwrite):
        """Remove the checkpoint, log and curves of an earlier run that cannot be continued."""
        if self.output.exists() and not overwrite and read_checkpoint(self.output)["step"]:
            raise UserError(f"{self.output} exists but its training state is missing; --overwrite true starts over.")
        for path in (self.output, self.log_path, self.log_path.with_suffix(".png")):
            path.unlink(missing_ok=True)


def train_step(learners, crops, batch, micro_batch=0):
    """One optimiser step of every learner on one batch; crops and trunk run once for all. micro_batch: samples per
    process at a time (gradient accumulation; batch norm sees the micro-batch); 0: all."""
    encoder, precision = learners[0].encoder, learners[0].precision
    n, n_local = len(batch["subject"]), len(batch["images"])
    local_size = micro_batch or n_local
    size = n * local_size // n_local
    for learner in learners:
        learner.encoder.train()
        buffers = learner.encoder.head.buffers() if learner.scaler.is_enabled() else ()
        learner.loss, learner.buffers = 0.0, [buffer.clone() for buffer in buffers]
    for k in range(n_local // local_size):
        images = crops(*(batch[name][k * local_size : (k + 1) * local_size] for name in IMAGE_KEYS))
        part = {name: v[k * size : (k + 1) * size] for name, v in batch.items() if name not in IMAGE_KEYS}
        with autocast(images.device, precision):
            features = encoder.trunk(images)
        for learner in learners:
            learner.accumulate(features, part, k * size + distributed.rank() * local_size, size / n)
    for learner in learners:
        learner.update()


@torch.inference_mode()
def validate(encoders, data, images, split, batch_size, precision):
    """Score encoders that share a trunk -> per encoder {val_loss, val_r2, val_r2_subj01, …}.

    Mean squared error over the common space as in training, median R² over subjects and their existing vertices.
    Processes share the pictures.
    """
    rows = [data.samples(split, s) for s in range(len(data.space.subjects))]
    pictures = np.unique(data.image[np.concatenate(rows)])
    device = encoders[0].head.embed_bias.device
    local = np.array_split(pictures, distributed.world_size())[distributed.rank()]
    functions = [encoder.eval().latents for encoder in encoders]
    latents = trunk_outputs(encoders[0].trunk, images[local], functions, batch_size, precision)
    latents = [torch.cat(parts).to(device) for parts in zip(*distributed.gather_objects([h.cpu() for h in latents]))]
    losses, r2 = [0.0] * len(encoders), [[] for _ in encoders]
    for s, r in enumerate(rows):
        activity, where = torch.from_numpy(data.activity[r]).to(device), np.searchsorted(pictures, data.image[r])
        for i, (encoder, h) in enumerate(zip(encoders, latents)):
            prediction = encoder.predict(h[where], s)
            losses[i] += float((prediction - activity).square().sum(dtype=torch.float64))
            finite = math.isfinite(losses[i])  # else this head fails, not the others with it
            r2[i].append(r2_score(activity, prediction)[data.space.mask[s]] if finite else [math.nan])
    n, names = sum(map(len, rows)) * data.space.n_vertices, data.space.subjects
    return [{"val_loss": loss / n} | median_r2(scores, names, "val_r2") for loss, scores in zip(losses, r2)]


class Run:
    """The learners of one run on one trunk. stage: names the state file; settings: constants that all learners share.

    A learner whose loss is not finite stops while the others go on; if none is left, the run ends with an error.
    """

    def __init__(self, stage, learners, data, pca, settings):
        self.stage, self.learners, self.data, self.pca = stage, learners, data, pca
        self.settings, self.precision = SimpleNamespace(**settings), learners[0].precision
        self.state_path = Path(self.settings.RUN_DIR) / f"{stage}.state.pt"

    def run(self):
        """Train to the end, from the last validation of an earlier run with the same settings."""
        with lock(self.settings.RUN_DIR) if distributed.rank() == 0 else contextlib.nullcontext():
            self.resume()
            if any(learner.active() for learner in self.learners):
                self.train()
            else:
                print(f"{self.settings.RUN_DIR} is finished; --overwrite true trains again")
            for learner in self.learners if distributed.rank() == 0 else ():
                if learner.saved:
                    mark_finished(learner.output)
                    save_curves(learner.log, learner.log_path.with_suffix(".png"))
                    print(f"{learner.output}: validation median R² {learner.best:.4f}")

    def train(self):
        s, last = self.settings, max(learner.settings.STEPS for learner in self.learners)
        first = max(learner.step for learner in self.learners)  # one that failed stays behind
        head, trunk = self.learners[0].encoder.head, self.learners[0].encoder.trunk
        if s.COMPILE:
            trunk.compile()
        images, device = read_pictures(self.data), head.embed_bias.device
        batches = Batches(self.data, self.pca, images, s, device)
        crops = Crops(trunk, s.CROP_SCALE, device)
        every = s.VALIDATE_EVERY or math.ceil(len(batches.rows) / s.BATCH_SIZE)
        n_trainable = sum(p.numel() for p in self.learners[0].trainable.values())
        print(f"{n_trainable:,} trainable parameters, {len(batches.rows)} samples, {self.precision} on {device}")
        print(f"{f'resuming after step {first}' if first else 'starting'}: {last} steps of {s.BATCH_SIZE}")
        self.clock, self.clock_step = time.perf_counter(), first
        if not self.learners[0].log:
            self.validate(self.learners, images)
        with progress(total=last, initial=first, desc=self.stage, unit="step") as bar:
            for step, batch in batches(first, last):
                active = [learner for learner in self.learners if learner.active()]
                if not active:
                    break
                train_step(active, crops, batch, s.MICRO_BATCH)
                bar.update()
                due = [l for l in active if (step + 1) % every == 0 or l.step == l.settings.STEPS]
                for learner in active if step % 10 == 9 or due else ():  # reading the loss waits for the GPU
                    bar.set_postfix_str(f"loss {float(learner.loss):.5f}", refresh=False)
                    if not learner.is_finite():
                        self.fail(learner)
                if due:
                    self.validate(due, images)

    def validate(self, due, images):
        """Score learners, record those whose scores are finite, save the state."""
        due, s = [learner for learner in due if not learner.failed], self.settings
        options = "val", s.MICRO_BATCH or s.BATCH_SIZE, self.precision
        results = validate([learner.encoder for learner in due], self.data, images, *options) if due else []
        seconds = time.perf_counter() - self.clock
        for learner, scores in zip(due, results):
            if math.isfinite(scores["val_loss"]):
                self.record(learner, scores, seconds)
            else:
                self.fail(learner)
        self.save()
        self.clock, self.clock_step = time.perf_counter(), max(learner.step for learner in self.learners)

    def record(self, learner, scores, seconds):
        """Extend the log; write the checkpoint of a learner that is better than ever before."""
        entry = {"step": learner.step, "learning_rate": learning_rate(max(0, learner.step - 1), learner.settings)}
        entry["train_loss"] = float(learner.loss_sum) / learner.n_losses if learner.n_losses else None
        entry["step_loss"] = float(learner.loss) if learner.step else None
        n_pictures = (learner.step - self.clock_step) * self.settings.BATCH_SIZE
        entry |= {"seconds": round(seconds, 2), "pictures_per_second": round(n_pictures / seconds, 1)}
        learner.log.append(entry | scores)
        learner.loss_sum, learner.n_losses = 0.0, 0
        if not scores["val_r2"] <= learner.best:
            learner.best, learner.saved = scores["val_r2"], True
            if distributed.rank() == 0:
                learner.save(learner.output, self.data, scores, learner.step)
        if distributed.rank() == 0:
            on_log(learner, learner.log[-1])

    def save(self):
        if distributed.rank() == 0:
            save_torch(self.state_path, {"learners": [learner.state() for learner in self.learners]}, FORMAT)

    def fail(self, learner):
        learner.failed = f"the loss is not finite after step {learner.step}: lower LEARNING_RATE."
        if all(each.failed for each in self.learners):
            raise UserError(f"{learner.output}: {learner.failed}")
        print(f"{learner.output}: {learner.failed} The other heads continue.")

    def resume(self):
        """Restore an earlier run with the same settings, or remove its files. All ranks must restore the same step."""
        fresh = self.settings.OVERWRITE or not self.state_path.exists()
        if not fresh:
            states = load_torch(self.state_path, FORMAT, f"{self.stage}.py")["learners"]
            for learner, state in zip(self.learners, states, strict=True):
                learner.restore(state)
                if distributed.rank() == 0:  # without entries later than the state
                    learner.log_path.write_text("".join(json.dumps(entry) + "\n" for entry in learner.log))
        steps = [learner.step for learner in self.learners]
        if any(other != steps for other in distributed.gather_objects(steps)):
            raise UserError(f"the processes restored different steps: all must see the same {self.state_path}.")
        if distributed.rank() == 0 and fresh:
            for learner in self.learners:
                learner.clear_files(self.settings.OVERWRITE)
            self.state_path.unlink(missing_ok=True)


def on_log(learner, entry):
    """Called with every entry of the log: the place to hand them to TensorBoard, W&B or another tracker."""
    with open(learner.log_path, "a") as file:
        file.write(json.dumps(entry) + "\n")
    scores = f"validation loss {entry['val_loss']:.5f}, median R² {entry['val_r2']:.4f}"
    print(f"{learner.output.name} step {entry['step']}: {scores}")


def log_path(output):
    """head.pt -> train_head.jsonl, finetuned.pt -> finetune.jsonl, other checkpoints by their own name."""
    stem = {"head": "train_head", "finetuned": "finetune"}.get(Path(output).stem, Path(output).stem)
    return Path(output).with_name(f"{stem}.jsonl")


def save_curves(log, path):
    """Report, Figure 3: training and validation loss, validation median R²."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, key, label in ((left, "train_loss", "train"), (left, "val_loss", "validation"), (right, "val_r2", None)):
        axis.plot([entry["step"] for entry in log], [entry[key] for entry in log], ".-", label=label)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)  # covers no line
    left.set(xlabel="step", ylabel="mean squared error")
    right.set(xlabel="step", ylabel="validation median R²")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def check_settings(settings):
    """Raises UserError for inconsistent settings."""
    s, world = SimpleNamespace(**settings), distributed.world_size()
    if s.BATCH_SIZE < 2 or s.MICRO_BATCH == 1 or s.BATCH_SIZE % (world * (s.MICRO_BATCH or 1)):
        sizes = f"BATCH_SIZE is {s.BATCH_SIZE}, MICRO_BATCH {s.MICRO_BATCH}, number of processes {world}"
        raise UserError(f"{sizes}: expected equal parts, and at least 2 samples at a time.")
    if not 0 <= s.WARMUP_STEPS < s.STEPS or not 0 <= s.FEATURE_DROPOUT < 1 or not 0 < s.CROP_SCALE <= 1:
        raise UserError("WARMUP_STEPS must be below STEPS, FEATURE_DROPOUT in [0, 1), CROP_SCALE in (0, 1].")
