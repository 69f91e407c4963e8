"""model.py against independent references: timm's own hooks, torchvision, plain loops in float64.

No data, network or GPU needed: pytest test_model.py
"""

import numpy as np
import pytest
import timm
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from model import (
    Crops,
    Encoder,
    Head,
    Trunk,
    UserError,
    parse_layers,
    random_boxes,
    smallest_crop,
    trunk_outputs,
)  # fmt: skip

TRUNKS = {  # name: (number of prefix tokens, image size)
    "eva02_tiny_patch14_224.mim_in22k": (1, 56),
    "vit_tiny_patch16_224.augreg_in21k": (1, 64),
    "vit_small_patch14_reg4_dinov2.lvd142m": (5, 56),
    "vit_relpos_small_patch16_224.sw_in1k": (0, 64),
}


def make_head(trunk, latent_dim=12, pca_dim=7, n_subjects=3, n_vertices=20, dropout=0.0):
    torch.manual_seed(1)
    head = Head(trunk.feature_shapes, latent_dim, pca_dim, n_subjects, n_vertices, dropout)
    torch.nn.init.normal_(head.embed_weight)
    torch.nn.init.normal_(head.embed_bias)
    for projection in head.projections:  # as after training
        torch.nn.init.normal_(projection.norm.running_mean)
        torch.nn.init.uniform_(projection.norm.running_var, 0.5, 2)
        torch.nn.init.normal_(projection.norm.weight)
        torch.nn.init.normal_(projection.norm.bias)
    return head.eval()


@pytest.fixture(scope="module")
def trunk():
    return Trunk("eva02_tiny_patch14_224.mim_in22k", "0,2", 56, pretrained=False)


@pytest.mark.parametrize("name", TRUNKS)
def test_features_are_the_raw_outputs_of_the_blocks(name):
    """Against forward hooks on an unpruned timm model, prefix tokens first, no final norm."""
    n_prefix, size = TRUNKS[name]
    trunk = Trunk(name, "1,3", size, pretrained=False, seed=3)
    torch.manual_seed(3)
    reference = timm.create_model(name, num_classes=0, img_size=size).eval()
    outputs = {}
    for i in (1, 3):
        reference.blocks[i].register_forward_hook(lambda module, inputs, out, i=i: outputs.__setitem__(i, out))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        reference.forward_features(images)
        features = trunk(images)
    assert trunk.n_prefix == n_prefix
    for (n_tokens, n_channels), x, i in zip(trunk.feature_shapes, features, (1, 3)):
        assert x.shape == (2, n_tokens, n_channels) and n_tokens == n_prefix + np.prod(trunk.grid)
        assert torch.equal(x, outputs[i])


def test_trunk_is_frozen_and_stays_in_inference_mode(trunk):
    assert not any(p.requires_grad for p in trunk.parameters())
    assert not any(m.training for m in Encoder(trunk, make_head(trunk)).train().trunk.modules())
    assert len(trunk.vit.blocks) == 3  # later ones are dropped


