"""Stage 1: the challenge folder -> DATA_DIR with pictures, activity, splits and vertex space.

Maps every subject to the common vertex space (union of the subjects' vertices, missing ones
zero), keeps each picture once at 256 x 256, splits 85/10/5 % by picture. Later stages read the
result with load(). DATA_DIR gets

    images.npy    (n_images, 256, 256, 3) uint8: training pictures by nsd id, then test-only ones
    activity.npy  (n_samples, n_vertices) float16: one row per subject and training picture
    prepared.pt   samples, splits, vertex space, ROIs and fingerprints; written last
"""

import contextlib
import dataclasses
import io
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import (
    Problem, check_disk, check_least, constants, fingerprint, load_torch, run_script, versions, write_whole,
)  # fmt: skip
from model import Space, picture_size

CHALLENGE_DIR = "challenge"  # the organisers' folder with subj01 … subj08, any subset of them
DATA_DIR = "data"  # written here, read by all later stages
SUBJECTS = ""  # names with commas between them, such as subj01,subj05; empty: all that are there
SEED = 0  # governs the splits
WORKERS = 0  # threads that decode pictures; 0: one per core
OVERWRITE = False  # prepare again although DATA_DIR is complete

split_names = ("train", "val", "test")  # 85, 10, 5 %; "test" is private, not the challenge's
roi_groups = ("streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words")
n_fsaverage = 163842  # vertices of one hemisphere
hemis = ("lh", "rh")


# ---- reading the challenge folder ---------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """One subject's part of the challenge folder."""

    name: str
    pictures: list  # paths of training pictures, sorted: row order of the activity
    nsd_ids: np.ndarray  # (n_pictures,)
    activity: dict  # {hemi: path of (n_pictures, n_vertices) npy}
    vertices: dict  # {hemi: fsaverage indices (n_vertices,)}
    test_pictures: list
    test_nsd_ids: np.ndarray
    rois: dict  # {group: ({label: name}, {hemi: labels (n_vertices,)})}


class Findings(list):
    """Everything wrong with a folder, collected so that it can be told at once."""

    @contextlib.contextmanager
    def collect(self):
        try:
            yield
        except Problem as problem:
            self.append(str(problem))

    def refuse(self, what):
        if self:
            shown = self[:40] + [f"… and {len(self) - 40} more"] * (len(self) > 40)
            raise Problem(f"{what}: {len(self)} found\n  " + "\n  ".join(shown))


def read_folder(folder, names):
    """Check the folder, all but the pictures' pixels and the values of the activity.

    names: of subjects, empty for all. -> ([Subject], Findings)
    """
    found = sorted(p.name for p in Path(folder).glob("subj[0-9][0-9]") if p.is_dir())
    wanted = [n for n in re.split(r"[,\s]+", names) if n] or found
    if not wanted or set(wanted) - set(found):
        missing = ", ".join(sorted(set(wanted) - set(found))) or "subjXX"
        raise Problem(
            f"{folder}: no folder {missing}; found {', '.join(found) or 'none'}. Point CHALLENGE_DIR to the "
            "folder that holds subj01 … subj08 as the Algonauts 2023 challenge gives them (README)"
        )
    findings = Findings()
    subjects = [read_subject(Path(folder) / name, findings) for name in sorted(set(wanted))]
    return subjects, findings


def read_subject(folder, findings):
    """One subject's files -> Subject; what is wrong goes to findings."""
    subject = Subject(folder.name, [], np.array([]), {}, {}, [], np.array([]), {})
    train, masks = folder / "training_split", folder / "roi_masks"
    with findings.collect():
        subject.pictures, subject.nsd_ids = read_pictures(train / "training_images", "train", findings)
    for hemi in hemis:
        with findings.collect():
            path = masks / f"{hemi}.all-vertices_fsaverage_space.npy"
            subject.vertices[hemi] = read_mask(path)
        with findings.collect():
            path = train / "training_fmri" / f"{hemi}_training_fmri.npy"
            n_vertices = len(subject.vertices[hemi]) if hemi in subject.vertices else None
            check_activity(path, len(subject.pictures) or None, n_vertices)
            subject.activity[hemi] = path
    if (folder / "test_split" / "test_images").is_dir():
        with findings.collect():
            test = read_pictures(folder / "test_split" / "test_images", "test", findings)
            subject.test_pictures, subject.test_nsd_ids = test
    if len(subject.vertices) == len(hemis):
        for group in roi_groups:
            with findings.collect():
                read_roi(masks, group, subject)
    return subject


