"""Scores and figures: where the model is right, in which areas, for which pictures. python -m tools.evaluate

Scores every subject's predictions and the subject-agnostic group prediction by R², Pearson r and challenge score
(core/scores.py). Validation chose the checkpoint, so the private test is scored with it: the number to report.
OUTPUT_DIR gets report.html, scores.json, scores.csv, vertices.npz and figure_*.png, described in docs/evaluate.md.
"""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

import predict
import prepare_data
from core.files import output_folder
from core.scores import r2_score
from core.settings import constants, run
from core.space import HEMIS
from model import UserError
from tools import figures
from tools.pictures import plural
from tools.vertices import draw_pictures, find, interval, resampled_scores, roi_masks

SUBMISSION: str = ""  # a submission folder to score on challenge, instead of a checkpoint
SPLIT: str = "val"  # val, test (private) or challenge: held-out activity in CHALLENGE_DIR, or NSD-Flat's test
CHALLENGE_DIR: str = prepare_data.CHALLENGE_DIR  # subjXX/test_split with test_fmri, noise_ceiling; or NSD-synthetic's
NOISE_CEILING_DIR: str = ""  # challenge folder with ceilings for val and test; empty: CHALLENGE_DIR
OUTPUT_DIR: str = ""  # empty: evaluation_NAME_SPLIT beside the checkpoint, or evaluation in SUBMISSION
FIGURES: bool = True  # false: scores only
OUTLINES: str = "streams"  # ROI group outlined on flat maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
RESAMPLES: int = 500  # of the pictures, for 95 % intervals; 0: none
SEED: int = 0  # of the resamples and of the clustering in figure 2a
OVERWRITE: bool = False  # replace an evaluation that exists
SHARED = predict, "DATA_DIR RUN_DIR CHECKPOINT BATCH_SIZE PRECISION DEVICE"  # set there

FEWEST_PICTURES = 10  # of a subject; with fewer there is no interval
N_EXAMPLES = 6  # of figure 4b
SPLITS = {"val": "validation", "test": "private test", "heldout": "held-out pictures"}
SPLITS |= {"challenge": "challenge test", "synthetic": "NSD-synthetic"}
TITLES = {"r2": "median R²", "r": "median r", "challenge": "challenge score"}


def read_sides(folder, name, space, s, shape=()):
    """folder/{lh,rh}_NAME.npy in the challenge's vertex order -> (*shape, n_vertices) float32 of the common space, NaN
    where missing. Raises UserError for missing files, NaN, infinite values and other shapes."""
    common = np.full((*shape, space.n_vertices), np.nan, np.float32)
    for hemi in HEMIS:
        columns, path = space.columns(s, hemi), folder / f"{hemi}_{name}.npy"
        common[..., columns] = prepare_data.read_npy(path, (*shape, len(columns)))
        if not np.isfinite(common[..., columns]).all():
            raise UserError(f"{path} holds numbers that are not finite.")
    return common


def read_ceilings(root, space):
    """Noise ceilings as fractions (n_subjects, n_vertices), NaN for subjects without. Files may hold percent."""
    ceilings = np.full(space.mask.shape, np.nan)
    for s, subject in enumerate(space.subjects):
        folder = Path(root) / subject / "test_split/noise_ceiling"
        if space.unit == "vertices" and folder.exists():
            values = read_sides(folder, "noise_ceiling", space, s)
            low, high = np.nanmin(values), np.nanmax(values)
            if low < 0 or high > 100.5:  # a little more than 100 is rounding
                raise UserError(f"noise ceilings of {subject} are {low:g} to {high:g}, expected 0 to 1 or 0 to 100.")
            ceilings[s] = np.minimum(values / (100 if high > 1.5 else 1), 1)
    return ceilings


def choose_split(space, infos):
    """The key of SPLITS for SPLIT. Nothing was chosen on the validation pictures of people added to a checkpoint."""
    if SPLIT not in ("val", "test", "challenge"):
        raise UserError(f"SPLIT is {SPLIT!r}, expected val, test or challenge.")
    if SPLIT == "challenge" or SUBMISSION:
        return "synthetic" if any(Path(CHALLENGE_DIR).glob("*/prepare_synthetic.json")) else "challenge"
    return "heldout" if all(set(space.subjects) <= set(info["added"]) for info in infos) else SPLIT


