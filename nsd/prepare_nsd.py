"""Raw NSD -> a challenge folder, derived as the organisers derived theirs: python -m nsd.prepare_nsd

NSD_DIR mirrors the bucket s3://natural-scenes-dataset. CHALLENGE_DIR gets the layout of the downloaded challenge,
plus the held-out activity and the noise ceilings that the download lacks:

    mask       nsdgeneral and RSC_DIR's retrosplenial mask, without vertices that are NaN in any trial
    activity   each vertex z-scored over the trials of a session, then averaged over the showings of a picture
    training   all pictures of the sessions before the last three, by nsd id
    test       pictures shown only in the last three sessions; of the 1,000 shared ones those with all three
               showings there, for the subjects who finished (1, 2, 5, 7), none for the others
    ceiling    ncsnr^2 / (ncsnr^2 + m), m the mean over the test pictures of 1 / (number of showings)
    ROIs       the subject's own labels, taken to fsaverage through the subject's transform

Each subject's folder is written atomically: a killed run continues with the next subject.
"""

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
from core.settings import progress, run
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
LABEL = "nsddata/freesurfer/{}/label/{}"
TRANSFORM = "nsddata/ppdata/{}/transforms/{}.white-to-fsaverage.mgz"
NOTE = "prepare_nsd.json"  # in each subject's folder: settings and counts


def choose_subjects(root, subjects, n_sessions):
    """{name: number of sessions} of the subjects asked for, or of all whose betas are there."""
    present = sorted(path.name for path in Path(root).glob("nsddata_betas/ppdata/subj0[1-8]"))
    names = sorted(subjects.replace(",", " ").split()) or present or EVERYBODY
    if set(names) - set(EVERYBODY):
        raise UserError(f"SUBJECTS is {subjects}, expected some of subj01 to subj08.")
    return {name: n_sessions[EVERYBODY.index(name)] for name in names}


def survey(root, n_sessions, n_trials, labels=True):
    """Check all input files before the hours of work -> {name: nsd ids shown (n_sessions, n_trials)}, nsd ids of the
    shared pictures (n,); both from 0.

    n_sessions: {name: number}; n_trials: per session; labels: whether ROIs and ncsnr are needed.
    """
    betas, others = [], [STIMULI, DESIGN, *map(MASK.format, HEMIS)]
    for name, n in n_sessions.items():
        betas += [BETAS.format(name, hemi, session) for session in range(1, n + 1) for hemi in HEMIS]
        if labels:
            others += [path.format(name, hemi) for path in (NCSNR, TRANSFORM) for hemi in HEMIS]
            others += [LABEL.format(name, f"{hemi}.{group}.mgz") for group in ROI_GROUPS for hemi in HEMIS]
            others += [LABEL.format(name, f"{group}.mgz.ctab") for group in ROI_GROUPS]
    check_files(root, others, betas, n_trials)
    content = scipy.io.loadmat(Path(root) / DESIGN)
    order, pictures, shared = (content[name].astype(np.int64) for name in ("masterordering", "subjectim", "sharedix"))
    if min(order.min(), pictures.min(), shared.min()) < 1:
        raise UserError(f"{DESIGN} counts from 0, expected NSD's numbers from 1.")
    planned = dict(zip(EVERYBODY, pictures[:, order.ravel() - 1] - 1))  # sessions never acquired included
    shown = {name: planned[name][: n * n_trials].reshape(n, n_trials) for name, n in n_sessions.items()}
    return shown, shared.ravel() - 1


def check_files(root, others, betas=(), n_trials=None):
    """Raise UserError with the bucket path of each file that is missing below root, and for betas that do not have
    exactly n_trials: all later trials would get the wrong pictures."""
    missing = [path for path in [*others, *betas] if not (Path(root) / path).is_file()]
    if missing:
        listed = "\n".join(f"  s3://natural-scenes-dataset/{path}" for path in missing)
        raise UserError(f"{root} lacks {len(missing)} files; download them to the same paths below it:\n{listed}")
    for path in [Path(root) / path for path in betas]:
        header, n_bytes = np.fromfile(path, ">i4", 6).tolist(), path.stat().st_size
        if header != [1, N_FSAVERAGE, 1, 1, n_trials, 3] or n_bytes < MGH_HEADER + 4 * N_FSAVERAGE * n_trials:
            raise UserError(f"{path} does not have {n_trials} trials (TRIALS_PER_SESSION): download it again.")


