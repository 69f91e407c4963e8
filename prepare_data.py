"""Stage 1: the challenge folder -> DATA_DIR with pictures, activity, splits and the common vertex space.

Subjects are mapped to the union of their vertices (missing ones zero); splits are by picture. DATA_DIR gets

    images.npy    (n_images, 256, 256, 3) uint8: training pictures by nsd id, then those that occur in tests only
    activity.npy  (n_samples, n_vertices) float16: one row per subject and training picture
    prepared.pt   samples, splits, vertex space, ROIs, nsd ids, fingerprint; written last

Other sources of data call write_prepared(); all later stages read the result with load().
"""

import dataclasses
import hashlib
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.files import fingerprint, load_torch, lock, save_torch
from core.settings import is_finished, progress, run, versions
from core.space import HEMIS, N_FSAVERAGE, ROI_GROUPS, Space
from model import PICTURE_SIZE, UserError

CHALLENGE_DIR: str = "challenge"  # the organisers' folder with subj01 … subj08, any subset of them
DATA_DIR: str = "data"  # output, read by all later stages
SUBJECTS: str = ""  # names (folders) separated by commas; empty: every subjNN
SPLITS: str = (
    "pictures"  # 85/10/5 % by picture; shared: test on pictures that all saw; authors: theirs (challenge only)
)
SEED: int = 0  # of the splits
OVERWRITE: bool = False  # prepare again even if DATA_DIR is complete

SPLIT_NAMES = ("train", "val", "test")  # "test" is private, not the challenge's
FORMAT = "prepared-3"
CHUNK = 512  # pictures that wait to be written at a time


@dataclasses.dataclass
class Subject:
    """One subject's part of the challenge folder."""

    name: str
    pictures: list  # paths of training pictures, sorted: rows of the activity
    nsd_ids: np.ndarray  # (n_pictures,) int64, counted from 0
    activity: dict  # {hemi: path of (n_pictures, n_vertices) npy}
    vertices: dict  # {hemi: fsaverage indices (n_vertices,)}
    test_pictures: list
    test_nsd_ids: np.ndarray
    rois: dict  # {group: ({label: name}, {hemi: labels (n_vertices,)})}


def read_folder(folder, names=""):
    """[Subject] of a challenge folder; reports the first error of every subject together."""
    folder = Path(folder)
    wanted = sorted(names.replace(",", " ").split())
    wanted = wanted or sorted(p.name for p in folder.glob("subj[0-9][0-9]") if p.is_dir()) or ["subj01"]
    subjects, faults = [], []
    for name in wanted:
        try:
            subjects.append(read_subject(folder / name))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return subjects


def read_subject(folder):
    """One subject's folder -> Subject; shapes, order and names are checked, values are not read."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; CHALLENGE_DIR is the folder that holds subj01 and others.")
    if not re.fullmatch(r"\w[\w.-]*", folder.name) or folder.name in ("all", "group"):
        raise UserError(f"{folder.name!r} cannot name a subject: use letters, digits, _ and -; not all or group.")
    pictures, nsd_ids = list_pictures(folder / "training_split/training_images")
    if not pictures:
        raise UserError(f"{folder}/training_split/training_images has no square PNG or JPEG such as train-0001.png.")
    vertices, activity, rois = {}, {}, {}
    for hemi in HEMIS:
        path = folder / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy"
        mask = read_npy(path, (N_FSAVERAGE,))
        if not np.isin(mask, (0, 1)).all() or not mask.any():
            raise UserError(f"{path} is not a mask of zeros and ones.")
        vertices[hemi] = np.flatnonzero(mask)
        activity[hemi] = folder / f"training_split/training_fmri/{hemi}_training_fmri.npy"
        read_npy(activity[hemi], (len(pictures), len(vertices[hemi])))
    for group in ROI_GROUPS:
        paths = {hemi: folder / f"roi_masks/{hemi}.{group}_challenge_space.npy" for hemi in HEMIS}
        if any(path.exists() for path in paths.values()):
            labels = {hemi: read_npy(path, vertices[hemi].shape).astype(np.int16) for hemi, path in paths.items()}
            rois[group] = read_mapping(folder / f"roi_masks/mapping_{group}.npy"), labels
    test_pictures = list_pictures(folder / "test_split/test_images")
    return Subject(folder.name, pictures, nsd_ids, activity, vertices, *test_pictures, rois)


def list_pictures(folder):
    """Paths in sorted order and their nsd ids (n,) int64, from names such as train-0001_nsd-00013.png.

    Names of a person's own pictures may lack the id: a negative one is made from the file's bytes. The names of NSD's
    shared1000 folder, sharedNNNN_nsdNNNNN.png, count from 1.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg") and p.name[0] != ".")
    ids, numbers = [], []
    for path in paths:
        name = re.fullmatch(r"(train|test|shared)-?(\d+)(?:_nsd-?(\d+))?", path.stem)
        if not name:
            raise UserError(f"{path}: expected a name such as train-0001_nsd-00013.png or train-0001.png.")
        numbers.append(int(name[2]))
        if name[3]:
            ids.append(int(name[3]) - (name[1] == "shared"))
        else:
            ids.append(-1 - int(hashlib.blake2b(path.read_bytes(), digest_size=7).hexdigest(), 16))
    if numbers != sorted(numbers):
        raise UserError(f"{folder}: names do not sort in numerical order: pad the numbers with zeros.")
    if len(set(ids)) < len(ids):
        twice = paths[next(i for i, nsd_id in enumerate(ids) if nsd_id in ids[:i])]
        raise UserError(f"{twice} is a duplicate: keep one picture and average the activity over its repeats.")
    return paths, np.array(ids, np.int64)


