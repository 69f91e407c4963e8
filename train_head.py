"""Stage 3, phase 1: train the encoding head on the frozen trunk (report, Table 2). DATA_DIR -> RUN_DIR with
head.pt, the checkpoint with the best validation median R², train_head.jsonl, a line per validation, and train_head.png,
the loss curves (report, Figure 3). The same command continues an interrupted run; torchrun uses several GPUs.
"""

from pathlib import Path
from types import SimpleNamespace

import torch

import fit_pca
import prepare_data
from core import training
from core.checkpoint import load_weights, read_checkpoint
from core.settings import choose_device, choose_precision, constants, run
from model import Encoder, Head, Trunk, UserError, parse_layers

DATA_DIR: str = "data"  # prepared data and PCA
RUN_DIR: str = "runs/base"  # output

TRUNK: str = "eva02_base_patch14_224.mim_in22k"  # timm name (report, Table 1; others: Table 4)
PRETRAINED: bool = True  # false: random weights, for tests
LAYERS: str = "0,2,4,6,8,10"  # trunk blocks (report, Table 1)
IMAGE_SIZE: int = 224  # px, input of the trunk (report, Trunk model)
LATENT_DIM: int = 1024  # (report, Table 1)
PCA_DIM: int = 0  # components used, the PCA's first; 0: all that fit_pca.py fitted (report: 2048)
INIT_FROM: str = ""  # checkpoint whose head the training starts from; empty: random

BATCH_SIZE: int = 512  # samples per optimiser step (report, Table 2)
MICRO_BATCH: int = 0  # samples at a time (gradient accumulation); 0: the whole batch; batch norm uses it, too
STEPS: int = 5000  # optimiser steps (report, Table 2)
WARMUP_STEPS: int = 250  # linear from MIN_LEARNING_RATE (report, Table 2)
LEARNING_RATE: float = 6e-4  # peak, then cosine decay (report, Table 2)
MIN_LEARNING_RATE: float = 3e-5  # at the end (report, Table 2)
BETAS: tuple[float, ...] = (0.9, 0.99)  # AdamW (report, Table 2)
WEIGHT_DECAY: float = 0.8  # on everything trainable (report, Table 2)
FEATURE_DROPOUT: float = 0.9  # of single trunk features (report, Table 2)
CROP_SCALE: float = 0.8  # smallest area of the random square crop (report, Table 2)
TRAIN_EMBEDDING: bool = False  # true: train the PCA embedding too, with the loss over vertices (report: frozen)

VALIDATE_EVERY: int = 0  # steps; 0: once per epoch
SEED: int = 0  # of initialisation, order, crops and dropout
PRECISION: str = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
COMPILE: bool = False  # true: torch.compile the trunk
OVERWRITE: bool = False  # start over even if RUN_DIR contains results


def load_inputs(settings):
    """Prepared data, PCA, device and precision by a script's constants."""
    folder, device = settings["DATA_DIR"], choose_device(settings["DEVICE"])
    data = prepare_data.load(folder)
    return data, fit_pca.load(folder, data), device, choose_precision(settings["PRECISION"], device)


def new_learner(trunk, settings, name, data, pca, device, precision):
    """A new head on this trunk, ready to train. settings: this script's constants; name: of the checkpoint."""
    s, n_components = SimpleNamespace(**settings), pca.components.shape[1]
    if s.PCA_DIM > n_components:
        raise UserError(f"PCA_DIM is {s.PCA_DIM}, but the PCA in {s.DATA_DIR} has {n_components} components.")
    pca_dim = s.PCA_DIM or n_components
    torch.manual_seed(s.SEED)
    shapes = [trunk.feature_shapes[trunk.layers.index(layer)] for layer in parse_layers(s.LAYERS)]
    head = Head(shapes, s.LATENT_DIM, pca_dim, len(data.space.subjects), data.space.n_vertices)
    if s.INIT_FROM:
        load_weights(s.INIT_FROM, head, read_checkpoint(s.INIT_FROM)["head"])
    pca.components, pca.mean = pca.components.to(device), pca.mean.to(device)  # one copy for all heads
    components = pca.components if pca_dim == n_components else pca.components[:, :pca_dim].contiguous()
    encoder = Encoder(trunk, head.with_parameters(embed_weight=components, embed_bias=pca.mean), s.LAYERS)
    made_from = {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    return training.Learner(encoder, settings, name, made_from, device, precision)


def main():
    settings = constants(globals())
    training.check_settings(settings)
    data, pca, device, precision = load_inputs(settings)
    trunk = Trunk(TRUNK, LAYERS, IMAGE_SIZE, PRETRAINED, SEED)
    learner = new_learner(trunk, settings, Path("head.pt"), data, pca, device, precision)
    training.Run("train_head", [learner], data, pca, settings).run()


if __name__ == "__main__":
    run(main, globals(), many=True)
