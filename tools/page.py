"""report.html: one self-contained page of an evaluation, for tools/evaluate.py. Needs no network."""

import base64
import io
import json

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from nilearn import datasets, surface
from PIL import Image

from core.settings import versions
from tools import figures
from tools.flatmap import fit_limits

N_FSAVERAGE5 = 10242  # vertices per hemisphere: the first of fsaverage
WIDEST = 1600  # px of a figure in the page; the files beside it have all pixels
ASIDE = 60  # mm that each inflated hemisphere is moved, as both lie around the origin
BEHIND = {"x": 0, "y": -1.6, "z": 0.4}  # the first view
INFERNO = ["#000004", "#420a68", "#932667", "#dd513a", "#fca50a", "#fcffa4"]
MODEL = {"name": "eva02_base_patch14_224.mim_in22k", "layers": "0,2,4,6,8,10", "image_size": 224}
REPORTED = {  # Lane & Kiar 2023: median R², challenge score, and the settings that gave them
    "report, phase 1": ("0.204", "0.589", {"BATCH_SIZE": 512, "STEPS": 5000, "LEARNING_RATE": 6e-4, "LATENT_DIM": 1024}),
    "report, phase 2": ("0.2087", "0.602", {"BATCH_SIZE": 192, "STEPS": 2000, "LEARNING_RATE": 1e-5}),
}
CAPTIONS = {
    "figure_2a": "Exemplar spatial pooling maps: means of clusters of the head's maps (report: figure 2a).",
    "figure_2b": "Principal components of the activity, as the checkpoint holds them (report: figure 2b).",
    "figure_3": "Loss and validation R² in training (report: figure 3).",
    "figure_4a_r2": "R² on the flat cortex; the number is the median of each map (report: figure 4a). The tables pool the "
    "vertices of all subjects, so their numbers for all differ from the first map's.",
    "figure_4a_noise": "Noise-normalised score on the flat cortex; the number is the mean of each map.",
    "figure_4b": "Pictures with measured and predicted activity, from well to badly predicted (report: figure 4b).",
    "figure_4c": "Median R² of every ROI (report: figure 4c).",
}
TEMPLATE = jinja2.Template(
    """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title | e }}</title><style>
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 0 auto; padding: 0 16px 40px; }
h1 { font-size: 1.5em; line-height: 1.2; } h1, p, pre, figcaption { overflow-wrap: anywhere; white-space: pre-wrap; }
.number { font-size: 1.2em; background: #eef4fa; padding: 12px 16px; border-left: 4px solid #0072b2; }
.wide { overflow: auto; max-height: 560px; } table { border-collapse: collapse; font-size: 0.85em; }
th, td { padding: 3px 10px; text-align: left; border: 0; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { position: sticky; top: 0; background: #f4f4f4; }
figure { margin: 2em 0; overflow-x: auto; } img { max-width: 100%; cursor: zoom-in; } img.full { max-width: none; }
</style></head><body><h1>{{ title | e }}</h1>
<p class="number">{% if number %}The number to report: {{ number | e }}{% else %}There are no private test pictures, so there \
is no number to report.{% endif %}</p>
{% if optimistic %}<p>Figures and areas below are of the validation split, as in the report. Validation chose the \
checkpoint, so its scores are optimistic; the private test and the challenge's test pictures chose nothing.</p>{% endif %}
{% if authors %}<p>Splits are the authors': pictures that several subjects saw may be trained on for one and scored for \
another, as in the report. That helps the scores a little.</p>{% endif %}
<h2>Scores</h2><div class="wide">{{ headlines }}</div>
<p>Medians and means are over {{ unit }}; “all” pools those of all subjects. “group” is the subject-agnostic prediction. \
In parentheses: 95 % intervals from resampling pictures; they do not cover training seeds. The challenge score is the \
mean over {{ unit }} of the squared correlation (0 where negative) divided by the noise ceiling, at most 1.</p>
{% if every %}<h3>Every subject</h3><div class="wide">{{ every }}</div>{% endif %}
<h2>On the cortex</h2>{{ cortex or "<p>The data are pixels of the flat cortex, which have no place on the surface.</p>" }}
<h2>Figures</h2>{% if figures %}<p>Click a figure to enlarge it.</p>{% endif %}{% for name, (content, caption) in figures %}
<figure id="{{ name }}"><img alt="{{ caption }}" src="data:image/png;base64,{{ content }}" \
onclick="this.classList.toggle('full')"><figcaption>{{ caption }}</figcaption></figure>{% endfor %}
{% if areas %}<h2>By ROI</h2><p>{{ scored }}</p>{% for subject, table in areas %}<details{% if loop.first %} open\
{% endif %}><summary>{{ subject }}</summary><div class="wide">{{ table }}</div></details>{% endfor %}{% endif %}
<h2>What made this</h2><details><summary>checkpoint, constants and versions</summary><pre>{{ made | e }}</pre></details>
</body></html>
"""
)


def write_page(path, *, title, number, scored, what, headlines, every, space, pictures):
    """number: the sentence with the number to report, or ""; scored: evaluate.Scored, shown in figures and areas; what:
    {name: value} of what was scored; headlines, every: tables of text; pictures: {name: path of a figure}."""
    captions = {name: next(text for start, text in CAPTIONS.items() if name.startswith(start)) for name in pictures}
    headlines = pd.concat([headlines, pd.DataFrame(reference_rows(scored, what, space), dtype=object)])
    content = TEMPLATE.render(
        title=title, number=number, optimistic=scored.split == "val", unit=space.unit, authors=what["splits"] == "authors",
        headlines=html(headlines), every=html(every) if len(space.subjects) > 1 else "", cortex=cortex(scored, space),
        figures=[(n, (encode(p), captions[n])) for n, p in pictures.items()], scored=scored,
        areas=list(areas(scored.table)) if space.rois else [],
        made=json.dumps(what | {"versions": versions()}, indent=1, default=str),
    )  # fmt: skip
    path.write_text(content, encoding="utf-8")