def read_npy(path, shape=None):
    """An npy file, memory-mapped, never unpickled. Raises UserError if it is damaged or of another shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a complete npy array ({str(error).splitlines()[0]}).")
    if shape and array.shape != shape:
        raise UserError(f"{path} has shape {array.shape}, expected {shape}.")
    return array


class MappingUnpickler(pickle.Unpickler):
    """Reads a pickled array with a dict in it and nothing else: mapping files are somebody else's pickles."""

    def find_class(self, module, name):
        plain = {"_reconstruct", "scalar"} if module.endswith("core.multiarray") else {"ndarray", "dtype"}
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in plain:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_mapping(path):
    """{label: ROI name} of mapping_NAME.npy, without running what the pickle may hold."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            mapping = MappingUnpickler(file, encoding="latin1").load().item()
        return {int(label): str(name) for label, name in mapping.items()}
    except Exception as error:
        raise UserError(f"{path} is missing or not a dict of ROI names ({error}).")


def check_activity(path):
    """Reject NaN and activity far from z-scores: the median SD must be 1/3 to 3, the median |mean| below 3."""
    activity = np.array(read_npy(path))  # read once
    if activity.dtype.kind != "f" or not np.isfinite(activity).all():
        raise UserError(f"{path} ({activity.dtype}) must hold floats without NaN or infinite values.")
    mean, deviation = (np.median(np.abs(f(activity, 0, np.float32))) for f in (np.mean, np.std))
    if not 1 / 3 <= deviation <= 3 or mean > 3:
        raise UserError(f"{path} is not z-scored: median |mean| {mean:.3g}, median deviation {deviation:.3g}.")


def build_space(subjects):
    """Union of all subjects' vertices -> Space. ROIs are matched by name, as people's mapping files may differ."""
    union = {hemi: np.unique(np.concatenate([s.vertices[hemi] for s in subjects])) for hemi in HEMIS}
    mask = np.array([np.concatenate([np.isin(union[h], s.vertices[h]) for h in HEMIS]) for s in subjects])
    rois = {}
    for group in ROI_GROUPS:
        names, labels = {}, np.zeros(mask.shape, np.int16)
        for i, s in enumerate(subjects):
            if group in s.rois:
                own_names, own = s.rois[group]
                labels[i, mask[i]] = merge_labels(names, own_names, np.concatenate([own[hemi] for hemi in HEMIS]))
        if names:
            rois[group] = {"names": names, "labels": torch.from_numpy(labels)}
    vertices = torch.from_numpy(np.concatenate([union[hemi] for hemi in HEMIS]))
    return Space([s.name for s in subjects], vertices, len(union["lh"]), torch.from_numpy(mask), rois)


def merge_labels(names, own_names, labels):
    """One person's labels (n,), named by own_names, as labels among names, which gets what it lacks."""
    names.setdefault(0, own_names.get(0, "Unknown"))
    merged = np.zeros(labels.shape, np.int16)
    for label, name in own_names.items():
        if label:
            known = {other: number for number, other in names.items() if number}
            number = known.get(name, label if label not in names else max(names) + 1)
            names[number] = name
            merged[labels == label] = number
    return merged


def split_pictures(seen, seed):
    """85/10/5 % by picture. seen (n_pictures, n_subjects) bool -> index into SPLIT_NAMES (n_pictures,), for everybody.

    Dealt out in twentieths within each set of pictures that the same subjects saw: almost exact for every subject.
    """
    n_pictures, n_subjects = seen.shape
    shuffled = np.random.default_rng(seed).permutation(n_pictures)
    order = np.lexsort((shuffled, seen @ (1 << np.arange(n_subjects))))
    twentieths = np.zeros(20, np.int8)
    twentieths[[4, 14]], twentieths[9] = 1, 2
    split = np.empty(n_pictures, np.int8)
    split[order] = np.resize(twentieths, n_pictures)
    return split


