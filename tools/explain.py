"""What every vertex sees: receptive fields of the whole cortex, and what each place of a picture adds to an ROI.

A prediction is exactly a sum over layers l and tokens n, that is, places of the picture (docs/explain.md):

    y = constant + sum_l sum_n k_l[n],    k_l[n] = sum_d g[d] a_l[d] S_l[d,n] (W_l x_l[n])[d],    g = E (A + B_s)

with a_l the slope of batch norm and of the mean over layers. OUTPUT_DIR gets

    fields.npz, fields_{lh,rh}.func.gii, fields.png    where every vertex looks, and in which layers
    contributions.npz, 000_photo.png                   with IMAGES: k of every ROI; the picture with its explanation
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import prepare_data
from core.files import output_folder
from core.scores import r2_score
from core.settings import progress, run
from model import UserError, trunk_outputs
from predict import choose_checkpoints, load_encoder
from tools.flatmap import FlatMap, fit_limits, save_figure
from tools.pictures import find_pictures, plural, read_batches, report
from tools.predict_pictures import list_pictures, save_gifti, save_vertices

DATA_DIR: str = "data"  # prepared data: reference pictures, and activity for R²
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # one file; empty: finetuned.pt in RUN_DIR, else head.pt
SUBJECT: str = ""  # a name or group; empty: the checkpoint's first subject
SPLIT: str = "val"  # train, val or test: where reference pictures come from
N_REFERENCE: int = 300  # reference pictures at most
IMAGES: str = ""  # pictures to explain: files, folders and globs, separated by commas; empty: fields only
ROIS: tuple[str, ...] = ("V1v", "FFA", "PPA")  # ROIs, or rows of fields.npz such as 17; 17+18+19 is their mean
OUTPUT_DIR: str = "explanations"  # output
FIGURES: int = 20  # draw explanations of up to so many pictures
MIN_R2: float = 0.05  # vertices below are left out of fields.png
OUTLINES: str = "prf-visualrois"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
BATCH_SIZE: int = 16  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace explanations that exist

CHUNK = 1024  # vertices at a time


class Decomposition:
    """y[v] = constant[v] + sum_l sum_n sum_d weights[v,d] terms[l,n,d] for some columns of the common space.

    constant (n_vertices,), weights (n_vertices, latent_dim). The head's functions are the only source of both, so that
    other affine ones are followed; for others check() raises UserError.
    """

    def __init__(self, encoder, subject, columns):
        self.encoder, self.subject, self.columns = encoder, subject, columns
        n_layers, latent_dim = len(encoder.layers), encoder.head.shared.shape[1]
        device = encoder.head.shared.device
        offset = encoder.head.combine(torch.zeros(n_layers, 1, latent_dim, device=device))
        layers = torch.eye(n_layers, device=device)[:, :, None].expand(-1, -1, latent_dim)  # one layer at a time is 1
        self.slopes = encoder.head.combine(layers) - offset  #                    (n_layers, latent_dim)
        basis = torch.eye(latent_dim, device=device)
        self.constant = self.predict(offset)[0]
        self.weights = (self.predict(basis) - self.predict(0 * offset)).T.contiguous()

    def predict(self, h):
        return self.encoder.predict(h, self.subject)[:, self.columns]

    def terms(self, features):
        """The trunk's features -> (n, n_layers, n_tokens, latent_dim); as Head.project, but not summed over tokens."""
        terms = []
        for projection, x, slope in zip(self.encoder.head.projections, self.encoder.choose(features), self.slopes):
            y = F.linear(x, projection.channel)
            terms.append(slope * (y * projection.spatial.T.to(y.dtype)).float())
        return torch.stack(terms, 1)

    def __call__(self, images, precision):
        """images (n, 256, 256, 3) uint8 -> terms, and latents h (n, latent_dim)."""
        functions = [self.terms, self.encoder.latents]
        terms, h = trunk_outputs(self.encoder.trunk, images, functions, len(images), precision)
        self.check(terms, h)
        return terms, h

    def check(self, terms, h):
        expected = self.predict(h)
        error = (self.constant + terms.sum((1, 2)) @ self.weights.T - expected).abs().max()
        if not error <= 1e-4 * max(1, expected.abs().max()):
            raise UserError(
                f"the contributions of layers and places miss the prediction by {error:.2g}: explanations need a head "
                "in model.py that is affine in every projected feature."
            )


class Covariance:
    """Covariance over pictures of each token's and each layer's contribution with the vertex's prediction."""

    def __init__(self, decomposition):
        self.weights, self.n, self.terms, self.h, self.products = decomposition.weights, 0, 0, 0, 0

    def add(self, terms, h):
        """terms (n, n_layers, n_tokens, latent_dim), h (n, latent_dim)"""
        if not self.n:
            self.origin = h.mean(0)  # keeps rounding small
        h = h - self.origin
        self.n, self.terms, self.h = self.n + len(h), self.terms + terms.sum(0), self.h + h.sum(0)
        parts = torch.cat([terms.sum(1), terms.sum(2)], 1)  #                     (n, n_tokens + n_layers, latent_dim)
        products = []
        for weights in self.weights.split(CHUNK):
            products.append(torch.einsum("nkv,nv->kv", parts @ weights.T, h @ weights.T))
        self.products = self.products + torch.cat(products, 1).double()

    def result(self):
        """-> covariance of tokens (n_tokens, n_vertices) and layers (n_layers, n_vertices), and mean terms."""
        terms, h = self.terms / self.n, self.h / self.n
        means = torch.cat([terms.sum(0), terms.sum(1)]) @ self.weights.T
        covariance = (self.products / self.n - means * (h @ self.weights.T)).cpu().numpy()
        return *np.split(covariance, [terms.shape[1]]), terms


def describe_fields(tokens, layers, encoder):
    """Covariances -> {name: array}, the vertices first; see docs/explain.md. NaN where the prediction is constant."""
    n_prefix, (n_rows, n_columns) = encoder.trunk.n_prefix, encoder.trunk.grid
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = (layers / tokens.sum(0)).T
        depth = np.clip(shares, 0, None) @ encoder.layers / np.clip(shares, 0, None).sum(1)
        field = np.clip(tokens[n_prefix:], 0, None).T
        field = field / field.sum(1, keepdims=True)
        row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
        x, y = (column + 0.5) / n_columns, (row + 0.5) / n_rows
        variance = field @ x**2 - (field @ x) ** 2 + field @ y**2 - (field @ y) ** 2
        return {
            "x": field @ x,
            "y": field @ y,
            "size": np.sqrt(variance / 2),
            "depth": depth,
            "layer_share": shares,
            "prefix_share": tokens[:n_prefix].sum(0) / tokens.sum(0),
            "field": field.reshape(-1, n_rows, n_columns).astype(np.float16),
        }


def reference_r2(predictor, data, subject, columns, rows, latents):
    """R² (n_vertices,) on the reference samples; NaN for the group and for vertices without activity."""
    r2 = np.full(predictor.space.n_vertices, np.nan)
    if subject is not None ...
