"""Predictions: the challenge's, those of own pictures, contrasts, from Python, and what refuses them."""

import numpy as np
import pytest
import timm
import torch

import finetune
import predict
import prepare_data
from common import Problem
from conftest import both, run


@pytest.fixture
def published(fitted, tmp_path, monkeypatch):
    """A phase 1 file in the authors' layout for the simulated vertices, on a narrower trunk of theirs."""
    create, n_vertices = timm.create_model, prepare_data.load(fitted).space.n_vertices

    def narrow(*arguments, pretrained, **options):
        return create(*arguments, **options, pretrained=False, embed_dim=24, num_heads=2)

    monkeypatch.setattr(timm, "create_model", narrow)
    generator, shapes = torch.Generator().manual_seed(0), {}
    for i in range(6):
        shapes |= {f"feat_projs.{i}.proj.weight1": (5, 257), f"feat_projs.{i}.proj.weight2": (5, 24)}
        shapes |= {f"feat_projs.{i}.norm.{n}": (5,) for n in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"shared_proj.weight": (4, 5), "subj_proj.fc.weight": (8 * 4, 5), "subj_proj.fc.bias": (8 * 4,)}
    shapes |= {"embed.weight": (n_vertices, 4), "embed.bias": (n_vertices,)}
    weights = {name: 0.1 + torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {f"feat_projs.{i}.norm.num_batches_tracked": torch.tensor(7) for i in range(6)}
    torch.save({"epoch": 3, "metric": np.float64(0.2), "trunk": None, "encoder": weights}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_authors_weights_are_scored_on_their_splits_only(published, fitted, challenge, tmp_path, capsys):
    options = dict(DATA_DIR=str(fitted), CHECKPOINT=str(published), SUBMISSION_DIR=str(tmp_path / "submission"))
    run(predict, **options)
    out = capsys.readouterr().out
    assert "no private test scores" in out and "--splits authors" in out and "median R²\n" not in out
    assert (tmp_path / "submission/submission.zip").exists() and not published.with_name("theirs_scores.json").exists()
    with pytest.raises(Problem, match="theirs.pt holds the authors' weights.* val pictures"):
        run(finetune, DATA_DIR=str(fitted), CHECKPOINT=str(published), RUN_DIR=str(tmp_path / "run"), **both, STEPS=3)
    assert not (tmp_path / "run").exists()

    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "theirs"), SPLITS="authors")
    run(predict, **options | dict(DATA_DIR=str(tmp_path / "theirs"), SUBMISSION_DIR=str(tmp_path / "other")))
    assert "no private" not in capsys.readouterr().out and published.with_name("theirs_scores.json").exists()