def read_pictures(folder, prefix, findings):
    """Paths in sorted order and their nsd ids (n,)."""
    if not folder.is_dir():
        raise Problem(f"{folder} is missing: download this part of the challenge data again")
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not paths:
        raise Problem(f"{folder} holds no pictures, expected {prefix}-0001_nsd-00013.png and so on")
    ids = []
    for path in paths:
        name = re.fullmatch(rf"{prefix}-(\d+)_nsd-(\d+)\.png", path.name)
        if not name:
            findings.append(f"{path}: name not understood, expected {prefix}-0001_nsd-00013.png or the like")
        ids.append(int(name[2]) if name else -1 - len(ids))
    for nsd_id in np.unique(ids)[np.unique(ids, return_counts=True)[1] > 1]:
        twins = [p.name for p, i in zip(paths, ids) if i == nsd_id]
        findings.append(f"{folder}: nsd id {nsd_id} stands {len(twins)} times ({', '.join(twins)}), expected once")
    with ThreadPoolExecutor() as pool:
        findings.extend(fault for fault in pool.map(picture_fault, paths) if fault)
    return paths, np.array(ids)


def picture_fault(path):
    """What is wrong with a PNG as far as its ends show, or None. Reads 45 bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(33)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 12))
            tail = file.read()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return f"{path}: {'empty file' if not head else 'not a PNG'}, expected an RGB PNG; download it again"
    if tail[4:8] != b"IEND" or len(head) < 33:
        return f"{path}: truncated PNG, its end is missing; download it again"
    width, height, bits, colour = (int.from_bytes(head[a:b], "big") for a, b in ((16, 20), (20, 24), (24, 25), (25, 26)))
    if (bits, colour) != (8, 2):
        kinds = {0: "greyscale", 2: "RGB", 3: "palette", 4: "greyscale with alpha", 6: "RGB with alpha"}
        return f"{path}: {bits}-bit {kinds.get(colour, 'unknown colour')} picture, expected 8-bit RGB"
    if width != height or not 16 <= width <= 4096:
        return f"{path}: {width} x {height} px, expected a square of 16 to 4096 px (the challenge's are 425)"


def read_npy(path, mapped=True):
    """An npy file, mapped; never unpickled."""
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise Problem(f"{path} is missing: download this part of the challenge data again")
    except (ValueError, EOFError, OSError) as error:
        raise Problem(f"{path}: not a whole npy array ({str(error).splitlines()[0]}); download it again")


def read_mask(path):
    """fsaverage indices (n_vertices,) of a 0/1 mask."""
    mask = read_npy(path, mapped=False)
    if mask.shape != (n_fsaverage,):
        raise Problem(f"{path}: shape {mask.shape}, expected ({n_fsaverage},)")
    if mask.dtype.kind not in "buif" or not np.isin(mask, (0, 1)).all():
        raise Problem(f"{path}: {mask.dtype} values other than 0 and 1, expected a 0/1 mask")
    if not mask.any():
        raise Problem(f"{path}: empty mask, expected some vertices")
    return np.flatnonzero(mask)


def check_activity(path, n_pictures, n_vertices):
    """The array's header against the pictures and the mask, as far as these are known."""
    activity = read_npy(path)
    if activity.ndim != 2 or activity.dtype.kind != "f":
        raise Problem(f"{path}: {activity.dtype} of shape {activity.shape}, expected float32 (n_images, n_vertices)")
    if n_pictures not in (None, activity.shape[0]):
        raise Problem(f"{path}: {activity.shape[0]} rows, but {n_pictures} training pictures; expected as many")
    if n_vertices not in (None, activity.shape[1]):
        raise Problem(
            f"{path}: {activity.shape[1]} columns, but {n_vertices} vertices in the all-vertices mask; expected as many"
        )


