"""Raw NSD and COCO -> NSD-Flat's Parquet files: python -m nsd.export_flat

One row is one trial: the picture at 256 px, the z-scored activity on the flat cortex (format: prepare_flat.py), and
COCO's objects and captions. Each shard is written atomically: a killed run continues with the next one.

    map     pycortex's flat fsaverage, left hemisphere at x <= -2 mm, right hemisphere at x >= 2 mm
    pixel   mean of the subject's vertices within 3 sigma, weighted by a Gaussian of FWHM 1 mm
"""

import ast
import io
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import nibabel
import nilearn.datasets
import numpy as np
import pandas
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
SURFACE_DIR: str = ""  # pycortex's flat fsaverage: flat_{lh,rh}.gii; empty: nilearn's, with other pixels
FLAT_DIR: str = prepare_flat.FLAT_DIR  # output: data/{train,test}-...-of-....parquet
SUBJECTS: str = ""  # such as subj01,subj05; empty: all whose betas were downloaded
N_SESSIONS: tuple[int, ...] = prepare_nsd.N_SESSIONS  # of subj01, subj02, ...; the last 3 are the test split
TRIALS_PER_SESSION: int = prepare_nsd.TRIALS_PER_SESSION  # fewer only in miniature data

SIGMA = 1 / 2.35482  # mm, of a Gaussian with FWHM 1 mm
ROWS_A_GROUP, ROWS_A_SHARD = 100, 3612  # as published: 54 shards of 195,000 trials
STIMULUS_INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
FLAGS = ("flagged", "BOLD5000", "shared1000")
REPETITIONS = [f"subject{subject}_rep{repetition}" for subject in range(1, 9) for repetition in range(3)]


def schema(made_from):
    """NSD-Flat's columns, with the metadata by which Hugging Face's library shows pictures as pictures."""
    text, whole, number = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    lists = pyarrow.list_
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
    columns["captions"] = lists(text)
    columns["repetitions"] = pyarrow.struct(dict.fromkeys(REPETITIONS, whole))
    features = {name: describe(kind) for name, kind in columns.items()}
    features |= {name: {"_type": "Image"} for name in ("image", "activity")}
    about = json.dumps({"info": {"features": features}})
    return pyarrow.schema(list(columns.items()), metadata={"huggingface": about, "made_from": made_from})


def describe(kind):
    """An Arrow type in the terms of Hugging Face's library."""
    if pyarrow.types.is_struct(kind):
        return {field.name: describe(field.type) for field in kind}
    if pyarrow.types.is_list(kind):
        return [describe(kind.value_type)]
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


def load_surface(folder):
    """{hemi: places on the map (n, 2) in mm}; n is 163,842, or 10,242 for nilearn's fsaverage5."""
    places = {}
    if not folder:
        print("SURFACE_DIR is empty: nilearn's flat fsaverage5 is not pycortex's, so the pixels are not NSD-Flat's")
        folder = Path(nilearn.datasets.fetch_surf_fsaverage("fsaverage5")["flat_left"]).parent  # inside nilearn
    for hemi, half in zip(HEMIS, ("left", "right")):
        files = sorted(Path(folder).glob(f"flat_{hemi}.gii*")) + sorted(Path(folder).glob(f"flat_{half}.gii*"))
        if not files:
            raise UserError(f"{folder} has no flat_{hemi}.gii, expected pycortex's flat fsaverage (SURFACE_DIR)")
        places[hemi] = np.asarray(nibabel.load(files[0]).agg_data("pointset"), np.float64)[:, :2]
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


def complete_vertices(person, mask):
    """{hemi: (n,) bool}: vertices of the mask that are NaN in no trial."""
    complete = {hemi: np.ones(len(mask[hemi]), bool) for hemi in HEMIS}
    n_sessions, n_trials = person.shown.shape
    for session in progress(range(1, n_sessions + 1), desc=f"{person.name}: missing vertices", unit="session"):
        for hemi in HEMIS:
            path = Path(NSD_DIR) / prepare_nsd.BETAS.format(person.name, hemi, session)
            complete[hemi] &= ~np.isnan(prepare_nsd.read_trials(path, n_trials, mask[hemi])).any(0)
    return complete


def session_maps(person, session, trials, vertices, weights):
    """Maps (len(trials), 215, 200) uint8 of some trials of a session; both are counted from 0."""
    sides = []
    for hemi in HEMIS:
        path = Path(NSD_DIR) / prepare_nsd.BETAS.format(person.name, hemi, session + 1)
        sides.append(prepare_nsd.read_trials(path, person.shown.shape[1], vertices[hemi]))
        prepare_nsd.zscore(sides[-1])
    maps = np.full((len(trials), weights.shape[0]), OUTSIDE, np.uint8)
    is_inside = np.diff(weights.indptr) > 0
    for i in range(0, len(trials), ROWS_A_GROUP):  # limits the memory in float64
        z = np.concatenate([side[trials[i : i + ROWS_A_GROUP]] for side in sides], axis=1)
        z = np.clip((weights[is_inside] @ z.T).T, -Z_LIMIT, Z_LIMIT)
        maps[i : i + len(z), is_inside] = ((z + Z_LIMIT) / (2 * Z_LIMIT) * 255).astype(np.uint8)
    return maps.reshape(-1, *MAP_SHAPE)


