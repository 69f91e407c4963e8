"""Raw NSD and COCO -> NSD-Flat's Parquet files: python -m nsd.export_flat

One row is one trial: the picture at 256 px, the z-scored activity on the flat cortex (format: prepare_flat.py), and
COCO's objects and captions. Each shard is written atomically: a killed run continues with the next one.

    map     pycortex's flat fsaverage, left hemisphere at x <= -2 mm, right hemisphere at x >= 2 mm
    pixel   mean of the subject's vertices within 3 sigma, weighted by a Gaussian of FWHM 1 mm
"""

import ast
import functools
import io
import itertools
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

NSD_DIR: str = prepare_nsd.NSD_DIR  # raw NSD
RSC_DIR: str = prepare_nsd.RSC_DIR  # the organisers' retrosplenial mask; empty: nsdgeneral alone
COCO_DIR: str = "annotations"  # annotations_trainval2017.zip: {instances,captions}_{train,val}2017.json
SURFACE_DIR: str = "pycortex"  # pycortex's flat fsaverage: flat_{lh,rh}.gii (163,842 places each, x and y in mm)
FLAT_DIR: str = prepare_flat.FLAT_DIR  # output: data/{train,test}-...-of-....parquet
SUBJECTS: str = ""  # such as subj01,subj05; empty: all whose betas were downloaded
N_SESSIONS: tuple[int, ...] = prepare_nsd.N_SESSIONS  # of subj01, subj02, ...; the last 3 are the test split
TRIALS_PER_SESSION: int = prepare_nsd.TRIALS_PER_SESSION  # fewer only in miniature data

SIGMA = 1 / 2.35482  # mm, of a Gaussian with FWHM 1 mm
ROWS_PER_GROUP, ROWS_PER_SHARD = 100, 3612  # as published: 54 shards of 195,000 trials
STIMULUS_INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
FLAGS = ("flagged", "BOLD5000", "shared1000")
REPETITIONS = [f"subject{subject}_rep{repetition}" for subject in range(1, 9) for repetition in range(3)]


def schema(made_from):
    """NSD-Flat's columns, with the metadata by which Hugging Face's library shows PNGs as pictures."""
    text, whole, number, lists = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.list_
    picture = pyarrow.struct({"bytes": pyarrow.binary(), "path": text})
    segmentation = pyarrow.struct({"counts": text, "poly": lists(lists(number)), "size": lists(whole)})
    objects = {
        "area": whole, "bbox": lists(number), "category": text, "iscrowd": whole, "segmentation": segmentation,
        "supercategory": text, "target": whole,
    }  # fmt: skip
    columns = dict.fromkeys(("subject_id", "trial_id", "session_id", "nsd_id"), whole)
    columns |= {"image": picture, "activity": picture, "subject": text} | dict.fromkeys(FLAGS, pyarrow.bool_())
    columns |= {"coco_split": text, "coco_id": whole}
    columns["objects"] = pyarrow.struct({name: lists(kind) for name, kind in objects.items()})
    columns |= {"captions": lists(text), "repetitions": pyarrow.struct(dict.fromkeys(REPETITIONS, whole))}
    features = {name: {"_type": "Image"} for name in ("image", "activity")}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "made_from": made_from}
    return pyarrow.schema(list(columns.items()), metadata=metadata)


def load_surface(folder):
    """{hemi: places on the map (163842, 2) in mm}."""
    places = {}
    for hemi in HEMIS:
        gifti = nibabel.load(Path(folder) / f"flat_{hemi}.gii")
        places[hemi] = np.asarray(gifti.agg_data("pointset"), np.float64)[:, :2]
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


def read_session(name, session, vertices):
    """{hemi: betas (n_trials, n_vertices)} of a subject's session, counted from 0."""
    paths = {hemi: Path(NSD_DIR) / prepare_nsd.BETAS.format(name, hemi, session + 1) for hemi in HEMIS}
    return {hemi: prepare_nsd.read_trials(paths[hemi], TRIALS_PER_SESSION, vertices[hemi]) for hemi in HEMIS}


def complete_vertices(name, n_sessions, mask):
    """{hemi: vertices of the mask (n,) that are NaN in none of the subject's trials}."""
    missing = {hemi: np.zeros(len(mask[hemi]), bool) for hemi in HEMIS}
    for session in progress(range(n_sessions), desc=f"{name}: missing vertices", unit="session"):
        for hemi, betas in read_session(name, session, mask).items():
            missing[hemi] |= np.isnan(betas).any(0)
    return {hemi: mask[hemi][~missing[hemi]] for hemi in HEMIS}


def session_maps(name, session, trials, vertices, weights):
    """Maps (len(trials), 215, 200) uint8 of some trials of a session; both are counted from 0."""
    betas = read_session(name, session, vertices)
    for hemi in HEMIS:
        prepare_nsd.zscore(betas[hemi])
    activity = np.concatenate([betas[hemi][trials] for hemi in HEMIS], axis=1)
    maps = np.full((len(trials), weights.shape[0]), OUTSIDE, np.uint8)
    is_inside = np.diff(weights.indptr) > 0
    for i in range(0, len(trials), ROWS_PER_GROUP):  # limits the memory in float64
        z = np.clip((weights[is_inside] @ activity[i : i + ROWS_PER_GROUP].T).T, -Z_LIMIT, Z_LIMIT)
        maps[i : i + len(z), is_inside] = ((z + Z_LIMIT) / (2 * Z_LIMIT) * 255).astype(np.uint8)
    return maps.reshape(-1, *MAP_SHAPE)


