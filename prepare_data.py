"""Stage 1: the challenge folder -> DATA_DIR with pictures, activity, splits and vertex space.

Maps every subject to the common vertex space (union of the subjects' vertices, missing ones
zero), keeps each picture once at 256 x 256, splits 85/10/5 % by picture. Later stages read the
result with load(). DATA_DIR gets

    images.npy    (n_images, 256, 256, 3) uint8: training pictures by nsd id, then test-only ones
    activity.npy  (n_samples, n_vertices) float16: one row per subject and training picture
    prepared.pt   samples, splits, vertex space, ROIs, nsd ids and fingerprints; written last

Other sources of data call write_prepared() and nothing else differs for the stages that follow.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import (
    Problem, check_disk, check_least, constants, differences, fingerprint, is_subject_name, load_torch, progress,
    run_script, say, sole_writer, versions, write_whole,
)  # fmt: skip
from model import Space, picture_size
from scores import count_pictures

CHALLENGE_DIR = "challenge"  # the organisers' folder with subj01 … subj08, any subset of them
DATA_DIR = "data"  # written here, read by all later stages
SUBJECTS = ""  # names of folders with commas between them; empty: all named subjNN that are there
SPLITS = "pictures"  # by picture, the same for all who saw it; authors: theirs, to score their weights (README)
SEED = 0  # governs the splits by picture
ACTIVITY_LIMIT = 3.0  # z; activity with typical mean or deviation above it, or deviation below 1/3, is refused
WORKERS = 0  # threads that decode pictures; 0: one per core
OVERWRITE = False  # prepare again although DATA_DIR is complete

split_names = ("train", "val", "test")  # 85, 10, 5 %; "test" is private, not the challenge's
usual_mean, usual_deviation = 0.1, (0.4, 1.2)  # of z-scores averaged over repeats, with room; others are told
roi_groups = ("streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words")
n_fsaverage = 163842  # vertices of one hemisphere
hemis = ("lh", "rh")


# ---- reading the challenge folder ---------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """One subject's part of the challenge folder."""

    name: str
    pictures: list = dataclasses.field(default_factory=list)  # paths of training pictures, sorted: rows of the activity
    nsd_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], np.int64))  # (n_pictures,)
    activity: dict = dataclasses.field(default_factory=dict)  # {hemi: path of (n_pictures, n_vertices) npy}
    vertices: dict = dataclasses.field(default_factory=dict)  # {hemi: fsaverage indices (n_vertices,)}
    test_pictures: list = dataclasses.field(default_factory=list)
    test_nsd_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], np.int64))
    rois: dict = dataclasses.field(default_factory=dict)  # {group: ({label: name}, {hemi: labels (n_vertices,)})}
    picture_stamp: str = ""  # fingerprint of names, sizes and ends of all its pictures

    def read_activity(self):
        """Activity of the training pictures: (n_pictures, n_vertices of the subject) float32, left hemisphere first."""
        return np.concatenate([read_npy(self.activity[hemi]) for hemi in hemis], axis=1, dtype=np.float32)


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


def find_subjects(folder, names):
    """Names of the subjects' folders that are wanted, sorted, and of those that are there.

    names: with commas between them; empty: all subjNN.
    """
    folders = sorted(p.name for p in Path(folder).glob("[!.]*") if p.is_dir())
    wanted = sorted({name for name in re.split(r"[,\s]+", names) if name})
    for name in wanted:
        if not is_subject_name(name):
            raise Problem(
                f"SUBJECTS names {name!r}, expected folders' names of letters, digits and _.-, but not all or group"
            )
    return wanted or [name for name in folders if re.fullmatch(r"subj\d\d", name)], folders