def read_roi(masks, group, subject):
    """Set subject.rois[group], unless the group has no file at all."""
    vertices = subject.vertices
    paths = {hemi: masks / f"{hemi}.{group}_challenge_space.npy" for hemi in hemis}
    mapping = masks / f"mapping_{group}.npy"
    if not any(path.exists() for path in (mapping, *paths.values())):
        return
    names = read_mapping(mapping)
    labels = {hemi: read_npy(path, mapped=False) for hemi, path in paths.items()}
    for hemi, path in paths.items():
        if labels[hemi].shape != (len(vertices[hemi]),) or labels[hemi].dtype.kind not in "buif":
            raise Problem(
                f"{path}: {labels[hemi].dtype} of shape {labels[hemi].shape}, expected integer labels ({len(vertices[hemi])},)"
            )
        nameless = ~np.isin(labels[hemi], [0, *names])
        if nameless.any():
            print(f"{path}: {nameless.sum()} labels have no name in {mapping.name}, taken as {names.get(0, 'none')}")
        labels[hemi] = np.where(nameless, 0, labels[hemi]).astype(np.int16)
    subject.rois[group] = names, labels


class MappingUnpickler(pickle.Unpickler):
    """Reads a pickled array with a dict in it and nothing else: a mapping file is somebody
    else's pickle, and a free one runs whatever code it names."""

    allowed = {
        (module, name): getattr(np._core.multiarray, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    } | {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module, name):
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_mapping(path):
    """{label: ROI name} of mapping_NAME.npy, without running what the pickle may hold."""
    expected = "expected a dict of integers to names such as {0: 'Unknown', 1: 'V1v'}"
    try:
        with open(path, "rb") as file:
            content = file.read(1 << 20)
    except FileNotFoundError:
        raise Problem(f"{path} is missing: download this part of the challenge data again")
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        _, _, dtype = read_header[version[0]](file)
        if dtype != object:
            raise ValueError(f"it holds {dtype}")
        mapping = MappingUnpickler(file, encoding="latin1").load()
        mapping = mapping.item() if isinstance(mapping, np.ndarray) else mapping
    except Exception as error:
        raise Problem(f"{path}: refused, {error}; {expected}")
    whole = isinstance(mapping, dict) and all(
        isinstance(k, (int, np.integer)) and isinstance(v, str) for k, v in mapping.items()
    )
    if not whole:
        raise Problem(f"{path}: {str(mapping)[:80]}; {expected}")
    return {int(label): str(name) for label, name in mapping.items()}


def scan_activity(subjects, findings):
    """Read all activity once: find NaN and infinity, choose how it can be stored.

    -> np.float16 where rounding to it changes no vertex's R² by more than 1e-4 (an error of 1e-7 of
    its variance; z-scored activity: 4e-8), else np.float32.
    """
    worst = 0.0
    total = sum(len(s.pictures) for s in subjects) * len(hemis)
    with tqdm(total=total, desc="checking activity", unit="row", unit_scale=True) as bar:
        for subject in subjects:
            for hemi, path in subject.activity.items():
                activity, bad = read_npy(path), 0
                sums = np.zeros((3, activity.shape[1]))  # of y, y², rounding error²
                for start in range(0, len(activity), 512):
                    y = np.asarray(activity[start : start + 512], dtype=np.float32)
                    bad += int((~np.isfinite(y)).sum())
                    if not bad:
                        with np.errstate(over="ignore"):
                            error = y - y.astype(np.float16)
                        sums += [y.sum(0), np.square(y).sum(0), np.square(error).sum(0)]
                    bar.update(len(y))
                if bad:
                    findings.append(f"{path}: {bad} values are NaN or infinite, expected none; download it again")
                    continue
                variance = sums[1] - sums[0] ** 2 / len(activity)
                varies = variance > 1e-9 * sums[1]
                worst = max(worst, np.max(sums[2][varies] / variance[varies], initial=0))
    return np.float16 if worst < 1e-7 else np.float32


# ---- common vertex space and splits -------------------------------------------------------------


def build_space(subjects):
    """Union of all subjects' vertices -> Space."""
    union = {hemi: np.unique(np.concatenate([s.vertices[hemi] for s in subjects])) for hemi in hemis}
    masks = {hemi: np.array([np.isin(union[hemi], s.vertices[hemi]) for s in subjects]) for hemi in hemis}
    mask = np.concatenate([masks[hemi] for hemi in hemis], axis=1)
    rois = {}
    for group in roi_groups:
        if any(group in s.rois for s in subjects):
            names, labels = {}, np.zeros(mask.shape, np.int16)
            for i, s in enumerate(subjects):
                if group in s.rois:
                    names |= s.rois[group][0]
                    labels[i, mask[i]] = np.concatenate([s.rois[group][1][hemi] for hemi in hemis])
            rois[group] = {"names": names, "labels": torch.from_numpy(labels)}
    vertices = torch.from_numpy(np.concatenate([union[hemi] for hemi in hemis]))
    return Space([s.name for s in subjects], vertices, len(union["lh"]), torch.from_numpy(mask), rois)


def find_space(data_dir, challenge_dir):
    """Space of the prepared data, else of the challenge folder's masks, None where neither is there."""
    if (Path(data_dir) / "prepared.pt").exists():
        return load(data_dir).space
    subjects = []
    for folder in sorted(Path(challenge_dir).glob("subj[0-9][0-9]/roi_masks")):
        vertices = {hemi: read_mask(folder / f"{hemi}.all-vertices_fsaverage_space.npy") for hemi in hemis}
        subjects.append(Subject(folder.parent.name, [], np.array([]), {}, vertices, [], np.array([]), {}))
        for group in roi_groups:
            read_roi(folder, group, subjects[-1])
    return build_space(subjects) if subjects else None


def split_pictures(seen, seed):
    """Split by picture, 85/10/5 %. seen (n_pictures, n_subjects) bool -> index into split_names (n,).

    A picture has one split for everybody. Pictures are shuffled within each set that the same
    subjects saw and dealt out in twentieths, so every subject gets its 85/10/5 % almost exactly.
    """
    n_pictures, n_subjects = seen.shape
    shuffled = np.random.default_rng(seed).permutation(n_pictures)
    order = np.lexsort((shuffled, seen @ (1 << np.arange(n_subjects))))
    twentieths = np.zeros(20, np.int8)
    twentieths[[4, 14]], twentieths[9] = 1, 2
    split = np.empty(n_pictures, np.int8)
    split[order] = np.resize(twentieths, n_pictures)
    return split


# ---- writing and loading ------------------------------------------------------------------------


def write_activity(file, subjects, space, dtype):
    """activity.npy: rows subject by subject, columns in the common space, missing vertices zero."""
    shape = (sum(len(s.pictures) for s in subjects), space.n_vertices)
    write_npy_header(file, shape, dtype)
    with tqdm(total=shape[0], desc="writing activity", unit="row", unit_scale=True) as bar:
        for i, subject in enumerate(subjects):
            sides = [(space.hemisphere(i, hemi).numpy(), read_npy(subject.activity[hemi])) for hemi in hemis]
            for start in range(0, len(subject.pictures), 512):
                rows = slice(start, min(start + 512, len(subject.pictures)))
                out = np.zeros((rows.stop - start, space.n_vertices), dtype)
                for columns, activity in sides:
                    out[:, columns] = activity[rows]
                file.write(out.data)
                bar.update(len(out))


def write_images(file, paths_of_pictures, workers):
    """images.npy. paths_of_pictures: per picture the files that show it, one per subject."""
    write_npy_header(file, (len(paths_of_pictures), picture_size, picture_size, 3), np.uint8)
    findings = Findings()
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,  # PIL decodes outside the GIL
        tqdm(total=len(paths_of_pictures), desc="decoding pictures", unit="picture") as bar,
    ):
        for start in range(0, len(paths_of_pictures), 256):  # bounds what waits to be written
            for picture in pool.map(decode_picture, paths_of_pictures[start : start + 256]):
                if isinstance(picture, str):
                    findings.append(picture)
                else:
                    file.write(picture.data)
                bar.update()
    findings.refuse("problems in the pictures")


