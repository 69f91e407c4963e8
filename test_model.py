"""All tests: pytest test_model.py. No network, no GPU, two cores.

Every test compares with something independent (plain loops in float64, scikit-learn, torchvision,
Pillow, the files of the challenge folder) or with an identity. The stages run for real on a small
simulated folder, once for all tests; what they leave is looked at from several sides.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported

import ast
import copy
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.decomposition
import sklearn.metrics
import timm
import torch
import torchvision.transforms.v2.functional as vision
from PIL import Image
from torch import nn

import demo
import finetune
import fit_pca
import model
import predict
import prepare_data
import train_head
from common import Problem, constants, run_script
from model import Crops, Encoder, Head, Trunk

here = Path(__file__).parent
TINY = "eva02_tiny_patch14_224.mim_in22k"


def run(stage, **values):
    """The stage's real main() with these constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(stage, name, value)  # refuses a name that the stage does not have
        stage.main()


def run_process(script, *arguments):
    """The stage as a user starts it."""
    return subprocess.run(
        [sys.executable, here / script, *map(str, arguments)], capture_output=True, text=True, timeout=200
    )


# ---- head ---------------------------------------------------------------------------------------

feature_shapes = [(5, 3), (4, 6)]  # (n_tokens, n_channels) of two layers
latent_dim, pca_dim, n_subjects, n_vertices = 6, 4, 3, 7


def small_head(seed=0):
    """A head in float64 whose every number is random, batch norm's included."""
    generator = torch.Generator().manual_seed(seed)
    head = Head(feature_shapes, latent_dim, pca_dim, n_subjects, n_vertices).double()
    for name, values in head.state_dict().items():
        if values.is_floating_point():
            random = torch.rand(values.shape, generator=generator, dtype=torch.float64)
            values.copy_(random + 0.5 if "running_var" in name else 2 * random - 1)
    basis = torch.linalg.qr(torch.randn(n_vertices, pca_dim, generator=generator, dtype=torch.float64))[0]
    head.set_embedding(basis, torch.randn(n_vertices, generator=generator, dtype=torch.float64))
    return head


def random_features(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in feature_shapes]


def plain_head(head, features, subject):
    """DESIGN.md section 3, one number at a time -> z (n, pca_dim), y (n, n_vertices)."""
    n = len(features[0])
    h = np.zeros((n, latent_dim))
    for projection, x in zip(head.projections, features):
        x = x.numpy()
        s, w = projection.spatial.detach().numpy(), projection.channel.detach().numpy()
        norm = projection.norm
        p = np.zeros((n, latent_dim))
        for i in range(n):
            for d in range(latent_dim):
                for token in range(x.shape[1]):
                    p[i, d] += s[d, token] * sum(w[d, c] * x[i, token, c] for c in range(x.shape[2]))
        for d in range(latent_dim):
            mean, var = norm.running_mean[d].item(), norm.running_var[d].item()
            if head.training:
                mean = sum(p[:, d]) / n
                var = sum((p[:, d] - mean) ** 2) / n
            scaled = (p[:, d] - mean) / math.sqrt(var + norm.eps)
            h[:, d] += (scaled * norm.weight[d].item() + norm.bias[d].item()) / len(features)
    a, b = head.shared.detach().numpy(), head.subject_weight.detach().numpy()
    bias, e, mean = (v.detach().numpy() for v in (head.subject_bias, head.embed_weight, head.embed_bias))
    z, y = np.zeros((n, pca_dim)), np.zeros((n, n_vertices))
    for i in range(n):
        for k in range(pca_dim):
            z[i, k] = sum(a[k, d] * h[i, d] for d in range(latent_dim))
            if subject is not None:
                s = subject[i]
                z[i, k] += sum(b[s, k, d] * h[i, d] for d in range(latent_dim)) + bias[s, k]
        for v in range(n_vertices):
            y[i, v] = sum(e[v, k] * z[i, k] for k in range(pca_dim)) + mean[v]
    return z, y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("group", [False, True])
def test_head_is_the_formula(training, group):
    head, features = small_head().train(training), random_features(11)
    subject = None if group else torch.arange(11) % n_subjects
    z, y = plain_head(head, features, subject)
    running = [p.norm.running_mean.clone() for p in head.projections]
    found = head(features, subject)
    torch.testing.assert_close(found.detach().numpy(), z, rtol=1e-10, atol=1e-10)  # float64 throughout
    torch.testing.assert_close(head.decode(found, group=group).detach().numpy(), y, rtol=1e-10, atol=1e-10)
    for before, projection in zip(running, head.projections):  # statistics follow in training only
        assert torch.equal(before, projection.norm.running_mean) != training
    found = copy.deepcopy(head).float()([x.float() for x in features], subject)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().numpy(), z.astype(np.float32), rtol=1e-4, atol=1e-5)  # float32


def test_head_gradients_are_the_numerical_ones():
    head, features = small_head().train(), random_features(9)
    subject = torch.arange(9) % n_subjects
    names = [name for name, p in head.named_parameters() if p.requires_grad]

    def z(*values):
        parameters = dict(zip(names, values))
        # batch norm's running statistics change in place, so every call gets its own
        buffers = {name: b.clone() for name, b in head.named_buffers()}
        return torch.func.functional_call(head, parameters | buffers, (values[len(names) :], subject))

    inputs = [head.get_parameter(n).detach() for n in names] + features  # phase 2 needs features too
    torch.autograd.gradcheck(z, [v.clone().requires_grad_() for v in inputs], fast_mode=True)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_head_in_half_precision(precision):
    head, features, subject = small_head().float().train(), random_features(64), torch.arange(64) % n_subjects
    exact = head([x.float() for x in features], subject)
    expected = torch.autograd.grad(exact.square().mean(), [p for p in head.parameters() if p.requires_grad])
    with torch.autocast("cpu", precision):
        z = head([x.float() for x in features], subject)
    found = torch.autograd.grad(z.square().mean(), [p for p in head.parameters() if p.requires_grad])
    assert z.dtype == torch.float32
    for a, b in zip((z, *found), (exact, *expected)):  # bfloat16 has 8 bits, sums even out the rest
        assert (a - b).norm() < (0.02 if precision == torch.bfloat16 else 0.003) * b.norm() + 1e-6


def test_parameter_counts_and_initialisation():
    with torch.device("meta"):
        base = Encoder(nn.Identity(), Head([(257, 768)] * 6, 1024, 2048, 8, 39548, 0.9))
    assert base.n_parameters() == (25_200_640, 106_234_492)  # DESIGN.md section 3
    assert {n for n, p in base.head.named_parameters() if not p.requires_grad} == {"embed_weight", "embed_bias"}
    torch.manual_seed(0)
    head = Head([(30, 50)], 40, 60, 3, 9)
    fan_in = {"projections.0.spatial": 30, "projections.0.channel": 50}
    fan_in |= dict.fromkeys(("shared", "subject_weight", "subject_bias"), 40)
    for name, n in fan_in.items():  # uniform in +-1/sqrt(fan-in), as nn.Linear
        values = head.get_parameter(name).detach() * n**0.5
        assert 0.97 < values.abs().max() <= 1.0001 and abs(values.square().mean() - 1 / 3) < 0.05, name


