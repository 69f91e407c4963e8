"""Ridge regression in closed form with leave-one-out penalties, and the baseline that it gives on a trunk's features.

    min over w_j, b_j of  sum_i (t_ij - sqrt(g_j) w_j'x_i - b_j)² + a |w_j|² + c b_j²        for every column j of t

with centred x. In the singular vectors of x this separates into scalars, so that one decomposition serves all columns
and penalties. The penalties a and c have the least squared leave-one-out error: the error of picture i, when it is left
out, is e_i / (1 - H_ii) with the residuals e and the hat matrix H of all pictures.

fit() is the usual encoding model: g = 1, t the activity of every vertex, x a trunk's pooled features, standardised. By
default every vertex has a penalty of its own and b is free, as in scikit-learn's RidgeCV with alpha_per_target.
"""

import dataclasses

import torch

PENALTIES = tuple(10.0**k for k in range(-3, 5))  # a, in mean |x|²: for standardised features their number
COLUMNS_AT_ONCE = 2048  # bounds memory


def pool_tokens(trunk, features):
    """features: per layer (n, n_tokens, n_channels) -> x (n, n_features) float32: class token (where the trunk has one)
    and mean patch token of every layer; registers are left out."""
    has_class = getattr(trunk.vit, "cls_token", None) is not None
    parts = []
    for layer in features:
        if has_class:
            parts.append(layer[:, 0].float())
        parts.append(layer[:, trunk.n_prefix :].float().mean(1))
    return torch.cat(parts, dim=1)


@dataclasses.dataclass
class Ridge:
    """The prediction of t is (x - centre) @ basis @ coefficients + bias."""

    centre: torch.Tensor  # mean of x (n_features,)
    basis: torch.Tensor  # (n_features, rank)
    coefficients: torch.Tensor  # (rank, n_columns)
    bias: torch.Tensor  # b (n_columns,)
    penalty: torch.Tensor  # a (n_columns,), in mean |x|²
    mean_penalty: torch.Tensor  # c (n_columns,), in pictures


def decompose(x):
    """x (n, n_features) -> its singular vectors and values (n, rank), (rank,), (n_features, rank)."""
    wide = x.shape[0] <= x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = values > 1e-10 * values.max().clamp(min=1e-30)
    s, vectors = values[kept].sqrt(), vectors[:, kept]
    other = (x.T if wide else x) @ vectors / s
    return (vectors, s, other) if wide else (other, s, vectors)


def solve(x, t, penalties, mean_penalties=(0.0,), shared=False, gains=None):
    """Minimise the objective above -> Ridge.

    x (n, n_features); t (n, n_columns); penalties: candidates for a, in mean |x|² of centred x (infinity: w = 0);
    mean_penalties: for c, in pictures (infinity: b = 0); shared: one a and one c for all columns; gains: g (n_columns,).
    """
    (n, n_columns), centre = t.shape, x.mean(0)
    left, s, basis = decompose((x - centre).double())
    unit, pairs = s.square().sum() / n, s.new_tensor([(a, c) for a in penalties for c in mean_penalties])
    left, basis, t_mean = left.to(t.dtype), (basis / s).to(t.dtype), t.mean(0)
    projected = left.T @ (t - t_mean)  #                                    (rank, n_columns)
    parts = [slice(start, start + COLUMNS_AT_ONCE) for start in range(0, n_columns, COLUMNS_AT_ONCE)]

    def shrinkage(part, a):
        """What the penalty leaves of every singular direction, 0 to 1: (rank, n_columns of the part), or (rank, 1)."""
        energy = s[:, None].square() * (gains[part] if gains is not None else 1)
        return (energy / (energy + a * unit)).to(t.dtype)

    errors = torch.empty(len(pairs), n_columns, dtype=t.dtype, device=t.device)
    for part in parts:
        for i, a in enumerate(penalties):
            kept = shrinkage(part, a)
            residual = t[:, part] - t_mean[part] - left @ (kept * projected[:, part])
            leverage = left.square() @ kept
            for j, c in enumerate(mean_penalties):
                share = n / (n + c)  # of the mean that b keeps
                left_out = (residual + (1 - share) * t_mean[part]) / (1 - share / n - leverage)
                errors[i * len(mean_penalties) + j, part] = left_out.square().sum(0)
    best = errors.sum(1).argmin().expand(n_columns) if shared else errors.argmin(0)
    penalty, mean_penalty = pairs[best].T
    slopes = [shrinkage(part, penalty[part]) * projected[:, part] for part in parts]
    bias = (n / (n + mean_penalty)).to(t.dtype) * t_mean
    return Ridge(centre, basis, torch.cat(slopes, 1), bias, penalty, mean_penalty)


def fit(x, y, penalties=PENALTIES, mean_penalties=(0.0,), shared=False):
    """Features x (n_pictures, n_features), activity y (n_pictures, n_vertices) -> Ridge; options as those of solve()."""
    std = x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # constant features predict nothing
    ridge = solve(x / std, y, penalties, mean_penalties, shared)
    return dataclasses.replace(ridge, centre=x.mean(0), basis=ridge.basis / std[:, None])


def predict(ridge, x):
    """x (n_pictures, n_features) -> activity (n_pictures, n_vertices)."""
    return (x - ridge.centre) @ ridge.basis @ ridge.coefficients + ridge.bias
