"""Raw NSD -> a challenge folder, derived as the organisers derived theirs: python -m nsd.prepare_nsd

NSD_DIR mirrors the bucket s3://natural-scenes-dataset. Each subject's folder in CHALLENGE_DIR also gets the held-out
activity and the noise ceilings that the challenge's download lacks; docs/data.md says how all is derived.

    activity   each vertex z-scored over the trials of a session, then averaged over the showings of a picture
    ceiling    ncsnr^2 / (ncsnr^2 + m), m the mean over the test pictures of 1 / (number of showings)

A killed run continues with the next subject.
"""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import scipy.io
from PIL import Image

import prepare_data
from core.files import lock, output_folder
from core.settings import check_same, progress, run
from core.space import HEMIS, N_FSAVERAGE, ROI_GROUPS
from model import UserError

NSD_DIR: str = "natural-scenes-dataset"  # the downloaded part of s3://natural-scenes-dataset, same paths below it
RSC_DIR: str = ""  # the organisers' {lh,rh}.nsdgeneralRSC.mgz (CC BY-NC 4.0, with their code); empty: nsdgeneral alone
CHALLENGE_DIR: str = prepare_data.CHALLENGE_DIR  # output: subj01 to subj08 in the challenge's layout
SUBJECTS: str = ""  # such as subj01,subj05; empty: all whose betas were downloaded
N_SESSIONS: tuple[int, ...] = (40, 40, 32, 30, 40, 32, 40, 30)  # of subj01, subj02, ...; the last 3 are the test data
TRIALS_PER_SESSION: int = 750  # fewer only in miniature data
OVERWRITE: bool = False  # prepare subjects again that are in CHALLENGE_DIR already

EVERYBODY = tuple(f"subj{number:02d}" for number in range(1, 9))
N_TEST_SESSIONS = 3  # held out by the challenge
FINISHERS = ("subj01", "subj02", "subj05", "subj07")  # all 40 sessions: they saw every shared picture three times
CHALLENGE = {  # of subj01 to subj08
    "sessions": (40, 40, 32, 30, 40, 32, 40, 30),
    "training pictures": (9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779),
    "test pictures": (159, 159, 293, 395, 159, 293, 159, 395),
    "lh vertices": (19004, 19004, 19004, 19004, 19004, 18978, 19004, 18981),
    "rh vertices": (20544, 20544, 20544, 20544, 20544, 20220, 20544, 20530),
}
MGH_HEADER = 284  # bytes before the values
STIMULI = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
MASK = "nsddata/freesurfer/fsaverage/label/{}.nsdgeneral.mgz"
BETAS = "nsddata_betas/ppdata/{}/fsaverage/betas_fithrf_GLMdenoise_RR/{}.betas_session{:02d}.mgh"
NCSNR = "nsddata_betas/ppdata/{}/fsaverage/betas_fithrf_GLMdenoise_RR/{}.ncsnr.mgh"
LABEL = "nsddata/freesurfer/{}/label/{}.{}.mgz"
LABEL_NAMES = "nsddata/freesurfer/{0}/label/{2}.mgz.ctab"
TRANSFORM = "nsddata/ppdata/{}/transforms/{}.white-to-fsaverage.mgz"
NOTE = "prepare_nsd.json"  # in each subject's folder: settings and counts


def choose_subjects():
    """{name: number of sessions} of SUBJECTS, or of all whose betas are there."""
    present = sorted(path.name for path in Path(NSD_DIR).glob("nsddata_betas/ppdata/subj0[1-8]"))
    names = sorted(SUBJECTS.replace(",", " ").split()) or present or EVERYBODY
    if set(names) - set(EVERYBODY):
        raise UserError(f"SUBJECTS is {SUBJECTS}, expected some of subj01 to subj08.")
    return {name: N_SESSIONS[EVERYBODY.index(name)] for name in names}


def survey(n_sessions, others=()):
    """Check all input files before the hours of work -> {name: nsd ids shown (n_sessions, n_trials)}, nsd ids of the
    shared pictures (n,); both from 0. n_sessions: {name: number}; others: more files that are needed."""
    betas = []
    for name, hemi in itertools.product(n_sessions, HEMIS):
        betas += [BETAS.format(name, hemi, session) for session in range(1, n_sessions[name] + 1)]
    check_files([STIMULI, DESIGN, *map(MASK.format, HEMIS), *others], betas, TRIALS_PER_SESSION)
    content = scipy.io.loadmat(Path(NSD_DIR) / DESIGN)
    order, pictures, shared = (content[name].astype(np.int64) for name in ("masterordering", "subjectim", "sharedix"))
    if min(order.min(), pictures.min(), shared.min()) < 1:
        raise UserError(f"{DESIGN} counts from 0, expected NSD's numbers from 1.")
    planned = dict(zip(EVERYBODY, pictures[:, order.ravel() - 1] - 1))  # sessions never acquired included
    shown = {name: planned[name][: n * TRIALS_PER_SESSION].reshape(n, -1) for name, n in n_sessions.items()}
    return shown, shared.ravel() - 1