def decode_picture(paths):
    """The picture that all the paths show: (256, 256, 3) uint8, or what is wrong with it."""
    first, *others = (path.read_bytes() for path in paths)
    try:
        picture = resize_picture(Image.open(io.BytesIO(first)))
        for path, other in zip(paths[1:], others):
            if other != first and (resize_picture(Image.open(io.BytesIO(other))) != picture).any():
                return f"{path} and {paths[0]} show different pictures under one nsd id, expected the same"
        return picture
    except Exception as error:
        return f"{paths[0]}: damaged picture ({error}); download it again"


def resize_picture(picture):
    """PIL picture, square -> (256, 256, 3) uint8, antialiased bicubic."""
    picture = picture.convert("RGB").resize((picture_size, picture_size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def write_npy_header(file, shape, dtype):
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@dataclasses.dataclass
class Prepared:
    """What prepare_data.py wrote. A sample is one subject seeing one picture."""

    space: Space
    images: np.ndarray  # (n_images, 256, 256, 3) uint8, mapped
    activity: np.ndarray  # (n_samples, n_vertices) float16 or float32, mapped
    subject: np.ndarray  # (n_samples,) int64, index into space.subjects
    image: np.ndarray  # (n_samples,) int64, row of images
    split: np.ndarray  # (n_samples,) int8, index into split_names
    test_subject: np.ndarray  # (n_test_samples,) int64, the challenge's test pictures
    test_image: np.ndarray  # (n_test_samples,) int64
    n_training_images: int  # the first rows of images; the rest occurs in tests only
    fingerprint: str

    def samples(self, split, subject=None):
        """Row numbers of a split, in order; of one subject (an index) or of all."""
        chosen = self.split == split_names.index(split)
        return np.flatnonzero(chosen if subject is None else chosen & (self.subject == subject))

    # read, not mapped: mapped pages would count as memory in use beside what is made of them

    def read_training_images(self):
        """(n_training_images, 256, 256, 3) uint8 in RAM: 13.4 GB at full size."""
        shape = (self.n_training_images, *self.images.shape[1:])
        images = np.fromfile(self.images.filename, np.uint8, int(np.prod(shape)), offset=self.images.offset)
        return images.reshape(shape)

    def read_activity(self, rows):
        """Activity of the samples in rows: (len(rows), n_vertices)."""
        out = np.empty((len(rows), self.space.n_vertices), self.activity.dtype)
        with open(self.activity.filename, "rb") as file:
            for row, into in zip(rows, out):
                file.seek(self.activity.offset + int(row) * into.nbytes)
                file.readinto(into.data)
        return out


def load(folder):
    """DATA_DIR -> Prepared, its big arrays mapped, not read."""
    folder = Path(folder)
    mend = f"python prepare_data.py --data_dir {folder} --overwrite true"
    path = folder / "prepared.pt"
    if not path.exists():
        raise Problem(f"{path} not found: {folder} is not (or not completely) prepared. Run python prepare_data.py --data_dir {folder}")
    content = load_torch(path, "prepared-1", f"what prepare_data.py writes: {mend}")
    for name, expected in content["files"].items():
        found = file_fingerprint(folder / name) if (folder / name).exists() else "no file"
        if found != expected:
            raise Problem(f"{folder / name} is {found}, prepared.pt expects {expected}: files of different runs. {mend}")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "activity")}
    samples = {name: v.numpy() for name, v in content["samples"].items()}
    return Prepared(
        space=Space(**content["space"]), fingerprint=content["fingerprint"],
        n_training_images=content["n_training_images"], **arrays, **samples,
    )  # fmt: skip


