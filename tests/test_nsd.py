"""Raw NSD -> challenge folder, NSD-Flat in and out, NSD-synthetic: results on a small simulated release are compared
with an independent derivation, trial by trial and vertex by vertex."""

import csv
import fcntl
import io
import math
import os
import shutil
import signal

import h5py
import nibabel
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
from PIL import Image

import prepare_data
from core.space import HEMIS, N_FSAVERAGE, ROI_GROUPS
from model import UserError
from nsd import coco, export_flat, prepare_flat, prepare_nsd, prepare_synthetic
from tests import simulated_nsd as sim
from tests.conftest import run_process, run_stage

FINISHED = {1: True, 3: False}  # whether a subject saw every shared picture three times
LEVEL = 5 / 255  # of the activity in NSD-Flat


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    sim.simulate(folder)
    return folder


def settings(release, **values):
    inputs = dict(NSD_DIR=release / "nsd", RSC_DIR=release / "rsc")
    return inputs | dict(N_SESSIONS=sim.N_SESSIONS, TRIALS_PER_SESSION=sim.N_TRIALS) | values


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
    root, design = release / "nsd", scipy.io.loadmat(release / "nsd" / sim.DESIGN)
    z, vertices = {}, {}
    for hemi in HEMIS:
        inside = read_surface(root / f"nsddata/freesurfer/fsaverage/label/{hemi}.nsdgeneral.mgz") == 1
        inside |= read_surface(release / f"rsc/{hemi}.nsdgeneralRSC.mgz") == 1
        mask, series = np.flatnonzero(inside), []
        for session in range(1, sim.ACQUIRED[number] + 1):
            image = nibabel.load(root / sim.BETAS.format(number) / f"{hemi}.betas_session{session:02d}.mgh")
            series.append([plain_zscore(image.dataobj[v, 0, 0].tolist()) for v in mask])
        series = np.concatenate(series, axis=1).T
        complete = ~np.isnan(series).any(0)
        z[hemi], vertices[hemi] = series[:, complete], mask[complete]
    columns = design["masterordering"][0, : len(series)].astype(int)
    ids = [int(design["subjectim"][number - 1, column - 1]) - 1 for column in columns]
    return ids, [t >= (sim.ACQUIRED[number] - 3) * sim.N_TRIALS for t in range(len(ids))], z, vertices


