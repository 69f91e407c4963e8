"""Raw NSD -> a challenge folder, as the organisers derived theirs: python prepare_nsd.py

NSD_DIR holds files of the bucket s3://natural-scenes-dataset under the bucket's own paths (a missing
file is told by that path). What prepare_data.py then reads from CHALLENGE_DIR is the downloaded
folder's layout, with the held-out activity and the noise ceilings that the download lacks:

    mask       nsdgeneral and RSC_DIR's retrosplenial mask, without vertices that are NaN in any trial
    activity   every vertex z-scored over the trials of a session, then averaged over showings
    training   all pictures of the sessions before the last three, by nsd id
    test       pictures shown in the last three only; of the 1,000 that everybody saw those with all
               three showings there, for the subjects who finished (1, 2, 5, 7), for others none
    ceiling    ncsnr² / (ncsnr² + m), m the mean over the test pictures of 1 / (number of showings)
    ROIs       the person's own labels, taken to fsaverage through the person's transform

A subject's folder appears whole or not at all; a killed run goes on with the next subject.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import nibabel
import numpy as np
import scipy.io
from PIL import Image

import prepare_data
from common import Problem, check_disk, check_least, fingerprint, progress, run_script, say, sole_writer
from prepare_data import Findings, hemis, n_fsaverage, roi_groups

NSD_DIR = "nsd"  # what was downloaded of s3://natural-scenes-dataset, same paths below
CHALLENGE_DIR = prepare_data.CHALLENGE_DIR  # written here: subj01 … subj08 in the challenge's layout
SUBJECTS = ""  # names with commas between them, such as subj01,subj05; empty: all whose betas are there
RSC_DIR = ""  # the organisers' {lh,rh}.nsdgeneralRSC.mgz (CC BY-NC 4.0, with their code); empty: nsdgeneral alone
N_SESSIONS = (40, 40, 32, 30, 40, 32, 40, 30)  # of subj01, subj02, …: all that were acquired; the last 3 are test
WORKERS = 0  # threads that encode pictures; 0: one per core
OVERWRITE = False  # prepare subjects again that CHALLENGE_DIR has already

everybody = tuple(f"subj{number:02d}" for number in range(1, 9))
bucket = "s3://natural-scenes-dataset"
acquired = (40, 40, 32, 30, 40, 32, 40, 30)  # sessions of 750 trials
n_session_trials = 750
n_test_sessions = 3  # the last ones, held out by the challenge
finishers = (1, 2, 5, 7)  # subjects with all 40 sessions: they saw all showings of the shared pictures
n_training = (9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779)  # the challenge's own pictures
n_test = (159, 159, 293, 395, 159, 293, 159, 395)
n_vertices = {"lh": [19004] * 5 + [18978, 19004, 18981], "rh": [20544] * 5 + [20220, 20544, 20530]}  # its own
mgh_header = 284  # bytes before the values
stimuli, stimuli_bytes = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", 39.6e9
design_file = "nsddata/experiments/nsd/nsd_expdesign.mat"
mask_file = "nsddata/freesurfer/fsaverage/label/{}.nsdgeneral.mgz"  # of a hemisphere
betas_file = (
    "nsddata_betas/ppdata/{}/fsaverage/betas_fithrf_GLMdenoise_RR/{}.betas_session{:02d}.mgh"  # sessions from 1
)
ceiling_file = "nsddata_betas/ppdata/{}/fsaverage/betas_fithrf_GLMdenoise_RR/{}.ncsnr.mgh"
label_file = "nsddata/freesurfer/{}/label/{}"
transform_file = "nsddata/ppdata/{}/transforms/{}.white-to-fsaverage.mgz"
shared_files = (stimuli, design_file, *map(mask_file.format, hemis))
note = "prepare_nsd.json"  # in a subject's folder: what made it


# ---- where things are ---------------------------------------------------------------------------


@dataclasses.dataclass
class Person:
    """One subject's part of raw NSD, after survey() has checked it."""

    name: str
    number: int  # 1 to 8
    n_sessions: int
    n_trials: list  # of every session, as its files have them
    shown: np.ndarray  # (n_trials,) nsd id of every trial, 0-based


