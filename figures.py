"""The report's figures 2 to 4. For each, one function computes what is shown, as arrays, and one draws it.

evaluate.py writes them; flatmap.py draws the maps.
"""

import warnings
from pathlib import Path

import numpy as np
import torch

import fit_pca
from common import Problem
from flatmap import describe_maps, fit_limits
from scores import overall, pick
from training import curves, embeds_pca, log_path, read_log

activity_range = 2.0  # z, colour scale of figure 4b ends at ± this
n_pooling_maps = 16  # clusters of figure 2a
n_components = 4  # of figure 2b (report: 4)
blue, orange, grey = "#0072B2", "#D55E00", "0.6"  # distinct to colour-blind people (Okabe and Ito)


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


# ---- figure 2: what the head has learned, and the principal components --------------------------


def pooling_exemplars(encoder, seed):
    """Means of Gaussian-mixture clusters of the spatial pooling maps of all layers, the largest first
    -> (k, height, width), 1 at the strongest place, and shares of the maps (k,).

    Maps are cut to the picture's tokens, scaled to length 1, signed so that the strongest part is
    positive (the sign of a latent unit's map and channel filter is arbitrary).
    """
    from sklearn.mixture import GaussianMixture

    grid = encoder.trunk.vit.patch_embed.grid_size
    n_prefix = [encoder.trunk.n_prefix[i] for i in encoder.chosen]
    maps = torch.cat([p.spatial[:, n:] for p, n in zip(encoder.head.projections, n_prefix)]).detach().cpu().double()
    maps = (maps * (maps**3).sum(1, keepdim=True).sign() / maps.norm(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
    mixture = GaussianMixture(min(n_pooling_maps, len(maps)), covariance_type="spherical", random_state=seed).fit(maps)
    size = np.bincount(mixture.predict(maps), minlength=len(mixture.means_))
    order = np.argsort(-size)
    means = mixture.means_[order]
    return (means / np.abs(means).max(1, keepdims=True)).reshape(-1, *grid), size[order] / len(maps)


def figure_2a(means, shares):
    """Exemplar spatial pooling maps, of pooling_exemplars()."""
    columns = min(8, len(means))
    figure, axes = subplots(-(-len(means) // columns), columns, 1.5, 1.75)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, mean, share in zip(axes.flat, means, shares):
        shown = panel.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_title(f"{share:.0%} of the maps", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, label="weight (1: largest of the map)")
    figure.suptitle(f"Means of {len(means)} clusters of the head's spatial pooling maps")
    return figure


def components(encoder, data, data_dir):
    """The checkpoint's first components: columns of its embedding, scaled to a root mean square of 1
    -> (n, n_vertices), and their shares of the training activity's variance (n,), which only the PCA that they
    came from knows; None where DATA_DIR's is another one."""
    loadings = encoder.head.embed_weight[:, :n_components].detach().cpu().double().T
    loadings /= loadings.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    shares = None
    try:
        pca = fit_pca.load(data_dir, data)
        if embeds_pca(encoder.head, pca):
            shares = (pca.explained_variance[: len(loadings)] / pca.total_variance).numpy()
    except Problem:
        pass  # prediction needs no PCA file, and the authors' weights have another one
    return loadings.numpy(), shares


def figure_2b(loadings, shares, flat_map, roi_group):
    """The first principal components on flat maps, of components()."""
    figure, axes = map_panels(1, len(loadings), flat_map)
    outlines, shown = flat_map.outlines(roi_group), []
    limits = fit_limits(loadings)
    for k, panel in enumerate(axes.flat):
        shown.append(flat_map.draw(panel, loadings[k], limits, "RdBu_r", outlines, named=k == 0))
        share = "" if shares is None else f": {shares[k]:.1%} of variance"
        panel.set_title(f"component {k + 1}{share}", fontsize=10)
    describe_maps(figure, shown, axes, "loading (1: root mean square)", outlines)
    return figure


# ---- figure 3: loss curves ----------------------------------------------------------------------


def training_curves(path, checkpoint):
    """Of the trainings that made the checkpoint at path, from the logs beside it: [(title, {"train",
    "validation", "r2": (steps, values)}, (step, R²) of the best or None)], one phase or two; empty without logs.

    Step 0 of phase 1, the untrained head, is left out where there is more: it would squash the axes.
    """
    phases, made_with = {"phase 1: head": path}, checkpoint["made_with"]
    if "CHECKPOINT" in made_with:  # phase 2, which began with another checkpoint
        first = made_with["CHECKPOINT"] or Path(path).with_name("head.pt")
        phases = {"phase 1: head": first, "phase 2: head and self-attention": path}
    found = []
    for title, output in phases.items():
        if log_path(output).exists():
            log = read_log(log_path(output))
            shown = [entry for entry in log if entry["step"] or title.startswith("phase 2")] or log
            known = [(entry["val_r2"], -entry["step"]) for entry in log if np.isfinite(entry["val_r2"])]
            best = max(known, default=None)
            found.append((title, curves(shown), best and (-best[1], best[0])))
    if not found:
        print(f"no figure 3: {' and '.join(str(log_path(output)) for output in phases.values())} not found")
    return found


def figure_3(phases):
    """Loss and validation R² of training_curves()."""
    figure, axes = subplots(2, len(phases), 4.5, 2.6, sharey="row", sharex="col")
    for (title, drawn, best), (loss, r2) in zip(phases, axes.T):
        parts = (loss, "train", blue, "train"), (loss, "validation", orange, "validation"), (r2, "r2", orange, None)
        for panel, key, colour, label in parts:
            panel.plot(*drawn[key], color=colour, label=label, marker="o", markersize=3)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        if best:
            r2.plot(*best, "o", color="black", label=f"best: {best[1]:.4f}")
            r2.legend(frameon=False, loc="lower right")
        r2.xaxis.get_major_locator().set_params(integer=True)
        r2.set_xlabel("step")
        loss.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("mean squared error")
    axes[1, 0].set_ylabel("validation median R²")
    axes[0, 0].legend(frameon=False)
    return figure


# ---- figure 4: where, for which pictures, in which areas ----------------------------------------


def r2_maps(scores, table, space):
    """R² of every vertex -> [(title, the table's median for the same thing, values (n_vertices,), index of the
    subject or None)]: median over the subjects, group prediction, each subject."""
    medians = {name: pick(table, "median", prediction=name, metric="r2", **overall) for name in scores}
    maps = []
    for prediction, title in (("subject", "median of the subjects"), ("group", "group prediction")):
        if prediction in scores:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # vertices that nobody has scores of
                over_subjects = np.nanmedian(scores[prediction]["r2"], axis=0)
            maps.append((title, medians[prediction]["all"], over_subjects, None))
    own = scores["subject"]["r2"]
    return maps + [(name, medians["subject"][name], own[s], s) for s, name in enumerate(space.subjects)]


def figure_4a(maps, flat_map, roi_group):
    """Flat maps of r2_maps()."""
    limits, shown = fit_limits([values for _, _, values, _ in maps], symmetric=False), []
    columns = 5 if len(maps) > 4 else len(maps)
    figure, axes = map_panels(-(-len(maps) // columns), columns, flat_map)
    for k, (panel, (title, median, values, subject)) in enumerate(zip(axes.flat, maps)):
        outlines = flat_map.outlines(roi_group, subject)
        shown.append(flat_map.draw(panel, values, limits, "inferno", outlines, named=k == 0, line_colour="white"))
        panel.set_title(title + (": not scored" if np.isnan(median) else f": {median:.3f}"), fontsize=11)
    unit = flat_map.space.unit
    label = f"R² (in titles: median over {unit}; of the first\nand the group over those of all subjects)"
    describe_maps(figure, shown, axes, label, flat_map.outlines(roi_group))
    return figure


def sample_panels(examples):
    """[(row of data.images, nsd id, R², measured, predicted)] of evaluate.choose_examples() -> [(title of the
    picture, row, [(title, values (n_vertices,))])]."""
    return [
        (f"nsd-{nsd_id:05d}, R² {r2:.2f}", row, [("measured", measured), ("predicted", predicted)])
        for row, nsd_id, r2, measured, predicted in examples
    ]


def figure_4b(samples, images, subject, flat_map, roi_group):
    """Picture, measured and predicted map of single samples, of sample_panels(); subject: an index."""
    figure, axes = map_panels(-(-len(samples) // 2), 7, flat_map, (1, 1, 1, 0.1, 1, 1, 1))
    outlines, shown = flat_map.outlines(roi_group, subject), []
    for k, (title, row, maps) in enumerate(samples):
        picture, *panels = axes[k // 2, 4 * (k % 2) : 4 * (k % 2) + 3]
        picture.imshow(images[row])
        picture.set_title(title, fontsize=13)
        for panel, (title, values) in zip(panels, maps):
            limits = -activity_range, activity_range
            shown.append(flat_map.draw(panel, values, limits, "RdBu_r", outlines, named=not shown))
            panel.set_title(title, fontsize=13)
    describe_maps(figure, shown, axes, "activity (z)", outlines)
    name, unit = flat_map.space.subjects[subject], flat_map.space.unit
    figure.suptitle(f"{name}, from the best predicted sample to the worst (R² over its {unit})", fontsize=14)
    return figure


def roi_medians(table, space):
    """{(ROI group, ROI): {"lh", "rh": median R² of every subject that has the area there (n,)}}."""
    found = {}
    for roi_group, roi in space.rois.items():
        for name in (name for label, name in roi["names"].items() if label > 0):
            for hemi in ("lh", "rh"):
                where = dict(prediction="subject", hemisphere=hemi, roi_group=roi_group, roi=name, metric="r2")
                values = pick(table, "median", **where)
                known = [v for subject, v in values.items() if subject != "all" and not np.isnan(v)]
                found.setdefault((roi_group, name), {})[hemi] = np.array(known)
    return found


def figure_4c(areas, unit):
    """Median R² of every ROI and hemisphere, of roi_medians(): median over subjects, and each subject."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    x, ticks = 0, {}
    for roi_group in dict.fromkeys(group for group, _ in areas):
        start = x
        for name in (name for group, name in areas if group == roi_group):
            for hemi, shift, colour in (("lh", -0.18, blue), ("rh", 0.18, orange)):
                values = areas[roi_group, name][hemi]
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
    axes.set(xlim=(-0.8, x - 1.2), ylabel=f"median R² over the {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure
