"""Scores and figures: where the model is right, in which areas, for which pictures.

Reads DATA_DIR and a checkpoint (or SUBMISSION, a submission folder); scores every subject's
predictions and the subject-agnostic group prediction on a split. With activity y, prediction ŷ of a
vertex over the n_images of a subject and its noise ceiling c:

    R²        = 1 - sum (y - ŷ)² / sum (y - mean y)²
    r         = Pearson correlation of y and ŷ; 0 where y or ŷ is constant
    challenge = min(max(r, 0)² / c, 1), c = 0 counting as 1e-14; its mean is the challenge score

Vertices that a subject lacks are never scored; a single picture gives no score. OUTPUT_DIR gets

    scores.json   headlines and what was scored
    scores.csv    median and mean by prediction, subject, hemisphere, ROI group, ROI and metric
    vertices.npz  every vertex: (n_subjects, n_vertices) a metric, NaN where missing; fsaverage indices
    figure_*.png  the report's figures 2 to 4

Of NSD-Flat (prepare_flat.py) these are pixels of its maps, and so they are called: pixels.npz, n_pixels.
"""

import json
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import torch

import fit_pca
import predict
import prepare_data
from checkpoint import check_made, load_checkpoint
from common import Problem, check_least, choose_device, choose_precision, run_script, versions, write_whole
from flatmap import FlatMap, describe_maps, fit_limits, save_figure
from predict import choose_checkpoint, csv_bytes, describe_checkpoint
from scores import finite_median, sample_r2, score
from training import read_log

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = predict.RUN_DIR  # holds finetuned.pt or head.pt
CHECKPOINT = ""  # a checkpoint's path; empty: RUN_DIR/finetuned.pt where it exists, else head.pt
SPLIT = "val"  # val, test (private) or challenge: the organisers' held-out activity in CHALLENGE_DIR, NSD-Flat's test
SUBMISSION = ""  # a submission folder to score on challenge, instead of a checkpoint
CHALLENGE_DIR = prepare_data.CHALLENGE_DIR  # may hold test_split/test_fmri and test_split/noise_ceiling
NOISE_CEILING_DIR = ""  # with subjXX/…/{lh,rh}_noise_ceiling.npy; empty: CHALLENGE_DIR where it has them
OUTPUT_DIR = ""  # empty: evaluation_… beside the checkpoint, or evaluation in SUBMISSION
FIGURES = True  # false: scores only
EXAMPLE_SUBJECT = ""  # whose pictures figure 4b shows; empty: the first (report: Subject 1)
OUTLINES = predict.OUTLINES  # ROI group outlined on flat maps; empty: none
FSAVERAGE_DIR = predict.FSAVERAGE_DIR  # full fsaverage for the maps; empty: see predict.py
BATCH_SIZE = 64  # pictures at a time
SEED = prepare_data.SEED  # of the clustering in figure 2a
PRECISION = "auto"  # auto, bfloat16, float16 or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N

n_examples = 6  # of figure 4b
activity_range = 2.0  # z, colour scale of figure 4b ends at ± this
n_pooling_maps = 16  # clusters of figure 2a
n_components = 4  # of figure 2b (report: 4)
blue, orange, grey = "#0072B2", "#D55E00", "0.6"  # distinct to colour-blind people (Okabe and Ito)


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
    whole = np.full((*shape, space.n_vertices), np.nan, np.float32)
    for hemi, path in paths.items():
        columns, values = space.hemisphere(subject, hemi), prepare_data.read_npy(path)
        if values.shape != (*shape, len(columns)) or values.dtype.kind != "f":
            raise Problem(
                f"{path}: {values.dtype} of shape {values.shape}, expected floats {(*shape, len(columns))} as in the "
                f"prepared data {DATA_DIR}"
            )
        if not np.isfinite(values).all():
            raise Problem(f"{path}: {(~np.isfinite(values)).sum()} values are NaN or infinite, expected none")
        whole[..., columns] = values
    return whole