def betas_files(name, n_sessions):
    return [betas_file.format(name, hemi, session) for session in range(1, n_sessions + 1) for hemi in hemis]


def label_files(name):
    """What a person's ROIs and noise ceilings are made from."""
    files = [label_file.format(name, f"{hemi}.{group}.mgz") for group in roi_groups for hemi in hemis]
    files += [label_file.format(name, f"{group}.mgz.ctab") for group in roi_groups]
    return files + [path.format(name, hemi) for path in (transform_file, ceiling_file) for hemi in hemis]


def choose_subjects(root, names):
    """Names of subjects (text, empty for all whose betas are there, else all eight) -> [(name, number)]."""
    found = sorted(p.name for p in Path(root).glob("nsddata_betas/ppdata/subj0[1-8]") if p.is_dir())
    wanted = sorted({n for n in re.split(r"[,\s]+", names) if n}) or found or list(everybody)
    if not Path(root).is_dir():
        raise Problem(
            f"{root} not found. Point NSD_DIR to a folder with what was downloaded of {bucket} under the bucket's own "
            "paths; from an empty folder this command lists what to download"
        )
    if set(wanted) - set(everybody):
        raise Problem(f"SUBJECTS is {names!r}, expected names from subj01 to subj08 with commas between them")
    return [(name, int(name[-2:])) for name in wanted]


def count_sessions(number, n_sessions):
    """Sessions of subject number (from 1), of which some have to be left to train on."""
    if number > len(n_sessions):
        raise Problem(f"N_SESSIONS is {n_sessions}, expected a whole number for each of subj01 … subj08 in this order")
    if n_sessions[number - 1] <= n_test_sessions:
        raise Problem(
            f"N_SESSIONS gives subj{number:02d} {n_sessions[number - 1]} sessions, expected {n_test_sessions + 1} or "
            f"more: the last {n_test_sessions} are its test data"
        )
    return n_sessions[number - 1]


def survey(root, people, n_sessions, rsc_dir, n_bytes, output, *, labels=True, more=(), findings=()):
    """Check all that the long work needs, and tell everything that is missing or wrong at once.

    people: [(name, number)]. n_bytes: function of a Person (None where its design is missing), the disk
    that its part of output takes. labels: whether ROI labels and ceilings are needed. more: other files
    needed, relative to root; findings: other things that are wrong. -> [Person], design
    """
    root, findings = Path(root), Findings(findings)
    counts = {name: count_sessions(number, n_sessions) for name, number in people}
    needed = [*shared_files, *more]
    for name, _ in people:
        needed += [*(label_files(name) if labels else ()), *betas_files(name, counts[name])]
    missing = [path for path in needed if not (root / path).is_file()]
    design, persons, n_pictures = None, [], 0
    if design_file not in missing:
        with findings.collect():
            design = read_design(root / design_file)
    if stimuli not in missing:
        with findings.collect(), open_stimuli(root / stimuli) as brick:
            n_pictures = len(brick)
    for name, number in people:
        n_trials = []
        for session in range(1, counts[name] + 1):
            paths = [betas_file.format(name, hemi, session) for hemi in hemis]
            with findings.collect():
                found = [count_trials(root / path) for path in paths if path not in missing]
                if len(set(found)) > 1:
                    raise Problem(
                        f"{root / paths[0]} has {found[0]} trials, {paths[1]} has {found[1]}; expected as many"
                    )
                n_trials += found[:1]
        if design and len(n_trials) == counts[name]:
            with findings.collect():
                shown = pictures_of_trials(design, number)
                if sum(n_trials) > len(shown):
                    raise Problem(f"{name}: {sum(n_trials)} trials in its betas, but {design_file} has {len(shown)}")
                if n_pictures and shown.max() >= n_pictures:
                    raise Problem(f"{name} saw nsd id {shown.max()}, but {stimuli} has {n_pictures} pictures")
                persons.append(Person(name, number, counts[name], n_trials, shown[: sum(n_trials)]))
        for group in roi_groups if labels and not set(label_files(name)) & set(missing) else ():
            with findings.collect():
                read_labels(root, name, group)
    extra = [Path(rsc_dir) / f"{hemi}.nsdgeneralRSC.mgz" for hemi in hemis] if rsc_dir else []
    for path in extra:
        if not path.is_file():
            findings.append(f"{path}: not there, expected in RSC_DIR as the organisers ship it with their code")
    known = {person.name: person for person in persons}
    disk = sum(n_bytes(known.get(name)) for name, _ in people)
    with findings.collect():
        check_disk(output, disk)
    if missing or findings:
        refuse(root, missing, findings, counts, disk, output, n_sessions)
    return persons, design


