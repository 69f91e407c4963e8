"""Raw NSD -> challenge folder, NSD-Flat in and out, NSD-synthetic. A small release is simulated in the released
formats; the scripts' results are compared with an independent derivation, trial by trial and vertex by vertex."""

import csv
import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
from PIL import Image
from sklearn.preprocessing import StandardScaler

import prepare_data
from core.space import HEMIS, N_FSAVERAGE, ROI_GROUPS
from model import UserError
from nsd import coco, export_flat, prepare_flat, prepare_nsd, prepare_synthetic

N_NATIVE, N_STIMULI = 700, 73000
N_PICTURES, N_SHARED = 30, 12  # that a simulated subject was to see, three times each
N_TRIALS = 12  # in a session
ACQUIRED = {1: 6, 3: 5}  # sessions of subj01 and subj03; 90 trials were planned
N_SESSIONS = (6, 40, 5, 30, 40, 32, 40, 30)
FINISHED = {1: True, 3: False}  # whether a subject saw every shared picture three times
BETAS = "nsddata_betas/ppdata/subj{:02d}/fsaverage/betas_fithrf_GLMdenoise_RR"
DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
BRICK = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
LEVEL = 5 / 255  # of the activity in NSD-Flat


def run(script, **constants):
    """The script's real main() with these constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(script, name, str(value) if isinstance(value, Path) else value)
        script.main()


# ---- simulated raw NSD --------------------------------------------------------------------------


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
    order = rng.permutation(np.repeat(np.arange(N_PICTURES), 3))
    late = np.arange(3 * N_TRIALS, 5 * N_TRIALS)  # in the last three sessions of both subjects
    free = {"late": rng.permutation(late).tolist(), "never": rng.permutation(np.arange(6 * N_TRIALS, 90)).tolist()}
    # shared with all showings there, shared with two, own pictures with two, with one and never shown
    for picture, n_late in ((2, 3), (5, 2), (N_SHARED, 2), (N_SHARED + 1, 1), (N_SHARED + 2, 0)):
        for i, spot in enumerate(np.flatnonzero(order == picture)):
            target = free["late" if i < n_late else "never"].pop()
            order[[spot, target]] = order[[target, spot]]
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
            if session == ACQUIRED[number] and (number, hemi) == (3, "rh"):
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
    """The csv of 41 columns, planned trials that were never acquired included."""
    names = ["", "cocoId", "cocoSplit", "cropBox", "loss", "nsdId", "flagged", "BOLD5000", "shared1000"]
    names += [f"subject{s}" for s in range(1, 9)] + [f"subject{s}_rep{r}" for s in range(1, 9) for r in range(3)]
    shared = set(subjectim[0, :N_SHARED].tolist())
    columns = [{i: c for c, i in enumerate(row)} for row in subjectim.tolist()]
    with open(root / INFO, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for i in range(N_STIMULI):
            crop = (0, 0, 0.125, 0.125) if i % 2 else (0.1, 0.15, 0, 0)  # wide and tall pictures
            row = [i, 1000 + i, "train2017" if i % 5 else "val2017", crop, 0.0, i, i % 7 == 0, i % 3 == 0, i in shared]
            row += [int(i in column) for column in columns]
            for column in columns:
                row += [*(1 + np.flatnonzero(order == column[i]))] if i in column else [0, 0, 0]
            writer.writerow(row)


def simulate_coco(folder, nsd_ids, rng):
    folder.mkdir()
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"}, {"id": 88, "name": "bear", "supercategory": "toy"},
    ]  # fmt: skip
    for split, is_val in (("train2017", False), ("val2017", True)):
        images, instances, captions = [], [], []
        for i in [i for i in nsd_ids if (i % 5 == 0) == is_val]:
            height, width = (480, 640) if i % 2 else (640, 480)
            images.append({"id": 1000 + i, "height": height, "width": width})
            for k in range(i % 4):
                x, y = rng.uniform(0, width - 60), rng.uniform(0, height - 60)
                outline = [[x, y, x + 50, y + 3, x + 44, y + 51, x + 7, y + 40]]
                if k == 1:  # two parts, the first where nothing was shown
                    outline = [[1, 1, 9, 1, 9, 9], *outline]
                if k == 2:
                    runs = [height * 200 + 30, 100] + [height - 100, 100] * 90
                    outline = {"size": [height, width], "counts": [*runs, height * width - sum(runs)]}
                instances.append(dict(id=k, image_id=1000 + i, category_id=(1, 88)[k % 2], iscrowd=int(k == 2), area=1.0,
                                      bbox=[x, y, 50, 51], segmentation=outline))  # fmt: skip
            captions += [dict(id=k, image_id=1000 + i, caption=f"{k} of {1000 + i}") for k in range(5)]
        content = dict(images=images, annotations=instances, categories=categories)
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
        (folder / f"captions_{split}.json").write_text(json.dumps(dict(images=images, annotations=captions)))


def simulate_surface(folder, masks, rng):
    """Flat hemispheres as GIFTI; the masks' vertices crowd within 8 x 8 mm."""
    folder.mkdir()
    for hemi, vertices in masks.items():
        places = rng.uniform((-60, -110, 0), (35, 90, 0), (N_FSAVERAGE, 3)).astype(np.float32)
        places[vertices, :2] = rng.uniform((0, -20), (8, -12), (len(vertices), 2))
        arrays = [nibabel.gifti.GiftiDataArray(places, intent="NIFTI_INTENT_POINTSET"),
                  nibabel.gifti.GiftiDataArray(np.array([[0, 1, 2]], np.int32), intent="NIFTI_INTENT_TRIANGLE")]  # fmt: skip
        nibabel.save(nibabel.gifti.GiftiImage(darrays=arrays), folder / f"flat_{hemi}.gii")


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


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    simulate(folder)
    return folder


