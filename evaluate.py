"""Stage 6: scores and figures: where the model is right, in which areas, for which pictures.

Reads DATA_DIR and a checkpoint (or SUBMISSION, a submission folder); scores every subject's predictions and
the subject-agnostic group prediction on a split, by R², Pearson r and challenge score (scores.py). Validation
chose the checkpoint: with it the private test is scored, too, whose number is the one to report. OUTPUT_DIR gets

    report.html   one page that opens anywhere: numbers, figures, the cortex to turn, what made them
    scores.json   headlines with 95 % intervals, and what was scored
    scores.csv    median and mean by prediction, subject, hemisphere, ROI group, ROI and metric
    vertices.npz  every vertex: (n_subjects, n_vertices) a metric, NaN where missing; fsaverage indices
    figure_*.png  the report's figures 2 to 4

Of NSD-Flat (prepare_flat.py) these are pixels of its maps, and so they are called: pixels.npz, n_pixels.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import figures
import predict
import prepare_data
import report
from checkpoint import check_scorable
from common import Problem, check_least, choose_device, constants, run_script, versions, write_whole
from ensemble import choose_checkpoints, load_for
from flatmap import FlatMap, save_figure
from results import csv_bytes, write_json
from scores import Bootstrap, count_pictures, headlines, overall, pick, sample_r2, score, summarise

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = predict.RUN_DIR  # holds finetuned.pt or head.pt
CHECKPOINT = ""  # a checkpoint, or several with commas, averaged; empty: RUN_DIR/finetuned.pt if there, else head.pt
SPLIT = "val"  # val, test (private) or challenge: the organisers' held-out activity in CHALLENGE_DIR, NSD-Flat's test
SUBMISSION = ""  # a submission folder to score on challenge, instead of a checkpoint
CHALLENGE_DIR = prepare_data.CHALLENGE_DIR  # may hold test_split/test_fmri and test_split/noise_ceiling
NOISE_CEILING_DIR = ""  # with subjXX/…/{lh,rh}_noise_ceiling.npy; empty: CHALLENGE_DIR where it has them
OUTPUT_DIR = ""  # empty: evaluation_… beside the checkpoint, or evaluation in SUBMISSION
FIGURES = True  # false: scores only, no figures and no report.html
EXAMPLE_SUBJECT = ""  # whose pictures figure 4b shows; empty: the first (report: Subject 1)
OUTLINES = predict.OUTLINES  # ROI group outlined on flat maps; empty: none
FSAVERAGE_DIR = predict.FSAVERAGE_DIR  # full fsaverage for the maps; empty: see predict.py
RESAMPLES = 1000  # of the pictures, for 95 % intervals; 0: none
BATCH_SIZE = 64  # pictures at a time
SEED = prepare_data.SEED  # of the resamples and of the clustering in figure 2a
PRECISION = "auto"  # auto, bfloat16, float16 or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N

n_examples = 6  # of figure 4b
few_pictures = 100  # of a subject; below, the tables warn


# ---- what is scored -----------------------------------------------------------------------------


def read_sides(folder, name, space, subject, shape):
    """folder/{lh,rh}NAME.npy in the challenge's vertex order -> (*shape, n_vertices) float32 of the
    common space, NaN where missing; None where there is no such file."""
    paths = {hemi: Path(folder) / f"{hemi}{name}.npy" for hemi in prepare_data.hemis}
    missing = [path for path in paths.values() if not path.exists()]
    if len(missing) == 2:
        return None
    if missing:
        raise Problem(f"{missing[0]} is missing, expected both hemispheres' files in {folder}")
    common = np.full((*shape, space.n_vertices), np.nan, np.float32)
    for hemi, path in paths.items():
        columns, values = space.hemisphere(subject, hemi), prepare_data.read_npy(path)
        if values.shape != (*shape, len(columns)) or values.dtype.kind != "f":
            raise Problem(
                f"{path}: {values.dtype} of shape {values.shape}, expected floats {(*shape, len(columns))} as in the "
                f"prepared data {DATA_DIR}"
            )
        if not np.isfinite(values).all():
            raise Problem(f"{path}: {(~np.isfinite(values)).sum()} values are NaN or infinite, expected none")
        common[..., columns] = values
    return common


def read_ceilings(space):
    """-> noise ceilings as fractions (n_subjects, n_vertices), NaN where there is none."""
    root = Path(NOISE_CEILING_DIR or CHALLENGE_DIR)
    ceilings = np.full((len(space.subjects), space.n_vertices), np.nan)
    if space.unit != "vertices":
        print(f"{space.unit} have no noise ceilings, so no challenge score; scores do not compare with vertices'")
        return ceilings
    kinds = {}
    for s, subject in enumerate(space.subjects):
        found = read_ceiling(root / subject, space, s)
        if found is not None:
            ceilings[s], kinds[subject] = found
    if NOISE_CEILING_DIR and not kinds:
        raise Problem(f"no subjXX/{{lh,rh}}_noise_ceiling.npy of {', '.join(space.subjects)} below {root}")
    for kind in sorted(set(kinds.values())):
        print(f"noise ceilings are {kind}: {', '.join(name for name in kinds if kinds[name] == kind)}, in {root}")
    if len(kinds) < len(space.subjects):
        print(f"no noise ceiling, no challenge score: {', '.join(n for n in space.subjects if n not in kinds)}")
    return ceilings


def read_ceiling(folder, space, s):
    """-> one subject's noise ceiling as a fraction (n_vertices,) and the kind of its values in words; None where
    folder has none."""
    for below in ("test_split/noise_ceiling", "noise_ceiling", ""):
        found = read_sides(Path(folder) / below, "_noise_ceiling", space, s, ())
        if found is not None:
            if np.nanmin(found) < 0 or np.nanmax(found) > 100:
                span = f"{np.nanmin(found):g} to {np.nanmax(found):g}"
                raise Problem(f"{Path(folder) / below}: ceilings of {span}, expected 0 to 1 or 0 to 100")
            is_percent = np.nanmax(found) > 1.5
            return (found / 100, "percent") if is_percent else (found, "fractions")
    return None


def read_split(data, split, s):
    """-> rows of data.images (n,) and activity (n, n_vertices) of one subject; empty where there is none."""
    if split != "challenge":
        rows = data.samples(split, s)
        return data.image[rows], torch.from_numpy(data.read_activity(rows)).float()
    chosen = data.test_subject == s
    rows = data.test_image[chosen]
    may_score = data.may_score(rows)
    if data.test_activity is not None:
        return rows[may_score], torch.from_numpy(data.test_activity[chosen][may_score]).float()
    folder = Path(CHALLENGE_DIR) / data.space.subjects[s] / "test_split" / "test_fmri"
    activity = read_sides(folder, "_test_fmri", data.space, s, (len(rows),)) if len(rows) else None
    if activity is None:
        return rows[:0], torch.zeros(0, data.space.n_vertices)
    return rows[may_score], torch.from_numpy(np.nan_to_num(activity[may_score]))


def checkpoint_predictor(ensemble, data):
    """-> function of (subject index, rows of data.images): {"subject": …, "group": (n, n_vertices)}."""

    def predictions(s, rows):
        return dict(zip(("subject", "group"), ensemble.predict(data.images[rows], (s, None), batch_size=BATCH_SIZE)))

    return predictions


def submission_predictor(folder, data):
    """As checkpoint_predictor, from {lh,rh}_pred_test.npy; without a group prediction."""

    def predictions(s, rows):
        found = read_sides(Path(folder) / data.space.subjects[s], "_pred_test", data.space, s, (len(rows),))
        if found is None:
            files = f"{folder}/{data.space.subjects[s]} has no {{lh,rh}}_pred_test.npy"
            raise Problem(f"{files}, expected a submission folder")
        return {"subject": torch.from_numpy(np.nan_to_num(found))}

    return predictions


@dataclasses.dataclass
class Scored:
    """One split, scored."""

    split: str
    scores: dict  # {prediction: {metric: (n_subjects, n_vertices)}}
    table: list  # of summarise()
    headlines: dict  # of headlines()
    n_images: dict  # {subject: number of pictures}
    n_pictures: int  # different ones, of all subjects
    examples: list  # of choose_examples()

    @property
    def what(self):
        """In words: the split, and the pictures that its scores rest on."""
        return f"{report.split_names[self.split]}, {count_pictures(self.n_images.values(), self.n_pictures)}"


def measure(data, split, predictions, ceilings, example=None, device="cpu"):
    """Scores of every subject -> Scored. example: index of the subject whose examples are kept; device: of the
    bootstrap."""
    space, scores, n_images, examples = data.space, {}, {}, []
    pictures = all_pictures(data, split)
    if not len(pictures):
        why = "the checkpoint was trained on all there are" if len(data.trained_nsd_ids) else "the data hold none"
        raise Problem(f"no pictures to score in {split}: {why}; choose another split with --split")
    bootstrap = Bootstrap(pictures, RESAMPLES, SEED, device) if RESAMPLES else None
    for s, subject in enumerate(space.subjects):
        rows, activity = read_split(data, split, s)
        n_images[subject] = len(rows)
        if not len(rows):
            print(f"{subject}: no pictures or no activity in {split}, not scored")
            continue
        has, predicted = space.mask[s].numpy() & data.is_known, predictions(s, rows)
        for name, prediction in predicted.items():
            for metric, values in score(activity, prediction, has, ceilings[s]).items():
                empty = np.full(space.mask.shape, np.nan)
                scores.setdefault(name, {}).setdefault(metric, empty)[s] = values
        if bootstrap:
            own = {name: prediction[:, has] for name, prediction in predicted.items()}
            bootstrap.add(subject, rows, activity[:, has], own, ceilings[s, has])
        if s == example:
            examples = choose_examples(rows, data.nsd_id, activity, predicted["subject"], has)
    if not scores:
        raise Problem(
            f"nothing to score in {split}: {CHALLENGE_DIR}/subjXX/test_split/test_fmri/{{lh,rh}}_test_fmri.npy is not "
            "there for any subject of the prepared data; --split val scores the validation split"
        )
    if np.isnan(ceilings).all():
        scores = {name: {m: v for m, v in metrics.items() if m != "challenge"} for name, metrics in scores.items()}
    table = summarise(scores, space)
    n_pictures = len(np.unique(pictures))
    return Scored(split, scores, table, headlines(table, bootstrap), n_images, n_pictures, examples)


def all_pictures(data, split):
    """Rows of data.images that belong to a split, of all subjects."""
    if split != "challenge":
        return data.image[data.samples(split)]
    return data.test_image[data.may_score(data.test_image)]


def choose_examples(rows, nsd_ids, activity, prediction, has):
    """Samples of one subject, spread evenly from the best predicted to the worst: [(row of data.images, nsd id, R²
    over its vertices, measured, predicted (n_vertices,), NaN where missing)]."""
    r2 = sample_r2(activity[:, has], prediction[:, has])
    order = np.argsort(-r2)[np.unique(np.linspace(0, len(r2) - 1, n_examples).round().astype(int))]
    pairs = ([np.where(has, values[i], np.nan) for values in (activity, prediction)] for i in order)
    return [(rows[i], nsd_ids[rows[i]], r2[i], *pair) for i, pair in zip(order, pairs)]


# ---- tables -------------------------------------------------------------------------------------


def show_interval(ends):
    return "–" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def print_tables(scored, space):
    columns = [("median", "r2"), ("mean", "r2"), ("median", "r"), ("mean", "r"), ("mean", "challenge")]
    titles = ["median R²", "95 % interval", "mean R²", "median r", "mean r", "challenge score"]
    counts = {"all": sum(scored.n_images.values())} | scored.n_images
    widths = [max(len(title), 16 if "interval" in title else 0) + 1 for title in titles]
    cells = (f"{title:>{width}}" for title, width in zip(titles, widths))
    print(f"\n{'prediction':10} {'subject':8} {'images':>7} {space.unit:>9}", *cells)
    for prediction, subjects in scored.headlines.items():
        n_vertices = pick(scored.table, "n_vertices", prediction=prediction, metric="r2", **overall)
        for subject, metrics in subjects.items():
            numbers = [metrics[metric][value] if metric in metrics else None for value, metric in columns]
            cells = [report.show(number) for number in numbers]
            cells.insert(1, show_interval(metrics["r2"]["median_95"]))
            cells = (f"{cell:>{width}}" for cell, width in zip(cells, widths))
            print(f"{prediction:10} {subject:8} {counts[subject]:7} {n_vertices[subject]:9}", *cells)
    few = [f"{subject} ({n})" for subject, n in scored.n_images.items() if n < few_pictures]
    if few:
        print(f"fewer than {few_pictures} pictures, numbers are uncertain (95 % interval): {', '.join(few)}")
    print(f"\nmedian R², all subjects, {counts['all']} images    both      lh      rh")
    for name in ["all", *space.rois.get("streams", {"names": {}})["names"].values()]:
        where = dict(prediction="subject", subject="all", roi_group="streams", roi=name, metric="r2")
        values = [row["median"] for row in scored.table if where.items() <= row.items()]
        if values and not np.isnan(values[0]):
            print(f"streams {name:15}", *(f"{v:7.4f}" for v in values))
    print()


def print_number(scored, reported):
    """Which number to report, and why."""
    if scored.split == "val":
        print("validation chose the checkpoint, so its scores are optimistic")
    if reported is None:
        print("no private test pictures: --split challenge, on the organisers' held-out ones, gives a number to report")
        return
    found = reported.headlines["subject"]["all"]
    number = f"median R² {report.show(found['r2']['median'])} (95 % interval {show_interval(found['r2']['median_95'])})"
    if "challenge" in found:
        challenge = found["challenge"]
        number += f", challenge score {report.show(challenge['mean'])} ({show_interval(challenge['mean_95'])})"
    print(f"the number to report: {number} on {reported.what}")


def write_scores(output, what, scored, reported, ceilings, space):
    """scores.json, scores.csv and vertices.npz, as the top of this file lists them."""
    found = {"n_images": scored.n_images, "n_pictures": scored.n_pictures, "scores": scored.headlines}
    content = {"scored": what | {"unit": space.unit}, "versions": versions(), **found}
    if reported is not None:
        content["to_report"] = {
            "split": reported.split, "n_images": reported.n_images, "n_pictures": reported.n_pictures,
            "scores": reported.headlines,
        }  # fmt: skip
    write_json(output / "scores.json", content)
    with write_whole(output / "scores.csv") as file:
        rows = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in scored.table]
        names = [name.replace("vertices", space.unit) for name in scored.table[0]]
        file.write(csv_bytes([names, *([("" if v == "nan" else v) for v in row] for row in rows)]))
    hemisphere = np.where(np.arange(space.n_vertices) < space.n_lh, "lh", "rh")
    vertices = {f"{name}_{metric}": v for name, metrics in scored.scores.items() for metric, v in metrics.items()}
    index = "fsaverage_index" if space.unit == "vertices" else "map_index"
    with write_whole(output / f"{space.unit}.npz") as file:
        np.savez_compressed(
            file, subjects=np.array(space.subjects), hemisphere=hemisphere, noise_ceiling=ceilings, **vertices,
            **{index: space.vertices.numpy()},
        )  # fmt: skip
    print(f"wrote {output}: scores.json, scores.csv, {space.unit}.npz")


# ---- figures ------------------------------------------------------------------------------------


def draw_figures(data, scored, example, checkpoints):
    """-> {file name: figure}, of what there is something to draw for. checkpoints: [(path, its dict, encoder)];
    figures 2 and 3 show one checkpoint, so with several or with none, a submission, they are left out."""
    space, flat_map, drawn = data.space, FlatMap(data.space, FSAVERAGE_DIR), {}
    if len(checkpoints) > 1:
        print("no figures 2 and 3: several checkpoints are averaged, these figures are of one")
    for path, checkpoint, encoder in checkpoints if len(checkpoints) == 1 else ():
        drawn["figure_2a_pooling_maps"] = figures.figure_2a(*figures.pooling_exemplars(encoder, SEED))
        components = figures.components(encoder, data, DATA_DIR)
        drawn["figure_2b_components"] = figures.figure_2b(*components, flat_map, OUTLINES)
        phases = figures.training_curves(path, checkpoint)
        if phases:
            drawn["figure_3_loss_curves"] = figures.figure_3(phases)
    maps = figures.r2_maps(scored.scores, scored.table, space)
    drawn["figure_4a_r2_maps"] = figures.figure_4a(maps, flat_map, OUTLINES)
    samples = figures.sample_panels(scored.examples)
    if samples:
        drawn["figure_4b_samples"] = figures.figure_4b(samples, data.images, example, flat_map, OUTLINES)
    if space.rois:
        drawn["figure_4c_rois"] = figures.figure_4c(figures.roi_medians(scored.table, space), space.unit)
    return drawn


def default_folder(paths, split):
    """Beside the first of the checkpoints; several, of which most are called alike, go with their folders' names."""
    names = [path.stem for path in paths]
    if len(paths) > 1:
        names = [f"{path.resolve().parent.name}-{path.stem}" for path in paths]
    return paths[0].parent / f"evaluation_{'_'.join(names)}_{split}"