def file_fingerprint(path, blocks=256, block=1 << 16):
    """Of the file's size and up to 16 MiB spread evenly over it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        parts = []
        for start in np.unique(np.linspace(0, max(0, size - block), blocks).astype(np.int64)):
            file.seek(start)
            parts.append(file.read(block))
    return fingerprint(size, *parts)


def inputs_fingerprint(subjects, seed):
    """Of names, sizes and dates of the files read, and what else decides the result."""
    paths = [p for s in subjects for p in (*s.pictures, *s.test_pictures, *s.activity.values())]
    facts = [(p.parts[-4:], p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    arrays = [s.vertices[hemi] for s in subjects for hemi in hemis]
    for names, labels in (roi for s in subjects for roi in s.rois.values()):
        facts.append(names)
        arrays.extend(labels.values())
    return fingerprint([s.name for s in subjects], seed, facts, *arrays)


def main():
    check_least(globals(), SEED=0, WORKERS=0)
    data_dir = Path(DATA_DIR)
    subjects, findings = read_folder(CHALLENGE_DIR, SUBJECTS)
    inputs = None if findings else inputs_fingerprint(subjects, SEED)
    if inputs and (data_dir / "prepared.pt").exists() and not OVERWRITE:
        done = load_torch(data_dir / "prepared.pt", "prepared-1", "what prepare_data.py writes")
        load(data_dir)
        if done["inputs"] != inputs:
            raise Problem(
                f"{data_dir} was prepared from other inputs ({done['inputs']}, now {inputs}: {CHALLENGE_DIR}, "
                f"SUBJECTS or SEED changed). --overwrite true prepares it anew; or choose another DATA_DIR"
            )
        print(f"{data_dir} is prepared already from these inputs; --overwrite true prepares it anew")
        return
    dtype = scan_activity(subjects, findings)
    findings.refuse(f"problems in {CHALLENGE_DIR}")

    space = build_space(subjects)
    n_rows = sum(len(s.pictures) for s in subjects)
    training_ids = np.unique(np.concatenate([s.nsd_ids for s in subjects]))
    test_ids = np.unique(np.concatenate([s.test_nsd_ids for s in subjects])).astype(training_ids.dtype)
    image_ids = np.concatenate([training_ids, np.setdiff1d(test_ids, training_ids)])
    row_of_id = {nsd_id: row for row, nsd_id in enumerate(image_ids)}
    paths_of_pictures = [[] for _ in image_ids]
    for s in subjects:
        for path, nsd_id in zip(s.pictures + s.test_pictures, np.concatenate([s.nsd_ids, s.test_nsd_ids])):
            paths_of_pictures[row_of_id[nsd_id]].append(path)

    def image_rows(ids):
        return np.array([row_of_id[i] for i in ids], np.int64)

    seen = np.stack([np.isin(training_ids, s.nsd_ids) for s in subjects], axis=1)
    split_of_image = split_pictures(seen, SEED)
    images = np.concatenate([image_rows(s.nsd_ids) for s in subjects])
    samples = {
        "subject": np.repeat(np.arange(len(subjects)), [len(s.pictures) for s in subjects]),
        "image": images,
        "split": split_of_image[images],
        "test_subject": np.repeat(np.arange(len(subjects)), [len(s.test_pictures) for s in subjects]),
        "test_image": np.concatenate([image_rows(s.test_nsd_ids) for s in subjects]),
    }
    report(subjects, space, samples, seen)
    check_splits(subjects, samples)

    for leftover in data_dir.glob(".*.partial"):  # of a run that was killed
        leftover.unlink()
    check_disk(data_dir, len(image_ids) * picture_size**2 * 3 + n_rows * space.n_vertices * np.dtype(dtype).itemsize)
    with write_whole(data_dir / "images.npy") as image_file, write_whole(data_dir / "activity.npy") as activity_file:
        write_activity(activity_file, subjects, space, dtype)
        write_images(image_file, paths_of_pictures, WORKERS)
        (data_dir / "prepared.pt").unlink(missing_ok=True)  # from here to its return DATA_DIR is unfinished
    files = {name: file_fingerprint(data_dir / name) for name in ("images.npy", "activity.npy")}
    tensors = {name: torch.from_numpy(v) for name, v in samples.items()}
    content = {
        "format": "prepared-1",
        "made_with": constants(globals()),
        "versions": versions(),
        "inputs": inputs,
        "fingerprint": fingerprint(files, space.vertices, space.mask, *samples.values()),
        "files": files,
        "space": vars(space),
        "samples": tensors,
        "n_training_images": len(training_ids),
    }
    with write_whole(data_dir / "prepared.pt") as file:
        torch.save(content, file)
    print(f"wrote {data_dir}: {len(image_ids)} pictures, {n_rows} samples, activity as {np.dtype(dtype).name}")


def report(subjects, space, samples, seen):
    """Per subject: samples per split, vertices present and missing, pictures shared."""
    print(f"{'subject':8} {'train':>6} {'val':>6} {'test':>6} {'vertices':>9} {'missing':>8} {'shared':>7} {'challenge test':>15}")
    for i, s in enumerate(subjects):
        counts = np.bincount(samples["split"][samples["subject"] == i], minlength=3)
        present = int(space.mask[i].sum())
        shared = int((seen[:, i] & (seen.sum(1) > 1)).sum())
        print(
            f"{s.name:8} {counts[0]:6} {counts[1]:6} {counts[2]:6} {present:9} {space.n_vertices - present:8} "
            f"{shared:7} {len(s.test_pictures) or 'no pictures':>15}"
        )


def check_splits(subjects, samples):
    for i, s in enumerate(subjects):
        counts = np.bincount(samples["split"][samples["subject"] == i], minlength=3)
        if not counts[0] or not counts[1]:
            raise Problem(
                f"{s.name}: {len(s.pictures)} training pictures give {counts[0]} for training and {counts[1]} for "
                "validation, expected some of both: 20 pictures or more"
            )


if __name__ == "__main__":
    run_script(main, globals())
