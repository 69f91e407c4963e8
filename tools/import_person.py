"""Your own person's pictures and activity -> a folder in the challenge's layout, for prepare_data.py and tools.adapt.

ROWS names the picture that each row of activity shows. Every session is z-scored if there is a column for it, then rows
of the same picture are averaged. Pictures are numbered in the order of their first row. CHALLENGE_DIR/SUBJECT gets

    training_split/training_images/train-00001.png …   _nsd-00013 is added to the names of pictures with an nsd id
    training_split/training_fmri/{lh,rh}_training_fmri.npy
    test_split/test_images, test_split/test_fmri        likewise, for rows whose split is test
    roi_masks/{lh,rh}.all-vertices_fsaverage_space.npy
    pictures.csv                                        which file shows which picture, and its number of rows
"""

from pathlib import Path

import numpy as np
import pandas as pd
from nilearn.surface import load_surf_data
from PIL import Image

from core.files import output_folder
from core.settings import run
from core.space import HEMIS, N_FSAVERAGE
from model import UserError
from prepare_data import read_npy
from tools.pictures import read_batches

PICTURES_DIR: str = "photos"  # pictures of common formats and any shape; the central square is used
ROWS: str = "rows.csv"  # a line per row of activity: picture; optional: session, split (train or test), nsd_id (from 0)
LH_ACTIVITY: str = "lh_activity.npy"  # (n_rows, n_vertices) npy, or GIFTI with a data array per row
RH_ACTIVITY: str = "rh_activity.npy"  # n_vertices: those of the mask or list, or all 163,842 of fsaverage
LH_VERTICES: str = "lh_vertices.npy"  # mask (163842,) of 0 and 1, or fsaverage indices: npy, GIFTI or txt
RH_VERTICES: str = "rh_vertices.npy"  # columns of activity are in this order
SUBJECT: str = "subj09"  # the person's name
CHALLENGE_DIR: str = "new_person"  # output; may hold several people
OVERWRITE: bool = False  # replace a person that was imported before

FEWEST_ROWS = 10  # per session; z-scores of fewer mean nothing


def read_array(path):
    """npy, text, or GIFTI, whose data arrays become rows."""
    if path.endswith(".npy"):
        return np.asarray(read_npy(path))
    try:
        return np.loadtxt(path) if path.endswith(".txt") else load_surf_data(path).T
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}).")


def read_vertices(path):
    """fsaverage indices (n_vertices,), in the file's order."""
    values = read_array(path)
    if values.shape == (N_FSAVERAGE,) and np.isin(values, (0, 1)).all():
        return np.flatnonzero(values)
    vertices = np.unique(values)
    if values.ndim != 1 or len(vertices) < values.size or not np.isin(vertices, np.arange(N_FSAVERAGE)).all():
        raise UserError(f"{path} is neither a mask (163842,) of 0 and 1 nor a list of different fsaverage indices.")
    return values.astype(np.int64)


def read_activity(path, rows, vertices):
    """(n_rows, n_vertices) float32, vertices ascending, every session z-scored; constant vertices are 0."""
    activity, widths = read_array(path), (len(vertices), N_FSAVERAGE)
    if activity.ndim != 2 or len(activity) != len(rows) or activity.shape[1] not in widths:
        raise UserError(f"{path} has shape {activity.shape}, expected {len(rows)} rows and {widths[0]} columns.")
    columns = np.sort(vertices) if activity.shape[1] == N_FSAVERAGE else np.argsort(vertices)
    activity = activity[:, columns].astype(np.float32)
    for session in rows["session"].dropna().unique():
        part = activity[rows["session"] == session]
        std = part.std(0)
        activity[rows["session"] == session] = (part - part.mean(0)) / np.where(std > 0, std, 1)
    return activity


def read_rows():
    """ROWS -> DataFrame picture, session, split, nsd_id (-1: none)."""
    rows = pd.read_csv(ROWS, dtype={"picture": str, "session": str})
    rows = rows.reindex(columns=["picture", "session", "split", "nsd_id"]).astype({"split": object})
    rows = rows.fillna({"split": "train", "nsd_id": -1})
    if rows["picture"].isna().any() or not rows["split"].isin(["train", "test"]).all():
        raise UserError(f"{ROWS} needs a file name in column picture of every line; column split holds train or test.")
    unclear = rows.groupby("picture")[["split", "nsd_id"]].nunique().gt(1).any(axis=1)
    if unclear.any():
        raise UserError(f"{ROWS} gives {unclear.idxmax()} two splits or two nsd ids.")
    sessions = rows["session"].value_counts(dropna=False)
    if rows["session"].notna().any() and (rows["session"].isna().any() or sessions.min() < FEWEST_ROWS):
        raise UserError(f"{ROWS} has rows without a session, or a session of fewer than {FEWEST_ROWS} rows.")
    return rows


def write_pictures(pictures, folder):
    """The DataFrame's pictures under their new names; all unreadable ones are listed at once."""
    paths, failures = {Path(PICTURES_DIR) / name: file for name, file in pictures["file"].items()}, []
    for batch in read_batches(list(paths), 64, failures):
        for picture in batch:
            Image.fromarray(picture.image).save(folder / paths[picture.path])
    if failures:
        raise UserError("\n".join([f"{len(failures)} pictures of {ROWS} cannot be read:", *failures[:20]]))


def main():
    rows, output = read_rows(), Path(CHALLENGE_DIR) / SUBJECT
    vertices = [read_vertices(path) for path in (LH_VERTICES, RH_VERTICES)]
    activity = [read_activity(path, rows, own) for path, own in zip((LH_ACTIVITY, RH_ACTIVITY), vertices)]
    pictures = rows.groupby("picture", sort=False).agg({"split": "first", "nsd_id": "first"})
    pictures["n_rows"] = rows["picture"].value_counts()
    number = pictures.groupby("split").cumcount().add(1).map("-{:05d}".format)
    ids = pictures["nsd_id"].map(lambda nsd_id: f"_nsd-{int(nsd_id):05d}" if nsd_id >= 0 else "")
    pictures["file"] = pictures["split"] + number + ids + ".png"
    with output_folder(output, OVERWRITE, marker="pictures.csv") as folder:
        for split, part in pictures.groupby("split"):
            name = {"train": "training"}.get(split, split)
            for kind in ("images", "fmri"):
                (folder / f"{name}_split/{name}_{kind}").mkdir(parents=True)
            write_pictures(part, folder / f"{name}_split/{name}_images")
            for hemi, values in zip(HEMIS, activity):
                mean = pd.DataFrame(values).groupby(rows["picture"].to_numpy()).mean().loc[part.index]
                np.save(folder / f"{name}_split/{name}_fmri/{hemi}_{name}_fmri.npy", mean.to_numpy(np.float32))
        (folder / "roi_masks").mkdir()
        for hemi, own in zip(HEMIS, vertices):
            mask = np.isin(np.arange(N_FSAVERAGE), own).astype(np.int64)
            np.save(folder / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy", mask)
        pictures.to_csv(folder / "pictures.csv")
    print(f"wrote {output}: {len(rows)} rows of {len(pictures)} pictures, {sum(map(len, vertices))} vertices")


if __name__ == "__main__":
    run(main, globals())
