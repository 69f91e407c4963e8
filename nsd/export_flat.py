"""Raw NSD and COCO -> NSD-Flat's Parquet files: python -m nsd.export_flat

One row is one trial: the picture at 256 px, the z-scored activity on the flat cortex (format: prepare_flat.py), and
COCO's objects and captions. A pixel is the mean of the subject's vertices within 3 sigma, weighted by a Gaussian of
FWHM 1 mm. Each shard is written atomically: a killed run continues with the next one.
"""

import ast
import functools
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree

from core.files import atomic_write, fingerprint, lock
from core.settings import progress, run
from core.space import HEMIS
from model import PICTURE_SIZE, UserError
from nsd import coco, prepare_flat, prepare_nsd
from nsd.prepare_flat import MAP_CORNER, MAP_SHAPE, OUTSIDE, Z_LIMIT
from nsd.prepare_nsd import BETAS

COCO_DIR: str = "annotations"  # annotations_trainval2017.zip: {instances,captions}_{train,val}2017.json
SURFACE_DIR: str = "pycortex"  # pycortex's flat fsaverage: flat_{lh,rh}.gii (163,842 places each, x and y in mm)
FLAT_DIR: str = prepare_flat.FLAT_DIR  # output: data/{train,test}-...-of-....parquet
SHARED = prepare_nsd, "NSD_DIR RSC_DIR SUBJECTS N_SESSIONS TRIALS_PER_SESSION"  # set there

SIGMA = 1 / 2.35482  # mm, of a Gaussian with FWHM 1 mm
ROWS_PER_GROUP, ROWS_PER_SHARD = 100, 3612  # as published: 54 shards of 195,000 trials
STIMULUS_INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
FLAGS = ("flagged", "BOLD5000", "shared1000")
REPETITIONS = [f"subject{subject}_rep{repetition}" for subject in range(1, 9) for repetition in range(3)]


def schema(made_from):
    """NSD-Flat's columns, with the metadata by which Hugging Face's library shows PNGs as pictures."""
    picture = {"bytes": b"", "path": ""}
    objects = {
        "area": [0], "bbox": [[0.0]], "category": [""], "iscrowd": [0],
        "segmentation": [{"counts": "", "poly": [[0.0]], "size": [0]}], "supercategory": [""], "target": [0],
    }  # fmt: skip
    row = {
        "subject_id": 0, "trial_id": 0, "session_id": 0, "nsd_id": 0, "image": picture, "activity": picture,
        "subject": "", **dict.fromkeys(FLAGS, False), "coco_split": "", "coco_id": 0, "objects": objects,
        "captions": [""], "repetitions": dict.fromkeys(REPETITIONS, 0),
    }  # fmt: skip
    features = {name: {"_type": "Image"} for name in ("image", "activity")}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "made_from": made_from}
    return pyarrow.Table.from_pylist([row]).schema.with_metadata(metadata)  # types are those of the values


def load_surface(folder):
    """{hemi: places on the map (163842, 2) in mm}: left hemisphere at x <= -2 mm, right hemisphere at x >= 2 mm."""
    surfaces = {hemi: nibabel.load(Path(folder) / f"flat_{hemi}.gii") for hemi in HEMIS}
    places = {hemi: gifti.agg_data("pointset")[:, :2].astype(np.float64) for hemi, gifti in surfaces.items()}
    places["lh"][:, 0] += -2 - places["lh"][:, 0].max()
    places["rh"][:, 0] += 2 - places["rh"][:, 0].min()
    return places


def resampler(places):
    """places (n_vertices, 2) mm -> sparse weights (215 * 200, n_vertices); rows add up to 1, or to 0 outside."""
    height, width = MAP_SHAPE
    x, y = MAP_CORNER[0] + np.arange(width) + 0.5, MAP_CORNER[1] - np.arange(height) - 0.5
    centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    near = cKDTree(centres).sparse_distance_matrix(cKDTree(places), 3 * SIGMA, output_type="coo_matrix")
    weights = sparse.csr_array((np.exp(-((near.data / SIGMA) ** 2) / 2), (near.row, near.col)), near.shape)
    total = weights.sum(axis=1)
    return sparse.diags_array(1 / np.where(total > 0, total, 1)) @ weights


def read_session(name, session, mask):
    """Betas (n_trials, n_vertices of both hemispheres) of a subject's session, counted from 0."""
    paths, n_trials = [BETAS.format(name, hemi, session + 1) for hemi in HEMIS], prepare_nsd.TRIALS_PER_SESSION
    betas = [prepare_nsd.read_trials(path, n_trials, mask[hemi]) for path, hemi in zip(paths, HEMIS)]
    return np.concatenate(betas, axis=1)


def draw_map(activity, weights):
    """Activity (n_vertices,) of a trial -> map (215, 200) uint8."""
    z = np.clip(weights @ activity, -Z_LIMIT, Z_LIMIT)
    levels = ((z + Z_LIMIT) / (2 * Z_LIMIT) * 255).astype(np.uint8)
    levels[np.diff(weights.indptr) == 0] = OUTSIDE
    return levels.reshape(MAP_SHAPE)