def test_dropout_takes_single_features():
    """With all weights 1 the projection sums 32 features of 1, of which dropout leaves a binomial number."""
    head = Head([(4, 8)], 1, 1, 1, 1, dropout=0.9).train()
    with torch.no_grad():
        for p in (head.projections[0].spatial, head.projections[0].channel, head.shared):
            p.fill_(1)
    head.projections[0].norm.eval()
    torch.manual_seed(0)
    n = 20000
    kept = head([torch.ones(n, 4, 8)]).detach().flatten() * 0.1 * math.sqrt(1 + 1e-5)
    assert (kept - kept.round()).abs().max() < 2e-3  # the rounding of p to 1/65536
    # four standard errors of a mean and a variance of n binomial(32, 0.1) numbers
    assert abs(kept.mean() - 3.2) < 4 * math.sqrt(2.88 / n)
    assert abs(kept.var() - 2.88) < 4 * 2.88 * math.sqrt(2 / n) + 1e-2
    assert torch.equal(head.eval()([torch.ones(2, 4, 8)]).round(), torch.full((2, 1), 32.0))


@pytest.mark.parametrize("space", ["pca", "vertices"])
def test_loss_is_the_mean_over_all_vertices(space):
    """Value and gradients of every trainable parameter; targets have parts outside of the basis."""
    y = torch.randn(6, n_vertices, generator=torch.Generator().manual_seed(2))
    plain, head, subject = small_head().train(), small_head().train(), torch.tensor([0, 2, 1, 1, 0, 2])
    z, features = plain(random_features(6), subject), random_features(6)
    expected = ((z @ plain.embed_weight.T + plain.embed_bias - y) ** 2).mean()
    expected.backward()
    if space == "pca":
        centred = y - head.embed_bias.detach()
        target = centred @ head.embed_weight.detach()
        outside = centred.square().sum(1) - target.square().sum(1)
        assert outside.min() > 0.1
        batch = {"latents": target, "residual": outside}
    else:  # this loss is float32 throughout
        head, features, batch = head.float(), [x.float() for x in features], {"activity": y}
    loss = train_head.loss_of(head, head(features, subject), batch)
    loss.backward()
    found = {n: p.grad.double() for n, p in head.named_parameters() if p.requires_grad}
    assert len(found) == 2 * 4 + 3
    # in PCA space only the targets are rounded to float32, all else is float64
    tolerance = dict(rtol=1e-6, atol=1e-7) if space == "pca" else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **tolerance)
    torch.testing.assert_close(found, {n: plain.get_parameter(n).grad for n in found}, **tolerance)


# ---- trunk --------------------------------------------------------------------------------------

vit_attention = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
beit_attention = ["q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"]
eva_attention = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias", "proj.weight", "proj.bias"]
table_4 = {  # tokens at 224 px, class token included, and the weights that phase 2 trains
    "vit_base_patch16_224.mae": (197, vit_attention),
    "vit_base_patch16_224.dino": (197, vit_attention),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": (197, vit_attention),
    "vit_base_patch16_clip_224.openai": (197, vit_attention),
    "vit_base_patch14_dinov2.lvd142m": (257, vit_attention),
    "vit_base_patch16_clip_224.laion2b": (197, vit_attention),
    "beitv2_base_patch16_224.in1k_ft_in22k": (197, beit_attention),
    "eva02_base_patch14_224.mim_in22k": (257, eva_attention),
    "eva02_base_patch16_clip_224.merged2b": (197, eva_attention),
}


@pytest.mark.parametrize("name", table_4)
def test_trunk_is_timm_with_hooks(name, monkeypatch):
    n_tokens, attention = table_4[name]
    # the report's own at full depth; of the others 4 blocks, which are alike, for speed
    depth, layers, used = (12, train_head.LAYERS, range(0, 11, 2)) if name == train_head.TRUNK else (4, "blocks.{0,2}", (0, 2))
    create, whole = timm.create_model, []

    def create_and_keep(*arguments, **options):
        vit = create(*arguments, **options, depth=depth)
        for parameter_name, p in vit.named_parameters():
            if "gamma" in parameter_name:
                nn.init.constant_(p, 0.3)  # from 1e-5, at which every block gives nearly its input
        whole.append(copy.deepcopy(vit).eval())
        return vit

    monkeypatch.setattr(timm, "create_model", create_and_keep)
    trunk = Trunk(name, layers, pretrained=False).train()
    assert trunk.feature_shapes == [(n_tokens, 768)] * len(used)
    assert (trunk.mean, trunk.std) == (timm.get_pretrained_cfg(name).mean, timm.get_pretrained_cfg(name).std)
    assert not any(p.requires_grad for p in trunk.parameters())
    kept = range(used[-1] + 1)  # nothing above the last block in use
    assert {n.split(".")[2] for n, _ in trunk.named_parameters() if ".blocks." in n} == set(map(str, kept))
    assert set(trunk.attention_parameters()) == {f"vit.blocks.{i}.attn.{n}" for i in kept for n in attention}

    expected = {}
    for i, block in enumerate(whole[0].blocks):
        block.register_forward_hook(lambda block, args, output, i=i: expected.update({i: output}))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = trunk(images)
        whole[0].forward_features(images)
    assert len(expected) == depth and len(found) == len(used)
    for i, x in zip(used, found):  # the same operations; room for another order of sums
        torch.testing.assert_close(x, expected[i], rtol=1e-5, atol=1e-5)
        assert (x - expected[i + 1]).abs().max() > 0.01


def test_layer_patterns():
    names = ["patch_embed", *(n for i in range(12) for n in (f"blocks.{i}", f"blocks.{i}.attn", f"blocks.{i}.attn.proj"))]

    def blocks(*numbers, inside=""):
        return [f"blocks.{i}{inside}" for i in numbers]

    for pattern, expected in {
        "blocks.{0,2,10}": blocks(0, 2, 10),
        "blocks.{0..3}": blocks(0, 1, 2, 3),
        "blocks.7 blocks.3": blocks(3, 7),  # in the trunk's order
        "blocks.*": blocks(*range(12)),  # whole blocks, not what is in them
        "blocks.1?": blocks(10, 11),
        "blocks.{2,5}.*": blocks(2, 5, inside=".attn"),
        "blocks.*.attn": blocks(*range(12), inside=".attn"),
    }.items():
        assert model.match_layers(names, pattern) == expected, pattern
    for pattern, nothing in {"blocks.{0,12}": "blocks.12", "blocks.0 blocks.9'": "blocks.9'", "patch*": "patch*"}.items():
        with pytest.raises(Problem) as problem:
            model.match_layers(names, pattern)
        assert f"layer pattern {nothing} " in str(problem.value) and "blocks.0 … blocks.11" in str(problem.value)


@pytest.mark.parametrize(
    "name, layers, message",
    [
        ("resnet50", "blocks.0", "resnet50 has no transformer blocks"),
        ("swin_tiny_patch4_window7_224", "blocks.0", "has no transformer blocks"),
        ("eva02_tiny_patch14_224.mim_in2k", "blocks.0", f"unknown trunk .*near it: {TINY}"),
        (TINY, "blocks.{0,30}", "layer pattern blocks.30 .*matches nothing"),
        (TINY, "", "names no layer"),
    ],
)
def test_unusable_trunks_are_refused(name, layers, message):
    with pytest.raises(Problem, match=message):
        Trunk(name, layers, image_size=56, pretrained=False)