def read_ceilings(space):
    """-> noise ceilings as fractions (n_subjects, n_vertices), NaN where there is none."""
    root = Path(NOISE_CEILING_DIR or CHALLENGE_DIR)
    ceilings = np.full((len(space.subjects), space.n_vertices), np.nan)
    if space.unit != "vertices":
        print(f"{space.unit} have no noise ceilings, so no challenge score; their scores are not comparable with vertices'")
        return ceilings
    kinds = {}
    for s, subject in enumerate(space.subjects):
        for below in ("test_split/noise_ceiling", "noise_ceiling", ""):
            found = read_sides(root / subject / below, "_noise_ceiling", space, s, ())
            if found is not None:
                percent = np.nanmax(found) > 1.5
                if np.nanmin(found) < 0 or np.nanmax(found) > 100:
                    span = f"{np.nanmin(found):g} to {np.nanmax(found):g}"
                    raise Problem(f"{root / subject / below}: ceilings of {span}, expected 0 to 1 or 0 to 100")
                ceilings[s] = found / 100 if percent else found
                kinds[subject] = "percent" if percent else "fractions"
                break
    if NOISE_CEILING_DIR and not kinds:
        raise Problem(f"no subjXX/{{lh,rh}}_noise_ceiling.npy of {', '.join(space.subjects)} below {root}")
    for kind in sorted(set(kinds.values())):
        print(f"noise ceilings are {kind}: {', '.join(name for name in kinds if kinds[name] == kind)}, in {root}")
    if len(kinds) < len(space.subjects):
        print(f"no noise ceiling, no challenge score: {', '.join(n for n in space.subjects if n not in kinds)}")
    return ceilings


def read_split(data, split, s):
    """-> rows of data.images (n,) and activity (n, n_vertices) of one subject; empty where there is none."""
    if split != "challenge":
        rows = data.samples(split, s)
        return data.image[rows], torch.from_numpy(data.read_activity(rows)).float()
    rows = data.test_image[data.test_subject == s]
    if data.test_activity is not None:
        return rows, torch.from_numpy(data.test_activity[data.test_subject == s]).float()
    folder = Path(CHALLENGE_DIR) / data.space.subjects[s] / "test_split" / "test_fmri"
    activity = read_sides(folder, "_test_fmri", data.space, s, (len(rows),)) if len(rows) else None
    if activity is None:
        return rows[:0], torch.zeros(0, data.space.n_vertices)
    return rows, torch.from_numpy(np.nan_to_num(activity))


def checkpoint_predictor(encoder, data, precision):
    """-> function of (subject index, rows of data.images): {"subject": …, "group": (n, n_vertices)}."""

    def predictions(s, rows):
        found = encoder.predict(data.images[rows], (s, None), batch_size=BATCH_SIZE, precision=precision)
        return dict(zip(("subject", "group"), found))

    return predictions


def submission_predictor(folder, data):
    """As checkpoint_predictor, from {lh,rh}_pred_test.npy; without a group prediction."""

    def predictions(s, rows):
        found = read_sides(Path(folder) / data.space.subjects[s], "_pred_test", data.space, s, (len(rows),))
        if found is None:
            raise Problem(f"{folder}/{data.space.subjects[s]} has no {{lh,rh}}_pred_test.npy, expected a submission folder")
        return {"subject": torch.from_numpy(np.nan_to_num(found))}

    return predictions


def measure(data, split, predictions, ceilings, example):
    """Scores of every subject, and examples of one (an index) for figure 4b.

    -> {prediction: {metric: (n_subjects, n_vertices)}}, n_images (n_subjects,),
    examples [(row of data.images, R², activity, prediction)] from best to worst.
    """
    scores, n_images, examples = {}, [], []
    for s, subject in enumerate(data.space.subjects):
        rows, activity = read_split(data, split, s)
        n_images.append(len(rows))
        if not len(rows):
            print(f"{subject}: no pictures or no activity in {split}, not scored")
            continue
        has = data.space.mask[s].numpy()
        for name, prediction in predictions(s, rows).items():
            for metric, values in score(activity, prediction, has, ceilings[s]).items():
                empty = np.full(data.space.mask.shape, np.nan)
                scores.setdefault(name, {}).setdefault(metric, empty)[s] = values
            if s == example and name == "subject":
                r2 = sample_r2(activity[:, has], prediction[:, has])
                order = np.argsort(-r2)[np.unique(np.linspace(0, len(r2) - 1, n_examples).round().astype(int))]
                pairs = [[np.where(has, v[i], np.nan) for v in (activity, prediction)] for i in order]
                examples = [(rows[i], r2[i], *pair) for i, pair in zip(order, pairs)]
    if not scores:
        if data.test_activity is not None:
            raise Problem("nothing to score in challenge: the files that were prepared held no test split; try --split val")
        raise Problem(
            f"nothing to score in {split}: {CHALLENGE_DIR}/subjXX/test_split/test_fmri/{{lh,rh}}_test_fmri.npy is not "
            "there for any subject of the prepared data; --split val scores the validation split"
        )
    if np.isnan(ceilings).all():
        scores = {name: {m: v for m, v in metrics.items() if m != "challenge"} for name, metrics in scores.items()}
    return scores, n_images, examples


