"""NSD-Flat -> DATA_DIR: python prepare_flat.py; raw NSD -> NSD-Flat: python prepare_flat.py --export true

NSD-Flat (Hugging Face, clane9/NSD-Flat) is the report's compressed NSD: single trials as pictures of the
flat cortex, 1 mm a pixel. In: trials of a picture are averaged per person and DATA_DIR is written as
prepare_data.py writes it, with pixels for vertices. Out: the same Parquet files from raw NSD and COCO.

    map        x -100 … 100 mm, y -120 … 95 mm of flat fsaverage: 215 x 200 pixels, row 0 on top
    pixel      mean of the person's vertices within 3 sigma, weighted by a Gaussian of FWHM 1 mm
    activity   z-scored over the trials of a session, clipped to ±2.5, (z + 2.5) / 5 * 255 cut to uint8
    outside    127; a pixel that is 127 in all of a person's maps is outside for that person
    space      pixels that are inside for anybody, the left hemisphere's (x < 0) first

Scores of pixels are not scores of vertices: a pixel is an average, a vertex is not.
"""

import ast
import csv
import io
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree

import coco
import prepare_data
import prepare_nsd
from common import (
    Problem,
    check_disk,
    check_least,
    constants,
    differences,
    fingerprint,
    progress,
    run_script,
    sole_writer,
    write_whole,
)
from flatmap import load_flat_meshes, map_corner, map_shape
from model import Space, picture_size
from prepare_data import hemis, n_fsaverage

EXPORT = False  # false: FLAT_DIR -> DATA_DIR; true: NSD_DIR and COCO_DIR -> FLAT_DIR
FLAT_DIR = "nsd_flat"  # folder with {train,test}-…-of-….parquet in it or below; to read a part of them: a glob
DATA_DIR = prepare_data.DATA_DIR  # written here, read by all later stages
SUBJECTS = ""  # names with commas between them, such as subj01,subj05; empty: all that are there
SEED = prepare_data.SEED  # governs the splits
NSD_DIR = prepare_nsd.NSD_DIR  # raw NSD, to export
RSC_DIR = prepare_nsd.RSC_DIR  # the organisers' retrosplenial mask, to export; empty: nsdgeneral alone
N_SESSIONS = prepare_nsd.N_SESSIONS  # of subj01, subj02, …, to export; the last 3 make the test split
COCO_DIR = "annotations"  # of annotations_trainval2017.zip: {instances,captions}_{train,val}2017.json, to export
SURFACE_DIR = ""  # pycortex's flat fsaverage: flat_{lh,rh}.gii, to export; empty: nilearn's, with other pixels
WORKERS = 0  # threads that decode and encode pictures; 0: one per core
OVERWRITE = False  # write DATA_DIR, or FLAT_DIR's files, again

z_limit = 2.5  # activity is stored from -z_limit to z_limit
outside = 127
n_usual_pixels = 18577  # inside for anybody in the published maps
sigma = 1 / 2.35482  # mm, of a Gaussian with FWHM 1 mm
rows_a_group, rows_a_shard = 100, 3612  # 54 shards of 195,000 trials as published
trial_bytes = 67_000  # 13 GB for the 195,000 of train
stimulus_file = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"


# ---- the format ---------------------------------------------------------------------------------


def quantise(z):
    return ((np.clip(z, -z_limit, z_limit) + z_limit) / (2 * z_limit) * 255).astype(np.uint8)


def restore(u):
    return u / 255 * (2 * z_limit) - z_limit


def schema(made_from):
    """NSD-Flat's columns, with what the Hugging Face library needs to show pictures as pictures."""
    text, whole, number, flag = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.bool_()
    lists = pyarrow.list_
    picture = pyarrow.struct({"bytes": pyarrow.binary(), "path": text})
    segmentation = pyarrow.struct({"counts": text, "poly": lists(lists(number)), "size": lists(whole)})
    kinds = (whole, lists(number), text, whole, segmentation, text, whole)
    columns = {
        "subject_id": whole, "trial_id": whole, "session_id": whole, "nsd_id": whole, "image": picture,
        "activity": picture, "subject": text, "flagged": flag, "BOLD5000": flag, "shared1000": flag,
        "coco_split": text, "coco_id": whole,
        "objects": pyarrow.struct({name: lists(kind) for name, kind in zip(coco.columns, kinds)}),
        "captions": lists(text),
        "repetitions": pyarrow.struct(dict.fromkeys(repetition_names, whole)),
    }  # fmt: skip
    features = {name: describe(kind) for name, kind in columns.items()}
    features |= {name: {"_type": "Image"} for name in ("image", "activity")}
    about = json.dumps({"info": {"features": features}})
    return pyarrow.schema(list(columns.items()), metadata={"huggingface": about, "made_from": made_from})