def test_trunk_weights_come_from_the_seed_or_a_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Problem, match=rf"weights/{TINY}.safetensors"):  # no network: says where to put it
        Trunk(TINY, "blocks.0", image_size=56)
    seeds = [Trunk(TINY, "blocks.0", image_size=56, pretrained=False, seed=s).state_dict() for s in (3, 3, 4)]
    assert all(torch.equal(v, seeds[1][n]) for n, v in seeds[0].items())
    assert not torch.equal(*(s["vit.patch_embed.proj.weight"] for s in seeds[1:]))

    from safetensors.torch import save_file

    torch.manual_seed(5)
    there = timm.create_model(TINY, pretrained=False)
    (tmp_path / "weights").mkdir()
    save_file({n: v.contiguous() for n, v in there.state_dict().items()}, tmp_path / "weights" / f"{TINY}.safetensors")
    trunk = Trunk(TINY, "blocks.{0,3}")
    expected = []
    there.blocks[3].register_forward_hook(lambda block, args, output: expected.append(output))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        there.eval().forward_features(images)
        torch.testing.assert_close(trunk(images)[1], expected[0], rtol=1e-5, atol=1e-5)


# ---- crops --------------------------------------------------------------------------------------


def plain_input(picture, trunk, box=None):
    """torchvision: picture (256, 256, 3) uint8, box (top, left, side) or None -> (3, size, size)."""
    x = torch.tensor(np.asarray(picture)).permute(2, 0, 1).double()
    options = dict(size=[trunk.image_size] * 2, interpolation=vision.InterpolationMode.BICUBIC, antialias=True)
    x = vision.resize(x, **options) if box is None else vision.resized_crop(x, *box, box[2], **options)
    return vision.normalize(x / 255, trunk.mean, trunk.std).float()


@pytest.mark.parametrize("crop_scale, image_size", [(0.8, 224), (0.3, 224), (0.5, 56)])
def test_crops_are_torchvisions(crop_scale, image_size):
    rng = np.random.default_rng(0)
    trunk = SimpleNamespace(image_size=image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images = torch.from_numpy(rng.integers(0, 256, (6, 256, 256, 3), dtype=np.uint8))
    smallest = model.smallest_crop(crop_scale)
    assert (smallest < image_size) == (crop_scale == 0.3)  # which enlarges
    crops = Crops(trunk, smallest)
    top, left, size = model.random_boxes(6, crop_scale, rng)
    size[0], size[1] = smallest, 256
    top[1] = left[1] = 0
    top[2], left[3] = 256 - size[2], 256 - size[3]  # at the border
    found = crops(images, top, left, size)
    for i, x in enumerate(found):
        expected = plain_input(images[i], trunk, (top[i].item(), left[i].item(), size[i].item()))
        # torchvision runs in float64, its float32 is off by 1e-4; a grey level is 0.02 here
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    for x, image in zip(Crops(trunk).whole(images), images):
        torch.testing.assert_close(x, plain_input(image, trunk), rtol=0, atol=1e-5)


def test_random_boxes():
    n, scale = 20000, 0.3
    top, left, size = (v.numpy() for v in model.random_boxes(n, scale, np.random.default_rng(0)))
    assert size.min() == model.smallest_crop(scale) == 140 and size.max() == 256
    for start in (top, left):
        assert start.min() == 0 and ((start + size) <= 256).all() and ((start + size)[size < 200] == 256).any()
    area = np.sort(size**2 / 256**2)
    uniform = np.linspace(scale, 1, n)
    assert np.abs(area - uniform).max() < 0.02  # Kolmogorov-Smirnov at 5 sigma, and whole pixels
    part = np.array([start[size < 200] / (256 - size[size < 200]) for start in (top, left)])
    assert np.abs(part.mean(1) - 0.5).max() < 0.02  # 5 standard errors are 0.015
    assert abs(np.corrcoef(part)[0, 1]) < 0.05  # 5 standard errors; drawn independently
    with pytest.raises(Problem, match="CROP_SCALE is 0"):
        model.smallest_crop(0)


# ---- scores -------------------------------------------------------------------------------------


def test_r2_is_scikit_learns():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((50, 12)).astype(np.float32)
    prediction = (0.5 * y + rng.standard_normal(y.shape)).astype(np.float32)
    y[:, 3] = 0.1  # constant: 0
    y[:, 4] = prediction[:, 4] = 0.1  # constant and predicted exactly: 1
    y[:, 5] += 100  # far from zero
    prediction[:, 5] += 100
    found = model.r2_score(torch.from_numpy(y), torch.from_numpy(prediction))
    expected = sklearn.metrics.r2_score(y.astype(float), prediction.astype(float), multioutput="raw_values")
    assert (found[3], found[4]) == (0, 1) and found.dtype == torch.float64
    # a mean of 100 leaves float32 5 digits of the deviations from it
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    half = model.r2_score(torch.from_numpy(y).half(), torch.from_numpy(prediction))  # as stored
    expected = sklearn.metrics.r2_score(y.astype(np.float16).astype(float), prediction.astype(float), multioutput="raw_values")
    np.testing.assert_allclose(half, expected, rtol=0, atol=1e-5)


def test_headline_is_the_median_over_existing_vertices():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 40)) < 0.8
    y, prediction = (rng.standard_normal((3, 30, 40)).astype(np.float32) for _ in range(2))
    scores = [model.r2_score(*map(torch.from_numpy, pair))[m] for *pair, m in zip(y, prediction, mask)]
    expected = [sklearn.metrics.r2_score(a[:, m], b[:, m], multioutput="raw_values") for a, b, m in zip(y, prediction, mask)]
    subjects = ["subj02", "subj05", "subj08"]
    found = model.median_r2(scores, subjects, "val_r2")
    assert list(found) == ["val_r2"] + [f"val_r2_{s}" for s in subjects]
    np.testing.assert_allclose(list(found.values()), [np.median(np.concatenate(expected)), *map(np.median, expected)], atol=1e-6)
    # one picture has no R², as in scikit-learn; it and a subject without any leave the rest alone
    single = model.r2_score(torch.ones(1, 40), torch.zeros(1, 40))
    assert single.shape == (40,) and single.isnan().all()
    found = model.median_r2([scores[0], single, None], subjects)
    assert np.isclose(found["r2"], np.median(expected[0])) and found["r2"] == found["r2_subj02"]
    assert math.isnan(found["r2_subj05"]) and math.isnan(found["r2_subj08"])


# ---- splits, order, schedule --------------------------------------------------------------------