# ---- tables -------------------------------------------------------------------------------------


def summarise(scores, space):
    """Rows {prediction, subject, hemisphere, roi_group, roi, metric, median, mean, n_vertices} over the
    vertices scored; subject "all" pools the vertices of all subjects."""
    left = np.arange(space.n_vertices) < space.n_lh
    sides = {"both": np.ones_like(left), "lh": left, "rh": ~left}
    areas = [space.regions(s) for s in range(len(space.subjects))]
    everyone = {"all": range(len(areas))} | {name: [s] for s, name in enumerate(space.subjects)}
    table = []
    for (subject, members), area, (hemi, side) in product(everyone.items(), areas[0], sides.items()):
        chosen = np.zeros(space.mask.shape, bool)
        for s in members:
            chosen[s] = areas[s][area] & side
        for prediction, metrics in scores.items():
            for metric, values in metrics.items():
                known = values[chosen]
                known = known[~np.isnan(known)]
                row = dict(prediction=prediction, subject=subject, hemisphere=hemi)
                row |= dict(roi_group=area[0], roi=area[1], metric=metric, median=finite_median(known))
                mean = float(known.mean()) if len(known) else float("nan")
                table.append(row | {"mean": mean, "n_vertices": len(known)})
    return table


def pick(table, value, **where):
    """{subject: value} of the rows that agree with where."""
    return {row["subject"]: row[value] for row in table if all(row[k] == v for k, v in where.items())}


def print_tables(table, n_images, space):
    counts = {"all": sum(n_images)} | dict(zip(space.subjects, n_images))
    whole = {"hemisphere": "both", "roi_group": "all", "roi": "all"}
    columns = [("median", "r2"), ("mean", "r2"), ("median", "r"), ("mean", "r"), ("mean", "challenge")]
    titles = ["median R²", "mean R²", "median r", "mean r", "challenge score"]
    print(f"\n{'prediction':10} {'subject':8} {'images':>7} {space.unit:>9}", *(f"{t:>{len(t) + 1}}" for t in titles))
    for prediction in dict.fromkeys(row["prediction"] for row in table):
        chosen = [row for row in table if row["prediction"] == prediction and whole.items() <= row.items()]
        for subject, n in counts.items():
            values = [pick(chosen, value, metric=metric).get(subject, np.nan) for value, metric in columns]
            cells = (f"{'–' if np.isnan(v) else f'{v:.4f}':>{len(t) + 1}}" for v, t in zip(values, titles))
            n_vertices = pick(chosen, "n_vertices", metric="r2")[subject]
            print(f"{prediction:10} {subject:8} {n:7} {n_vertices:9}", *cells)
    print("\nmedian R², all subjects    both      lh      rh")
    for name in ["all", *space.rois.get("streams", {"names": {}})["names"].values()]:
        where = dict(prediction="subject", subject="all", roi_group="streams", roi=name, metric="r2")
        values = [row["median"] for row in table if where.items() <= row.items()]
        if values and not np.isnan(values[0]):
            print(f"streams {name:15}", *(f"{v:7.4f}" for v in values))
    print()


