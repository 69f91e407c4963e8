"""report.html: one self-contained page of an evaluation, for evaluate.py. No network, opens anywhere.

Numbers beside the report's and the noise ceiling, the figures, the cortex in three dimensions (nilearn's
view_surf on fsaverage5, embedded once; choosing a subject repaints it), a sortable table, what made it all.
"""

import base64
import io
import json
from html import escape

import numpy as np
from PIL import Image

from common import versions, write_whole
from figures import r2_maps
from flatmap import fit_limits

published = {  # Lane & Kiar 2023: (median R², challenge score)
    "report, phase 1": (0.204, 0.589),
    "report, phase 2": (0.2087, 0.602),
}
split_names = {"val": "validation", "test": "private test", "challenge": "organisers' held-out pictures"}
captions = {
    "figure_2a": "Exemplar spatial pooling maps: means of clusters of the head's maps (report: figure 2a).",
    "figure_2b": "Principal components of the activity, as the checkpoint holds them (report: figure 2b).",
    "figure_3": "Loss and validation R² in training (report: figure 3).",
    "figure_4a": "R² of every {unit}: the subjects' median, the subject-agnostic group prediction, every subject "
    "(report: figure 4a). The numbers are those of the table.",
    "figure_4b": "Pictures with measured and predicted activity, from well to badly predicted (report: figure 4b).",
    "figure_4c": "Median R² of every ROI (report: figure 4c).",
}
n_fsaverage5 = 10242  # vertices of a hemisphere: the first of fsaverage
widest = 1600  # px of a figure in the page
hemisphere_gap = 60  # mm that either inflated hemisphere is moved aside, as both lie around the origin


def show(value, digits=4):
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def with_interval(found, value):
    """A headline and its 95 % interval as HTML."""
    ends = found[f"{value}_95"]
    between = f' <span class="interval">{ends[0]:.4f} to {ends[1]:.4f}</span>' if ends else ""
    return f"{show(found[value])}{between}"


def html_table(columns, rows, name=""):
    """columns: titles; rows: of strings (HTML), or of (HTML, what to sort by)."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns)
    body = []
    for row in rows:
        cells = [cell if isinstance(cell, tuple) else (cell, cell) for cell in row]
        body.append("<tr>" + "".join(f'<td data-key="{escape(str(key))}">{text}</td>' for text, key in cells) + "</tr>")
    attributes = f' id="{name}" class="sortable"' if name else ""
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table{attributes}>{content}</table></div>'


# ---- parts of the page --------------------------------------------------------------------------


def the_number(scored, reported, data_splits):
    """Which number to report, and why."""
    parts = []
    if reported is None:
        parts.append("<p>There are no private test pictures, so there is no number to report.</p>")
    else:
        found = reported.headlines["subject"]["all"]
        text = f"median R² <b>{with_interval(found['r2'], 'median')}</b>"
        if "challenge" in found:
            text += f", challenge score <b>{with_interval(found['challenge'], 'mean')}</b>"
        where = escape(f"{reported.what}; 95 % intervals")
        parts.append(f'<p class="number">The number to report: {text} <span>({where})</span></p>')
    if scored.split == "val":
        parts.append(
            "<p>Figures and areas below are of the validation split, as in the report. Validation chose the checkpoint "
            "(the best of its training), so its scores are optimistic; the private test and the organisers' held-out "
            "pictures (<code>--split challenge</code>) chose nothing.</p>"
        )
    if data_splits == "authors":
        parts.append(
            "<p>Splits are the authors': pictures that several subjects saw may be trained on for one and scored for "
            "another, as in the report. That helps the score a little.</p>"
        )
    return "".join(parts)


columns = ["split", "prediction", "subject", "pictures", "median R²", "mean R²", "median r", "challenge score"]


def headline_rows(scored, of_subjects):
    """Rows of one split: of all subjects together, or of every subject."""
    counts, rows = {"all": sum(scored.n_images.values())} | scored.n_images, []
    for prediction, subjects in scored.headlines.items():
        for subject, found in subjects.items():
            if (subject == "all") == of_subjects:
                continue
            values = [("r2", "median"), ("r2", "mean"), ("r", "median"), ("challenge", "mean")]
            cells = [
                (with_interval(found[metric], value), found[metric][value]) if metric in found else ("–", "nan")
                for metric, value in values
            ]
            names = [escape(split_names[scored.split]), prediction, escape(subject)]
            rows.append([*names, (str(counts[subject]), counts[subject]), *cells])
    return rows


def headline_tables(scored, reported, ceilings, unit):
    """The numbers of all subjects beside the report's and the ceiling; then of every subject."""
    parts = list({part.split: part for part in (reported, scored) if part is not None}.values())
    rows, missing = [row for part in parts for row in headline_rows(part, False)], ("–", "nan")
    for name, (r2, challenge) in published.items():
        cells = [(show(r2), r2), missing, missing, (show(challenge, 3), challenge)]
        rows.append([name, "subject", "all", missing, *cells])
    known = ceilings[~np.isnan(ceilings)]
    if len(known):
        cells = [(show(value), value) for value in (np.median(known), np.mean(known))]
        rows.append(["noise ceiling of R²", "", "all", missing, *cells, missing, missing])
    note = (
        f"<p>Medians and means are over {unit}; “all” pools those of all subjects, “pictures” then counts one for "
        "every subject that saw it. “group” is the subject-agnostic prediction. Small numbers: 95 % intervals, from "
        "resampling the pictures. The report's challenge scores are on the organisers' held-out pictures. A click on "
        "a title sorts.</p>"
    )
    every = html_table(columns, [row for part in parts for row in headline_rows(part, True)], "subjects")
    return html_table(columns, rows, "headlines") + note + "<h3>Every subject</h3>" + every


