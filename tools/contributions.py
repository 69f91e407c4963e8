"""A prediction is exactly a sum over layers l and tokens n, that is, places of the picture (docs/explain.md):

y = constant + sum_l sum_n k_l[n],    k_l[n] = sum_d g[d] a_l[d] S_l[d,n] (W_l x_l[n])[d],    g = E (A + B_s)
"""

import numpy as np
import torch
import torch.nn.functional as F

from core.settings import progress
from model import UserError, trunk_outputs


class Decomposition:
    """y = constant + sum_l sum_n terms[l,n] @ weights.T for the vertices (columns) of a subject (an index or None).
    constant (n_vertices,), weights (n_vertices, latent_dim), slopes (n_layers, latent_dim): measured on the head."""

    def __init__(self, encoder, subject, columns):
        self.encoder, self.subject, self.columns, head = encoder, subject, columns, encoder.head
        one = torch.eye(len(encoder.layers), device=head.shared.device)[:, :, None].expand(-1, -1, head.shared.shape[1])
        offset = head.combine(torch.zeros_like(one[:, :1]))  #                     (1, latent_dim)
        self.slopes = head.combine(one) - offset  #                                (n_layers, latent_dim)
        self.constant, zero = self.predict(offset)[0], self.predict(torch.zeros_like(offset))
        self.weights = (self.predict(torch.eye(offset.shape[1], device=offset.device)) - zero).T.contiguous()

    def predict(self, h):
        return self.encoder.predict(h, self.subject)[:, self.columns]

    def terms(self, features):
        """The trunk's features -> (n, n_layers, n_tokens, latent_dim): FeatureProjection before its sum over tokens."""
        terms = []
        for projection, x, slope in zip(self.encoder.head.projections, self.encoder.choose(features), self.slopes):
            y = F.linear(x, projection.channel)
            terms.append(slope * (y * projection.spatial.T.to(y.dtype)).float())
        return torch.stack(terms, 1)

    def __call__(self, images, precision):
        """images (n, 256, 256, 3) uint8 -> terms, latents h (n, latent_dim). UserError if they miss the prediction."""
        functions = [self.terms, self.encoder.latents]
        terms, h = trunk_outputs(self.encoder.trunk, images, functions, len(images), precision)
        expected = self.predict(h)
        error = (self.constant + terms.sum((1, 2)) @ self.weights.T - expected).abs().max()
        if not error <= 1e-4 * max(1, expected.abs().max()):
            raise UserError(f"contributions are off by {error:.2g}: the head is not affine in the features.")
        return terms, h


def measure_covariance(decomposition, images, precision, batch_size=16):
    """Covariance over pictures of contributions with the prediction -> of tokens (n_tokens, n_vertices), of layers
    (n_layers, n_vertices), mean terms (n_layers, n_tokens, latent_dim), and latents (n, latent_dim)."""
    weights, products, terms_sum, latents = decomposition.weights, 0, 0, []
    for start in progress(range(0, len(images), batch_size), desc="reference pictures", unit="batch"):
        terms, h = decomposition(images[start : start + batch_size], precision)
        latents.append(h)
        terms_sum = terms_sum + terms.sum(0)
        parts = torch.cat([terms.sum(1), terms.sum(2)], 1)  #                     (n, n_tokens + n_layers, latent_dim)
        h = h - latents[0].mean(0)  # keeps rounding small
        chunks = [torch.einsum("nkv,nv->kv", parts @ w.T, h @ w.T) for w in weights.split(1024)]
        products = products + torch.cat(chunks, 1).double()
    terms, h = terms_sum / len(images), torch.cat(latents)
    mean_parts = torch.cat([terms.sum(0), terms.sum(1)]) @ weights.T
    covariance = products / len(images) - mean_parts * ((h.mean(0) - latents[0].mean(0)) @ weights.T)
    return *np.split(covariance.cpu().numpy(), [terms.shape[1]]), terms, h


def describe_fields(tokens, layers, encoder):
    """Covariances -> {name: array}, vertices first, as in docs/explain.md; NaN where the prediction is constant."""
    n_prefix, grid = encoder.trunk.n_prefix, encoder.trunk.grid
    y, x = (np.indices(grid).reshape(2, -1) + 0.5) / np.reshape(grid, (2, 1))  #  (n_places,) each
    with np.errstate(invalid="ignore", divide="ignore"):
        field = np.clip(tokens[n_prefix:], 0, None).T
        field /= field.sum(1, keepdims=True)  #                                   (n_vertices, n_places)
        share = (layers / tokens.sum(0)).T  #                                     (n_vertices, n_layers)
        positive = np.clip(share, 0, None)
        depth = positive @ encoder.layers / positive.sum(1)
        prefix_share = tokens[:n_prefix].sum(0) / tokens.sum(0)
    size = np.sqrt((field @ (x**2 + y**2) - (field @ x) ** 2 - (field @ y) ** 2) / 2)
    fields = dict(x=field @ x, y=field @ y, size=size, depth=depth, layer_share=share, prefix_share=prefix_share)
    return fields | dict(layers=encoder.layers, field=field.reshape(-1, *grid).astype(np.float16))
