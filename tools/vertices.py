"""Areas, matching vertex spaces, the scores beside R², and bootstrap intervals over pictures. Challenge score of a
vertex with Pearson r over images and noise ceiling c: min(max(r, 0)² / c, 1), a ceiling of 0 counting as 1e-14."""

import re

import numpy as np
import pandas as pd
import torch


def find(space, other):
    """Columns here of another space's vertices, (other.n_vertices,) int64, -1 where missing."""
    here, there = (2 * s.vertices.numpy() + (np.arange(s.n_vertices) >= s.n_lh) for s in (space, other))
    return pd.Index(here).get_indexer(there)


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
            area = re.sub(r"(?<=^V\d)[vd]$|-\d$", "", name)
            if area != name:
                masks[group, area] = masks.get((group, area), False) | masks[group, name]
    return masks


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
    challenge = np.minimum(r.clamp(min=0).square().numpy() / np.maximum(ceiling, 1e-14), 1)
    scores = {"r2": r2.numpy(), "r": r.numpy(), "challenge": challenge}
    return {metric: score.astype(np.float32) for metric, score in scores.items()}


def interval(score, resampled):
    """95 % interval [low, high] of a score or difference from its resampled values (n_resamples,); None without any.

    The middle 95 % of the resampled values, moved so that their median is the score: resamples repeat pictures, which
    alone lowers R² by about 1 / n_images and raises the challenge score.
    """
    if not np.isfinite(resampled).any():
        return None
    low, high = np.nanquantile(resampled, (0.025, 0.975)) - np.nanmedian(resampled) + score
    return [float(low), float(high)]