def roi_table(scored, space):
    """Every subject and ROI."""
    columns = ["subject", "ROI group", "ROI", space.unit, "median R²", "left", "right", "median r", "challenge score"]
    if "group" in scored.scores:
        columns.append("group's median R²")
    places = dict.fromkeys((row["roi_group"], row["roi"]) for row in scored.table)
    rows = []
    found = {}
    for row in scored.table:
        key = tuple(row[name] for name in ("subject", "roi_group", "roi", "prediction", "metric", "hemisphere"))
        found[key] = row
    for subject in ["all", *space.subjects]:
        for place in places:
            cells = [escape(subject), *map(escape, place)]
            parts = [("subject", "r2", "both", "n_vertices")]
            parts += [("subject", "r2", hemi, "median") for hemi in ("both", "lh", "rh")]
            parts += [("subject", "r", "both", "median"), ("subject", "challenge", "both", "mean")]
            parts += [("group", "r2", "both", "median")] * ("group" in scored.scores)
            for *what, value in parts:
                row = found.get((subject, *place, *what))
                v = row[value] if row else np.nan
                cells.append((str(v) if value == "n_vertices" else show(v, 3), v))
            rows.append(cells)
    options = "".join(f"<option>{escape(name)}</option>" for name in ["all", *space.subjects, "every subject"])
    choice = f'<p><label>Subject: <select id="of-subject">{options}</select></label></p>'
    return choice + html_table(columns, rows, "rois")


def surface(scored, space):
    """The inflated cortex to turn, coloured by R² of a map that one chooses; nothing for pixels.

    A map is sent as one byte for every vertex of fsaverage5, a colour of the palette.
    """
    if space.unit != "vertices":
        return "<p>The data are pixels of the flat cortex, which have no place on the surface.</p>"
    import matplotlib
    from nilearn import datasets
    from nilearn.plotting import view_surf
    from nilearn.surface import load_surf_data, load_surf_mesh

    maps = r2_maps(scored.scores, scored.table, space)
    limits = fit_limits([values for _, _, values, _ in maps], symmetric=False)
    files, places, triangles, sulci = datasets.fetch_surf_fsaverage("fsaverage5"), [], [], []
    for hemi, side in (("left", -1), ("right", 1)):
        mesh = load_surf_mesh(files[f"infl_{hemi}"])
        places.append(mesh.coordinates + [side * hemisphere_gap, 0, 0])
        triangles.append(mesh.faces + n_fsaverage5 * len(triangles))
        sulci.append(load_surf_data(files[f"curv_{hemi}"]) > 0)
    colours = matplotlib.colormaps["inferno"](np.linspace(0, 1, 254))
    palette = [matplotlib.colors.to_hex(colour) for colour in (*np.array([[0.8] * 3, [0.65] * 3]), *colours)]
    codes = {title: surface_codes(values, space, limits, np.concatenate(sulci)) for title, _, values, _ in maps}
    view = view_surf(
        [np.concatenate(places), np.concatenate(triangles)], np.zeros(2 * n_fsaverage5), cmap="inferno",
        vmin=limits[0], vmax=limits[1], symmetric_cmap=False, view="back", colorbar_fontsize=12,
    )  # fmt: skip
    content = json.dumps({"palette": palette, "maps": {k: base64.b64encode(v).decode() for k, v in codes.items()}})
    content = content.replace("</", "<\\/")  # nothing in it may end the script
    options = "".join(f"<option>{escape(title)}</option>" for title in codes)
    return (
        f'<p><label>R² of: <select id="of-map">{options}</select></label> Drag to turn, scroll to zoom. Grey: not '
        f"scored; colours end at {limits[1]:g}.</p>"
        f'<iframe id="cortex" title="R² on the inflated cortex" srcdoc="{escape(view.html)}"></iframe>'
        f'<script type="application/json" id="surface-maps">{content}</script>'
    )


def surface_codes(values, space, limits, sulcus):
    """values (n_vertices,) -> (2 * n_fsaverage5,) uint8: 0 and 1 gyri and sulci without a value, 2 to 255 from the
    lower to the upper limit."""
    codes = sulcus.astype(np.uint8)
    place, left = space.vertices.numpy(), np.arange(space.n_vertices) < space.n_lh
    shown = (place < n_fsaverage5) & ~np.isnan(values)
    scaled = np.clip((values[shown] - limits[0]) / (limits[1] - limits[0]), 0, 1)
    codes[place[shown] + n_fsaverage5 * ~left[shown]] = 2 + np.round(253 * scaled).astype(np.uint8)
    return codes


def picture_parts(pictures, unit):
    """pictures: {name: path of a PNG}."""
    parts = []
    for name, path in pictures.items():
        caption = next((text for start, text in captions.items() if name.startswith(start)), "")
        caption = escape(caption.format(unit={"vertices": "vertex", "pixels": "pixel"}[unit]))
        image = f'<img alt="{caption}" src="data:image/png;base64,{base64.b64encode(shrunk(path)).decode()}">'
        parts.append(f'<figure id="{escape(name)}">{image}<figcaption>{caption}</figcaption></figure>')
    return "".join(parts)


def shrunk(path):
    """A PNG of the figure, no wider than the page shows: the files beside the page have all pixels."""
    with Image.open(path) as picture:
        small, content = picture.convert("RGB"), io.BytesIO()
        small.thumbnail((widest, 10 * widest))
        small.save(content, "PNG")
    return content.getvalue()


def facts(what):
    """Names and values, nested, as HTML."""
    rows = []
    for name, value in what.items():
        text = f"<dd>{facts(value)}</dd>" if isinstance(value, dict) else f"<dd>{escape(str(value)) or '–'}</dd>"
        rows.append(f"<dt>{escape(name)}</dt>{text}")
    return f"<dl>{''.join(rows)}</dl>"


def what_made(what):
    """What was scored and what made it; long lists are folded."""
    plain = {name: value for name, value in what.items() if not isinstance(value, (dict, list))}
    folded = {"versions": versions(), "constants of evaluate.py": what["constants"]}
    folded |= {f"checkpoint {part['path']}": part for part in what.get("checkpoints", ())}
    parts = (f"<details><summary>{escape(name)}</summary>{facts(value)}</details>" for name, value in folded.items())
    return facts(plain) + "".join(parts)


style = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 0 auto; padding: 0 16px 40px; }
h1 { font-size: 1.6em; line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
h1, p, dd, summary, figcaption { overflow-wrap: anywhere; }
.number { font-size: 1.2em; background: #eef4fa; padding: 12px 16px; border-left: 4px solid #0072b2; }
.number span { font-size: 0.85rem; color: #555; } .interval { font-size: 0.8rem; color: #555; white-space: nowrap; }
td .interval { display: block; line-height: 1.2; }
.wide { overflow: auto; max-height: 560px; border: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 0.9em; width: 100%; }
th, td { padding: 3px 10px; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }
th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
figure { margin: 2em 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: 0.9em; }
iframe { width: 100%; max-width: 880px; height: 620px; border: 1px solid #ddd; }
dl { display: grid; grid-template-columns: minmax(8em, max-content) 1fr; gap: 2px 16px; margin: 2px 0; }
dt { color: #555; } dd { margin: 0; } details { margin: 8px 0; }
@media (max-width: 500px) { dl { grid-template-columns: 1fr; } dd { margin-left: 16px; } iframe { height: 320px; } }
"""

script = r"""
for (const head of document.querySelectorAll("table.sortable th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = [...body.rows].map(row => [row.cells[column].dataset.key, row]);
    const empty = key => key === "" || key === "nan";
    keyed.sort(([a], [b]) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b;
      return up ? order : -order;
    });
    body.append(...keyed.map(([, row]) => row));
  });
}
const ofSubject = document.getElementById("of-subject");
function showSubject() {
  for (const row of document.querySelectorAll("#rois tbody tr")) {
    row.hidden = ofSubject.value !== "every subject" && row.cells[0].textContent !== ofSubject.value;
  }
}
ofSubject.addEventListener("change", showSubject);
showSubject();
const ofMap = document.getElementById("of-map");
if (ofMap) {
  const cortex = document.getElementById("cortex");
  const content = JSON.parse(document.getElementById("surface-maps").textContent);
  const paint = () => {
    const codes = atob(content.maps[ofMap.value]);
    const colours = Array.from(codes, code => content.palette[code.charCodeAt(0)]);
    const inside = cortex.contentWindow;
    inside.surfaceMapInfo.vertexcolor_both = colours;
    inside.makePlot("inflated", "both", "surface-plot");
    cortex.dataset.shows = ofMap.value;
  };
  const whenReady = () => {
    const plot = cortex.contentDocument && cortex.contentDocument.getElementById("surface-plot");
    if (!plot || !plot.data || plot.data.length < 2) return setTimeout(whenReady, 50);
    paint();
    const inside = cortex.contentWindow;  // its own handler fails on a window that has no size for a moment
    inside.$(inside).off("resize").on("resize", () => {
      if (inside.innerWidth && inside.innerHeight) inside.surfaceRelayout();
    });
  };
  whenReady();
  ofMap.addEventListener("change", paint);
}
"""


def write_report(path, what, scored, reported, ceilings, space, pictures):
    """what: {name: value} of what was scored; scored: evaluate.Scored; reported: that of the split whose number is
    the one to report, or None; ceilings (n_subjects, n_vertices); pictures: {name: path of a figure}."""
    sources = [checkpoint["path"] for checkpoint in what.get("checkpoints", ())] or [what["submission"]]
    title = f"{', '.join(sources)} on {split_names[scored.split]}"
    content = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{style}</style></head><body>
<h1>{escape(title)}</h1>
{the_number(scored, reported, what["splits"])}
<h2>Scores</h2>{headline_tables(scored, reported, ceilings, space.unit)}
<h2>On the cortex</h2>{surface(scored, space)}
<h2>Figures</h2>{picture_parts(pictures, space.unit)}
<h2>By subject and ROI</h2><p>Of {scored.what}. A click on a title sorts.</p>
{roi_table(scored, space)}
<h2>What made this</h2>{what_made(what)}
<script>{script}</script></body></html>
"""
    with write_whole(path) as file:
        file.write(content.encode())