def settings(release, **values):
    return dict(NSD_DIR=release / "nsd", RSC_DIR=release / "rsc", N_SESSIONS=N_SESSIONS, TRIALS_PER_SESSION=N_TRIALS) | values


# ---- an independent derivation ------------------------------------------------------------------


def read_surface(path):
    return nibabel.load(path).get_fdata().squeeze()


def plain_zscore(column):
    """Population z-scores of a list of numbers, zeros if all are the same."""
    mean = math.fsum(column) / len(column)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column))
    return [0.0 if len(set(column)) == 1 else (x - mean) / deviation for x in column]


def plain_trials(release, number):
    """Trial by trial: [nsd id], [in the last three sessions], {hemi: (n_trials, n) z-scores}, {hemi: vertices}."""
    root, design = release / "nsd", scipy.io.loadmat(release / "nsd" / DESIGN)
    z, vertices = {}, {}
    for hemi in HEMIS:
        inside = read_surface(root / f"nsddata/freesurfer/fsaverage/label/{hemi}.nsdgeneral.mgz") == 1
        inside |= read_surface(release / f"rsc/{hemi}.nsdgeneralRSC.mgz") == 1
        mask, series = np.flatnonzero(inside), []
        for session in range(1, ACQUIRED[number] + 1):
            image = nibabel.load(root / BETAS.format(number) / f"{hemi}.betas_session{session:02d}.mgh")
            series.append([plain_zscore(image.dataobj[v, 0, 0].tolist()) for v in mask])
        series = np.concatenate(series, axis=1).T
        complete = ~np.isnan(series).any(0)
        z[hemi], vertices[hemi] = series[:, complete], mask[complete]
    columns = design["masterordering"][0, : len(series)].astype(int)
    ids = [int(design["subjectim"][number - 1, column - 1]) - 1 for column in columns]
    return ids, [t >= (ACQUIRED[number] - 3) * N_TRIALS for t in range(len(ids))], z, vertices


def plain_pictures(release, number, ids, held):
    """Training and test pictures, each sorted."""
    shared = set((scipy.io.loadmat(release / "nsd" / DESIGN)["sharedix"][0] - 1).tolist())
    training = sorted({i for i, h in zip(ids, held) if not h})
    candidates = sorted(set(ids) - set(training))
    return training, [i for i in candidates if i not in shared or (FINISHED[number] and ids.count(i) == 3)]