def read_folder(folder, names):
    """Check the folder, all but the pictures' pixels and the values of the activity.

    names: of subjects, empty for all subjNN. -> ([Subject], Findings)
    """
    wanted, found = find_subjects(folder, names)
    if not wanted or set(wanted) - set(found):
        missing = ", ".join(sorted(set(wanted) - set(found))) or "subjXX"
        raise Problem(
            f"{folder}: no folder {missing}; found {', '.join(found) or 'none'}. Point CHALLENGE_DIR to the "
            "folder that holds subj01 … subj08 as the Algonauts 2023 challenge gives them (README)"
        )
    left_out = [name for name in found if name not in wanted]
    if left_out and not names.strip():
        print(f"{folder}: left out {', '.join(left_out)}, not named subj01, subj02 …; SUBJECTS takes other names too")
    findings = Findings()
    return [read_subject(Path(folder) / name, findings) for name in wanted], findings


def read_subject(folder, findings):
    """One subject's files, in a folder of any name -> Subject; what is wrong goes to findings."""
    folder = Path(folder)
    subject = Subject(folder.name)
    train, test, masks = folder / "training_split", folder / "test_split", folder / "roi_masks"
    stamps = []
    with findings.collect():
        subject.pictures, subject.nsd_ids, stamp = read_pictures(train / "training_images", "train", findings)
        stamps.append(stamp)
    for hemi in hemis:
        with findings.collect():
            path = masks / f"{hemi}.all-vertices_fsaverage_space.npy"
            subject.vertices[hemi] = read_mask(path)
        with findings.collect():
            path = train / "training_fmri" / f"{hemi}_training_fmri.npy"
            n_vertices = len(subject.vertices[hemi]) if hemi in subject.vertices else None
            check_activity(path, len(subject.pictures) or None, n_vertices)
            subject.activity[hemi] = path
    if (test / "test_images").is_dir():
        with findings.collect():
            subject.test_pictures, subject.test_nsd_ids, stamp = read_pictures(test / "test_images", "test", findings)
            stamps.append(stamp)
    if len(subject.vertices) == len(hemis):
        for group in roi_groups:
            with findings.collect():
                read_roi(masks, group, subject)
    subject.picture_stamp = fingerprint(stamps)
    return subject


def read_pictures(folder, prefix, findings):
    """Paths in sorted order, their nsd ids (n,), and the fingerprint of their names and stamps."""
    if not folder.is_dir():
        raise Problem(f"{folder} is missing: download this part of the challenge data again")
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not paths:
        raise Problem(f"{folder} holds no pictures, expected {prefix}-0001_nsd-00013.png and so on")
    names = [re.fullmatch(rf"{prefix}-(\d+)_nsd-(\d+)\.png", path.name) for path in paths]
    for path, name in zip(paths, names):
        if not name:
            findings.append(f"{path}: name not understood, expected {prefix}-0001_nsd-00013.png or the like")
    ids = [int(name[2]) if name else -1 - i for i, name in enumerate(names)]
    numbers = [int(name[1]) for name in names if name]
    if numbers != sorted(numbers):
        findings.append(
            f"{folder}: sorted by name, as the rows of the activity are, the pictures are not in the order of their "
            f"numbers: pad these with zeros, as in {prefix}-0002 before {prefix}-0010"
        )
    for nsd_id in np.unique(ids)[np.unique(ids, return_counts=True)[1] > 1]:
        twins = [p.name for p, i in zip(paths, ids) if i == nsd_id]
        findings.append(f"{folder}: nsd id {nsd_id} stands {len(twins)} times ({', '.join(twins)}), expected once")
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(read_ends, paths))
    findings.extend(end for end in ends if isinstance(end, str))
    stamp = fingerprint([path.name for path in paths], *ends)
    return paths, np.array(ids, np.int64), stamp


