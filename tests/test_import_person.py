"""Somebody's own pictures and activity, through tools/import_person.py into prepared data, against a plain loop."""

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import prepare_data
from core.space import HEMIS, N_FSAVERAGE
from model import UserError
from tests.conftest import run_stage
from tools import import_person
from tools.pictures import read_picture

N_PICTURES, N_ROWS = 24, 60
VERTICES = {"lh": np.array([900, 3, 40000, 17]), "rh": np.array([5, 77, 163841])}  # lh: not in ascending order


@pytest.fixture
def world(tmp_path):
    """Photos of several formats and shapes, shown in random order; lh as GIFTI with a list, rh as npy with a mask."""
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    names = [f"{chr(122 - i % 26)}{i}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(N_PICTURES)]
    for name in names:
        shape = (*rng.integers(40, 90, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(photos / name)
    shown = np.concatenate([np.arange(N_PICTURES), rng.integers(0, N_PICTURES, N_ROWS - N_PICTURES)])
    shown = rng.permutation(shown)
    rows = pd.DataFrame({"picture": np.array(names)[shown], "session": np.repeat(["1", "2"], [25, 35])})
    rows["split"] = np.where(shown % 6 == 5, "test", "train")
    rows["nsd_id"] = np.where(shown % 2, shown + 100, np.nan)
    activity = {"lh": rng.standard_normal((N_ROWS, 4)) * 3 + 7, "rh": rng.standard_normal((N_ROWS, N_FSAVERAGE))}
    activity = {hemi: values.astype(np.float32) for hemi, values in activity.items()}
    mask = np.isin(np.arange(N_FSAVERAGE), VERTICES["rh"]).astype(np.float32)
    for name, arrays in (("lh", activity["lh"]), ("rh_mask", [mask])):
        arrays = [nibabel.gifti.GiftiDataArray(a, datatype="NIFTI_TYPE_FLOAT32") for a in arrays]
        nibabel.save(nibabel.gifti.GiftiImage(darrays=arrays), tmp_path / f"{name}.func.gii")
    np.savetxt(tmp_path / "lh.txt", VERTICES["lh"], fmt="%d")
    np.save(tmp_path / "rh.npy", activity["rh"])
    activity["rh"] = activity["rh"][:, VERTICES["rh"]]
    return tmp_path, rows, activity


def run_import(folder, rows, **constants):
    rows.to_csv(folder / "rows.csv", index=False)
    options = dict(
        PICTURES_DIR=folder / "photos", ROWS=folder / "rows.csv", LH_ACTIVITY=folder / "lh.func.gii",
        RH_ACTIVITY=folder / "rh.npy", LH_VERTICES=folder / "lh.txt", RH_VERTICES=folder / "rh_mask.func.gii",
        SUBJECT="anna", CHALLENGE_DIR=folder / "challenge",
    )  # fmt: skip
    run_stage(import_person, **options | constants)


def test_round_trip(world):
    """Every picture keeps its activity: z-scored per session, averaged over repeats, vertices in ascending order."""
    folder, rows, activity = world
    run_import(folder, rows)
    table = pd.read_csv(folder / "challenge/anna/pictures.csv", index_col="picture")
    assert table.index.tolist() == rows["picture"].drop_duplicates().tolist()  # numbered as they first occur
    z = {}
    for hemi in HEMIS:
        z[hemi] = activity[hemi].astype(np.float64)
        for session in ("1", "2"):
            inside = (rows["session"] == session).to_numpy()
            z[hemi][inside] = (z[hemi][inside] - z[hemi][inside].mean(0)) / z[hemi][inside].std(0)
    for split, part in table.groupby("split"):
        long = {"train": "training", "test": "test"}[split]
        paths, ids = prepare_data.list_pictures(folder / f"challenge/anna/{long}_split/{long}_images")
        assert [path.name for path in paths] == part["file"].tolist()
        for hemi in HEMIS:
            values = np.load(folder / f"challenge/anna/{long}_split/{long}_fmri/{hemi}_{long}_fmri.npy")
            assert values.dtype == np.float32
            for row, name in enumerate(part.index):
                expected = z[hemi][rows["picture"] == name].mean(0)[np.argsort(VERTICES[hemi])]
                np.testing.assert_allclose(values[row], expected, atol=1e-5)
        for path, nsd_id, name in zip(paths, ids, part.index):
            assert (prepare_data.decode_picture(path) == read_picture(folder / "photos" / name).image).all()
            assert nsd_id == table.loc[name, "nsd_id"] or nsd_id < 0 and table.loc[name, "nsd_id"] == -1
    run_stage(prepare_data, CHALLENGE_DIR=folder / "challenge", DATA_DIR=folder / "data", SUBJECTS="anna")
    data = prepare_data.load(folder / "data")
    assert data.space.vertices.tolist() == sorted(VERTICES["lh"]) + sorted(VERTICES["rh"])
    by_hemi = [np.load(folder / f"challenge/anna/training_split/training_fmri/{h}_training_fmri.npy") for h in HEMIS]
    assert (data.activity == np.concatenate(by_hemi, axis=1).astype(np.float16)).all()
    train = table[table["split"] == "train"].index
    for name, image in zip(train, data.image):
        assert (data.images[image] == read_picture(folder / "photos" / name).image).all()


def test_activity_without_sessions_is_taken_as_it_is(world):
    folder, rows, activity = world
    run_import(folder, rows.drop(columns=["session", "split", "nsd_id"]).assign(picture=rows["picture"]))
    table = pd.read_csv(folder / "challenge/anna/pictures.csv", index_col="picture")
    values = np.load(folder / "challenge/anna/training_split/training_fmri/lh_training_fmri.npy")
    expected = [activity["lh"][rows["picture"] == name].mean(0)[np.argsort(VERTICES["lh"])] for name in table.index]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert not (folder / "challenge/anna/test_split").exists() and table["file"].iloc[0] == "train-00001.png"


@pytest.mark.parametrize("fault, message", [
    ("pictures", r"(?s)2 pictures .* cannot be read.*broken\.jpg.*missing\.png"), ("short session", "fewer than 10"),
    ("both splits", "two splits"), ("rows", "expected 59 rows"), ("vertices", "neither a mask"),
])  # fmt: skip
def test_faults_leave_nothing(world, fault, message):
    folder, rows, _ = world
    if fault == "pictures":
        (folder / "photos/broken.jpg").write_bytes(b"no picture")
        rows.loc[[3, 4], "picture"] = ["broken.jpg", "missing.png"]
        rows.loc[[3, 4], ["split", "nsd_id"]] = ["train", np.nan]
    elif fault == "short session":
        rows.loc[:5, "session"] = "0"
    elif fault == "both splits":
        repeated = rows["picture"][rows["picture"].duplicated()].iloc[0]
        rows.loc[rows.index[rows["picture"] == repeated][0], ["split", "nsd_id"]] = ["test", np.nan]
        rows.loc[rows.index[rows["picture"] == repeated][1], ["split", "nsd_id"]] = ["train", np.nan]
    elif fault == "rows":
        rows = rows.iloc[1:]
    else:
        np.savetxt(folder / "lh.txt", [1, 1, 2, 3], fmt="%d")
    with pytest.raises(UserError, match=message):
        run_import(folder, rows)
    assert not (folder / "challenge/anna").exists()
