"""The report's figures 2 to 4, for tools/evaluate.py."""

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.mixture import GaussianMixture

import fit_pca
from core.checkpoint import read_checkpoint
from core.training import curves, log_path, read_log
from model import UserError
from tools.flatmap import describe_maps, fit_limits

ACTIVITY_RANGE = 2.0  # z, the colour scale of figure 4b ends at +-this
N_POOLING_MAPS = 16  # clusters of figure 2a
N_COMPONENTS = 4  # of figure 2b, as in the report
BLUE, ORANGE = "#0072B2", "#D55E00"  # distinct to colour-blind people (Okabe and Ito)
SCORE_NAMES = {"r2": "R²", "challenge": "noise-normalised score"}


def map_panels(rows, columns, flat, **options):
    """Empty panels, 3 inches wide, for flat maps -> figure, axes (rows, columns)."""
    size = (3 * columns, rows * (3 * flat.size[1] / flat.size[0] + 0.4) + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
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
    size = np.bincount(mixture.predict(maps), minlength=len(mixture.means_))
    means = mixture.means_[np.argsort(-size)]
    return (means / np.abs(means).max(1, keepdims=True)).reshape(-1, *encoder.trunk.grid), np.sort(size)[::-1] / len(maps)


def figure_2a(means, shares):
    """Exemplar spatial pooling maps, of pooling_exemplars()."""
    columns = min(8, len(means))
    size = (1.5 * columns + 1, 1.8 * -(-len(means) // columns) + 0.4)
    figure, axes = plt.subplots(-(-len(means) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, mean, share in zip(axes.flat, means, shares):
        shown = panel.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_title(f"{share:.0%} of maps", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, label="weight (largest: 1)")
    figure.suptitle(f"Means of {len(means)} clusters of the spatial pooling maps", fontsize=11)
    return figure


def components(encoder, space, data, data_dir):
    """The first columns of a checkpoint's embedding, scaled to root mean square 1 -> (n, n_vertices of the data), and
    their shares of the training activity's variance (n,); None where DATA_DIR's PCA is another one."""
    loadings = encoder.head.embed_weight[:, :N_COMPONENTS].detach().cpu().double().T
    loadings = (loadings / loadings.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)).numpy()
    columns, shares = space.find(data.space), None
    try:
        pca, n = fit_pca.load(data_dir, data), encoder.head.embed_weight.shape[1]
        if torch.equal(pca.components[:, :n], encoder.head.embed_weight.cpu()):
            shares = (pca.explained_variance[: len(loadings)] / pca.total_variance).numpy()
    except UserError:
        pass  # evaluation needs no PCA file
    return np.where(columns >= 0, loadings[:, columns], np.nan), shares


def figure_2b(loadings, shares, flat, roi_group):
    """The first principal components, of components()."""
    figure, axes = map_panels(1, len(loadings), flat)
    outlines, limits, shown = flat.outlines(roi_group), fit_limits(loadings), []
    for k, (panel, values) in enumerate(zip(axes.flat, loadings)):
        shown.append(flat.draw(panel, values, limits, "RdBu_r", outlines, named=k == 0))
        share = "" if shares is None else f": {shares[k]:.1%} of variance"
        panel.set_title(f"component {k + 1}{share}", fontsize=10)
    describe_maps(figure, shown, axes, "loading (root mean square: 1)", outlines)
    return figure


def training_curves(path, made_with):
    """Logs of the phases that made the checkpoint at path -> [(title, curves of core.training)], without the untrained
    head of step 0, which would squash the axes."""
    phases = {"phase 1: head": Path(path)}
    if "head_fingerprint" in made_with:
        head = Path(path).with_name("head.pt")
        is_its = head.exists() and read_checkpoint(head)["fingerprint"] == made_with["head_fingerprint"]
        phases = ({"phase 1: head": head} if is_its else {}) | {"phase 2: head and self-attention": Path(path)}
    logs = {title: read_log(log_path(output)) for title, output in phases.items() if log_path(output).exists()}
    return [(t, curves([e for e in log if e["step"] or "phase 2" in t] or log)) for t, log in logs.items()]


def figure_3(phases):
    """Loss and validation R² of training_curves()."""
    size = (4.5 * len(phases), 5.2)
    figure, axes = plt.subplots(
        2, len(phases), figsize=size, squeeze=False, layout="constrained", sharey="row", sharex="col"
    )
    for (title, lines), (loss, r2) in zip(phases, axes.T):
        for panel, name, colour in ((loss, "train", BLUE), (loss, "validation", ORANGE), (r2, "r2", ORANGE)):
            panel.plot(*lines[name], color=colour, label=name, marker="o", markersize=3)
            panel.grid(alpha=0.3)
        loss.set_title(title, fontsize=10)
        r2.set_xlabel("step")
        if np.isfinite(lines["r2"][1]).any():
            best = np.nanargmax(lines["r2"][1])
            r2.set_title(f"best: {lines['r2'][1][best]:.4f} at step {lines['r2'][0][best]}", fontsize=9)
    axes[0, 0].set_ylabel("mean squared error")
    axes[1, 0].set_ylabel("validation median R²")
    axes[0, 0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.08))
    return figure


def score_maps(scores, metric, space):
    """A score of every vertex -> [(title, values (n_vertices,), the subject's index or None)]: the subjects' median,
    the group prediction's, each subject. scores: {(prediction, metric): (n_subjects, n_vertices)}."""
    titles = {"subject": "median of the subjects", "group": "group prediction"}
    if len(space.subjects) == 1:
        titles.pop("subject")  # it would be the subject's own map
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # vertices that nobody has
        maps = [(t, np.nanmedian(scores[p, metric], 0), None) for p, t in titles.items() if (p, metric) in scores]
    own = scores["subject", metric]
    return maps + [(name, own[s], s) for s, name in enumerate(space.subjects) if np.isfinite(own[s]).any()]


def figure_4a(maps, metric, flat, roi_group):
    """Flat maps of score_maps(); the titles hold the median of R² or the mean of the noise-normalised score."""
    limits, shown = fit_limits([values for _, values, _ in maps], symmetric=False), []
    columns = 5 if len(maps) > 4 else len(maps)
    figure, axes = map_panels(-(-len(maps) // columns), columns, flat)
    average, name = {"r2": (np.nanmedian, "median"), "challenge": (np.nanmean, "mean")}[metric]
    for k, (panel, (title, values, subject)) in enumerate(zip(axes.flat, maps)):
        outlines = flat.outlines(roi_group, subject)
        shown.append(flat.draw(panel, values, limits, "inferno", outlines, named=k == 0, line_colour="white"))
        panel.set_title(f"{title}: {average(values):.3f}", fontsize=11)
    label = f"{SCORE_NAMES[metric]}\n(titles: {name} of each map)"
    describe_maps(figure, shown, axes, label, flat.outlines(roi_group))
    return figure


def figure_4b(examples, subject, flat, roi_group):
    """Picture, measured and predicted map of single samples, of evaluate.choose_examples(); subject: an index."""
    figure, axes = map_panels(-(-len(examples) // 2), 6, flat)
    outlines, shown, limits = flat.outlines(roi_group, subject), [], (-ACTIVITY_RANGE, ACTIVITY_RANGE)
    for (nsd_id, r2, image, *maps), (picture, *panels) in zip(examples, axes.reshape(-1, 3)):
        picture.imshow(image)
        picture.set_title(f"nsd-{nsd_id:05d}, R² {r2:.2f}" if nsd_id >= 0 else f"own picture, R² {r2:.2f}", fontsize=12)
        for panel, title, values in zip(panels, ("measured", "predicted"), maps):
            shown.append(flat.draw(panel, values, limits, "RdBu_r", outlines, named=not shown))
            panel.set_title(title, fontsize=12)
    describe_maps(figure, shown, axes, "activity (z)", outlines)
    name, unit = flat.space.subjects[subject], flat.space.unit
    figure.suptitle(f"{name}, from the best predicted picture to the worst (R² over its {unit})", fontsize=13)
    return figure


def figure_4c(table, unit):
    """Median R² of every ROI and hemisphere: each subject, and the median over subjects. table: evaluate.summarise()."""
    rows = table[(table.prediction == "subject") & (table.metric == "r2") & (table.subject != "all")]
    rows = rows[(rows.roi != "all") & (rows.hemisphere != "both")].dropna(subset="median")
    places = list(dict.fromkeys(zip(rows.roi_group, rows.roi)))
    groups = list(dict.fromkeys(group for group, _ in places))
    x = {place: i + groups.index(place[0]) for i, place in enumerate(places)}  # a gap between groups
    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    for hemi, shift, colour in (("lh", -0.18, BLUE), ("rh", 0.18, ORANGE)):
        own = rows[rows.hemisphere == hemi]
        at = np.array([x[place] for place in zip(own.roi_group, own.roi)]) + shift
        side = "left" if hemi == "lh" else "right"
        axes.scatter(at, own["median"], s=14, color=colour, alpha=0.5, linewidths=0, label=f"one subject, {side}")
        medians = own["median"].groupby(at).median()
        axes.hlines(medians, medians.index - 0.16, medians.index + 0.16, colour, linewidth=3, label=f"median, {side}")
    for group in groups:
        own = [x[place] for place in places if place[0] == group]
        axes.text(np.mean(own), 1.02, group, transform=axes.get_xaxis_transform(), ha="center", fontsize=11)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    axes.set_xticks(list(x.values()), [roi for _, roi in places], rotation=60, ha="right", rotation_mode="anchor")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlim=(-0.8, max(x.values()) + 0.8), ylabel=f"median R² over the {unit}")
    axes.grid(axis="y", alpha=0.3)
    return figure