def read_ends(path):
    """A PNG's size and both its ends as bytes, or what is wrong with it as far as they show.

    75,000 pictures cannot be read whole at every start, and need not be: a PNG ends with a checksum
    of all its pixels (the Adler-32 that closes its zlib stream, before the last CRC and IEND), so that
    a corrected picture has another end, whatever its size and date. One that no longer fits its own
    checksum is found when it is decoded.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(33)
            file.seek(max(0, size - 64))
            tail = file.read()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return f"{path}: {'empty file' if not head else 'not a PNG'}, expected an RGB PNG; download it again"
    if tail[-8:-4] != b"IEND" or len(head) < 33:
        return f"{path}: truncated PNG, its end is missing; download it again"
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    bits, colour = head[24], head[25]
    if (bits, colour) != (8, 2):
        kind = {0: "greyscale", 2: "RGB", 3: "palette", 4: "greyscale with alpha", 6: "RGB with alpha"}
        return f"{path}: {bits}-bit {kind.get(colour, 'unknown colour')} picture, expected 8-bit RGB"
    if width != height or not 16 <= width <= 4096:
        return f"{path}: {width} x {height} px, expected a square of 16 to 4096 px (the challenge's are 425)"
    return size.to_bytes(8, "big") + head + tail


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
    if n_pictures not in (None, activity.shape[0]) or not len(activity):
        raise Problem(f"{path}: {activity.shape[0]} rows, but {n_pictures or 'no'} training pictures; expected as many")
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
                f"{path}: {labels[hemi].dtype} of shape {labels[hemi].shape}, expected integer labels "
                f"({len(vertices[hemi])},)"
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
    except MemoryError:
        raise
    except Exception as error:
        raise Problem(f"{path}: refused, {error}; {expected}")
    if not isinstance(mapping, dict) or not all(
        isinstance(label, (int, np.integer)) and isinstance(name, str) for label, name in mapping.items()
    ):
        raise Problem(f"{path}: {str(mapping)[:80]}; {expected}")
    return {int(label): str(name) for label, name in mapping.items()}


def scan_activity(subjects, findings, limit=None):
    """Read all activity once: find NaN, infinity and what is not z-scored, choose how it can be stored.

    limit: z, as ACTIVITY_LIMIT, which it is unless given.

    -> np.float16 where rounding to it changes no vertex's R² by more than 1e-4 (an error of 1e-7 of
    its variance; z-scored activity: 4e-8), else np.float32; {path: fingerprint of its values}.
    """
    worst, fingerprints = 0.0, {}
    n_rows = sum(len(s.pictures) for s in subjects) * len(hemis)
    with progress(total=n_rows, desc="checking activity", unit="row", unit_scale=True) as bar:
        for subject in subjects:
            for hemi, path in subject.activity.items():
                n, n_bad, digest = 0, 0, hashlib.blake2b()
                first, is_constant, sums = None, True, 0.0  # of y, y², rounding error² (3, n_vertices)
                for block in activity_blocks(path, digest):
                    y = np.asarray(block, dtype=np.float32)
                    first = y[0] if first is None else first
                    n_bad += int((~np.isfinite(y)).sum())
                    if not n_bad:
                        with np.errstate(over="ignore"):
                            error = y - y.astype(np.float16)
                        sums += np.array([y.sum(0), np.square(y).sum(0), np.square(error).sum(0)], np.float64)
                        is_constant &= (y == first).all(0)
                    n += len(y)
                    bar.update(len(y))
                fingerprints[path] = digest.hexdigest()[:16]
                if n_bad:
                    findings.append(f"{path}: {n_bad} values are NaN or infinite, expected none; download it again")
                    continue
                variance = sums[1] - sums[0] ** 2 / n
                varies = variance > 1e-9 * sums[1]
                worst = max(worst, np.max(sums[2][varies] / variance[varies], initial=0))
                with findings.collect():
                    deviation = np.sqrt(np.maximum(variance, 0) / n)
                    deviation = np.where(is_constant, 0, deviation)
                    check_scale(f"{subject.name} {hemi}", path, n, sums[0] / n, deviation, limit or ACTIVITY_LIMIT)
    return np.float16 if worst < 1e-7 else np.float32, fingerprints


def activity_blocks(path, digest):
    """Blocks (n, n_vertices) of the activity's rows as stored; digest, of hashlib, takes their bytes."""
    activity = read_npy(path)
    for start in range(0, len(activity), 512):
        block = np.ascontiguousarray(activity[start : start + 512])
        digest.update(block.data)
        yield block