def test_head_equals_plain_loops(trunk):
    """The report's formula, one number at a time in float64."""
    head = make_head(trunk)
    features = [torch.randn(2, *shape) for shape in trunk.feature_shapes]
    subject = torch.tensor([2, 0])
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}
    for i, s in enumerate(subject.tolist()):
        h = np.zeros(12)
        for l, x in enumerate(features):
            x = x[i].double().numpy()
            for d in range(12):
                p = 0.0
                for n in range(x.shape[0]):
                    inner = sum(weights[f"projections.{l}.channel"][d, c] * x[n, c] for c in range(x.shape[1]))
                    p += weights[f"projections.{l}.spatial"][d, n] * inner
                mean, variance = (weights[f"projections.{l}.norm.running_{k}"][d] for k in ("mean", "var"))
                scale, shift = (weights[f"projections.{l}.norm.{k}"][d] for k in ("weight", "bias"))
                h[d] += ((p - mean) / np.sqrt(variance + 1e-5) * scale + shift) / len(features)
        z = (weights["shared"] + weights["subject_weight"][s]) @ h + weights["subject_bias"][s]
        y = weights["embed_weight"] @ z + weights["embed_bias"]
        with torch.no_grad():
            ours = head.decode(head(features, subject))[i].numpy()
            group = head(features)[i].numpy()
        np.testing.assert_allclose(ours, y, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(group, weights["shared"] @ h, rtol=1e-4, atol=1e-4)


def test_parameter_counts_of_table_1():
    head = Head([(257, 768)] * 6, 1024, 2048, 8, 39_548)
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == 25_200_640
    assert sum(p.numel() for p in head.parameters()) == 106_234_492


def test_dropout_keeps_the_mean_and_follows_its_generator(trunk):
    head = make_head(trunk, dropout=0.5).train()
    features = [torch.ones(400, *shape) for shape in trunk.feature_shapes]
    draws = [head.project(features, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    without = head.eval().project(features)
    spread = draws[0].std(1) / 400**0.5
    assert ((draws[0].mean(1) - without.mean(1)).abs() < 5 * spread).all()
    assert torch.equal(head.project(features), without)  # none at evaluation


def test_batch_norm_and_maps_run_in_float32_under_autocast(trunk):
    head = make_head(trunk)
    features = [torch.randn(2, *shape) for shape in trunk.feature_shapes]
    with torch.autocast("cpu", torch.bfloat16):
        p = head.project(features)
        z = head.encode(head.combine(p), torch.tensor([0, 1]))
    assert p.dtype == z.dtype == torch.float32
    assert torch.equal(z, head.encode(head.combine(p), torch.tensor([0, 1])))


def test_replacing_parameters_shares_the_rest(trunk):
    head = make_head(trunk)
    other = head.with_parameters(subject_weight=torch.zeros(1, 7, 12), subject_bias=torch.zeros(1, 7))
    assert other.shared is head.shared and other.projections is head.projections
    assert head.subject_weight.shape[0] == 3 and set(other.state_dict()) == set(head.state_dict())
    h = torch.randn(2, 12)
    assert torch.equal(other.encode(h, torch.tensor([0, 0])), other.encode(h))


def test_encoder_of_fewer_layers_takes_them_from_a_shared_trunk(trunk):
    alone = Trunk("eva02_tiny_patch14_224.mim_in22k", "2", 56, pretrained=False)
    head = make_head(alone)
    images = torch.randint(0, 256, (3, 256, 256, 3), dtype=torch.uint8)
    encoders = Encoder(trunk, head, "2"), Encoder(alone, head)
    shared, own = (trunk_outputs(e.trunk, images, [e.latents], batch_size=2)[0] for e in encoders)
    assert torch.equal(shared, own)


def test_attention_parameters_are_all_four_projections():
    names = Trunk("eva02_tiny_patch14_224.mim_in22k", "1", 56, pretrained=False).attention_parameters()
    parts = {name.split("attn.")[1].removesuffix(".weight").removesuffix(".bias") for name in names}
    assert parts == {"q_proj", "k_proj", "v_proj", "proj"} or parts == {"qkv", "q_bias", "v_bias", "proj"}
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    assert not any("norm" in name or "mlp" in name for name in names)


@pytest.mark.parametrize("scale", [0.3, 0.8])
def test_crops_equal_torchvision(trunk, scale):
    """Antialiased bicubic resized_crop on floats, one picture at a time."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (6, 256, 256, 3), np.uint8))
    top, left, size = random_boxes(6, scale, rng)
    ours = Crops(trunk, smallest_crop(scale))(images, top, left, size)
    for i in range(6):
        reference = tv.resized_crop(
            images[i].permute(2, 0, 1).float() / 255, int(top[i]), int(left[i]), int(size[i]), int(size[i]), [56, 56],
            v2.InterpolationMode.BICUBIC, antialias=True,
        )  # fmt: skip
        reference = tv.normalize(reference, trunk.mean, trunk.std)
        torch.testing.assert_close(ours[i], reference, atol=2e-4, rtol=0)


def test_boxes_stay_inside_and_cover_the_range():
    top, left, size = random_boxes(5000, 0.8, np.random.default_rng(0))
    assert (top >= 0).all() and (left >= 0).all() and ((top + size) <= 256).all() and ((left + size) <= 256).all()
    area = (size / 256.0) ** 2
    assert size.min() >= smallest_crop(0.8) and abs(float(area.mean()) - 0.9) < 0.01
    assert (top == 0).any() and (top + size == 256).any() and not torch.equal(top, left)


def test_layers_are_block_numbers():
    assert parse_layers("4, 0,2") == parse_layers("blocks.{0,2,4}") == [0, 2, 4]
    assert parse_layers("blocks.3") == [3]
    for text in ("blocks.*", "", "a,b"):
        with pytest.raises(UserError):
            parse_layers(text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("no_such_model", "0", 56, False), "no_such_model"),
        (("resnet18", "0", 64, False), "ViT"),
        (("eva02_tiny_patch14_224.mim_in22k", "0,12", 56, False), "0 to 11"),
        (("eva02_tiny_patch14_224.mim_in22k", "0", 56, True), "pretrained weights"),
    ],
)
def test_unusable_trunks_are_refused(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        Trunk(*arguments)
