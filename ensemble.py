"""What predicts: one checkpoint or several that are averaged, found, loaded, fitted to the data, and asked from Python.

predict.py and evaluate.py predict through it, and so does load_encoder() in a notebook (README).
"""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import prepare_data
from checkpoint import (
    check_made, checkpoint_kind, is_published, load_checkpoint, read_checkpoint, trained_pictures, trunk_fingerprint,
)  # fmt: skip
from common import Problem, choose_device, choose_precision, read_torch
from model import feature_latents, predict_mean
from pictures import to_picture


def choose_checkpoint(path, run_dir):
    """The path given, else the run's finetuned.pt, else its head.pt."""
    finetuned, head = (Path(run_dir) / name for name in ("finetuned.pt", "head.pt"))
    candidates = [Path(path)] if path else [finetuned, head]
    chosen = next((candidate for candidate in candidates if candidate.exists()), None)
    if chosen is None:
        raise Problem(
            f"no checkpoint: {' and '.join(map(str, candidates))} not found. Run python train_head.py --run_dir "
            f"{run_dir}, or name one with --checkpoint"
        )
    if chosen.is_dir():
        inside = sorted(chosen.glob("*.pt"))
        inside = [p for p in inside if not p.name.endswith(".state.pt")] or [chosen / "finetuned.pt"]
        such = " or ".join(map(str, inside[:3]))
        raise Problem(f"{chosen} is a folder, expected a checkpoint's file, such as {such}")
    if not path and chosen == finetuned and head.exists():
        check_pair(finetuned, head, run_dir)
    return chosen


def check_pair(finetuned, head, run_dir):
    """Refuse a run's finetuned.pt that was made from another head.pt than lies there. The authors' files record
    nothing."""
    if any(is_published(read_torch(path, checkpoint_kind)) for path in (finetuned, head)):
        return
    made = read_checkpoint(finetuned)
    if not made["made_with"]["CHECKPOINT"]:  # else it started from another one, whatever lies here
        remedy = f"run python finetune.py --run_dir {run_dir} --overwrite true, or name one with --checkpoint"
        check_made(finetuned, made, remedy, head_fingerprint=read_checkpoint(head)["fingerprint"])


def choose_checkpoints(paths, run_dir):
    """As choose_checkpoint, of several with commas between them: a list."""
    parts = [part.strip() for part in paths.split(",") if part.strip()]
    if Path(paths).exists() or len(parts) < 2:
        parts = [paths]
    return [choose_checkpoint(part, run_dir) for part in parts]


def describe_checkpoint(path, made):
    """Say what predicts."""
    scores = made["scores"]
    known = f"validation median R² {scores['val_r2']:.4f}, " if "val_r2" in scores else ""
    known += f"{scores['val_pictures']}; " if "val_pictures" in scores else ""
    print(f"predicting with {path} (step {made['step']}; {known}fingerprint {made['fingerprint']})")
    if not made["finished"]:
        print(f"{path} is the best so far of a training that has not ended; the same training command continues it")


@dataclasses.dataclass
class Activity:
    """Predicted activity of one subject, or of the group, in z-scores of the challenge's data."""

    lh: np.ndarray  # (n_pictures, n_vertices of the left hemisphere) float32, in the challenge's order
    rh: np.ndarray
    lh_fsaverage: np.ndarray  # (n_vertices of the left hemisphere,) int64: which of fsaverage's 163,842 they are; of
    # a model of NSD-Flat which pixels of its maps
    rh_fsaverage: np.ndarray


class Ensemble:
    """Checkpoints of one vertex space whose predictions are averaged; most often it is one.

    checkpoints: [(path, dict as load_checkpoint gives)]; encoders, those of equal trunks share one.
    """

    def __init__(self, encoders, space, checkpoints, precision):
        self.encoders, self.space, self.checkpoints, self.precision = encoders, space, checkpoints, precision

    def predict(self, images, subjects, *, batch_size=64):
        """images (n, 256, 256, 3) uint8, subjects: indices, None for the group -> see model.predict_mean."""
        return predict_mean(self.encoders, images, subjects, batch_size=batch_size, precision=self.precision)

    def latents(self, images):
        """Of one batch, for decode_mean."""
        return feature_latents(self.encoders, images, batch_size=len(images), precision=self.precision)

    def activity(self, pictures, subjects="all", *, batch_size=64):
        """pictures: one or several paths, PIL pictures or uint8 arrays (height, width, 3), of any sizes; subjects:
        names in a list or with commas, "group", or "all" for everyone and the group -> {name: Activity}."""
        chosen = choose_subjects(subjects, self.space)
        is_one = isinstance(pictures, (str, Path, Image.Image)) or getattr(pictures, "ndim", 4) != 4
        pictures = [pictures] if is_one or not hasattr(pictures, "__iter__") else list(pictures)
        if not pictures:
            raise Problem("no pictures are given, expected one or more")
        with ThreadPoolExecutor() as pool:
            parts = []
            for start in range(0, len(pictures), batch_size):
                images = np.stack(list(pool.map(to_picture, pictures[start : start + batch_size])))
                parts.append(self.predict(images, chosen.values(), batch_size=batch_size))
        found = {}
        for (name, s), *whole in zip(chosen.items(), *parts):
            whole = torch.cat(whole).numpy()
            columns = [self.space.hemisphere(s, hemi).numpy() for hemi in prepare_data.hemis]
            vertices = [self.space.vertices.numpy()[own] for own in columns]
            found[name] = Activity(*(whole[:, own] for own in columns), *vertices)
        return found

    def describe(self):
        for path, made in self.checkpoints:
            describe_checkpoint(path, made)

    def record(self):
        """What predictions.json says of the checkpoints."""
        kept = ("fingerprint", "step", "finished", "scores", "made_with")
        return [{"path": str(path)} | {name: made[name] for name in kept} for path, made in self.checkpoints]

    def fingerprints(self):
        return [made["fingerprint"] for _, made in self.checkpoints]


