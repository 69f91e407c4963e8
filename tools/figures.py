"""The report's figures 2 to 4, and one self-contained page with all results (page.html), for tools/evaluate.py."""

import base64
import io
import json
import shutil
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from plotly.colors import get_colorscale
from plotly.io import to_html
from sklearn.mixture import GaussianMixture

from core.checkpoint import read_checkpoint
from core.training import log_path
from tools.flatmap import FlatMap, describe_maps, fit_limits, save_figure
from tools.vertices import find

ACTIVITY_LIMITS = (-2.0, 2.0)  # z, colour scale of figure 4b
N_POOLING_MAPS = 16  # clusters of figure 2a
N_COMPONENTS = 4  # of figure 2b, as in the report
COLOURS = {"left": "#0072B2", "right": "#D55E00"}  # distinct to colour-blind people (Okabe and Ito)
NO_AXES = {"frame_on": False, "xticks": [], "yticks": []}
SCORE_NAMES = {"r2": "R²", "challenge": "noise-normalised score"}


def save_all(folder, space, part, predictor, roi_group, fsaverage_dir, seed):
    """Write figure_*.png. part: of evaluate.measure(). Figures 2 and 3 are of one checkpoint, not of averages."""
    flat, figures = FlatMap(space, fsaverage_dir), {}
    if predictor and len(predictor.encoders) == 1:
        [encoder], [path], [info] = predictor.encoders, predictor.paths, predictor.info
        figures["2a_pooling_maps"] = figure_2a(*pooling_exemplars(encoder, seed))
        figures["2b_components"] = figure_2b(encoder, find(predictor.space, space), flat, flat.outlines(roi_group))
        for curves in loss_curves(path, info["made_with"]):  # figure 3, as training draws it
            shutil.copy(curves, folder / f"figure_3_{curves.name}")
    for metric, name in (("r2", "r2"), ("challenge", "noise_normalised")):
        maps = score_maps(part.maps, metric, space.subjects)
        if maps:
            figures[f"4a_{name}_maps"] = figure_4a(maps, metric, flat, roi_group)
    subject = next(iter(part.n_images))
    outlines = flat.outlines(roi_group, space.subjects.index(subject))
    figures["4b_samples"] = figure_4b(part.examples, f"activity of {subject} (z)", flat, outlines)
    if space.rois:
        figures["4c_rois"] = figure_4c(part.table, space.unit)
    for name, figure in figures.items():
        save_figure(figure, folder / f"figure_{name}.png")


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
    shape = 2, -(-len(means) // 2)
    figure, axes = plt.subplots(*shape, figsize=(14, 4), squeeze=False, layout="constrained", subplot_kw=NO_AXES)
    for panel, mean, share in zip(axes.flat, means, shares):
        shown = panel.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set_title(f"{share:.0%} of maps", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, label="weight (largest: 1)")
    return figure


def map_grid(panels, n_columns, flat, limits, cmap, label, line_colour="black"):
    """panels: [(title, map (n_vertices,) or picture (height, width, 3), outlines)] -> figure with one colour scale."""
    shape, height = (-(-len(panels) // n_columns), n_columns), 3 * flat.size[1] / flat.size[0] + 0.3  # inches
    size = 3 * max(n_columns, 2) + 1, shape[0] * height + 0.5
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained", subplot_kw=NO_AXES)
    shown = []
    for panel, (title, values, outlines) in zip(axes.flat, panels):
        panel.set_title(title, fontsize=11)
        if values.ndim == 3:
            panel.imshow(values)
        else:
            shown.append(flat.draw(panel, values, limits, cmap, outlines, named=not shown, line_colour=line_colour))
    describe_maps(figure, shown, axes, label, panels[0][2])
    return figure


def figure_2b(encoder, columns, flat, outlines):
    """The first principal components. columns (n_vertices of the map,): rows of the embedding, -1 where it has none."""
    loadings = encoder.head.embed_weight[:, :N_COMPONENTS].detach().cpu().numpy().T
    loadings = loadings / np.sqrt((loadings**2).mean(1, keepdims=True))
    loadings = np.where(columns >= 0, loadings[:, columns], np.nan)
    panels = [(f"component {k}", values, outlines) for k, values in enumerate(loadings, start=1)]
    return map_grid(panels, len(panels), flat, fit_limits(loadings), "RdBu_r", "loading (root mean square: 1)")


def loss_curves(path, made_with):
    """PNG files of the phases that made a checkpoint; of phase 1 only while its head lies beside the fine-tuned one."""
    head, paths = path.with_name("head.pt"), [path]
    if "head_fingerprint" in made_with and head.exists():
        paths += [head] * (read_checkpoint(head)["fingerprint"] == made_with["head_fingerprint"])
    return [curves for curves in (log_path(path).with_suffix(".png") for path in paths) if curves.exists()]


def score_maps(maps, metric, subjects):
    """A score of every vertex -> {title: (values (n_vertices,), the subject's index or None)}: the subjects' median,
    the group prediction's, each subject. maps {(prediction, metric): (n_subjects, n_vertices)}, NaN where missing."""
    own = maps.get(("subject", metric), np.empty((0, 0)))
    shown = {subjects[s]: (own[s], s) for s in np.flatnonzero(np.isfinite(own).any(1))}
    averaged = {"median of the subjects": own} if len(shown) > 1 else {}  # of one: the subject's own map
    if ("group", metric) in maps:
        averaged["group prediction"] = maps["group", metric]
    return {title: (pd.DataFrame(values).median().to_numpy(), None) for title, values in averaged.items()} | shown


def figure_4a(maps, metric, flat, roi_group):
    """Flat maps of score_maps(). Titles hold the median of each map of R², the mean of noise-normalised ones."""
    average, name = (np.nanmean, "mean") if metric == "challenge" else (np.nanmedian, "median")
    panels = []
    for title, (values, subject) in maps.items():
        panels.append((f"{title}: {average(values):.3f}", values, flat.outlines(roi_group, subject)))
    limits = fit_limits([values for values, _ in maps.values()], symmetric=False)
    label = f"{SCORE_NAMES[metric]}\n(titles: {name} of each map)"
    return map_grid(panels, min(5, len(panels)), flat, limits, "inferno", label, "white")


def figure_4b(examples, label, flat, outlines):
    """Picture, measured and predicted map of samples, of evaluate.choose_examples()."""
    panels = []
    for nsd_id, r2, *shown in examples:
        name = f"nsd-{nsd_id:05d}" if nsd_id >= 0 else "picture"
        titles = (f"{name}, R² {r2:z.2f}", "measured", "predicted")
        panels += [(title, values, outlines) for title, values in zip(titles, shown)]
    return map_grid(panels, 6, flat, ACTIVITY_LIMITS, "RdBu_r", label)


def figure_4c(table, unit):
    """Median R² of every ROI and hemisphere: each subject, and their median. table: of evaluate.summarise()."""
    rows = table.query("prediction == 'subject' and metric == 'r2' and subject != 'all' and roi != 'all'")
    table = rows.pivot_table("score", ["roi_group", "roi"], ["hemisphere", "subject"], sort=False)
    groups, x = table.index.get_level_values("roi_group"), np.arange(len(table))
    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    for (side, colour), shift in zip(COLOURS.items(), (-0.18, 0.18)):
        own = table[f"{side[0]}h"]
        axes.plot(x + shift, own, ".", color=colour, alpha=0.5)[0].set_label(f"each subject, {side}")
        bar = dict(markersize=12, markeredgewidth=3, label=f"median, {side}")
        axes.plot(x + shift, own.median(axis=1), "_", color=colour, **bar)
    for start in np.flatnonzero(~groups.duplicated()):
        axes.axvline(start - 0.5, color="black", linewidth=0.8)
        axes.text(start - 0.4, 1.02, groups[start], transform=axes.get_xaxis_transform())
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    axes.set_xticks(x, table.index.get_level_values("roi"), rotation=60, ha="right", rotation_mode="anchor")
    axes.set(xlim=(-0.5, len(x) - 0.5), ylabel=f"median R² over the {unit}")
    axes.grid(axis="y", alpha=0.3)
    return figure


def write_page(folder, title, number, overview, part, space, what):
    """folder/report.html with the figures in folder. number: the sentence to report; overview: table of text; part: of
    evaluate.measure(), shown on the cortex and by ROI; what: {name: value} of what made it."""
    pictures, rois = {}, {}
    for path in sorted(folder.glob("figure_*.png")):
        Image.open(path).convert("RGB").save(small := io.BytesIO(), "WEBP", quality=85)
        pictures[path.stem.replace("_", " ")] = base64.b64encode(small.getvalue()).decode()
    for subject, rows in part.table.groupby("subject", sort=False) if space.rois else ():
        wide = rows.pivot_table("score", ["roi_group", "roi"], ["prediction", "metric", "hemisphere"], sort=False)
        wide.columns = [" ".join(names).replace("r2", "R²") for names in wide.columns]
        rois[subject] = wide.reset_index().to_html(index=False, border=0, na_rep="–", float_format="{:.3f}".format)
    template = jinja2.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    content = template.render(
        title=title, number=number, overview=overview.to_html(index=False, border=0), split=part.split, unit=space.unit,
        cortex=cortex(part.maps, space) if space.unit == "vertices" else "", figures=pictures, rois=rois, what=what,
        made_with=json.dumps(what, indent=1),
    )  # fmt: skip
    (folder / "report.html").write_text(content, encoding="utf-8")


def cortex(maps, space):
    """The inflated fsaverage5 in 3D as HTML, with a menu of maps. Codes of faces are per cent of the scale's upper end;
    where a vertex is missing they are below 0: grey, sulci darker."""
    surface, buttons = FlatMap(space, inflated=True), []
    missing = np.where(surface.grey[surface.faces[:, 0]] < 0.7, -9, -3)
    for metric, name in SCORE_NAMES.items():
        shown = score_maps(maps, metric, space.subjects)
        _, top = fit_limits([values for values, _ in shown.values()], symmetric=False)
        for title, (values, _) in shown.items():
            codes = 100 * surface.on_points(values)[surface.faces].mean(1) / top
            codes = np.where(np.isnan(codes), missing, codes.clip(0, 100)).astype(int).tolist()
            label = f"{title}: {name}, 0 to {top:g}"
            buttons.append({"method": "restyle", "label": label, "args": [{"intensity": [codes]}]})
    scale = [[0, "#999"], [0.05, "#999"], [0.05, "#bdbdbd"], [0.1, "#bdbdbd"]]
    scale += [[0.1 + 0.9 * place, colour] for place, colour in get_colorscale("Inferno")]
    mesh = {"type": "mesh3d"} | dict(zip("xyzijk", surface.points.T.tolist() + surface.faces.T.tolist()))
    mesh |= {"intensitymode": "cell", "intensity": buttons[0]["args"][0]["intensity"][0], "hoverinfo": "skip"}
    bar = {"tickvals": [0, 100], "ticktext": ["0", "top"]}
    mesh |= {"colorscale": scale, "cmin": -100 / 9, "cmax": 100, "colorbar": bar}
    scene = {f"{name}axis": {"visible": False} for name in "xyz"}
    scene |= {"aspectmode": "data", "camera": {"eye": {"x": 0, "y": -1.6, "z": 0.4}}}  # seen from behind
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.08, "yanchor": "top"}
    layout = {"scene": scene, "height": 560, "margin": {"l": 0, "r": 0, "b": 0}, "updatemenus": [menu]}
    return to_html({"data": [mesh], "layout": layout}, {"responsive": True}, full_html=False, validate=False)
