"""COCO's annotations of the pictures that NSD showed: cropped and scaled as the pictures were.

NSD cut squares out of COCO's pictures and showed them at 425 x 425 px. Boxes, outlines and masks here
are in pixels of these; values and their quirks are those that NSD-Flat publishes.
"""

import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from common import Problem, progress

shown = 425  # px, side of NSD's pictures
columns = ("area", "bbox", "category", "iscrowd", "segmentation", "supercategory", "target")  # of objects
fine = 5  # points per pixel along an outline, as in COCO's own masks


def annotation_files(folder):
    """{(kind, split): path} of what COCO calls annotations_trainval2017."""
    pairs = [(kind, split) for kind in ("instances", "captions") for split in ("train2017", "val2017")]
    return {pair: Path(folder) / f"{pair[0]}_{pair[1]}.json" for pair in pairs}


def read_annotations(folder, wanted):
    """COCO's four JSON files, one after another, of which the wanted pictures' part is kept.

    wanted: {(split, COCO id)}. -> {(split, COCO id): {"height", "width", "instances": [], "captions": []}}, each
    instance as in the file with "category" and "supercategory" added
    """
    found = {}
    files = annotation_files(folder)
    for (kind, split), path in progress(files.items(), "reading COCO's annotations", len(files), unit="file"):
        try:
            content = json.loads(path.read_bytes())
            pictures = {p["id"]: p for p in content["images"] if (split, p["id"]) in wanted}
            names = {c["id"]: {k: c[k] for k in ("name", "supercategory")} for c in content.get("categories", ())}
            for i, picture in pictures.items():
                size = {k: picture[k] for k in ("height", "width")}
                found.setdefault((split, i), size | {"instances": [], "captions": []})
            for a in content["annotations"]:
                if a["image_id"] not in pictures:
                    continue
                if kind == "captions":
                    found[split, a["image_id"]]["captions"].append(a["caption"])
                else:
                    name = names[a["category_id"]]
                    part = a | {"category": name["name"], "supercategory": name["supercategory"]}
                    found[split, a["image_id"]]["instances"].append(part)
        except (KeyError, TypeError, ValueError) as error:
            raise Problem(f"{path}: not COCO's annotations ({type(error).__name__}: {error}); download it again")
    missing = sorted(wanted - found.keys())
    if missing:
        some = ", ".join(f"{i} of {split}" for split, i in missing[:5])
        raise Problem(f"{folder}: {len(missing)} pictures have no annotations ({some} …), expected those of all of NSD")
    return found


def convert(picture, crop_box):
    """One picture's annotations, of read_annotations(), for its part that NSD showed.

    crop_box: (top, bottom, left, right) cut away, as fractions. -> objects {column: [one value an object]}, captions
    """
    height, width = picture["height"], picture["width"]
    top, bottom, left, right = crop_box
    corners = np.array([[left * width, top * height], [(1 - right) * width, (1 - bottom) * height]])  # x, y
    objects = {name: [] for name in columns}
    for instance in picture["instances"]:
        x, y, w, h = instance["bbox"]
        (x1, y1), (x2, y2) = crop_points([x, y, x + w, y + h], corners).tolist()
        outline = instance["segmentation"]
        if isinstance(outline, dict):
            mask = crop_mask(decode_runs(outline), corners)
            area = int(mask.sum())
            segmentation = {"counts": compress_runs(runs_of(mask)), "poly": None, "size": [shown, shown]}
        else:
            polygons = [crop_points(polygon, corners).ravel() for polygon in outline]
            area = polygon_area(polygons[0])  # of the first part alone, so it is published
            segmentation = {"counts": None, "poly": [p.tolist() for p in polygons], "size": None}
        if area:
            values = (area, [x1, y1, x2 - x1, y2 - y1], instance["category"], instance["iscrowd"])
            values += (segmentation, instance["supercategory"], instance["category_id"])
            for name, value in zip(columns, values):
                objects[name].append(value)
    return objects, picture["captions"]


def crop_points(points, corners):
    """points [x, y, x, y, …] in COCO's pixels, corners (2, 2) -> (n, 2) in NSD's, clipped, to two decimals."""
    size = np.array([round(float(side)) for side in corners[1] - corners[0]])
    inside = np.clip(np.reshape(points, (-1, 2)), *corners) - corners[0]
    return np.round(inside * (shown / size), 2)


def crop_mask(mask, corners):
    """mask (height, width) uint8 -> the part within corners, by nearest neighbours: (425, 425)."""
    (left, top), (right, bottom) = np.round(corners).astype(int)
    part = mask[top:bottom, left:right]
    return ndimage.zoom(part, [shown / side for side in part.shape], order=0, mode="mirror", grid_mode=True)


def polygon_area(polygon):
    """Pixels that COCO's tools count inside a polygon [x, y, x, y, …] on a 425 x 425 grid."""
    corners = np.floor(fine * np.asarray(polygon).reshape(-1, 2) + 0.5).astype(int)
    ends = np.roll(corners, -1, axis=0)
    length = np.abs(ends - corners)
    lying = length[:, 0] >= length[:, 1]  # edges along x step in x, the others in y
    along = np.where(lying, 0, 1)
    rows, n = np.arange(len(corners)), length.max(1) + 1
    back = corners[rows, along] > ends[rows, along]  # lines are drawn from the smaller coordinate
    start, end = (np.where(back[:, None], b, a) for a, b in ((corners, ends), (ends, corners)))
    slope = (end - start)[rows, 1 - along] / np.maximum(n - 1, 1)
    edge = np.repeat(rows, n)
    step = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
    step = np.where(back[edge], (n - 1)[edge] - step, step)
    straight = start[edge, along[edge]] + step
    across = (start[edge, 1 - along[edge]] + slope[edge] * step + 0.5).astype(int)
    x, y = np.where(lying[edge], straight, across), np.where(lying[edge], across, straight)
    moved = np.flatnonzero(np.diff(x))  # where the outline passes from one fine column to the next
    column = (np.minimum(x[moved], x[moved + 1]) + 0.5) / fine - 0.5
    row = np.ceil(np.clip((np.minimum(y[moved], y[moved + 1]) + 0.5) / fine - 0.5, 0, shown)).astype(int)
    whole = (column == np.floor(column)) & (column >= 0) & (column <= shown - 1)
    crossings = np.sort(column[whole].astype(int) * shown + row[whole])  # down the columns, one after another
    crossings = np.append(crossings, [shown * shown] * (len(crossings) % 2))
    return int((crossings[1::2] - crossings[::2]).sum())


def decode_runs(outline):
    """{"counts": lengths of runs outside, inside, outside …, down the columns, "size"} -> (height, width) uint8."""
    height, width = outline["size"]
    runs = np.array(outline["counts"])
    return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(width, height).T


def runs_of(mask):
    """mask (height, width) of 0 and 1 -> lengths of runs of 0, of 1, of 0 …, down the columns."""
    flat = mask.T.ravel().astype(int)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(changes, prepend=0, append=flat.size).tolist()


def compress_runs(runs):
    """COCO's text for runs: differences to the run but one before, 5 bits a character, least first."""
    text = ""
    for i, run in enumerate(runs):
        rest = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text