repetition_names = [f"subject{subject}_rep{repetition}" for subject in range(1, 9) for repetition in range(3)]


def describe(kind):
    """An Arrow type in the Hugging Face library's words."""
    if pyarrow.types.is_struct(kind):
        return {field.name: describe(field.type) for field in kind}
    if pyarrow.types.is_list(kind):
        return [describe(kind.value_type)]
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


def find_files(pattern):
    """A folder or a glob -> {"train": [path], "test": [path]}, each sorted; a folder's shards have to be all there."""
    folder = Path(pattern)
    if folder.is_dir():
        paths = sorted(folder.rglob("*.parquet"))
    else:
        root = Path(*folder.parts[: next((i for i, part in enumerate(folder.parts) if re.search(r"[*?\[]", part)), 0)])
        paths = sorted(root.glob(str(folder.relative_to(root)))) if folder != root else []
    files = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "test")}
    if not files["train"]:
        raise Problem(
            f"{pattern}: no train-*.parquet, expected NSD-Flat's files {{train,test}}-00000-of-…parquet. Download "
            "them from https://huggingface.co/datasets/clane9/NSD-Flat and point FLAT_DIR to their folder"
        )
    strays = [path.name for path in paths if path not in files["train"] + files["test"]]
    if strays:
        raise Problem(
            f"{pattern}: {', '.join(strays[:5])} start with neither train nor test; expected NSD-Flat's files"
        )
    if folder.is_dir():
        for split, found in files.items():
            numbers = [re.match(rf"{split}-(\d+)-of-(\d+)", path.name) for path in found]
            wanted = {(m[2], i) for m in numbers if m for i in range(int(m[2]))}
            missing = sorted(i for n, i in wanted - {(m[2], int(m[1])) for m in numbers if m})
            if missing:
                raise Problem(
                    f"{pattern}: {split} lacks shards {', '.join(map(str, missing))}; trials of a picture stand in "
                    "several. Download them; or give FLAT_DIR a glob to take what matches it"
                )
    return files


def read_columns(path, columns, optional=()):
    """Batches of a file's columns, and of the optional ones it has; memory does not grow with the file."""
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if set(columns) - set(names):
                missing = ", ".join(sorted(set(columns) - set(names)))
                raise Problem(f"{path}: no column {missing} among {', '.join(names)}; expected NSD-Flat's files")
            wanted = [*columns, *(name for name in optional if name in names)]
            for batch in file.iter_batches(rows_a_group, columns=wanted):
                for name in wanted:
                    if batch.column(name).null_count:
                        raise Problem(f"{path}: {name} has empty values, expected none; download it again")
                yield batch
    except (pyarrow.ArrowException, OSError) as error:
        raise Problem(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); download it again")


# ---- in: NSD-Flat -> DATA_DIR -------------------------------------------------------------------


def read_trials(files):
    """-> {"test" (0 or 1), "subject" (from 0), "nsd_id", "trial"}: (n_trials,) each, in the files' order."""
    parts = []
    for split, paths in files.items():
        for path in paths:
            for batch in read_columns(path, ["subject_id", "nsd_id"], ["trial_id"]):
                names = batch.schema.names
                trial = batch.column("trial_id").to_numpy() if "trial_id" in names else np.full(len(batch), -1)
                values = [np.full(len(batch), split == "test")]
                values += [batch.column(name).to_numpy() for name in ("subject_id", "nsd_id")]
                parts.append(np.stack([*values, trial]).astype(np.int64))
    trials = dict(zip(("test", "subject", "nsd_id", "trial"), np.concatenate(parts, axis=1)))
    known = trials["trial"] >= 0  # an older revision has none
    pairs = np.stack([trials["subject"], trials["trial"]])[:, known]
    twice = pairs.shape[1] - np.unique(pairs, axis=1).shape[1]
    if twice:
        raise Problem(
            f"{FLAT_DIR}: {twice} trials occur twice, expected every trial of a subject once; remove the copies"
        )
    return trials


