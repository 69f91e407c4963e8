"""Many heads on one trunk, the search, and the comparison of trunks."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import fit_pca
import prepare_data
import train_head
import training
from common import constants
from conftest import assert_equal, both, run, small
from model import Trunk


def train_together(settings, run_dir):
    """The heads of these constants on one pass of the trunk -> the training."""
    settings = [constants(vars(train_head)) | both | small | {"RUN_DIR": str(run_dir)} | own for own in settings]
    first = settings[0]
    data = prepare_data.load(first["DATA_DIR"])
    pca = fit_pca.load(first["DATA_DIR"], data)
    layers = " ".join(s["LAYERS"] for s in settings)
    trunk = Trunk(first["TRUNK"], layers, image_size=first["IMAGE_SIZE"], pretrained=False, seed=first["SEED"])
    learners = [
        train_head.new_learner(trunk, s, f"{i}.pt", data, pca, torch.device("cpu"), torch.float32)
        for i, s in enumerate(settings)
    ]
    together = training.Training("together", learners, data, pca, first, tolerant=True)
    together.run()
    return together


def test_heads_together_end_as_each_alone(fitted, tmp_path, monkeypatch):
    """Bit for bit, whatever they differ in, and stopped and continued in between."""
    shared = dict(DATA_DIR=str(fitted), VALIDATE_EVERY=4, SEED=5, MICRO_BATCH=24)
    settings = [
        shared | dict(STEPS=11, LEARNING_RATE=0.01, LAYERS="blocks.{0,2}", FEATURE_DROPOUT=0.3),
        shared | dict(STEPS=6, LEARNING_RATE=0.03, LAYERS="blocks.1", LATENT_DIM=8, PCA_DIM=10, FEATURE_DROPOUT=0.0),
        shared | dict(STEPS=9, LEARNING_RATE=0.02, LAYERS="blocks.{1,2}", MIN_LEARNING_RATE=0.001, WARMUP_STEPS=4,
                      WEIGHT_DECAY=0.9, BETAS=(0.8, 0.9)),
    ]  # fmt: skip
    for i, own in enumerate(settings):
        run(train_head, **both | small | own, RUN_DIR=str(tmp_path / f"alone_{i}"))
    train_together(settings, tmp_path / "together")
    n_steps, step = 0, torch.optim.AdamW.step

    def stopped(*arguments, **options):
        nonlocal n_steps
        n_steps += 1
        if n_steps in (2, 22):  # before the first head's end and, of the continuation, between two ends
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", stopped)
    for _ in range(2):
        with pytest.raises(SystemExit):
            train_together(settings, tmp_path / "stopped")
    train_together(settings, tmp_path / "stopped")
    for i in range(len(settings)):
        alone = tmp_path / f"alone_{i}"
        for name in ("together", "stopped"):
            assert (tmp_path / name / f"{i}.jsonl").read_bytes() == (alone / "train_head.jsonl").read_bytes()
            assert_equal(torch.load(tmp_path / name / f"{i}.pt"), torch.load(alone / "head.pt"))
