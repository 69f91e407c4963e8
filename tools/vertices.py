"""Areas, matching vertex spaces, the scores beside R², and bootstrap intervals over pictures.

With Pearson r of a vertex over images and its noise ceiling c:

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


def draw_pictures(n_pictures, n_resamples, seed):
    """How often each resample draws each picture, with replacement: (n_resamples, n_pictures) float32. A picture that
    several subjects saw is drawn for all of them together; several predictions share the resamples."""
    counts = np.random.default_rng(seed).multinomial(n_pictures, np.full(n_pictures, 1 / n_pictures), n_resamples)
    return torch.from_numpy(counts).float()


def resampled_scores(activity, prediction, weights, ceiling):
    """Scores of every vertex with pictures repeated -> {metric: (n_resamples, n_vertices)} float32 arrays.

    activity, prediction (n_images, n_vertices), weights (n_resamples, n_images), ceiling (n_vertices,), NaN: unknown.
    Sums over pictures are matrix products with the weights, in float64. NaN without any picture.
    """
    weights, y, x = weights.double(), activity.double(), prediction.double()
    y, x = y - y.mean(0), x - y.mean(0)  # the same shift for both
    n = weights.sum(1, keepdim=True)
    n = n.where(n > 0, torch.nan)
    sum_y, sum_x, residual = weights @ y, weights @ x, weights @ (y - x).square()
    squares_y, squares_x = weights @ y.square(), weights @ x.square()
    around_y, around_x = squares_y - sum_y.square() / n, squares_x - sum_x.square() / n  # about the resample's mean
    constant_y, constant_x = around_y <= 1e-10 * squares_y, around_x <= 1e-10 * squares_x
    product = (squares_y + squares_x - residual) / 2 - sum_y * sum_x / n
    r = torch.where(constant_y | constant_x, 0, product / (around_y * around_x).sqrt()).clamp(-1, 1)
    r2 = torch.where(constant_y, (residual == 0).double(), 1 - residual / around_y)
    scores = {"r2": r2.numpy(), "r": r.numpy(), "challenge": challenge_score(r.numpy(), ceiling)}
    return {metric: score.astype(np.float32) for metric, score in scores.items()}


def interval(score, resampled):
    """95 % interval of a score, or of a difference of scores, from its resampled values (n_resamples,) -> [low, high],
    or None without any.

    The middle 95 % of the resampled values, moved so that their median is the score: resamples repeat pictures, which
    alone lowers R² by about 1 / n_images and raises the challenge score.
    """
    if not np.isfinite(resampled).any():
        return None
    low, high = np.nanquantile(resampled, (0.025, 0.975)) - np.nanmedian(resampled) + score
    return [float(low), float(high)]