def split_shared(seen, seed):
    """Pictures that every subject saw are the test, 10 % of the others validation, the rest training."""
    shared = seen.all(1)
    split = np.zeros(len(seen), np.int8)
    others = np.random.default_rng(seed).permutation(np.flatnonzero(~shared))
    split[others[: round(0.1 * len(others))]] = 1
    split[shared] = 2
    return split


def split_as_authors(name, n):
    """The authors' split of a subject's n training pictures, by row -> index into SPLIT_NAMES (n,).

    It ignores which picture a row shows. Their published weights were trained on it.
    """
    text = repr(("generate_splits", "training-official", name, 2023))
    seed = int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**31
    order = np.random.default_rng(seed).permutation(n)
    split = np.empty(n, np.int8)
    for index, rows in enumerate(np.split(order, [round(0.85 * n), round(0.95 * n)])):
        split[rows] = index
    return split


def activity_blocks(subjects, space):
    """Blocks (n_pictures, n_vertices) of activity.npy, one per subject, missing vertices zero."""
    for i, subject in enumerate(subjects):
        block = np.zeros((len(subject.pictures), space.n_vertices), np.float16)
        for hemi in HEMIS:
            block[:, space.columns(i, hemi)] = read_npy(subject.activity[hemi])
        yield block


def decode_picture(path):
    """A square picture file -> (256, 256, 3) uint8, antialiased bicubic."""
    try:
        with Image.open(path) as picture:
            if picture.width != picture.height:
                raise UserError(f"{path} is {picture.width} x {picture.height} px, expected a square picture.")
            resized = picture.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
        return np.asarray(resized)
    except OSError as error:
        raise UserError(f"{path} is damaged or not a picture ({error}).")