def read_samples(data, split, s):
    """One subject's nsd ids (n,), pictures (n, 256, 256, 3) and activity (n, n_vertices); no ids without activity."""
    parts = {"val": ["val"], "test": ["test"], "heldout": ["val", "test"]}.get(split)
    if parts:
        rows = np.concatenate([data.samples(part, s) for part in parts])
        return data.nsd_ids[data.image[rows]], data.images[data.image[rows]], data.activity[rows]
    rows = data.test_image[data.test_subject == s]
    ids, images = data.nsd_ids[rows], data.images[rows]
    if data.test_activity is not None:
        return ids, images, data.test_activity[data.test_subject == s]
    folder = Path(CHALLENGE_DIR) / data.space.subjects[s] / "test_split"
    paths, listed = prepare_data.list_pictures(folder / "test_images")
    if split == "synthetic" and paths and not SUBMISSION:
        ids, images = listed, np.stack(list(prepare_data.decode_pictures(paths)))
    elif paths and not np.array_equal(listed, ids):
        raise UserError(f"{folder}/test_images are not the test pictures of {predict.DATA_DIR}.")
    if not (folder / "test_fmri").exists():
        return ids[:0], None, None
    return ids, images, read_sides(folder / "test_fmri", "test_fmri", data.space, s, (len(ids),))


def trained_pictures(infos, data, split, subject):
    """Nsd ids that predictions for a subject were trained on; of a submission all prepared training pictures.

    With the authors' splits none: they may train on a picture for one subject and score it for another, as the report.
    """
    same_data = all(info["made_with"].get("data_fingerprint") == data.fingerprint for info in infos)
    if data.splits == "authors" and same_data and split in ("val", "test"):
        return []
    trained = [info["train_nsd_ids"] for info in infos] or [data.nsd_ids[data.image[data.samples("train")]]]
    return np.concatenate(trained + [info["added"].get(subject, []) for info in infos])


def choose_samples(data, split, infos):
    """What is scored -> {subject's index: (rows that the model was not trained on, *read_samples())}, {subject: number
    of rows left out}."""
    samples, n_left_out = {}, {}
    for s, subject in enumerate(data.space.subjects):
        ids, images, activity = read_samples(data, split, s)
        fresh = np.flatnonzero(~np.isin(ids, trained_pictures(infos, data, split, subject)))
        n_left_out[subject] = len(ids) - len(fresh)
        if n_left_out[subject]:
            count = plural(n_left_out[subject], "picture")
            print(f"{subject}, {SPLITS[split]}: excluded {count} that the model was trained on")
        if len(fresh) > 1:  # R² needs two
            samples[s] = fresh, ids, images, activity
    return samples, n_left_out


def measure(data, split, predictor, infos, ceilings):
    """Score a split -> counts: split, n_images and n_left_out {subject: pictures}, n_pictures (unique ones); maps
    {(prediction, metric): (n_subjects, n_vertices)}, table of summarise(), headlines: its rows for all vertices,
    examples of choose_examples(); None without pictures."""
    space, examples = data.space, []
    samples, n_left_out = choose_samples(data, split, infos)
    if not samples:
        return None
    pictures = np.unique(np.concatenate([ids[fresh] for fresh, ids, *_ in samples.values()]))
    weights = draw_pictures(len(pictures), RESAMPLES, SEED)
    maps = defaultdict(lambda: np.full(space.mask.shape, np.nan))
    resampled = defaultdict(lambda: np.full((RESAMPLES, *space.mask.shape), np.nan, np.float32))
    columns = find(predictor.space, space) if predictor else np.arange(space.n_vertices)
    for s, (fresh, ids, images, activity) in samples.items():
        present = space.present(s) & (columns >= 0)
        y, ceiling = torch.from_numpy(activity[fresh][:, present]).float(), ceilings[s, present]
        drawn = weights[:, np.searchsorted(pictures, ids[fresh])] * (1 if len(fresh) >= FEWEST_PICTURES else np.nan)
        if predictor:
            latents, own = predictor.latents(images[fresh]), predictor.index(space.subjects[s])
            predicted = {"subject": predictor.decode(latents, own), "group": predictor.decode(latents, None)}
        else:
            values = read_sides(Path(SUBMISSION) / space.subjects[s], "pred_test", space, s, (len(images),))
            predicted = {"subject": torch.from_numpy(values[fresh])}
        for prediction, values in predicted.items():
            values = values[:, columns[present]]
            scores = resampled_scores(y, values, torch.ones(1, len(y)), ceiling) | {"r2": r2_score(y, values).numpy()}
            for metric, repeated in resampled_scores(y, values, drawn, ceiling).items():
                if np.isfinite(scores[metric]).any():  # no challenge score without ceilings
                    maps[prediction, metric][s, present] = scores[metric]
                    resampled[prediction, metric][:, s, present] = repeated
            examples = examples or choose_examples(ids[fresh], images[fresh], y, values, present)
        maps["noise ceiling", "r2"][s, present] = ceiling
    n_images = {space.subjects[s]: len(fresh) for s, (fresh, *_) in samples.items()}
    counts = {"split": split, "n_images": n_images, "n_left_out": n_left_out, "n_pictures": len(pictures)}
    table = summarise(space, maps, resampled)
    headlines = table.query("roi_group == 'all' and hemisphere == 'both'")
    return SimpleNamespace(counts=counts, **counts, maps=maps, table=table, headlines=headlines, examples=examples)