def read_trials(path, n_trials, vertices):
    """Betas of a session, percent signal change: (n_trials, len(vertices)) float32."""
    betas = np.memmap(path, ">f4", "r", MGH_HEADER, (n_trials, N_FSAVERAGE))
    return np.array(betas[:, vertices], np.float32)


def zscore(betas):
    """betas (n_trials, n_vertices) float32 of a session, z-scored in place over the trials: in float64, with the
    population deviation. NaN stays NaN; a constant vertex becomes 0, as with the organisers' StandardScaler."""
    y = betas.astype(np.float64)
    y -= y.mean(0)
    y /= np.where((betas == betas[0]).all(0), 1, y.std(0))
    betas[:] = y


def read_surface(path):
    """Values per vertex of an MGH or MGZ file: (n_vertices,)."""
    return np.asarray(nibabel.load(path).dataobj).ravel()


def read_mask(root, rsc_dir):
    """{hemi: fsaverage vertices (n,)} of nsdgeneral and, if rsc_dir is given, the retrosplenial mask."""
    vertices = {}
    for hemi in HEMIS:
        inside = read_surface(Path(root) / MASK.format(hemi)) > 0  # outside it is 0 or -1
        if rsc_dir:
            inside |= read_surface(Path(rsc_dir) / f"{hemi}.nsdgeneralRSC.mgz") > 0
        vertices[hemi] = np.flatnonzero(inside)
    if not rsc_dir:
        print("RSC_DIR is empty: the challenge has 1,564 more vertices, so scores are not comparable")
    return vertices


def read_labels(root, name, group):
    """{hemi: labels on fsaverage (163842,) int64}, {label: ROI name} of one subject."""
    labels = {}
    for hemi in HEMIS:
        native = read_surface(Path(root) / LABEL.format(name, f"{hemi}.{group}.mgz"))
        index = read_surface(Path(root) / TRANSFORM.format(name, hemi)).astype(np.int64)
        if index.min() < 1 or len(index) != N_FSAVERAGE:
            raise UserError(f"{TRANSFORM.format(name, hemi)}: expected {N_FSAVERAGE} vertices, counted from 1.")
        labels[hemi] = native[index - 1].astype(np.int64)
    table = np.loadtxt(Path(root) / LABEL.format(name, f"{group}.mgz.ctab"), str, usecols=(0, 1), ndmin=2).tolist()
    return labels, {int(label): roi for label, roi in table}


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


def average_betas(root, name, hemi, vertices, rows, bar):
    """Mean z-scored activity of each row, and which vertices are NaN in any trial: (n_rows, n_vertices) float32,
    (n_vertices,) bool."""
    n_showings = np.bincount(rows[rows >= 0])
    means = np.zeros((len(n_showings), len(vertices)), np.float32)
    missing = np.zeros(len(vertices), bool)
    for session, session_rows in enumerate(rows, start=1):
        betas = read_trials(Path(root) / BETAS.format(name, hemi, session), len(session_rows), vertices)
        missing |= np.isnan(betas).any(0)
        zscore(betas)
        used = session_rows >= 0
        np.add.at(means, session_rows[used], betas[used])
        bar.update()
    means /= n_showings[:, None].astype(np.float32)
    return means, missing


