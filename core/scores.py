"""Scores of predictions. With activity y, prediction ŷ of a vertex over images and its noise ceiling c:

    R²        = 1 - sum (y - ŷ)² / sum (y - mean y)²
    r         = Pearson correlation; 0 where y or ŷ is constant
    challenge = min(max(r, 0)² / c, 1), a ceiling of 0 counting as 1e-14; its mean is the challenge score

One set of functions for training, validation and evaluation.
"""

import numpy as np
import torch

from model import UserError


def check_finite(prediction):
    if not torch.isfinite(prediction).all():
        raise UserError("the predictions are not finite numbers: the checkpoint cannot be used.")


def r2_score(activity, prediction):
    """R² per vertex, as sklearn.metrics.r2_score. (n_images, n_vertices) tensors -> (n_vertices,) float64, CPU.

    A constant vertex scores 1 if predicted exactly, else 0 (sklearn's rule); fewer than two images score NaN.
    Raises UserError if a prediction is not finite.
    """
    activity, prediction = activity.float(), prediction.float()
    check_finite(prediction)
    if len(activity) < 2:
        return torch.full(activity.shape[1:], torch.nan, dtype=torch.float64)
    residual = (activity - prediction).square_().sum(0, dtype=torch.float64)
    total = (activity - activity.mean(0)).square_().sum(0, dtype=torch.float64)
    constant = (activity == activity[0]).all(0)
    r2 = 1 - residual / total
    r2[constant] = (residual[constant] == 0).double()
    return r2.cpu()


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


def median(values):
    """Median of the numbers that are not NaN; NaN where there are none."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")


def median_r2(scores, subjects, name="r2"):
    """scores: per subject R² (n_vertices of that subject,) or None -> {name: over all, name_subj01: …}."""
    arrays = [np.array([]) if score is None else np.asarray(score) for score in scores]
    medians = {name: median(np.concatenate(arrays))}
    return medians | {f"{name}_{subject}": median(score) for subject, score in zip(subjects, arrays)}