def write_scores(output, what, scores, table, n_images, ceilings, space):
    """scores.json, scores.csv and vertices.npz, as the top of this file lists them."""
    headlines = {}
    for row in table:
        if row["hemisphere"] == "both" and row["roi_group"] == "all":
            values = {k: None if np.isnan(row[k]) else row[k] for k in ("median", "mean")}
            headlines.setdefault(row["prediction"], {}).setdefault(row["subject"], {})[row["metric"]] = values
    counts = dict(zip(space.subjects, n_images))
    content = {"scored": what | {"unit": space.unit}, "versions": versions(), "n_images": counts, "scores": headlines}
    with write_whole(output / "scores.json") as file:
        file.write(json.dumps(content, indent=1).encode())
    with write_whole(output / "scores.csv") as file:
        rows = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in table]
        names = [name.replace("vertices", space.unit) for name in table[0]]
        file.write(csv_bytes([names, *([("" if v == "nan" else v) for v in row] for row in rows)]))
    hemisphere = np.where(np.arange(space.n_vertices) < space.n_lh, "lh", "rh")
    vertices = {f"{name}_{metric}": v for name, metrics in scores.items() for metric, v in metrics.items()}
    index = "fsaverage_index" if space.unit == "vertices" else "map_index"
    with write_whole(output / f"{space.unit}.npz") as file:
        np.savez_compressed(
            file, subjects=np.array(space.subjects), hemisphere=hemisphere, noise_ceiling=ceilings, **vertices,
            **{index: space.vertices.numpy()},
        )  # fmt: skip
    print(f"wrote {output}: scores.json, scores.csv, {space.unit}.npz")


# ---- the report's figures -----------------------------------------------------------------------


