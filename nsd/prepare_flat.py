"""NSD-Flat -> DATA_DIR, as prepare_data.py writes it, with pixels for vertices: python -m nsd.prepare_flat

NSD-Flat (Hugging Face, clane9/NSD-Flat) is the report's compressed NSD: single trials as pictures of the flat cortex.
Here the trials of a picture are averaged per subject.

    map        x -100 ... 100 mm, y -120 ... 95 mm of flat fsaverage, 1 mm a pixel: 215 x 200 pixels, row 0 on top
    activity   z-scored over the trials of a session, clipped to +-2.5, (z + 2.5) / 5 * 255 truncated to uint8
    outside    127; a pixel that is 127 in all maps of a subject is outside for that subject
    space      pixels that are inside for any subject, those of the left hemisphere (x < 0) first
    test       pictures of NSD-Flat's test split that are in nobody's training split: what --split challenge scores

A pixel is an average over vertices, so scores of pixels do not compare with scores of vertices.
"""

import glob
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

import prepare_data
from core.files import load_torch
from core.settings import constants, progress, run
from core.space import Space
from model import UserError

FLAT_DIR: str = "nsd_flat"  # folder with {train,test}-...-of-....parquet in it or below; a glob takes a part of them
DATA_DIR: str = prepare_data.DATA_DIR  # output, read by all later stages
SUBJECTS: str = ""  # such as subj01,subj05; empty: all in FLAT_DIR
SPLITS: str = "pictures"  # pictures: 85/10/5 % by picture; shared: pictures that all saw are the private test
SEED: int = prepare_data.SEED  # of the splits
OVERWRITE: bool = False  # prepare again although DATA_DIR is complete

MAP_CORNER, MAP_SHAPE = (-100, 95), (215, 200)  # mm, upper left; rows and columns
Z_LIMIT = 2.5  # activity is stored from -Z_LIMIT to Z_LIMIT
OUTSIDE = 127
BATCH = 100  # rows read at a time


def find_files(pattern):
    """A folder or a glob -> {"train": [path], "test": [path]}, sorted. A folder has to hold all shards."""
    is_folder = Path(pattern).is_dir()
    paths = sorted(Path(pattern).rglob("*.parquet") if is_folder else map(Path, glob.glob(pattern, recursive=True)))
    paths = [path for path in paths if "@eaDir" not in path.parts]  # network storage keeps thumbnails there
    files = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "test")}
    if not files["train"]:
        raise UserError(f"{pattern} has no train-*.parquet: download huggingface.co/datasets/clane9/NSD-Flat to it.")
    for split, shards in files.items():
        totals = {int(total) for path in shards for total in re.findall(r"-of-(\d+)", path.name)}
        if is_folder and totals and {len(shards)} != totals:  # the trials of a picture are in several shards
            raise UserError(f"{pattern} has {len(shards)} of {max(totals)} {split} shards: download the others.")
    return files


def read_trials(files):
    """One row per trial, in the files' order, with the columns test (bool), subject_id (from 0), nsd_id, trial_id."""
    frames = []
    for split, paths in files.items():
        for path in paths:
            names = pyarrow.parquet.read_schema(path).names
            wanted = ["subject_id", "nsd_id"] + ["trial_id"] * ("trial_id" in names)  # an older revision has none
            with pyarrow.parquet.ParquetFile(path) as file:
                frames.append(file.read(wanted).to_pandas().assign(test=split == "test"))
    trials = pandas.concat(frames, ignore_index=True).astype({"subject_id": int, "nsd_id": int})
    if "trial_id" in trials and trials[trials.trial_id.notna()].duplicated(["subject_id", "trial_id"]).any():
        raise UserError(f"{FLAT_DIR} has the same trial in several files: remove the copies.")
    return trials


def read_column(files, name):
    """(number of the first trial, values) of batches of one column, in the files' order."""
    start = 0
    for path in [*files["train"], *files["test"]]:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(BATCH, columns=[name]):
                yield start, batch.column(0)
                start += len(batch)


def read_bytes(column, rows):
    return [value["bytes"] for value in column.take(pyarrow.array(rows)).to_pylist()]


def read_map(content):
    """A PNG's bytes -> (215 * 200,) uint8."""
    values = np.asarray(Image.open(io.BytesIO(content)))
    if values.shape != MAP_SHAPE or values.dtype != np.uint8:
        raise UserError(f"{FLAT_DIR} has a map of {values.dtype} {values.shape}, expected uint8 {MAP_SHAPE}.")
    return values.ravel()


def sum_maps(files, row_of_trial, subject_of_row):
    """Sum of each row's maps (n_rows, 215 * 200) uint16, which pixels are inside for a subject (n_subjects, 215 * 200).
    row_of_trial: -1 for trials not used."""
    n_pixels = MAP_SHAPE[0] * MAP_SHAPE[1]
    sums = np.zeros((len(subject_of_row), n_pixels), np.uint16)  # 6.6 GB for all of NSD-Flat
    inside = np.zeros((subject_of_row.max() + 1, n_pixels), bool)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes outside Python's lock
        progress(total=len(row_of_trial), desc="averaging maps", unit="trial") as bar,
    ):
        for start, column in read_column(files, "activity"):
            rows = row_of_trial[start : start + len(column)]
            contents = read_bytes(column, np.flatnonzero(rows >= 0))
            for row, values in zip(rows[rows >= 0], pool.map(read_map, contents)):
                sums[row] += values
                inside[subject_of_row[row]] |= values != OUTSIDE
            bar.update(len(column))
    return sums, inside