def check_scale(whose, path, n_pictures, mean, deviation, limit):
    """Tell activity that does not look z-scored, refuse what is far from it. mean, deviation (n_vertices,)."""

    def tell(text, vertices):
        columns = [*np.flatnonzero(vertices)]
        if columns:
            some = ", ".join(map(str, columns[:5])) + " …" * (len(columns) > 5)
            say(f"{whose}: {len(columns)} vertices {text} (columns {some})")

    center, spread = np.median(np.abs(mean)), np.median(deviation)  # of single vertices some may be odd
    found = f"mean {center:.3g} away from 0, deviation {spread:.3g} (medians over vertices)"
    expected = "expected about 0 and 0.6 to 1: responses z-scored in every session, averaged over repeats"
    if not (center <= limit and 1 / limit <= spread <= limit):
        raise Problem(f"{path}: {found}, {expected}; z-score it, or raise ACTIVITY_LIMIT ({limit:g})")
    if center > usual_mean + n_pictures**-0.5 or not usual_deviation[0] <= spread <= usual_deviation[1]:
        say(f"{whose}: {found}, {expected}")
    tell("are constant, which nothing predicts", deviation == 0)
    is_odd = (np.abs(mean) > limit) | (deviation > limit)
    tell(f"have a mean or deviation above {limit:g}", is_odd)


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
                    own_names, own = s.rois[group]
                    labels[i, mask[i]] = merge_areas(names, own_names, np.concatenate([own[hemi] for hemi in hemis]))
            rois[group] = {"names": names, "labels": torch.from_numpy(labels)}
    vertices = torch.from_numpy(np.concatenate([union[hemi] for hemi in hemis]))
    return Space([s.name for s in subjects], vertices, len(union["lh"]), torch.from_numpy(mask), rois)


def merge_areas(names, own_names, labels):
    """labels (n,) of one person, whose areas are own_names {label: name} -> labels (n,) int16 among names, which gets
    what it lacks. Areas are told by their names: a label stays, as the challenge's people's do, unless it is another
    area's, as own mapping files may count otherwise."""
    names.setdefault(0, own_names.get(0, "Unknown"))  # no area, whatever it is called
    merged = np.zeros(labels.shape, np.int16)
    for label, name in own_names.items():
        if label:
            there = [known for known in names if known and names[known] == name]
            number = there[0] if there else label if label not in names else max(names) + 1
            names[number] = name
            merged[labels == label] = number
    return merged


def find_space(data_dir, challenge_dir):
    """Space of the prepared data, else of the masks of the challenge's own people, None where neither is there: for
    the authors' weights, which hold none."""
    if (Path(data_dir) / "prepared.pt").exists():
        return load(data_dir).space
    subjects = []
    for folder in sorted(Path(challenge_dir).glob("subj0[1-8]/roi_masks")):
        vertices = {hemi: read_mask(folder / f"{hemi}.all-vertices_fsaverage_space.npy") for hemi in hemis}
        subjects.append(Subject(folder.parent.name, vertices=vertices))
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


def split_as_authors(name, n):
    """The authors' split of a subject's n training pictures, by row -> index into split_names (n,).

    Theirs goes by each subject's own rows, so that a picture may be trained on for one subject and
    validated with for another. It is what their published weights were trained on.
    """
    text = repr(("generate_splits", "training-official", name, 2023))
    seed = int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 2**31
    order = np.random.default_rng(seed).permutation(n)
    split = np.empty(n, np.int8)
    for index, rows in enumerate(np.split(order, [round(0.85 * n), round(0.95 * n)])):
        split[rows] = index
    return split


# ---- writing and loading ------------------------------------------------------------------------


def common_activity(subjects, space, dtype):
    """Blocks (n, n_vertices) of activity.npy: rows subject by subject, columns in the common space, missing zero."""
    n_rows = sum(len(s.pictures) for s in subjects)
    with progress(total=n_rows, desc="writing activity", unit="row", unit_scale=True) as bar:
        for i, subject in enumerate(subjects):
            sides = [(space.hemisphere(i, hemi).numpy(), read_npy(subject.activity[hemi])) for hemi in hemis]
            for start in range(0, len(subject.pictures), 512):
                rows = slice(start, min(start + 512, len(subject.pictures)))
                block = np.zeros((rows.stop - start, space.n_vertices), dtype)
                for columns, activity in sides:
                    block[:, columns] = activity[rows]
                yield block
                bar.update(len(block))