def refuse(root, missing, findings, counts, disk, output, n_sessions):
    """Raise one Problem with everything that survey() found."""
    sizes = {stimuli: stimuli_bytes}
    download = sum(
        sizes.get(p, mgh_header + 4 * n_fsaverage * n_session_trials if "betas_session" in p else 0) for p in missing
    )
    text = []
    if missing:
        text.append(
            f"{len(missing)} files are missing below {root}, {download / 1e9:.1f} GB to download. Each with\n"
            f"  aws s3 cp --no-sign-request {bucket}/PATH {root}/PATH"
        )
        there = [*n_sessions]
        for name, n in counts.items():
            gaps = [s for s in range(1, n + 1) if any(betas_file.format(name, hemi, s) in missing for hemi in hemis)]
            if gaps:
                text.append(f"{name}: {n - len(gaps)} of {n} sessions are there, missing {show_ranges(gaps)}")
                there[int(name[-2:]) - 1] = gaps[0] - 1
        if there != [*n_sessions]:
            usable = all(there[int(name[-2:]) - 1] > n_test_sessions for name in counts)
            way = (
                f"--n_sessions {','.join(map(str, there))} takes the first ones that are there"
                if usable
                else (f"the first {n_test_sessions + 1} at least are needed")
            )
            text[-1] += f"\n{way}; with fewer sessions than were acquired the pictures are not the challenge's"
        text += [f"  {bucket}/{path}" for path in missing]
    if findings:
        text += [f"{len(findings)} things are wrong:", *(f"  {finding}" for finding in findings)]
    text.append(f"Writing {output} takes up to {disk / 1e9:.1f} GB of disk")
    raise Problem("\n".join(text))


def show_ranges(numbers):
    """[1, 2, 3, 7] -> "1–3, 7"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends))


# ---- reading the released files -----------------------------------------------------------------


def read_design(path):
    """nsd_expdesign.mat -> {"masterordering": (n_trials,), "subjectim": (8, n_pictures), "sharedix": (n,)}, all
    1-based as they are in the file."""
    names = {"masterordering", "subjectim", "sharedix"}
    try:
        try:
            content = scipy.io.loadmat(path, variable_names=names)
        except NotImplementedError:  # version 7.3 is HDF5, its arrays transposed
            with h5py.File(path) as file:
                content = {name: file[name][()].T for name in names & file.keys()}
    except Exception as error:
        raise Problem(f"{path}: not a whole MATLAB file ({error}); download it again")
    if names - content.keys():
        raise Problem(f"{path}: has no {', '.join(sorted(names - content.keys()))}, expected NSD's experiment design")
    design = {name: np.asarray(content[name]).astype(np.int64) for name in names}
    design |= {name: design[name].ravel() for name in ("masterordering", "sharedix")}
    ordering, pictures = design["masterordering"], design["subjectim"]
    if pictures.ndim != 2 or ordering.min() < 1 or ordering.max() > pictures.shape[1] or pictures.min() < 1:
        raise Problem(
            f"{path}: masterordering from {ordering.min()} to {ordering.max()}, subjectim {pictures.shape} from "
            f"{pictures.min()}; expected numbers from 1, and masterordering to count subjectim's columns"
        )
    return design


def pictures_of_trials(design, number):
    """nsd ids (0-based) of the planned trials of subject number (1 to 8): (n_trials,)."""
    if number > len(design["subjectim"]):
        raise Problem(f"{design_file}: subjectim has {len(design['subjectim'])} rows, none for subj{number:02d}")
    return design["subjectim"][number - 1, design["masterordering"] - 1] - 1


def count_trials(path):
    """Trials of a session's betas; header and size checked."""
    with open(path, "rb") as file:
        head = np.frombuffer(file.read(24), ">i4")
    if len(head) < 6 or head[0] != 1 or tuple(head[1:4]) != (n_fsaverage, 1, 1) or head[5] != 3:
        raise Problem(f"{path}: not float32 MGH of shape ({n_fsaverage}, 1, 1, n_trials); download it again")
    size, expected = path.stat().st_size, mgh_header + 4 * n_fsaverage * int(head[4])
    if size < expected or head[4] < 2:
        raise Problem(f"{path}: {size} bytes, its header says {head[4]} trials, {expected} bytes; download it again")
    return int(head[4])


