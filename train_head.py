"""Stage 3, phase 1: train the encoding head on the frozen trunk (report, Table 2).

Reads DATA_DIR (prepared data, PCA); writes RUN_DIR/head.pt, the checkpoint that is best by
validation median R², train_head.jsonl, one JSON object per validation, and train_head.png, the
loss curves (report, Figure 3). Stopped at any moment, the same command continues.

torchrun --nproc_per_node N train_head.py shares the work between N GPUs, with the same result. The loop is
training.py's, which finetune.py runs too.
"""

from types import SimpleNamespace

import torch

import fit_pca
import prepare_data
import training
from common import Problem, choose_device, choose_precision, constants, run_script
from model import Encoder, Head, Trunk, match_layers

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = "runs/base"  # checkpoint, log and curves are written there

TRUNK = "eva02_base_patch14_224.mim_in22k"  # timm name (report, Table 1; others: Table 4)
PRETRAINED = True  # false: random weights, for tests
LAYERS = "blocks.{0,2,4,6,8,10}"  # module names or patterns (report, Table 1)
IMAGE_SIZE = 224  # px, input of the trunk (report, Trunk model)
LATENT_DIM = 1024  # (report, Table 1)
PCA_DIM = 0  # components used, the PCA's first; 0: all that fit_pca.py fitted (report: 2048)

BATCH_SIZE = 512  # samples per optimiser step (report, Table 2)
MICRO_BATCH = 0  # samples at a time; 0: the whole batch. Less needs less GPU memory; batch norm sees it
STEPS = 5000  # optimiser steps (report, Table 2)
WARMUP_STEPS = 250  # linear from MIN_LEARNING_RATE (report, Table 2)
LEARNING_RATE = 6e-4  # peak, then cosine decay (report, Table 2)
MIN_LEARNING_RATE = 3e-5  # at the end (report, Table 2)
BETAS = (0.9, 0.99)  # AdamW (report, Table 2)
WEIGHT_DECAY = 0.8  # on everything trainable (report, Table 2)
FEATURE_DROPOUT = 0.9  # of single trunk features (report, Table 2)
CROP_SCALE = 0.8  # smallest area of the random square crop (report, Table 2)
TRAIN_EMBEDDING = False  # true: train the PCA embedding too, loss in vertex space (report: frozen)

VALIDATE_EVERY = 0  # steps; 0: once per epoch-equivalent
SEED = prepare_data.SEED  # governs initialisation, order, crops and dropout
PRECISION = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
COMPILE = False  # true: torch.compile the trunk; takes minutes first, and a compiler (docs/performance.md)
OVERWRITE = False  # start anew although RUN_DIR holds this stage's results


def new_head(trunk, settings, data, pca):
    """A head for these data, from the constants' seed. settings: a namespace of this script's constants."""
    s = settings
    n_components = pca.components.shape[1]
    if s.PCA_DIM > n_components:
        raise Problem(f"PCA_DIM is {s.PCA_DIM}, but {s.DATA_DIR} has a PCA of {n_components}: run fit_pca.py with more")
    pca_dim = s.PCA_DIM or n_components
    torch.manual_seed(s.SEED)
    layers = match_layers(trunk.layers, s.LAYERS)
    shapes = [trunk.feature_shapes[trunk.layers.index(layer)] for layer in layers]
    head = Head(shapes, s.LATENT_DIM, pca_dim, len(data.space.subjects), data.space.n_vertices, s.FEATURE_DROPOUT)
    components = pca.components if pca_dim == n_components else pca.components[:, :pca_dim].contiguous()
    head.set_embedding(components, pca.mean)
    return head


def new_learner(trunk, settings, name, data, pca, device, precision):
    """A new head on this trunk, ready to be trained. settings: this script's constants; the trunk has their
    LAYERS and perhaps more; name: of the checkpoint."""
    encoder = Encoder(trunk, new_head(trunk, SimpleNamespace(**settings), data, pca), settings["LAYERS"])
    made_from = {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    return training.Learner(encoder, settings, name, made_from, device, precision)


def main():
    settings = constants(globals())
    training.check_settings(settings)
    data = prepare_data.load(DATA_DIR)
    pca = fit_pca.load(DATA_DIR, data)
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    trunk = Trunk(TRUNK, LAYERS, image_size=IMAGE_SIZE, pretrained=PRETRAINED, seed=SEED)
    learner = new_learner(trunk, settings, "head.pt", data, pca, device, precision)
    training.Training("train_head", [learner], data, pca, settings).run()


if __name__ == "__main__":
    run_script(main, globals(), many_processes=True)
