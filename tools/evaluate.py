"""Scores and figures: where the model is right, in which areas, for which pictures. python -m tools.evaluate

Scores every subject's predictions and the subject-agnostic group prediction by R², Pearson r and challenge score
(core/scores.py). Validation chose the checkpoint, so the private test is scored with it: the number to report.
OUTPUT_DIR gets

    report.html   one self-contained page: numbers, figures, the cortex in 3D, what made them
    scores.json   headlines with 95 % intervals, and what was scored
    scores.csv    median and mean by prediction, subject, hemisphere, ROI group, ROI and metric; low, high: 95 % interval
    vertices.npz  every vertex: (n_subjects, n_vertices) per metric, NaN where missing; fsaverage indices
    figure_*.png  the report's figures 2 to 4
"""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import predict
import prepare_data
from core.files import output_folder
from core.scores import challenge_score, pearson, r2_score
from core.settings import constants, run
from core.space import HEMIS
from model import UserError
from tools import figures, page
from tools.flatmap import save_figure

DATA_DIR: str = "data"  # prepared data
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # files separated by commas, averaged; empty: finetuned.pt in RUN_DIR, else head.pt
SUBMISSION: str = ""  # a submission folder to score on challenge, instead of a checkpoint
SPLIT: str = "val"  # val, test (private) or challenge: held-out activity in CHALLENGE_DIR, or NSD-Flat's test
CHALLENGE_DIR: str = prepare_data.CHALLENGE_DIR  # subjXX/test_split with test_fmri, noise_ceiling; or NSD-synthetic's
NOISE_CEILING_DIR: str = ""  # challenge folder with ceilings for val and test; empty: CHALLENGE_DIR
OUTPUT_DIR: str = ""  # empty: evaluation_NAME_SPLIT beside the checkpoint, or evaluation in SUBMISSION
FIGURES: bool = True  # false: scores only
EXAMPLE_SUBJECT: str = ""  # whose pictures figure 4b shows; empty: the first (report: subject 1)
OUTLINES: str = "streams"  # ROI group outlined on flat maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
RESAMPLES: int = 500  # of the pictures, for 95 % intervals; 0: none. Full size: 3.8 GB
BATCH_SIZE: int = 64  # pictures at a time
SEED: int = 0  # of the resamples and of the clustering in figure 2a
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace an evaluation that exists

FEWEST_PICTURES = 10  # of a subject; below, there is no interval
FEW_PICTURES = 100  # of a subject; below, the table warns
N_EXAMPLES = 6  # of figure 4b
SPLITS = {"val": "validation", "test": "private test", "heldout": "held-out pictures", "challenge": "challenge test"}
SPLITS |= {"synthetic": "NSD-synthetic"}
TITLES = {"r2": "median R²", "r": "median r", "challenge": "challenge score"}


# ---- what is scored ------------------------------------------------------------------------------


def read_sides(folder, name, space, s, shape=()):
    """folder/{lh,rh}_NAME.npy in the challenge's vertex order -> (*shape, n_vertices) float32 of the common space, NaN
    where missing; None if there are no such files. Raises UserError for NaN, infinite values and other shapes."""
    paths = {hemi: Path(folder) / f"{hemi}_{name}.npy" for hemi in HEMIS}
    if not any(path.exists() for path in paths.values()):
        return None
    common = np.full((*shape, space.n_vertices), np.nan, np.float32)
    for hemi, path in paths.items():
        columns = space.columns(s, hemi)
        common[..., columns] = prepare_data.read_npy(path, (*shape, len(columns)))
        if not np.isfinite(common[..., columns]).all():
            raise UserError(f"{path} holds numbers that are not finite.")
    return common


def read_ceilings(root, space):
    """Noise ceilings as fractions (n_subjects, n_vertices), NaN for subjects without. Files may hold percent."""
    ceilings = np.full((len(space.subjects), space.n_vertices), np.nan)
    for s, subject in enumerate(space.subjects if space.unit == "vertices" else ()):
        values = read_sides(Path(root) / subject / "test_split/noise_ceiling", "noise_ceiling", space, s)
        if values is not None:
            low, high = np.nanmin(values), np.nanmax(values)
            if low < 0 or high > 100.5:  # a little more than 100 is rounding
                raise UserError(f"noise ceilings of {subject} are {low:g} to {high:g}, expected 0 to 1 or 0 to 100.")
            ceilings[s] = np.minimum(values / (100 if high > 1.5 else 1), 1)
    return ceilings