def check_files(others, betas, n_trials):
    """Raise UserError with the bucket path of each file that is missing below NSD_DIR, and for betas that do not have
    exactly n_trials: all later trials would get the wrong pictures."""
    missing = [path for path in sorted({*others, *betas}) if not (Path(NSD_DIR) / path).is_file()]
    if missing:
        listed = "\n".join(f"  s3://natural-scenes-dataset/{path}" for path in missing)
        raise UserError(f"{NSD_DIR} lacks {len(missing)} files; download them to the same paths below it:\n{listed}")
    for path in [Path(NSD_DIR) / path for path in betas]:
        header, n_bytes = np.fromfile(path, ">i4", 6).tolist(), path.stat().st_size
        if header != [1, N_FSAVERAGE, 1, 1, n_trials, 3] or n_bytes < MGH_HEADER + 4 * N_FSAVERAGE * n_trials:
            raise UserError(f"{path} does not have {n_trials} trials (TRIALS_PER_SESSION): download it again.")


def read_trials(path, n_trials, vertices):
    """Betas of a session, percent signal change: (n_trials, len(vertices)) float32."""
    betas = np.memmap(Path(NSD_DIR) / path, ">f4", "r", MGH_HEADER, (n_trials, N_FSAVERAGE))
    return np.array(betas[:, vertices], np.float32)


def zscore(betas):
    """betas (n_trials, n_vertices) float32 of a session -> z-scores over the trials, with the population deviation.
    NaN stays NaN; a constant vertex becomes 0, as with the organisers' StandardScaler."""
    y = betas - betas.mean(0, dtype=np.float64)
    y /= np.where((betas == betas[0]).all(0), 1, y.std(0))
    return y.astype(np.float32)


def read_surface(path):
    """Values per vertex of an MGH or MGZ file, below NSD_DIR or anywhere with an absolute path: (n_vertices,)."""
    return np.asarray(nibabel.load(Path(NSD_DIR) / path).dataobj).ravel()


def read_mask():
    """{hemi: fsaverage vertices (n,)} of nsdgeneral and, if RSC_DIR is given, the retrosplenial mask."""
    inside = {hemi: read_surface(MASK.format(hemi)) > 0 for hemi in HEMIS}  # outside it is 0 or -1
    if RSC_DIR:
        rsc = Path(RSC_DIR).resolve()
        inside = {hemi: inside[hemi] | (read_surface(rsc / f"{hemi}.nsdgeneralRSC.mgz") > 0) for hemi in HEMIS}
    else:
        print("RSC_DIR is empty: the challenge has 1,564 more vertices, so scores are not comparable")
    return {hemi: np.flatnonzero(inside[hemi]) for hemi in HEMIS}


def read_labels(name, hemi):
    """{ROI group: labels on fsaverage (163842,) int64} of one subject, taken there through the subject's transform."""
    index = read_surface(TRANSFORM.format(name, hemi)).astype(np.int64)
    if index.min() < 1 or len(index) != N_FSAVERAGE:
        raise UserError(f"{TRANSFORM.format(name, hemi)}: expected {N_FSAVERAGE} vertices, counted from 1.")
    return {g: read_surface(LABEL.format(name, hemi, g))[index - 1].astype(np.int64) for g in ROI_GROUPS}


def split_trials(name, shown, shared):
    """-> training ids (n,), test ids (m,), both sorted, and the row that each trial is averaged into (n_sessions,
    n_trials): training pictures first, then test pictures; -1: none. shown, shared: see survey()."""
    training, late = np.unique(shown[:-N_TEST_SESSIONS]), shown[-N_TEST_SESSIONS:]
    held_out, n_showings = np.unique(late, return_counts=True)
    allowed = ~np.isin(held_out, shared) | ((n_showings == 3) & (name in FINISHERS))
    test = held_out[allowed & ~np.isin(held_out, training)]
    rows = np.searchsorted(training, shown)
    rows[-N_TEST_SESSIONS:] = np.where(np.isin(late, test), len(training) + np.searchsorted(test, late), -1)
    return training, test, rows


def average_betas(name, hemi, vertices, rows, bar):
    """The vertices (n,) that are NaN in no trial, and their mean z-scored activity: (n_rows, n) float32."""
    n_showings = np.bincount(rows[rows >= 0])
    means = np.zeros((len(n_showings) + 1, len(vertices)), np.float32)  # the last row is for trials of row -1
    for session, session_rows in enumerate(rows, start=1):
        betas = read_trials(BETAS.format(name, hemi, session), len(session_rows), vertices)
        np.add.at(means, session_rows, zscore(betas))
        bar.update()
    means[:-1] /= n_showings[:, None].astype(np.float32)
    complete = ~np.isnan(means).any(0)
    return vertices[complete], means[:-1, complete]