def choose_examples(ids, images, activity, prediction, present):
    """Samples from the best predicted to the worst: [(nsd id, R² over vertices, picture, measured, predicted)], the
    last two (n_vertices of the common space,)."""
    r2 = r2_score(activity.T, prediction.T).numpy()
    chosen = np.argsort(-r2)[np.unique(np.linspace(0, len(r2) - 1, N_EXAMPLES).round().astype(int))]
    maps = np.full((2, len(chosen), len(present)), np.nan)
    maps[..., present] = torch.stack([activity[chosen], prediction[chosen]])
    return list(zip(ids[chosen], r2[chosen], images[chosen], *maps))


def summarise(space, maps, resampled):
    """Averages over vertices by prediction, subject ("all" pools all subjects' vertices), hemisphere, ROI and metric.

    maps {(prediction, metric): (n_subjects, n_vertices)}; resampled {…: (n_resamples, n_subjects, n_vertices)}.
    score is the median, of challenge scores the mean; low, high its 95 % interval, for ROIs that of R² only.
    """
    table, masks = [], [roi_masks(space, s) for s in range(len(space.subjects))]
    left, rows = np.arange(space.n_vertices) < space.n_lh, np.arange(len(masks))[:, None]
    sides = {"both": left | True, "lh": left, "rh": ~left}
    members = {"all": rows >= 0} | {name: rows == s for s, name in enumerate(space.subjects)}
    scored = {key: np.isfinite(values) for key, values in maps.items()}
    for roi, hemi in itertools.product(masks[0], sides):
        region = np.stack([mask[roi] for mask in masks]) & sides[hemi]
        for subject, key in itertools.product(members, maps):
            inside = region & members[subject] & scored[key]
            values = maps[key][inside]
            if not len(values):
                continue
            average, ends = np.mean if key[1] == "challenge" else np.median, None
            if key in resampled and hemi == "both" and (roi == ("all", "all") or key == ("subject", "r2")):
                ends = interval(average(values), average(resampled[key][:, inside], axis=1))
            numbers = average(values), *(ends or (np.nan, np.nan)), np.median(values), np.mean(values), len(values)
            table.append((key[0], subject, hemi, *roi, key[1], *numbers))
    columns = ["prediction", "subject", "hemisphere", "roi_group", "roi", "metric", "score", "low", "high"]
    return pd.DataFrame(table, columns=[*columns, "median", "mean", f"n_{space.unit}"])


def show(row, before=" (", after=")"):
    """A score and its interval as text."""
    return f"{row.score:.4f}" + ("" if np.isnan(row.low) else f"{before}{row.low:.4f} to {row.high:.4f}{after}")


def overview(parts):
    """Headlines of scored splits as a DataFrame of text."""
    tables = []
    for part in parts:
        pictures = part.headlines.subject.map({"all": part.n_pictures} | part.n_images)
        text = [show(row) for row in part.headlines.itertuples()]
        rows = part.headlines.assign(split=SPLITS[part.split], pictures=pictures, text=text)
        tables.append(rows[(rows.subject == "all") | (rows.prediction != "noise ceiling") & (len(part.n_images) > 1)])
    index = ["split", "prediction", "subject", "pictures"]
    table = pd.concat(tables).pivot_table("text", index, "metric", aggfunc="first", sort=False)
    return table.rename(columns=TITLES).rename_axis(columns=None).fillna("–").reset_index()