def choose_split(space, infos):
    """The key of SPLITS for SPLIT. On the validation pictures of people added to a checkpoint nothing was chosen."""
    if SPLIT not in ("val", "test", "challenge"):
        raise UserError(f"SPLIT is {SPLIT!r}, expected val, test or challenge.")
    if SPLIT == "challenge" or SUBMISSION:
        synthetic = any(Path(CHALLENGE_DIR).glob("*/prepare_synthetic.json")) and not SUBMISSION
        return "synthetic" if synthetic else "challenge"
    return "heldout" if all(set(space.subjects) <= set(info["added"]) for info in infos) else SPLIT


def read_samples(data, split, s):
    """One subject's nsd ids (n,), pictures (n, 256, 256, 3) and activity (n, n_vertices), or None without activity."""
    if split in ("val", "test", "heldout"):
        parts = ("val", "test") if split == "heldout" else (split,)
        rows = np.concatenate([data.samples(part, s) for part in parts])
        return data.nsd_ids[data.image[rows]], data.images[data.image[rows]], data.read_activity(rows)
    rows = data.test_image[data.test_subject == s]
    ids, images = data.nsd_ids[rows], data.images[rows]
    if data.test_activity is not None:
        return ids, images, data.test_activity[data.test_subject == s]
    folder = Path(CHALLENGE_DIR) / data.space.subjects[s] / "test_split"
    paths, listed = prepare_data.list_pictures(folder / "test_images")
    if split == "synthetic" and paths:
        ids, images = listed, np.stack(list(prepare_data.decode_pictures(paths)))
    elif paths and not np.array_equal(listed, ids):
        raise UserError(f"{folder}/test_images are not the test pictures that {DATA_DIR} was prepared with.")
    activity = read_sides(folder / "test_fmri", "test_fmri", data.space, s, (len(ids),))
    return None if activity is None else (ids, images, activity)


def trained_pictures(infos, data, split, s):
    """Nsd ids that predictions for a subject were trained on; of a submission all prepared training pictures.

    With the authors' splits none: they may train on a picture for one subject and score it for another, as the report.
    """
    same_data = all(info["made_with"].get("data_fingerprint") == data.fingerprint for info in infos)
    if data.splits == "authors" and same_data and split in ("val", "test"):
        return []
    trained = [info["train_nsd_ids"] for info in infos] or [data.nsd_ids[data.image[data.samples("train")]]]
    return np.concatenate(trained + [info["added"].get(data.space.subjects[s], []) for info in infos])


def predictions(predictor, space, s, images):
    """{"subject", "group": (n, n_vertices of the data)}; without a predictor "subject" alone, from SUBMISSION."""
    if predictor:
        latents, columns = predictor.latents(images), predictor.space.find(space)
        indices = {"subject": predictor.index(space.subjects[s]), "group": None}
        return {name: predictor.decode(latents, index)[:, columns] for name, index in indices.items()}
    values = read_sides(Path(SUBMISSION) / space.subjects[s], "pred_test", space, s, (len(images),))
    if values is None:
        raise UserError(f"{SUBMISSION}/{space.subjects[s]} has no {{lh,rh}}_pred_test.npy.")
    return {"subject": torch.from_numpy(values)}


# ---- scores and intervals ------------------------------------------------------------------------


@dataclasses.dataclass
class Scored:
    """One split, scored. A score is one vertex of one subject; challenge scores are NaN without noise ceiling."""

    split: str
    n_images: dict  # {subject: pictures}
    n_left_out: dict  # {subject: pictures that the model was trained on}
    n_pictures: int  # unique ones, of all subjects
    maps: dict  # {(prediction, metric): (n_subjects, n_vertices)}, NaN where missing
    table: pd.DataFrame  # of summarise()
    ceilings: np.ndarray  # (n_subjects, n_vertices)
    examples: list  # of choose_examples()

    def __str__(self):
        low, high = min(self.n_images.values()), max(self.n_images.values())
        each = f"{low} pictures" if low == high else f"{low} to {high} pictures"
        return f"{SPLITS[self.split]}, {each} per subject, {self.n_pictures} unique"

    def headlines(self):
        """Rows of the table for all vertices."""
        return self.table[(self.table.roi_group == "all") & (self.table.hemisphere == "both")]