def plain_pictures(release, number, ids, held):
    """Training and test pictures, each sorted."""
    shared = set((scipy.io.loadmat(release / "nsd" / sim.DESIGN)["sharedix"][0] - 1).tolist())
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
        ncsnr = read_surface(root / sim.BETAS.format(number) / f"{hemi}.ncsnr.mgh")[vertices[hemi]]
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
    with open(release / "nsd" / sim.BRICK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # HDF5's own lock is not asked for: some file systems have none
        run_stage(prepare_nsd, **settings(release, CHALLENGE_DIR=release / "challenge"))
    return release / "challenge"


@pytest.mark.parametrize("number", sim.ACQUIRED)
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
    with h5py.File(release / "nsd" / sim.BRICK) as file:
        for name, i in pictures.items():
            assert (np.asarray(Image.open(folder / name)) == file["imgBrick"][i]).all(), name
    for group in ROI_GROUPS:
        mapping = np.load(folder / f"roi_masks/mapping_{group}.npy", allow_pickle=True).item()
        assert mapping == {0: "Unknown", 1: f"{group}-a", 2: f"{group}-b", 3: f"{group}-c"}


def contents(folder):
    """{path: bytes} of the subjects in a challenge folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("subj*/**/*") if p.is_file()}


def test_killed_run_continues_with_the_next_subject(release, challenge, tmp_path):
    values = settings(release, CHALLENGE_DIR=tmp_path)
    n_first = len(list(challenge.glob("subj01/*/*_images/*")))
    dies_at = ("PIL.Image", "Image.save", n_first + 3)  # in the second subject
    code, output = run_process("nsd/prepare_nsd.py", dies_at=dies_at, **values)
    assert code == -signal.SIGKILL, output
    dates = {p: p.stat().st_mtime_ns for p in tmp_path.glob("subj01/**/*")}
    assert dates
    run_stage(prepare_nsd, **values)
    assert dates == {p: p.stat().st_mtime_ns for p in tmp_path.glob("subj01/**/*")}
    assert contents(tmp_path) == contents(challenge) and sorted(os.listdir(tmp_path)) == ["subj01", "subj03"]


def prepare_damaged(release, folder, damage, **values):
    """Prepare from a copy of the raw release, links to its files, after damage(copy); nothing may be written."""
    shutil.copytree(release / "nsd", folder / "nsd", copy_function=os.link)
    damage(folder / "nsd")
    with pytest.raises(UserError) as error:
        values = settings(release, NSD_DIR=folder / "nsd", CHALLENGE_DIR=folder / "challenge", **values)
        run_stage(prepare_nsd, **values)
    assert not list(folder.glob("challenge/subj*"))
    return str(error.value)


def listed_files(error):
    return sorted(line[2:] for line in error.splitlines() if line.startswith("  "))


def test_every_missing_file_is_listed(release, tmp_path):
    gone = [f"{sim.BETAS.format(1)}/lh.betas_session06.mgh", f"{sim.BETAS.format(3)}/rh.ncsnr.mgh", sim.BRICK]
    gone += ["nsddata/freesurfer/subj03/label/lh.floc-faces.mgz", "nsddata/freesurfer/subj01/label/streams.mgz.ctab"]
    error = prepare_damaged(release, tmp_path, lambda root: [(root / path).unlink() for path in gone])
    assert listed_files(error) == sorted(f"s3://natural-scenes-dataset/{path}" for path in gone)


@pytest.mark.parametrize("damage", ["end is missing", "one trial less", "one trial more", "numbers from 0"])
def test_inputs_that_shift_pictures_are_refused(damage, release, tmp_path):
    def change(root):
        path = root / (sim.DESIGN if damage == "numbers from 0" else f"{sim.BETAS.format(1)}/rh.betas_session02.mgh")
        content = path.read_bytes()
        path.unlink()  # a link to the release's file
        if damage == "end is missing":
            path.write_bytes(content[:-1000])
        elif damage != "numbers from 0":
            n_trials = sim.N_TRIALS + (1 if damage == "one trial more" else -1)
            sim.write_mgh(path, {0: np.ones(n_trials)}, n_trials)
        else:
            design = scipy.io.loadmat(io.BytesIO(content))
            scipy.io.savemat(path, {name: values - 1 for name, values in design.items() if name[0] != "_"})

    prepare_damaged(release, tmp_path, change, SUBJECTS="subj01")


def test_folders_are_neither_mixed_nor_lost(release, challenge, tmp_path):
    values, before = settings(release, CHALLENGE_DIR=tmp_path / "challenge"), contents(challenge)
    shutil.copytree(challenge, tmp_path / "challenge")
    for changes in (dict(N_SESSIONS=(5, 40, 5)), dict(RSC_DIR="")):
        with pytest.raises(UserError, match="was made with"):
            run_stage(prepare_nsd, **values | changes)
    everybody = dict(NSD_DIR=tmp_path / "deleted", SUBJECTS="subj01,subj03")
    run_stage(prepare_nsd, **values | everybody)  # finished: the raw files may be gone
    run_stage(prepare_nsd, **values | dict(OVERWRITE=True, SUBJECTS="subj01"))
    assert contents(tmp_path / "challenge") == before
    (tmp_path / "challenge/subj01/prepare_nsd.json").unlink()  # like the challenge's download
    for overwrite in (False, True):
        with pytest.raises(UserError):
            run_stage(prepare_nsd, **values | dict(OVERWRITE=overwrite))
    assert contents(tmp_path / "challenge") == {k: v for k, v in before.items() if k != "subj01/prepare_nsd.json"}


# ---- NSD-Flat -----------------------------------------------------------------------------------


def export(release, folder, **values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_flat, "ROWS_PER_SHARD", 20)
        patch.setattr(export_flat, "ROWS_PER_GROUP", 7)
        inputs = dict(COCO_DIR=release / "coco", SURFACE_DIR=release / "surface")
        run_stage(export_flat, **settings(release, FLAT_DIR=folder, **inputs | values))


@pytest.fixture(scope="module")
def flat(release):
    export(release, release / "flat")
    return release / "flat"


def read_table(folder, split):
    return pyarrow.concat_tables(map(pyarrow.parquet.read_table, sorted(folder.glob(f"data/{split}-*"))))


def read_png(content):
    return np.asarray(Image.open(io.BytesIO(content["bytes"])))


def plain_maps(release, number):
    """[nsd id], [in the last three sessions], maps (n_trials, 215, 200), NaN outside, pixel by pixel."""
    ids, held, z, vertices = plain_trials(release, number)
    sigma, points = 1 / (2 * math.sqrt(2 * math.log(2))), []
    for hemi in HEMIS:
        places = nibabel.load(release / f"surface/flat_{hemi}.gii").darrays[0].data[:, :2].astype(float)
        places[:, 0] += -2 - places[:, 0].max() if hemi == "lh" else 2 - places[:, 0].min()
        points += [(*places[v], z[hemi][:, k]) for k, v in enumerate(vertices[hemi])]
    maps = np.full((len(ids), 215, 200), np.nan)
    for row, column in np.ndindex(215, 200):
        px, py = -100 + column + 0.5, 95 - row - 0.5
        near = [((x - px) ** 2 + (y - py) ** 2, s) for x, y, s in points if abs(x - px) < 2 and abs(y - py) < 2]
        near = [(math.exp(-d / sigma**2 / 2), series) for d, series in near if d <= (3 * sigma) ** 2]
        if near:
            maps[:, row, column] = sum(w * series for w, series in near) / sum(w for w, _ in near)
    return ids, held, maps


def test_flat_rows_are_the_derivation(release, flat):
    with open(release / "nsd" / sim.INFO) as file:
        infos = list(csv.DictReader(file))
    rows = {split: iter(read_table(flat, split).to_pylist()) for split in ("train", "test")}
    with h5py.File(release / "nsd" / sim.BRICK) as stimuli:
        for number in sim.ACQUIRED:
            for trial, (i, held, expected) in enumerate(zip(*plain_maps(release, number))):
                row, info = next(rows["test" if held else "train"]), infos[i]
                identity = [row[name] for name in ("subject_id", "trial_id", "session_id", "nsd_id", "subject")]
                assert identity == [number - 1, trial, trial // sim.N_TRIALS, i, f"subj{number:02d}"]
                texts = row["repetitions"] | {name: row[name] for name in ("flagged", "BOLD5000", "shared1000")}
                assert {k: str(v) for k, v in texts.items()} == {k: info[k] for k in texts} and len(texts) == 27
                assert trial + 1 in [row["repetitions"][f"subject{number}_rep{r}"] for r in range(3)]
                assert (row["coco_split"], row["coco_id"]) == (info["cocoSplit"], 1000 + i)
                assert row["captions"] == [f"{k} of {1000 + i}" for k in range(5)]
                assert row["objects"]["category"] == ["bear"] * (i % 3)
                picture = Image.fromarray(stimuli["imgBrick"][i]).resize((256, 256), Image.Resampling.BICUBIC)
                assert (read_png(row["image"]) == np.asarray(picture)).all()
                stored, inside = read_png(row["activity"]), ~np.isnan(expected)
                assert (stored[~inside] == 127).all() and 100 < inside.sum() < 500
                level = (np.clip(expected[inside], -2.5, 2.5) + 2.5) / LEVEL
                nearly = np.floor(level - 1e-6), np.floor(level + 1e-6)  # sums in another order
                assert ((stored[inside] == nearly[0]) | (stored[inside] == nearly[1])).all()
    assert not any(list(rest) for rest in rows.values())


def test_data_are_the_means_of_the_flat_maps(flat, challenge, tmp_path):
    run_stage(prepare_flat, FLAT_DIR=flat, DATA_DIR=tmp_path / "pixels", SEED=3)
    data, expected, taught = prepare_data.load(tmp_path / "pixels"), {}, set()
    for split in ("train", "test"):
        for row in read_table(flat, split).to_pylist():
            if split == "train" or row["nsd_id"] not in taught:
                expected.setdefault((split, row["subject"], row["nsd_id"]), []).append(read_png(row["activity"]))
            taught |= {row["nsd_id"]} if split == "train" else set()
    space, keys = data.space, []
    pixels, mask = space.vertices.numpy(), space.mask.numpy()
    samples = [("train", *sample) for sample in zip(data.activity, data.subject, data.nsd_ids[data.image])]
    samples += [("test", *s) for s in zip(data.test_activity, data.test_subject, data.nsd_ids[data.test_image])]
    for split, y, s, i in samples:
        keys.append((split, space.subjects[s], i))
        mean = np.mean([m.ravel()[pixels] / 255 * 5 - 2.5 for m in expected[keys[-1]]], axis=0)
        np.testing.assert_allclose(y, np.where(mask[s], mean, 0), rtol=0, atol=LEVEL / 20)
    assert sorted(keys) == sorted(expected) and len(data.test_activity) > 5 and space.unit == "pixels"
    for s, name in enumerate(space.subjects):
        maps = [m.ravel() for key, part in expected.items() if key[1] == name for m in part]
        assert (mask[s] == (np.array(maps) != 127).any(0)[pixels]).all()
    left = pixels % 200 < 100
    assert left[: space.n_lh].all() and not left[space.n_lh :].any() and not mask.all()
    assert set(data.nsd_ids[: data.n_training_images]) == taught
    run_stage(prepare_data, CHALLENGE_DIR=challenge, DATA_DIR=tmp_path / "vertices", SEED=3)
    vertices = prepare_data.load(tmp_path / "vertices")  # the same training pictures, so the same splits
    splits = [dict(zip(zip(d.subject, d.nsd_ids[d.image]), d.split)) for d in (data, vertices)]
    assert splits[0] == splits[1] and vertices.space.mask.sum(1).tolist() == [84, 81]


def test_older_revision_strays_and_one_subject(flat, tmp_path):
    """No trial_id, other order of columns and rows, files of other systems beside them."""
    (tmp_path / "old/@eaDir").mkdir(parents=True)
    for split in ("train", "test"):
        table = read_table(flat, split).select(["activity", "nsd_id", "image", "subject_id"])[::-1]
        pyarrow.parquet.write_table(table, tmp_path / f"old/{split}.parquet")
    for stray in ("._train.parquet", "Thumbs.db", "@eaDir/train.parquet"):
        (tmp_path / "old" / stray).write_bytes(b"stray")
    run_stage(prepare_flat, FLAT_DIR=flat, DATA_DIR=tmp_path / "both")
    both = prepare_data.load(tmp_path / "both")
    has = both.space.mask[1].numpy()
    run_stage(prepare_flat, FLAT_DIR=tmp_path / "old", DATA_DIR=tmp_path / "one", SUBJECTS="subj03")
    one = prepare_data.load(tmp_path / "one")
    assert one.space.mask.all() and (one.activity == both.activity[both.subject == 1][:, has]).all()
    assert (one.test_activity == both.test_activity[both.test_subject == 1][:, has]).all()
    assert (one.images[one.image] == both.images[both.image[both.subject == 1]]).all()


def test_missing_incomplete_and_repeated_shards_are_refused(flat, tmp_path):
    with pytest.raises(UserError, match="nowhere has no train"):
        run_stage(prepare_flat, FLAT_DIR=tmp_path / "nowhere", DATA_DIR=tmp_path / "data")
    shutil.copytree(flat, tmp_path / "flat")
    first, second, *_ = sorted(tmp_path.glob("flat/data/train-*"))
    for change in (lambda: shutil.copy(first, second), second.unlink):
        change()
        with pytest.raises(UserError, match="same trial|of 3 train shards"):
            run_stage(prepare_flat, FLAT_DIR=tmp_path / "flat", DATA_DIR=tmp_path / "data")


def test_export_continues_where_it_ended(release, flat, tmp_path):
    calls, png = [], export_flat.png
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(export_flat, "png", lambda values: calls.append(1) or 1 // (len(calls) < 60) and png(values))
        export(release, tmp_path)  # two pictures a trial: ends in the second shard
    [first] = tmp_path.glob("data/*.parquet")
    date = first.stat().st_mtime_ns
    export(release, tmp_path)
    assert first.stat().st_mtime_ns == date
    for split in ("train", "test"):
        assert read_table(tmp_path, split) == read_table(flat, split)
    with pytest.raises(UserError, match="other data"):
        export(release, tmp_path, RSC_DIR="")


def test_coco_annotations_are_cropped_and_scaled():
    mask = np.zeros((425, 425), np.uint8)
    mask[100:300, 5:17] = mask[424, 424] = 1
    whole = np.pad(mask.repeat(2, 0).repeat(2, 1), ((0, 0), (100, 50))).T.ravel().astype(int)
    changes = np.flatnonzero(np.diff(whole, prepend=0, append=2))
    outlines = [
        [[300, 40, 400, 40, 400, 120], [0, 0, 9, 0, 9, 9]],
        [[0, 0, 9, 0, 9, 9], [300, 40, 400, 40, 400, 200]],  # NSD-Flat counts the first part, which was not shown
        [[60, 40, 400, 40, 400, 120.2, 60, 120.2]],
        {"size": [850, 1000], "counts": np.diff(changes, prepend=0).tolist()},
    ]
    about = dict(category_id=1, name="person", supercategory="person", iscrowd=0, bbox=[60, 40, 340, 80.2])
    instances = [about | {"segmentation": outline} for outline in outlines]
    picture = {"height": 850, "width": 1000, "captions": [], "instances": instances}
    objects, _ = coco.convert(picture, (0, 0, 0.1, 0.05))  # x from 100 on was shown, halved
    assert objects["area"] == [1000, 150 * 40, 200 * 12 + 1]
    assert objects["bbox"][1] == [0, 20, 150, 40.1] and objects["target"] == [1, 1, 1]
    assert objects["segmentation"][1]["poly"] == [[0, 20, 150, 20, 150, 60.1, 0, 60.1]]
    runs = {"size": [425, 425], "counts": objects["segmentation"][2]["counts"]}
    assert (coco.coco_mask.decode(runs) == mask).all()


# ---- NSD-synthetic ------------------------------------------------------------------------------


def test_synthetic_folder_is_the_derivation(challenge, tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "nsd"
    sim.write_bricks(root / prepare_synthetic.STIMULI, 6, (720, 740), range(6), rng)
    sim.write_bricks(root / prepare_synthetic.OWN_STIMULI.format("subj03"), 3, (720, 740), range(3), rng)
    order = rng.permutation([0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 8, 8])
    (root / prepare_synthetic.DESIGN).parent.mkdir(parents=True)
    scipy.io.savemat(root / prepare_synthetic.DESIGN, {"masterordering": order[None] + 1.0})
    betas, masks = {}, challenge / "subj03/roi_masks"
    for hemi in HEMIS:
        vertices = np.flatnonzero(np.load(masks / f"{hemi}.all-vertices_fsaverage_space.npy"))
        series = 9 + rng.normal(0, 2, (9, len(vertices)))[order] + rng.standard_normal((21, len(vertices)))
        series[4, 0], series[:, 1], series[:, 2] = np.nan, 7, np.nan
        betas[hemi] = series.astype(np.float32)
        sim.write_mgh(root / prepare_synthetic.BETAS.format("subj03", hemi), dict(zip(vertices, betas[hemi].T)), 21)
    output = tmp_path / "synthetic"
    values = dict(NSD_DIR=root, CHALLENGE_DIR=challenge, TRIALS_PER_SESSION=21, N_SHARED=6, N_OWN=3)
    with pytest.raises(UserError) as error:
        run_stage(prepare_synthetic, **values, OUTPUT_DIR=output)  # subj01's files are missing
    missing = [prepare_synthetic.OWN_STIMULI.format("subj01")]
    missing += [prepare_synthetic.BETAS.format("subj01", hemi) for hemi in HEMIS]
    assert listed_files(str(error.value)) == sorted(f"s3://natural-scenes-dataset/{path}" for path in missing)
    run_stage(prepare_synthetic, **values, OUTPUT_DIR=output, SUBJECTS="subj03")
    m = (6 / 2 + 1 / 3 + 1 / 2 + 1 / 4) / 9
    for hemi in HEMIS:
        activity = np.load(output / f"subj03/test_split/test_fmri/{hemi}_test_fmri.npy")
        ceiling = np.load(output / f"subj03/test_split/noise_ceiling/{hemi}_noise_ceiling.npy")
        assert (activity[:, 1:3] == 0).all() and (ceiling[1:3] == 0).all() and activity.dtype == np.float32
        for v in [v for v in range(len(ceiling)) if v not in (1, 2)]:
            y = betas[hemi][:, v].astype(float)
            y = (y - np.nanmean(y)) / np.nanstd(y)
            parts = [[x for x, i in zip(y, order) if i == p and not np.isnan(x)] for p in range(9)]
            np.testing.assert_allclose(activity[:, v], [np.mean(part) for part in parts], atol=1e-6)
            noise = sum(np.var(part, ddof=1) * (len(part) - 1) for part in parts if len(part) > 1)
            noise /= sum(len(part) - 1 for part in parts)
            signal_to_noise = max(np.nanvar(y, ddof=1) - noise, 0) / noise
            assert abs(ceiling[v] - signal_to_noise / (signal_to_noise + m)) < 1e-9
        assert 0.5 < np.median(ceiling) < 1
    pictures = sorted(output.glob("subj03/test_split/test_images/*"))
    ids = [*range(73000, 73006), *range(73012, 73015)]
    assert [p.name for p in pictures] == [f"test-{row:04d}_nsd-{i:05d}.png" for row, i in enumerate(ids, start=1)]
    with h5py.File(root / prepare_synthetic.OWN_STIMULI.format("subj03")) as file:
        assert (np.asarray(Image.open(pictures[6])) == file["imgBrick"][0, 3:717, 13:727]).all()
