"""COCO's annotations of NSD's pictures, cropped and scaled to the 425 x 425 px that were shown, as in NSD-Flat."""

from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

SHOWN = 425  # px, side of NSD's pictures
COLUMNS = ("area", "bbox", "category", "iscrowd", "segmentation", "supercategory", "target")  # of an object


def read_annotations(folder, wanted):
    """Annotations of the wanted pictures {(split, COCO id)}, from folder/{instances,captions}_{train,val}2017.json:
    {(split, COCO id): {"height", "width", "instances": [], "captions": [], ...}}."""
    pictures = {}
    for split in ("train2017", "val2017"):
        instances, captions = (COCO(Path(folder) / f"{kind}_{split}.json") for kind in ("instances", "captions"))
        for i in [i for name, i in wanted if name == split]:
            objects = [instances.cats[instance["category_id"]] | instance for instance in instances.imgToAnns[i]]
            pictures[split, i] = instances.imgs[i] | {"instances": objects, "captions": captions.imgToAnns[i]}
    return pictures


def convert(picture, crop_box):
    """Annotations of the part of a picture that NSD showed. crop_box: (top, bottom, left, right), fractions cut away.
    -> objects {column: [value of each]}, captions [str]"""
    top, bottom, left, right = crop_box
    corners = np.array([[left, top], [1 - right, 1 - bottom]]) * [picture["width"], picture["height"]]
    objects = {name: [] for name in COLUMNS}
    for instance in picture["instances"]:
        x, y, w, h = instance["bbox"]
        (x1, y1), (x2, y2) = crop_points([x, y, x + w, y + h], corners).tolist()
        outline = instance["segmentation"]
        if isinstance(outline, dict):
            runs = coco_mask.frPyObjects(outline, *outline["size"])
            runs = coco_mask.encode(np.asfortranarray(crop_mask(coco_mask.decode(runs), corners)))
            segmentation = {"counts": runs["counts"].decode(), "poly": None, "size": [SHOWN, SHOWN]}
        else:
            polygons = [crop_points(polygon, corners).ravel().tolist() for polygon in outline]
            runs = coco_mask.frPyObjects(polygons, SHOWN, SHOWN)[0]  # NSD-Flat has the area of the first part alone
            segmentation = {"counts": None, "poly": polygons, "size": None}
        values = instance | {"area": int(coco_mask.area(runs)), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        values |= {"segmentation": segmentation, "target": instance["category_id"], "category": instance["name"]}
        if values["area"]:
            for name in COLUMNS:
                objects[name].append(values[name])
    return objects, [annotation["caption"] for annotation in picture["captions"]]


def crop_points(points, corners):
    """points [x, y, x, y, ...] in COCO's pixels, corners (2, 2) -> (n, 2) in NSD's, clipped, to two decimals."""
    inside = np.clip(np.reshape(points, (-1, 2)), *corners) - corners[0]
    return np.round(inside * (SHOWN / np.round(corners[1] - corners[0])), 2)


def crop_mask(mask, corners):
    """mask (height, width) uint8 -> the part within corners, by nearest neighbours: (425, 425)."""
    (left, top), (right, bottom) = np.round(corners).astype(int)
    part = mask[top:bottom, left:right]
    return ndimage.zoom(part, [SHOWN / side for side in part.shape], order=0, mode="mirror", grid_mode=True)