def arrange(trials, subjects):
    """Which trials are averaged into which row.

    Training rows first, person by person and by nsd id, then test rows likewise. Pictures of the test
    split that anybody saw in the training split are no test of anything and left out.
    -> (n_trials,) row or -1; (n_rows,) subject (index into subjects), nsd id, whether test
    """
    taught = np.unique(trials["nsd_id"][trials["test"] == 0])
    used = np.isin(trials["subject"], subjects) & ((trials["test"] == 0) | ~np.isin(trials["nsd_id"], taught))
    keys = np.stack([trials["test"], np.searchsorted(subjects, trials["subject"]), trials["nsd_id"]])
    rows, row = np.unique(keys[:, used], axis=1, return_inverse=True)
    of_trial = np.full(len(used), -1)
    of_trial[used] = row.ravel()
    return of_trial, rows[1], rows[2], rows[0] == 1


def read_map(content, path):
    """A PNG's bytes -> (215 * 200,) uint8."""
    try:
        picture = Image.open(io.BytesIO(content))
        values = np.asarray(picture)
    except Exception as error:
        raise Problem(f"{path}: a damaged activity map ({error}); download it again")
    if values.shape != map_shape or values.dtype != np.uint8:
        raise Problem(f"{path}: a map of {values.dtype} {values.shape}, expected uint8 {map_shape}, one channel")
    return values.ravel()