def write_subject(name, shown, shared, mask, folder):
    """Write one subject's challenge folder -> its row of CHALLENGE."""
    training, test, rows = split_trials(name, shown, shared)
    n_showings = np.bincount(rows[rows >= 0])[len(training) :]  # of the test pictures
    labels = {hemi: read_labels(name, hemi) for hemi in HEMIS}
    counts = {"sessions": len(rows), "training pictures": len(training), "test pictures": len(test)}
    for part in ("training_split/training_images", "training_split/training_fmri", "test_split/test_images",
                 "test_split/test_fmri", "test_split/noise_ceiling", "roi_masks"):  # fmt: skip
        (folder / part).mkdir(parents=True)
    for group in ROI_GROUPS:
        table = np.loadtxt(Path(NSD_DIR) / LABEL_NAMES.format(name, "", group), str, usecols=(0, 1), ndmin=2)
        names = {int(label): roi for label, roi in table.tolist()}
        np.save(folder / f"roi_masks/mapping_{group}.npy", names)  # a pickled dict, as in the challenge
    for ids, split, prefix in ((training, "training", "train"), (test, "test", "test")):
        images = folder / f"{split}_split/{split}_images"
        write_pictures(STIMULI, ids, [images / f"{prefix}-{row:04d}_nsd-{i:05d}.png" for row, i in enumerate(ids, 1)])
    with progress(total=len(HEMIS) * len(rows), desc=f"{name}: betas", unit="session") as bar:
        for hemi in HEMIS:
            vertices, activity = average_betas(name, hemi, mask[hemi], rows, bar)
            counts[f"{hemi} vertices"] = len(vertices)
            np.save(folder / f"training_split/training_fmri/{hemi}_training_fmri.npy", activity[: len(training)])
            if len(test):
                np.save(folder / f"test_split/test_fmri/{hemi}_test_fmri.npy", activity[len(training) :])
                signal = read_surface(NCSNR.format(name, hemi))[vertices].astype(np.float64) ** 2
                ceiling = signal / (signal + np.mean(1 / n_showings))
                np.save(folder / f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy", ceiling)
            inside = np.bincount(vertices, minlength=N_FSAVERAGE)
            np.save(folder / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy", inside)
            for group, areas in labels[hemi].items():
                np.save(folder / f"roi_masks/{hemi}.{group}_fsaverage_space.npy", areas * inside)
                np.save(folder / f"roi_masks/{hemi}.{group}_challenge_space.npy", areas[vertices])
    return counts


def write_pictures(path, rows, outputs, side=425):
    """PNGs of the central side x side px of pictures in an HDF5 file. rows: which; outputs: paths of the PNGs."""

    def write(row, output):
        picture = file["imgBrick"][row]
        top, left = (np.array(picture.shape[:2]) - side) // 2
        Image.fromarray(picture[top : top + side, left : left + side].copy()).save(output)

    with (
        h5py.File(Path(NSD_DIR) / path, locking=False) as file,  # network file systems may have no locks
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
    ):
        list(progress(pool.map(write, rows, outputs), total=len(outputs), desc="pictures", unit="picture"))


def main():
    output, todo = Path(CHALLENGE_DIR), choose_subjects()
    settings, notes = {"n_trials": TRIALS_PER_SESSION, "retrosplenial": bool(RSC_DIR)}, {}
    for name in [name for name in todo if (output / name).exists() and not OVERWRITE]:
        path, expected = output / name / NOTE, settings | {"sessions": todo.pop(name)}
        if not path.exists():
            raise UserError(f"{path.parent} was not written by this script: choose another CHALLENGE_DIR.")
        notes[name] = json.loads(path.read_text())
        check_same(path.parent, {key: notes[name].get(key) for key in expected}, expected)
        print(f"{path.parent} is finished already")
    if todo:
        places = itertools.product(todo, HEMIS, ROI_GROUPS)
        labels = [path.format(*place) for place in places for path in (NCSNR, TRANSFORM, LABEL, LABEL_NAMES)]
        shown, shared = survey(todo, labels)
        mask = read_mask()
    with lock(output):
        for name in todo:
            with output_folder(output / name, overwrite=OVERWRITE, marker=NOTE) as folder:
                notes[name] = settings | write_subject(name, shown[name], shared, mask, folder)
                (folder / NOTE).write_text(json.dumps(notes[name]))
    challenge = pd.DataFrame(CHALLENGE, EVERYBODY).add_suffix(" (challenge)")
    print(pd.DataFrame(notes).T[list(CHALLENGE)].join(challenge).sort_index().T.to_string())


if __name__ == "__main__":
    run(main, globals())
