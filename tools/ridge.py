"""Ridge regression in closed form with leave-one-out penalties, and the baseline that it gives on a trunk's features.

    min over w_j, b_j of  sum_i (t_ij - sqrt(g_j) w_j'x_i - b_j)² + a |w_j|² + c b_j²        for every column j of t

with centred x. In the singular vectors of x this separates into scalars, so that one decomposition serves all columns
and penalties. The penalties a and c have the least squared leave-one-out error: the error of picture i, when it is left
out, is e_i / (1 - H_ii) with the residuals e and the hat matrix H of all pictures.
"""

import itertools
import typing

import torch

PENALTIES = tuple(10.0**k for k in range(-3, 5))  # a, in mean |x|²: for standardised features their number


def pool_tokens(trunk, features):
    """features: per layer (n, n_tokens, n_channels) -> x (n, n_features) float32: class token (where the trunk has one)
    and mean patch token of every layer; registers are left out."""
    n_class = int(getattr(trunk.vit, "cls_token", None) is not None)
    tokens = [torch.cat([x[:, :n_class], x[:, trunk.n_prefix :].float().mean(1, keepdim=True)], 1) for x in features]
    return torch.cat(tokens, dim=1).flatten(1)


class Ridge(typing.NamedTuple):
    """The prediction of t is (x - centre) @ weight + bias."""

    centre: torch.Tensor  # mean of x (n_features,)
    weight: torch.Tensor  # (n_features, n_columns)
    bias: torch.Tensor  # b (n_columns,)
    penalty: torch.Tensor  # a (n_columns,), in mean |x|²
    mean_penalty: torch.Tensor  # c (n_columns,), in pictures


def decompose(x):
    """x (n, n_features) -> its singular vectors and values (n, rank), (rank,), (n_features, rank)."""
    if x.shape[0] > x.shape[1]:
        right, s, left = decompose(x.T)
        return left, s, right
    values, left = torch.linalg.eigh(x @ x.T)  # much faster than an SVD
    kept = values > 1e-10 * values.max()
    s, left = values[kept].sqrt(), left[:, kept]
    return left, s, x.T @ left / s


def solve(x, t, penalties, mean_penalties=(0.0,), shared=False, gains=1.0):
    """Minimise the objective above for x (n, n_features), t (n, n_columns) -> Ridge.

    Candidates are penalties for a, in mean |x|² of centred x (infinity: w = 0), and mean_penalties for c, in pictures
    (infinity: b = 0); shared: one a and one c for all columns; gains: g (n_columns,).
    """
    n, centre, t_mean = len(x), x.mean(0), t.mean(0)
    left, s, right = decompose((x - centre).double())
    left, right = left.to(t.dtype), (right / s).to(t.dtype)
    projected = left.T @ (t - t_mean)  #                                    (rank, n_columns)

    def shrink(a):
        """What the penalty leaves of every singular direction, 0 to 1: (rank, n_columns), or (rank, 1) for all."""
        energy = s[:, None].square() * gains
        return (energy / (energy + a * s.square().sum() / n)).to(t.dtype)

    errors = []
    for a in penalties:
        kept = shrink(a)
        residual = t - t_mean - left @ (kept * projected)
        leverage = left.square() @ kept
        for c in mean_penalties:
            share = n / (n + c)  # of the mean that b keeps
            left_out = (residual + (1 - share) * t_mean) / (1 - share / n - leverage)
            errors.append(left_out.square().sum(0))
    errors = torch.stack(errors)  #                                         (n_candidates, n_columns)
    best = errors.sum(1).argmin().expand(t.shape[1]) if shared else errors.argmin(0)
    penalty, mean_penalty = s.new_tensor(list(itertools.product(penalties, mean_penalties)))[best].T
    bias = (n / (n + mean_penalty)).to(t.dtype) * t_mean
    return Ridge(centre, right @ (shrink(penalty) * projected), bias, penalty, mean_penalty)


def fit(x, y, penalties=PENALTIES, mean_penalties=(0.0,), shared=False):
    """The usual encoding model: features x (n_pictures, n_features), standardised here, activity y (n_pictures,
    n_vertices) -> Ridge. The defaults are those of scikit-learn's RidgeCV with alpha_per_target: b is free."""
    std = x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # constant features predict nothing
    ridge = solve(x / std, y, penalties, mean_penalties, shared)
    return ridge._replace(centre=x.mean(0), weight=ridge.weight / std[:, None])


def predict(ridge, x):
    """x (n_pictures, n_features) -> activity (n_pictures, n_vertices)."""
    return (x - ridge.centre) @ ridge.weight + ridge.bias