def main():
    check_least(globals(), BATCH_SIZE=1, SEED=0, RESAMPLES=0)
    if SPLIT not in ("val", "test", "challenge"):
        raise Problem(f"SPLIT is {SPLIT!r}, expected val, test or challenge")
    split, device = "challenge" if SUBMISSION else SPLIT, choose_device(DEVICE)
    data = prepare_data.load(DATA_DIR)
    space = data.space
    if EXAMPLE_SUBJECT not in ("", *space.subjects):
        known = ", ".join(space.subjects)
        raise Problem(f"EXAMPLE_SUBJECT is {EXAMPLE_SUBJECT!r}, expected one of {known}, or nothing")
    example = space.subjects.index(EXAMPLE_SUBJECT or space.subjects[0])
    if SUBMISSION and CHECKPOINT:
        raise Problem("SUBMISSION and CHECKPOINT are both given, expected one of them")
    what = {"split": split, "data": DATA_DIR, "data_fingerprint": data.fingerprint, "splits": data.splits}
    if SUBMISSION:
        checkpoints, source, folder = [], SUBMISSION, Path(SUBMISSION) / "evaluation"
        predictions = submission_predictor(SUBMISSION, data)
        what["submission"] = SUBMISSION
    else:
        remedy = f"point DATA_DIR ({DATA_DIR}) to the data it was trained on"
        ensemble, data = load_for(data, choose_checkpoints(CHECKPOINT, RUN_DIR), DEVICE, PRECISION, remedy)
        space = data.space
        for path, checkpoint in ensemble.checkpoints:
            check_scorable(path, checkpoint, data, split)
        ensemble.describe()
        checkpoints = [(*known, encoder) for known, encoder in zip(ensemble.checkpoints, ensemble.encoders)]
        paths = [path for path, _, _ in checkpoints]
        source, folder = ",".join(map(str, paths)), default_folder(paths, split)
        predictions = checkpoint_predictor(ensemble, data)
        what |= {"precision": str(ensemble.precision)[6:], "checkpoints": ensemble.record()}
    what["constants"] = constants(globals())
    output = Path(OUTPUT_DIR or folder)
    print(f"scoring {source} on {report.split_names[split]}")
    ceilings = read_ceilings(space)
    scored = reported = measure(data, split, predictions, ceilings, example, device)
    if split == "val":  # chose the checkpoint; the private test did not
        n_test = len(data.samples("test"))
        reported = measure(data, "test", predictions, ceilings, device=device) if n_test else None
    print_tables(scored, space)
    print_number(scored, reported)
    write_scores(output, what, scored, reported, ceilings, space)
    if FIGURES:
        pictures = {}
        for name, figure in draw_figures(data, scored, example, checkpoints).items():
            pictures[name] = output / f"{name}.png"
            save_figure(figure, pictures[name])
            print(f"wrote {pictures[name]}")
        report.write_report(output / "report.html", what, scored, reported, ceilings, space, pictures)
        print(f"wrote {output / 'report.html'}")


if __name__ == "__main__":
    run_script(main, globals())