def decode_pictures(paths_of_pictures, workers=0):
    """Pictures (256, 256, 3) uint8 in order; refuses all damaged ones together, at the end.

    paths_of_pictures: per picture the files that show it, one per subject. workers: 0: one per core.
    """
    findings = Findings()
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,  # PIL decodes outside the GIL
        progress(total=len(paths_of_pictures), desc="decoding pictures", unit="picture") as bar,
    ):
        for start in range(0, len(paths_of_pictures), 256):  # bounds what waits to be written
            for picture in pool.map(decode_picture, paths_of_pictures[start : start + 256]):
                if isinstance(picture, str):
                    findings.append(picture)
                else:
                    yield picture
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
    except MemoryError:
        raise
    except Exception as error:
        return f"{paths[0]}: damaged picture ({error}); download it again"


def resize_picture(picture):
    """PIL picture, square -> (256, 256, 3) uint8, antialiased bicubic."""
    picture = picture.convert("RGB").resize((picture_size, picture_size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def write_npy_header(file, shape, dtype):
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_prepared(
    data_dir, *, space, samples, splits, nsd_id, n_training_images, dtype, activity, images, inputs, made_with, script,
    test_activity=None,
):  # fmt: skip
    """Write DATA_DIR as load() reads it: whole or not at all, by one process, old data kept until the end.

    space: Space. samples: {"subject", "image", "split" (n_samples,), "test_subject", "test_image"
    (n_test_samples,)}, as in Prepared. splits: "pictures", or how else they were made. nsd_id
    (n_images,). activity: blocks (n, n_vertices) of n_samples rows together, stored as dtype; images:
    n_images pictures (256, 256, 3) uint8. Both are taken one by one, so that memory does not grow with
    them; test_activity likewise, of the n_test_samples, where it comes with the data. inputs: {name:
    value} of all that decides the result; made_with: the constants of the script, whose name is script.
    """
    data_dir = Path(data_dir)
    n_samples, n_images, dtype = len(samples["subject"]), len(nsd_id), np.dtype(dtype)
    with sole_writer(data_dir, script) as is_sole:
        if is_sole:
            for leftover in data_dir.glob(".*.partial"):  # of a run that was killed
                leftover.unlink()
        arrays = {"activity.npy": (activity, n_samples)}
        if test_activity is not None:
            arrays["test_activity.npy"] = (test_activity, len(samples["test_subject"]))
        n_rows = sum(n for _, n in arrays.values())
        check_disk(data_dir, n_images * picture_size**2 * 3 + n_rows * space.n_vertices * dtype.itemsize)
        digests = {name: hashlib.blake2b() for name in (*arrays, "images.npy")}
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(write_whole(data_dir / name, digests[name])) for name in digests}
            for name, (blocks, n) in arrays.items():
                write_array(files[name], blocks, (n, space.n_vertices), dtype)
            pictures = (picture[None] for picture in images)
            write_array(files["images.npy"], pictures, (n_images, picture_size, picture_size, 3), np.dtype(np.uint8))
            (data_dir / "prepared.pt").unlink(missing_ok=True)  # from here to its return DATA_DIR is unfinished
        for stale in {"test_activity.npy"} - arrays.keys():  # of other data before
            (data_dir / stale).unlink(missing_ok=True)
        nsd_id = np.asarray(nsd_id, np.int64)
        facts = (space.subjects, space.n_lh, space.vertices, space.mask, splits, nsd_id)
        content = {
            "format": "prepared-2",
            "script": script,
            "made_with": made_with,
            "versions": versions(),
            "inputs": inputs,
            # of every byte: one corrected picture makes PCAs and checkpoints of before refused
            "fingerprint": fingerprint(*(d.hexdigest() for d in digests.values()), *facts, *samples.values()),
            "files": {name: sample_fingerprint(data_dir / name) for name in digests},
            "space": vars(space),
            "samples": {name: torch.from_numpy(np.asarray(v)) for name, v in samples.items()},
            "splits": splits,
            "nsd_id": torch.from_numpy(nsd_id),
            "n_training_images": n_training_images,
        }
        with write_whole(data_dir / "prepared.pt") as file:
            torch.save(content, file)
    print(f"wrote {data_dir}: {n_images} pictures, {n_samples} samples, activity as {dtype.name}")


def write_array(file, blocks, shape, dtype):
    """An npy array of this shape from blocks of its rows, of which there have to be shape[0] in all."""
    write_npy_header(file, shape, dtype)
    n_rows = 0
    for block in blocks:
        if block.shape[1:] != shape[1:]:
            raise ValueError(f"rows of shape {block.shape[1:]}, expected {shape[1:]}")
        file.write(np.ascontiguousarray(block, dtype).data)
        n_rows += len(block)
    if n_rows != shape[0]:
        raise ValueError(f"{n_rows} rows, expected {shape[0]}")


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
    splits: str  # "pictures": nobody's validation picture is trained on; "authors": by each subject's own rows
    nsd_id: np.ndarray  # (n_images,) int64, of NSD's 73,000 pictures, counted from 0
    n_training_images: int  # the first rows of images; the rest occurs in tests only
    fingerprint: str
    test_activity: np.ndarray | None = None  # (n_test_samples, n_vertices), mapped; of NSD-Flat only
    # of a checkpoint of other data, see ensemble.load_for; both are left out of scores
    trained_nsd_ids: np.ndarray | tuple = ()  # pictures that it was trained on
    is_known: np.ndarray | bool = True  # (n_vertices,) which vertices it has

    def samples(self, split, subject=None):
        """Row numbers of a split, in order; of one subject (an index) or of all."""
        chosen = self.split == split_names.index(split)
        if split != "train":
            chosen &= self.may_score(self.image)
        return np.flatnonzero(chosen if subject is None else chosen & (self.subject == subject))

    def may_score(self, image):
        """Which pictures (rows of images) the checkpoint was not trained on with other data."""
        return ~np.isin(self.nsd_id[image], self.trained_nsd_ids)

    def count_pictures(self, split):
        """What a score on the split rests on, in words."""
        rows = [self.samples(split, s) for s in range(len(self.space.subjects))]
        return count_pictures([len(part) for part in rows], len(np.unique(self.image[np.concatenate(rows)])))

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
    content = load_content(folder)
    for name, expected in content["files"].items():
        found = sample_fingerprint(folder / name) if (folder / name).exists() else "no file"
        if found != expected:
            raise Problem(
                f"{folder / name} is {found}, prepared.pt expects {expected}: files of different runs. python "
                f"{content['script']} --data_dir {folder} --overwrite true makes new ones"
            )
    arrays = {Path(name).stem: np.load(folder / name, mmap_mode="r") for name in content["files"]}
    samples = {name: v.numpy() for name, v in content["samples"].items()}
    return Prepared(
        space=Space(**content["space"]), nsd_id=content["nsd_id"].numpy(), **arrays, **samples,
        **{name: content[name] for name in ("splits", "n_training_images", "fingerprint")},
    )  # fmt: skip


def load_content(folder):
    """The dict in prepared.pt."""
    command, path = f"python prepare_data.py --data_dir {folder}", Path(folder) / "prepared.pt"
    if not path.exists():
        raise Problem(f"{path} not found: {folder} is not (or not completely) prepared. Run {command}")
    return load_torch(path, "prepared-2", f"what prepare_data.py writes. {command} --overwrite true makes a new one")


def sample_fingerprint(path, n_blocks=256, n_bytes=1 << 16):
    """Of the file, if it has more than 16 MiB of as many spread evenly over it: whether it is the one that it was."""
    size = path.stat().st_size
    if size <= n_blocks * n_bytes:
        n_blocks, n_bytes = 1, size
    with open(path, "rb") as file:
        parts = []
        for start in np.linspace(0, size - n_bytes, n_blocks).astype(np.int64):
            file.seek(start)
            parts.append(file.read(n_bytes))
    return fingerprint(size, *parts)


# ---- what the data were prepared from -----------------------------------------------------------


def describe_settings():
    """The constants that decide the result, but for SUBJECTS."""
    return {"SPLITS": SPLITS} | ({"SEED": SEED} if SPLITS == "pictures" else {})


def describe_inputs(subjects):
    """{name: value} of all that decides the result, but for the values of the activity, which scan_activity reads."""
    inputs = describe_settings() | {"subjects": [s.name for s in subjects]}
    for s in subjects:
        rois = [part for names, labels in s.rois.values() for part in (names, *labels.values())]
        inputs[f"{s.name} masks and ROIs"] = fingerprint(*s.vertices.values(), list(s.rois), *rois)
        inputs[f"{s.name} pictures"] = s.picture_stamp
    return inputs


def describe_activity(subjects, fingerprints):
    """{name: [size, date, fingerprint of the values]} of the activity's files; fingerprints: {path: …}."""
    return {
        name: [path.stat().st_size, path.stat().st_mtime_ns, fingerprints[path]]
        for name, path in activity_files(subjects).items()
    }


def activity_files(subjects):
    return {f"{s.name} {hemi} activity": path for s in subjects for hemi, path in s.activity.items()}


def activity_changed(before, path):
    """Size and contents decide; the date, equal, only spares reading gigabytes at every start."""
    size, date, values = before
    if path.stat().st_size != size:
        return True
    if path.stat().st_mtime_ns == date:
        return False
    digest = hashlib.blake2b()
    for _ in activity_blocks(path, digest):
        pass
    return digest.hexdigest()[:16] != values


def is_prepared():
    """Whether DATA_DIR holds what would be made; says so. Refuses data of other inputs, unless to be overwritten."""
    if OVERWRITE or not (Path(DATA_DIR) / "prepared.pt").exists():
        return False
    before = load_content(DATA_DIR)["inputs"]
    load(DATA_DIR)  # refuses files that do not belong together
    wanted, found = find_subjects(CHALLENGE_DIR, SUBJECTS)
    is_gone = not set(wanted) & set(found)
    if is_gone:  # nothing left to compare with but the constants
        now = describe_settings() | ({"subjects": wanted} if wanted else {})
        changed = differences({name: before.get(name) for name in now}, now)
    else:
        subjects, findings = read_folder(CHALLENGE_DIR, SUBJECTS)
        findings.refuse(f"{DATA_DIR} is prepared, but now there are problems in {CHALLENGE_DIR}")
        files = activity_files(subjects)
        changed = differences({k: v for k, v in before.items() if k not in files}, describe_inputs(subjects))
        if not changed:
            changed = [f"{k}: other values" for k, path in files.items() if activity_changed(before[k], path)]
    if changed:
        raise Problem(
            f"{DATA_DIR} was prepared from other inputs ({'; '.join(changed[:6])}{' …' * (len(changed) > 6)}). "
            "--overwrite true prepares it anew; or choose another DATA_DIR"
        )
    compared = f"{CHALLENGE_DIR} is not there to compare with" if is_gone else "from these inputs"
    print(f"{DATA_DIR} is prepared already, {compared}; --overwrite true prepares it anew")
    return True


def main():
    check_least(globals(), SEED=0, WORKERS=0, ACTIVITY_LIMIT=1)
    if SPLITS not in ("pictures", "authors"):
        raise Problem(f"SPLITS is {SPLITS!r}, expected pictures or authors")
    if is_prepared():
        return
    with sole_writer(DATA_DIR, "prepare_data.py"):
        if not is_prepared():  # by another process in the meantime
            prepare()


def prepare():
    subjects, findings = read_folder(CHALLENGE_DIR, SUBJECTS)
    dtype, fingerprints = scan_activity(subjects, findings)
    findings.refuse(f"problems in {CHALLENGE_DIR}")

    training_ids = np.unique(np.concatenate([s.nsd_ids for s in subjects]))
    test_ids = np.unique(np.concatenate([s.test_nsd_ids for s in subjects]))
    image_ids = np.concatenate([training_ids, np.setdiff1d(test_ids, training_ids)])
    row_of_id = {nsd_id: row for row, nsd_id in enumerate(image_ids)}
    paths_of_pictures = [[] for _ in image_ids]
    for s in subjects:
        for path, nsd_id in zip(s.pictures + s.test_pictures, np.concatenate([s.nsd_ids, s.test_nsd_ids])):
            paths_of_pictures[row_of_id[nsd_id]].append(path)

    def image_rows(ids):
        return np.array([row_of_id[i] for i in ids], np.int64)

    space = build_space(subjects)
    images = np.concatenate([image_rows(s.nsd_ids) for s in subjects])
    seen = np.stack([np.isin(training_ids, s.nsd_ids) for s in subjects], axis=1)
    if SPLITS == "pictures":
        split = split_pictures(seen, SEED)[images]
    else:
        split = np.concatenate([split_as_authors(s.name, len(s.pictures)) for s in subjects])
    samples = {
        "subject": np.repeat(np.arange(len(subjects)), [len(s.pictures) for s in subjects]),
        "image": images,
        "split": split,
        "test_subject": np.repeat(np.arange(len(subjects)), [len(s.test_pictures) for s in subjects]),
        "test_image": np.concatenate([image_rows(s.test_nsd_ids) for s in subjects]),
    }
    report(subjects, space, samples, seen)
    check_splits(subjects, samples)
    write_prepared(
        DATA_DIR,
        space=space,
        samples=samples,
        splits=SPLITS,
        nsd_id=image_ids,
        n_training_images=len(training_ids),
        dtype=dtype,
        activity=common_activity(subjects, space, dtype),
        images=decode_pictures(paths_of_pictures, WORKERS),
        inputs=describe_inputs(subjects) | describe_activity(subjects, fingerprints),
        made_with=constants(globals()),
        script="prepare_data.py",
    )


def report(subjects, space, samples, seen):
    """Per subject: samples per split, vertices present and missing, pictures shared."""
    names = ("subject", *split_names, space.unit, "missing", "shared", "challenge test")
    print("{:8} {:>6} {:>6} {:>6} {:>9} {:>8} {:>7} {:>15}".format(*names))
    for i, s in enumerate(subjects):
        counts = np.bincount(samples["split"][samples["subject"] == i], minlength=3)
        present = int(space.mask[i].sum())
        shared = int((seen[:, i] & (seen.sum(1) > 1)).sum())
        print(
            f"{s.name:8} {counts[0]:6} {counts[1]:6} {counts[2]:6} {present:9} {space.n_vertices - present:8} "
            f"{shared:7} {len(s.test_pictures) or 'no pictures':>15}"
        )


def check_splits(subjects, samples):
    """Some samples to train on and to validate with for everybody; pictures that are both only where asked for."""
    for i, s in enumerate(subjects):
        counts = np.bincount(samples["split"][samples["subject"] == i], minlength=3)
        if not counts[0] or not counts[1]:
            raise Problem(
                f"{s.name}: {len(s.pictures)} training pictures give {counts[0]} for training and {counts[1]} for "
                "validation, expected some of both: 20 pictures or more"
            )
    is_trained = samples["split"] == 0
    leaks = np.isin(samples["image"][~is_trained], samples["image"][is_trained])
    if SPLITS == "authors":
        print(
            f"the authors' splits: {leaks.sum()} of {len(leaks)} validation and private test samples show a picture "
            "that another subject is trained on"
        )
    elif leaks.any():
        raise RuntimeError(f"{leaks.sum()} pictures are both trained on and validated with: splits are wrong")


if __name__ == "__main__":
    run_script(main, globals())
