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
    (tmp_path / "photos").mkdir()
    names = [f"{chr(122 - i % 26)}{i}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(N_PICTURES)]
    for name in names:
        shape = (*rng.integers(40, 90, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "photos" / name)
    shown = rng.permutation(np.concatenate([np.arange(N_PICTURES), rng.integers(0, N_PICTURES, N_ROWS - N_PICTURES)]))
    rows = pd.DataFrame({"picture": np.array(names)[shown], "session": np.repeat(["1", "2"], [25, 35])})
    rows["split"] = np.where(shown % 6 == 5, "test", "train")
    rows["nsd_id"] = np.where(shown % 2, shown + 100, np.nan)
    lh, rh = (rng.standard_normal((N_ROWS, n), dtype=np.float32) * 3 + 7 for n in (4, N_FSAVERAGE))
    mask = np.isin(np.arange(N_FSAVERAGE), VERTICES["rh"]).astype(np.float32)
    for name, arrays in (("lh", lh), ("rh_mask", [mask])):
        arrays = [nibabel.gifti.GiftiDataArray(a, datatype="NIFTI_TYPE_FLOAT32") for a in arrays]
        nibabel.save(nibabel.gifti.GiftiImage(darrays=arrays), tmp_path / f"{name}.func.gii")
    np.savetxt(tmp_path / "lh.txt", VERTICES["lh"], fmt="%d")
    np.save(tmp_path / "rh.npy", rh)
    return tmp_path, rows, np.concatenate([lh[:, np.argsort(VERTICES["lh"])], rh[:, VERTICES["rh"]]], 1)


def run_import(folder, rows):
    """-> pictures.csv"""
    rows.to_csv(folder / "rows.csv", index=False)
    run_stage(
        import_person, PICTURES_DIR=folder / "photos", ROWS=folder / "rows.csv", LH_ACTIVITY=folder / "lh.func.gii",
        RH_ACTIVITY=folder / "rh.npy", LH_VERTICES=folder / "lh.txt", RH_VERTICES=folder / "rh_mask.func.gii",
        SUBJECT="anna", CHALLENGE_DIR=folder / "challenge",
    )  # fmt: skip
    return pd.read_csv(folder / "challenge/anna/pictures.csv", index_col="picture")


@pytest.mark.parametrize("columns", [["picture", "session", "split", "nsd_id"], ["picture"]])
def test_round_trip(world, columns):
    """Every picture keeps its activity: z-scored per session, averaged over repeats, vertices in ascending order."""
    folder, rows, expected = world
    table = run_import(folder, rows[columns])
    assert table.index.tolist() == rows["picture"].drop_duplicates().tolist()  # numbered as they first occur
    for session in ("1", "2") if "session" in columns else ():
        inside = (rows["session"] == session).to_numpy()
        expected[inside] = (expected[inside] - expected[inside].mean(0)) / expected[inside].std(0)
    for split, part in table.groupby("split"):
        assert split == "train" or "split" in columns
        name = {"train": "training"}.get(split, split)
        root = folder / f"challenge/anna/{name}_split"
        paths, ids = prepare_data.list_pictures(root / f"{name}_images")
        assert [path.name for path in paths] == part["file"].tolist()
        values = np.concatenate([np.load(root / f"{name}_fmri/{hemi}_{name}_fmri.npy") for hemi in HEMIS], 1)
        for path, nsd_id, row, (picture, facts) in zip(paths, ids, values, part.iterrows()):
            assert (prepare_data.decode_picture(path) == read_picture(folder / "photos" / picture).image).all()
            assert max(nsd_id, -1) == facts["nsd_id"]
            np.testing.assert_allclose(row, expected[rows["picture"] == picture].mean(0), atol=1e-5)
    if "session" in columns:  # other activity is refused: not z-scored
        run_stage(prepare_data, CHALLENGE_DIR=folder / "challenge", DATA_DIR=folder / "data", SUBJECTS="anna")
        assert prepare_data.load(folder / "data").space.vertices.tolist() == [3, 17, 900, 40000, 5, 77, 163841]


@pytest.mark.parametrize("fault, message", [
    ("pictures", r"(?s)^2 pictures .*(broken.*missing|missing.*broken)"), ("short session", "fewer than 10"),
    ("no session", "without a session"), ("both splits", "two splits"), ("rows", "expected 59 x"),
])  # fmt: skip
def test_faults_leave_nothing(world, fault, message):
    folder, rows, _ = world
    if fault == "pictures":
        (folder / "photos/broken.jpg").write_bytes(b"no picture")
        rows.loc[[3, 4], ["picture", "split"]] = [["broken.jpg", "train"], ["missing.png", "test"]]
    elif fault.endswith("session"):
        rows.loc[:5, "session"] = "0" if fault == "short session" else None
    elif fault == "both splits":
        rows.loc[rows["picture"].duplicated(), "split"] = "test"
    else:
        rows = rows.iloc[1:]
    with pytest.raises(UserError, match=message):
        run_import(folder, rows)
    assert not (folder / "challenge/anna").exists()
