"""The standard approach, to compare with: ridge regression from a trunk's features to every vertex of one person.

    x   = class token (where the trunk has one) and mean of the picture's tokens of every layer, standardised
    min over W, b of  sum_i |y_i - W x_i - b|² + sum_v a_v |W_v|²

The penalty a_v of a vertex v is the one with the least squared leave-one-out error over the training pictures,
which ridge regression has in closed form: the held-out residual of picture i is e_i / (1 - H_ii) with the
residuals e and the hat matrix H of all pictures. As scikit-learn's RidgeCV with alpha_per_target, whose penalties
and predictions these are (test_ridge.py), in single precision and on a GPU too.
"""

import dataclasses

import torch

penalties = tuple(10.0**k for k in range(-3, 5))  # of one feature; times their number
at_once = 2048  # vertices, bounds memory


def pool_tokens(trunk, features):
    """features: per layer (n, n_tokens, n_channels) -> x (n, n_features) float32: of every layer the class token
    and the mean over the picture's tokens; registers are left out."""
    has_class = getattr(trunk.vit, "cls_token", None) is not None
    parts = []
    for layer, n_prefix in zip(features, trunk.n_prefix):
        if has_class and n_prefix:
            parts.append(layer[:, 0])
        parts.append(layer[:, n_prefix:].float().mean(1))
    return torch.cat([part.float() for part in parts], dim=1)


@dataclasses.dataclass
class Ridge:
    """What fit() found; predict() reads it. V: the right singular vectors of the standardised features."""

    feature_mean: torch.Tensor  # (n_features,)
    feature_deviation: torch.Tensor  # (n_features,)
    basis: torch.Tensor  # V (n_features, rank)
    coefficients: torch.Tensor  # V'W' (rank, n_vertices)
    bias: torch.Tensor  # (n_vertices,)
    penalty: torch.Tensor  # a_v (n_vertices,)


def fit(x, y, penalties=penalties):
    """x (n_pictures, n_features), y (n_pictures, n_vertices) float tensors on one device -> Ridge. penalties: to
    choose from, times n_features."""
    n, n_features = x.shape
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)  # constant features say nothing
    z, bias = ((x - mean) / deviation).double(), y.mean(0)
    is_wide = n <= n_features
    values, vectors = torch.linalg.eigh(z @ z.T if is_wide else z.T @ z)
    known = values > 1e-10 * values.max().clamp(min=1e-30)
    values, vectors = values[known], vectors[:, known]
    other = (z.T if is_wide else z) @ vectors / values.sqrt()
    left, right = (vectors, other) if is_wide else (other, vectors)  # z = left diag(sqrt(values)) right'
    candidates = torch.tensor(penalties, dtype=torch.float64, device=x.device) * n_features
    kept = values / (values + candidates[:, None])  #            (n_penalties, rank)
    unseen = 1 - 1 / n - left.square() @ kept.T  #               1 - H_ii (n_pictures, n_penalties)
    left, kept, unseen = left.to(y.dtype), kept.to(y.dtype), unseen.to(y.dtype)
    coefficients, chosen = [], []
    for part in (y - bias).split(at_once, dim=1):
        inside = left.T @ part  #                                (rank, n)
        errors = torch.stack(
            [((part - left @ (k[:, None] * inside)) / u[:, None]).square().sum(0) for k, u in zip(kept, unseen.T)]
        )  #                                                    (n_penalties, n)
        best = errors.argmin(0)
        chosen.append(candidates[best])
        coefficients.append(inside * (kept[best].T / values.sqrt()[:, None].to(y.dtype)))
    basis = right.to(x.dtype)
    return Ridge(mean, deviation, basis, torch.cat(coefficients, dim=1), bias, torch.cat(chosen))


def predict(ridge, x):
    """x (n_pictures, n_features) -> (n_pictures, n_vertices)."""
    z = (x - ridge.feature_mean) / ridge.feature_deviation
    return z @ ridge.basis @ ridge.coefficients + ridge.bias