def mean_activity(sums, rows, n_trials, subject_of_row, inside, pixels):
    """Blocks (n, n_pixels) float32 of the rows' mean activity, zero where a subject lacks a pixel."""
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        mean = sums[part][:, pixels] / n_trials[part, None] / 255 * (2 * Z_LIMIT) - Z_LIMIT
        yield np.where(inside[subject_of_row[part]][:, pixels], mean, 0).astype(np.float32)


def read_pictures(files, trials):
    """Pictures (256, 256, 3) uint8 of some trials (sorted), in their order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start, column in read_column(files, "image"):
            rows = trials[np.searchsorted(trials, start) : np.searchsorted(trials, start + len(column))] - start
            yield from pool.map(prepare_data.decode_picture, map(io.BytesIO, read_bytes(column, rows)))


def pixel_space(names, inside):
    """inside (n_subjects, 215 * 200) bool -> Space, pixels (n_pixels,): places on the map, row by row."""
    left = np.arange(inside.shape[1]) % MAP_SHAPE[1] < MAP_SHAPE[1] // 2
    used = inside.any(0)
    pixels = np.concatenate([np.flatnonzero(used & left), np.flatnonzero(used & ~left)])
    mask = torch.from_numpy(inside[:, pixels])
    return Space(names, torch.from_numpy(pixels), int((used & left).sum()), mask, {}, unit="pixels"), pixels


def prepare(made_with):
    files = find_files(FLAT_DIR)
    trials = read_trials(files)
    ids = {f"subj{i + 1:02d}": i for i in np.unique(trials.subject_id).tolist()}
    names = sorted(filter(None, re.split(r"[,\s]+", SUBJECTS))) or list(ids)
    if set(names) - ids.keys():
        raise UserError(f"SUBJECTS is {SUBJECTS}, but {FLAT_DIR} has {', '.join(ids)}.")
    trained = trials.nsd_id[~trials.test].unique()  # by anybody: no test pictures
    is_used = trials.subject_id.isin([ids[name] for name in names]) & ~(trials.test & trials.nsd_id.isin(trained))
    used = trials[is_used]
    groups = used.groupby(["test", "subject_id", "nsd_id"])  # sorted: training rows first, subject by subject
    row_of_trial = np.full(len(trials), -1)
    row_of_trial[is_used] = groups.ngroup()
    n_trials = groups.size()
    test, subject, nsd_id = (n_trials.index.get_level_values(i).to_numpy() for i in range(3))
    subject = np.searchsorted([ids[name] for name in names], subject)
    first = used.drop_duplicates("nsd_id").nsd_id  # first trial of each picture, training pictures first
    image = pandas.Series(range(len(first)), index=first)[nsd_id].to_numpy()
    training_ids, training_row = np.unique(nsd_id[~test], return_inverse=True)
    seen = np.zeros((len(training_ids), len(names)), bool)
    seen[training_row, subject[~test]] = True
    if SPLITS not in ("pictures", "shared"):
        raise UserError(f"SPLITS is {SPLITS}, expected pictures or shared.")
    split = (prepare_data.split_pictures if SPLITS == "pictures" else prepare_data.split_shared)(seen, SEED)
    if not all(seen[split == i].any(0).all() for i in (0, 1)):
        raise UserError(f"{FLAT_DIR} has a subject with too few pictures to train and validate with.")
    samples = {
        "subject": subject[~test], "image": image[~test], "split": split[training_row],
        "test_subject": subject[test], "test_image": image[test],
    }  # fmt: skip
    sums, inside = sum_maps(files, row_of_trial, subject)
    space, pixels = pixel_space(names, inside)
    activity, test_activity = (
        mean_activity(sums, np.flatnonzero(chosen), n_trials.to_numpy(), subject, inside, pixels)
        for chosen in (~test, test)
    )
    prepare_data.write_prepared(
        DATA_DIR, space=space, samples=samples, nsd_ids=first.to_numpy(copy=True), n_training_images=len(training_ids),
        activity=activity, test_activity=test_activity, images=read_pictures(files, first.index.to_numpy()),
        splits=SPLITS, made_with=made_with,
    )  # fmt: skip
    print(f"{space.n_vertices} pixels, whose scores do not compare with scores of vertices")
    print(f"{test.sum()} test samples of {len(first) - len(training_ids)} pictures in nobody's training split")


def main():
    made_with = {name: value for name, value in constants(globals()).items() if name in ("SUBJECTS", "SPLITS", "SEED")}
    made_with["SOURCE"] = "NSD-Flat"
    path = Path(DATA_DIR) / "prepared.pt"
    if path.exists() and not OVERWRITE:
        before = load_torch(path, prepare_data.FORMAT, "prepare_flat.py")["made_with"]
        if before != made_with:
            raise UserError(f"{DATA_DIR} was prepared with {before}, not {made_with}; --overwrite true replaces it.")
        print(f"{DATA_DIR} is already prepared; --overwrite true prepares it again")
    else:
        prepare(made_with)


if __name__ == "__main__":
    run(main, globals())
