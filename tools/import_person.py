"""Your own person's pictures and activity -> a folder in the challenge's layout, for prepare_data.py and tools.adapt.

ROWS names the picture that each row of activity shows. Every session is z-scored if there is a column for it, then rows
of the same picture are averaged. CHALLENGE_DIR/SUBJECT gets training_split, test_split (rows whose split is test),
roi_masks, and pictures.csv, which says which file shows which picture. Example: docs/adapt.md
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
OVERWRITE: bool = False  # replace a previously imported person

FEWEST_ROWS = 10  # per session; z-scores of fewer mean nothing


def read_array(path):
    """npy, text, or GIFTI, whose data arrays become rows."""
    if path.endswith(".npy"):
        return np.asarray(read_npy(path))
    return np.loadtxt(path) if path.endswith(".txt") else load_surf_data(path).T


def read_hemisphere(activity_path, vertices_path, rows):
    """-> mask (163842,) of 0 and 1, and activity (n_rows, n_vertices) float32 in its order, z-scored per session."""
    activity, vertices = read_array(activity_path), read_array(vertices_path)
    if vertices.shape == (N_FSAVERAGE,) and np.isin(vertices, (0, 1)).all():
        vertices = np.flatnonzero(vertices)
    if activity.shape not in ((len(rows), len(vertices)), (len(rows), N_FSAVERAGE)):
        raise UserError(f"{activity_path} has shape {activity.shape}, expected {len(rows)} x {len(vertices)}.")
    columns = np.argsort(vertices) if activity.shape[1] == len(vertices) else np.sort(vertices).astype(int)
    activity = activity[:, columns].astype(np.float32)
    if "session" in rows:
        for part in rows.groupby("session").indices.values():
            std = activity[part].std(0)
            activity[part] = (activity[part] - activity[part].mean(0)) / np.where(std > 0, std, 1)
    return np.isin(np.arange(N_FSAVERAGE), vertices).astype(np.int64), activity


def read_rows():
    """ROWS -> DataFrame picture, split, nsd_id (-1: none) and, if it is there, session."""
    rows = pd.read_csv(ROWS, dtype={"picture": str, "split": str})
    rows = rows.combine_first(pd.DataFrame({"split": "train", "nsd_id": -1}, rows.index))
    if rows["picture"].isna().any() or not rows["split"].isin(["train", "test"]).all():
        raise UserError(f"{ROWS} needs a file name in column picture of every line; column split holds train or test.")
    if rows.groupby("picture")[["split", "nsd_id"]].nunique().gt(1).any(axis=None):
        raise UserError(f"{ROWS} gives a picture two splits or two nsd ids.")
    if "session" in rows and not (rows["session"].map(rows["session"].value_counts()) >= FEWEST_ROWS).all():
        raise UserError(f"{ROWS} has rows without a session, or a session of fewer than {FEWEST_ROWS} rows.")
    return rows


def main():
    rows, output, failures = read_rows(), Path(CHALLENGE_DIR) / SUBJECT, []
    paths = (LH_ACTIVITY, LH_VERTICES), (RH_ACTIVITY, RH_VERTICES)
    hemispheres = {hemi: read_hemisphere(*pair, rows) for hemi, pair in zip(HEMIS, paths)}
    by_picture = rows.groupby("picture", sort=False)
    pictures = by_picture[["split", "nsd_id"]].first().assign(n_rows=by_picture.size())
    number = pictures.groupby("split").cumcount().add(1).map("-{:05d}".format)
    ids = pictures["nsd_id"].map("_nsd-{:05.0f}".format).where(pictures["nsd_id"] >= 0, "")
    pictures["file"] = pictures["split"] + number + ids + ".png"
    with output_folder(output, OVERWRITE, marker="pictures.csv") as folder:
        for split, part in pictures.groupby("split"):
            name = split.replace("train", "training")
            images, fmri = (folder / f"{name}_split/{name}_{kind}" for kind in ("images", "fmri"))
            images.mkdir(parents=True)
            fmri.mkdir()
            files = {Path(PICTURES_DIR) / picture: images / file for picture, file in part["file"].items()}
            for batch in read_batches(list(files), 64, failures):
                for picture in batch:
                    Image.fromarray(picture.image).save(files[picture.path])
            for hemi, (_, activity) in hemispheres.items():
                mean = pd.DataFrame(activity).groupby(rows["picture"]).mean().loc[part.index]
                np.save(fmri / f"{hemi}_{name}_fmri.npy", mean.to_numpy(np.float32))
        if failures:
            raise UserError("\n".join([f"{len(failures)} pictures of {ROWS} cannot be read:", *failures[:20]]))
        (folder / "roi_masks").mkdir()
        for hemi, (mask, _) in hemispheres.items():
            np.save(folder / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy", mask)
        pictures.to_csv(folder / "pictures.csv")
    print(f"wrote {output}: {len(rows)} rows of {len(pictures)} pictures")


if __name__ == "__main__":
    run(main, globals())