def plan_shards(shown):
    """{file name: [(subject, trial)]}, trials counted from 0. shown: see prepare_nsd.survey()."""
    shards, trials = {}, {"train": [], "test": []}
    for name, nsd_ids in shown.items():
        n_train = nsd_ids[: -prepare_nsd.N_TEST_SESSIONS].size
        trials["train"] += [(name, trial) for trial in range(n_train)]
        trials["test"] += [(name, trial) for trial in range(n_train, nsd_ids.size)]
    for split, every in trials.items():
        n = -(-len(every) // ROWS_PER_SHARD)
        for i in range(n):
            shards[f"{split}-{i:05d}-of-{n:05d}.parquet"] = every[i * len(every) // n : (i + 1) * len(every) // n]
    return shards


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def record(name, infos, annotations, trial, nsd_id, picture, activity):
    """One row. infos: lines of STIMULUS_INFO by nsd id; picture (425, 425, 3), activity (215, 200): uint8."""
    info = infos[nsd_id]
    objects, captions = coco.convert(annotations[info["cocoSplit"], info["cocoId"]], ast.literal_eval(info["cropBox"]))
    small = Image.fromarray(picture).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
    return {
        "subject_id": prepare_nsd.EVERYBODY.index(name), "trial_id": trial, "session_id": trial // TRIALS_PER_SESSION,
        "nsd_id": nsd_id, "image": png(np.asarray(small)), "activity": png(activity), "subject": name,
        **{flag: bool(info[flag]) for flag in FLAGS}, "coco_split": info["cocoSplit"], "coco_id": info["cocoId"],
        "objects": objects, "captions": captions, "repetitions": {column: info[column] for column in REPETITIONS},
    }  # fmt: skip


def write_shard(path, trials, columns, shown, vertices, weights, infos, annotations, bar):
    """trials [(subject, trial)]; shown, vertices, weights: {subject: ...}."""
    with (
        h5py.File(Path(NSD_DIR) / prepare_nsd.STIMULI, locking=False) as stimuli,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
        atomic_write(path) as file,
        pyarrow.parquet.ParquetWriter(file, columns) as writer,
    ):
        for (name, session), part in itertools.groupby(trials, lambda t: (t[0], t[1] // TRIALS_PER_SESSION)):
            part = [trial for _, trial in part]
            maps = session_maps(name, session, np.array(part) % TRIALS_PER_SESSION, vertices[name], weights[name])
            build = functools.partial(record, name, infos, annotations)
            for i in range(0, len(part), ROWS_PER_GROUP):
                group = part[i : i + ROWS_PER_GROUP]
                ids = shown[name].flat[group].tolist()
                pictures = [stimuli["imgBrick"][nsd_id] for nsd_id in ids]
                rows = list(pool.map(build, group, ids, pictures, maps[i : i + ROWS_PER_GROUP]))
                writer.write_table(pyarrow.Table.from_pylist(rows, columns))
                bar.update(len(rows))


def main():
    output, root = Path(FLAT_DIR) / "data", Path(NSD_DIR)
    n_sessions = prepare_nsd.choose_subjects(root, SUBJECTS, N_SESSIONS)
    prepare_nsd.require(root, [STIMULUS_INFO])
    shown, _ = prepare_nsd.survey(root, n_sessions, TRIALS_PER_SESSION, labels=False)
    mask, surface = prepare_nsd.read_mask(root, RSC_DIR), load_surface(SURFACE_DIR)
    made_from = fingerprint(shown, mask, surface)
    columns, shards = schema(made_from), plan_shards(shown)
    for path in output.glob("*.parquet"):
        before = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"made_from")
        if path.name not in shards or before != made_from.encode():
            raise UserError(f"{path} was made from other data: choose another FLAT_DIR.")
        del shards[path.name]
    ids = np.unique(np.concatenate([nsd_ids.ravel() for nsd_ids in shown.values()]))
    infos = pd.read_csv(root / STIMULUS_INFO, index_col="nsdId").loc[ids].to_dict("index")
    pictures = {(info["cocoSplit"], info["cocoId"]) for info in infos.values()}
    annotations = coco.read_annotations(COCO_DIR, pictures) if shards else {}
    vertices, weights = {}, {}
    for name in sorted({name for trials in shards.values() for name, _ in trials}):
        vertices[name] = complete_vertices(name, n_sessions[name], mask)
        weights[name] = resampler(np.concatenate([surface[hemi][vertices[name][hemi]] for hemi in HEMIS]))
    with lock(FLAT_DIR), progress(total=sum(map(len, shards.values())), desc="writing trials", unit="trial") as bar:
        for name, trials in shards.items():
            write_shard(output / name, trials, columns, shown, vertices, weights, infos, annotations, bar)
    print(f"wrote {output}: {sum(nsd_ids.size for nsd_ids in shown.values())} trials of {', '.join(shown)}")


if __name__ == "__main__":
    run(main, globals())