def measure(data, split, predictor, infos, ceilings):
    """Score all subjects -> Scored, or None without pictures."""
    space, samples, left_out, examples = data.space, {}, {}, []
    known = predictor.space.find(space) >= 0 if predictor else np.ones(space.n_vertices, bool)
    for s, subject in enumerate(space.subjects):
        sample = read_samples(data, split, s) or ([],)
        fresh = np.flatnonzero(~np.isin(sample[0], trained_pictures(infos, data, split, s)))
        left_out[subject] = len(sample[0]) - len(fresh)
        if left_out[subject]:
            print(f"{subject}: {left_out[subject]} pictures of {SPLITS[split]} left out, the model was trained on them")
        if len(fresh) > 1:  # R² needs two
            samples[s] = *sample, fresh
    if not samples:
        return None
    pictures = np.unique(np.concatenate([ids[fresh] for ids, _, _, fresh in samples.values()]))
    weights, rows, scores, resampled = draw_pictures(len(pictures), RESAMPLES, SEED), [], {}, {}
    for s, (ids, images, activity, fresh) in samples.items():
        present, ids = space.present(s) & known, ids[fresh]
        y, ceiling = torch.from_numpy(activity[fresh][:, present]).float(), ceilings[s, present]
        drawn = weights[:, np.searchsorted(pictures, ids)] * (1 if len(ids) >= FEWEST_PICTURES else np.nan)
        rows.append([np.full(present.sum(), s), np.flatnonzero(present)])
        for prediction, values in predictions(predictor, space, s, images).items():
            values = values[fresh][:, present]
            own = {"r2": r2_score(y, values).numpy(), "r": pearson(y, values).numpy()}
            own["challenge"] = challenge_score(own["r"], ceiling)
            for metric, repeated in resampled_scores(y, values, drawn, ceiling).items():
                scores.setdefault((prediction, metric), []).append(own[metric])
                resampled.setdefault((prediction, metric), []).append(repeated)
            if prediction == "subject" and space.subjects[s] == (EXAMPLE_SUBJECT or space.subjects[min(samples)]):
                examples = choose_examples(ids, images[fresh], y, values, present)
    rows = np.concatenate(rows, 1)
    scores = {key: np.concatenate(parts) for key, parts in scores.items()}
    scores = {key: values for key, values in scores.items() if np.isfinite(values).any()}
    table = summarise(space, rows, scores, {key: np.concatenate(resampled[key], 1) for key in scores})
    maps = {key: np.full(space.mask.shape, np.nan) for key in scores}
    for key, values in scores.items():
        maps[key][*rows] = values
    n_images = {space.subjects[s]: len(sample[3]) for s, sample in samples.items()}
    return Scored(split, n_images, left_out, len(pictures), maps, table, ceilings, examples)


def choose_examples(ids, images, activity, prediction, present):
    """Samples from the best predicted to the worst: [(nsd id, R² over vertices, picture, measured, predicted)], the last
    two (n_vertices of the common space,)."""
    r2, examples = r2_score(activity.T, prediction.T).numpy(), []
    ranks = np.unique(np.linspace(0, len(r2) - 1, N_EXAMPLES).round().astype(int))
    for i in np.argsort(-r2)[ranks]:
        maps = np.full((2, len(present)), np.nan)
        maps[:, present] = activity[i], prediction[i]
        examples.append((ids[i], r2[i], images[i], *maps))
    return examples


def summarise(space, rows, scores, resampled):
    """Averages over vertices by prediction, subject ("all" pools all subjects' vertices), hemisphere, ROI and metric.

    rows (2, n): subject and vertex of each score; scores {(prediction, metric): (n,)}; resampled {…: (n_resamples, n)}.
    score is the median, of challenge scores the mean; low, high its 95 % interval, for ROIs that of R² only.
    """
    (s, vertex), table = rows, []
    regions, left = [space.regions(i) for i in range(len(space.subjects))], vertex < space.n_lh
    members = {"all": s >= 0} | {name: s == i for i, name in enumerate(space.subjects)}
    for roi in regions[0]:
        inside = np.stack([region[roi] for region in regions])[s, vertex]
        for hemi, side in (("both", s >= 0), ("lh", left), ("rh", ~left)):
            for (subject, member), (key, values) in itertools.product(members.items(), scores.items()):
                chosen = np.flatnonzero(inside & side & member & np.isfinite(values))
                if len(chosen):
                    average = np.mean if key[1] == "challenge" else np.median
                    score, ends = average(values[chosen]), None
                    if hemi == "both" and (roi == ("all", "all") or key == ("subject", "r2")):
                        ends = interval(score, average(resampled[key][:, chosen], axis=1))
                    numbers = np.median(values[chosen]), np.mean(values[chosen]), len(chosen)
                    table.append((key[0], subject, hemi, *roi, key[1], score, *(ends or (np.nan, np.nan)), *numbers))
    columns = ["prediction", "subject", "hemisphere", "roi_group", "roi", "metric", "score", "low", "high"]
    return pd.DataFrame(table, columns=[*columns, "median", "mean", f"n_{space.unit}"])


