"""The report's figures 2 to 4, for tools/evaluate.py. flat: a FlatMap; roi_group: outlined on the maps."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from core.checkpoint import read_checkpoint
from core.training import log_path, read_log
from tools.flatmap import describe_maps, fit_limits

ACTIVITY_RANGE = 2.0  # z, the colour scale of figure 4b ends at +-this
N_POOLING_MAPS = 16  # clusters of figure 2a
N_COMPONENTS = 4  # of figure 2b, as in the report
COLOURS = {"left": "#0072B2", "right": "#D55E00"}  # distinct to colour-blind people (Okabe and Ito)
SCORE_NAMES = {"r2": "R²", "challenge": "noise-normalised score"}


def empty_panels(n_rows, n_columns, flat=None):
    """Panels for flat maps, or for small pictures without one -> figure, axes (n_rows, n_columns)."""
    width, height = (3, 3 * flat.size[1] / flat.size[0]) if flat else (1.5, 1.5)  # inches
    size = (max(n_columns * width, 3) + 1, n_rows * (height + 0.3) + 0.5)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for panel in axes.flat:
        panel.set_axis_off()
    return figure, axes


def pooling_exemplars(encoder, seed):
    """Mean spatial pooling maps of clusters of all layers' maps (a Gaussian mixture), the largest cluster first
    -> (k, height, width), 1 at the strongest place, and shares of the maps (k,).

    Maps are without the class token, of length 1, and signed so that the strongest part is positive: the sign of a
    latent unit's map and channel filter is arbitrary.
    """
    maps = torch.cat([p.spatial[:, encoder.trunk.n_prefix :] for p in encoder.head.projections]).detach().cpu().double()
    maps = (maps * (maps**3).sum(1, keepdim=True).sign() / maps.norm(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
    mixture = GaussianMixture(min(N_POOLING_MAPS, len(maps)), covariance_type="spherical", random_state=seed).fit(maps)
    n_maps = np.bincount(mixture.predict(maps), minlength=mixture.n_components)
    means = mixture.means_[np.argsort(-n_maps)]
    means = means / np.abs(means).max(1, keepdims=True)
    return means.reshape(-1, *encoder.trunk.grid), np.sort(n_maps)[::-1] / len(maps)


def figure_2a(means, shares):
    """Exemplar spatial pooling maps, of pooling_exemplars()."""
    n_columns = min(8, len(means))
    figure, axes = empty_panels(-(-len(means) // n_columns), n_columns)
    for panel, mean, share in zip(axes.flat, means, shares):
        shown = panel.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_title(f"{share:.0%} of maps", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, label="weight (largest: 1)")
    return figure


def figure_2b(encoder, columns, flat, roi_group):
    """The first principal components. columns (n_vertices of the map,): rows of the embedding, -1 where it has none."""
    loadings = encoder.head.embed_weight[:, :N_COMPONENTS].detach().cpu().numpy().T
    loadings = loadings / np.sqrt((loadings**2).mean(1, keepdims=True))
    loadings = np.where(columns >= 0, loadings[:, columns], np.nan)
    figure, axes = empty_panels(1, len(loadings), flat)
    outlines, limits, shown = flat.outlines(roi_group), fit_limits(loadings), []
    for k, (panel, values) in enumerate(zip(axes.flat, loadings)):
        shown.append(flat.draw(panel, values, limits, "RdBu_r", outlines, named=k == 0))
        panel.set_title(f"component {k + 1}", fontsize=10)
    describe_maps(figure, shown, axes, "loading (root mean square: 1)", outlines)
    return figure


def training_phases(path, made_with):
    """{phase: (made_with, log)} of the training that ended in the checkpoint at path; logs are [] where missing.
    Phase 1 of a fine-tuned checkpoint is known while the head that it started from lies beside it."""
    made, head = {1: (path, made_with)}, path.with_name("head.pt")
    if "head_fingerprint" in made_with:
        made = {2: (path, made_with)}
        before = read_checkpoint(head) if head.exists() else {"fingerprint": None}
        if before["fingerprint"] == made_with["head_fingerprint"]:
            made[1] = head, before["made_with"]
    logs = {phase: log_path(output) for phase, (output, _) in made.items()}
    return {phase: (made[phase][1], read_log(log) if log.exists() else []) for phase, log in sorted(logs.items())}


def figure_3(logs):
    """Loss and validation R². logs {phase: one dict per validation}. Step 0 of phase 1, the untrained head, would squash
    the axes and is left out."""
    size = (4.5 * len(logs), 5.2)
    figure, axes = plt.subplots(2, len(logs), figsize=size, squeeze=False, layout="constrained", sharex="col")
    for (phase, log), (loss, r2) in zip(logs.items(), axes.T):
        log = [entry for entry in log if entry["step"] or phase == 2] or log
        for panel, key, side in ((loss, "train_loss", "left"), (loss, "val_loss", "right"), (r2, "val_r2", "right")):
            values = [np.nan if entry[key] is None else entry[key] for entry in log]
            label = {"train_loss": "training", "val_loss": "validation"}.get(key)
            panel.plot([entry["step"] for entry in log], values, color=COLOURS[side], label=label, marker="o", ms=3)
            panel.grid(alpha=0.3)
        best = max(log, key=lambda entry: entry["val_r2"])
        r2.set_title(f"best: {best['val_r2']:.4f} at step {best['step']}", fontsize=9)
        r2.set(xlabel="step", ylabel="validation median R²")
        loss.set(title=f"phase {phase}", ylabel="mean squared error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def score_maps(maps, metric, subjects):
    """A score of every vertex -> {title: (values (n_vertices,), the subject's index or None)}: the subjects' median, the
    group prediction's, each subject. maps {(prediction, metric): (n_subjects, n_vertices)}, NaN where missing."""
    own = maps["subject", metric]
    scored = [s for s in range(len(subjects)) if np.isfinite(own[s]).any()]
    titles = {"median of the subjects": "subject"} if len(scored) > 1 else {}  # else the subject's own map
    titles |= {"group prediction": "group"} if ("group", metric) in maps else {}
    shown = {}
    for title, prediction in titles.items():
        values = np.ma.masked_invalid(maps[prediction, metric][scored])
        shown[title] = np.ma.median(values, axis=0).filled(np.nan), None
    return shown | {subjects[s]: (own[s], s) for s in scored}


def figure_4a(maps, metric, flat, roi_group):
    """Flat maps of score_maps(). Titles hold the median of each map of R², the mean of noise-normalised ones."""
    limits, shown = fit_limits([values for values, _ in maps.values()], symmetric=False), []
    n_columns = 5 if len(maps) > 4 else len(maps)
    figure, axes = empty_panels(-(-len(maps) // n_columns), n_columns, flat)
    average, name = {"r2": (np.nanmedian, "median"), "challenge": (np.nanmean, "mean")}[metric]
    for k, (panel, (title, (values, subject))) in enumerate(zip(axes.flat, maps.items())):
        outlines = flat.outlines(roi_group, subject)
        shown.append(flat.draw(panel, values, limits, "inferno", outlines, named=k == 0, line_colour="white"))
        panel.set_title(f"{title}: {average(values):.3f}", fontsize=11)
    label = f"{SCORE_NAMES[metric]}\n(titles: {name} of each map)"
    describe_maps(figure, shown, axes, label, flat.outlines(roi_group))
    return figure


def figure_4b(examples, name, flat, roi_group):
    """Picture, measured and predicted map of samples of one subject (a name), of evaluate.choose_examples()."""
    outlines, limits, shown = flat.outlines(roi_group, flat.space.subjects.index(name)), (-ACTIVITY_RANGE, ACTIVITY_RANGE), []
    figure, axes = empty_panels(-(-len(examples) // 2), 6, flat)
    for (nsd_id, r2, image, *maps), (picture, *panels) in zip(examples, axes.reshape(-1, 3)):
        picture.imshow(image)
        picture.set_title(f"{f'nsd-{nsd_id:05d}' if nsd_id >= 0 else 'picture'}, R² {r2:.2f}", fontsize=12)
        for panel, title, values in zip(panels, ("measured", "predicted"), maps):
            shown.append(flat.draw(panel, values, limits, "RdBu_r", outlines, named=not shown))
            panel.set_title(title, fontsize=12)
    describe_maps(figure, shown, axes, "activity (z)", outlines)
    figure.suptitle(f"{name}, from the best predicted picture to the worst (R² over its {flat.space.unit})", fontsize=13)
    return figure


def figure_4c(table, unit):
    """Median R² of every ROI and hemisphere: each subject, and the median over subjects. table: evaluate.summarise()."""
    rows = table[(table.prediction == "subject") & (table.metric == "r2") & (table.subject != "all")]
    rows = rows[(rows.roi != "all") & (rows.hemisphere != "both")]
    places = rows[["roi_group", "roi"]].drop_duplicates().reset_index(drop=True)
    x = places.index + places.roi_group.ne(places.roi_group.shift()).cumsum() - 1  # a gap between groups
    rows = rows.merge(places.assign(x=x))
    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    for (side, colour), shift in zip(COLOURS.items(), (-0.18, 0.18)):
        own = rows[rows.hemisphere == side[0] + "h"]
        axes.scatter(own.x + shift, own["median"], s=14, color=colour, alpha=0.5, lw=0, label=f"one subject, {side}")
        medians = own.groupby("x")["median"].median()
        at = medians.index + shift
        axes.hlines(medians, at - 0.16, at + 0.16, colour, linewidth=3, label=f"median of the subjects, {side}")
    for group, centre in x.groupby(places.roi_group).mean().items():
        axes.text(centre, 1.02, group, transform=axes.get_xaxis_transform(), ha="center", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    axes.set_xticks(x, places.roi, rotation=60, ha="right", rotation_mode="anchor")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlim=(-0.8, x.max() + 0.8), ylabel=f"median R² over the {unit}")
    axes.grid(axis="y", alpha=0.3)
    return figure