def challenge_pictures(seed=0):
    """Who saw what at full size: (n_pictures, 8) bool, 1,000 shared pictures, about a tenth of which
    those with fewer sessions missed."""
    n_training = np.array([9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779])
    shared = np.random.default_rng(seed).random((1000, 8)) < n_training / 9841
    own = np.repeat(np.eye(8, dtype=bool), n_training - shared.sum(0), axis=0)
    return np.concatenate([shared, own])[np.random.default_rng(seed + 1).permutation(1000 + len(own))]


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_at_full_size(seed):
    seen = challenge_pictures(seed)
    assert seen.sum() == 75086  # samples (DESIGN.md section 4)
    split = prepare_data.split_pictures(seen, seed)
    assert split.shape == (len(seen),)  # one for everybody who saw the picture
    for who, tolerance in [*((subject, 0.01) for subject in seen.T), (seen.sum(1) > 1, 0.03)]:  # shared: 1,000
        parts = np.bincount(split[who], minlength=3) / who.sum()
        np.testing.assert_allclose(parts, [0.85, 0.10, 0.05], rtol=tolerance)
    assert np.array_equal(split, prepare_data.split_pictures(seen, seed))
    other = prepare_data.split_pictures(seen, seed + 1)
    # two independent splits agree on 0.85² + 0.1² + 0.05² = 73.5 % of pictures
    assert abs(np.mean(other == split) - 0.735) < 0.01