def read_trials(path, n_trials, vertices, at_once=64):
    """Betas of a session at some vertices: (n_trials, len(vertices)) float32.

    Read in pieces, not mapped: the chosen vertices touch every page, and mapped pages count as memory.
    """
    out = np.empty((n_trials, len(vertices)), np.float32)
    with open(path, "rb") as file:
        file.seek(mgh_header)
        for start in range(0, n_trials, at_once):
            n = min(at_once, n_trials - start)
            out[start : start + n] = np.fromfile(file, ">f4", n * n_fsaverage).reshape(n, -1)[:, vertices]
    if np.isinf(out).any():
        raise Problem(f"{path}: {np.isinf(out).sum()} infinite values, expected none; download it again")
    return out


def zscore(betas, block=4096):
    """betas (n_trials, n_vertices) float32 of one session, z-scored in place over the trials, in float64 and with
    the population deviation. NaN stays NaN; a constant vertex becomes 0, as by the organisers' scaler.

    -> (n_vertices,) bool: which are constant
    """
    constant = (betas == betas[0]).all(0)
    for start in range(0, betas.shape[1], block):  # bounds what is float64
        columns = slice(start, start + block)
        y = betas[:, columns].astype(np.float64)
        y -= y.mean(0)
        y /= np.where(constant[columns], 1, np.sqrt(np.square(y).mean(0)))  # a constant's mean is itself, exactly
        betas[:, columns] = y
    return constant


def read_surface(path, n=None):
    """Values per vertex of an MGH or MGZ file: (n_vertices,)."""
    try:
        values = np.asarray(nibabel.load(path).dataobj).ravel()
    except Exception as error:
        raise Problem(f"{path}: not a whole MGH file ({error}); download it again")
    if n not in (None, len(values)):
        raise Problem(f"{path}: {len(values)} values, expected {n}")
    return values


def read_mask(root, rsc_dir):
    """{hemi: fsaverage vertices (n,)} of nsdgeneral and, where its folder is given, the retrosplenial mask."""
    vertices = {}
    for hemi in hemis:
        inside = read_surface(Path(root) / mask_file.format(hemi), n_fsaverage) > 0  # elsewhere it is 0 or -1
        if rsc_dir:
            inside |= read_surface(Path(rsc_dir) / f"{hemi}.nsdgeneralRSC.mgz", n_fsaverage) > 0
        vertices[hemi] = np.flatnonzero(inside)
        if not len(vertices[hemi]):
            raise Problem(f"{Path(root) / mask_file.format(hemi)}: nothing above 0, expected the nsdgeneral mask")
    if not rsc_dir:
        print(
            f"RSC_DIR is empty: nsdgeneral alone, {len(vertices['lh'])} + {len(vertices['rh'])} vertices. The "
            "challenge has 543 + 1021 more, retrosplenial ones; scores over all vertices are not comparable with its"
        )
    return vertices


