"""Scores: R², Pearson r, the challenge score, and their summaries.

With activity y, prediction ŷ of a vertex over the n_images of a subject and its noise ceiling c:

    R²        = 1 - sum (y - ŷ)² / sum (y - mean y)²
    r         = Pearson correlation of y and ŷ; 0 where y or ŷ is constant
    challenge = min(max(r, 0)² / c, 1), c = 0 counting as 1e-14; its mean is the challenge score

Vertices that a subject lacks are never scored; a single picture gives no score.
"""

import numpy as np
import torch


def r2_score(activity, prediction):
    """R² of every vertex, as sklearn.metrics.r2_score: 1 - sum (y - ŷ)² / sum (y - mean y)².

    activity, prediction (n_images, n_vertices) tensors -> (n_vertices,) float64. A constant vertex
    scores 1 if predicted exactly, else 0 (sklearn's rule); fewer than two images score NaN.
    """
    activity, prediction = activity.float(), prediction.float()
    if len(activity) < 2:
        return torch.full(activity.shape[1:], torch.nan, dtype=torch.float64)
    residual = (activity - prediction).square_().sum(0, dtype=torch.float64)
    total = (activity - activity.mean(0)).square_().sum(0, dtype=torch.float64)
    constant = (activity == activity[0]).all(0)
    r2 = 1 - residual / total
    r2[constant] = (residual[constant] == 0).double()
    return r2.cpu()


def pearson_r(activity, prediction):
    """activity, prediction (n_images, n_vertices) tensors -> r (n_vertices,) float64, 0 where either is
    constant; NaN for fewer than two images."""
    if len(activity) < 2:
        return torch.full(activity.shape[1:], torch.nan, dtype=torch.float64)
    x, y = activity.float(), prediction.float()
    constant = (x == x[0]).all(0) | (y == y[0]).all(0)
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy, xy = ((a * b).sum(0, dtype=torch.float64) for a, b in ((x, x), (y, y), (x, y)))
    return torch.where(constant, 0, xy / (xx * yy).sqrt()).clamp(-1, 1)


def challenge_scores(r, ceiling):
    """r, ceiling (n_vertices,) -> min(max(r, 0)² / ceiling, 1), a ceiling of 0 counting as 1e-14."""
    return np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1)


def score(activity, prediction, has, ceiling):
    """{metric: (n_vertices,)} of one subject. has (n_vertices,): its vertices; the others get NaN."""
    found = {"r2": r2_score(activity, prediction).numpy(), "r": pearson_r(activity, prediction).numpy()}
    found["challenge"] = challenge_scores(found["r"], ceiling)  # NaN without a ceiling
    return {metric: np.where(has, values, np.nan) for metric, values in found.items()}


def sample_r2(activity, prediction):
    """R² of every sample over the vertices: (n_images, n_vertices) each -> (n_images,)."""
    return r2_score(activity.T, prediction.T).numpy()


def median_r2(scores, subjects, name="r2"):
    """Headline medians. scores: per subject (n_vertices of that subject,) or None without pictures
    -> {name: over all subjects and vertices, name_subj01: …}; NaN where nothing was scored."""
    known = [np.asarray(s) for s in scores if s is not None]
    whole = np.concatenate(known) if known else np.array([])
    medians = {name: finite_median(whole)}
    for subject, score in zip(subjects, scores):
        medians[f"{name}_{subject}"] = finite_median(np.array([]) if score is None else np.asarray(score))
    return medians


def finite_median(values):
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")