def subplots(rows, columns, width, height, **options):
    """width, height: inches of one panel -> figure, axes (rows, columns)."""
    import matplotlib.pyplot as plt

    size = (columns * width, rows * height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def map_panels(rows, columns, flat_map, width_ratios=None):
    """Empty panels of 3 inches for flat maps -> figure, axes (rows, columns)."""
    height = 3 * flat_map.grey.shape[0] / flat_map.grey.shape[1] + 0.35
    width = 3 * sum(width_ratios or [1] * columns) / columns
    figure, axes = subplots(rows, columns, width, height, width_ratios=width_ratios)
    for panel in axes.flat:
        panel.set_axis_off()
    return figure, axes


def figure_2a(encoder):
    """Exemplar spatial pooling maps: means of Gaussian-mixture clusters of the maps of all layers.

    Maps are cut to the picture's tokens, scaled to length 1, signed so that the strongest part is
    positive (the sign of a latent unit's map and channel filter is arbitrary).
    """
    from sklearn.mixture import GaussianMixture

    grid = encoder.trunk.vit.patch_embed.grid_size
    n_prefix = [encoder.trunk.n_prefix[i] for i in encoder.chosen]
    maps = torch.cat([p.spatial[:, n:] for p, n in zip(encoder.head.projections, n_prefix)]).detach().cpu().double()
    maps = (maps * (maps**3).sum(1, keepdim=True).sign() / maps.norm(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
    mixture = GaussianMixture(min(n_pooling_maps, len(maps)), covariance_type="spherical", random_state=SEED).fit(maps)
    size = np.bincount(mixture.predict(maps), minlength=len(mixture.means_))
    columns = min(8, len(size))
    figure, axes = subplots(-(-len(size) // columns), columns, 1.5, 1.75)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, k in zip(axes.flat, np.argsort(-size)):
        mean = mixture.means_[k] / np.abs(mixture.means_[k]).max()
        shown = panel.imshow(mean.reshape(grid), cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_title(f"{size[k] / len(maps):.0%} of the maps", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, label="weight (1: largest of the map)")
    figure.suptitle(f"Means of {len(size)} clusters of the head's {len(maps)} spatial pooling maps")
    return figure


def figure_2b(pca, space, flat_map):
    """The first principal components on flat maps."""
    n = min(n_components, pca.components.shape[1])
    figure, axes = map_panels(1, n, flat_map)
    outlines, shown = flat_map.outlines(OUTLINES), []
    for k, panel in enumerate(axes.flat):
        loading = pca.components[:, k].numpy() * space.n_vertices**0.5
        shown.append(flat_map.draw(panel, loading, (-2.5, 2.5), "RdBu_r", outlines, named=k == 0))
        panel.set_title(f"component {k + 1}: {pca.explained_variance[k] / pca.total_variance:.1%} of variance", fontsize=10)
    describe_maps(figure, shown, axes, "loading (1: root mean square)", outlines)
    return figure


def figure_3(run_dir):
    """Loss and validation R² of both phases, from the logs beside the checkpoint. Step 0 of phase 1, the
    untrained head, is left out: it would squash the axes."""
    titles = {"train_head": "phase 1: head", "finetune": "phase 2: head and self-attention"}
    paths = {name: Path(run_dir) / f"{name}.jsonl" for name in titles}
    logs = {name: read_log(path) for name, path in paths.items() if path.exists()}
    if not logs:
        print(f"no figure 3: neither {' nor '.join(map(str, paths.values()))} is there")
        return None
    figure, axes = subplots(2, len(logs), 4.5, 2.6, sharey="row", sharex="col")
    for (name, log), (loss, r2) in zip(logs.items(), axes.T):
        best = max(log, key=lambda entry: entry["val_r2"])
        curves = (loss, "train_loss", blue, "train"), (loss, "val_loss", orange, "validation"), (r2, "val_r2", orange, None)
        for panel, key, colour, label in curves:
            points = [(e["step"], e[key]) for e in log if e[key] is not None and (e["step"] or name != "train_head")]
            panel.plot(*np.reshape(points, (-1, 2)).T, color=colour, label=label, marker="o", markersize=3)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        r2.plot(best["step"], best["val_r2"], "o", color="black", label=f"best: {best['val_r2']:.4f}")
        r2.legend(frameon=False, loc="lower right")
        r2.xaxis.get_major_locator().set_params(integer=True)
        r2.set_xlabel("step")
        loss.set_title(titles[name], fontsize=10)
    axes[0, 0].set_ylabel("mean squared error")
    axes[1, 0].set_ylabel("validation median R²")
    axes[0, 0].legend(frameon=False)
    return figure


def figure_4a(scores, space, flat_map):
    """R² of every vertex: median over subjects, group prediction, each subject."""
    own = scores["subject"]["r2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # vertices that nobody has scores of
        maps = {"median of the subjects": np.nanmedian(own, axis=0)}
        if "group" in scores:
            maps["group prediction"] = np.nanmedian(scores["group"]["r2"], axis=0)
    n_all = len(maps)
    maps |= dict(zip(space.subjects, own))
    limits, shown = fit_limits(maps.values(), symmetric=False), []
    columns = 5 if len(maps) > 4 else len(maps)
    figure, axes = map_panels(-(-len(maps) // columns), columns, flat_map)
    for k, (panel, (title, values)) in enumerate(zip(axes.flat, maps.items())):
        outlines = flat_map.outlines(OUTLINES, None if k < n_all else k - n_all)
        shown.append(flat_map.draw(panel, values, limits, "inferno", outlines, named=k == 0, line_colour="white"))
        median = finite_median(values)
        panel.set_title(title + (": not scored" if np.isnan(median) else f": {median:.3f}"), fontsize=11)
    describe_maps(figure, shown, axes, f"R² (in titles: median over the {space.unit})", outlines)
    return figure


def figure_4b(examples, images, space, subject, flat_map):
    """Picture, measured and predicted map of single samples, from well to badly predicted."""
    figure, axes = map_panels(-(-len(examples) // 2), 7, flat_map, (1, 1, 1, 0.1, 1, 1, 1))
    outlines, shown = flat_map.outlines(OUTLINES, subject), []
    for k, (row, r2, *maps) in enumerate(examples):
        picture, *panels = axes[k // 2, 4 * (k % 2) : 4 * (k % 2) + 3]
        picture.imshow(images[row])
        picture.set_title(f"R² {r2:.2f}", fontsize=13)
        for panel, values, name in zip(panels, maps, ("measured", "predicted")):
            shown.append(flat_map.draw(panel, values, (-activity_range, activity_range), "RdBu_r", outlines))
            panel.set_title(name, fontsize=13)
    describe_maps(figure, shown, axes, "activity (z)", outlines)
    figure.suptitle(f"{space.subjects[subject]}, from the best predicted sample to the worst", fontsize=14)
    return figure


def figure_4c(table, space):
    """Median R² of every ROI and hemisphere: median over subjects, and each subject."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    x, ticks = 0, {}
    for roi_group, roi in space.rois.items():
        names, start = [name for label, name in roi["names"].items() if label > 0], x
        for name in names:
            for hemi, shift, colour in (("lh", -0.18, blue), ("rh", 0.18, orange)):
                where = dict(prediction="subject", hemisphere=hemi, roi_group=roi_group, roi=name, metric="r2")
                values = pick(table, "median", **where)
                values = np.array([v for subject, v in values.items() if subject != "all" and not np.isnan(v)])
                if len(values):
                    axes.scatter(np.full(len(values), x + shift), values, s=14, color=colour, alpha=0.5, linewidths=0)
                    axes.hlines(np.median(values), x + shift - 0.16, x + shift + 0.16, color=colour, linewidth=3)
                else:
                    axes.text(x + shift, 0, " none", color=colour, fontsize=8, rotation=90, ha="center", va="bottom")
            ticks[x] = name
            x += 1
        if start:
            axes.axvline(start - 1, color="0.8", linewidth=0.8)
        axes.text((start + x - 1) / 2, 1.02, roi_group, transform=axes.get_xaxis_transform(), ha="center", fontsize=11)
        x += 1
    for colour, hemi in ((blue, "left"), (orange, "right")):
        axes.scatter([], [], color=colour, label=f"{hemi} hemisphere")
    axes.scatter([], [], color=grey, s=14, label="one subject")
    axes.hlines([], 0, 0, color=grey, linewidth=3, label="median of the subjects")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.17))
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=60, ha="right", rotation_mode="anchor")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlim=(-0.8, x - 1.2), ylabel="median R² over the vertices")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure


def draw_figures(data, scores, table, examples, example, run_dir, encoder):
    """-> {file name: figure, None where there is nothing to draw}; encoder None: a submission."""
    space, flat_map = data.space, FlatMap(data.space, FSAVERAGE_DIR)
    figures = {}
    if encoder:
        figures["figure_2a_pooling_maps"] = figure_2a(encoder)
        try:
            figures["figure_2b_components"] = figure_2b(fit_pca.load(DATA_DIR, data), space, flat_map)
        except Problem as problem:  # the authors' weights need no PCA
            print(f"no figure 2b: {problem}")
        figures["figure_3_loss_curves"] = figure_3(run_dir)
    figures["figure_4a_r2_maps"] = figure_4a(scores, space, flat_map)
    figures["figure_4b_samples"] = figure_4b(examples, data.images, space, example, flat_map) if examples else None
    figures["figure_4c_rois"] = figure_4c(table, space) if space.rois else None
    return figures


def main():
    check_least(globals(), BATCH_SIZE=1, SEED=0)
    if SPLIT not in ("val", "test", "challenge"):
        raise Problem(f"SPLIT is {SPLIT!r}, expected val, test or challenge")
    split, device = "challenge" if SUBMISSION else SPLIT, choose_device(DEVICE)
    data = prepare_data.load(DATA_DIR)
    space = data.space
    if EXAMPLE_SUBJECT not in ("", *space.subjects):
        raise Problem(f"EXAMPLE_SUBJECT is {EXAMPLE_SUBJECT!r}, expected one of {', '.join(space.subjects)}, or nothing")
    example = space.subjects.index(EXAMPLE_SUBJECT or space.subjects[0])
    if SUBMISSION and CHECKPOINT:
        raise Problem("SUBMISSION and CHECKPOINT are both given, expected one of them")
    what = {"split": split, "data_fingerprint": data.fingerprint}
    if SUBMISSION:
        path, encoder = Path(SUBMISSION), None
        output, predictions = path / "evaluation", submission_predictor(path, data)
        what["submission"] = str(path)
    else:
        path = choose_checkpoint(CHECKPOINT, RUN_DIR)
        encoder, _, made = load_checkpoint(path, device, space=space)
        describe_checkpoint(path, made)
        remedy = f"point DATA_DIR ({DATA_DIR}) to the data it was trained on"
        check_made(path, made, remedy, data_fingerprint=data.fingerprint)
        output = path.parent / f"evaluation_{path.stem}_{split}"
        precision = choose_precision(PRECISION, device)
        predictions = checkpoint_predictor(encoder, data, precision)
        what |= {"checkpoint": str(path), "precision": str(precision)[6:]}
        what |= {k: made[k] for k in ("fingerprint", "step", "made_with")}
    output = Path(OUTPUT_DIR or output)
    print(f"scoring {path} on {split}")
    ceilings = read_ceilings(space)
    scores, n_images, examples = measure(data, split, predictions, ceilings, example)
    table = summarise(scores, space)
    print_tables(table, n_images, space)
    write_scores(output, what, scores, table, n_images, ceilings, space)
    if FIGURES:
        for name, figure in draw_figures(data, scores, table, examples, example, path.parent, encoder).items():
            if figure:
                save_figure(figure, output / f"{name}.png")
                print(f"wrote {output / name}.png")


if __name__ == "__main__":
    run_script(main, globals())
