"""Raw NSD -> challenge folder, NSD-Flat in and out: pytest test_nsd.py. No network, no GPU.

A small raw NSD is simulated in the released formats (big-endian MGH, 1-based MATLAB arrays, HDF5, MGZ
labels, csv, COCO's JSON); what the scripts make of it is compared with a derivation of its own here,
trial by trial and vertex by vertex.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import struct
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

import coco
import evaluate
import fit_pca
import predict
import prepare_data
import prepare_flat
import prepare_nsd
import train_head
from checkpoint import load_checkpoint
from common import Problem
from shared_fixtures import both, finish, hemis, on_command_line, r2_of_vertices, run, small, start

groups = ("streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words")
n_fsaverage, n_native, n_stimuli = 163842, 700, 73000
n_pictures, n_shared = 30, 12  # that a simulated subject was to see, three times each
trials = {1: (14, 11, 9, 13, 12, 15), 3: (14, 11, 9, 13, 12)}  # of the sessions acquired; 90 trials were planned
n_sessions = (6, 40, 5, 30, 40, 32, 40, 30)  # N_SESSIONS for these two
betas_folder = "nsddata_betas/ppdata/subj{:02d}/fsaverage/betas_fithrf_GLMdenoise_RR"


# ---- simulated raw NSD --------------------------------------------------------------------------


def write_mgh(path, values):
    """values (n_trials, n_vertices of fsaverage) as {index: (n_trials,)}, zero elsewhere; float32 MGH with a footer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(next(iter(values.values())))
    with open(path, "wb") as file:
        file.write(struct.pack(">7i", 1, n_fsaverage, 1, 1, n, 3, 0).ljust(284, b"\0"))
        file.truncate(284 + 4 * n_fsaverage * n + 20)  # holes: zeros that take no disk
    mapped = np.memmap(path, ">f4", "r+", offset=284, shape=(n, n_fsaverage))
    for vertex, series in values.items():
        mapped[:, vertex] = series


def write_surface(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.MGHImage(values.reshape(-1, 1, 1), np.eye(4)), path)


def simulate_design(root, rng):
    """-> nsd ids (8, n_pictures) and the columns (n_trials,) that the planned trials show, all 0-based."""
    ids = rng.permutation(n_stimuli)
    own = ids[n_shared:][: 8 * (n_pictures - n_shared)].reshape(8, -1)
    subjectim = np.concatenate([np.tile(ids[:n_shared], (8, 1)), own], axis=1)
    order = rng.permutation(np.repeat(np.arange(n_pictures), 3))
    both = np.arange(sum(trials[1][:3]), sum(trials[3]))  # in the last three sessions of subj01 and subj03 alike
    never = np.arange(sum(trials[1]), len(order))  # planned only
    free = {"both": rng.permutation(both).tolist(), "never": rng.permutation(never).tolist()}
    # shared with all showings there, shared with two, own pictures with two, with one and never shown
    for picture, times in ((2, 3), (5, 2), (n_shared, 2), (n_shared + 1, 1), (n_shared + 2, 0)):
        for i, spot in enumerate(np.flatnonzero(order == picture)):
            target = free["both" if i < times else "never"].pop()
            order[[spot, target]] = order[[target, spot]]
    path = root / "nsddata/experiments/nsd/nsd_expdesign.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    design = {"masterordering": order[None] + 1.0, "subjectim": subjectim + 1.0, "sharedix": ids[None, :n_shared] + 1.0}
    scipy.io.savemat(path, design)
    return subjectim, order


def simulate_pictures(root, subjectim, rng):
    path = root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        brick = file.create_dataset("imgBrick", (n_stimuli, 425, 425, 3), np.uint8, chunks=(1, 425, 425, 3))
        for i in np.unique(subjectim):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            brick[i] = np.asarray(coarse.resize((425, 425), Image.Resampling.NEAREST))  # quick to compress


def simulate_masks(root, rsc, rng):
    """nsdgeneral with -1 and 0 outside, and a disjoint retrosplenial mask -> {hemi: (nsdgeneral, retrosplenial)}."""
    masks = {}
    for hemi, n in (("lh", 40), ("rh", 32)):
        chosen = rng.choice(10242, n + 6, replace=False)
        general = rng.choice([-1.0, 0.0], n_fsaverage).astype(np.float32)
        general[chosen[:n]] = 1
        extra = np.zeros(n_fsaverage, np.float32)
        extra[chosen[n:]] = 1
        write_surface(root / f"nsddata/freesurfer/fsaverage/label/{hemi}.nsdgeneral.mgz", general)
        write_surface(rsc / f"{hemi}.nsdgeneralRSC.mgz", extra)
        masks[hemi] = np.sort(chosen[:n]), np.sort(chosen[n:])
    return masks


def simulate_subject(root, number, masks, rng):
    """Betas, ceilings, labels and transforms. One vertex is NaN in one trial, one in every trial, one constant in a
    session, one the same value always; the rest of the cortex is full of other numbers."""
    folder = root / betas_folder.format(number)
    for hemi in hemis:
        vertices = np.sort(np.concatenate(masks[hemi]))
        outside = rng.choice(np.setdiff1d(np.arange(n_fsaverage), vertices), 30, replace=False)
        gain, level = rng.uniform(0.5, 4, len(vertices)), rng.normal(0, 30, len(vertices))
        for session, n in enumerate(trials[number], start=1):
            series = level + rng.normal(0, 3) + gain * rng.standard_normal((n, len(vertices)))
            series[:, 5] = 1 / 3
            if session == 2:
                series[:, 7] = 0.1
            if session == len(trials[number]) and (number, hemi) == (3, "rh"):
                series[n - 1, 9] = np.nan
            if (number, hemi) == (3, "lh"):
                series[:, [0, 20]] = np.nan
            values = dict(zip(vertices, series.T)) | dict.fromkeys(outside, np.full(n, 1e6))
            write_mgh(folder / f"{hemi}.betas_session{session:02d}.mgh", values)
        ncsnr = rng.uniform(0, 2, n_fsaverage).astype(np.float32)
        ncsnr[vertices[3]] = 0
        write_surface(folder / f"{hemi}.ncsnr.mgh", ncsnr)
        native = rng.integers(1, n_native + 1, n_fsaverage).astype(np.int32)
        native[vertices[:2]] = 1, n_native  # the first and the last vertex of the person's surface
        write_surface(root / f"nsddata/ppdata/subj{number:02d}/transforms/{hemi}.white-to-fsaverage.mgz", native)
        for group in groups:
            labels = rng.integers(0, 4, n_native).astype(np.float32 if group == "streams" else np.int32)
            write_surface(root / f"nsddata/freesurfer/subj{number:02d}/label/{hemi}.{group}.mgz", labels)
    for group in groups:
        text = "".join(f"{label} {name}\n" for label, name in enumerate(["Unknown", *(f"{group}-{i}" for i in "abc")]))
        (root / f"nsddata/freesurfer/subj{number:02d}/label/{group}.mgz.ctab").write_text(text)


