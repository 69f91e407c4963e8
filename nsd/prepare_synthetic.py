"""NSD-synthetic -> held-out activity out of distribution, in the challenge's layout: python -m nsd.prepare_synthetic

From the raw release in NSD_DIR, for subjects and vertices of CHALLENGE_DIR, OUTPUT_DIR/subjXX gets the test_split and
the roi_masks of a challenge folder. python -m tools.evaluate --split challenge --challenge_dir OUTPUT_DIR scores it.

    pictures   284, cropped to the central 714 x 714 px: the 8.4 degrees that NSD's pictures filled; ids from 73,000
    activity   each vertex z-scored over the session's trials, then averaged over a picture's trials; NaN ignored
    ceiling    ncsnr^2 / (ncsnr^2 + m), m the mean over pictures of 1 / n_i, n_i the showings of picture i;
               ncsnr^2 = max(variance - noise, 0) / noise, noise = sum_i var_i (n_i - 1) / sum_i (n_i - 1)
"""

import json
import shutil
from pathlib import Path

import numpy as np
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
    """betas (n_trials, n_vertices), picture (n_trials,) from 0 -> mean z-scored activity (n_pictures, n_vertices)
    float32, noise ceiling (n_vertices,); both 0 where a vertex is constant or NaN."""
    present = ~np.isnan(betas)
    n = np.maximum(present.sum(0), 1)
    y = np.where(present, betas, 0).astype(np.float64)
    y = np.where(present, y - y.sum(0) / n, 0)
    deviation = np.sqrt(np.square(y).sum(0) / n)
    y /= np.where(deviation > 0, deviation, 1)
    shows = (picture == np.arange(picture.max() + 1)[:, None]).astype(np.float64)  # (n_pictures, n_trials)
    n_showings = shows @ present
    mean = shows @ y / np.maximum(n_showings, 1)
    within = (np.square(y - mean[picture]) * present).sum(0)
    noise = within / np.maximum(np.maximum(n_showings - 1, 0).sum(0), 1)
    signal = np.maximum(np.square(y).sum(0) / np.maximum(n - 1, 1) - noise, 0)
    ceiling = signal / np.where(signal > 0, signal + noise * np.mean(1 / shows.sum(1)), 1)
    return mean.astype(np.float32), ceiling


def write_subject(root, name, picture, masks, folder):
    """One subject's folder. picture (n_trials,): which one each trial shows, from 0; masks: roi_masks to copy."""
    (folder / NOTE).write_text(json.dumps({"n_trials": len(picture)}))
    shutil.copytree(masks, folder / "roi_masks")
    for part in ("test_images", "test_fmri", "noise_ceiling"):
        (folder / "test_split" / part).mkdir(parents=True)
    ids = FIRST_ID + np.arange(N_SHARED + N_OWN)
    ids[N_SHARED:] += N_OWN * prepare_nsd.EVERYBODY.index(name)  # nobody else's
    images = folder / "test_split/test_images"
    outputs = [images / f"test-{row:04d}_nsd-{i:05d}.png" for row, i in enumerate(ids, start=1)]
    prepare_nsd.write_pictures(root / STIMULI, range(N_SHARED), outputs[:N_SHARED], side=714)
    prepare_nsd.write_pictures(root / OWN_STIMULI.format(name), range(N_OWN), outputs[N_SHARED:], side=714)
    for hemi in HEMIS:
        vertices = np.flatnonzero(np.load(masks / f"{hemi}.all-vertices_fsaverage_space.npy"))
        betas = prepare_nsd.read_trials(root / BETAS.format(name, hemi), len(picture), vertices)
        activity, ceiling = average_trials(betas, picture)
        np.save(folder / f"test_split/test_fmri/{hemi}_test_fmri.npy", activity)
        np.save(folder / f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy", ceiling)
        print(f"{name} {hemi}: {len(vertices)} vertices, median noise ceiling {np.median(ceiling):.3f}")


def main():
    root, names = Path(prepare_nsd.NSD_DIR), [s.name for s in prepare_data.read_folder(CHALLENGE_DIR, SUBJECTS)]
    betas = [BETAS.format(name, hemi) for name in names for hemi in HEMIS]
    prepare_nsd.check_files(root, [DESIGN, STIMULI, *map(OWN_STIMULI.format, names)], betas, TRIALS_PER_SESSION)
    picture = scipy.io.loadmat(root / DESIGN)["masterordering"].ravel().astype(np.int64) - 1
    if (len(picture), picture.min(), picture.max()) != (TRIALS_PER_SESSION, 0, N_SHARED + N_OWN - 1):
        raise UserError(f"{DESIGN} does not list {TRIALS_PER_SESSION} trials of pictures 1 to {N_SHARED + N_OWN}.")
    for name in names:
        with output_folder(Path(OUTPUT_DIR) / name, overwrite=OVERWRITE, marker=NOTE) as folder:
            write_subject(root, name, picture, Path(CHALLENGE_DIR) / name / "roi_masks", folder)


if __name__ == "__main__":
    run(main, globals())
