"""Scores and figures: where the model is right, in which areas, for which pictures. python -m tools.evaluate

Reads DATA_DIR and a checkpoint, or SUBMISSION; scores every subject's predictions and the subject-agnostic group
prediction by R², Pearson r and challenge score (core/scores.py). Validation chose the checkpoint, so with it the
private test is scored too, whose number is the one to report. OUTPUT_DIR gets

    report.html   one self-contained page: numbers, figures, the cortex in 3D, what made them
    scores.json   headlines with 95 % intervals, and what was scored
    scores.csv    median and mean by prediction, subject, hemisphere, ROI group, ROI and metric
    vertices.npz  every vertex: (n_subjects, n_vertices) per metric, NaN where missing; fsaverage indices
    figure_*.png  the report's figures 2 to 4
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import predict
import prepare_data
from core.files import output_folder
from core.scores import challenge_score, pearson, r2_score
from core.settings import constants, run, versions
from core.space import HEMIS
from model import UserError
from tools import figures, page
from tools.flatmap import FlatMap, save_figure

DATA_DIR: str = "data"  # prepared data
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # files separated by commas, averaged; empty: finetuned.pt in RUN_DIR, else head.pt
SPLIT: str = "val"  # val, test (private) or challenge: held-out activity in CHALLENGE_DIR, or NSD-Flat's test
SUBMISSION: str = ""  # a submission folder to score on challenge, instead of a checkpoint
CHALLENGE_DIR: str = prepare_data.CHALLENGE_DIR  # may hold subjXX/test_split/{test_fmri,noise_ceiling,test_images}
NOISE_CEILING_DIR: str = ""  # another challenge folder for val and test; empty: CHALLENGE_DIR
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

N_EXAMPLES = 6  # of figure 4b
FEWEST_PICTURES = 10  # per subject; below, resampling says nothing
FEW_PICTURES = 100  # per subject; below, the table warns
SPLIT_NAMES = {
    "val": "validation", "test": "private test", "heldout": "held-out pictures", "challenge": "challenge test",
    "outside": "out of distribution",
}  # fmt: skip


# ---- what is scored ------------------------------------------------------------------------------


def read_sides(folder, name, space, s, shape):
    """{lh,rh}NAME.npy in the challenge's vertex order -> (*shape, n_vertices) float32 of the common space, NaN where
    missing; None where there are no such files."""
    paths = {hemi: Path(folder) / f"{hemi}{name}.npy" for hemi in HEMIS}
    if not any(path.exists() for path in paths.values()):
        return None
    common = np.full((*shape, space.n_vertices), np.nan, np.float32)
    for hemi, path in paths.items():
        columns, values = space.columns(s, hemi), prepare_data.read_npy(path)
        if values.shape != (*shape, len(columns)) or not np.isfinite(values).all():
            expected = (*shape, len(columns))
            raise UserError(f"{path} has shape {values.shape}, expected finite numbers of shape {expected}.")
        common[..., columns] = values
    return common


def read_ceilings(root, space):
    """Noise ceilings as fractions (n_subjects, n_vertices), NaN for subjects without."""
    ceilings = np.full((len(space.subjects), space.n_vertices), np.nan)
    for s, subject in enumerate(space.subjects if space.unit == "vertices" else ()):
        values = read_sides(Path(root) / subject / "test_split/noise_ceiling", "_noise_ceiling", space, s, ())
        if values is not None:
            low, high = np.nanmin(values), np.nanmax(values)
            if low < 0 or high > 101:  # a little more than 100 is rounding
                raise UserError(f"noise ceilings of {subject} are {low:g} to {high:g}, expected 0 to 1 or 0 to 100.")
            ceilings[s] = np.minimum(values / (100 if high > 1.5 else 1), 1)
    return ceilings


def read_samples(data, split, s):
    """Nsd ids (n,), pictures (n, 256, 256, 3) and activity (n, n_vertices) of one subject, and the split's name, which
    is "outside" for held-out activity of pictures in CHALLENGE_DIR that are not the prepared ones. None without any."""
    if split != "challenge":
        rows = np.concatenate([data.samples(part, s) for part in (("val", "test") if split == "heldout" else (split,))])
        image = data.image[rows]
        return data.nsd_ids[image], data.images[image], torch.from_numpy(data.read_activity(rows)), split
    chosen, folder = data.test_subject == s, Path(CHALLENGE_DIR) / data.space.subjects[s] / "test_split"
    rows = data.test_image[chosen]
    if data.test_activity is not None:
        return data.nsd_ids[rows], data.images[rows], torch.from_numpy(data.test_activity[chosen]), split
    paths, ids = prepare_data.list_pictures(folder / "test_images")
    if not paths or np.array_equal(ids, data.nsd_ids[rows]):
        paths, ids = [], data.nsd_ids[rows]
    activity = read_sides(folder / "test_fmri", "_test_fmri", data.space, s, (len(ids),))
    if activity is None:
        return None
    images = np.stack(list(prepare_data.decode_pictures(paths))) if paths else data.images[rows]
    return ids, images, torch.from_numpy(np.nan_to_num(activity)), "outside" if paths else split


def scorable_samples(data, split, trained_ids):
    """[(nsd ids, pictures, activity) or None] of every subject, and the split's name. Pictures that predictions for a
    subject were trained on (trained_ids) are left out."""
    samples, n_left_out, name = [], 0, split
    for s, trained in enumerate(trained_ids):
        ids, images, activity, name = read_samples(data, split, s) or ([], [], None, name)
        fresh = np.flatnonzero(~np.isin(ids, trained))
        n_left_out += len(ids) - len(fresh)
        samples.append((ids[fresh], images[fresh], activity[fresh]) if len(fresh) else None)
    if n_left_out:
        print(f"{SPLIT_NAMES[name]}: left out {n_left_out} samples whose pictures the model was trained on")
    return samples, name


def checkpoint_predictions(predictor, data):
    """-> function of (subject's index in data, images) to {"subject", "group": (n, n_vertices of the data)}, and which
    of the data's vertices the checkpoint has."""
    columns = predictor.space.find(data.space)

    def predictions(s, images):
        latents, index = predictor.latents(images), predictor.index(data.space.subjects[s])
        return {name: predictor.decode(latents, i)[:, columns] for name, i in (("subject", index), ("group", None))}

    return predictions, columns >= 0


def submission_predictions(folder, data):
    """The same from {lh,rh}_pred_test.npy, without a group prediction."""

    def predictions(s, images):
        values = read_sides(Path(folder) / data.space.subjects[s], "_pred_test", data.space, s, (len(images),))
        if values is None:
            raise UserError(f"{folder}/{data.space.subjects[s]} has no {{lh,rh}}_pred_test.npy.")
        return {"subject": torch.from_numpy(values)}

    return predictions, np.ones(data.space.n_vertices, bool)


def trained_pictures(infos, data, split):
    """Per subject of the data the nsd ids that predictions for them were trained on. The authors' own splits count as
    they are: there a picture may be trained on for one subject and scored for another, as in the report."""
    same = all(info["made_with"].get("data_fingerprint") == data.fingerprint for info in infos)
    if split != "challenge" and data.splits == "authors" and same:
        infos = []
    ids = [[]] * len(data.space.subjects)
    for info in infos:
        own = [info["added"].get(name, []) for name in data.space.subjects]
        ids = [np.concatenate([before, info["train_nsd_ids"], added]) for before, added in zip(ids, own)]
    return ids


# ---- scores, tables and intervals ----------------------------------------------------------------


@dataclasses.dataclass
class Scored:
    """One split, scored."""

    split: str
    maps: dict  # {(prediction, metric): (n_subjects, n_vertices)}
    table: pd.DataFrame  # of summarise()
    headlines: dict  # of headlines()
    n_images: dict  # {subject: scored pictures}
    n_pictures: int  # unique ones, of all subjects
    ceilings: np.ndarray  # (n_subjects, n_vertices)
    examples: list  # of choose_examples()

    def __str__(self):
        counts = [n for n in self.n_images.values() if n]
        each = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
        plural = "" if each == "1" else "s"
        return f"{SPLIT_NAMES[self.split]}, {each} picture{plural} per subject, {self.n_pictures} unique"


def measure(data, split, samples, predictions, known, ceilings, example=None):
    """Score every subject's samples -> Scored. predictions: function of (subject's index, images); known: which
    vertices it predicts; example: the subject whose examples are chosen."""
    space, maps, resampled, examples = data.space, {}, {}, []
    n_images = {name: len(own[0]) if own else 0 for name, own in zip(space.subjects, samples)}
    if not any(n_images.values()):
        where = f"{CHALLENGE_DIR}/subjXX/test_split has no activity" if split == "challenge" else "no picture is left"
        raise UserError(f"nothing to score on {SPLIT_NAMES[split]}: {where}; --split chooses another split.")
    pictures = np.unique(np.concatenate([own[0] for own in samples if own]))
    weights = draw_pictures(len(pictures), RESAMPLES, SEED)
    for s, (subject, own) in enumerate(zip(space.subjects, samples)):
        if own is None:
            print(f"{subject}: no pictures or no activity in {SPLIT_NAMES[split]}, not scored")
            continue
        (ids, images, activity), present = own, space.present(s) & known
        y, ceiling = activity[:, present].float(), ceilings[s, present]
        by_prediction = predictions(s, images)
        for prediction, values in by_prediction.items():
            values = values[:, present]
            scores = {"r2": r2_score(y, values).numpy(), "r": pearson(y, values).numpy()}
            if np.isfinite(ceiling).all():
                scores["challenge"] = challenge_score(scores["r"], ceiling)
            for metric, score in scores.items():
                maps.setdefault((prediction, metric), np.full(space.mask.shape, np.nan))[s, present] = score
            if RESAMPLES and len(y) >= FEWEST_PICTURES:
                drawn = weights[:, np.searchsorted(pictures, ids)]
                for metric, score in resampled_scores(y, values, drawn, ceiling).items():
                    resampled.setdefault((prediction, metric), {})[subject] = score
        if s == example:
            examples = choose_examples(*own, by_prediction["subject"], present)
    table, few = summarise(maps, space), any(0 < n < FEWEST_PICTURES for n in n_images.values())
    return Scored(split, maps, table, headlines(table, resampled, few), n_images, len(pictures), ceilings, examples)


def choose_examples(ids, images, activity, prediction, present):
    """Samples from the best predicted to the worst: [(nsd id, R² over vertices, picture, measured, predicted)]."""
    r2 = r2_score(activity[:, present].T, prediction[:, present].T).numpy()
    order = np.argsort(-r2)[np.unique(np.linspace(0, len(r2) - 1, N_EXAMPLES).round().astype(int))]
    maps = (np.where(present, values[order].float(), np.nan) for values in (activity, prediction))
    return list(zip(ids[order], r2[order], images[order], *maps))


def summarise(maps, space):
    """maps {(prediction, metric): (n_subjects, n_vertices)} -> DataFrame with one row per prediction, subject ("all"
    pools all subjects' vertices), hemisphere, ROI and metric: median, mean and number of the vertices scored."""
    side = np.where(np.arange(space.n_vertices) < space.n_lh, "lh", "rh")
    areas, frames = list(space.regions()), []
    for s, subject in enumerate(space.subjects):
        scores = pd.DataFrame({"/".join(key): values[s] for key, values in maps.items()})
        for k, inside in enumerate(space.regions(s).values()):
            frames.append(scores[inside].assign(subject=subject, area=k, hemisphere=side[inside]))
    long, keys = pd.concat(frames, ignore_index=True), ["subject", "area", "hemisphere"]
    pooled = [{}, {"subject": "all"}, {"hemisphere": "both"}, {"subject": "all", "hemisphere": "both"}]
    table = pd.concat([long.assign(**same).groupby(keys).agg(["median", "mean", "count"]) for same in pooled])
    every = [["all", *space.subjects], range(len(areas)), ["both", "lh", "rh"]]
    table = table.reindex(pd.MultiIndex.from_product(every, names=keys)).stack(0, future_stack=True).reset_index()
    table[["prediction", "metric"]] = table.pop("level_3").str.split("/", expand=True).to_numpy()
    table[["roi_group", "roi"]] = [areas[k] for k in table.area]
    table["n_vertices"] = table["count"].fillna(0).astype(int)
    order = ["prediction", "subject", "hemisphere", "roi_group", "roi", "metric", "median", "mean", "n_vertices"]
    return table[order]


def headlines(table, resampled, few):
    """{prediction: {subject or "all": {metric: {"median", "mean", "median_95", "mean_95"}}}} of all vertices; the last
    two are 95 % intervals or None. few: some subject has too few pictures for an interval of all."""
    numbers = {}
    for row in table[(table.roi_group == "all") & (table.hemisphere == "both")].itertuples():
        scores = resampled.get((row.prediction, row.metric), {})
        if row.subject == "all":
            scores = None if few or not scores else np.concatenate(list(scores.values()), axis=1)
        else:
            scores = scores.get(row.subject)
        values = {"median": row.median, "mean": row.mean, "median_95": None, "mean_95": None}
        if scores is not None:
            values["median_95"] = interval(row.median, np.nanmedian(scores, axis=1))
            values["mean_95"] = interval(row.mean, np.nanmean(scores, axis=1))
        numbers.setdefault(row.prediction, {}).setdefault(row.subject, {})[row.metric] = values
    return numbers


def draw_pictures(n_pictures, n_resamples, seed):
    """How often each resample draws each picture, with replacement: (n_resamples, n_pictures) float32. A picture that
    several subjects saw is drawn for all of them together; several predictions share the resamples."""
    counts = np.random.default_rng(seed).multinomial(n_pictures, np.full(n_pictures, 1 / n_pictures), n_resamples)
    return torch.from_numpy(counts).float()


def resampled_scores(activity, prediction, weights, ceiling):
    """Scores of every vertex with pictures repeated -> {metric: (n_resamples, n_vertices)} float32 arrays.

    activity, prediction (n_images, n_vertices) float32, weights (n_resamples, n_images), ceiling (n_vertices,). R² and
    r need the sums of y, y², ŷ, ŷ² and (y - ŷ)² over pictures, each a matrix product. NaN without any picture.
    """
    n = weights.sum(1, keepdim=True)
    n = n.where(n > 0, torch.nan)

    def spread(x):
        sums, squares = weights @ x, weights @ x.square()
        around = squares - sums.square() / n
        return sums, squares, around, around <= 1e-5 * squares  # the last: constant, but for rounding

    y, x = activity - activity.mean(0), prediction - prediction.mean(0)  # float32 sums of small numbers lose less
    offset = activity.mean(0) - prediction.mean(0)
    sum_y, squares_y, around_y, constant_y = spread(y)
    sum_x, squares_x, around_x, constant_x = spread(x)
    difference = weights @ (y - x).square()
    residual = difference + 2 * offset * (sum_y - sum_x) + n * offset.square()
    product = (squares_y + squares_x - difference) / 2 - sum_y * sum_x / n
    r = torch.where(constant_y | constant_x, 0, product / (around_y * around_x).sqrt()).clamp(-1, 1)
    scores = {"r2": torch.where(constant_y, (residual == 0).float(), 1 - residual / around_y).numpy(), "r": r.numpy()}
    if np.isfinite(ceiling).all():
        scores["challenge"] = challenge_score(scores["r"], ceiling.astype(np.float32))
    return scores


def interval(score, resampled):
    """95 % interval of a score, or of a difference of scores, from its resampled values (n_resamples,) -> [low, high].

    The middle 95 % of the resampled values, moved so that their median is the score: resamples repeat pictures, which
    alone lowers R² by about 1 / n_images and raises the challenge score.
    """
    low, high = np.nanquantile(resampled, (0.025, 0.975)) - np.nanmedian(resampled) + score
    return [float(low), float(high)]


# ---- what is written -----------------------------------------------------------------------------


def show(numbers, value):
    """A headline and its interval as text."""
    ends = numbers[f"{value}_95"]
    text = "–" if np.isnan(numbers[value]) else f"{numbers[value]:.4f}"
    return text + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")


def overview(parts, subjects):
    """Headlines of Scored splits for these subjects ("all" pools them) as a DataFrame of text."""
    columns = {"median R²": ("r2", "median"), "mean R²": ("r2", "mean"), "median r": ("r", "median")}
    columns |= {"challenge score": ("challenge", "mean")}
    rows = []
    for part in parts:
        for prediction, by_subject in part.headlines.items():
            for subject in (name for name in by_subject if name in subjects):
                n = part.n_images.get(subject, sum(part.n_images.values()))
                row = {"split": SPLIT_NAMES[part.split], "prediction": prediction, "subject": subject, "pictures": n}
                numbers = by_subject[subject]
                shown = {title: show(numbers[m], value) if m in numbers else "–" for title, (m, value) in columns.items()}
                rows.append(row | shown)
    return pd.DataFrame(rows)


def sentence(scored):
    """The sentence to cite."""
    numbers = scored.headlines["subject"]["all"]
    parts = [f"median R² {show(numbers['r2'], 'median')}"]
    parts += [f"challenge score {show(numbers['challenge'], 'mean')}"] if "challenge" in numbers else []
    ends = "; 95 % CI over pictures in parentheses" if numbers["r2"]["median_95"] else ""
    return f"{', '.join(parts)} ({scored}{ends})"


def print_tables(parts, reported, space):
    print("\n" + overview(parts, ["all", *space.subjects]).to_string(index=False))
    table = parts[0].table
    streams = table[(table.prediction == "subject") & (table.subject == "all") & (table.metric == "r2")]
    streams = streams[streams.roi_group == "streams"]
    if len(streams):
        wide = streams.pivot(index="roi", columns="hemisphere", values="median").reindex(streams.roi.unique())
        print(f"\nmedian R² of {SPLIT_NAMES[parts[0].split]} by stream\n" + wide.to_string(float_format="%.4f"))
    few = [f"{subject} ({n})" for subject, n in parts[0].n_images.items() if n < FEW_PICTURES]
    if few:
        print(f"\nfewer than {FEW_PICTURES} pictures, scores are uncertain: {', '.join(few)}")
    if parts[0].split == "val":
        print("\nvalidation chose the checkpoint, so its scores are optimistic")
    none = "none; there are no private test pictures. Score the organisers' held-out ones with --split challenge"
    print(f"the number to report: {sentence(reported) if reported else none}")


def without_nan(content):
    """For JSON: None instead of NaN, arrays as lists, through dicts and lists."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and np.isnan(content) else content


def write_scores(folder, what, parts, reported, space):
    """scores.json, scores.csv and vertices.npz."""

    def content(part):
        return {
            "split": part.split, "n_images": part.n_images, "n_pictures": part.n_pictures, "scores": part.headlines
        }  # fmt: skip

    scored = parts[0]
    written = {"scored": what | {"unit": space.unit}, "versions": versions()} | content(scored)
    written |= {"to_report": content(reported)} if reported else {}
    written |= {"others": [content(part) for part in parts[1:]]}
    (folder / "scores.json").write_text(json.dumps(without_nan(written), indent=1))
    table = scored.table.rename(columns={"n_vertices": f"n_{space.unit}"})
    table.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    index = "fsaverage_index" if space.unit == "vertices" else "map_index"
    np.savez_compressed(
        folder / f"{space.unit}.npz", subjects=np.array(space.subjects), noise_ceiling=scored.ceilings,
        hemisphere=np.where(np.arange(space.n_vertices) < space.n_lh, "lh", "rh"), **{index: space.vertices.numpy()},
        **{"_".join(key): values for key, values in scored.maps.items()},
    )  # fmt: skip


def draw_figures(data, scored, example, predictor):
    """-> {name: figure}. Figures 2 and 3 are of one checkpoint: none of averages and submissions."""
    space, flat, drawn = data.space, FlatMap(data.space, FSAVERAGE_DIR), {}
    if predictor and len(predictor.encoders) == 1:
        [encoder], [path], [info] = predictor.encoders, predictor.paths, predictor.info
        drawn["figure_2a_pooling_maps"] = figures.figure_2a(*figures.pooling_exemplars(encoder, SEED))
        loadings, shares = figures.components(encoder, predictor.space, data, DATA_DIR)
        drawn["figure_2b_components"] = figures.figure_2b(loadings, shares, flat, OUTLINES)
        phases = figures.training_curves(path, info["made_with"])
        if phases:
            drawn["figure_3_loss_curves"] = figures.figure_3(phases)
    for metric, name in (("r2", "figure_4a_r2_maps"), ("challenge", "figure_4a_noise_normalised_maps")):
        if ("subject", metric) in scored.maps:
            maps = figures.score_maps(scored.maps, metric, space)
            drawn[name] = figures.figure_4a(maps, metric, flat, OUTLINES)
    if scored.examples:
        drawn["figure_4b_samples"] = figures.figure_4b(scored.examples, example, flat, OUTLINES)
    if space.rois:
        drawn["figure_4c_rois"] = figures.figure_4c(scored.table, space.unit)
    return drawn


def main():
    if SPLIT not in ("val", "test", "challenge") or SUBMISSION and CHECKPOINT:
        raise UserError("SPLIT is val, test or challenge; give a SUBMISSION or a CHECKPOINT.")
    data, predictor, infos = prepare_data.load(DATA_DIR), None, []
    space, split = data.space, "challenge" if SUBMISSION else SPLIT
    if EXAMPLE_SUBJECT not in ("", *space.subjects):
        raise UserError(f"unknown EXAMPLE_SUBJECT {EXAMPLE_SUBJECT!r}; {DATA_DIR} has {', '.join(space.subjects)}.")
    example = space.subjects.index(EXAMPLE_SUBJECT or space.subjects[0])
    what = {"data": DATA_DIR, "data_fingerprint": data.fingerprint, "splits": data.splits}
    if SUBMISSION:
        what["submission"], output = SUBMISSION, Path(SUBMISSION) / "evaluation"
        predictions, known = submission_predictions(SUBMISSION, data)
    else:
        paths = predict.choose_checkpoints(CHECKPOINT, RUN_DIR)
        predictor = predict.load_encoder(paths, DEVICE, PRECISION, BATCH_SIZE)
        infos = predictor.info
        predictions, known = checkpoint_predictions(predictor, data)
        kept = ("fingerprint", "made_with", "versions", "trunk_settings", "scores", "step", "finished")
        what["checkpoints"] = [{"path": str(p)} | {k: i[k] for k in kept} for p, i in zip(paths, infos)]
        if split != "challenge" and all(set(space.subjects) <= set(info["added"]) for info in infos):
            split = "heldout"  # nothing was chosen on an added person's validation pictures
        names = [paths[0].stem] if len(paths) == 1 else [f"{p.resolve().parent.name}-{p.stem}" for p in paths]
        output = paths[0].parent / f"evaluation_{'_'.join(names)}_{split}"
    what["constants"] = constants(globals())
    with output_folder(OUTPUT_DIR or output, OVERWRITE, marker="scores.json") as folder:
        parts = []
        for part in dict.fromkeys([split, "test"]):
            if parts and parts[0].split not in ("val", "outside"):
                break
            samples, name = scorable_samples(data, part, trained_pictures(infos, data, part))
            ceilings = read_ceilings(CHALLENGE_DIR if part == "challenge" else NOISE_CEILING_DIR or CHALLENGE_DIR, space)
            if not parts or any(samples):
                parts.append(measure(data, name, samples, predictions, known, ceilings, None if parts else example))
        reported = parts[-1] if parts[0].split == "val" else parts[0]
        reported = None if reported.split == "val" else reported
        print_tables(parts, reported, space)
        write_scores(folder, what, parts, reported, space)
        pictures = {}
        for name, figure in draw_figures(data, parts[0], example, predictor).items() if FIGURES else ():
            pictures[name] = folder / f"{name}.png"
            save_figure(figure, pictures[name])
        if FIGURES:
            title = f"{what.get('submission') or ', '.join(map(str, paths))} on {SPLIT_NAMES[parts[0].split]}"
            page.write_page(
                folder / "report.html", title=title, number=sentence(reported) if reported else "", scored=parts[0],
                what=what, headlines=overview(parts, ["all"]), every=overview(parts, space.subjects), space=space,
                pictures=pictures,
            )  # fmt: skip
    print(f"wrote {OUTPUT_DIR or output}: {'report.html, ' if FIGURES else ''}scores.json, scores.csv, {space.unit}.npz")


if __name__ == "__main__":
    run(main, globals())