def simulate_stimulus_info(root, subjectim, order):
    """The csv of 41 columns, planned trials that were never acquired included; returns {nsd id: (COCO's split, id)}."""
    names = ["", "cocoId", "cocoSplit", "cropBox", "loss", "nsdId", "flagged", "BOLD5000", "shared1000"]
    names += [f"subject{s}" for s in range(1, 9)] + [f"subject{s}_rep{r}" for s in range(1, 9) for r in range(3)]
    shared, where = set(subjectim[0, :n_shared].tolist()), {}
    columns = [{i: c for c, i in enumerate(row)} for row in subjectim.tolist()]
    with open(root / "nsddata/experiments/nsd/nsd_stim_info_merged.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for i in range(n_stimuli):
            where[i] = "val2017" if i % 5 == 0 else "train2017", 1000 + i  # wide and tall pictures
            crop = (0, 0, 0.125, 0.125) if i % 2 else (0.1, 0.15, 0, 0)
            row = [i, where[i][1], where[i][0], crop, 0.0, i, i % 7 == 0, i % 3 == 0, i in shared]
            row += [int(i in column) for column in columns]
            for column in columns:
                times = 1 + np.flatnonzero(order == column[i]) if i in column else [0, 0, 0]
                row += [*times]
            writer.writerow(row)
    return where


def simulate_coco(folder, pictures, rng):
    """pictures: {nsd id: (split, COCO id)} of those that have to be in the four files, among others."""
    folder.mkdir()
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 88, "name": "bear", "supercategory": "toy"},
    ]
    for split in ("train2017", "val2017"):
        images, instances, captions = [], [], []
        for i, (of, number) in pictures.items():
            if of != split:
                continue
            height, width = (480, 640) if i % 2 else (640, 480)
            images.append({"id": number, "height": height, "width": width, "file_name": f"{number:012d}.jpg"})
            for k in range(i % 4):
                x, y = rng.uniform(0, width - 60), rng.uniform(0, height - 60)
                outline = [[x, y, x + 50, y + 3, x + 44, y + 51, x + 7, y + 40]]
                if k == 1:  # two parts, the first where nothing was shown
                    outline = [[1, 1, 9, 1, 9, 9] if i % 2 else [1, 1, 9, 1, 9, 9], *outline]
                if k == 2:
                    runs = [height * 200 + 30, 100] + [height - 100, 100] * 90
                    outline = {"size": [height, width], "counts": [*runs, height * width - sum(runs)]}
                instances.append(dict(
                    id=10 * number + k, image_id=number, category_id=(1, 88)[k % 2], iscrowd=int(k == 2), area=1.0,
                    bbox=[x, y, 50, 51], segmentation=outline,
                ))  # fmt: skip
            captions += [dict(id=10 * number + k, image_id=number, caption=f"{k} of {number}") for k in range(5)]
        (folder / f"instances_{split}.json").write_text(
            json.dumps(dict(images=images, annotations=instances, categories=categories))
        )
        (folder / f"captions_{split}.json").write_text(json.dumps(dict(images=images, annotations=captions)))


def simulate_surface(folder, masks, rng):
    """Flat hemispheres as GIFTI, three coordinates; the masks' vertices crowd within 8 x 8 mm."""
    folder.mkdir()
    for hemi in hemis:
        places = rng.uniform((-60, -110, 0), (35, 90, 0), (n_fsaverage, 3)).astype(np.float32)
        vertices = np.concatenate(masks[hemi])
        places[vertices, :2] = rng.uniform((0, -20), (8, -12), (len(vertices), 2))
        triangles = np.array([[0, 1, 2]], np.int32)
        arrays = [
            nibabel.gifti.GiftiDataArray(places, intent="NIFTI_INTENT_POINTSET"),
            nibabel.gifti.GiftiDataArray(triangles, intent="NIFTI_INTENT_TRIANGLE"),
        ]
        nibabel.save(nibabel.gifti.GiftiImage(darrays=arrays), folder / f"flat_{hemi}.gii")


def simulate(folder, seed=0):
    rng = np.random.default_rng(seed)
    root = folder / "nsd"
    subjectim, order = simulate_design(root, rng)
    simulate_pictures(root, subjectim[[0, 2]], rng)
    masks = simulate_masks(root, folder / "rsc", rng)
    for number in trials:
        simulate_subject(root, number, masks, rng)
    where = simulate_stimulus_info(root, subjectim, order)
    simulate_coco(folder / "coco", {i: where[i] for i in np.unique(subjectim[[0, 2]]).tolist()}, rng)
    simulate_surface(folder / "surface", masks, rng)


@pytest.fixture(scope="module")
def nsd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nsd")
    simulate(folder)
    return folder


def settings(nsd, challenge, **values):
    common = dict(
        NSD_DIR=str(nsd / "nsd"), RSC_DIR=str(nsd / "rsc"), CHALLENGE_DIR=str(challenge), N_SESSIONS=n_sessions
    )
    return common | values


# ---- an independent derivation ------------------------------------------------------------------


def read_surface(path):
    return nibabel.load(path).get_fdata().squeeze()


def plain_zscore(column):
    """Population z-scores of a list of numbers, zeros where all are the same."""
    mean = math.fsum(column) / len(column)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column))
    return [0.0 if len(set(column)) == 1 else (x - mean) / deviation for x in column]


def plain_trials(root, rsc, number, n):
    """Of the first n sessions, trial by trial: [nsd id], [in the last three sessions], {hemi: (n_trials, n) z-scores},
    {hemi: fsaverage vertices}; NaN vertices left out."""
    design = scipy.io.loadmat(root / "nsddata/experiments/nsd/nsd_expdesign.mat")
    ids, held, z, vertices = [], [], {}, {}
    for hemi in hemis:
        inside = read_surface(root / f"nsddata/freesurfer/fsaverage/label/{hemi}.nsdgeneral.mgz") == 1
        inside |= read_surface(rsc / f"{hemi}.nsdgeneralRSC.mgz") == 1 if rsc else False
        mask, series = np.flatnonzero(inside), []
        for session in range(1, n + 1):
            image = nibabel.load(root / betas_folder.format(number) / f"{hemi}.betas_session{session:02d}.mgh")
            betas = image.get_fdata()[:, 0, 0, :]
            series.append([plain_zscore(betas[vertex].tolist()) for vertex in mask])
            if hemi == "lh":
                for _ in range(betas.shape[1]):
                    column = int(design["masterordering"][0, len(ids)])
                    ids.append(int(design["subjectim"][number - 1, column - 1]) - 1)
                    held.append(session > n - 3)
        series = np.concatenate(series, axis=1).T
        whole = ~np.isnan(series).any(0)
        z[hemi], vertices[hemi] = series[:, whole], mask[whole]
    return ids, held, z, vertices


def plain_pictures(ids, held, shared, finished):
    """Training and test pictures, each sorted."""
    training = sorted({i for i, h in zip(ids, held) if not h})
    test = []
    for i in sorted(set(ids) - set(training)):
        if i not in shared or (finished and ids.count(i) == 3):
            test.append(i)
    return training, test