def plain_folder(release, number):
    """{path: array} of a subject's challenge folder, {path: nsd id} of its pictures."""
    root = release / "nsd"
    ids, held, z, vertices = plain_trials(release, number)
    training, test = plain_pictures(release, number, ids, held)
    arrays, pictures = {}, {}
    for hemi in HEMIS:
        for split, chosen, late in (("training", training, False), ("test", test, True)):
            rows = [np.mean([y for y, i, h in zip(z[hemi], ids, held) if (i, h) == (c, late)], axis=0) for c in chosen]
            arrays[f"{split}_split/{split}_fmri/{hemi}_{split}_fmri.npy"] = np.array(rows)
        m = sum(1 / ids.count(i) for i in test) / len(test)
        ncsnr = read_surface(root / BETAS.format(number) / f"{hemi}.ncsnr.mgh")[vertices[hemi]]
        arrays[f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy"] = np.array([s**2 / (s**2 + m) for s in ncsnr])
        inside = np.isin(np.arange(N_FSAVERAGE), vertices[hemi]).astype(int)
        arrays[f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy"] = inside
        index = read_surface(root / f"nsddata/ppdata/subj{number:02d}/transforms/{hemi}.white-to-fsaverage.mgz")
        for group in ROI_GROUPS:
            native = read_surface(root / f"nsddata/freesurfer/subj{number:02d}/label/{hemi}.{group}.mgz")
            labels = [int(native[int(index[v]) - 1]) for v in vertices[hemi]]
            arrays[f"roi_masks/{hemi}.{group}_challenge_space.npy"] = np.array(labels)
            on_fsaverage = np.zeros(N_FSAVERAGE, int)
            on_fsaverage[vertices[hemi]] = labels
            arrays[f"roi_masks/{hemi}.{group}_fsaverage_space.npy"] = on_fsaverage
    for split, short, chosen in (("training", "train", training), ("test", "test", test)):
        for row, i in enumerate(chosen, start=1):
            pictures[f"{split}_split/{split}_images/{short}-{row:04d}_nsd-{i:05d}.png"] = i
    return arrays, pictures


# ---- raw NSD -> challenge folder ----------------------------------------------------------------


@pytest.fixture(scope="module")
def challenge(release):
    run(prepare_nsd, **settings(release, CHALLENGE_DIR=release / "challenge"))
    return release / "challenge"


@pytest.mark.parametrize("number", ACQUIRED)
def test_challenge_folder_is_the_derivation(number, release, challenge):
    folder = challenge / f"subj{number:02d}"
    arrays, pictures = plain_folder(release, number)
    mappings = {f"roi_masks/mapping_{group}.npy" for group in ROI_GROUPS}
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {*arrays, *pictures, *mappings, "prepare_nsd.json"}
    for name, expected in arrays.items():
        result = np.load(folder / name)
        assert result.dtype == (np.float32 if "_fmri.npy" in name else np.float64 if "ceiling" in name else np.int64)
        if "_fmri" in name:
            assert (result[:, (expected == 0).all(0)] == 0).all(), name  # constant vertices
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 if "fmri" in name else 1e-15, err_msg=name)
    with h5py.File(release / "nsd" / BRICK) as file:
        for name, i in pictures.items():
            assert (np.asarray(Image.open(folder / name)) == file["imgBrick"][i]).all(), name
    for group in ROI_GROUPS:
        mapping = np.load(folder / f"roi_masks/mapping_{group}.npy", allow_pickle=True).item()
        assert mapping == {0: "Unknown", 1: f"{group}-a", 2: f"{group}-b", 3: f"{group}-c"}


def test_simulation_has_the_special_cases(release):
    """The comparison above is worth as much as what occurs in it."""
    design = scipy.io.loadmat(release / "nsd" / DESIGN)
    shared = set((design["sharedix"][0] - 1).tolist())
    for number in ACQUIRED:
        ids, held, z, vertices = plain_trials(release, number)
        training, test = plain_pictures(release, number, ids, held)
        late = [i for i, h in zip(ids, held) if h]
        assert set(training) & set(late)  # pictures across the boundary
        assert set(late) - set(training) - set(test)  # shared ones that are left out
        assert {late.count(i) for i in test} >= {1, 2}
        assert bool(shared & set(test)) == FINISHED[number] and any(late.count(i) == 3 for i in shared - set(training))
        assert [len(v) for v in vertices.values()] == ([46, 38] if number == 1 else [44, 37])
    path = release / "nsd" / BETAS.format(1) / "lh.betas_session02.mgh"
    betas = nibabel.load(path).get_fdata()[vertices["lh"], 0, 0].T  # the organisers' scaler
    expected, result = StandardScaler().fit_transform(betas), betas.astype(np.float32)
    prepare_nsd.zscore(result)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    assert (result == 0).all(0).sum() == 2


def test_prepare_data_reads_the_folder(challenge, tmp_path):
    run(prepare_data, CHALLENGE_DIR=challenge, DATA_DIR=tmp_path)
    space = prepare_data.load(tmp_path).space
    assert space.subjects == ["subj01", "subj03"] and space.mask.sum(1).tolist() == [84, 81]
    assert set(space.rois) == set(ROI_GROUPS)