def sum_maps(file, files, of_trial, subject_of_row):
    """Add up every row's maps into file, uint16 (n_rows, 215 * 200), of which no more than a map is in memory.

    -> which pixels are inside for whom: (n_subjects, 215 * 200) bool
    """
    n_bytes = 2 * map_shape[0] * map_shape[1]
    file.truncate(len(subject_of_row) * n_bytes)
    inside = np.zeros((subject_of_row.max() + 1, n_bytes // 2), bool)
    trial = 0
    with (
        ThreadPoolExecutor(WORKERS or os.cpu_count()) as pool,
        progress(total=len(of_trial), desc="averaging maps", unit="trial") as bar,
    ):
        for path in (path for paths in files.values() for path in paths):
            for batch in read_columns(path, ["activity"]):
                rows = of_trial[trial : trial + len(batch)]
                contents = [c["bytes"] for c, row in zip(batch.column(0).to_pylist(), rows) if row >= 0]
                for row, values in zip(rows[rows >= 0], pool.map(read_map, contents, [path] * len(contents))):
                    file.seek(row * n_bytes)
                    before = np.frombuffer(file.read(n_bytes), np.uint16)
                    file.seek(row * n_bytes)
                    file.write((before + values).data)
                    inside[subject_of_row[row]] |= values != outside
                trial += len(batch)
                bar.update(len(batch))
    return inside


def mean_activity(file, rows, counts, subject_of_row, inside, pixels, at_once=256):
    """Blocks (n, n_pixels) float32 of the rows' activity, zero where a person lacks a pixel.

    float32: a map has 256 levels, which float16 would blur by up to a twentieth of a level.
    """
    n_bytes = 2 * map_shape[0] * map_shape[1]
    with progress(total=len(rows), desc="writing activity", unit="row", unit_scale=True) as bar:
        for part in np.array_split(rows, max(1, -(-len(rows) // at_once))):
            block = np.zeros((len(part), len(pixels)), np.float32)
            for row, into in zip(part, block):
                file.seek(row * n_bytes)
                mean = np.frombuffer(file.read(n_bytes), np.uint16)[pixels] / counts[row]
                into[:] = np.where(inside[subject_of_row[row], pixels], restore(mean), 0)
            yield block
            bar.update(len(part))


def first_pictures(files, first):
    """Pictures (256, 256, 3) uint8 of the trials in first (sorted), in their order."""

    def decode(content):
        try:
            picture = Image.open(io.BytesIO(content))
            if picture.width != picture.height:
                raise ValueError(f"{picture.width} x {picture.height} px, expected a square")
            return prepare_data.resize_picture(picture)
        except Exception as error:
            raise Problem(f"{FLAT_DIR}: a damaged picture ({error}); download its file again")

    start = 0
    with (
        ThreadPoolExecutor(WORKERS or os.cpu_count()) as pool,
        progress(total=len(first), desc="decoding pictures", unit="picture") as bar,
    ):
        for path in (path for paths in files.values() for path in paths):
            for batch in read_columns(path, ["image"]):
                chosen = first[np.searchsorted(first, start) : np.searchsorted(first, start + len(batch))] - start
                pictures = batch.column(0).take(pyarrow.array(chosen)).to_pylist()
                yield from pool.map(decode, [picture["bytes"] for picture in pictures])
                start += len(batch)
                bar.update(len(chosen))


def pixel_space(names, inside):
    """-> Space of the pixels that are inside for anybody, and their places in a map (n_pixels,)."""
    left = np.arange(inside.shape[1]) % map_shape[1] < map_shape[1] // 2  # x < 0
    used = inside.any(0)
    pixels = np.concatenate([np.flatnonzero(used & left), np.flatnonzero(used & ~left)])
    mask = torch.from_numpy(inside[:, pixels])
    return Space(names, torch.from_numpy(pixels), int((used & left).sum()), mask, {}, unit="pixels"), pixels


def is_prepared(inputs):
    """Whether DATA_DIR holds what would be made. Refuses data of other inputs, unless to be overwritten."""
    if OVERWRITE or not (Path(DATA_DIR) / "prepared.pt").exists():
        return False
    prepare_data.load(DATA_DIR)  # refuses files that do not belong together
    changed = differences(prepare_data.load_content(DATA_DIR)["inputs"], inputs)
    if changed:
        raise Problem(
            f"{DATA_DIR} was prepared from other inputs ({'; '.join(changed[:6])}{' …' * (len(changed) > 6)}). "
            "--overwrite true prepares it anew; or choose another DATA_DIR"
        )
    print(f"{DATA_DIR} is prepared already from these inputs; --overwrite true prepares it anew")
    return True


def prepare(files, inputs):
    trials = read_trials(files)
    there = {f"subj{subject + 1:02d}": subject for subject in np.unique(trials["subject"]).tolist()}
    names = sorted({name for name in re.split(r"[,\s]+", SUBJECTS) if name}) or list(there)
    if set(names) - there.keys():
        raise Problem(f"SUBJECTS is {SUBJECTS!r}, expected some of {', '.join(there)}, which {FLAT_DIR} holds")
    of_trial, subject, nsd_id, is_test = arrange(trials, np.array([there[name] for name in names]))
    used = np.flatnonzero(of_trial >= 0)
    image_ids, first = np.unique(trials["nsd_id"][used], return_index=True)
    order = np.argsort(first)  # training pictures first, as their files are
    image_ids, first = image_ids[order], used[first[order]]
    image = np.argsort(image_ids)[np.searchsorted(np.sort(image_ids), nsd_id)]
    training_ids, row = np.unique(nsd_id[~is_test], return_inverse=True)
    seen = np.zeros((len(training_ids), len(names)), bool)
    seen[row, subject[~is_test]] = True
    samples = {
        "subject": subject[~is_test],
        "image": image[~is_test],
        "split": prepare_data.split_pictures(seen, SEED)[
            row
        ],  # by nsd id: as of the same pictures in a challenge folder
        "test_subject": subject[is_test],
        "test_image": image[is_test],
    }
    people = [
        prepare_data.Subject(name, pictures=[*nsd_id[own & ~is_test]], test_pictures=[*nsd_id[own & is_test]])
        for name, own in zip(names, (subject == i for i in range(len(names))))
    ]
    prepare_data.check_splits(people, samples)
    n_map = 2 * map_shape[0] * map_shape[1]
    check_disk(DATA_DIR, len(subject) * (n_map + 4 * n_usual_pixels) + len(image_ids) * picture_size**2 * 3)
    with tempfile.TemporaryFile(dir=DATA_DIR) as file:
        inside = sum_maps(file, files, of_trial, subject)
        space, pixels = pixel_space(names, inside)
        prepare_data.report(people, space, samples, seen)
        counts = np.bincount(of_trial[used])
        blocks = [
            mean_activity(file, np.flatnonzero(rows), counts, subject, inside, pixels) for rows in (~is_test, is_test)
        ]
        prepare_data.write_prepared(
            DATA_DIR,
            space=space,
            samples=samples,
            splits="pictures",
            nsd_id=image_ids,
            n_training_images=len(training_ids),
            dtype=np.float32,
            activity=blocks[0],
            test_activity=blocks[1],
            images=first_pictures(files, first),
            inputs=inputs,
            made_with=constants(globals()),
            script="prepare_flat.py",
        )
    left_out = len(np.unique(trials["nsd_id"][trials["test"] == 1])) - len(np.unique(nsd_id[is_test]))
    print(
        f"{space.n_vertices} pixels stand for vertices: their scores are not comparable with vertices'. "
        f"{len(np.unique(nsd_id[is_test]))} pictures of the test split are there to score; {left_out} that training "
        "pictures of somebody repeat, or that nobody chosen saw, are not"
    )


# ---- out: raw NSD -> NSD-Flat -------------------------------------------------------------------


def surface_files():
    return {hemi: sorted(Path(SURFACE_DIR).glob(f"flat_{hemi}.gii*"))[:1] for hemi in hemis} if SURFACE_DIR else {}


def load_surface():
    """{hemi: (n, 2) mm on the map}, n fsaverage's 163,842 or, of nilearn's own, fewer."""
    places = {}
    for hemi, found in surface_files().items():
        try:
            places[hemi] = np.asarray(nibabel.load(found[0]).agg_data("pointset"), np.float64)[:, :2]
        except Exception as error:
            raise Problem(f"{found[0]}: not a GIFTI surface ({error}); expected pycortex's flat fsaverage")
        if len(places[hemi]) != n_fsaverage:
            raise Problem(f"{found[0]}: {len(places[hemi])} vertices, expected fsaverage's {n_fsaverage}")
    if not places:
        places = {hemi: np.asarray(mesh[0], np.float64) for hemi, mesh in load_flat_meshes("").items()}
        print(
            f"SURFACE_DIR is empty: nilearn's flat fsaverage with {len(places['lh'])} vertices a hemisphere is another "
            "flattening than pycortex's, so these pixels are not the published ones'"
        )
    x = {hemi: place[:, 0] for hemi, place in places.items()}
    shift = {"lh": -2 - x["lh"].max(), "rh": 2 - x["rh"].min()}  # mm: the hemispheres stay apart
    return {hemi: place + [shift[hemi], 0] for hemi, place in places.items()}


def resampler(places):
    """places (n_vertices, 2) mm -> (215 * 200, n_vertices) weights, rows that add up to 1 or, outside, are empty."""
    height, width = map_shape
    x, y = map_corner[0] + np.arange(width) + 0.5, map_corner[1] - np.arange(height) - 0.5
    centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    near = cKDTree(centres).sparse_distance_matrix(cKDTree(places), 3 * sigma, output_type="coo_matrix")
    weights = sparse.csr_array((np.exp(-((near.data / sigma) ** 2) / 2), (near.row, near.col)), near.shape)
    total = weights.sum(axis=1)
    return sparse.diags_array(1 / np.where(total > 0, total, 1)) @ weights


def read_stimuli_info(path, ids):
    """{nsd id: row of nsd_stim_info_merged.csv} of the ids, numbers and flags read as such."""
    flags = {"True": True, "TRUE": True, "1": True, "False": False, "FALSE": False, "0": False}
    found = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if int(row["nsdId"]) in ids:
                    info = {name: flags[row[name]] for name in ("flagged", "BOLD5000", "shared1000")}
                    info |= {name: int(row[name]) for name in ("nsdId", "cocoId", *repetition_names)}
                    found[info["nsdId"]] = info | {
                        "cocoSplit": row["cocoSplit"],
                        "cropBox": ast.literal_eval(row["cropBox"]),
                    }
    except (KeyError, ValueError, SyntaxError) as error:
        raise Problem(f"{path}: not understood ({type(error).__name__}: {error}); download it again")
    if ids - found.keys():
        raise Problem(f"{path}: lacks {len(ids - found.keys())} pictures that were shown; download it again")
    return found


def missing_vertices(person, mask):
    """{hemi: (n,) bool}: which vertices of the mask are NaN in any trial of a person."""
    missing = {hemi: np.zeros(len(mask[hemi]), bool) for hemi in hemis}
    total = len(hemis) * person.n_sessions
    with progress(total=total, desc=f"{person.name}: looking for missing vertices", unit="session") as bar:
        for hemi in hemis:
            for session, n in enumerate(person.n_trials, start=1):
                path = Path(NSD_DIR) / prepare_nsd.betas_file.format(person.name, hemi, session)
                missing[hemi] |= np.isnan(prepare_nsd.read_trials(path, n, mask[hemi])).any(0)
                bar.update()
    return missing


def session_maps(person, session, start, stop, vertices, weights):
    """Maps (stop - start, 215, 200) uint8 of some trials of a session (from 0)."""
    sides = []
    for hemi in hemis:
        path = Path(NSD_DIR) / prepare_nsd.betas_file.format(person.name, hemi, session + 1)
        sides.append(prepare_nsd.read_trials(path, person.n_trials[session], vertices[hemi]))
        prepare_nsd.zscore(sides[-1])
    maps = np.full((stop - start, weights.shape[0]), outside, np.uint8)
    is_inside = np.diff(weights.indptr) > 0
    for i in range(start, stop, rows_a_group):  # bounds what is float64
        z = np.concatenate([side[i : min(i + rows_a_group, stop)] for side in sides], axis=1)
        maps[i - start : i - start + len(z), is_inside] = quantise((weights[is_inside] @ z.T).T)
    return maps.reshape(-1, *map_shape)


def plan_shards(persons):
    """[(file name, [(person, session, start, stop)])]: which trials of which sessions (from 0) a file holds."""
    shards = []
    for split in ("train", "test"):
        sessions = []
        for person in persons:
            chosen = range(person.n_sessions)
            chosen = (
                chosen[: -prepare_nsd.n_test_sessions] if split == "train" else chosen[-prepare_nsd.n_test_sessions :]
            )
            sessions += [(person, session) for session in chosen]
        ends = np.cumsum([person.n_trials[session] for person, session in sessions])
        n_shards = -(-int(ends[-1]) // rows_a_shard)
        for i in range(n_shards):
            first, last = i * ends[-1] // n_shards, (i + 1) * ends[-1] // n_shards
            parts = []
            for (person, session), end in zip(sessions, ends):
                begin = end - person.n_trials[session]
                start, stop = max(first, begin) - begin, min(last, end) - begin
                if start < stop:
                    parts.append((person, session, int(start), int(stop)))
            shards.append((f"{split}-{i:05d}-of-{n_shards:05d}.parquet", parts))
    return shards


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def record(person, session, trial, picture, values, about, annotated):
    """One row. trial: of the person's, from 0. picture: as shown; values: the map."""
    objects, captions = coco.convert(annotated, about["cropBox"])
    small = Image.fromarray(picture).resize((picture_size, picture_size), Image.Resampling.BICUBIC)
    return {
        "subject_id": person.number - 1, "trial_id": trial, "session_id": session, "nsd_id": about["nsdId"],
        "image": png(np.asarray(small)), "activity": png(values), "subject": person.name,
        **{name: about[name] for name in ("flagged", "BOLD5000", "shared1000")},
        "coco_split": about["cocoSplit"], "coco_id": about["cocoId"], "objects": objects, "captions": captions,
        "repetitions": {name: about[name] for name in repetition_names},
    }  # fmt: skip


def write_shard(path, parts, kinds, vertices, weights, infos, annotations, bar):
    """parts: of plan_shards(). vertices, weights: per person's name."""
    with (
        prepare_nsd.open_stimuli(Path(NSD_DIR) / prepare_nsd.stimuli) as brick,
        ThreadPoolExecutor(WORKERS or os.cpu_count()) as pool,  # Pillow encodes outside Python's lock
        write_whole(path) as file,
        pyarrow.parquet.ParquetWriter(file, kinds) as writer,
    ):
        for person, session, start, stop in parts:
            maps = session_maps(person, session, start, stop, vertices[person.name], weights[person.name])
            first = sum(person.n_trials[:session]) + start
            for i in range(0, len(maps), rows_a_group):
                jobs = []
                for trial, values in enumerate(maps[i : i + rows_a_group], start=first + i):
                    about = infos[int(person.shown[trial])]
                    annotated = annotations[about["cocoSplit"], about["cocoId"]]
                    jobs.append((person, session, trial, brick[about["nsdId"]], values, about, annotated))
                rows = list(pool.map(record, *zip(*jobs)))
                writer.write_table(pyarrow.Table.from_pylist(rows, kinds))
                bar.update(len(rows))


def export():
    output, root = Path(FLAT_DIR), Path(NSD_DIR)
    if re.search(r"[*?\[]", FLAT_DIR):
        raise Problem(f"FLAT_DIR is {FLAT_DIR!r}, expected a folder to write to, not a glob")
    people = prepare_nsd.choose_subjects(root, SUBJECTS)
    wanted = [*coco.annotation_files(COCO_DIR).values()]
    findings = [
        f"{path}: not there, expected of COCO's annotations_trainval2017.zip" for path in wanted if not path.is_file()
    ]
    findings += [
        f"{SURFACE_DIR}/flat_{hemi}.gii: not there, expected pycortex's" for hemi, f in surface_files().items() if not f
    ]

    def disk(person):
        return trial_bytes * (len(person.shown) if person else 30000)

    options = dict(labels=False, more=[stimulus_file], findings=findings)
    persons, _ = prepare_nsd.survey(root, people, N_SESSIONS, RSC_DIR, disk, output, **options)
    mask, surface = prepare_nsd.read_mask(root, RSC_DIR), load_surface()
    facts = [(p.name, p.n_trials) for p in persons]
    made_from = fingerprint(facts, *(p.shown for p in persons), *mask.values(), *surface.values())
    kinds, shards, todo = schema(made_from), plan_shards(persons), []
    for name, parts in shards:
        path = output / "data" / name
        if path.exists() and not OVERWRITE:
            if (pyarrow.parquet.read_schema(path).metadata or {}).get(b"made_from") != made_from.encode():
                raise Problem(f"{path} was not made from these data; choose another FLAT_DIR, or --overwrite true")
        else:
            todo.append((path, parts))
    strays = {path.name for path in output.rglob("*.parquet")} - {name for name, _ in shards}
    if strays:
        raise Problem(
            f"{output} holds other files ({', '.join(sorted(strays)[:3])} …); choose another FLAT_DIR or remove them"
        )
    infos = read_stimuli_info(root / stimulus_file, set(np.concatenate([p.shown for p in persons]).tolist()))
    if todo:
        annotations = coco.read_annotations(COCO_DIR, {(info["cocoSplit"], info["cocoId"]) for info in infos.values()})
    vertices, weights = {}, {}
    for person in persons:
        if not any(person is part[0] for _, parts in todo for part in parts):
            continue
        missing = missing_vertices(person, mask)
        own = {hemi: mask[hemi][~missing[hemi] & (mask[hemi] < len(surface[hemi]))] for hemi in hemis}
        vertices[person.name] = own
        weights[person.name] = resampler(np.concatenate([surface[hemi][own[hemi]] for hemi in hemis]))
        print(
            f"{person.name}: {(np.diff(weights[person.name].indptr) > 0).sum()} pixels of "
            f"{sum(map(len, own.values()))} vertices"
        )
    n_trials = sum(stop - start for _, parts in todo for _, _, start, stop in parts)
    with progress(total=n_trials, desc="writing trials", unit="trial") as bar:
        for path, parts in todo:
            write_shard(path, parts, kinds, vertices, weights, infos, annotations, bar)
    for split, paths in find_files(output).items():
        n = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
        print(f"{output}: {split} {n} trials in {len(paths)} files")


def main():
    check_least(globals(), SEED=0, WORKERS=0)
    with sole_writer(FLAT_DIR if EXPORT else DATA_DIR, "prepare_flat.py"):
        if EXPORT:
            return export()
        files = find_files(FLAT_DIR)
        inputs = {"SEED": SEED, "SUBJECTS": SUBJECTS}
        inputs |= {path.name: prepare_data.sample_fingerprint(path) for paths in files.values() for path in paths}
        if not is_prepared(inputs):
            prepare(files, inputs)


if __name__ == "__main__":
    run_script(main, globals())