def plain_folder(root, rsc, number, n):
    """{path: array} of everything but the pictures and the mappings, and {path: nsd id} of the pictures."""
    ids, held, z, vertices = plain_trials(root, rsc, number, n)
    shared = set((scipy.io.loadmat(root / "nsddata/experiments/nsd/nsd_expdesign.mat")["sharedix"][0] - 1).tolist())
    training, test = plain_pictures(ids, held, shared, finished=number in (1, 2, 5, 7))
    arrays, pictures = {}, {}
    for hemi in hemis:
        for split, chosen, late in (("training", training, False), ("test", test, True)):
            rows = [np.mean([y for y, i, h in zip(z[hemi], ids, held) if (i, h) == (c, late)], axis=0) for c in chosen]
            arrays[f"{split}_split/{split}_fmri/{hemi}_{split}_fmri.npy"] = np.array(rows)
        m = sum(1 / ids.count(i) for i in test) / len(test)
        ncsnr = read_surface(root / betas_folder.format(number) / f"{hemi}.ncsnr.mgh")[vertices[hemi]]
        arrays[f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy"] = np.array([s**2 / (s**2 + m) for s in ncsnr])
        inside = np.isin(np.arange(n_fsaverage), vertices[hemi]).astype(int)
        arrays[f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy"] = inside
        index = read_surface(root / f"nsddata/ppdata/subj{number:02d}/transforms/{hemi}.white-to-fsaverage.mgz")
        for group in groups:
            native = read_surface(root / f"nsddata/freesurfer/subj{number:02d}/label/{hemi}.{group}.mgz")
            labels = {v: int(native[int(index[v]) - 1]) for v in vertices[hemi]}
            arrays[f"roi_masks/{hemi}.{group}_challenge_space.npy"] = np.array(list(labels.values()))
            whole = np.zeros(n_fsaverage, int)
            whole[list(labels)] = list(labels.values())
            arrays[f"roi_masks/{hemi}.{group}_fsaverage_space.npy"] = whole
    for split, short, chosen in (("training", "train", training), ("test", "test", test)):
        for row, i in enumerate(chosen, start=1):
            pictures[f"{split}_split/{split}_images/{short}-{row:04d}_nsd-{i:05d}.png"] = i
    return arrays, pictures


# ---- raw NSD -> challenge folder ----------------------------------------------------------------


@pytest.fixture(scope="module")
def derived(nsd):
    run(prepare_nsd, **settings(nsd, nsd / "challenge"))
    return nsd / "challenge"


@pytest.mark.parametrize("number", trials)
def test_challenge_folder_is_the_derivation(number, nsd, derived):
    folder = derived / f"subj{number:02d}"
    arrays, pictures = plain_folder(nsd / "nsd", nsd / "rsc", number, n_sessions[number - 1])
    mappings = {f"roi_masks/mapping_{group}.npy" for group in groups}
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {*arrays, *pictures, *mappings, "prepare_nsd.json"}
    for name, expected in arrays.items():
        found = np.load(folder / name)
        kind = np.float32 if name.endswith("_fmri.npy") else np.float64 if "ceiling" in name else np.int64
        assert found.dtype == kind and found.shape == expected.shape, name
        assert (found[:, (expected == 0).all(0)] == 0).all() if "_fmri" in name else True, name  # constant vertices
        # means of up to three numbers, each rounded to float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 if "fmri" in name else 0, err_msg=name)
    with h5py.File(nsd / "nsd/nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        for name, i in pictures.items():
            assert (np.asarray(Image.open(folder / name)) == file["imgBrick"][i]).all(), name
    for group in groups:
        mapping = np.load(folder / f"roi_masks/mapping_{group}.npy", allow_pickle=True).item()
        assert mapping == {0: "Unknown"} | {i: f"{group}-{c}" for i, c in enumerate("abc", start=1)}


def test_simulation_holds_the_cases(nsd):
    """What the comparison above is worth depends on what occurs in it."""
    for number, finished in ((1, True), (3, False)):
        ids, held, z, vertices = plain_trials(nsd / "nsd", nsd / "rsc", number, n_sessions[number - 1])
        design = scipy.io.loadmat(nsd / "nsd/nsddata/experiments/nsd/nsd_expdesign.mat")
        shared = set((design["sharedix"][0] - 1).tolist())
        early, late = ([i for i, h in zip(ids, held) if h == side] for side in (False, True))
        training, test = plain_pictures(ids, held, shared, finished)
        assert set(early) & set(late)  # pictures across the boundary
        assert set(late) - set(early) - set(test)  # shared ones that are left out
        assert {late.count(i) for i in test} >= {1, 2}
        assert any(late.count(i) == 3 for i in shared & set(late) - set(early)) and bool(shared & set(test)) == finished
        assert len(ids) < design["masterordering"].size  # trials planned, never acquired
        assert number == 1 or set(design["subjectim"][2] - 1) - set(ids)  # pictures never shown
        assert [len(v) for v in vertices.values()] == ([46, 38] if number == 1 else [44, 37])
    for session in (1, 2):  # the constant vertices as by the scaler that the organisers use
        path = nsd / "nsd" / betas_folder.format(1) / f"lh.betas_session{session:02d}.mgh"
        betas = nibabel.load(path).get_fdata()[:, 0, 0, :].T
        columns = vertices = np.flatnonzero(betas.any(0))
        expected = StandardScaler().fit_transform(betas[:, vertices])
        found = np.array([plain_zscore(betas[:, v].tolist()) for v in columns]).T
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        assert (expected == 0).all(0).sum() == 30 + session  # outside, always, in session 2


def test_prepare_data_takes_the_folder(derived, tmp_path):
    run(prepare_data, CHALLENGE_DIR=str(derived), DATA_DIR=str(tmp_path))
    data = prepare_data.load(tmp_path)
    assert data.space.subjects == ["subj01", "subj03"] and data.space.n_vertices == 46 + 38
    assert data.space.mask.sum(1).tolist() == [84, 81] and set(data.space.rois) == set(groups)


def contents(folder):
    """{path: bytes} of the subjects in a challenge folder, without their notes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".json" and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


dies_while_encoding = """
import os, signal
from PIL import Image
saved, real = 0, Image.Image.save
def mortal(*arguments):
    global saved
    saved += 1
    return real(*arguments) if saved < {n} else os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = mortal
"""


def test_killed_run_goes_on_with_the_next_subject(nsd, derived, tmp_path):
    command = ("prepare_nsd.py", *on_command_line(settings(nsd, tmp_path)))
    n_first = len(list(derived.glob("subj01/*/*_images/*")))
    dies = dies_while_encoding.format(n=n_first + 3)
    assert finish(start(*command, before=dies))[0] == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.iterdir())] == [".lock", ".subj03.partial", "subj01"]
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("subj01/**/*")}
    code, out, err = finish(start(*command))
    assert code == 0 and "subj01 is there already" in out, err
    assert done == {p: p.stat().st_mtime_ns for p in tmp_path.glob("subj01/**/*")}
    assert contents(tmp_path) == contents(derived)


def copy_of(nsd, folder):
    """raw NSD to be damaged: links to the files, folders of its own."""
    shutil.copytree(nsd / "nsd", folder, copy_function=os.link)
    return folder


def test_everything_missing_is_told_at_once(nsd, tmp_path):
    root = copy_of(nsd, tmp_path / "nsd")
    gone = [f"{betas_folder.format(1)}/lh.betas_session06.mgh", f"{betas_folder.format(3)}/rh.ncsnr.mgh"]
    gone += [f"{betas_folder.format(3)}/{hemi}.betas_session05.mgh" for hemi in hemis]
    gone += [
        f"nsddata/freesurfer/{path}" for path in ("subj03/label/lh.floc-faces.mgz", "subj01/label/streams.mgz.ctab")
    ]
    gone += ["nsddata/freesurfer/fsaverage/label/rh.nsdgeneral.mgz", "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"]
    gone += ["nsddata/experiments/nsd/nsd_expdesign.mat", "nsddata/ppdata/subj01/transforms/rh.white-to-fsaverage.mgz"]
    for path in gone:
        (root / path).unlink()
    cut = root / betas_folder.format(1) / "rh.betas_session02.mgh"
    content = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(content[:-1000])
    output, nothing = tmp_path / "challenge", tmp_path / "nothing"
    with pytest.raises(Problem) as found:
        run(prepare_nsd, **settings(nsd, output) | dict(NSD_DIR=str(root), RSC_DIR=str(nothing)))
    lines = str(found.value).splitlines()
    listed = [line.strip().removeprefix("s3://natural-scenes-dataset/") for line in lines if line.startswith("  s3://")]
    assert sorted(listed) == sorted(gone)
    text = str(found.value)
    assert "subj01: 5 of 6 sessions are there, missing 6" in text and "subj03: 4 of 5 sessions" in text
    assert "--n_sessions 5,40,4,30" in text and "41.1 GB to download" in text and "GB of disk" in text
    assert f"{cut}: {len(content) - 1000} bytes" in text
    assert all(f"{nothing}/{hemi}.nsdgeneralRSC.mgz" in text for hemi in hemis)
    assert not output.exists()


def test_fewer_sessions_where_it_is_said(nsd, tmp_path, capsys):
    """As if the others had never been acquired: the last three of what is left are the test data."""
    root = copy_of(nsd, tmp_path / "nsd")
    for hemi in hemis:
        (root / betas_folder.format(1) / f"{hemi}.betas_session06.mgh").unlink()
    values = settings(nsd, tmp_path / "challenge", NSD_DIR=str(root), SUBJECTS="subj01", RSC_DIR="")
    with pytest.raises(Problem, match="missing 6"):
        run(prepare_nsd, **values)
    run(prepare_nsd, **values | dict(N_SESSIONS=(5,)))
    text = capsys.readouterr().out
    assert "RSC_DIR is empty: nsdgeneral alone, 40 + 32 vertices" in text and "not at full size" in text
    arrays, pictures = plain_folder(root, None, 1, 5)
    folder = tmp_path / "challenge/subj01"
    assert {str(p.relative_to(folder)) for p in folder.glob("*/*_images/*")} == set(pictures)
    for name, expected in arrays.items():
        np.testing.assert_allclose(np.load(folder / name), expected, rtol=0, atol=1e-6, err_msg=name)


def test_finished_subjects_are_not_mixed(nsd, derived, tmp_path, capsys):
    shutil.copytree(derived, tmp_path / "challenge")
    before = contents(tmp_path / "challenge")
    values = settings(nsd, tmp_path / "challenge")
    with pytest.raises(Problem, match="made with n_sessions 6, now 5.*--overwrite"):
        run(prepare_nsd, **values | dict(N_SESSIONS=(5, 40, 5)))
    with pytest.raises(Problem, match="retrosplenial True, now False"):
        run(prepare_nsd, **values | dict(RSC_DIR=""))
    root = copy_of(nsd, tmp_path / "nsd")
    run(prepare_nsd, **values | dict(NSD_DIR=str(root)))  # the same files
    assert capsys.readouterr().out.count("is there already") == 2
    (root / betas_folder.format(1) / "lh.betas_session01.mgh").unlink()
    run(prepare_nsd, **values | dict(NSD_DIR=str(root)))  # the betas may go when they are done with
    path = root / betas_folder.format(1) / "lh.betas_session01.mgh"
    path.write_bytes((root / betas_folder.format(1) / "lh.betas_session02.mgh").read_bytes())
    with pytest.raises(Problem, match="other files in NSD_DIR"):
        run(prepare_nsd, **values | dict(NSD_DIR=str(root)))
    (tmp_path / "challenge/subj01/prepare_nsd.json").unlink()  # as in the download
    with pytest.raises(Problem, match="not made by prepare_nsd.py"):
        run(prepare_nsd, **values)
    assert contents(tmp_path / "challenge") == before
    run(prepare_nsd, **values | dict(OVERWRITE=True, SUBJECTS="subj01"))
    assert contents(tmp_path / "challenge") == before


def rewrite(path, content):
    path.unlink()  # a link to the file of the others
    path.write_bytes(content)


def betas_header(**changes):
    head = dict(version=1, vertices=n_fsaverage, height=1, depth=1, trials=2, kind=3) | changes
    return struct.pack(">6i", *head.values())


@pytest.mark.parametrize(
    "path, content, message",
    [
        ("{betas}/lh.betas_session01.mgh", betas_header(vertices=10242), "not float32 MGH of shape .163842"),
        ("{betas}/lh.betas_session01.mgh", betas_header(kind=0), "not float32 MGH"),
        ("{betas}/lh.betas_session01.mgh", b"", "not float32 MGH"),
        ("{betas}/lh.betas_session01.mgh", betas_header(trials=750), "header says 750 trials, 491526284 bytes"),
        ("nsddata/experiments/nsd/nsd_expdesign.mat", b"MATLAB", "not a whole MATLAB file"),
        ("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", b"HDF", "no HDF5 file with imgBrick"),
        ("nsddata/freesurfer/subj01/label/rh.streams.mgz", b"\x1f\x8b", "not a whole MGH file"),
        ("nsddata/freesurfer/subj01/label/streams.mgz.ctab", b"V1v 1\n", "expected lines such as '1 V1v'"),
    ],
)
def test_damaged_files_are_refused(path, content, message, nsd, tmp_path):
    root = copy_of(nsd, tmp_path / "nsd")
    rewrite(root / path.format(betas=betas_folder.format(1)), content)
    with pytest.raises(Problem, match=message):
        run(prepare_nsd, **settings(nsd, tmp_path / "challenge", NSD_DIR=str(root), SUBJECTS="subj01"))
    assert not (tmp_path / "challenge").exists()


def test_numbers_that_count_from_0_are_refused(nsd, tmp_path):
    root = copy_of(nsd, tmp_path / "nsd")
    path = root / "nsddata/experiments/nsd/nsd_expdesign.mat"
    design = scipy.io.loadmat(path)
    path.unlink()
    scipy.io.savemat(path, {name: design[name] - 1 for name in ("masterordering", "subjectim", "sharedix")})
    label = root / "nsddata/ppdata/subj03/transforms/lh.white-to-fsaverage.mgz"
    index = nibabel.load(label).get_fdata().ravel().astype(np.int32) - 1
    label.unlink()
    write_surface(label, index)
    with pytest.raises(Problem) as found:
        run(prepare_nsd, **settings(nsd, tmp_path / "challenge", NSD_DIR=str(root)))
    assert "masterordering from 0 to 29" in str(found.value)
    assert f"vertices 0 to {n_native - 1}, expected 1 to {n_native}" in str(found.value)


def test_design_in_matlab_7_3(nsd, tmp_path):
    """HDF5, every array transposed."""
    path = nsd / "nsd/nsddata/experiments/nsd/nsd_expdesign.mat"
    with h5py.File(tmp_path / "new.mat", "w", userblock_size=512) as file:
        for name, values in scipy.io.loadmat(path).items():
            if not name.startswith("_"):
                file[name] = values.T
    with open(tmp_path / "new.mat", "r+b") as file:  # as MATLAB marks them
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")
    for name, values in prepare_nsd.read_design(path).items():
        assert (values == prepare_nsd.read_design(tmp_path / "new.mat")[name]).all()


def test_counts_stand_beside_the_challenges(capsys):
    """The challenge's numbers, from its documentation, and whether the own ones agree."""
    pictures = [(9841, 159), (9841, 159), (9082, 293), (8779, 395), (9841, 159), (9082, 293), (9841, 159), (8779, 395)]
    missing = {6: (26, 324), 8: (23, 14)}  # vertices
    made = {}
    for number, ((training, test), n) in enumerate(zip(pictures, prepare_nsd.N_SESSIONS), start=1):
        lh, rh = np.subtract((19004, 20544), missing.get(number, (0, 0))).tolist()
        counts = dict(training=training, test=test, lh=lh, rh=rh, n_sessions=n, n_trials=750 * n)
        made[f"subj{number:02d}"] = counts
    prepare_nsd.report(made)
    text = capsys.readouterr().out
    assert "agree with the challenge: subj01, subj02, " in text and "differ" not in text and "not at full" not in text
    made["subj06"]["test"] += 1
    made["subj07"]["n_sessions"] = 39
    prepare_nsd.report(made)
    text = capsys.readouterr().out
    assert (
        "differ from the challenge: subj06\n" in text
        and "not at full size, so their numbers are not the challenge's: subj07" in text
    )


# ---- NSD-Flat -----------------------------------------------------------------------------------

step = 5 / 255  # of the stored activity


def flat_settings(nsd, flat, **values):
    common = settings(nsd, "") | dict(FLAT_DIR=str(flat), COCO_DIR=str(nsd / "coco"), SURFACE_DIR=str(nsd / "surface"))
    del common["CHALLENGE_DIR"]
    return common | dict(EXPORT=True) | values


@pytest.fixture(scope="module")
def flat(nsd):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_flat, "rows_a_shard", 20)
        patch.setattr(prepare_flat, "rows_a_group", 7)
        run(prepare_flat, **flat_settings(nsd, nsd / "flat"))
    return nsd / "flat"


@pytest.fixture(scope="module")
def truth(nsd):
    """{number: (nsd ids, in the last three sessions, maps (n_trials, 215, 200) with NaN outside)}, pixel by pixel."""
    found, sigma = {}, 1 / (2 * math.sqrt(2 * math.log(2)))
    for number in trials:
        ids, held, z, vertices = plain_trials(nsd / "nsd", nsd / "rsc", number, n_sessions[number - 1])
        places = {h: nibabel.load(nsd / f"surface/flat_{h}.gii").darrays[0].data[:, :2].astype(float) for h in hemis}
        places["lh"][:, 0] += -2 - places["lh"][:, 0].max()
        places["rh"][:, 0] += 2 - places["rh"][:, 0].min()
        points = [(*places[h][v], z[h][:, k]) for h in hemis for k, v in enumerate(vertices[h])]
        maps = np.full((len(ids), 215, 200), np.nan)
        for row in range(215):
            for column in range(200):
                px, py = -100 + column + 0.5, 95 - row - 0.5
                near = [
                    ((x - px) ** 2 + (y - py) ** 2, series) for x, y, series in points if abs(x - px) + abs(y - py) < 2
                ]
                near = [(math.exp(-d / sigma**2 / 2), series) for d, series in near if d <= (3 * sigma) ** 2]
                if near:
                    maps[:, row, column] = sum(w * series for w, series in near) / sum(w for w, _ in near)
        found[number] = np.array(ids), np.array(held), maps
    return found


def read_png(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_flat_files_are_the_published_format(nsd, flat, truth):
    files = sorted(p.name for p in (flat / "data").iterdir())
    n_test = sum(sum(n[-3:]) for n in trials.values())
    n_train = sum(map(sum, trials.values())) - n_test
    shards = {"train": -(-n_train // 20), "test": -(-n_test // 20)}
    assert files == [f"{s}-{i:05d}-of-{n:05d}.parquet" for s, n in sorted(shards.items()) for i in range(n)]
    tables = {s: pyarrow.parquet.read_table([flat / "data" / f for f in files if f.startswith(s)]) for s in shards}
    assert (len(tables["train"]), len(tables["test"])) == (n_train, n_test)
    objects = (
        "struct<area: list<element: int64>, bbox: list<element: list<element: double>>, "
        "category: list<element: string>, iscrowd: list<element: int64>, "
        "segmentation: list<element: struct<counts: string, poly: list<element: "
        "list<element: double>>, size: list<element: int64>>>, supercategory: list<element: string>, target: "
        "list<element: int64>>"
    )
    repetitions = ", ".join(f"subject{s}_rep{r}: int64" for s in range(1, 9) for r in range(3))
    expected = dict.fromkeys(("subject_id", "trial_id", "session_id", "nsd_id"), "int64")
    expected |= dict.fromkeys(("image", "activity"), "struct<bytes: binary, path: string>") | {"subject": "string"}
    expected |= dict.fromkeys(("flagged", "BOLD5000", "shared1000"), "bool") | {
        "coco_split": "string",
        "coco_id": "int64",
    }
    expected |= {"objects": objects, "captions": "list<element: string>", "repetitions": f"struct<{repetitions}>"}
    assert [(f.name, str(f.type)) for f in tables["train"].schema] == list(expected.items())
    with open(nsd / "nsd/nsddata/experiments/nsd/nsd_stim_info_merged.csv") as file:
        infos = list(csv.DictReader(file))
    with h5py.File(nsd / "nsd/nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        for split, table in tables.items():
            rows = iter(table.to_pylist())
            for number, n_trials in trials.items():
                ids, held, maps = truth[number]
                sessions = np.repeat(np.arange(len(n_trials)), n_trials)
                for trial in np.flatnonzero(held == (split == "test")).tolist():
                    row, info, i = next(rows), infos[ids[trial]], int(ids[trial])
                    found = [row[name] for name in ("subject_id", "trial_id", "session_id", "nsd_id", "subject")]
                    assert found == [number - 1, trial, sessions[trial], i, f"subj{number:02d}"]
                    assert [str(row[n]) for n in ("flagged", "BOLD5000", "shared1000")] == [
                        info[n] for n in ("flagged", "BOLD5000", "shared1000")
                    ]
                    assert (row["coco_split"], row["coco_id"]) == (info["cocoSplit"], int(info["cocoId"]))
                    assert {k: str(v) for k, v in row["repetitions"].items()} == {
                        k: info[k] for k in row["repetitions"]
                    }
                    assert trial + 1 in [row["repetitions"][f"subject{number}_rep{r}"] for r in range(3)]
                    assert row["captions"] == [f"{k} of {1000 + i}" for k in range(5)]
                    picture = Image.fromarray(file["imgBrick"][i]).resize((256, 256), Image.Resampling.BICUBIC)
                    assert (read_png(row["image"]["bytes"]) == np.asarray(picture)).all() and row["image"][
                        "path"
                    ] is None
                    level = (np.clip(maps[trial], -2.5, 2.5) + 2.5) / 5 * 255
                    stored, inside = read_png(row["activity"]["bytes"]), ~np.isnan(level)
                    assert stored.dtype == np.uint8 and (stored[~inside] == 127).all() and 100 < inside.sum() < 300
                    nearly = np.floor(level[inside] - 1e-6), np.floor(level[inside] + 1e-6)  # sums in another order
                    assert ((stored[inside] == nearly[0]) | (stored[inside] == nearly[1])).all()
            assert next(rows, None) is None


def test_flat_files_open_with_hugging_faces_library(flat, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(flat), cache_dir=str(tmp_path))
    row = found["test"][3]
    assert isinstance(row["image"], Image.Image) and row["image"].size == (256, 256) and row["image"].mode == "RGB"
    assert row["activity"].size == (200, 215) and row["activity"].mode == "L"
    assert len(found["train"]) + len(found["test"]) == sum(map(sum, trials.values()))


def test_objects_are_what_cocos_own_tools_make():
    """Areas and texts from pycocotools 2.0.11, which need not be installed."""
    outline = [100, 40, 160, 40, 160, 120, 100, 120]
    instance = dict(category_id=1, category="person", supercategory="person", iscrowd=0, bbox=[100, 40, 60, 80])
    picture = {"height": 425, "width": 625, "captions": ["one"], "instances": [instance | {"segmentation": [outline]}]}
    objects, captions = coco.convert(picture, (0, 0, 0.2, 0.12))  # x from 125 to 550
    assert captions == ["one"] and list(objects) == list(coco.columns)
    assert objects["bbox"] == [[0, 40, 35, 80]] and objects["area"] == [35 * 80]
    turned = instance | dict(bbox=[40, 100, 80, 60], segmentation=[outline], category_id=88, category="bear",
                             supercategory="toy")  # fmt: skip
    tall = {"height": 625, "width": 425, "captions": [], "instances": [turned]}
    turned["segmentation"] = [[40, 100, 40, 160, 120, 160, 120, 100]]
    found, _ = coco.convert(tall, (0.2, 0.12, 0, 0))  # y from 125 to 550
    assert found["bbox"] == [[40, 0, 80, 35]] and found["area"] == [35 * 80]
    assert (found["category"], found["supercategory"], found["target"]) == (["bear"], ["toy"], [88])
    assert objects["segmentation"][0] == {"counts": None, "poly": [[0, 40, 35, 40, 35, 120, 0, 120]], "size": None}
    picture["instances"][0]["segmentation"] = [[0, 0, 9, 0, 9, 9], outline]  # as published: counts the first part
    assert coco.convert(picture, (0, 0, 0.2, 0.12))[0]["area"] == []
    part = instance | {"bbox": [100.3, 50.7, 33.3, 20.1], "segmentation": [[100.3, 50.7, 133.6, 50.7, 133.6, 70.8]]}
    wide = {"height": 480, "width": 640, "captions": [], "instances": [part]}
    objects, _ = coco.convert(wide, (0, 0, 0.125, 0.125))  # by 425 / 480: 17.97396 44.89063 47.45833 62.6875
    assert objects["segmentation"][0]["poly"] == [[17.97, 44.89, 47.46, 44.89, 47.46, 62.69]]
    np.testing.assert_allclose(objects["bbox"], [[17.97, 44.89, 47.46 - 17.97, 62.69 - 44.89]], rtol=1e-12)
    for polygon, area in (
        ([10.25, 20.5, 200.75, 31.1, 180.3, 222.22, 95.5, 300.01, 12, 250.6], 43028),
        ([0, 0, 425, 0, 425, 100.4, 30.3, 425, 0, 425], 116549),
        ([300.2, 10.1, 310.9, 400.3, 305.5, 120.2, 424.99, 200.7], 6814),
        ([7.1, 7.1, 7.9, 7.2, 7.6, 8.3], 1),
        ([50, 50, 50, 50, 50, 90.5, 50, 50], 0),  # no width, and points twice, as clipping makes them
    ):
        picture = {"height": 425, "width": 425, "captions": [], "instances": [instance | {"segmentation": [polygon]}]}
        assert coco.convert(picture, (0, 0, 0, 0))[0]["area"] == [area] * (area > 0)
    mask = np.zeros((425, 425), int)
    mask[50, 1:3] = mask[100:300, 5:17] = mask[424, 424] = 1
    wide = np.zeros((850, 1000), int)  # twice as large, with what is cut away
    wide[:, 100:950] = mask.repeat(2, 0).repeat(2, 1)
    flat = wide.T.ravel().tolist()
    starts = [0, *(i for i in range(1, len(flat)) if flat[i] != flat[i - 1]), len(flat)]
    crowd = {"size": [850, 1000], "counts": [b - a for a, b in zip(starts, starts[1:])]}
    picture = {"height": 850, "width": 1000, "captions": [], "instances": [instance | {"segmentation": crowd}]}
    objects, _ = coco.convert(picture, (0, 0, 0.1, 0.05))
    assert objects["area"] == [mask.sum()]
    text = "k>1X=0Tl0W6emN000000000000000000000cWY5iI"
    assert objects["segmentation"] == [{"counts": text, "poly": None, "size": [425, 425]}]
    tall = np.zeros((1000, 850), int)
    tall[100:950] = mask.repeat(2, 0).repeat(2, 1)
    assert (coco.crop_mask(tall.astype(np.uint8), np.array([[0, 100], [850, 950]])) == mask).all()


def plain_activity(ids, held, maps, test):
    """{nsd id: mean over the trials of the clipped map} of one side of the split."""
    chosen = {i for i, h in zip(ids.tolist(), held) if h == test}
    clipped = np.clip(maps, -2.5, 2.5)
    return {i: clipped[(ids == i) & (held == test)].mean(0) for i in sorted(chosen)}


def test_round_trip(nsd, flat, truth, derived, tmp_path, capsys):
    """Raw NSD -> NSD-Flat -> DATA_DIR: the averaged, resampled truth, less what cutting to 256 levels takes away."""
    run(prepare_flat, FLAT_DIR=str(flat), DATA_DIR=str(tmp_path), SEED=3)
    data = prepare_data.load(tmp_path)
    space, inside = data.space, {n: ~np.isnan(maps[0]).ravel() for n, (_, _, maps) in truth.items()}
    assert space.unit == "pixels" and space.rois == {} and space.subjects == ["subj01", "subj03"]
    pixels = space.vertices.numpy()
    left = pixels % 200 < 100
    assert set(pixels) == set(np.flatnonzero(inside[1] | inside[3]))
    assert left[: space.n_lh].all() and not left[space.n_lh :].any() and 0 < space.n_lh < len(pixels)
    assert (space.mask.numpy() == [inside[1][pixels], inside[3][pixels]]).all() and not space.mask.all()
    taught = {i for ids, held, _ in truth.values() for i in ids[~held].tolist()}
    errors, n_test = [], 0
    for s, number in enumerate(trials):
        own = inside[number][pixels]
        for test, subject, image, activity in (
            (False, data.subject, data.image, data.activity),
            (True, data.test_subject, data.test_image, data.test_activity),
        ):
            expected = plain_activity(*truth[number], test)
            if test:
                expected = {i: y for i, y in expected.items() if i not in taught}
                n_test += len(expected)
            rows = np.flatnonzero(subject == s)
            assert data.nsd_id[image[rows]].tolist() == list(expected)
            for row, y in zip(rows, expected.values()):
                errors.append(activity[row][own] - y.ravel()[pixels][own])
                assert (activity[row][~own] == 0).all()
    errors = np.concatenate(errors)
    assert -step - 1e-6 < errors.min() and errors.max() < 1e-6 and abs(errors.mean() + step / 2) < step / 50
    assert n_test == len(data.test_activity) > 5
    assert set(data.nsd_id[: data.n_training_images]) == taught
    with h5py.File(nsd / "nsd/nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        for i, picture in zip(data.nsd_id, data.images):
            small = Image.fromarray(file["imgBrick"][i]).resize((256, 256), Image.Resampling.BICUBIC)
            assert (picture == np.asarray(small)).all()
    run(prepare_data, CHALLENGE_DIR=str(derived), DATA_DIR=str(tmp_path / "vertices"), SEED=3)
    other = prepare_data.load(tmp_path / "vertices")  # of the same training pictures: the same splits
    splits = [{(s, i): of for s, i, of in zip(d.subject, d.nsd_id[d.image], d.split)} for d in (data, other)]
    assert splits[0] == splits[1] and set(splits[0].values()) == {0, 1, 2}
    assert "not comparable" in capsys.readouterr().out
    run(prepare_flat, FLAT_DIR=str(flat), DATA_DIR=str(tmp_path), SEED=3)
    assert "prepared already" in capsys.readouterr().out
    with pytest.raises(Problem, match="SEED: 3 there, 4 now"):
        run(prepare_flat, FLAT_DIR=str(flat), DATA_DIR=str(tmp_path), SEED=4)


@pytest.fixture(scope="module")
def flat_data(nsd, flat):
    """DATA_DIR from the files of the fixture above."""
    run(prepare_flat, FLAT_DIR=str(flat), DATA_DIR=str(nsd / "flat_data"))
    return nsd / "flat_data"


def arrays_of(folder):
    """What was prepared, in an order that does not depend on the files'."""
    data = prepare_data.load(folder)
    order = np.argsort(data.nsd_id[data.image] + n_stimuli * data.subject)
    test = np.argsort(data.nsd_id[data.test_image] + n_stimuli * data.test_subject)
    found = [
        data.activity[order],
        data.test_activity[test],
        data.images[data.image[order]],
        data.nsd_id[data.image[order]],
    ]
    return [*found, data.images[data.test_image[test]], data.space.vertices.numpy(), data.space.mask.numpy()]


def test_every_stage_runs_on_pixels(flat_data, tmp_path, capsys):
    """The published test split is what --split challenge scores; what is called vertices elsewhere is pixels."""
    data, folders = prepare_data.load(flat_data), dict(DATA_DIR=str(flat_data), RUN_DIR=str(tmp_path / "run"))
    run(fit_pca, DATA_DIR=str(flat_data), PCA_DIM=8)
    settings = both | small | dict(LAYERS="blocks.0", BATCH_SIZE=8, STEPS=3)
    run(train_head, **folders, **settings, VALIDATE_EVERY=1)
    (tmp_path / "challenge/subj01/test_split").mkdir(parents=True)  # of vertices, not to be looked at
    output = tmp_path / "scores"
    run(evaluate, **folders, SPLIT="challenge", OUTPUT_DIR=str(output), RESAMPLES=20,
        CHALLENGE_DIR=str(tmp_path / "challenge"))  # fmt: skip
    out = capsys.readouterr().out
    assert "do not compare with vertices" in out and re.search(r"^prediction .* pixels ", out, re.MULTILINE)
    assert {p.name for p in output.glob("figure_4*")} == {"figure_4a_r2_maps.png", "figure_4b_samples.png"}  # no ROIs
    with open(output / "scores.csv") as file:
        assert "n_pixels" in next(csv.reader(file))
    encoder, space, _ = load_checkpoint(tmp_path / "run/head.pt", space=data.space)
    found = np.load(output / "pixels.npz")
    assert space.unit == "pixels" and (found["map_index"] == data.space.vertices.numpy()).all()
    for s in range(2):
        rows, has = np.flatnonzero(data.test_subject == s), data.space.mask[s].numpy()
        [prediction] = encoder.predict(data.images[data.test_image[rows]], [s], batch_size=64)
        expected = r2_of_vertices(data.test_activity[rows][:, has], prediction.numpy()[:, has])
        np.testing.assert_allclose(found["subject_r2"][s, has], expected, rtol=1e-3, atol=1e-3)
        assert np.isnan(found["subject_r2"][s, ~has]).all()
    picture = tmp_path / "picture.png"
    Image.fromarray(data.images[0]).save(picture)
    own = dict(IMAGES=str(picture), SUBJECT="subj03", OUTPUT_DIR=str(tmp_path / "own"), PRECISION="float32")
    run(predict, RUN_DIR=str(tmp_path / "run"), **own)
    sides = [np.load(tmp_path / f"own/subj03/activity_{hemi}.npy") for hemi in hemis]
    [prediction] = encoder.predict(data.images[:1], [1], batch_size=64)
    np.testing.assert_allclose(np.concatenate(sides, axis=1), prediction[:, data.space.mask[1]], atol=1e-4)
    assert not list(tmp_path.rglob("*.gii")) and (tmp_path / "own/subj03/picture.png").exists()
    run(predict, **folders, SUBMISSION_DIR=str(tmp_path / "submission"))
    n = data.space.hemisphere(0, "rh").numel()
    assert np.load(tmp_path / "submission/subj01/rh_pred_test.npy").shape == ((data.test_subject == 0).sum(), n)


def test_files_of_other_revisions(flat, flat_data, tmp_path):
    """No trial_id, one file with one large group of rows, other columns and order; chosen by a glob."""
    tables = {s: pyarrow.parquet.read_table(sorted(flat.glob(f"data/{s}-*"))) for s in ("train", "test")}
    for split, table in tables.items():
        table = table.select(["activity", "nsd_id", "image", "subject_id"])[::-1]
        (tmp_path / "old" / split).mkdir(parents=True)
        pyarrow.parquet.write_table(table, tmp_path / "old" / split / f"{split}.parquet")
    run(prepare_flat, FLAT_DIR=str(tmp_path / "old/*/*.parquet"), DATA_DIR=str(tmp_path / "data"))
    for found, expected in zip(arrays_of(tmp_path / "data"), arrays_of(flat_data)):
        assert (found == expected).all()


def test_one_subject_of_the_files(flat, flat_data, tmp_path):
    run(prepare_flat, FLAT_DIR=str(flat), DATA_DIR=str(tmp_path), SUBJECTS="subj03")
    one, both = prepare_data.load(tmp_path), prepare_data.load(flat_data)
    assert one.space.subjects == ["subj03"] and one.space.mask.all()
    has = both.space.mask[1].numpy()
    assert (one.activity == both.activity[both.subject == 1][:, has]).all()
    assert (one.test_activity == both.test_activity[both.test_subject == 1][:, has]).all()
    assert (one.images[one.image] == both.images[both.image[both.subject == 1]]).all()
    with pytest.raises(Problem, match="expected some of subj01, subj03"):
        run(prepare_flat, FLAT_DIR=str(flat), DATA_DIR=str(tmp_path), SUBJECTS="subj02", OVERWRITE=True)


def change_column(path, name, values):
    """The Parquet file with another column; values: of the old ones."""
    table = pyarrow.parquet.read_table(path)
    old = table[name].to_pylist()
    column = pyarrow.array(values(old), table.schema.field(name).type)
    pyarrow.parquet.write_table(table.set_column(table.schema.names.index(name), name, column), path)


def small_png(shape):
    file = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "train lacks shards 1;"),
        (lambda path: min(path.parent.glob("test-*")).unlink(), "test lacks shards 0;"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a whole Parquet file"),
        (lambda path: path.write_bytes(b""), "not a whole Parquet file"),
        (lambda path: shutil.copy(path, path.with_name("train-copy.parquet")), "trials occur twice"),
        (lambda path: path.rename(path.with_name("validation.parquet")), "validation.parquet start with neither"),
        (
            lambda path: change_column(path, "activity", lambda v: [small_png((200, 215)), *v[1:]]),
            r"map of uint8 .200, 215.",
        ),
        (lambda path: change_column(path, "activity", lambda v: [{"bytes": b"PNG"}, *v[1:]]), "damaged activity map"),
        (lambda path: change_column(path, "image", lambda v: [{"bytes": b"PNG"}] * len(v)), "damaged picture"),
        (
            lambda path: change_column(path, "image", lambda v: [small_png((9, 8, 3))] * len(v)),
            "8 x 9 px, expected a square",
        ),
        (lambda path: change_column(path, "nsd_id", lambda v: [None, *v[1:]]), "nsd_id has empty values"),
        (lambda path: pyarrow.parquet.write_table(pyarrow.table({"nsd_id": [1]}), path), "no column subject_id"),
    ],
)
def test_damaged_flat_files_are_refused(damage, message, flat, flat_data, tmp_path):
    """And what was prepared before stays."""
    shutil.copytree(flat, tmp_path / "flat")
    shutil.copytree(flat_data, tmp_path / "data")
    before = {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir() if p.name != ".lock"}
    damage(sorted(tmp_path.glob("flat/data/train-*"))[1])
    with pytest.raises(Problem, match=message):
        run(prepare_flat, FLAT_DIR=str(tmp_path / "flat"), DATA_DIR=str(tmp_path / "data"), OVERWRITE=True)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir() if p.name != ".lock"}


def test_export_goes_on_where_it_ended(nsd, flat, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_flat, "rows_a_shard", 20)
    monkeypatch.setattr(prepare_flat, "rows_a_group", 7)
    calls, png = [], prepare_flat.png

    def break_off(values):
        calls.append(values)
        if len(calls) > 2 * 30:  # two pictures a trial: in the second file
            raise KeyboardInterrupt
        return png(values)

    monkeypatch.setattr(prepare_flat, "png", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(prepare_flat, **flat_settings(nsd, tmp_path))
    [first] = tmp_path.glob("data/*")
    date = first.stat().st_mtime_ns
    monkeypatch.setattr(prepare_flat, "png", png)
    run(prepare_flat, **flat_settings(nsd, tmp_path))
    assert first.stat().st_mtime_ns == date
    files = sorted(p.name for p in flat.glob("data/*"))
    assert files == sorted(p.name for p in tmp_path.glob("data/*"))
    for name in files:
        assert pyarrow.parquet.read_table(tmp_path / "data" / name) == pyarrow.parquet.read_table(flat / "data" / name)
    for other in (dict(RSC_DIR=""), dict(SURFACE_DIR="")):
        with pytest.raises(Problem, match="not made from these data"):
            run(prepare_flat, **flat_settings(nsd, tmp_path, **other))
    shutil.copy(first, tmp_path / "train-x.parquet")
    with pytest.raises(Problem, match="holds other files"):
        run(prepare_flat, **flat_settings(nsd, tmp_path))


def test_what_an_export_lacks_is_told_at_once(nsd, tmp_path):
    root = copy_of(nsd, tmp_path / "nsd")
    info = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
    (root / info).unlink()
    (tmp_path / "surface").mkdir()
    values = dict(NSD_DIR=str(root), COCO_DIR=str(tmp_path), SURFACE_DIR=str(tmp_path / "surface"))
    with pytest.raises(Problem) as found:
        run(prepare_flat, **flat_settings(nsd, tmp_path / "flat", **values))
    text = str(found.value)
    assert f"s3://natural-scenes-dataset/{info}" in text
    assert all(
        f"{tmp_path}/{kind}_{s}2017.json" in text for kind in ("instances", "captions") for s in ("train", "val")
    )
    assert all(f"{tmp_path}/surface/flat_{hemi}.gii" in text for hemi in hemis)


def test_nilearns_surface_is_said_to_be_another(nsd, tmp_path, capsys):
    run(prepare_flat, **flat_settings(nsd, tmp_path, SURFACE_DIR="", SUBJECTS="subj03"))
    assert "these pixels are not the published ones" in capsys.readouterr().out
    assert pyarrow.parquet.read_metadata(next(tmp_path.glob("data/train-*"))).num_rows == 25


# ---- full size ----------------------------------------------------------------------------------


def simulate_full_size(root, n_trials=750, number=1):
    """One subject with the released numbers of everything and nothing in it: files full of holes, for measuring."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.tile(np.arange(1000), (8, 1)), 1000 + np.arange(8 * 9000).reshape(8, -1)], axis=1)
    order = rng.permutation(np.repeat(np.arange(10000), 3))
    for folder in ("nsddata/experiments/nsd", "nsddata_stimuli/stimuli/nsd", betas_folder.format(number)):
        (root / folder).mkdir(parents=True)
    design = {"masterordering": order[None] + 1.0, "subjectim": rows + 1.0, "sharedix": np.arange(1.0, 1001)[None]}
    scipy.io.savemat(root / "nsddata/experiments/nsd/nsd_expdesign.mat", design)
    with h5py.File(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", "w") as file:
        file.create_dataset("imgBrick", (n_stimuli, 425, 425, 3), np.uint8, chunks=(1, 425, 425, 3))
    for hemi, n in (("lh", 19004), ("rh", 20544)):
        mask = np.zeros(n_fsaverage, np.float32)
        mask[rng.choice(n_fsaverage, n, replace=False)] = 1
        write_surface(root / f"nsddata/freesurfer/fsaverage/label/{hemi}.nsdgeneral.mgz", mask)
        write_surface(root / betas_folder.format(number) / f"{hemi}.ncsnr.mgh", mask)
        index = np.ones(n_fsaverage, np.int32)
        write_surface(root / f"nsddata/ppdata/subj{number:02d}/transforms/{hemi}.white-to-fsaverage.mgz", index)
        for session in range(1, 41):
            write_mgh(
                root / betas_folder.format(number) / f"{hemi}.betas_session{session:02d}.mgh", {0: np.zeros(n_trials)}
            )
        for group in groups:
            write_surface(root / f"nsddata/freesurfer/subj{number:02d}/label/{hemi}.{group}.mgz", np.ones(10, np.int32))
    for group in groups:
        (root / f"nsddata/freesurfer/subj{number:02d}/label/{group}.mgz.ctab").write_text("0 Unknown\n1 all\n")


if __name__ == "__main__":  # python test_nsd.py FOLDER
    simulate_full_size(Path(sys.argv[1]))
