"""NSD-Flat -> DATA_DIR, as prepare_data.py writes it, with pixels for vertices: python -m nsd.prepare_flat

NSD-Flat (Hugging Face, clane9/NSD-Flat) is the report's compressed NSD: single trials as pictures of the flat cortex.
Here the trials of a picture are averaged per subject. Scores of pixels do not compare with scores of vertices.

    map        x -100 ... 100 mm, y -120 ... 95 mm of flat fsaverage, 1 mm per pixel: 215 x 200 pixels, row 0 on top
    activity   z-scored over the trials of a session, clipped to +-2.5, (z + 2.5) / 5 * 255 truncated to uint8;
               127 in all maps of a subject where it has no vertices
"""

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import torch
from PIL import Image

import prepare_data
from core.settings import is_finished, progress, run
from core.space import Space
from model import UserError

FLAT_DIR: str = "nsd_flat"  # folder with {train,test}-...-of-....parquet in it or below
SHARED = prepare_data, "DATA_DIR SUBJECTS SPLITS SEED OVERWRITE"  # set there

MAP_CORNER, MAP_SHAPE = (-100, 95), (215, 200)  # mm, upper left; rows and columns
Z_LIMIT = 2.5  # activity is stored from -Z_LIMIT to Z_LIMIT
OUTSIDE = 127
BATCH = 100  # rows read at a time


def find_files():
    """Paths of the training shards, then of the test shards, each sorted; all have to be there."""
    files = []
    for split in ("train", "test"):  # network storage keeps thumbnails in @eaDir
        shards = sorted(p for p in Path(FLAT_DIR).rglob(f"{split}*.parquet") if "@eaDir" not in p.parts)
        totals = {int(total) for path in shards for total in re.findall(r"-of-(\d+)", path.name)}
        if totals and {len(shards)} != totals:  # the trials of a picture are in several shards
            raise UserError(f"{FLAT_DIR} has {len(shards)} of {max(totals)} {split} shards: download the others.")
        files += shards
        if not files:
            raise UserError(f"{FLAT_DIR} has no train-*.parquet: download huggingface.co/datasets/clane9/NSD-Flat.")
    return files


def read_trials(files):
    """One row per trial, in the files' order, with the columns subject (name), nsd_id, test (bool), trial_id."""
    dataset = pyarrow.dataset.dataset(files)
    columns = [name for name in ("subject_id", "nsd_id", "trial_id") if name in dataset.schema.names]
    trials = dataset.to_table([*columns, "__filename"]).to_pandas()  # older revisions lack trial_id
    trials["test"] = [Path(name).name.startswith("test") for name in trials.pop("__filename")]
    trials["subject"] = trials["subject_id"].map(lambda i: f"subj{i + 1:02d}")
    if "trial_id" in columns and trials.dropna().duplicated(["subject", "trial_id"]).any():
        raise UserError(f"{FLAT_DIR} has the same trial in several files: remove the copies.")
    return trials


def decode(files, name, trials, function):
    """Yield function(PNG) of some trials in one column, decoded in threads. trials: their numbers, sorted."""
    start = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
        for path in files:  # a dataset's scanner reads 2 GB ahead
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                for batch in file.iter_batches(BATCH, columns=[name]):
                    first, last = np.searchsorted(trials, (start, start + len(batch)))
                    values = batch.column(0).take(pyarrow.array(trials[first:last] - start)).to_pylist()
                    yield from pool.map(function, [io.BytesIO(value["bytes"]) for value in values])
                    start += len(batch)


def sum_maps(files, trials, rows, subject_of_row):
    """Sum of each row's maps (n_rows, 215 * 200) uint16, which pixels are inside for a subject (n_subjects, 215 * 200).
    trials: numbers of the trials used, sorted; rows: the row that each is added to."""
    sums = np.zeros((len(subject_of_row), np.prod(MAP_SHAPE)), np.uint16)  # 6.6 GB for all of NSD-Flat
    inside = np.zeros((subject_of_row.max() + 1, np.prod(MAP_SHAPE)), bool)
    maps = decode(files, "activity", trials, lambda file: np.asarray(Image.open(file)).ravel())
    for row, values in zip(rows, progress(maps, total=len(trials), desc="averaging maps", unit="trial")):
        sums[row] += values
        inside[subject_of_row[row]] |= values != OUTSIDE
    return sums, inside