@pytest.mark.parametrize("batch_size", [4, 25])
def test_sample_order(batch_size):
    order = np.concatenate([train_head.sample_order(step, batch_size, 10, seed=3) for step in range(100 // batch_size)])
    epochs = order.reshape(10, 10)  # batches of 4 cross the ends of epochs, those of 25 span them
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len(np.unique(epochs, axis=0)) == 10
    assert np.array_equal(order[-batch_size:], train_head.sample_order(100 // batch_size - 1, batch_size, 10, seed=3))
    assert not np.array_equal(order[:batch_size], train_head.sample_order(0, batch_size, 10, seed=4))


def test_defaults_and_schedule_are_the_reports():
    head = dict(TRUNK="eva02_base_patch14_224.mim_in22k", LAYERS="blocks.{0,2,4,6,8,10}", LATENT_DIM=1024)  # Table 1
    common = dict(BETAS=(0.9, 0.99), WEIGHT_DECAY=0.8, FEATURE_DROPOUT=0.9, CROP_SCALE=0.8)
    phase_1 = dict(BATCH_SIZE=512, LEARNING_RATE=6e-4, STEPS=5000, WARMUP_STEPS=250, MIN_LEARNING_RATE=3e-5)  # Table 2
    phase_2 = dict(BATCH_SIZE=192, LEARNING_RATE=1e-5, STEPS=2000, WARMUP_STEPS=100, MIN_LEARNING_RATE=0)  # Table 3
    assert constants(vars(train_head)).items() >= (head | common | phase_1).items()
    assert constants(vars(finetune)).items() >= (common | phase_2).items()
    assert fit_pca.PCA_DIM == 2048
    for step, rate in {
        0: 3e-5,
        125: 3e-5 + (6e-4 - 3e-5) / 2,  # half of the way up
        250: 6e-4,
        250 + 4750 // 4: 3e-5 + (6e-4 - 3e-5) * (1 + math.cos(math.pi * (4750 // 4) / 4750)) / 2,
        250 + 4750 // 2: 3e-5 + (6e-4 - 3e-5) / 2,
        5000: 3e-5,
    }.items():
        assert math.isclose(train_head.learning_rate(step, train_head), rate, rel_tol=1e-9), step
    assert train_head.learning_rate(0, finetune) == 0 and train_head.learning_rate(100, finetune) == 1e-5


class Patches(nn.Module):
    """Stands in for a trunk: 4 x 4 px patches, and their squares, as features."""

    image_size, mean, std = 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)

    def forward(self, images):
        x = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return [x, x**2]  # (n, 4, 48) each


@pytest.mark.parametrize("micro_batch", [3, 4, 8])
def test_micro_batches_add_up_to_the_batch(micro_batch):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = Encoder(Patches(), Head([(4, 48)] * 2, 5, 3, 2, 9)).eval()  # batch norm's statistics fixed
    batch = dict(zip(("top", "left", "size"), model.random_boxes(8, 0.5, rng, source=16)))
    batch["images"] = torch.from_numpy(rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    batch["subject"] = torch.arange(8) % 2
    batch |= {"latents": torch.randn(8, 3), "residual": torch.rand(8)}
    crops = Crops(encoder.trunk, model.smallest_crop(0.5, source=16), source=16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = train_head.backward(encoder, crops, batch, torch.float32, scaler, micro_batch)
    found = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.requires_grad}
    encoder.zero_grad()
    images = crops(*(batch[name] for name in ("images", "top", "left", "size")))
    error = encoder(images, batch["subject"]) - batch["latents"]
    expected = ((error**2).sum(1) + batch["residual"]).mean() / 9
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)  # float32 sums in another order
    torch.testing.assert_close(found, {n: encoder.get_parameter(n).grad for n in found}, rtol=1e-4, atol=1e-6)


# ---- constants ----------------------------------------------------------------------------------


def override(monkeypatch, stage, *arguments):
    """A copy of the stage's globals after the command line."""
    namespace = dict(vars(stage))
    monkeypatch.setattr(sys, "argv", [stage.__file__, *arguments])
    run_script(lambda: None, namespace)
    return namespace


def test_constants_from_the_command_line(monkeypatch, capsys):
    arguments = "--batch-size 7 --warmup_steps=3 --learning_rate 1e-3 --betas 0.5,0.75 --train-embedding true --pretrained FALSE"
    changed = override(monkeypatch, train_head, *arguments.split(), "--layers", "blocks.{0,2} blocks.5")
    expected = dict(BATCH_SIZE=7, WARMUP_STEPS=3, LEARNING_RATE=1e-3, BETAS=(0.5, 0.75), TRAIN_EMBEDDING=True)
    expected |= dict(PRETRAINED=False, LAYERS="blocks.{0,2} blocks.5")
    before, after = constants(vars(train_head)), constants(changed)
    assert after == before | expected and before["BATCH_SIZE"] == 512
    assert {n: type(v) for n, v in after.items()} == {n: type(v) for n, v in before.items()}
    for stage in (prepare_data, fit_pca, train_head, finetune, predict, demo):  # every constant is in --help
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            override(monkeypatch, stage, "--help")
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(f"--{n.lower()} " in text for n in constants(vars(stage)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps many", "--steps is 'many', expected a whole number, such as 5000"),
        ("--steps 1.5", "--steps is '1.5'"),
        ("--pretrained yes", "--pretrained is 'yes', expected true or false"),
        ("--betas 0.9,x", "--betas is '0.9,x', expected numbers"),
        ("--step 5", "--step"),  # no abbreviations
        ("5", "5"),
    ],
)
def test_wrong_constants_are_refused(arguments, message, monkeypatch):
    with pytest.raises(SystemExit) as end:
        override(monkeypatch, train_head, *arguments.split())
    assert end.value.code.startswith("error: ") and message in end.value.code


def test_unknown_constant_ends_the_process(tmp_path):
    process = run_process("finetune.py", "--run_dir", tmp_path / "run", "--stepz", "5")
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    assert "--stepz" in process.stderr and "--warmup_steps" in process.stderr and "Traceback" not in process.stderr


# ---- the pipeline on a simulated folder ---------------------------------------------------------


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "challenge"
    demo.simulate(folder, n_train=40, n_test=5, picture_size=80, vertex_step=16, seed=1)
    return folder


def original(challenge, subject):
    """A subject's files, read plainly."""
    folder = challenge / subject
    return SimpleNamespace(
        pictures=sorted((folder / "training_split/training_images").iterdir()),
        test_pictures=sorted((folder / "test_split/test_images").iterdir()),
        activity={h: np.load(folder / f"training_split/training_fmri/{h}_training_fmri.npy") for h in ("lh", "rh")},
        mask={h: np.load(folder / f"roi_masks/{h}.all-vertices_fsaverage_space.npy") == 1 for h in ("lh", "rh")},
    )


def nsd_id(path):
    return int(path.stem.split("nsd-")[1])


@pytest.fixture(scope="module")
def subjects(challenge):
    return {path.name: original(challenge, path.name) for path in sorted(challenge.iterdir())}


def columns_of(subjects):
    """{subject: {hemi: columns of the union of these subjects' vertices, left hemisphere first}}."""
    union = {h: np.logical_or.reduce([s.mask[h] for s in subjects.values()]) for h in ("lh", "rh")}
    first = {"lh": 0, "rh": union["lh"].sum()}
    return {
        name: {h: first[h] + np.flatnonzero(s.mask[h][union[h]]) for h in ("lh", "rh")} for name, s in subjects.items()
    }


@pytest.fixture(scope="module")
def prepared(challenge):
    """All subjects, prepared."""
    folder = challenge.parent / "data"
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(folder), SEED=3)
    return folder


@pytest.fixture(scope="module")
def fitted(prepared):
    run(fit_pca, DATA_DIR=str(prepared), PCA_DIM=24, PASSES=30, chunk_rows=50)
    return prepared


def trained(stage, **values):
    """Run a training stage -> the encoder it trained, its weights before, names of what was trainable,
    the batches it saw."""
    seen = SimpleNamespace()
    train, backward = train_head.train, train_head.backward

    def spy(*arguments):
        (encoder,) = (a for a in arguments if isinstance(a, Encoder))
        seen.encoder, seen.before, seen.batches = encoder, copy.deepcopy(encoder.state_dict()), []
        train(*arguments)
        seen.trainable = {n for n, p in encoder.named_parameters() if p.requires_grad}

    def spy_batch(encoder, crops, batch, *arguments):
        seen.batches.append({name: values.clone() for name, values in batch.items()})
        return backward(encoder, crops, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_head, "train", spy)
        patch.setattr(train_head, "backward", spy_batch)
        run(stage, **values)
    return seen


common = dict(BATCH_SIZE=48, WARMUP_STEPS=2, FEATURE_DROPOUT=0.2, WEIGHT_DECAY=0.1, PRECISION="float32", DEVICE="cpu")
tiny_trunk = dict(TRUNK=TINY, PRETRAINED=False, LAYERS="blocks.{0,2}", IMAGE_SIZE=56, LATENT_DIM=16)


@pytest.fixture(scope="module")
def phase_1(fitted):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"))
    return trained(train_head, **folders, **common, **tiny_trunk, STEPS=8, VALIDATE_EVERY=3, LEARNING_RATE=0.01)


@pytest.fixture(scope="module")
def phase_2(phase_1, fitted):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"))
    return trained(finetune, **folders, **common, STEPS=4, LEARNING_RATE=0.001)


@pytest.fixture(scope="module")
def submission(phase_2, fitted):
    """Predictions of finetuned.pt by the script as a user starts it."""
    folder, run_dir = fitted.parent / "submission", fitted.parent / "run"
    process = run_process(
        "predict.py", "--data_dir", fitted, "--run-dir", run_dir, "--submission_dir", folder, "--batch-size", 5,
        "--precision", "float32", "--device=cpu",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert f"predicting with {run_dir / 'finetuned.pt'}" in process.stdout
    return folder


def test_prepared_data_are_the_files(prepared, subjects):
    data, columns = prepare_data.load(prepared), columns_of(subjects)
    assert data.space.subjects == list(subjects) == [f"subj{i:02d}" for i in range(1, 9)]
    split_of_id, picture_of_id = {}, {}
    for s, (name, files) in enumerate(subjects.items()):
        rows = np.flatnonzero(data.subject == s)
        assert len(rows) == len(files.pictures)
        expected = np.zeros((len(rows), data.space.n_vertices), np.float32)  # missing vertices: zero
        for hemi in ("lh", "rh"):
            expected[:, columns[name][hemi]] = files.activity[hemi]
            assert np.array_equal(data.space.hemisphere(s, hemi), columns[name][hemi])
        found = data.read_activity(rows)
        assert found.dtype == np.float16 and np.array_equal(found, expected.astype(np.float16))
        present = np.concatenate(list(columns[name].values()))
        assert np.array_equal(np.flatnonzero(data.space.mask[s]), present)
        for row, path in zip(rows, files.pictures):
            split_of_id.setdefault(nsd_id(path), set()).add(data.split[row])
            picture_of_id.setdefault(nsd_id(path), set()).add(data.image[row])
            picture = Image.open(path).resize((256, 256), Image.Resampling.BICUBIC)
            assert np.array_equal(data.images[data.image[row]], picture)
        for row, path in zip(np.flatnonzero(data.test_subject == s), files.test_pictures, strict=True):
            picture = Image.open(path).resize((256, 256), Image.Resampling.BICUBIC)
            assert np.array_equal(data.images[data.test_image[row]], picture)
        assert all(len(data.samples(split, s)) for split in ("train", "val", "test"))
    assert data.space.mask[5].sum() < data.space.mask[7].sum() < data.space.n_vertices  # subj06, subj08
    assert all(len(found) == 1 for by_id in (split_of_id, picture_of_id) for found in by_id.values())
    assert len(picture_of_id) == data.n_training_images < len(data.subject)  # shared ones are there once
    assert np.array_equal(data.read_training_images(), data.images[: data.n_training_images])


def test_regions_are_the_files(prepared, challenge, subjects):
    space, columns = prepare_data.load(prepared).space, columns_of(subjects)
    assert set(space.rois) == {"streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words"}
    for group, roi in space.rois.items():
        for s, name in enumerate(subjects):
            masks = challenge / name / "roi_masks"
            assert roi["names"] == np.load(masks / f"mapping_{group}.npy", allow_pickle=True).item()
            for hemi in ("lh", "rh"):
                labels = np.load(masks / f"{hemi}.{group}_challenge_space.npy")
                assert np.array_equal(roi["labels"][s, columns[name][hemi]], labels)
            assert not roi["labels"][s, ~space.mask[s]].any()


def test_float16_storage_changes_no_score():
    """As many pictures as the smallest validation split, activity as large as repeats leave it."""
    rng = np.random.default_rng(0)
    y = (0.7 * rng.standard_normal((878, 3000))).astype(np.float32)
    for share in (0, 0.2, 0.7):  # R² about 0, 0.2, 0.7
        prediction = share * y + math.sqrt(share * (1 - share)) * 0.7 * rng.standard_normal(y.shape)
        exact, stored = (
            sklearn.metrics.r2_score(a.astype(float), prediction, multioutput="raw_values") for a in (y, y.astype(np.float16))
        )
        assert abs(np.median(exact) - share) < 0.01 and np.abs(stored - exact).max() < 1e-4


@pytest.fixture(scope="module")
def subset(challenge):
    """A folder with two subjects, one without test pictures, and fewer samples than vertices."""
    folder, data = challenge.parent / "subset", challenge.parent / "subset_data"
    for name in ("subj06", "subj08"):
        shutil.copytree(challenge / name, folder / name)
    shutil.rmtree(folder / "subj08" / "test_split")
    run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data), SEED=4)
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=58, chunk_rows=40)
    return data


def test_subset_of_subjects(challenge, subset, subjects, tmp_path):
    two = {name: subjects[name] for name in ("subj06", "subj08")}
    found = prepare_data.load(subset)
    n_vertices = np.logical_or.reduce([np.concatenate(list(s.mask.values())) for s in two.values()]).sum()
    assert found.space.subjects == list(two) and found.space.n_vertices == n_vertices < 174
    assert set(found.test_subject) == {0}
    # the same chosen by name from the whole folder; splits depend on pictures and seed only
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path), SUBJECTS="subj08, subj06", SEED=4)
    chosen = prepare_data.load(tmp_path)
    for name in ("activity", "subject", "image", "split"):
        assert np.array_equal(getattr(chosen, name), getattr(found, name)), name
    assert set(chosen.test_subject) == {0, 1}


