"""report.html: one self-contained page of an evaluation, for tools/evaluate.py. Needs no network."""

import base64
import io
import json

import jinja2
import numpy as np
from PIL import Image
from plotly.colors import get_colorscale
from plotly.io import to_html

from tools.figures import SCORE_NAMES, score_maps
from tools.flatmap import FlatMap, fit_limits

TEMPLATE = jinja2.Template(
    """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title | e }}</title><style>
* { box-sizing: border-box; } img { max-width: 100%; cursor: zoom-in; } img.full { max-width: none; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1160px; margin: auto; padding: 0 1em; overflow-wrap: anywhere }
.number { font-size: 1.2em; background: #eef4fa; padding: 12px 16px; border-left: 4px solid #0072b2; }
.wide, figure { overflow: auto; margin: 1em 0; } pre { white-space: pre-wrap; }
table { border-collapse: collapse; font-size: 0.85em; } td, th { padding: 3px 9px; white-space: nowrap }
</style></head><body><h1>{{ title | e }}</h1><p class="number">{{ number | e }}</p>
{% if split == "val" %}<p>Figures and areas are of the validation split, as in the report. The checkpoint \
was selected on the validation split, so validation scores are optimistic.</p>{% endif %}
{% if what.splits == "authors" %}<p>Splits are the authors': a picture may be trained on for one subject and scored \
for another, which inflates the scores slightly.</p>{% endif %}
<h2>Scores</h2><div class="wide">{{ overview }}</div>
<p>Averages are over {{ unit }}; “all” pools those of all subjects. “group” is the subject-agnostic prediction. In \
parentheses: 95 % intervals from resampling pictures; they do not cover training seeds. The challenge score is the \
mean over {{ unit }} of the squared correlation (0 where negative) divided by the noise ceiling, at most 1.</p>
{% if cortex %}<h2>On the cortex</h2><p>Drag to turn, scroll to zoom. Grey: not scored.</p>{{ cortex }}{% endif %}
<h2>Figures</h2><p>As numbered in the report. Click one to enlarge it.</p>{% for name, content in figures.items() %}
<figure><img alt="{{ name }}" src="data:image/webp;base64,{{ content }}" onclick="this.classList.toggle('full')">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}
{% if rois %}<h2>By ROI</h2>{% for subject, table in rois.items() %}<details><summary>{{ subject }}</summary>
<div class="wide">{{ table }}</div></details>{% endfor %}{% endif %}
<h2>Provenance</h2><details><summary>settings and versions</summary><pre>{{ made_with | e }}</pre></details>
</body></html>"""
)


def write_page(folder, title, number, overview, part, space, what):
    """folder/report.html with the figures in folder. number: the sentence to report; overview: table of text; part: of
    evaluate.measure(), shown on the cortex and by ROI; what: {name: value} of what made it."""
    pictures, rois = {}, {}
    for path in sorted(folder.glob("figure_*.png")):
        small = io.BytesIO()
        Image.open(path).convert("RGB").save(small, "WEBP", quality=85)
        pictures[path.stem.replace("_", " ")] = base64.b64encode(small.getvalue()).decode()
    for subject, rows in part.table.groupby("subject", sort=False) if space.rois else ():
        wide = rows.pivot_table("score", ["roi_group", "roi"], ["prediction", "metric", "hemisphere"], sort=False)
        wide.columns = [" ".join(names).replace("r2", "R²") for names in wide.columns]
        rois[subject] = wide.reset_index().to_html(index=False, border=0, na_rep="–", float_format="{:.3f}".format)
    content = TEMPLATE.render(
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
    mesh |= {"colorscale": scale, "cmin": -100 / 9, "cmax": 100}
    mesh["colorbar"] = {"tickvals": [0, 100], "ticktext": ["0", "top"]}
    scene = {f"{name}axis": {"visible": False} for name in "xyz"} | {"aspectmode": "data"}
    scene["camera"] = {"eye": {"x": 0, "y": -1.6, "z": 0.4}}  # from behind
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.08, "yanchor": "top"}
    layout = {"scene": scene, "height": 560, "margin": {"l": 0, "r": 0, "b": 0}, "updatemenus": [menu]}
    figure = {"data": [mesh], "layout": layout}
    return to_html(figure, config={"responsive": True}, full_html=False, validate=False)