def plan_shards(people):
    """{file name: [(person, trial)]}, trials counted from 0."""
    shards = {}
    for split in ("train", "test"):
        trials = []
        for person in people:
            n_train = person.shown[: -prepare_nsd.N_TEST_SESSIONS].size
            chosen = range(n_train) if split == "train" else range(n_train, person.shown.size)
            trials += [(person, trial) for trial in chosen]
        n = -(-len(trials) // ROWS_A_SHARD)
        for i in range(n):
            part = trials[i * len(trials) // n : (i + 1) * len(trials) // n]
            shards[f"{split}-{i:05d}-of-{n:05d}.parquet"] = part
    return shards


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def record(person, trial, picture, activity, info, annotations):
    """One row. picture (425, 425, 3), activity (215, 200): uint8; info: the picture's line of STIMULUS_INFO."""
    objects, captions = coco.convert(annotations, ast.literal_eval(info["cropBox"]))
    names = ("area", "bbox", "category", "iscrowd", "segmentation", "supercategory", "target")
    small = Image.fromarray(picture).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
    return {
        "subject_id": person.number - 1, "trial_id": trial, "session_id": trial // person.shown.shape[1],
        "nsd_id": int(person.shown.flat[trial]), "image": png(np.asarray(small)), "activity": png(activity),
        "subject": person.name, **{name: bool(info[name]) for name in FLAGS},
        "coco_split": info["cocoSplit"], "coco_id": info["cocoId"],
        "objects": {name: [o[name] for o in objects] for name in names}, "captions": captions,
        "repetitions": {name: info[name] for name in REPETITIONS},
    }  # fmt: skip


def write_shard(path, trials, columns, vertices, weights, infos, annotations, bar):
    """trials [(person, trial)]; vertices, weights: {subject name: ...}."""
    with (
        h5py.File(Path(NSD_DIR) / prepare_nsd.STIMULI, locking=False) as stimuli,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
        atomic_write(path) as file,
        pyarrow.parquet.ParquetWriter(file, columns) as writer,
    ):
        for (name, session), part in itertools.groupby(trials, lambda t: (t[0].name, t[1] // t[0].shown.shape[1])):
            part = list(part)
            person = part[0][0]
            numbers = np.array([trial for _, trial in part])
            maps = session_maps(person, session, numbers % person.shown.shape[1], vertices[name], weights[name])
            for i in range(0, len(maps), ROWS_A_GROUP):
                jobs = []
                for trial, activity in zip(numbers[i : i + ROWS_A_GROUP].tolist(), maps[i : i + ROWS_A_GROUP]):
                    nsd_id = int(person.shown.flat[trial])
                    info = infos[nsd_id]
                    annotated = annotations[info["cocoSplit"], info["cocoId"]]
                    jobs.append((person, trial, stimuli["imgBrick"][nsd_id], activity, info, annotated))
                rows = list(pool.map(record, *zip(*jobs)))
                writer.write_table(pyarrow.Table.from_pylist(rows, columns))
                bar.update(len(rows))


def main():
    with lock(FLAT_DIR):
        export()


def export():
    output, root = Path(FLAT_DIR) / "data", Path(NSD_DIR)
    n_sessions = prepare_nsd.choose_subjects(root, SUBJECTS, N_SESSIONS)
    prepare_nsd.require(root, [STIMULUS_INFO])
    people, _ = prepare_nsd.survey(root, n_sessions, TRIALS_PER_SESSION, labels=False)
    mask, surface = prepare_nsd.read_mask(root, RSC_DIR), load_surface(SURFACE_DIR)
    arrays = [*(person.shown for person in people), *mask.values(), *surface.values()]
    made_from = fingerprint(*n_sessions, *arrays)
    columns, shards = schema(made_from), plan_shards(people)
    if {path.name for path in output.glob("*.parquet")} - shards.keys():
        raise UserError(f"{output} has other shards: choose another FLAT_DIR.")
    for name in [name for name in shards if (output / name).exists()]:
        if pyarrow.parquet.read_schema(output / name).metadata.get(b"made_from") != made_from.encode():
            raise UserError(f"{output / name} was made from other data: choose another FLAT_DIR.")
        del shards[name]
    shown = np.unique(np.concatenate([person.shown.ravel() for person in people]))
    infos = pandas.read_csv(root / STIMULUS_INFO, index_col="nsdId").loc[shown].to_dict("index")
    pictures = {(info["cocoSplit"], info["cocoId"]) for info in infos.values()}
    annotations = coco.read_annotations(COCO_DIR, pictures) if shards else {}
    vertices, weights = {}, {}
    unfinished = {person.name for trials in shards.values() for person, _ in trials}
    for person in [person for person in people if person.name in unfinished]:
        complete = complete_vertices(person, mask)
        own = {hemi: mask[hemi][complete[hemi] & (mask[hemi] < len(surface[hemi]))] for hemi in HEMIS}
        vertices[person.name] = own
        weights[person.name] = resampler(np.concatenate([surface[hemi][own[hemi]] for hemi in HEMIS]))
    with progress(total=sum(map(len, shards.values())), desc="writing trials", unit="trial") as bar:
        for name, trials in shards.items():
            write_shard(output / name, trials, columns, vertices, weights, infos, annotations, bar)
    print(f"wrote {output}: {sum(p.shown.size for p in people)} trials of {', '.join(n_sessions)}")


if __name__ == "__main__":
    run(main, globals())
