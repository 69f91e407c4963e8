"""Areas, matching vertex spaces, and the scores beside R². With Pearson r of a vertex over images and its noise ceiling c:

challenge = min(max(r, 0)² / c, 1), a ceiling of 0 counting as 1e-14; its mean is the challenge score
"""

import re

import numpy as np
import torch

from core.scores import check_finite


def find(space, other):
    """Columns here of another space's vertices, (other.n_vertices,) int64, -1 where missing."""
    keys = [2 * s.vertices.numpy() + (np.arange(s.n_vertices) >= s.n_lh) for s in (space, other)]
    place = {int(key): column for column, key in enumerate(keys[0])}
    return np.array([place.get(int(key), -1) for key in keys[1]], np.int64)


def roi_labels(space, group, subject=None):
    """Labels (n_vertices,) of a subject; the group's are those that most subjects give a vertex."""
    labels = space.rois[group]["labels"].numpy()
    if subject is not None:
        return labels[subject]
    values = np.unique(labels)
    votes = [((labels == value) & space.mask.numpy()).sum(0) for value in values]
    return values[np.argmax(votes, axis=0)]


def roi_masks(space, subject=None):
    """{(ROI group, ROI): (n_vertices,) bool}: all vertices, each group's ROIs together and singly, and whole areas
    that are labelled in parts: V1 of V1v and V1d, FFA of FFA-1 and FFA-2."""
    present = space.present(subject)
    masks = {("all", "all"): present}
    for group, roi in space.rois.items():
        labels = roi_labels(space, group, subject)
        masks[group, "all"] = present & (labels > 0)
        names = {value: name for value, name in roi["names"].items() if value > 0}
        masks |= {(group, name): present & (labels == value) for value, name in names.items()}
        for name in names.values():
            part = re.fullmatch(r"(?P<whole>V\d)[vd]|(?P<area>.+)-\d", name)
            if part:
                area = group, part["whole"] or part["area"]
                masks[area] = masks.get(area, False) | masks[group, name]
    return masks


def pearson(activity, prediction):
    """Pearson r per vertex. (n_images, n_vertices) tensors -> (n_vertices,) float64, CPU; 0 where either is constant."""
    x, y = activity.float(), prediction.float()
    check_finite(y)
    if len(x) < 2:
        return torch.full(x.shape[1:], torch.nan, dtype=torch.float64)
    constant = (x == x[0]).all(0) | (y == y[0]).all(0)
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy, xy = ((a * b).sum(0, dtype=torch.float64) for a, b in ((x, x), (y, y), (x, y)))
    return torch.where(constant, 0, xy / (xx * yy).sqrt()).clamp(-1, 1).cpu()


def challenge_score(r, ceiling):
    """r, ceiling (n_vertices,) arrays, ceilings as fractions -> (n_vertices,), 0 to 1."""
    return np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1)