def main():
    if prepare_data.SPLITS not in ("pictures", "shared"):
        raise UserError(f"SPLITS is {prepare_data.SPLITS}, expected pictures or shared.")
    made_with = {name: vars(prepare_data)[name] for name in ("SUBJECTS", "SPLITS", "SEED")} | {"SOURCE": "NSD-Flat"}
    if is_finished(Path(prepare_data.DATA_DIR) / "prepared.pt", prepare_data.FORMAT, made_with, prepare_data.OVERWRITE):
        return
    files = find_files()
    trials = read_trials(files)
    present = sorted(trials["subject"].unique())
    names = sorted(prepare_data.SUBJECTS.replace(",", " ").split()) or present
    if not set(names) <= set(present):
        raise UserError(f"SUBJECTS is {prepare_data.SUBJECTS}, but {FLAT_DIR} has {', '.join(present)}.")
    trained = trials["nsd_id"][~trials["test"]]  # by anybody: no test pictures
    used = trials[trials["subject"].isin(names) & ~(trials["test"] & trials["nsd_id"].isin(trained))]
    groups = used.groupby(["test", "subject", "nsd_id"])  # sorted: training rows first, subject by subject
    rows = groups.size().reset_index(name="n_trials")
    first = used.drop_duplicates("nsd_id")["nsd_id"]  # first trial of each picture, training pictures first
    test, n_trials, nsd_id = (rows[name].to_numpy() for name in ("test", "n_trials", "nsd_id"))
    subject, image = np.searchsorted(names, rows["subject"]), pd.Index(first).get_indexer(nsd_id)
    training_ids, training_row = np.unique(nsd_id[~test], return_inverse=True)
    samples = {
        "subject": subject[~test], "image": image[~test],
        "split": prepare_data.assign_splits(names, subject[~test], training_row),
        "test_subject": subject[test], "test_image": image[test],
    }  # fmt: skip
    sums, inside = sum_maps(files, used.index.to_numpy(), groups.ngroup().to_numpy(), subject)
    left = np.arange(inside.shape[1]) % MAP_SHAPE[1] < MAP_SHAPE[1] // 2
    sides = [np.flatnonzero(inside.any(0) & side) for side in (left, ~left)]
    pixels = np.concatenate(sides)  # places on the map, row by row
    mask = inside.take(pixels, axis=1)
    space = Space(names, torch.from_numpy(pixels), len(sides[0]), torch.from_numpy(mask), {}, unit="pixels")

    def activity(chosen):
        """Blocks (n, n_pixels) float32 of these rows' mean activity, zero where a subject lacks a pixel."""
        for part in np.split(chosen, range(BATCH, len(chosen), BATCH)):
            mean = sums[part][:, pixels] / n_trials[part, None] / 255 * (2 * Z_LIMIT) - Z_LIMIT
            yield np.where(mask[subject[part]], mean, 0).astype(np.float32)

    prepare_data.write_prepared(
        prepare_data.DATA_DIR, space=space, samples=samples, nsd_ids=first.to_numpy(copy=True),
        n_training_images=len(training_ids), splits=prepare_data.SPLITS, made_with=made_with,
        activity=activity(np.flatnonzero(~test)), test_activity=activity(np.flatnonzero(test)),
        images=decode(files, "image", first.index.to_numpy(), prepare_data.decode_picture),
    )  # fmt: skip
    print(f"{space.n_vertices} pixels, whose scores are not comparable to those of vertices; {test.sum()} test samples")


if __name__ == "__main__":
    run(main, globals())