def read_labels(root, name, group):
    """{hemi: labels on fsaverage (163842,) int64}, {label: ROI name} of one person."""
    labels = {}
    for hemi in hemis:
        native = read_surface(Path(root) / label_file.format(name, f"{hemi}.{group}.mgz"))
        path = Path(root) / transform_file.format(name, hemi)
        index = read_surface(path, n_fsaverage).astype(np.int64)  # from 1
        if index.min() < 1 or index.max() > len(native):
            raise Problem(
                f"{path}: vertices {index.min()} to {index.max()}, expected 1 to {len(native)} as in {hemi}.{group}.mgz"
            )
        labels[hemi] = native[index - 1].astype(np.int64)
    path = Path(root) / label_file.format(name, f"{group}.mgz.ctab")
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = {int(line[0]): line[1] for line in lines}
    except (ValueError, IndexError):
        raise Problem(f"{path}: not understood, expected lines such as '1 V1v'; download it again")
    return labels, names


# ---- one subject --------------------------------------------------------------------------------


def split_trials(person, shared):
    """Which picture's mean a trial belongs to. shared: nsd ids of the pictures that everybody saw.

    -> training ids (n,), test ids (m,), both sorted, and per trial its row, training first, -1 for none: (n_trials,)
    """
    held_out = np.arange(len(person.shown)) >= sum(person.n_trials[:-n_test_sessions])
    training = np.unique(person.shown[~held_out])
    seen, times = np.unique(person.shown[held_out], return_counts=True)
    allowed = ~np.isin(seen, shared) | ((times == 3) & (person.number in finishers))
    test = seen[allowed & ~np.isin(seen, training)]
    rows = np.where(held_out, -1, np.searchsorted(training, person.shown))
    kept = held_out & np.isin(person.shown, test)
    rows[kept] = len(training) + np.searchsorted(test, person.shown[kept])
    return training, test, rows


def average_betas(root, person, hemi, vertices, rows, bar):
    """Mean z-scored activity of every row, by one reading of all sessions.

    -> (n_rows, n_vertices) float32, which vertices are NaN in any trial, constant in any session: (n_vertices,) bool
    """
    n_showings = np.bincount(rows[rows >= 0])
    means = np.zeros((len(n_showings), len(vertices)), np.float32)
    missing, constant = np.zeros((2, len(vertices)), bool)
    start = 0
    for session, n in enumerate(person.n_trials, start=1):
        betas = read_trials(Path(root) / betas_file.format(person.name, hemi, session), n, vertices)
        missing |= np.isnan(betas).any(0)
        constant |= zscore(betas)
        for row, trial in zip(rows[start : start + n], betas):
            if row >= 0:
                means[row] += trial
        start += n
        bar.update()
    means /= n_showings[:, None].astype(np.float32)
    return means, missing, constant