def draw_pictures(n_pictures, n_resamples, seed):
    """How often each resample draws each picture, with replacement: (n_resamples, n_pictures) float32. A picture that
    several subjects saw is drawn for all of them together; several predictions share the resamples."""
    counts = np.random.default_rng(seed).multinomial(n_pictures, np.full(n_pictures, 1 / n_pictures), n_resamples)
    return torch.from_numpy(counts).float()


def resampled_scores(activity, prediction, weights, ceiling):
    """Scores of every vertex with pictures repeated -> {metric: (n_resamples, n_vertices)} float32 arrays.

    activity, prediction (n_images, n_vertices), weights (n_resamples, n_images), ceiling (n_vertices,), NaN: unknown.
    Sums over pictures are matrix products with the weights, in float64. NaN without any picture.
    """
    weights, y, x = weights.double(), activity.double(), prediction.double()
    y, x = y - y.mean(0), x - y.mean(0)  # the same shift for both
    n = weights.sum(1, keepdim=True)
    n = n.where(n > 0, torch.nan)
    sum_y, sum_x, residual = weights @ y, weights @ x, weights @ (y - x).square()
    squares_y, squares_x = weights @ y.square(), weights @ x.square()
    around_y, around_x = squares_y - sum_y.square() / n, squares_x - sum_x.square() / n  # about the resample's mean
    constant_y, constant_x = around_y <= 1e-10 * squares_y, around_x <= 1e-10 * squares_x
    product = (squares_y + squares_x - residual) / 2 - sum_y * sum_x / n
    r = torch.where(constant_y | constant_x, 0, product / (around_y * around_x).sqrt()).clamp(-1, 1)
    r2 = torch.where(constant_y, (residual == 0).double(), 1 - residual / around_y)
    scores = {"r2": r2.numpy(), "r": r.numpy(), "challenge": challenge_score(r.numpy(), ceiling)}
    return {metric: score.astype(np.float32) for metric, score in scores.items()}


def interval(score, resampled):
    """95 % interval of a score, or of a difference of scores, from its resampled values (n_resamples,) -> [low, high],
    or None without any.

    The middle 95 % of the resampled values, moved so that their median is the score: resamples repeat pictures, which
    alone lowers R² by about 1 / n_images and raises the challenge score.
    """
    if not np.isfinite(resampled).any():
        return None
    low, high = np.nanquantile(resampled, (0.025, 0.975)) - np.nanmedian(resampled) + score
    return [float(low), float(high)]


# ---- what is written -----------------------------------------------------------------------------


def show(row, before=" (", after=")"):
    """A score and its interval as text."""
    return f"{row.score:.4f}" + ("" if np.isnan(row.low) else f"{before}{row.low:.4f} to {row.high:.4f}{after}")


def overview(parts):
    """Headlines of Scored splits as a DataFrame of text."""
    rows = pd.concat([part.headlines().assign(split=SPLITS[part.split]) for part in parts], ignore_index=True)
    n_images = {SPLITS[part.split]: {"all": part.n_pictures} | part.n_images for part in parts}
    rows["pictures"] = [n_images[row.split][row.subject] for row in rows.itertuples()]
    rows["text"] = [show(row) for row in rows.itertuples()]
    index = ["split", "prediction", "subject", "pictures"]
    table = rows.pivot_table(index=index, columns="metric", values="text", aggfunc="first", sort=False)
    return table.rename(columns=TITLES).rename_axis(columns=None).fillna("–").reset_index()


def cite(scored):
    """The sentence to cite."""
    rows = scored.headlines().query("prediction == 'subject' and subject == 'all' and metric != 'r'")
    texts = [f"{TITLES[row.metric]} {show(row, ', 95 % CI ', '')}" for row in rows.itertuples()]
    return f"{'; '.join(texts)} ({scored}; CI over pictures, not training seeds)"


def print_tables(parts, number):
    print("\n" + overview(parts).to_string(index=False))
    streams = parts[0].table.query("prediction == 'subject' and subject == 'all' and metric == 'r2'")
    streams = streams[streams.roi_group == "streams"]
    if len(streams):
        table = streams.pivot_table("score", "roi", "hemisphere", sort=False)
        print(f"\nmedian R² of {SPLITS[parts[0].split]} by stream\n{table.to_string(float_format='%.4f')}")
    few = [f"{subject} ({n})" for subject, n in parts[0].n_images.items() if n < FEW_PICTURES]
    if few:
        print(f"\nfewer than {FEW_PICTURES} pictures, scores are uncertain: {', '.join(few)}")
    if parts[0].split == "val":
        print("\nvalidation chose the checkpoint, so its scores are optimistic")
    print(f"the number to report: {number or 'none, as there are no private test pictures'}")