def decode_pictures(paths):
    """Pictures (256, 256, 3) uint8 in order; PIL decodes outside the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK):
            yield from pool.map(decode_picture, paths[start : start + CHUNK])


def write_prepared(
    folder, *, space, samples, nsd_ids, n_training_images, activity, images, splits, made_with, test_activity=None
):
    """Write DATA_DIR. prepared.pt is written last; without it the folder counts as unprepared.

    samples: {"subject", "image", "split" (n_samples,), "test_subject", "test_image" (n_test_samples,)}, see Prepared;
    nsd_ids (n_images,); activity, test_activity: iterables of blocks (n, n_vertices); images: iterable of pictures.
    """
    folder = Path(folder)
    samples = {name: np.asarray(values) for name, values in samples.items()}
    sources = {"activity.npy": (activity, len(samples["subject"]), (space.n_vertices,), np.float16)}
    if test_activity is not None:
        sources["test_activity.npy"] = (test_activity, len(samples["test_subject"]), (space.n_vertices,), np.float16)
    shape = (PICTURE_SIZE, PICTURE_SIZE, 3)
    sources["images.npy"] = (([picture] for picture in images), len(nsd_ids), shape, np.uint8)
    digests = []
    with lock(folder):
        for name, (blocks, n_rows, row_shape, dtype) in sources.items():
            array = np.lib.format.open_memmap(folder / f".{name}.part", "w+", dtype, (n_rows, *row_shape))
            digest, row = hashlib.blake2b(digest_size=8), 0
            for block in progress(blocks, desc=f"writing {name}", total=None):
                block = np.ascontiguousarray(block, dtype)
                array[row : row + len(block)] = block
                digest.update(block)
                row += len(block)
            if row != n_rows:
                raise ValueError(f"{name}: {row} rows, expected {n_rows}")
            array.flush()
            digests.append(digest.hexdigest())
        for name in ("prepared.pt", "test_activity.npy"):
            (folder / name).unlink(missing_ok=True)
        for name in sources:
            (folder / f".{name}.part").replace(folder / name)
        facts = (space.subjects, space.n_lh, space.vertices, space.mask, splits, np.asarray(nsd_ids))
        content = {
            "made_with": made_with, "versions": versions(), "space": vars(space), "splits": splits,
            "samples": {name: torch.from_numpy(values) for name, values in samples.items()},
            "nsd_ids": torch.as_tensor(np.asarray(nsd_ids)), "n_training_images": n_training_images,
            "fingerprint": fingerprint(*digests, *facts, *samples.values()),
        }  # fmt: skip
        save_torch(folder / "prepared.pt", content, FORMAT)
    print(f"wrote {folder}: {len(nsd_ids)} pictures, {len(samples['subject'])} samples")


@dataclasses.dataclass
class Prepared:
    """What prepare_data.py wrote. A sample is one subject seeing one picture."""

    space: Space
    images: np.ndarray  # (n_images, 256, 256, 3) uint8, memory-mapped
    activity: np.ndarray  # (n_samples, n_vertices) float16, memory-mapped
    subject: np.ndarray  # (n_samples,) index into space.subjects
    image: np.ndarray  # (n_samples,) row of images
    split: np.ndarray  # (n_samples,) index into SPLIT_NAMES
    test_subject: np.ndarray  # (n_test_samples,) the challenge's test pictures
    test_image: np.ndarray
    splits: str
    nsd_ids: np.ndarray  # (n_images,) of NSD's 73,000 pictures, counted from 0; negative: a person's own pictures
    n_training_images: int  # the first rows of images
    fingerprint: str
    test_activity: np.ndarray | None = None  # (n_test_samples, n_vertices), of NSD-Flat only

    def samples(self, split, subject=None):
        """Rows of a split, in order; of one subject (an index) or of all."""
        chosen = self.split == SPLIT_NAMES.index(split)
        return np.flatnonzero(chosen if subject is None else chosen & (self.subject == subject))


def load(folder):
    """DATA_DIR -> Prepared, its big arrays memory-mapped."""
    folder = Path(folder)
    content = load_torch(folder / "prepared.pt", FORMAT, "prepare_data.py")
    names = ["images", "activity"] + ["test_activity"] * (folder / "test_activity.npy").exists()
    return Prepared(
        space=Space(**content["space"]), nsd_ids=content["nsd_ids"].numpy(),
        **{name: read_npy(folder / f"{name}.npy") for name in names},
        **{name: values.numpy() for name, values in content["samples"].items()},
        **{name: content[name] for name in ("splits", "n_training_images", "fingerprint")},
    )  # fmt: skip


def assign_splits(names, subject, image):
    """Split (n_samples,) of every sample. names: of the subjects; subject, image (n_samples,): indices, subject by
    subject. Raises UserError for a subject without training or validation pictures."""
    seen = np.zeros((image.max() + 1, len(names)), bool)
    seen[image, subject] = True
    if SPLITS == "authors":
        split = np.concatenate([split_as_authors(name, n) for name, n in zip(names, seen.sum(0))])
    elif SPLITS in ("pictures", "shared"):
        split = (split_pictures if SPLITS == "pictures" else split_shared)(seen, SEED)[image]
    else:
        raise UserError(f"SPLITS is {SPLITS}, expected pictures, shared or authors.")
    print(f"{'subject':10} {'train':>7} {'val':>7} {'test':>7}")
    for s, name in enumerate(names):
        counts = np.bincount(split[subject == s], minlength=3)
        print(f"{name:10} {counts[0]:7} {counts[1]:7} {counts[2]:7}")
        if not counts[:2].all():
            raise UserError(f"{name} has {counts.sum()} training pictures, too few for training and validation.")
    return split


def main():
    made_with = {"SUBJECTS": SUBJECTS, "SPLITS": SPLITS, "SEED": SEED}
    if is_finished(Path(DATA_DIR) / "prepared.pt", FORMAT, made_with, OVERWRITE):
        return
    subjects = read_folder(CHALLENGE_DIR, SUBJECTS)
    for s in progress(subjects, desc="checking activity"):
        for hemi in HEMIS:
            check_activity(s.activity[hemi])
    ids = np.concatenate([s.nsd_ids for s in subjects])
    test_ids = np.concatenate([s.test_nsd_ids for s in subjects])
    space, training_ids = build_space(subjects), np.unique(ids)
    nsd_ids = np.concatenate([training_ids, np.setdiff1d(test_ids, training_ids)])
    order = np.argsort(nsd_ids)
    paths = [path for s in subjects for path in s.pictures] + [path for s in subjects for path in s.test_pictures]
    path_of_id = dict(zip([*ids, *test_ids], paths))
    subject = np.repeat(np.arange(len(subjects)), [len(s.pictures) for s in subjects])
    image = np.searchsorted(training_ids, ids)
    samples = {
        "subject": subject, "image": image, "split": assign_splits(space.subjects, subject, image),
        "test_subject": np.repeat(np.arange(len(subjects)), [len(s.test_pictures) for s in subjects]),
        "test_image": order[np.searchsorted(nsd_ids, test_ids, sorter=order)],
    }  # fmt: skip
    write_prepared(
        DATA_DIR, space=space, samples=samples, nsd_ids=nsd_ids, n_training_images=len(training_ids),
        activity=activity_blocks(subjects, space), images=decode_pictures([path_of_id[i] for i in nsd_ids]),
        splits=SPLITS, made_with=made_with,
    )  # fmt: skip


if __name__ == "__main__":
    run(main, globals())
