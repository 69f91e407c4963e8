"""A small raw NSD release in the released formats: big-endian MGH, 1-based MATLAB arrays, HDF5, MGZ labels, csv, COCO's
JSON and GIFTI. simulate(folder) writes nsd, rsc, coco and surface below folder."""

import csv
import json
import struct

import h5py
import nibabel
import numpy as np
import scipy.io
from PIL import Image

from core.space import N_FSAVERAGE, ROI_GROUPS

N_NATIVE, N_STIMULI = 700, 73000
N_PICTURES, N_SHARED = 30, 12  # that a simulated subject was to see, three times each
N_TRIALS = 12  # in a session
ACQUIRED = {1: 6, 3: 5}  # sessions of subj01 and subj03; 90 trials were planned
N_SESSIONS = (6, 40, 5, 30, 40, 32, 40, 30)
BETAS = "nsddata_betas/ppdata/subj{:02d}/fsaverage/betas_fithrf_GLMdenoise_RR"
DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
BRICK = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"


def write_mgh(path, values, n_trials=N_TRIALS):
    """values {fsaverage vertex: (n_trials,)}, zero elsewhere; float32 MGH with a footer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack(">7i", 1, N_FSAVERAGE, 1, 1, n_trials, 3, 0).ljust(284, b"\0"))
        file.truncate(284 + 4 * N_FSAVERAGE * n_trials + 20)  # holes: zeros that take no disk
    mapped = np.memmap(path, ">f4", "r+", offset=284, shape=(n_trials, N_FSAVERAGE))
    for vertex, series in values.items():
        mapped[:, vertex] = series


def write_surface(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.MGHImage(values.reshape(-1, 1, 1), np.eye(4)), path)


def simulate_design(root, rng):
    """-> nsd ids (8, n_pictures) and the columns (90,) that the planned trials show, all from 0."""
    ids = rng.permutation(N_STIMULI)
    own = ids[N_SHARED:][: 8 * (N_PICTURES - N_SHARED)].reshape(8, -1)
    subjectim = np.concatenate([np.tile(ids[:N_SHARED], (8, 1)), own], axis=1)
    late = rng.permutation(np.arange(3 * N_TRIALS, 5 * N_TRIALS)).tolist()  # in both subjects' last three sessions
    never = rng.permutation(np.arange(6 * N_TRIALS, 90)).tolist()  # planned only
    order = np.full(90, -1)
    # shared with all showings there, shared with two, own pictures with two, with one and never shown
    special = {2: 3, 5: 2, N_SHARED: 2, N_SHARED + 1: 1, N_SHARED + 2: 0}
    for picture, n_late in special.items():
        order[[late.pop() if i < n_late else never.pop() for i in range(3)]] = picture
    order[order < 0] = rng.permutation(np.repeat(np.setdiff1d(np.arange(N_PICTURES), list(special)), 3))
    (root / DESIGN).parent.mkdir(parents=True)
    design = {"masterordering": order[None] + 1.0, "subjectim": subjectim + 1.0, "sharedix": ids[None, :N_SHARED] + 1.0}
    scipy.io.savemat(root / DESIGN, design)
    return subjectim, order


def write_bricks(path, n, shape, rows, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        brick = file.create_dataset("imgBrick", (n, *shape, 3), np.uint8, chunks=(1, *shape, 3))
        for i in rows:
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            brick[i] = np.asarray(coarse.resize(shape[::-1], Image.Resampling.NEAREST))


def simulate_masks(root, rsc, rng):
    """nsdgeneral with -1 and 0 outside, and a disjoint retrosplenial mask -> {hemi: vertices of both}."""
    masks = {}
    for hemi, n in (("lh", 40), ("rh", 32)):
        chosen = rng.choice(10242, n + 6, replace=False)
        general = rng.choice([-1.0, 0.0], N_FSAVERAGE).astype(np.float32)
        general[chosen[:n]] = 1
        write_surface(root / f"nsddata/freesurfer/fsaverage/label/{hemi}.nsdgeneral.mgz", general)
        extra = np.isin(np.arange(N_FSAVERAGE), chosen[n:]).astype(np.float32)
        write_surface(rsc / f"{hemi}.nsdgeneralRSC.mgz", extra)
        masks[hemi] = np.sort(chosen)
    return masks


def simulate_subject(root, number, masks, rng):
    """Betas, ceilings, labels and transforms. One vertex is NaN in one trial, two in every trial, one is constant in a
    session, one always; outside the mask are other numbers."""
    for hemi, vertices in masks.items():
        outside = rng.choice(np.setdiff1d(np.arange(N_FSAVERAGE), vertices), 30, replace=False)
        gain, level = rng.uniform(0.5, 4, len(vertices)), rng.normal(0, 30, len(vertices))
        for session in range(1, ACQUIRED[number] + 1):
            series = level + rng.normal(0, 3) + gain * rng.standard_normal((N_TRIALS, len(vertices)))
            series[:, 5] = 1 / 3
            if session == 2:
                series[:, 7] = 0.1
            if session == 3 and (number, hemi) == (3, "rh"):
                series[N_TRIALS - 1, 9] = np.nan
            if (number, hemi) == (3, "lh"):
                series[:, [0, 20]] = np.nan
            values = dict(zip(vertices, series.T)) | dict.fromkeys(outside, np.full(N_TRIALS, 1e6))
            write_mgh(root / BETAS.format(number) / f"{hemi}.betas_session{session:02d}.mgh", values)
        ncsnr = rng.uniform(0, 2, N_FSAVERAGE).astype(np.float32)
        ncsnr[vertices[3]] = 0
        write_surface(root / BETAS.format(number) / f"{hemi}.ncsnr.mgh", ncsnr)
        native = rng.integers(1, N_NATIVE + 1, N_FSAVERAGE).astype(np.int32)
        native[vertices[:2]] = 1, N_NATIVE  # the first and the last vertex of the subject's surface
        write_surface(root / f"nsddata/ppdata/subj{number:02d}/transforms/{hemi}.white-to-fsaverage.mgz", native)
        for group in ROI_GROUPS:
            labels = rng.integers(0, 4, N_NATIVE).astype(np.float32 if group == "streams" else np.int32)
            write_surface(root / f"nsddata/freesurfer/subj{number:02d}/label/{hemi}.{group}.mgz", labels)
    for group in ROI_GROUPS:
        text = f"0 Unknown\n1 {group}-a\n2 {group}-b\n3 {group}-c\n"
        (root / f"nsddata/freesurfer/subj{number:02d}/label/{group}.mgz.ctab").write_text(text)


def simulate_info(root, subjectim, order):
    """The csv, planned trials that were never acquired included."""
    columns = [{i: c for c, i in enumerate(row)} for row in subjectim.tolist()]
    with open(root / INFO, "w", newline="") as file:
        writer = csv.writer(file)
        names = ["", "cocoId", "cocoSplit", "cropBox", "loss", "nsdId", "flagged", "BOLD5000", "shared1000"]
        writer.writerow(names + [f"subject{s}_rep{r}" for s in range(1, 9) for r in range(3)])
        for i in range(N_STIMULI):
            crop = (0, 0, 0.125, 0.125) if i % 2 else (0.1, 0.15, 0, 0)  # wide and tall pictures
            split, flags = "train2017" if i % 5 else "val2017", [i % 7 == 0, i % 3 == 0, i in subjectim[0, :N_SHARED]]
            trials = [1 + np.flatnonzero(order == column[i]) if i in column else (0, 0, 0) for column in columns]
            writer.writerow([i, 1000 + i, split, crop, 0.0, i, *flags, *np.concatenate(trials)])


def simulate_coco(folder, nsd_ids, rng):
    folder.mkdir()
    categories = [{"id": 88, "name": "bear", "supercategory": "toy"}]
    for split in ("train2017", "val2017"):
        images, instances, captions = [], [], []
        for i in [i for i in nsd_ids if (i % 5 == 0) == (split == "val2017")]:
            height, width = (480, 640) if i % 2 else (640, 480)
            images.append({"id": 1000 + i, "height": height, "width": width})
            x, y = rng.uniform(100, 300, 2)
            box = {"bbox": [x, y, 50, 40], "segmentation": [[x, y, x + 50, y, x + 50, y + 40, x, y + 40]]}
            instances += [{"id": i, "image_id": 1000 + i, "category_id": 88, "iscrowd": 0, **box}] * (i % 3)
            captions += [{"id": i, "image_id": 1000 + i, "caption": f"{k} of {1000 + i}"} for k in range(5)]
        content = {"images": images, "annotations": instances, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
        (folder / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": captions}))


def simulate_surface(folder, masks, rng):
    """Flat hemispheres as GIFTI; the masks' vertices crowd within 14 x 10 mm."""
    folder.mkdir()
    for hemi, vertices in masks.items():
        places = rng.uniform((-60, -110, 0), (35, 90, 0), (N_FSAVERAGE, 3)).astype(np.float32)
        places[vertices, :2] = rng.uniform((0, -20), (14, -10), (len(vertices), 2))
        array = nibabel.gifti.GiftiDataArray(places, intent="NIFTI_INTENT_POINTSET")
        nibabel.save(nibabel.gifti.GiftiImage(darrays=[array]), folder / f"flat_{hemi}.gii")


def simulate(folder):
    rng, root = np.random.default_rng(0), folder / "nsd"
    subjectim, order = simulate_design(root, rng)
    shown = np.unique(subjectim[[0, 2]]).tolist()
    write_bricks(root / BRICK, N_STIMULI, (425, 425), shown, rng)
    masks = simulate_masks(root, folder / "rsc", rng)
    for number in ACQUIRED:
        simulate_subject(root, number, masks, rng)
    simulate_info(root, subjectim, order)
    simulate_coco(folder / "coco", shown, rng)
    simulate_surface(folder / "surface", masks, rng)