def record(scored):
    """For scores.json: counts, and scores[prediction][subject or "all"][metric]."""
    scores = {}
    for row in scored.headlines().itertuples():
        numbers = {"median": row.median, "mean": row.mean}
        average = "mean" if row.metric == "challenge" else "median"
        numbers[f"{average}_95"] = None if np.isnan(row.low) else [row.low, row.high]
        scores.setdefault(row.prediction, {}).setdefault(row.subject, {})[row.metric] = numbers
    counts = {name: getattr(scored, name) for name in ("split", "n_images", "n_left_out", "n_pictures")}
    return counts | {"scores": scores}


def write_scores(folder, what, parts, reported, space):
    """scores.json, scores.csv and vertices.npz (pixels.npz of NSD-Flat)."""
    content = record(parts[0]) | {"others": [record(part) for part in parts[1:]], "made_with": what}
    content |= {"to_report": record(reported)} if reported else {}
    (folder / "scores.json").write_text(json.dumps(content, indent=1))
    parts[0].table.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    index = "fsaverage_index" if space.unit == "vertices" else "map_index"
    np.savez_compressed(
        folder / f"{space.unit}.npz", subjects=np.array(space.subjects), noise_ceiling=parts[0].ceilings,
        hemisphere=np.where(np.arange(space.n_vertices) < space.n_lh, "lh", "rh"), **{index: space.vertices.numpy()},
        **{"_".join(key): values for key, values in parts[0].maps.items()},
    )  # fmt: skip


def main():
    data, predictor, infos = prepare_data.load(DATA_DIR), None, []
    if EXAMPLE_SUBJECT not in ("", *data.space.subjects) or SUBMISSION and CHECKPOINT:
        raise UserError(f"EXAMPLE_SUBJECT is one of {data.space.subjects}; give a SUBMISSION or a CHECKPOINT.")
    if not SUBMISSION:
        predictor = predict.load_encoder(predict.choose_checkpoints(CHECKPOINT, RUN_DIR), DEVICE, PRECISION, BATCH_SIZE)
        infos = predictor.info
    split, output = choose_split(data.space, infos), Path(SUBMISSION) / "evaluation"
    if predictor:
        stems = {path.stem for path in predictor.paths}
        name = "_".join(sorted(stems)) if len(infos) == 1 else f"average_of_{len(infos)}"
        output = predictor.paths[0].parent / f"evaluation_{name}_{split}"
    keys = ("fingerprint", "made_with", "versions", "trunk_settings", "step", "finished")
    what = {"constants": constants(globals()), "data_fingerprint": data.fingerprint, "splits": data.splits}
    what["checkpoints"] = [{"path": str(p)} | {k: i[k] for k in keys} for p, i in zip(predictor.paths, infos)]
    within = NOISE_CEILING_DIR or (prepare_data.CHALLENGE_DIR if split == "synthetic" else CHALLENGE_DIR)
    output = Path(OUTPUT_DIR or output)
    with output_folder(output, OVERWRITE, marker="scores.json") as folder:
        parts = []
        for part in (split, "test") if split in ("val", "synthetic") else (split,):
            ceilings = read_ceilings(CHALLENGE_DIR if part in ("challenge", "synthetic") else within, data.space)
            parts.append(measure(data, part, predictor, infos, ceilings))
        if not parts[0]:
            raise UserError(f"nothing to score on {SPLITS[split]}: no pictures with activity; SPLIT chooses another.")
        reported = parts[-1] if split == "val" else parts[0]
        parts, number = [part for part in parts if part], cite(reported) if reported else ""
        print_tables(parts, number)
        write_scores(folder, what, parts, reported, data.space)
        if FIGURES:
            drawn = figures.draw(parts[0], data.space, predictor, (OUTLINES, FSAVERAGE_DIR, EXAMPLE_SUBJECT, SEED))
            for name, figure in drawn.items():
                save_figure(figure, folder / f"{name}.png")
            title = f"{SUBMISSION or ', '.join(map(str, predictor.paths))} on {SPLITS[split]}"
            page.write_page(folder, title, number, parts, overview(parts), what, data.space)
    print(f"wrote {output}: {'report.html, ' if FIGURES else ''}scores.json, scores.csv, {data.space.unit}.npz")


if __name__ == "__main__":
    run(main, globals())
