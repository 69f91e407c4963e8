"""The authors' weights: their file predicts by their formula, and is scored on no other splits than theirs."""

import numpy as np
import pytest
import timm
import torch

import prepare_data
from core.checkpoint import load_checkpoint
from core.space import Space
from model import UserError
from tests.conftest import run_stage
from tools import import_authors

N_VERTICES, N_COMPONENTS, LATENT_DIM, WIDTH = 9, 4, 5, 24
SUBJECTS = ["subj02", "subj05"]


@pytest.fixture(autouse=True)
def narrow_trunk(monkeypatch):
    """Their trunk, narrower, with random weights that do not depend on the seed of the moment."""
    create = timm.create_model

    def create_narrow(name, **options):
        torch.manual_seed(0)
        return create(name, **options | {"pretrained": False, "embed_dim": WIDTH, "num_heads": 2})

    monkeypatch.setattr(timm, "create_model", create_narrow)


def write_data(folder, splits, subjects=SUBJECTS, n_vertices=N_VERTICES):
    """Prepared data of ten pictures that every subject saw."""
    n = 10 * len(subjects)
    mask = torch.ones(len(subjects), n_vertices, dtype=torch.bool)
    space = Space(list(subjects), torch.arange(n_vertices), 4, mask, {})
    samples = {
        "subject": np.repeat(np.arange(len(subjects)), 10), "image": np.tile(np.arange(10), len(subjects)),
        "split": np.tile([0] * 8 + [1, 2], len(subjects)), "test_subject": [], "test_image": [],
    }  # fmt: skip
    prepare_data.write_prepared(
        folder, space=space, samples=samples, nsd_ids=np.arange(100, 110), n_training_images=10,
        activity=[np.zeros((n, n_vertices))], images=np.zeros((10, 256, 256, 3), np.uint8), splits=splits, made_with={},
    )  # fmt: skip
    return folder


def write_weights(path, phase):
    """A file in the authors' layout -> its encoder's tensors, its trunk's (None in phase 1)."""
    shapes = {
        "shared_proj.weight": (N_COMPONENTS, LATENT_DIM), "subj_proj.fc.weight": (8 * N_COMPONENTS, LATENT_DIM),
        "subj_proj.fc.bias": (8 * N_COMPONENTS,), "embed.weight": (N_VERTICES, N_COMPONENTS),
        "embed.bias": (N_VERTICES,),
    }  # fmt: skip
    for i in range(6):
        shapes[f"feat_projs.{i}.proj.weight1"] = (LATENT_DIM, 257)
        shapes[f"feat_projs.{i}.proj.weight2"] = (LATENT_DIM, WIDTH)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"feat_projs.{i}.norm.{name}"] = (LATENT_DIM,)
    torch.manual_seed(1)
    weights = {name: 0.1 + torch.rand(shape) for name, shape in shapes.items()}
    weights |= {f"feat_projs.{i}.norm.num_batches_tracked": torch.tensor(7) for i in range(6)}
    state = timm.create_model(import_authors.TRUNK, num_classes=0).state_dict()
    trunk = {name: value + 0.01 * torch.randn(value.shape) for name, value in state.items()} if phase == 2 else None
    torch.save({"epoch": 3, "metric": np.float64(0.2), "trunk": trunk, "encoder": weights}, path)
    return weights, trunk


def convert(tmp_path, data_dir, weights="theirs.pt"):
    run_stage(import_authors, WEIGHTS=tmp_path / weights, DATA_DIR=data_dir, CHECKPOINT=tmp_path / "head.pt")
    return tmp_path / "head.pt"


@torch.no_grad()
def plain_prediction(weights, trunk, images):
    """Their forward pass -> activity of subj02 and subj05, one picture each, and of the group."""
    vit = timm.create_model(import_authors.TRUNK, num_classes=0).eval()
    if trunk:
        vit.load_state_dict(trunk)
    outputs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output.double()))
    vit.forward_features(images)
    w = {name: value.double() for name, value in weights.items()}
    h = 0
    for i in range(6):
        projection = w[f"feat_projs.{i}.proj.weight1"], w[f"feat_projs.{i}.proj.weight2"], outputs[2 * i]
        p = torch.einsum("dt,dc,ntc->nd", *projection)
        norm = {name: w[f"feat_projs.{i}.norm.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        p = (p - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt()
        h = h + (p * norm["weight"] + norm["bias"]) / 6
    own = (h @ w["subj_proj.fc.weight"].T + w["subj_proj.fc.bias"]).unflatten(1, (8, N_COMPONENTS))
    own = torch.stack([own[0, 1], own[1, 4]])  # picture 0: subj02, picture 1: subj05
    embedding, bias = w["embed.weight"].T, w["embed.bias"]
    group = h @ w["shared_proj.weight"].T @ embedding + bias
    return (group + own @ embedding + bias).float(), group.float()


@pytest.mark.parametrize("phase", [1, 2])
def test_converted_weights_predict_as_the_authors_code(phase, tmp_path):
    weights, trunk = write_weights(tmp_path / "theirs.pt", phase)
    data_dir = write_data(tmp_path / "data", "authors")
    encoder, space, info = load_checkpoint(convert(tmp_path, data_dir))
    images = torch.randn(2, 3, 224, 224)
    subjects, group = plain_prediction(weights, trunk, images)
    with torch.no_grad():
        z = encoder(images, torch.tensor([0, 1]))
        torch.testing.assert_close(encoder.head.decode(z), subjects, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder.head.decode(encoder(images)), group, rtol=1e-4, atol=1e-4)
    fingerprint = prepare_data.load(data_dir).fingerprint
    assert info["made_with"]["data_fingerprint"] == fingerprint and info["finished"] and info["step"] == 3
    assert info["train_nsd_ids"].tolist() == list(range(100, 108)) and space.subjects == SUBJECTS
    with pytest.raises(UserError, match="exists"):
        convert(tmp_path, data_dir)


def test_refusals(tmp_path):
    """Other splits, other people, other vertices; a trunk that lacks weights, and a file that is not theirs."""
    _, trunk = write_weights(tmp_path / "theirs.pt", 2)
    data_dir = write_data(tmp_path / "data", "authors")
    for other in (("pictures",), ("authors", ["subj02", "sub-09"]), ("authors", SUBJECTS, 8)):
        with pytest.raises(UserError, match="authors' splits and subjects|predicts 9 vertices"):
            convert(tmp_path, write_data(tmp_path / f"other_{len(other)}", *other))
    content = torch.load(tmp_path / "theirs.pt", weights_only=False)
    partial = {name: value for name, value in trunk.items() if name != "blocks.4.norm1.weight"}
    torch.save(content | {"trunk": partial}, tmp_path / "partial.pt")
    with pytest.raises(UserError, match="without blocks.4.norm1.weight"):  # never a random one
        convert(tmp_path, data_dir, "partial.pt")
    torch.save({"weight": torch.zeros(3), "bias": torch.zeros(3)}, tmp_path / "pca.pt")
    with pytest.raises(UserError, match="not a phase 1 or phase 2 file"):
        convert(tmp_path, data_dir, "pca.pt")
    assert not (tmp_path / "head.pt").exists()