def load_encoder(checkpoint, device="auto", precision="auto", space=None):
    """What predicts, see Ensemble.activity. checkpoint: a path, or several in a list or with commas: they are averaged.

    space: vertex space of the prepared data, or a function that finds it; only the authors' weights need it, which
    hold none. By default prepare_data.py's DATA_DIR or CHALLENGE_DIR has it.
    """
    if isinstance(checkpoint, (str, Path)):
        paths = choose_checkpoints(str(checkpoint), "") if str(checkpoint) else []
    else:
        paths = [choose_checkpoint(path, "") for path in checkpoint]
    if not paths:
        raise Problem("no checkpoint is given, expected a path such as runs/base/finetuned.pt")
    device = choose_device(device)
    found = [load_checkpoint(path, device, space or find_space) for path in paths]
    encoders, spaces, made = zip(*found)
    for path, other in zip(paths, spaces):
        unlike = unlike_parts(spaces[0], other)
        if unlike:
            raise Problem(
                f"{paths[0]} and {path} differ in their {', '.join(unlike)}, expected checkpoints of one vertex space: "
                "trained on the same prepared data, or on data of the same subjects"
            )
    share_trunks(encoders)
    return Ensemble(list(encoders), spaces[0], list(zip(paths, made)), choose_precision(precision, device))


def load_for(data, paths, device, precision, remedy):
    """-> (Ensemble, data) that fit together; refused where a checkpoint was trained on other data.

    But for people added by adapt.py: such a checkpoint predicts for any prepared data whose subjects it knows, as
    the new person's own. Its subjects and vertices are put in the order of the data; vertices that it does not know
    are left out, and so are, of what is scored, the pictures that it was trained on.
    """
    ensemble = load_encoder(paths, device, precision, data.space)
    is_own = True
    for path, made in ensemble.checkpoints:
        if "adapted" in made["made_with"]:
            now = made["made_with"].get("data_fingerprint", data.fingerprint)
            is_own &= now == data.fingerprint and ensemble.space.begins_with(data.space)
        else:
            check_made(path, made, remedy, data_fingerprint=data.fingerprint)
    return (ensemble, data) if is_own else fit_to_data(ensemble, data)


def fit_to_data(ensemble, data):
    path, space = ensemble.checkpoints[0][0], ensemble.space
    unknown = [name for name in data.space.subjects if name not in space.subjects]
    if unknown or data.space.unit != space.unit:
        raise Problem(
            f"{path} does not know {', '.join(unknown) or data.space.unit}, only {', '.join(space.subjects)} "
            f"({space.unit}): python adapt.py adds a person, or point DATA_DIR to data of these"
        )
    columns = space.find(data.space)
    subjects = [space.subjects.index(name) for name in data.space.subjects]
    if (columns < 0).any():
        print(f"{(columns < 0).sum()} of {len(columns)} vertices are none of {path}: predicted as 0, not scored")
    known = [trained_pictures(made, data.space.subjects) for _, made in ensemble.checkpoints]
    trained = np.unique(np.concatenate([ids for ids, _ in known]))
    fitted = dataclasses.replace(data, trained_nsd_ids=trained, is_known=columns >= 0)
    if not all(is_all for _, is_all in known):
        print(f"{path} does not say which pictures it was trained on: those among the scored ones cannot be left out")
    n_out = sum(len(data.samples(split)) - len(fitted.samples(split)) for split in ("val", "test"))
    if n_out:
        print(f"{n_out} validation and private test samples show pictures that {path} was trained on: not scored")
    encoders = [encoder.rearranged(subjects, columns) for encoder in ensemble.encoders]
    return Ensemble(encoders, data.space, ensemble.checkpoints, ensemble.precision), fitted


def find_space():
    return prepare_data.find_space(prepare_data.DATA_DIR, prepare_data.CHALLENGE_DIR)


def unlike_parts(a, b):
    """Names of what differs between two vertex spaces."""
    parts = {"subjects": a.subjects == b.subjects, "vertices": a.n_lh == b.n_lh and torch.equal(a.vertices, b.vertices)}
    return [name for name, same in parts.items() if not same] or ["masks"] * (not torch.equal(a.mask, b.mask))


def share_trunks(encoders):
    """Let encoders whose trunks are equal have one, which then runs once."""
    known = {}
    for encoder in encoders if len(encoders) > 1 else ():
        trunk = encoder.trunk
        shape = tuple(trunk.settings[name] for name in ("name", "layers", "image_size"))
        encoder.trunk = known.setdefault((shape, trunk_fingerprint(trunk.state_dict())), trunk)


def choose_subjects(names, space):
    """{name: index in space, None for the group}. names: a list, or with commas; "all"."""
    known = dict(zip(space.subjects, range(len(space.subjects)))) | {"group": None}
    parts = re.split(r"[,\s]+", names) if isinstance(names, str) else list(names)
    chosen = list(known) if parts == ["all"] else [part for part in parts if part]
    if not chosen or set(chosen) - set(known):
        raise Problem(f"SUBJECT is {names!r}, expected of this checkpoint's {', '.join(known)}, or all")
    return {name: known[name] for name in chosen}
