"""Ridge regression from a trunk's features to the activity of every vertex: the baseline for tables and curves.

    x   = class token (where the trunk has one) and mean patch token of every layer, standardised
    min over W, b of  sum_i |y_i - W x_i - b|² + sum_v a_v |W_v|² + c |b|²

The penalties have the least squared leave-one-out error over the training pictures: the error of picture i, when it is
left out, is e_i / (1 - H_ii) with the residuals e and the hat matrix H of all pictures. By default every vertex has its
own a_v and c is 0, as in scikit-learn's RidgeCV with alpha_per_target.
"""

import dataclasses

import torch

PENALTIES = tuple(10.0**k for k in range(-3, 5))  # a, in features: times their number
VERTICES_AT_ONCE = 2048  # bounds memory


def pool_tokens(trunk, features):
    """features: per layer (n, n_tokens, n_channels) -> x (n, n_features) float32: of every layer the class token, and
    the mean patch token; registers are left out."""
    has_class = getattr(trunk.vit, "cls_token", None) is not None
    parts = []
    for layer in features:
        if has_class:
            parts.append(layer[:, 0].float())
        parts.append(layer[:, trunk.n_prefix :].float().mean(1))
    return torch.cat(parts, dim=1)


@dataclasses.dataclass
class Ridge:
    """What fit() returns and predict() reads."""

    feature_mean: torch.Tensor  # (n_features,)
    feature_std: torch.Tensor  # (n_features,)
    basis: torch.Tensor  # right singular vectors of the standardised features (n_features, rank)
    coefficients: torch.Tensor  # W' in this basis (rank, n_vertices)
    bias: torch.Tensor  # b (n_vertices,)
    penalty: torch.Tensor  # a_v (n_vertices,)
    mean_penalty: float  # c


def fit(x, y, penalties=PENALTIES, mean_penalties=(0,), shared=False):
    """Fit x (n_pictures, n_features) to y (n_pictures, n_vertices), float tensors on one device -> Ridge.

    penalties: candidates for a, times n_features; mean_penalties: for c, in pictures; shared: one a for all vertices.
    """
    n, n_features = x.shape
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # constant features predict nothing
    z, y_mean = ((x - mean) / std).double(), y.mean(0)
    wide = n <= n_features
    values, vectors = torch.linalg.eigh(z @ z.T if wide else z.T @ z)
    kept = values > 1e-10 * values.max().clamp(min=1e-30)
    values, vectors = values[kept], vectors[:, kept]
    other = (z.T if wide else z) @ vectors / values.sqrt()
    left, right = (vectors, other) if wide else (other, vectors)  #     z = left diag(sqrt(values)) right'
    candidates = torch.tensor(penalties, dtype=torch.float64, device=x.device) * n_features
    shrinkage = values / (values + candidates[:, None])  #              (n_penalties, rank)
    leverage = left.square() @ shrinkage.T  #                           (n_pictures, n_penalties)
    left, shrinkage, leverage = left.to(y.dtype), shrinkage.to(y.dtype), leverage.to(y.dtype)
    projections = left.T @ (y - y_mean)  #                              (rank, n_vertices)
    errors = []
    for columns in torch.arange(y.shape[1], device=x.device).split(VERTICES_AT_ONCE):
        centred = y[:, columns] - y_mean[columns]
        for_penalties = []
        for s, h in zip(shrinkage, leverage.T):
            residual = centred - left @ (s[:, None] * projections[:, columns])
            for_means = []
            for c in mean_penalties:
                share = n / (n + c)  #                                  of the mean that b keeps
                error = (residual + (1 - share) * y_mean[columns]) / (1 - share / n - h)[:, None]
                for_means.append(error.square().sum(0))
            for_penalties.append(torch.stack(for_means))
        errors.append(torch.stack(for_penalties))
    errors = torch.cat(errors, 2)  #                                    (n_penalties, n_mean_penalties, n_vertices)
    return errors
