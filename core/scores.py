"""R² of a vertex over images, 1 - sum (y - ŷ)² / sum (y - mean y)²: one function for training and all scores."""

import numpy as np
import torch

from model import UserError


def check_finite(prediction):
    if not torch.isfinite(prediction).all():
        raise UserError("the predictions are not finite (NaN or infinite): the checkpoint is unusable.")


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


def median(values):
    """Median of the numbers that are not NaN; NaN where there are none."""
    values = np.asarray(values)
    return float(np.nanmedian(values)) if (~np.isnan(values)).any() else float("nan")


def median_r2(scores, subjects, name="r2"):
    """scores: per subject R² (n_vertices of that subject,) -> {name: over all, name_subj01: …}."""
    medians = {f"{name}_{subject}": median(score) for subject, score in zip(subjects, scores)}
    return {name: median(np.concatenate(scores))} | medians