def test_activity_that_float16_would_spoil_stays_float32(challenge, tmp_path):
    shutil.copytree(challenge / "subj08", tmp_path / "challenge" / "subj08")
    path = tmp_path / "challenge/subj08/training_split/training_fmri/rh_training_fmri.npy"
    activity = np.load(path)
    activity[:, 2] += 1000
    np.save(path, activity)
    run(prepare_data, CHALLENGE_DIR=str(tmp_path / "challenge"), DATA_DIR=str(tmp_path / "data"))
    data = prepare_data.load(tmp_path / "data")
    found = data.read_activity(np.arange(len(activity)))[:, data.space.hemisphere(0, "rh")]
    assert found.dtype == np.float32 and np.array_equal(found, activity)


@pytest.mark.parametrize("which", ["fitted", "subset"])
def test_pca_is_scikit_learns(which, request):
    folder = request.getfixturevalue(which)
    data = prepare_data.load(folder)
    pca = fit_pca.load(folder, data)
    activity, n = data.activity.astype(float), pca.components.shape[1]
    train = activity[data.samples("train")]
    assert (len(train) < data.space.n_vertices) == (which == "subset")
    reference = sklearn.decomposition.PCA(svd_solver="full").fit(train)
    basis, mean = pca.components.double().numpy(), pca.mean.double().numpy()
    # float32 arithmetic, enough passes (fitted) or a rank within the block (subset): equal but for rounding
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(reference.components_[:n] @ basis)[1], 1, atol=1e-5)  # same subspace
    np.testing.assert_allclose(pca.explained_variance, reference.explained_variance_[:n], rtol=1e-5)
    np.testing.assert_allclose(pca.total_variance, reference.explained_variance_.sum(), rtol=1e-5)
    signs = np.sign((reference.components_[:5].T * basis[:, :5]).sum(0))
    np.testing.assert_allclose(basis[:, :5] * signs, reference.components_[:5].T, atol=1e-3)  # and order

    # targets: the loss of any z is the one over the vertices (DESIGN.md section 3)
    z = np.random.default_rng(0).standard_normal((len(activity), n))
    expected = ((z @ basis.T + mean - activity) ** 2).mean(1)
    found = (((z - pca.latents.double().numpy()) ** 2).sum(1) + pca.residual.numpy()) / data.space.n_vertices
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # single samples with targets as float16
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=1e-4)

    # what the targets can explain of the validation split
    scores = []
    for s, mask in enumerate(data.space.mask.numpy()):
        rows = data.samples("val", s)
        y = activity[rows]
        scores.append(sklearn.metrics.r2_score(y, (y - mean) @ basis @ basis.T + mean, multioutput="raw_values")[mask])
    assert abs(pca.val_r2 - np.median(np.concatenate(scores))) < 1e-3  # of four pictures, float16 targets


def test_pca_by_default_is_near_the_best(fitted):
    """The report's 2048 components of a much steeper spectrum fare better than these 24 of a flat one."""
    data = prepare_data.load(fitted)
    rows = data.samples("train")
    components, _ = fit_pca.fit(fit_pca.Activity(data, rows, torch.device("cpu")), 24, fit_pca.PASSES, 0)
    train = data.activity[rows].astype(float)
    best = sklearn.decomposition.PCA(24, svd_solver="full").fit(train).explained_variance_.sum()
    assert 0.995 < (train @ components.double().numpy()).var(0, ddof=1).sum() / best < 1 + 1e-6


def test_training_sees_the_training_samples_with_their_targets(phase_1, fitted, subjects):
    """Batches against the files: every sample once an epoch, nothing of the other splits."""
    data = prepare_data.load(fitted)
    pca = fit_pca.load(fitted, data)
    seen = {name: torch.cat([b[name] for b in phase_1.batches]) for name in phase_1.batches[0]}
    activity, name_of = {}, {}  # by what a sample is: its subject and the bytes of its picture
    for s, (subject, files) in enumerate(subjects.items()):
        both = np.concatenate([files.activity["lh"], files.activity["rh"]], axis=1)
        for path, y in zip(files.pictures, both):
            picture = np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BICUBIC)).tobytes()
            name_of[s, hash(picture)] = (subject, path.name)
            activity[subject, path.name] = y
    keys = [name_of[s, hash(x.numpy().tobytes())] for s, x in zip(seen["subject"].tolist(), seen["images"])]
    train = [
        (subject, files.pictures[i].name)
        for s, (subject, files) in enumerate(subjects.items())
        for i in np.flatnonzero(data.split[data.subject == s] == 0)
    ]
    assert len(keys) == 8 * 48 and sorted(keys[: len(train)]) == sorted(train) and set(keys) == set(train)
    columns = {name: np.concatenate(list(c.values())) for name, c in columns_of(subjects).items()}
    y = np.zeros((len(keys), data.space.n_vertices))
    for row, key in zip(y, keys):
        row[columns[key[0]]] = activity[key]
    z = (y - pca.mean.numpy()) @ pca.components.numpy()
    np.testing.assert_allclose(seen["latents"], z, rtol=1e-2, atol=1e-2)  # stored as float16
    assert seen["size"].min() >= model.smallest_crop(0.8) and len(torch.unique(seen["size"])) > 20


# ---- what training changes and keeps ------------------------------------------------------------


def changed(phase):
    after = phase.encoder.state_dict()
    return {name for name, before in phase.before.items() if not torch.equal(before, after[name])}


norm_statistics = ("running_mean", "running_var", "num_batches_tracked")


