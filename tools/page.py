"""report.html: one self-contained page of an evaluation, for tools/evaluate.py; page.html is its template."""

import base64
import json
from pathlib import Path

import jinja2
import numpy as np
from plotly.colors import get_colorscale
from plotly.io import to_html

from tools.figures import SCORE_NAMES, score_maps
from tools.flatmap import FlatMap, fit_limits


def write_page(folder, title, number, overview, part, space, what):
    """folder/report.html with the figures in folder. number: the sentence to report; overview: table of text; part: of
    evaluate.measure(), shown on the cortex and by ROI; what: {name: value} of what made it."""
    pictures, rois = {}, {}
    for path in sorted(folder.glob("figure_*.png")):
        pictures[path.stem.replace("_", " ")] = base64.b64encode(path.read_bytes()).decode()
    for subject, rows in part.table.groupby("subject", sort=False) if space.rois else ():
        wide = rows.pivot_table("score", ["roi_group", "roi"], ["prediction", "metric", "hemisphere"], sort=False)
        wide.columns = [" ".join(names).replace("r2", "R²") for names in wide.columns]
        rois[subject] = wide.reset_index().to_html(index=False, border=0, na_rep="–", float_format="{:.3f}".format)
    template = jinja2.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
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
    mesh |= {"colorscale": scale, "cmin": -100 / 9, "cmax": 100}
    mesh["colorbar"] = {"tickvals": [0, 100], "ticktext": ["0", "top"]}
    scene = {f"{name}axis": {"visible": False} for name in "xyz"} | {"aspectmode": "data"}
    scene["camera"] = {"eye": {"x": 0, "y": -1.6, "z": 0.4}}  # from behind
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.08, "yanchor": "top"}
    layout = {"scene": scene, "height": 560, "margin": {"l": 0, "r": 0, "b": 0}, "updatemenus": [menu]}
    figure = {"data": [mesh], "layout": layout}
    return to_html(figure, config={"responsive": True}, full_html=False, validate=False)