def plan_shards(shown):
    """{file name: DataFrame with subject, trial (from 0), nsd_id}. shown: see prepare_nsd.survey()."""
    subjects, shards = [], {}
    for name, nsd_ids in shown.items():
        trials = pd.DataFrame({"subject": name, "trial": np.arange(nsd_ids.size), "nsd_id": nsd_ids.ravel()})
        held_out = trials["trial"] >= nsd_ids[: -prepare_nsd.N_TEST_SESSIONS].size
        subjects.append(trials.assign(split=np.where(held_out, "test", "train")))
    for split, trials in pd.concat(subjects).groupby("split", sort=False):
        n = -(-len(trials) // ROWS_PER_SHARD)
        for i in range(n):
            rows = slice(i * len(trials) // n, (i + 1) * len(trials) // n)
            shards[f"{split}-{i:05d}-of-{n:05d}.parquet"] = trials[rows]
    return shards


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def record(name, weights, infos, annotations, trial, nsd_id, picture, activity):
    """One row. infos: lines of STIMULUS_INFO by nsd id; picture (425, 425, 3) uint8; activity: see draw_map()."""
    info = infos[nsd_id]
    objects, captions = coco.convert(annotations[info["cocoSplit"], info["cocoId"]], ast.literal_eval(info["cropBox"]))
    small = Image.fromarray(picture).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
    return {
        "subject_id": prepare_nsd.EVERYBODY.index(name), "trial_id": trial,
        "session_id": trial // prepare_nsd.TRIALS_PER_SESSION, "nsd_id": nsd_id, "image": png(np.asarray(small)),
        "activity": png(draw_map(activity, weights)), "subject": name, **{flag: bool(info[flag]) for flag in FLAGS},
        "coco_split": info["cocoSplit"], "coco_id": info["cocoId"], "objects": objects, "captions": captions,
        "repetitions": {column: info[column] for column in REPETITIONS},
    }  # fmt: skip


def write_shard(path, trials, columns, mask, grids, infos, annotations, bar):
    """trials: see plan_shards(); columns: the schema; grids: {subject: (vertices of the mask, weights)}."""
    n_trials = prepare_nsd.TRIALS_PER_SESSION
    with (
        h5py.File(Path(prepare_nsd.NSD_DIR) / prepare_nsd.STIMULI, locking=False) as stimuli,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
        atomic_write(path) as file,
        pyarrow.parquet.ParquetWriter(file, columns) as writer,
    ):
        for (name, session), part in trials.groupby(["subject", trials["trial"] // n_trials]):
            complete, weights = grids[name]
            activity = prepare_nsd.zscore(read_session(name, session, mask)[:, complete])
            build = functools.partial(record, name, weights, infos, annotations)
            for i in range(0, len(part), ROWS_PER_GROUP):
                group, ids = part.trial[i : i + ROWS_PER_GROUP], part.nsd_id[i : i + ROWS_PER_GROUP]
                pictures = [stimuli["imgBrick"][nsd_id] for nsd_id in ids]
                rows = list(pool.map(build, group, ids, pictures, activity[group % n_trials]))
                writer.write_table(pyarrow.Table.from_pylist(rows, columns))
                bar.update(len(rows))


def main():
    output, n_sessions = Path(FLAT_DIR) / "data", prepare_nsd.choose_subjects()
    shown, _ = prepare_nsd.survey(n_sessions, [STIMULUS_INFO])
    mask, surface = prepare_nsd.read_mask(), load_surface(SURFACE_DIR)
    made_from, shards = fingerprint(shown, mask, surface), plan_shards(shown)
    for path in output.glob("*.parquet"):
        before = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"made_from")
        if path.name not in shards or before != made_from.encode():
            raise UserError(f"{path} was made from other data: choose another FLAT_DIR.")
        del shards[path.name]
    ids = np.unique(np.concatenate([nsd_ids.ravel() for nsd_ids in shown.values()]))
    infos = pd.read_csv(Path(prepare_nsd.NSD_DIR) / STIMULUS_INFO, index_col="nsdId").loc[ids].to_dict("index")
    pictures = {(info["cocoSplit"], info["cocoId"]) for info in infos.values()}
    annotations = coco.read_annotations(COCO_DIR, pictures) if shards else {}
    places, grids = np.concatenate([surface[hemi][mask[hemi]] for hemi in HEMIS]), {}
    for name in sorted(set().union(*(trials["subject"] for trials in shards.values()))):
        complete = np.ones(len(places), bool)
        for session in progress(range(n_sessions[name]), desc=f"{name}: missing vertices", unit="session"):
            complete &= ~np.isnan(read_session(name, session, mask)).any(0)
        grids[name] = complete, resampler(places[complete])
    with lock(FLAT_DIR), progress(total=sum(map(len, shards.values())), desc="writing trials", unit="trial") as bar:
        for name, trials in shards.items():
            write_shard(output / name, trials, schema(made_from), mask, grids, infos, annotations, bar)
    print(f"wrote {output}: {sum(nsd_ids.size for nsd_ids in shown.values())} trials of {', '.join(shown)}")


if __name__ == "__main__":
    run(main, globals())