def test_phase_1_trains_the_head_only(phase_1, fitted):
    parameters = dict(phase_1.encoder.named_parameters())
    embedding = {"head.embed_weight", "head.embed_bias"}
    expected = {n for n in parameters if n.startswith("head.")} - embedding
    assert phase_1.trainable == expected and len(expected) == 2 * 4 + 3
    statistics = {f"head.projections.{i}.norm.{n}" for i in (0, 1) for n in norm_statistics}
    assert changed(phase_1) == expected | statistics  # all else is bit for bit what it was, buffers included
    assert phase_1.encoder.head.dropout == common["FEATURE_DROPOUT"]
    pca = fit_pca.load(fitted, prepare_data.load(fitted))
    assert torch.equal(parameters["head.embed_weight"], pca.components)
    assert torch.equal(parameters["head.embed_bias"], pca.mean)


def test_phase_2_trains_attention_and_head(phase_1, phase_2):
    attention = {f"trunk.vit.blocks.{i}.attn.{n}" for i in range(3) for n in beit_attention}  # EVA02-tiny's names
    assert phase_2.trainable == phase_1.trainable | attention
    assert changed(phase_2) == changed(phase_1) | attention
    assert phase_2.encoder.head.dropout == common["FEATURE_DROPOUT"]
    for name, before in phase_2.before.items():  # it started from the trunk of phase 1
        assert not name.startswith("trunk.") or torch.equal(before, phase_1.before[name])


def test_checkpoints_hold_what_was_trained(phase_1, phase_2, fitted):
    sizes = {n: v.numel() * v.element_size() for n, v in phase_1.encoder.state_dict().items()}
    head_bytes = sum(n for name, n in sizes.items() if name.startswith("head."))
    trunk_bytes = sum(n for name, n in sizes.items() if name.startswith("trunk."))
    path = fitted.parent / "run"
    assert (path / "head.pt").stat().st_size < head_bytes + 200_000 < trunk_bytes  # space, ROIs, settings
    found = torch.load(path / "finetuned.pt", weights_only=True)
    assert {"trunk." + n for n in found["trunk"]} == {n for n in phase_2.trainable if n.startswith("trunk.")}
    assert torch.load(path / "head.pt", weights_only=True)["trunk"] == {}


@pytest.mark.parametrize("phase", ["phase_1", "phase_2"])
def test_checkpoint_round_trip(phase, request, fitted, tmp_path):
    encoder, space = request.getfixturevalue(phase).encoder.eval(), prepare_data.load(fitted).space
    made = dict(made_with={"SEED": 0}, scores={"val_r2": 0.5}, step=7)
    model.save_checkpoint(tmp_path / "encoder.pt", encoder, space=space, **made)
    loaded, loaded_space, about = model.load_checkpoint(tmp_path / "encoder.pt")
    assert {n: about[n] for n in made} == made
    for name, value in vars(space).items():
        found = getattr(loaded_space, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else str(found) == str(value)
    images = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for subject in (torch.arange(8), None):
            z = encoder(images, subject)
            assert torch.equal(loaded(images, subject), z)
            assert torch.equal(loaded.head.decode(z), encoder.head.decode(z))


# ---- predictions and scores ---------------------------------------------------------------------


def plain_prediction(encoder, paths, subject):
    """(n_pictures, n_vertices): picture files one by one through Pillow, torchvision and the encoder."""
    rows = []
    for path in paths:
        picture = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
        with torch.no_grad():
            z = encoder(plain_input(picture, encoder.trunk)[None], torch.tensor([subject]))
            rows.append((z @ encoder.head.embed_weight.T + encoder.head.embed_bias)[0].numpy())
    return np.array(rows)


def plain_scores(checkpoint, prepared, subjects, split):
    """Median R² over all subjects, then of each, by scikit-learn from the files; and the loss."""
    encoder, _, _ = model.load_checkpoint(checkpoint)
    data, columns, scores, errors = prepare_data.load(prepared), columns_of(subjects), [], []
    for s, (name, files) in enumerate(subjects.items()):
        chosen = np.flatnonzero(data.split[data.subject == s] == prepare_data.split_names.index(split))
        prediction = plain_prediction(encoder, [files.pictures[i] for i in chosen], s)
        mine = np.concatenate(list(columns[name].values()))
        y = np.concatenate(list(files.activity.values()), axis=1)[chosen]
        scores.append(sklearn.metrics.r2_score(y, prediction[:, mine], multioutput="raw_values"))
        whole = np.zeros(prediction.shape)
        whole[:, mine] = y  # missing vertices: zero
        errors.extend(((prediction - whole) ** 2).mean(1))
    return [np.median(np.concatenate(scores)), *map(np.median, scores)], np.mean(errors)


@pytest.mark.parametrize("stage, output, steps", [("train_head", "head.pt", [0, 3, 6, 8]), ("finetune", "finetuned.pt", [0, 4])])
def test_log_and_best_checkpoint(stage, output, steps, phase_2, fitted, subjects):
    run_dir = fitted.parent / "run"
    log = [json.loads(line) for line in (run_dir / f"{stage}.jsonl").read_text().splitlines()]
    keys = ["val_r2", *(f"val_r2_{name}" for name in subjects)]
    assert [entry["step"] for entry in log] == steps
    assert all({"train_loss", "val_loss", *keys} <= set(entry) for entry in log)
    assert log[0]["train_loss"] is None and all(0 < entry["train_loss"] < 10 for entry in log[1:])
    best = max(log, key=lambda entry: entry["val_r2"])
    assert model.load_checkpoint(run_dir / output)[2]["step"] == best["step"]
    scores, loss = plain_scores(run_dir / output, fitted, subjects, "val")
    # R² of four pictures magnifies the rounding of activity to float16
    np.testing.assert_allclose([best[key] for key in keys], scores, atol=1e-3)
    np.testing.assert_allclose(best["val_loss"], loss, rtol=1e-4)
    if stage == "finetune":  # begins where phase 1 was best
        phase_1 = [json.loads(line) for line in (run_dir / "train_head.jsonl").read_text().splitlines()]
        assert math.isclose(log[0]["val_r2"], max(entry["val_r2"] for entry in phase_1), abs_tol=1e-5)
    assert Image.open(run_dir / f"{stage}.png").format == "PNG"


def test_authors_weights(tmp_path):
    """Their file (DESIGN.md section 3) predicts as their formula: embed on either term, each with its bias."""
    torch.manual_seed(0)
    vit, shapes = timm.create_model(train_head.TRUNK, pretrained=False, num_classes=0).eval(), {}
    for i in range(6):
        shapes |= {f"feat_projs.{i}.proj.weight1": (5, 257), f"feat_projs.{i}.proj.weight2": (5, 768)}
        shapes |= {f"feat_projs.{i}.norm.{n}": (5,) for n in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"shared_proj.weight": (4, 5), "subj_proj.fc.weight": (8 * 4, 5), "subj_proj.fc.bias": (8 * 4,)}
    shapes |= {"embed.weight": (9, 4), "embed.bias": (9,)}
    w = {name: 0.1 + torch.rand(shape) for name, shape in shapes.items()}
    w |= {f"feat_projs.{i}.norm.num_batches_tracked": torch.tensor(7) for i in range(6)}
    content = {"epoch": 3, "metric": np.float64(0.2), "trunk": vit.state_dict(), "encoder": w}
    torch.save(content, tmp_path / "theirs.pt")
    space = model.Space(["subj02", "subj05"], torch.arange(9), 4, torch.ones(2, 9, dtype=torch.bool), {})
    encoder, found_space, _ = model.load_checkpoint(tmp_path / "theirs.pt", space=space)
    assert found_space.subjects == space.subjects

    features, images = {}, torch.randn(2, 3, 224, 224)
    for i, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda block, args, output, i=i: features.update({i: output}))
    with torch.no_grad():
        vit.forward_features(images)
        h = 0
        for i in range(6):
            s, c, norm = (w[f"feat_projs.{i}.{n}"] for n in ("proj.weight1", "proj.weight2", "norm.weight"))
            p = torch.einsum("dt,dc,ntc->nd", s, c, features[2 * i])
            p = (p - w[f"feat_projs.{i}.norm.running_mean"]) / (w[f"feat_projs.{i}.norm.running_var"] + 1e-5).sqrt()
            h = h + (p * norm + w[f"feat_projs.{i}.norm.bias"]) / 6
        shared = h @ w["shared_proj.weight"].T @ w["embed.weight"].T + w["embed.bias"]
        own = w["subj_proj.fc.weight"].view(8, 4, 5)[[1, 4]] @ h[:, :, None]  # picture 0: subj02, 1: subj05
        own = own[:, :, 0] + w["subj_proj.fc.bias"].view(8, 4)[[1, 4]]
        whole = shared + own @ w["embed.weight"].T + w["embed.bias"]
        found = encoder.head.decode(encoder(images, torch.tensor([0, 1])))
        group = encoder.head.decode(encoder(images), group=True)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)  # float32, thousands of terms
    torch.testing.assert_close(group, shared, rtol=1e-4, atol=1e-4)