def cite(part):
    """The sentence to cite."""
    rows = part.headlines.query("prediction == 'subject' and subject == 'all' and metric != 'r'")
    texts = [f"{TITLES[row.metric]} {show(row, ', 95 % CI ', '')}" for row in rows.itertuples()]
    low, high = min(part.n_images.values()), max(part.n_images.values())
    n = f"{low if low == high else f'{low} to {high}'} pictures per subject, {part.n_pictures} unique"
    return f"{'; '.join(texts)} ({SPLITS[part.split]}, {n}; CI over pictures, not training seeds)"


def record(part):
    """For scores.json: counts, and scores[prediction][subject or "all"][metric]."""
    scores = {}
    for row in part.headlines.itertuples():
        average = "mean" if row.metric == "challenge" else "median"
        ends = None if np.isnan(row.low) else [row.low, row.high]
        numbers = {"median": row.median, "mean": row.mean, f"{average}_95": ends}
        scores.setdefault(row.prediction, {}).setdefault(row.subject, {})[row.metric] = numbers
    return part.counts | {"scores": scores}


def write_scores(folder, what, parts, reported, space):
    """scores.json, scores.csv and vertices.npz (pixels.npz of NSD-Flat)."""
    content = record(parts[0]) | {"others": [record(part) for part in parts[1:]], "made_with": what}
    content |= {"to_report": record(reported)} if reported else {}
    (folder / "scores.json").write_text(json.dumps(content, indent=1))
    parts[0].table.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    arrays = {"_".join(key).replace("noise ceiling_r2", "noise_ceiling"): v for key, v in parts[0].maps.items()}
    arrays["fsaverage_index" if space.unit == "vertices" else "map_index"] = space.vertices.numpy()
    hemisphere = np.where(np.arange(space.n_vertices) < space.n_lh, "lh", "rh")
    np.savez_compressed(folder / f"{space.unit}.npz", subjects=space.subjects, hemisphere=hemisphere, **arrays)


def main():
    data, predictor, infos, parts = prepare_data.load(predict.DATA_DIR), None, [], []
    source, output = SUBMISSION, Path(SUBMISSION) / "evaluation"
    if not SUBMISSION:
        predictor = predict.load_chosen()
        source, infos = ", ".join(map(str, predictor.paths)), predictor.info
    split = choose_split(data.space, infos)
    if predictor:
        name = predictor.paths[0].stem if len(infos) == 1 else f"average_of_{len(infos)}"
        output = predictor.paths[0].with_name(f"evaluation_{name}_{split}")
    what = {"scored": source, "data_fingerprint": data.fingerprint, "splits": data.splits}
    keys = ("fingerprint", "made_with", "versions", "trunk_settings")
    what |= {"checkpoints": [{key: info[key] for key in keys} for info in infos], "constants": constants(globals())}
    within = NOISE_CEILING_DIR or (prepare_data.CHALLENGE_DIR if split == "synthetic" else CHALLENGE_DIR)
    with output_folder(OUTPUT_DIR or output, OVERWRITE, marker="scores.json") as folder:
        for part in (split, "test") if split in ("val", "synthetic") else (split,):
            ceilings = read_ceilings(CHALLENGE_DIR if part in ("challenge", "synthetic") else within, data.space)
            parts.append(measure(data, part, predictor, infos, ceilings))
        if not parts[0]:
            raise UserError(f"nothing to score on {SPLITS[split]}: no pictures with activity; SPLIT chooses another.")
        reported, parts = parts[-1] if split == "val" else parts[0], [part for part in parts if part]
        number = f"The number to report: {cite(reported) if reported else 'none, there are no private test pictures'}"
        table = overview(parts)
        print(f"\n{table.to_string(index=False)}\n\n{number}")
        if split == "val":
            print("The checkpoint was selected on the validation split, so validation scores are optimistic.")
        write_scores(folder, what, parts, reported, data.space)
        if FIGURES:
            figures.save_all(folder, data.space, parts[0], predictor, OUTLINES, FSAVERAGE_DIR, SEED)
            figures.write_page(folder, f"{source} on {SPLITS[split]}", number, table, parts[0], data.space, what)
    print(f"wrote {OUTPUT_DIR or output}")


if __name__ == "__main__":
    run(main, globals())
