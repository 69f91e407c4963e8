"""NSD-synthetic -> held-out activity out of distribution, in the challenge's layout: python -m nsd.prepare_synthetic

From the raw release in NSD_DIR, for subjects and vertices of CHALLENGE_DIR, OUTPUT_DIR/subjXX gets the test_split and
the roi_masks of a challenge folder. python -m tools.evaluate --split challenge --challenge_dir OUTPUT_DIR scores it.

    activity   each vertex z-scored over the session's trials, then averaged over a picture's trials; NaN ignored
    ceiling    ncsnr^2 / (ncsnr^2 + m), m the mean over pictures of 1 / n_i, n_i the showings of picture i;
               ncsnr^2 = max(variance - noise, 0) / noise, noise = sum_i var_i (n_i - 1) / sum_i (n_i - 1)
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io

import prepare_data
from core.files import output_folder
from core.settings import run
from core.space import HEMIS
from model import UserError
from nsd import prepare_nsd

CHALLENGE_DIR: str = prepare_data.CHALLENGE_DIR  # says which vertices each subject has
OUTPUT_DIR: str = "synthetic"  # output: subj01 ... with test_split and roi_masks
SUBJECTS: str = ""  # such as subj01,subj05; empty: all in CHALLENGE_DIR
TRIALS_PER_SESSION: int = 744  # fewer only in miniature data
OVERWRITE: bool = False  # prepare subjects again that are in OUTPUT_DIR already
SHARED = prepare_nsd, "NSD_DIR"  # set there

N_SHARED, N_OWN = 220, 64  # pictures of all subjects, of one alone
FIRST_ID = 73000  # ids below are NSD's own
DESIGN = "nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"
STIMULI = "nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_stimuli.hdf5"
OWN_STIMULI = "nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_colorstimuli_{}.hdf5"
BETAS = "nsddata_betas/ppdata/{}/fsaverage/nsdsyntheticbetas_fithrf_GLMdenoise_RR/{}.betas_nsdsynthetic.mgh"
NOTE = "prepare_synthetic.json"


def average_trials(betas, picture):
    """betas (n_trials, n_vertices), picture (n_trials,) from 0, each shown -> mean z-scored activity (n_pictures,
    n_vertices) float32, noise ceiling (n_vertices,); both 0 where a vertex is constant or NaN."""
    y = pd.DataFrame(betas, dtype=np.float64)
    y = (y - y.mean()) / y.std(ddof=0).replace(0, 1)
    by_picture = y.groupby(picture)
    mean, n_showings = by_picture.mean(), by_picture.count()  # pandas ignores NaN
    noise = (by_picture.var() * (n_showings - 1)).sum() / (n_showings - 1).clip(lower=0).sum()
    signal = (y.var() - noise).clip(lower=0)
    ceiling = signal / (signal + noise * np.mean(1 / np.bincount(picture)))
    return mean.fillna(0).to_numpy(np.float32), ceiling.fillna(0).to_numpy()


def write_subject(name, picture, masks, folder):
    """One subject's folder. picture (n_trials,): which one each trial shows, from 0; masks: roi_masks to copy.
    The central 714 px are the 8.4 degrees that NSD's pictures filled."""
    (folder / NOTE).write_text(json.dumps({"n_trials": len(picture)}))
    shutil.copytree(masks, folder / "roi_masks")
    for part in ("test_images", "test_fmri", "noise_ceiling"):
        (folder / "test_split" / part).mkdir(parents=True)
    ids = FIRST_ID + np.arange(N_SHARED + N_OWN)
    ids[N_SHARED:] += N_OWN * prepare_nsd.EVERYBODY.index(name)  # nobody else's
    outputs = [folder / f"test_split/test_images/test-{row:04d}_nsd-{i:05d}.png" for row, i in enumerate(ids, 1)]
    prepare_nsd.write_pictures(STIMULI, range(N_SHARED), outputs[:N_SHARED], side=714)
    prepare_nsd.write_pictures(OWN_STIMULI.format(name), range(N_OWN), outputs[N_SHARED:], side=714)
    for hemi in HEMIS:
        vertices = np.flatnonzero(np.load(masks / f"{hemi}.all-vertices_fsaverage_space.npy"))
        betas = prepare_nsd.read_trials(BETAS.format(name, hemi), len(picture), vertices)
        activity, ceiling = average_trials(betas, picture)
        np.save(folder / f"test_split/test_fmri/{hemi}_test_fmri.npy", activity)
        np.save(folder / f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy", ceiling)
        print(f"{name} {hemi}: {len(vertices)} vertices, median noise ceiling {np.median(ceiling):.3f}")


def main():
    names = [subject.name for subject in prepare_data.read_folder(CHALLENGE_DIR, SUBJECTS)]
    betas = [BETAS.format(name, hemi) for name in names for hemi in HEMIS]
    prepare_nsd.check_files([DESIGN, STIMULI, *map(OWN_STIMULI.format, names)], betas, TRIALS_PER_SESSION)
    picture = scipy.io.loadmat(Path(prepare_nsd.NSD_DIR) / DESIGN)["masterordering"].ravel().astype(np.int64) - 1
    if len(picture) != TRIALS_PER_SESSION or set(picture) != set(range(N_SHARED + N_OWN)):
        raise UserError(f"{DESIGN} does not list {TRIALS_PER_SESSION} trials of pictures 1 to {N_SHARED + N_OWN}.")
    for name in names:
        with output_folder(Path(OUTPUT_DIR) / name, overwrite=OVERWRITE, marker=NOTE) as folder:
            write_subject(name, picture, Path(CHALLENGE_DIR) / name / "roi_masks", folder)


if __name__ == "__main__":
    run(main, globals())