def test_submission_file_by_file(submission, subjects, fitted):
    files = {path.relative_to(submission).as_posix() for path in submission.rglob("*.npy")}
    assert files == {f"{name}/{hemi}_pred_test.npy" for name in subjects for hemi in ("lh", "rh")}
    assert {path.name for path in submission.iterdir()} == {"submission.zip", *subjects}
    encoder, _, _ = model.load_checkpoint(fitted.parent / "run" / "finetuned.pt")
    columns = columns_of(subjects)
    with zipfile.ZipFile(submission / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(files) and archive.testzip() is None
        for s, (name, of_subject) in enumerate(subjects.items()):
            expected = plain_prediction(encoder, of_subject.test_pictures, s)
            for hemi in ("lh", "rh"):
                path = submission / name / f"{hemi}_pred_test.npy"
                assert archive.read(f"{name}/{path.name}") == path.read_bytes()
                found = np.load(path)
                assert found.dtype == np.float32
                assert found.shape == (len(of_subject.test_pictures), of_subject.mask[hemi].sum())
                # float32 in batches of other sizes; pictures differ by far more
                np.testing.assert_allclose(found, expected[:, columns[name][hemi]], rtol=0, atol=1e-4)
                assert np.abs(found[0] - found[1:]).max(1).min() > 1e-2


def test_private_test_scores(submission, subjects, fitted):
    found = json.loads((fitted.parent / "run" / "finetuned_scores.json").read_text())
    scores, loss = plain_scores(fitted.parent / "run" / "finetuned.pt", fitted, subjects, "test")
    # two or three pictures a subject; their R² is minus some tens
    np.testing.assert_allclose([found["test_r2"], *(found[f"test_r2_{name}"] for name in subjects)], scores, rtol=2e-3)
    np.testing.assert_allclose(found["test_loss"], loss, rtol=1e-4)


def plain_adamw(phase, *, micro_batch, betas, weight_decay, rates):
    """Decoupled weight decay (Loshchilov & Hutter 2019) on the squared error over all vertices, in
    float64, from the same weights and batches -> {name: parameter of the head}."""
    head, trunk = copy.deepcopy(phase.encoder.head).train().double(), phase.encoder.trunk
    head.load_state_dict({n.removeprefix("head."): v for n, v in phase.before.items() if n.startswith("head.")})
    crops = Crops(trunk, model.smallest_crop(0.8))
    parameters = {n: p for n, p in head.named_parameters() if "head." + n in phase.trainable}
    first, second = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    for t, (batch, rate) in enumerate(zip(phase.batches, rates, strict=True), start=1):
        head.zero_grad()
        n = len(batch["subject"])
        for start in range(0, n, micro_batch):  # one after the other, as batch norm sees them
            part = {name: v[start : start + micro_batch] for name, v in batch.items()}
            with torch.no_grad():
                features = trunk(crops(part["images"], part["top"], part["left"], part["size"]))
            z = head([x.double() for x in features], part["subject"])
            error = z @ head.embed_weight.T + head.embed_bias - part["activity"].double()
            (error.square().sum() / (n * error.shape[1])).backward()
        for name, p in parameters.items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * p.grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * p.grad**2
            step = first[name] / (1 - betas[0] ** t) / ((second[name] / (1 - betas[1] ** t)).sqrt() + 1e-8)
            p.data -= rate * (weight_decay * p.data + step)
    return parameters


def test_trained_embedding_on_a_subset(subset, tmp_path, capsys):
    """Loss in vertex space, micro-batches, AdamW, prediction from head.pt, phase 2 that keeps the embedding."""
    folders = dict(DATA_DIR=str(subset), RUN_DIR=str(tmp_path / "run"))
    options = folders | common | dict(BATCH_SIZE=20, MICRO_BATCH=10, FEATURE_DROPOUT=0.0, STEPS=3, WARMUP_STEPS=1)
    options |= dict(LEARNING_RATE=0.01, MIN_LEARNING_RATE=0.002, BETAS=(0.8, 0.9), WEIGHT_DECAY=0.5)
    head = trained(train_head, **options, **tiny_trunk, TRAIN_EMBEDDING=True)
    embedding = {"head.embed_weight", "head.embed_bias"}
    assert embedding < head.trainable and len(head.trainable) == 2 * 4 + 3 + 2
    # rates: the minimum, the peak, half of the way down
    expected = plain_adamw(head, micro_batch=10, betas=(0.8, 0.9), weight_decay=0.5, rates=[0.002, 0.01, 0.006])
    for name, p in head.encoder.head.named_parameters():
        step, error = p - head.before["head." + name], p - expected[name]
        # single weights with a gradient near float32's rounding step anywhere; there are few
        assert error.norm() < 0.01 * step.norm(), name
    capsys.readouterr()
    run(predict, **folders, SUBMISSION_DIR=str(tmp_path / "submission"), DEVICE="cpu")
    text = capsys.readouterr().out
    assert f"predicting with {tmp_path / 'run/head.pt'}" in text and "subj08: no test pictures" in text
    assert {path.name for path in (tmp_path / "submission").iterdir()} == {"subj06", "submission.zip"}
    tuned = trained(finetune, **options)
    assert not embedding & (tuned.trainable | changed(tuned))
    written = model.load_checkpoint(tmp_path / "run/head.pt")[0].head.state_dict()
    assert all(torch.equal(tuned.before["head." + n], v) for n, v in written.items())