def html(table):
    return table.to_html(index=False, border=0, na_rep="–", float_format="{:.3f}".format)


def reference_rows(scored, what, space):
    """Rows of the noise ceiling, and of the report where the model, its training and the data are the report's."""
    rows, known = [], scored.ceilings[np.isfinite(scored.ceilings)]
    if len(known):
        row = {"split": "noise ceiling of R²", "subject": "all"}
        rows.append(row | {"median R²": f"{np.median(known):.4f}", "mean R²": f"{np.mean(known):.4f}"})
    checkpoints = what.get("checkpoints", ())
    if len(checkpoints) == 1 and len(space.subjects) == 8 and space.n_vertices == 39548:
        trunk, made = checkpoints[0]["trunk_settings"], checkpoints[0]["made_with"]
        for name, (r2, challenge, settings) in REPORTED.items():
            same = "published" in made or all(made.get(key) == value for key, value in settings.items())
            if same and all(trunk[key] == value for key, value in MODEL.items()):
                rows.append({"split": name, "subject": "all", "median R²": r2, "challenge score": challenge})
    return rows


def areas(table):
    """[(subject, HTML table)] with one row per ROI: means of the challenge score, medians of the others."""
    shown = table.assign(value=table["mean"].where(table.metric == "challenge", table["median"]))
    for subject, own in shown.groupby("subject", sort=False):
        keys = ["prediction", "metric", "hemisphere"]
        wide = own.pivot(index=["roi_group", "roi"], columns=keys, values="value").reindex(own.roi.unique(), level="roi")
        wide.columns = [" ".join(names).replace("r2", "R²") for names in wide.columns]
        yield subject, html(wide.reset_index())


def encode(path):
    """A PNG of the figure, no wider than the page needs, as base64."""
    small, content = Image.open(path).convert("RGB"), io.BytesIO()
    small.thumbnail((WIDEST, 10 * WIDEST))
    small.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def cortex(scored, space):
    """The inflated fsaverage5 in 3D as HTML, with a menu of maps; nothing for pixels.

    A face has the mean of its three vertices; where one is missing it is grey, sulci darker (codes below 0).
    """
    if space.unit != "vertices":
        return ""
    files = datasets.fetch_surf_fsaverage("fsaverage5")  # comes with nilearn
    meshes = [surface.load_surf_mesh(files[f"infl_{half}"]) for half in ("left", "right")]
    x, y, z = np.concatenate([m.coordinates + [side * ASIDE, 0, 0] for m, side in zip(meshes, (-1, 1))]).T
    faces = np.concatenate([meshes[0].faces, meshes[1].faces + N_FSAVERAGE5])
    sulcus = np.concatenate([surface.load_surf_data(files[f"curv_{half}"]) for half in ("left", "right")])[faces[:, 0]] > 0
    buttons = []
    for metric in figures.SCORE_NAMES:
        maps = figures.score_maps(scored.maps, metric, space) if ("subject", metric) in scored.maps else []
        top = fit_limits([values for _, values, _ in maps], symmetric=False)[1] if maps else 1
        for title, values, _ in maps:
            codes = surface_values(values, space)[faces].mean(1)
            codes = np.where(np.isnan(codes), np.where(sulcus, -0.06, -0.02) * top, np.clip(codes, 0, top))
            # three digits keep the page small
            change = {"intensity": [[float(f"{v:.3g}") for v in codes]], "cmin": -0.08 * top, "cmax": top}
            label = f"{title}: {figures.SCORE_NAMES[metric]}"
            buttons.append({"method": "restyle", "label": label, "args": [change]})
    first, zero = buttons[0]["args"][0], 0.08 / 1.08  # of the colour scale: where values begin
    scale = [(0, "#999"), (zero / 2, "#999"), (zero / 2, "#bdbdbd"), (zero, "#bdbdbd")]
    scale += [(zero + (1 - zero) * n / 5, colour) for n, colour in enumerate(INFERNO)]
    mesh = go.Mesh3d(
        x=x, y=y, z=z, i=faces[:, 0], j=faces[:, 1], k=faces[:, 2], intensity=first["intensity"][0],
        intensitymode="cell", colorscale=scale, cmin=first["cmin"], cmax=first["cmax"], hoverinfo="skip",
    )  # fmt: skip
    scene = {f"{name}axis": {"visible": False} for name in "xyz"} | {"aspectmode": "data", "camera": {"eye": BEHIND}}
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.08, "yanchor": "top"}
    margin = {"l": 0, "r": 0, "b": 0}
    figure = go.Figure(mesh, {"scene": scene, "height": 560, "margin": margin, "updatemenus": [menu]})
    note = "<p>Drag to turn, scroll to zoom. Grey: not scored.</p>"
    return note + figure.to_html(full_html=False, include_plotlyjs=True, config={"responsive": True})


def surface_values(values, space):
    """values (n_vertices,) -> (2 * 10242,) on fsaverage5, NaN where there are none."""
    on_surface, place = np.full(2 * N_FSAVERAGE5, np.nan), space.vertices.numpy()
    right, inside = np.arange(space.n_vertices) >= space.n_lh, place < N_FSAVERAGE5
    on_surface[(place + N_FSAVERAGE5 * right)[inside]] = values[inside]
    return on_surface