def write_subject(root, name, shown, shared, mask, folder):
    """Write one subject's challenge folder -> its row of CHALLENGE."""
    training, test, rows = split_trials(name, shown, shared)
    n_showings = np.bincount(rows[rows >= 0])[len(training) :]  # of the test pictures
    labels = {group: read_labels(root, name, group) for group in ROI_GROUPS}
    counts = {"sessions": len(rows), "training pictures": len(training), "test pictures": len(test)}
    for part in ("training_split/training_images", "training_split/training_fmri", "test_split/test_images",
                 "test_split/test_fmri", "test_split/noise_ceiling", "roi_masks"):  # fmt: skip
        (folder / part).mkdir(parents=True)
    for ids, split, prefix in ((training, "training", "train"), (test, "test", "test")):
        images = folder / f"{split}_split/{split}_images"
        outputs = [images / f"{prefix}-{row:04d}_nsd-{i:05d}.png" for row, i in enumerate(ids, start=1)]
        write_pictures(Path(root) / STIMULI, ids, outputs)
    with progress(total=len(HEMIS) * len(rows), desc=f"{name}: betas", unit="session") as bar:
        for hemi in HEMIS:
            means, missing = average_betas(root, name, hemi, mask[hemi], rows, bar)
            vertices = mask[hemi][~missing]
            counts[f"{hemi} vertices"] = len(vertices)
            activity = means[:, ~missing]
            np.save(folder / f"training_split/training_fmri/{hemi}_training_fmri.npy", activity[: len(training)])
            if len(test):
                np.save(folder / f"test_split/test_fmri/{hemi}_test_fmri.npy", activity[len(training) :])
                signal = read_surface(Path(root) / NCSNR.format(name, hemi))[vertices].astype(np.float64) ** 2
                ceiling = signal / (signal + np.mean(1 / n_showings))
                np.save(folder / f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy", ceiling)
            inside = np.bincount(vertices, minlength=N_FSAVERAGE)
            np.save(folder / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy", inside)
            for group, (areas, _) in labels.items():
                np.save(folder / f"roi_masks/{hemi}.{group}_fsaverage_space.npy", areas[hemi] * inside)
                np.save(folder / f"roi_masks/{hemi}.{group}_challenge_space.npy", areas[hemi][vertices])
    for group, (_, names) in labels.items():
        np.save(folder / f"roi_masks/mapping_{group}.npy", names)  # a pickled dict, as in the challenge
    return counts


def write_pictures(path, rows, outputs, side=425):
    """PNGs of the central side x side px of pictures in an HDF5 file. rows: which; outputs: paths of the PNGs."""

    def write(row, output):
        picture = file["imgBrick"][row]
        top, left = (np.array(picture.shape[:2]) - side) // 2
        Image.fromarray(picture[top : top + side, left : left + side].copy()).save(output)

    with (
        h5py.File(path, locking=False) as file,  # network file systems may have no locks
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
    ):
        list(progress(pool.map(write, rows, outputs), total=len(outputs), desc="pictures", unit="picture"))


def main():
    output, notes = Path(CHALLENGE_DIR), {}
    settings = {"n_trials": TRIALS_PER_SESSION, "retrosplenial": bool(RSC_DIR)}
    todo = choose_subjects(NSD_DIR, SUBJECTS, N_SESSIONS)
    for name in [name for name in todo if (output / name).exists() and not OVERWRITE]:
        path, expected = output / name / NOTE, settings | {"sessions": todo.pop(name)}
        notes[name] = json.loads(path.read_text()) if path.exists() else {}
        if expected.items() - notes[name].items():
            raise UserError(f"{path.parent} was made with {notes[name]}, not {expected}: choose another CHALLENGE_DIR.")
        print(f"{path.parent} is finished already")
    shown, shared = survey(NSD_DIR, todo, TRIALS_PER_SESSION) if todo else ({}, [])
    mask = read_mask(NSD_DIR, RSC_DIR) if todo else {}
    with lock(output):
        for name in todo:
            with output_folder(output / name, overwrite=OVERWRITE, marker=NOTE) as folder:
                notes[name] = settings | write_subject(NSD_DIR, name, shown[name], shared, mask, folder)
                (folder / NOTE).write_text(json.dumps(notes[name]))
    challenge = pd.DataFrame(CHALLENGE, EVERYBODY).add_suffix(" (challenge)")
    print(pd.DataFrame(notes).T[list(CHALLENGE)].join(challenge).sort_index().T.to_string())


if __name__ == "__main__":
    run(main, globals())