def write_subject(root, person, design, mask, folder, workers):
    """Everything of one subject into folder. mask: of read_mask() -> {"training", "test", "lh", "rh"}: counts."""
    training, test, rows = split_trials(person, design["sharedix"] - 1)
    n_showings = np.bincount(rows[rows >= 0])[len(training) :]
    (folder / "roi_masks").mkdir(parents=True)
    own = {}
    with progress(total=len(hemis) * person.n_sessions, desc=f"{person.name}: betas", unit="session") as bar:
        for hemi in hemis:
            means, missing, constant = average_betas(root, person, hemi, mask[hemi], rows, bar)
            if constant.any():
                say(f"{person.name} {hemi}: {constant.sum()} vertices constant over a session, taken as 0 there")
            own[hemi] = mask[hemi][~missing]
            write_rows(
                folder / f"training_split/training_fmri/{hemi}_training_fmri.npy", means[: len(training)], ~missing
            )
            if len(test):
                write_rows(folder / f"test_split/test_fmri/{hemi}_test_fmri.npy", means[len(training) :], ~missing)
                signal = read_surface(Path(root) / ceiling_file.format(person.name, hemi), n_fsaverage)
                signal = signal[own[hemi]].astype(np.float64) ** 2
                ceiling = signal / (signal + np.mean(1 / n_showings))
                save(folder / f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy", ceiling)
            del means  # before the other hemisphere's
    write_masks(root, person.name, own, folder / "roi_masks")
    write_pictures(Path(root) / stimuli, {"train": training, "test": test}, folder, person.name, workers)
    return {"training": len(training), "test": len(test)} | {hemi: len(own[hemi]) for hemi in hemis}


def write_rows(path, values, columns, at_once=512):
    """values[:, columns] as npy, without a copy of it all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        prepare_data.write_npy_header(file, (len(values), int(columns.sum())), values.dtype)
        for start in range(0, len(values), at_once):
            file.write(np.ascontiguousarray(values[start : start + at_once][:, columns]).data)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def write_masks(root, name, vertices, folder):
    """roi_masks. vertices: {hemi: fsaverage vertices that the person has}."""
    inside = {hemi: np.zeros(n_fsaverage, np.int64) for hemi in hemis}
    for hemi in hemis:
        inside[hemi][vertices[hemi]] = 1
        save(folder / f"{hemi}.all-vertices_fsaverage_space.npy", inside[hemi])
    for group in roi_groups:
        labels, names = read_labels(root, name, group)
        for hemi in hemis:
            save(folder / f"{hemi}.{group}_fsaverage_space.npy", labels[hemi] * inside[hemi])
            save(folder / f"{hemi}.{group}_challenge_space.npy", labels[hemi][vertices[hemi]])
        np.save(folder / f"mapping_{group}.npy", names, allow_pickle=True)  # a pickled dict, as the challenge's


def write_pictures(path, ids, folder, name, workers, at_once=128):
    """PNGs of imgBrick. ids: {"train": nsd ids sorted, "test": likewise}."""
    files = []
    for short, split in (("train", "training"), ("test", "test")):
        images = folder / f"{split}_split/{split}_images"
        for row, i in enumerate(ids[short].tolist(), start=1):
            images.mkdir(parents=True, exist_ok=True)
            files.append((i, images / f"{short}-{row:04d}_nsd-{i:05d}.png"))
    files.sort()

    def encode(picture, path):
        Image.fromarray(picture).save(path, "PNG")

    with (
        open_stimuli(path) as brick,
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
        progress(total=len(files), desc=f"{name}: pictures", unit="picture") as bar,
    ):
        for start in range(0, len(files), at_once):  # bounds what waits to be encoded
            part = files[start : start + at_once]
            for _ in pool.map(encode, (brick[i] for i, _ in part), (path for _, path in part)):
                bar.update()


@contextlib.contextmanager
def open_stimuli(path):
    """The pictures of nsd_stimuli.hdf5, (73000, 425, 425, 3) uint8, row = nsd id."""
    try:
        file = h5py.File(path)
        brick = file["imgBrick"]
    except (OSError, KeyError) as error:
        raise Problem(f"{path}: no HDF5 file with imgBrick ({error}); download it again")
    with file:
        if brick.dtype != np.uint8 or brick.ndim != 4 or brick.shape[3] != 3:
            raise Problem(f"{path}: imgBrick is {brick.dtype} {brick.shape}, expected uint8 (73000, 425, 425, 3)")
        yield brick


# ---- all subjects -------------------------------------------------------------------------------


def folder_bytes(person):
    """Disk that a subject's folder takes at most: PNGs are smaller than their pixels."""
    n_pictures = 10000 if person is None else len(np.unique(person.shown))
    return n_pictures * (425 * 425 * 3 + 4 * sum(n_vertices[hemi][0] for hemi in hemis)) + 14 * 2 * 8 * n_fsaverage


def inputs_of(root, name, n_sessions, rsc_dir):
    """Fingerprint of names, sizes and dates of a subject's files, None where some are not there (any more)."""
    paths = [Path(root) / path for path in [*shared_files, *label_files(name), *betas_files(name, n_sessions)]]
    paths += [Path(rsc_dir) / f"{hemi}.nsdgeneralRSC.mgz" for hemi in hemis] if rsc_dir else []
    if not all(path.is_file() for path in paths):
        return None
    return fingerprint([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


def read_note(folder, settings, inputs):
    """What a finished subject's folder says of itself, refused where it was made from something else."""
    try:
        made = json.loads((folder / note).read_text())
    except (OSError, ValueError):
        raise Problem(
            f"{folder} was not made by prepare_nsd.py (no {note} in it), nothing changed. Choose another "
            "CHALLENGE_DIR; --overwrite true replaces it"
        )
    wrong = [f"{k} {made.get(k)}, now {v}" for k, v in settings.items() if made.get(k) != v]
    if not wrong and inputs not in (None, made.get("inputs")):
        wrong = ["other files in NSD_DIR or RSC_DIR"]
    if wrong:
        raise Problem(
            f"{folder} was made with {'; '.join(wrong)}. Choose another CHALLENGE_DIR; --overwrite true replaces it"
        )
    return made


def report(made):
    """made: {name: note}. Pictures and vertices beside the challenge's own, where all sessions are there."""
    titles = ("subject", "sessions", "training (challenge)", "test (challenge)", "vertices lh + rh (challenge)")
    print("\n{:8} {:>8} {:>21} {:>17} {:>33}".format(*titles))
    differing, whole = [], []
    for name, m in made.items():
        i = int(name[-2:]) - 1
        found = m["training"], m["test"], m["lh"], m["rh"]
        expected = n_training[i], n_test[i], n_vertices["lh"][i], n_vertices["rh"][i]
        print(
            f"{name:8} {m['n_sessions']:8} {found[0]:12} ({expected[0]:6}) {found[1]:8} ({expected[1]:6}) "
            f"{found[2]:8} + {found[3]:5} ({expected[2]:5} + {expected[3]:5})"
        )
        if m["n_sessions"] == acquired[i] and m["n_trials"] == acquired[i] * n_session_trials:
            whole.append(name)
            differing += [name] * (found != expected)
    partial = [name for name in made if name not in whole]
    if whole:
        print(
            f"differ from the challenge: {', '.join(differing)}"
            if differing
            else f"agree with the challenge: {', '.join(whole)}"
        )
    if partial:
        print(f"not at full size, so their numbers are not the challenge's: {', '.join(partial)}")


def main():
    check_least(globals(), WORKERS=0)
    root, output = Path(NSD_DIR), Path(CHALLENGE_DIR)
    people = choose_subjects(root, SUBJECTS)
    with sole_writer(output, "prepare_nsd.py"):
        made, settings, inputs = {}, {}, {}
        for name, number in people:
            settings[name] = {"n_sessions": count_sessions(number, N_SESSIONS), "retrosplenial": bool(RSC_DIR)}
            inputs[name] = inputs_of(root, name, settings[name]["n_sessions"], RSC_DIR)
            if (output / name).exists() and not OVERWRITE:
                made[name] = read_note(output / name, settings[name], inputs[name])
                print(f"{output / name} is there already, made from these files; --overwrite true makes it anew")
        todo = [(name, number) for name, number in people if name not in made]
        if todo:
            persons, design = survey(root, todo, N_SESSIONS, RSC_DIR, folder_bytes, output)
            mask = read_mask(root, RSC_DIR)
            for person in persons:
                about = settings[person.name] | {"n_trials": len(person.shown), "inputs": inputs[person.name]}
                made[person.name] = replace_folder(output / person.name, about, root, person, design, mask)
    report(dict(sorted(made.items())))


def replace_folder(folder, about, root, person, design, mask):
    """A subject's folder, whole or not at all. about: what its note says beside the counts -> the note."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        about |= write_subject(root, person, design, mask, aside, WORKERS)
        (aside / note).write_text(json.dumps(about))
        if hasattr(os, "sync"):  # not on Windows
            os.sync()  # before the name says that it is whole
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print(f"wrote {folder}")
    return about


if __name__ == "__main__":
    run_script(main, globals())
