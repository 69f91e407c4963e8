"""All tests: pytest test_model.py. No network, no GPU; two to three minutes on two cores.

Every test compares with something independent (plain loops in float64, scikit-learn, torchvision,
Pillow, the files of the challenge folder) or with an identity. The stages run for real on a small
simulated folder, once for all tests, and what they leave is looked at from several sides.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported

import copy
import csv
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torchvision.transforms.v2.functional as vision
from PIL import Image
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score
from torch import nn

import demo
import evaluate
import finetune
import fit_pca
import flatmap
import model
import predict
import prepare_data
import train_head
from common import Problem, constants, run_script
from model import Crops, Encoder, Head, Trunk

tiny = "eva02_tiny_patch14_224.mim_in22k"
hemis = ("lh", "rh")
here = Path(__file__).parent


def run(stage, **values):
    """The stage's real main() with these constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(stage, name, value)  # refuses a name that the stage does not have
        stage.main()


def run_process(script, *arguments):
    """The stage as a user starts it."""
    command = [sys.executable, here / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def r2_of_vertices(activity, prediction):
    """(n_vertices,), by scikit-learn in float64."""
    return r2_score(activity.astype(float), prediction.astype(float), multioutput="raw_values")


# ---- head ---------------------------------------------------------------------------------------

feature_shapes = [(5, 3), (4, 6)]  # (n_tokens, n_channels) of two layers
latent_dim, pca_dim, n_subjects, n_vertices = 6, 4, 3, 7


def small_head():
    """A head in float64 whose every number is random, batch norm's included."""
    rng = torch.Generator().manual_seed(0)
    head = Head(feature_shapes, latent_dim, pca_dim, n_subjects, n_vertices).double()
    for name, values in head.state_dict().items():
        if values.is_floating_point():
            values.uniform_(*((0.5, 1.5) if "running_var" in name else (-1, 1)), generator=rng)
    basis = torch.linalg.qr(torch.randn(n_vertices, pca_dim, generator=rng, dtype=torch.float64))[0]
    head.set_embedding(basis, torch.randn(n_vertices, generator=rng, dtype=torch.float64))
    return head


def random_features(n):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(n, *shape, generator=rng, dtype=torch.float64) for shape in feature_shapes]


def plain_head(head, features, subject):
    """The formulas of model.py, one number at a time -> z (n, pca_dim), y (n, n_vertices)."""
    n, h = len(features[0]), np.zeros((len(features[0]), latent_dim))
    for layer, x in zip(head.projections, features):
        s, w, x = layer.spatial.tolist(), layer.channel.tolist(), x.tolist()
        for d in range(latent_dim):
            p = [
                sum(s[d][t] * sum(w[d][c] * x[i][t][c] for c in range(len(w[d]))) for t in range(len(s[d])))
                for i in range(n)
            ]
            mean, var = layer.norm.running_mean[d].item(), layer.norm.running_var[d].item()
            if head.training:
                mean = sum(p) / n
                var = sum((value - mean) ** 2 for value in p) / n
            weight, bias = layer.norm.weight[d].item(), layer.norm.bias[d].item()
            for i in range(n):
                h[i, d] += ((p[i] - mean) / math.sqrt(var + 1e-5) * weight + bias) / len(features)
    a, b, bias = (v.detach().numpy() for v in (head.shared, head.subject_weight, head.subject_bias))
    e, mean = head.embed_weight.numpy(), head.embed_bias.numpy()
    z, y = np.zeros((n, pca_dim)), np.zeros((n, n_vertices))
    for i in range(n):
        for k in range(pca_dim):
            z[i, k] = sum(a[k, d] * h[i, d] for d in range(latent_dim))
            if subject is not None:
                z[i, k] += sum(b[subject[i], k, d] * h[i, d] for d in range(latent_dim)) + bias[subject[i], k]
        for v in range(n_vertices):
            y[i, v] = sum(e[v, k] * z[i, k] for k in range(pca_dim)) + mean[v]
    return z, y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("subject", [None, torch.arange(11) % n_subjects], ids=["group", "subjects"])
@torch.no_grad()
def test_head_is_the_formula(training, subject):
    head, features = small_head().train(training), random_features(11)
    z, y = plain_head(head, features, subject)
    single = copy.deepcopy(head).float()([x.float() for x in features], subject)
    found = head(features, subject)
    np.testing.assert_allclose(found, z, rtol=1e-10, atol=1e-10)  # float64 throughout
    np.testing.assert_allclose(head.decode(found, group=subject is None), y, rtol=1e-10, atol=1e-10)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, z, rtol=1e-4, atol=1e-5)


def test_head_gradients_are_the_numerical_ones():
    head, features = small_head().train(), random_features(9)
    names = [name for name, p in head.named_parameters() if p.requires_grad]

    def z(*values):
        # batch norm changes its statistics in place, so every call gets its own
        state = dict(zip(names, values)) | {name: b.clone() for name, b in head.named_buffers()}
        return torch.func.functional_call(head, state, (values[len(names) :], torch.arange(9) % n_subjects))

    inputs = [head.get_parameter(n).detach() for n in names] + features  # phase 2 needs features too
    torch.autograd.gradcheck(z, [v.clone().requires_grad_() for v in inputs], fast_mode=True)


@pytest.mark.parametrize("precision, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])  # a few roundings
def test_head_in_half_precision(precision, tolerance):
    head, features, subject = small_head().float().train(), random_features(64), torch.arange(64) % n_subjects
    trained = [p for p in head.parameters() if p.requires_grad]
    results = []
    for half in (True, False):
        with torch.autocast("cpu", precision, enabled=half):
            z = head([x.float() for x in features], subject)
        results.append((z, *torch.autograd.grad(z.square().mean(), trained)))
    assert results[0][0].dtype == torch.float32
    for found, expected in zip(*results):
        assert (found - expected).norm() < tolerance * expected.norm() + 1e-6


def test_parameter_counts_and_initialisation():
    with torch.device("meta"):
        base = Encoder(nn.Identity(), Head([(257, 768)] * 6, 1024, 2048, 8, 39548, 0.9))
    assert base.n_parameters() == (25_200_640, 106_234_492)  # of the report: 25 M and 106 M
    assert {n for n, p in base.head.named_parameters() if not p.requires_grad} == {"embed_weight", "embed_bias"}
    torch.manual_seed(0)
    head = Head([(30, 50)], 40, 60, 3, 9)
    fan_in = {"projections.0.spatial": 30, "projections.0.channel": 50}
    fan_in |= dict.fromkeys(("shared", "subject_weight", "subject_bias"), 40)
    for name, n in fan_in.items():  # uniform in +-1/sqrt(fan-in), as nn.Linear
        values = head.get_parameter(name).detach() * n**0.5
        assert 0.97 < values.abs().max() <= 1.0001 and abs(values.square().mean() - 1 / 3) < 0.05, name


def test_dropout_takes_single_features():
    """With all weights 1 the projection adds up 32 features of 1; dropout leaves a binomial number of them."""
    head, n = Head([(4, 8)], 1, 1, 1, 1, dropout=0.9).train(), 20000
    for p in (head.projections[0].spatial, head.projections[0].channel, head.shared):
        nn.init.ones_(p)
    head.projections[0].norm.eval()
    torch.manual_seed(0)
    kept = 0.1 * head([torch.ones(n, 4, 8)]).detach()
    assert (kept - kept.round()).abs().max() < 2e-3  # p may be rounded, to 1/65536
    # four standard errors of mean and variance of n numbers from binomial(32, 0.1)
    assert abs(kept.mean() - 3.2) < 4 * math.sqrt(2.88 / n)
    assert abs(kept.var() - 2.88) < 4 * 2.88 * math.sqrt(2 / n) + 1e-2
    assert torch.equal(head.eval()([torch.ones(2, 4, 8)]).round(), torch.full((2, 1), 32.0))


@pytest.mark.parametrize("space", ["pca", "vertices"])
def test_loss_is_the_mean_over_all_vertices(space):
    """Value and gradients of every trainable parameter; targets have parts outside of the basis."""
    y = torch.randn(6, n_vertices, generator=torch.Generator().manual_seed(2))
    plain, head, subject = small_head().train(), small_head().train(), torch.tensor([0, 2, 1, 1, 0, 2])
    features = random_features(6)
    expected = ((plain(features, subject) @ plain.embed_weight.T + plain.embed_bias - y) ** 2).mean()
    expected.backward()
    if space == "pca":
        centred = y - head.embed_bias
        target = centred @ head.embed_weight
        batch = {"latents": target, "residual": centred.square().sum(1) - target.square().sum(1)}
        assert batch["residual"].min() > 0.1
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
beit_attention = ["q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"]  # EVA02-tiny's too
eva_attention = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias"] + vit_attention[2:]
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


@torch.no_grad()
def block_outputs(vit, images):
    """{block: (n, n_tokens, n_channels)} of a whole timm model, by hooks."""
    outputs = {}
    for i, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda block, args, output, i=i: outputs.update({i: output}))
    vit.eval().forward_features(images)
    return outputs


@pytest.mark.parametrize("name", table_4)
def test_trunk_is_timm_with_hooks(name, monkeypatch):
    n_tokens, attention = table_4[name]
    depth, layers, used = 4, "blocks.{0,2}", [0, 2]  # 4 blocks, which are alike, for speed
    if name == train_head.TRUNK:  # the report's own whole
        depth, layers, used = 12, train_head.LAYERS, [0, 2, 4, 6, 8, 10]
    create, whole = timm.create_model, []

    def create_and_keep(*arguments, **options):
        vit = create(*arguments, **options, depth=depth)
        for parameter_name, p in vit.named_parameters():
            if "gamma" in parameter_name:
                nn.init.constant_(p, 0.3)  # from 1e-5, at which every block gives nearly its input
        whole.append(copy.deepcopy(vit))
        return vit

    monkeypatch.setattr(timm, "create_model", create_and_keep)
    trunk, own = Trunk(name, layers, pretrained=False).train(), timm.get_pretrained_cfg(name)
    assert trunk.feature_shapes == [(n_tokens, 768)] * len(used)
    assert (trunk.mean, trunk.std) == (own.mean, own.std)
    assert not any(p.requires_grad for p in trunk.parameters())
    kept = range(used[-1] + 1)  # nothing above the last block in use
    assert {n.split(".")[2] for n, _ in trunk.named_parameters() if ".blocks." in n} == set(map(str, kept))
    assert set(trunk.attention_parameters()) == {f"vit.blocks.{i}.attn.{n}" for i in kept for n in attention}

    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = block_outputs(whole[0], images)
    with torch.no_grad():
        found = trunk(images)
    assert len(expected) == depth and len(found) == len(used)
    for i, x in zip(used, found):  # the same operations; room for another order of sums
        torch.testing.assert_close(x, expected[i], rtol=1e-5, atol=1e-5)
        assert (x - expected[i + 1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("blocks.{0,2,10}", ["blocks.0", "blocks.2", "blocks.10"]),
        ("blocks.{9..11}", ["blocks.9", "blocks.10", "blocks.11"]),
        ("blocks.7 blocks.3", ["blocks.3", "blocks.7"]),  # in the trunk's order
        ("blocks.*", [f"blocks.{i}" for i in range(12)]),  # whole blocks, not what is in them
        ("blocks.1?", ["blocks.10", "blocks.11"]),
        ("blocks.{2,5}.*", ["blocks.2.attn", "blocks.5.attn"]),
        ("blocks.*.attn", [f"blocks.{i}.attn" for i in range(12)]),
        ("blocks.{0,12}", "layer pattern blocks.12 .*matches nothing.*blocks.0 … blocks.11"),
        ("blocks.0 blocks.9'", "layer pattern blocks.9' .*matches nothing"),
        ("patch*", "layer pattern .*matches nothing"),
        ("", "names no layer"),
    ],
)
def test_layer_patterns(pattern, expected):
    names = ["patch_embed", *(f"blocks.{i}{part}" for i in range(12) for part in ("", ".attn", ".attn.proj"))]
    if isinstance(expected, list):
        assert model.match_layers(names, pattern) == expected
    else:
        with pytest.raises(Problem, match=expected):
            model.match_layers(names, pattern)


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet50", "resnet50 has no transformer blocks"),
        ("swin_tiny_patch4_window7_224", "has no transformer blocks"),
        ("eva02_tiny_patch14_224.mim_in2k", f"unknown trunk .*near it: {tiny}"),
        (tiny, "layer pattern blocks.30 .*matches nothing"),
    ],
)
def test_unusable_trunks_are_refused(name, message):
    with pytest.raises(Problem, match=message):
        Trunk(name, "blocks.{0,30}", image_size=56, pretrained=False)


def test_unusable_layers_and_sizes_are_refused():
    with pytest.raises(Problem, match="layer blocks.0.attn.attn_drop .*gives features of shape None"):
        Trunk(tiny, "blocks.0.attn.attn_drop", image_size=56, pretrained=False)
    with pytest.raises(Problem, match="IMAGE_SIZE is 57, expected a multiple of 14"):
        Trunk(tiny, "blocks.0", image_size=57, pretrained=False)


@pytest.mark.parametrize(
    "stage, name, value",
    [
        (prepare_data, "SEED", -1), (prepare_data, "WORKERS", -1), (fit_pca, "PASSES", 0), (train_head, "LATENT_DIM", 0),
        (train_head, "BATCH_SIZE", 1), (train_head, "MICRO_BATCH", 100), (train_head, "LEARNING_RATE", math.nan),
        (train_head, "BETAS", (2.0, 1.0)), (train_head, "FEATURE_DROPOUT", 1.0), (train_head, "CROP_SCALE", 0.0),
        (train_head, "DEVICE", "meta"), (train_head, "PRECISION", "half"), (finetune, "WEIGHT_DECAY", -1.0),
        (predict, "BATCH_SIZE", 0), (evaluate, "SPLIT", "train"),
    ],
)  # fmt: skip
def test_senseless_values_are_refused_before_anything_is_read(stage, name, value):
    with pytest.raises(Problem, match=f"{name} is .*expected"):
        run(stage, **{name: value})


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_trunk(monkeypatch):
    """Same features, same gradients, same names; a compiler that fails is told in one message."""
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    trunks = [Trunk(tiny, "blocks.0", pretrained=False) for _ in range(2)]
    train_head.compile_trunk(trunks[1], images, torch.float32)
    results = []
    for trunk in trunks:
        parameters = [trunk.get_parameter(name).requires_grad_(True) for name in trunk.attention_parameters()]
        (features,) = trunk(images)
        features.square().mean().backward()
        results.append((features.detach(), *(p.grad for p in parameters)))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())
    assert trunks[1].state_dict().keys() == trunks[0].state_dict().keys()
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(Problem, match="torch.compile fails here .*no-such-compiler.*--compile false"):
        train_head.compile_trunk(Trunk(tiny, "blocks.0", image_size=112, pretrained=False), images[..., :112, :112], torch.float32)


def test_trunk_weights_come_from_the_seed_or_a_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Problem, match=f"weights/{tiny}.safetensors"):  # no network: says where to put it
        Trunk(tiny, "blocks.0", image_size=56)
    a, b, c = (Trunk(tiny, "blocks.0", image_size=56, pretrained=False, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(v, b[n]) for n, v in a.items())
    assert not torch.equal(b["vit.patch_embed.proj.weight"], c["vit.patch_embed.proj.weight"])

    torch.manual_seed(5)
    there, images = timm.create_model(tiny, pretrained=False), torch.randn(1, 3, 224, 224)
    (tmp_path / "weights").mkdir()
    weights = {n: v.contiguous() for n, v in there.state_dict().items()}
    save_file(weights, tmp_path / "weights" / f"{tiny}.safetensors")
    with torch.no_grad():
        found = Trunk(tiny, "blocks.{0,3}")(images)[1]
    torch.testing.assert_close(found, block_outputs(there, images)[3], rtol=1e-5, atol=1e-5)


# ---- crops --------------------------------------------------------------------------------------


def plain_input(picture, trunk, box=None):
    """torchvision: picture (256, 256, 3) uint8, box (top, left, size) or None -> (3, size, size)."""
    # in float64: its float32 is off by 1e-4
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
    top, left, size = model.random_boxes(6, crop_scale, rng)
    size[0], size[1], top[1], left[1] = smallest, 256, 0, 0
    top[2], left[3] = 256 - size[2], 256 - size[3]  # at the border
    crops = Crops(trunk, smallest)(images, top, left, size)
    for image, crop, whole, *box in zip(images, crops, Crops(trunk).whole(images), top, left, size):
        # float32; a grey level is 0.02 here
        torch.testing.assert_close(crop, plain_input(image, trunk, [int(v) for v in box]), rtol=0, atol=1e-5)
        torch.testing.assert_close(whole, plain_input(image, trunk), rtol=0, atol=1e-5)


def test_random_boxes():
    n, scale = 20000, 0.3
    *starts, size = (v.numpy() for v in model.random_boxes(n, scale, np.random.default_rng(0)))
    assert size.min() == model.smallest_crop(scale) == 140 and size.max() == 256
    # area is uniform in [scale, 1]: Kolmogorov-Smirnov at 5 sigma, and whole pixels
    assert np.abs(np.sort(size**2 / 256**2) - np.linspace(scale, 1, n)).max() < 0.02
    for start in starts:
        assert start.min() == 0 and (start + size).max() == 256
    part = [start[size < 200] / (256 - size[size < 200]) for start in starts]  # within [0, 1] of what is possible
    # 5 standard errors; top and left are independent
    assert np.abs(np.mean(part, axis=1) - 0.5).max() < 0.02 and abs(np.corrcoef(part)[0, 1]) < 0.05
    with pytest.raises(Problem, match="CROP_SCALE is 0"):
        model.smallest_crop(0)


# ---- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_r2_is_scikit_learns(stored):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((50, 12)).astype(np.float32)
    prediction = (0.5 * y + rng.standard_normal(y.shape)).astype(np.float32)
    y[:, 3] = 0.1  # constant: 0
    y[:, 4] = prediction[:, 4] = 0.25  # constant and predicted exactly: 1
    y[:, 5] += 100  # far from zero
    prediction[:, 5] += 100
    y = y.astype(stored)
    found = model.r2_score(torch.from_numpy(y), torch.from_numpy(prediction))
    assert (found[3], found[4]) == (0, 1) and found.dtype == torch.float64
    # a mean of 100 leaves float32 5 digits of the deviations from it
    np.testing.assert_allclose(found, r2_of_vertices(y, prediction), rtol=0, atol=1e-5)
    assert model.r2_score(torch.ones(1, 12), torch.zeros(1, 12)).isnan().all()  # one picture has none


def test_headline_survives_subjects_without_scores():
    """One with a single picture, one with none; test_log_and_best_checkpoint has the usual case."""
    scores = [torch.tensor([0.1, 0.5, 0.2]), torch.full((3,), torch.nan), None]
    found = model.median_r2(scores, ["subj02", "subj05", "subj08"], "val_r2")
    assert list(found) == ["val_r2", "val_r2_subj02", "val_r2_subj05", "val_r2_subj08"]
    np.testing.assert_allclose(list(found.values()), [0.2, 0.2, np.nan, np.nan], rtol=1e-6)


# ---- splits, order, schedule, micro-batches -----------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_at_full_size(seed):
    n_training = np.array([9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779])
    rng = np.random.default_rng(seed)
    shared = rng.random((1000, 8)) < n_training / 9841  # some of them missed by those with fewer sessions
    own = np.repeat(np.eye(8, dtype=bool), n_training - shared.sum(0), axis=0)
    seen = rng.permutation(np.concatenate([shared, own]))  # (n_pictures, n_subjects)
    assert seen.sum() == 75086  # samples of the challenge
    split = prepare_data.split_pictures(seen, seed)
    assert split.shape == (len(seen),)  # one for everybody who saw the picture
    for who, tolerance in [*((subject, 0.01) for subject in seen.T), (seen.sum(1) > 1, 0.03)]:  # of 1,000 shared
        parts = np.bincount(split[who], minlength=3) / who.sum()
        np.testing.assert_allclose(parts, [0.85, 0.10, 0.05], rtol=tolerance)
    assert np.array_equal(split, prepare_data.split_pictures(seen, seed))
    # independent splits agree on 0.85² + 0.1² + 0.05² = 73.5 % of pictures
    assert abs(np.mean(split == prepare_data.split_pictures(seen, seed + 1)) - 0.735) < 0.01


@pytest.mark.parametrize("batch_size", [4, 25])
def test_sample_order(batch_size):
    batches = [train_head.sample_order(step, batch_size, 10, seed=3) for step in range(100 // batch_size)]
    epochs = np.concatenate(batches).reshape(10, 10)  # batches of 4 cross the ends of epochs, those of 25 span them
    assert (np.sort(epochs, axis=1) == np.arange(10)).all() and len(np.unique(epochs, axis=0)) == 10
    assert np.array_equal(batches[2], train_head.sample_order(2, batch_size, 10, seed=3))
    assert not np.array_equal(batches[0], train_head.sample_order(0, batch_size, 10, seed=4))


def test_defaults_and_schedule_are_the_reports():
    table_1 = dict(TRUNK="eva02_base_patch14_224.mim_in22k", LAYERS="blocks.{0,2,4,6,8,10}", LATENT_DIM=1024)
    both = dict(BETAS=(0.9, 0.99), WEIGHT_DECAY=0.8, FEATURE_DROPOUT=0.9, CROP_SCALE=0.8)
    table_2 = dict(BATCH_SIZE=512, LEARNING_RATE=6e-4, STEPS=5000, WARMUP_STEPS=250, MIN_LEARNING_RATE=3e-5)
    table_3 = dict(BATCH_SIZE=192, LEARNING_RATE=1e-5, STEPS=2000, WARMUP_STEPS=100, MIN_LEARNING_RATE=0)
    assert constants(vars(train_head)).items() >= (table_1 | both | table_2).items()
    assert constants(vars(finetune)).items() >= (both | table_3).items()
    assert fit_pca.PCA_DIM == 2048
    range_ = 6e-4 - 3e-5
    for step, rate in {
        0: 3e-5,
        125: 3e-5 + range_ / 2,  # half of the way up
        250: 6e-4,
        1250: 3e-5 + range_ * (1 + math.cos(math.pi * 1000 / 4750)) / 2,
        2625: 3e-5 + range_ / 2,  # half of the way down
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


@pytest.mark.parametrize("micro_batch", [0, 2, 4])
def test_micro_batches_add_up_to_the_batch(micro_batch):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = Encoder(Patches(), Head([(4, 48)] * 2, 5, 3, 2, 9)).eval()  # batch norm's statistics fixed
    batch = dict(zip(("top", "left", "size"), model.random_boxes(8, 0.5, rng, source=16)))
    batch["images"] = torch.from_numpy(rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    batch |= {"subject": torch.arange(8) % 2, "latents": torch.randn(8, 3), "residual": torch.rand(8)}
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
    spelled = "--batch-size 7 --warmup_steps=3 --learning_rate 1e-3 --betas 0.5,0.75 --train-embedding true"
    spelled = [*spelled.split(), "--pretrained", "FALSE", "--layers", "blocks.{0,2} blocks.5"]
    after = constants(override(monkeypatch, train_head, *spelled))
    changed = dict(BATCH_SIZE=7, WARMUP_STEPS=3, LEARNING_RATE=1e-3, BETAS=(0.5, 0.75), TRAIN_EMBEDDING=True)
    changed |= dict(PRETRAINED=False, LAYERS="blocks.{0,2} blocks.5")
    before = constants(vars(train_head))
    assert after == before | changed and before["BATCH_SIZE"] == 512
    assert {n: type(v) for n, v in after.items()} == {n: type(v) for n, v in before.items()}
    for stage in (prepare_data, fit_pca, train_head, finetune, predict, demo):
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
        ("--steps", "--steps"),
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


# ---- preparation and PCA of a simulated folder --------------------------------------------------


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "challenge"
    demo.simulate(folder, n_train=40, n_test=5, picture_size=80, vertex_step=16, seed=1)
    return folder


@pytest.fixture(scope="module")
def subjects(challenge):
    """{name: the subject's files, read plainly; columns: of the common space, per hemisphere}."""
    found = {}
    for folder in sorted(challenge.iterdir()):
        train, masks = folder / "training_split", folder / "roi_masks"
        found[folder.name] = SimpleNamespace(
            pictures=sorted((train / "training_images").iterdir()),
            test_pictures=sorted((folder / "test_split/test_images").iterdir()),
            activity={h: np.load(train / f"training_fmri/{h}_training_fmri.npy") for h in hemis},
            mask={h: np.load(masks / f"{h}.all-vertices_fsaverage_space.npy") == 1 for h in hemis},
        )
    union = {h: np.logical_or.reduce([s.mask[h] for s in found.values()]) for h in hemis}
    for s in found.values():
        start = {"lh": 0, "rh": union["lh"].sum()}
        s.columns = {h: start[h] + np.flatnonzero(s.mask[h][union[h]]) for h in hemis}
        s.present = np.concatenate([s.columns[h] for h in hemis])
        s.common = np.zeros((len(s.pictures), sum(u.sum() for u in union.values())), np.float32)
        for h in hemis:
            s.common[:, s.columns[h]] = s.activity[h]  # missing vertices: zero
    return found


def open_resized(path):
    return np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def prepared(challenge):
    folder = challenge.parent / "data"
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(folder), SEED=3)
    return folder


@pytest.fixture(scope="module")
def fitted(prepared):
    run(fit_pca, DATA_DIR=str(prepared), PCA_DIM=24, PASSES=30, chunk_rows=50)
    return prepared


@pytest.fixture(scope="module")
def subset(challenge):
    """Two subjects' data, one without test pictures, with fewer samples than vertices."""
    folder, data = challenge.parent / "subset", challenge.parent / "subset_data"
    for name in ("subj06", "subj08"):
        shutil.copytree(challenge / name, folder / name)
    shutil.rmtree(folder / "subj08" / "test_split")
    run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data), SEED=4)
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=58, chunk_rows=40)
    return data


def test_prepared_data_are_the_files(prepared, subjects):
    data, facts_of_id = prepare_data.load(prepared), {}
    assert data.space.subjects == list(subjects) == [f"subj{i:02d}" for i in range(1, 9)]
    for s, files in enumerate(subjects.values()):
        rows = np.flatnonzero(data.subject == s)
        found = data.read_activity(rows)
        assert found.dtype == np.float16 and np.array_equal(found, files.common.astype(np.float16))
        assert np.array_equal(np.flatnonzero(data.space.mask[s]), files.present)
        assert all(np.array_equal(data.space.hemisphere(s, h), files.columns[h]) for h in hemis)
        for row, path in zip(rows, files.pictures, strict=True):
            assert np.array_equal(data.images[data.image[row]], open_resized(path))
            facts_of_id.setdefault(path.stem.split("nsd-")[1], set()).add((data.split[row], data.image[row]))
        for row, path in zip(np.flatnonzero(data.test_subject == s), files.test_pictures, strict=True):
            assert np.array_equal(data.images[data.test_image[row]], open_resized(path))
        assert all(len(data.samples(split, s)) for split in ("train", "val", "test"))
    assert data.space.mask[5].sum() < data.space.mask[7].sum() < data.space.n_vertices  # subj06, subj08
    assert all(len(facts) == 1 for facts in facts_of_id.values())  # one split and one row, whoever saw it
    assert len(facts_of_id) == data.n_training_images < len(data.subject)
    assert np.array_equal(data.read_training_images(), data.images[: data.n_training_images])
    # float16 moves no vertex's R² by more than 1e-4; over all samples, as many as a real validation split has
    exact, stored = np.concatenate([files.common for files in subjects.values()]), np.array(data.activity)
    prediction = 0.5 * exact + 0.3 * np.random.default_rng(0).standard_normal(exact.shape)
    r2 = [r2_of_vertices(y, prediction) for y in (exact, stored)]
    assert 0 < np.abs(r2[0] - r2[1]).max() < 1e-4 and np.median(r2[0]) > 0.3


def test_regions_are_the_files(prepared, challenge, subjects):
    space = prepare_data.load(prepared).space
    assert set(space.rois) == {"streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words"}
    for group, roi in space.rois.items():
        for s, (name, files) in enumerate(subjects.items()):
            masks, expected = challenge / name / "roi_masks", np.zeros(space.n_vertices)
            assert roi["names"] == np.load(masks / f"mapping_{group}.npy", allow_pickle=True).item()
            for h in hemis:
                expected[files.columns[h]] = np.load(masks / f"{h}.{group}_challenge_space.npy")
            assert np.array_equal(roi["labels"][s], expected)


def test_vertex_space_from_the_masks_alone(challenge, prepared, tmp_path):
    ours = prepare_data.find_space(tmp_path, challenge)
    expected = prepare_data.find_space(prepared, tmp_path)
    assert_equal(vars(ours), vars(expected))
    assert prepare_data.find_space(tmp_path, tmp_path) is None


def test_subset_of_subjects(challenge, subset, subjects, tmp_path):
    found, two = prepare_data.load(subset), [subjects["subj06"], subjects["subj08"]]
    assert found.space.subjects == ["subj06", "subj08"] and set(found.test_subject) == {0}
    n_vertices = sum((two[0].mask[h] | two[1].mask[h]).sum() for h in hemis)
    assert found.space.n_vertices == n_vertices < two[0].common.shape[1]
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
    reference = PCA(svd_solver="full").fit(train)
    basis, mean = pca.components.double().numpy(), pca.mean.double().numpy()
    # float32, and enough passes (fitted) or rank within the block (subset): equal but for rounding
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(reference.components_[:n] @ basis)[1], 1, atol=1e-5)  # same subspace
    np.testing.assert_allclose(pca.explained_variance, reference.explained_variance_[:n], rtol=1e-5)
    np.testing.assert_allclose(pca.total_variance, reference.explained_variance_.sum(), rtol=1e-5)
    signs = np.sign((reference.components_[:5].T * basis[:, :5]).sum(0))
    np.testing.assert_allclose(basis[:, :5] * signs, reference.components_[:5].T, atol=1e-3)  # and order

    # targets: the loss of any z is the one over the vertices
    z = np.random.default_rng(0).standard_normal((len(activity), n))
    expected = ((z @ basis.T + mean - activity) ** 2).mean(1)
    found = (((z - pca.latents.double().numpy()) ** 2).sum(1) + pca.residual.numpy()) / data.space.n_vertices
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # single samples, targets as float16
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=1e-4)

    # the bound on every model: what the basis leaves of the validation split
    scores = []
    for s, mask in enumerate(data.space.mask.numpy()):
        y = activity[data.samples("val", s)]
        scores.append(r2_of_vertices(y, (y - mean) @ basis @ basis.T + mean)[mask])
    assert abs(pca.val_r2 - np.median(np.concatenate(scores))) < 1e-3  # of four pictures, targets as float16


def test_default_passes_of_the_pca_are_enough(fitted):
    """A flat spectrum, the hardest case: more variance than scikit-learn's solver finds with twice the products."""
    data = prepare_data.load(fitted)
    rows = data.samples("train")
    train = data.activity[rows].astype(float)
    components, _ = fit_pca.fit(fit_pca.Activity(data, rows, torch.device("cpu")), 24, fit_pca.PASSES, 0)
    best = PCA(24, svd_solver="full").fit(train)
    other = PCA(24, svd_solver="randomized", iterated_power=3, random_state=0).fit(train)  # 8 products
    total = best.explained_variance_.sum()
    ours, theirs = (1 - (train @ b).var(0, ddof=1).sum() / total for b in (components.double().numpy(), other.components_.T))
    assert -1e-6 < ours < theirs < 0.01


# ---- training -----------------------------------------------------------------------------------


def trained(stage, **values):
    """Run a training stage -> the encoder it trained, its weights before, names of what was trainable,
    the batches it saw."""
    seen = SimpleNamespace(batches=[])
    train, backward = train_head.train, train_head.backward

    def spy(*arguments):
        (seen.encoder,) = (a for a in arguments if isinstance(a, Encoder))
        seen.before = copy.deepcopy(seen.encoder.state_dict())
        train(*arguments)
        seen.trainable = {n for n, p in seen.encoder.named_parameters() if p.requires_grad}

    def spy_batch(encoder, crops, batch, *arguments):
        seen.batches.append({name: values.clone() for name, values in batch.items()})
        return backward(encoder, crops, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_head, "train", spy)
        patch.setattr(train_head, "backward", spy_batch)
        run(stage, **values)
    after = seen.encoder.state_dict()
    seen.changed = {name for name, before in seen.before.items() if not torch.equal(before, after[name])}
    return seen


both = dict(BATCH_SIZE=48, WARMUP_STEPS=2, FEATURE_DROPOUT=0.2, WEIGHT_DECAY=0.1, PRECISION="float32", DEVICE="cpu")
small = dict(TRUNK=tiny, PRETRAINED=False, LAYERS="blocks.{0,2}", IMAGE_SIZE=56, LATENT_DIM=16)


@pytest.fixture(scope="module")
def phase_1(fitted):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"))
    return trained(train_head, **folders, **both, **small, STEPS=8, VALIDATE_EVERY=3, LEARNING_RATE=0.01)


@pytest.fixture(scope="module")
def phase_2(phase_1, fitted):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"))
    return trained(finetune, **folders, **both, STEPS=4, LEARNING_RATE=0.001)


def test_training_sees_the_training_samples_with_their_targets(phase_1, fitted, subjects):
    """Batches against the files: every sample once an epoch, nothing of the other splits."""
    data = prepare_data.load(fitted)
    pca = fit_pca.load(fitted, data)
    seen = {name: torch.cat([b[name] for b in phase_1.batches]) for name in phase_1.batches[0]}
    row_of = {  # a sample is its subject and the bytes of its picture
        (s, open_resized(path).tobytes()): row
        for s, files in enumerate(subjects.values())
        for row, path in zip(np.flatnonzero(data.subject == s), files.pictures, strict=True)
    }
    rows = [row_of[s, x.numpy().tobytes()] for s, x in zip(seen["subject"].tolist(), seen["images"])]
    train = np.flatnonzero(data.split == 0)
    assert len(rows) == 8 * 48 > len(train)
    assert sorted(rows[: len(train)]) == train.tolist() and set(rows) == set(train)
    y = np.concatenate([files.common for files in subjects.values()])[rows]
    z = (y - pca.mean.numpy()) @ pca.components.numpy()
    np.testing.assert_allclose(seen["latents"], z, rtol=1e-2, atol=1e-2)  # stored as float16
    assert seen["size"].min() >= model.smallest_crop(0.8) and len(torch.unique(seen["size"])) > 20


def test_phase_1_trains_the_head_only(phase_1, fitted):
    parameters, state = dict(phase_1.encoder.named_parameters()), phase_1.before
    embedding = {"head.embed_weight", "head.embed_bias"}
    assert phase_1.trainable == {n for n in parameters if n.startswith("head.")} - embedding
    # all else is bit for bit what it was, but for batch norm's statistics
    assert phase_1.changed == {n for n in state if n.startswith("head.")} - embedding
    assert len(phase_1.trainable) == 2 * 4 + 3 and len(phase_1.changed) == 2 * 7 + 3
    assert phase_1.encoder.head.dropout == both["FEATURE_DROPOUT"]
    pca = fit_pca.load(fitted, prepare_data.load(fitted))
    assert torch.equal(parameters["head.embed_weight"], pca.components)
    assert torch.equal(parameters["head.embed_bias"], pca.mean)


def test_phase_2_trains_attention_and_head(phase_1, phase_2):
    attention = {f"trunk.vit.blocks.{i}.attn.{n}" for i in range(3) for n in beit_attention}
    assert phase_2.trainable == phase_1.trainable | attention
    assert phase_2.changed == phase_1.changed | attention
    assert phase_2.encoder.head.dropout == both["FEATURE_DROPOUT"]
    for name, before in phase_2.before.items():  # it started from the trunk of phase 1
        assert not name.startswith("trunk.") or torch.equal(before, phase_1.before[name])


def test_checkpoints_hold_what_was_trained(phase_1, phase_2, fitted):
    sizes = {n: v.numel() * v.element_size() for n, v in phase_1.encoder.state_dict().items()}
    head, trunk = (sum(v for n, v in sizes.items() if n.startswith(part)) for part in ("head.", "trunk."))
    run_dir = fitted.parent / "run"
    assert (run_dir / "head.pt").stat().st_size < head + 200_000 < trunk  # the rest: space, ROIs, settings
    assert torch.load(run_dir / "head.pt", weights_only=True)["trunk"] == {}
    found = torch.load(run_dir / "finetuned.pt", weights_only=True)["trunk"]
    assert {"trunk." + n for n in found} == {n for n in phase_2.trainable if n.startswith("trunk.")}


@pytest.mark.parametrize("phase", ["phase_1", "phase_2"])
@torch.no_grad()
def test_checkpoint_round_trip(phase, request, fitted, tmp_path):
    encoder, space = request.getfixturevalue(phase).encoder.eval(), prepare_data.load(fitted).space
    made = dict(made_with={"SEED": 0}, scores={"val_r2": 0.5}, step=7)
    model.save_checkpoint(tmp_path / "encoder.pt", encoder, space=space, **made)
    loaded, found_space, about = model.load_checkpoint(tmp_path / "encoder.pt")
    assert {n: about[n] for n in made} == made
    assert found_space.subjects == space.subjects and torch.equal(found_space.mask, space.mask)
    images = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for subject in (torch.arange(8), None):
        z = encoder(images, subject)
        assert torch.equal(loaded(images, subject), z)
        assert torch.equal(loaded.head.decode(z), encoder.head.decode(z))


def plain_adamw(phase, *, micro_batch, betas, weight_decay, rates):
    """Adam with decoupled weight decay on the squared error over all vertices, in float64, from the same
    weights and batches -> {name: parameter of the head}."""
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
    options = folders | both | dict(BATCH_SIZE=20, MICRO_BATCH=10, FEATURE_DROPOUT=0.0, STEPS=3, WARMUP_STEPS=1)
    options |= dict(LEARNING_RATE=0.01, MIN_LEARNING_RATE=0.002, BETAS=(0.8, 0.9), WEIGHT_DECAY=0.5)
    head = trained(train_head, **options, **small, TRAIN_EMBEDDING=True)
    embedding = {"head.embed_weight", "head.embed_bias"}
    assert embedding < head.trainable and len(head.trainable) == 2 * 4 + 3 + 2
    rates = [0.002, 0.01, 0.006]  # the minimum, the peak, half of the way down
    expected = plain_adamw(head, micro_batch=10, betas=(0.8, 0.9), weight_decay=0.5, rates=rates)
    for name, p in head.encoder.head.named_parameters():
        # a weight whose gradient drowns in float32's rounding may step anywhere; there are few
        assert (p - expected[name]).norm() < 0.01 * (p - head.before["head." + name]).norm(), name

    capsys.readouterr()
    run(predict, **folders, SUBMISSION_DIR=str(tmp_path / "submission"), DEVICE="cpu")
    text = capsys.readouterr().out
    assert f"predicting with {tmp_path / 'run/head.pt'}" in text and "subj08: no test pictures" in text
    assert {path.name for path in (tmp_path / "submission").iterdir()} == {"subj06", "submission.zip"}

    tuned = trained(finetune, **options)
    assert not embedding & (tuned.trainable | tuned.changed)
    written = model.load_checkpoint(tmp_path / "run/head.pt")[0].head.state_dict()
    assert all(torch.equal(tuned.before["head." + n], v) for n, v in written.items())


# ---- predictions and scores ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def submission(phase_2, fitted):
    """Predictions of finetuned.pt by the script as a user starts it."""
    folder, run_dir = fitted.parent / "submission", fitted.parent / "run"
    options = ["--data_dir", fitted, "--run-dir", run_dir, "--submission_dir", folder, "--batch-size", 5]
    process = run_process("predict.py", *options, "--precision=float32", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert f"predicting with {run_dir / 'finetuned.pt'}" in process.stdout
    return folder


@torch.no_grad()
def plain_prediction(encoder, paths, subject):
    """(n_pictures, n_vertices): files one by one through Pillow, torchvision and the encoder."""
    inputs = (plain_input(open_resized(path), encoder.trunk) for path in paths)
    z = torch.cat([encoder(x[None], torch.tensor([subject])) for x in inputs])
    return (z @ encoder.head.embed_weight.T + encoder.head.embed_bias).numpy()


def plain_scores(checkpoint, prepared, subjects, split):
    """Loss, median R² over all subjects, then of each: scikit-learn on the files."""
    encoder, data, scores, errors = model.load_checkpoint(checkpoint)[0], prepare_data.load(prepared), [], []
    for s, files in enumerate(subjects.values()):
        chosen = np.flatnonzero(data.split[data.subject == s] == ("train", "val", "test").index(split))
        prediction = plain_prediction(encoder, [files.pictures[i] for i in chosen], s)
        scores.append(r2_of_vertices(files.common[chosen][:, files.present], prediction[:, files.present]))
        errors.extend(((prediction - files.common[chosen]) ** 2).mean(1))
    return np.mean(errors), [np.median(np.concatenate(scores)), *map(np.median, scores)]


@pytest.mark.parametrize(
    "stage, output, steps", [("train_head", "head.pt", [0, 3, 6, 8]), ("finetune", "finetuned.pt", [0, 4])]
)
def test_log_and_best_checkpoint(stage, output, steps, phase_2, fitted, subjects):
    run_dir, keys = fitted.parent / "run", ["val_r2", *(f"val_r2_{name}" for name in subjects)]
    log = [json.loads(line) for line in (run_dir / f"{stage}.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == steps
    assert all({"train_loss", "val_loss", *keys} <= set(entry) for entry in log)
    assert log[0]["train_loss"] is None and all(0 < entry["train_loss"] < 10 for entry in log[1:])
    best = max(log, key=lambda entry: entry["val_r2"])
    assert model.load_checkpoint(run_dir / output)[2]["step"] == best["step"]
    loss, scores = plain_scores(run_dir / output, fitted, subjects, "val")
    # R² of four pictures magnifies the rounding of activity to float16
    np.testing.assert_allclose([best[key] for key in keys], scores, atol=1e-3)
    np.testing.assert_allclose(best["val_loss"], loss, rtol=1e-4)
    if stage == "finetune":  # begins where phase 1 was best
        phase_1 = [json.loads(line) for line in (run_dir / "train_head.jsonl").read_text().splitlines()]
        assert math.isclose(log[0]["val_r2"], max(entry["val_r2"] for entry in phase_1), abs_tol=1e-5)
    assert Image.open(run_dir / f"{stage}.png").format == "PNG"


def test_submission_file_by_file(submission, subjects, fitted):
    files = {path.relative_to(submission).as_posix() for path in submission.rglob("*.npy")}
    assert files == {f"{name}/{h}_pred_test.npy" for name in subjects for h in hemis}
    assert {path.name for path in submission.iterdir()} == {"submission.zip", *subjects}
    encoder = model.load_checkpoint(fitted.parent / "run" / "finetuned.pt")[0]
    with zipfile.ZipFile(submission / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(files)
        for s, (name, of_subject) in enumerate(subjects.items()):
            expected = plain_prediction(encoder, of_subject.test_pictures, s)  # in sorted order
            assert len(expected) == len(of_subject.test_pictures)
            for h in hemis:
                path = submission / name / f"{h}_pred_test.npy"
                found = np.load(path)
                assert archive.read(f"{name}/{path.name}") == path.read_bytes()
                assert found.dtype == np.float32 and found.shape == (len(expected), of_subject.mask[h].sum())
                # float32 in batches of other sizes; pictures differ by far more
                np.testing.assert_allclose(found, expected[:, of_subject.columns[h]], rtol=0, atol=1e-4)
                assert np.abs(found[0] - found[1:]).max(1).min() > 1e-2


def test_private_test_scores(submission, subjects, fitted):
    found = json.loads((fitted.parent / "run" / "finetuned_scores.json").read_text())
    loss, scores = plain_scores(fitted.parent / "run" / "finetuned.pt", fitted, subjects, "test")
    np.testing.assert_allclose(found["test_loss"], loss, rtol=1e-4)
    # two or three pictures a subject: R² of minus some tens
    np.testing.assert_allclose([found["test_r2"], *(found[f"test_r2_{s}"] for s in subjects)], scores, rtol=2e-3)


@torch.no_grad()
def test_authors_weights(tmp_path, monkeypatch):
    """Their file (README) predicts by their formula: embed on either term, each with its bias."""
    create = timm.create_model  # their trunk, narrower for speed
    monkeypatch.setattr(timm, "create_model", lambda *a, **options: create(*a, **options, embed_dim=96, num_heads=3))
    torch.manual_seed(1)
    vit, shapes = timm.create_model(train_head.TRUNK, pretrained=False), {}
    for i in range(6):
        shapes |= {f"feat_projs.{i}.proj.weight1": (5, 257), f"feat_projs.{i}.proj.weight2": (5, 96)}
        shapes |= {f"feat_projs.{i}.norm.{n}": (5,) for n in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"shared_proj.weight": (4, 5), "subj_proj.fc.weight": (8 * 4, 5), "subj_proj.fc.bias": (8 * 4,)}
    shapes |= {"embed.weight": (9, 4), "embed.bias": (9,)}
    w = {name: 0.1 + torch.rand(shape) for name, shape in shapes.items()}
    w |= {f"feat_projs.{i}.norm.num_batches_tracked": torch.tensor(7) for i in range(6)}
    content = {"epoch": 3, "metric": np.float64(0.2), "trunk": vit.state_dict(), "encoder": w}
    torch.save(content, tmp_path / "theirs.pt")
    space = model.Space(["subj02", "subj05"], torch.arange(9), 4, torch.ones(2, 9, dtype=torch.bool), {})
    encoder, _, _ = model.load_checkpoint(tmp_path / "theirs.pt", space=space)

    images, h = torch.randn(2, 3, 224, 224), 0
    features = block_outputs(vit, images)
    for i in range(6):
        s, c = (w[f"feat_projs.{i}.proj.{n}"] for n in ("weight1", "weight2"))
        norm = (w[f"feat_projs.{i}.norm.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
        weight, bias, mean, var = norm
        p = torch.einsum("dt,dc,ntc->nd", s, c, features[2 * i])
        h = h + ((p - mean) / (var + 1e-5).sqrt() * weight + bias) / 6
    own_weight, own_bias = (w[f"subj_proj.fc.{n}"].unflatten(0, (8, 4))[[1, 4]] for n in ("weight", "bias"))
    shared = h @ w["shared_proj.weight"].T @ w["embed.weight"].T + w["embed.bias"]
    own = torch.einsum("npd,nd->np", own_weight, h) + own_bias  # picture 0: subj02, picture 1: subj05
    whole = shared + own @ w["embed.weight"].T + w["embed.bias"]
    found = encoder.head.decode(encoder(images, torch.tensor([0, 1])))
    group = encoder.head.decode(encoder(images), group=True)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)  # float32, thousands of terms
    torch.testing.assert_close(group, shared, rtol=1e-4, atol=1e-4)

    for part, names, message in (
        ("trunk", ["blocks.4.norm1.weight"], "a trunk without vit.blocks.4.norm1.weight"),  # never a random one
        ("encoder", ["shared_proj.weight"], "lacks shared_proj.weight"),
        ("encoder", [n for n in w if n.startswith("feat_projs.5")], "does not fit eva02_base"),
    ):
        kept = {name: v for name, v in content[part].items() if name not in names}
        torch.save(content | {part: kept}, tmp_path / "part.pt")
        with pytest.raises(Problem, match=message):
            model.load_checkpoint(tmp_path / "part.pt", space=space)
    with pytest.raises(Problem, match="9 vertices, but the prepared data gives no vertex space"):
        model.load_checkpoint(tmp_path / "theirs.pt")


# ---- killed, damaged, mixed up, out of disk -----------------------------------------------------


def start(script, *arguments, before="", **options):
    """A stage as a process of its own; before: code that runs ahead of it, such as a trap."""
    code = f"import sys, runpy; sys.argv = {[script, *map(str, arguments)]!r}; sys.path.insert(0, {str(here)!r})\n"
    code += f"{before}\nrunpy.run_path({str(here / script)!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process):
    """-> (exit code, what it printed, its errors without progress bars)."""
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return process.returncode, out, err


# dies as by kill -9 in the middle of the n-th file that torch.save writes
dies_while_saving = """
import io, os, signal, torch
saves, save = 0, torch.save
def half_save(content, file):
    global saves
    saves += 1
    if saves < {n}:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half_save
"""

dies_while_decoding = """
import os, signal
from PIL import Image
opened, real = 0, Image.open
def mortal(*arguments):
    global opened
    opened += 1
    return real(*arguments) if opened < 60 else os.kill(os.getpid(), signal.SIGKILL)
Image.open = mortal
"""


def contents(folder):
    """What a stage left, loaded: npy arrays and torch dicts, by file name."""
    return {p.name: np.load(p) if p.suffix == ".npy" else torch.load(p) for p in sorted(folder.glob("[!.]*"))}


def assert_equal(a, b):
    """Equal to the bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"DATA_DIR", "RUN_DIR"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b or a != a and b != b


@pytest.fixture(scope="module")
def pair(challenge):
    """A folder with two subjects, to be damaged."""
    folder = challenge.parent / "pair"
    for name in ("subj01", "subj06"):
        shutil.copytree(challenge / name, folder / name)
    return folder


def test_preparation_and_pca_survive_kills(pair, tmp_path, capsys):
    def run_both(data):
        run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(data))
        run(fit_pca, DATA_DIR=str(data), PCA_DIM=8)

    run_both(tmp_path / "whole")
    prepare = ("prepare_data.py", "--challenge_dir", pair, "--data_dir", tmp_path / "killed")
    fit = ("fit_pca.py", "--data_dir", tmp_path / "killed", "--pca_dim", 8)
    for trap in (dies_while_decoding, dies_while_saving.format(n=1)):
        assert finish(start(*prepare, before=trap))[0] == -signal.SIGKILL
        with pytest.raises(Problem, match="not completely. prepared"):
            prepare_data.load(tmp_path / "killed")
    assert finish(start(*prepare))[0] == 0
    assert finish(start(*fit, before=dies_while_saving.format(n=1)))[0] == -signal.SIGKILL
    with pytest.raises(Problem, match="pca.pt not found"):
        fit_pca.load(tmp_path / "killed", prepare_data.load(tmp_path / "killed"))
    capsys.readouterr()
    run_both(tmp_path / "killed")
    assert "prepared already" in capsys.readouterr().out
    assert_equal(contents(tmp_path / "whole"), contents(tmp_path / "killed"))


def test_training_continues_bit_for_bit(fitted, tmp_path, capsys):
    """Killed while writing the first checkpoint, the first state and a later file, terminated once,
    interrupted once: the end is that of a run left alone."""
    settings = dict(DATA_DIR=str(fitted), STEPS=40, VALIDATE_EVERY=8, BATCH_SIZE=16, WARMUP_STEPS=2, LEARNING_RATE=0.01)
    settings |= small | dict(LAYERS="blocks.{0,1}")
    left_alone, killed = tmp_path / "left_alone", tmp_path / "killed"
    run(train_head, **settings, RUN_DIR=str(left_alone))
    options = [part for name, value in settings.items() for part in (f"--{name.lower()}", value)]
    command = ("train_head.py", "--run_dir", killed, *options)
    for n in (1, 2, 3):
        assert finish(start(*command, before=dies_while_saving.format(n=n)))[0] == -signal.SIGKILL
    for number in (signal.SIGTERM, signal.SIGINT):
        # a step that waits for the signal makes sure that it comes in the middle of the run
        wait = f"""
import os, signal, time, torch
steps, step = 0, torch.optim.AdamW.step
def signalled(*arguments, **options):
    global steps
    steps += 1
    if steps == 3:
        os.kill(os.getpid(), {int(number)})
    return step(*arguments, **options)
torch.optim.AdamW.step = signalled
"""
        code, _, errors = finish(start(*command, before=wait))
        assert code == 128 + number and f"stopped by {number.name} after step" in errors
    code, out, _ = finish(start(*command))
    assert code == 0 and "continuing after step" in out
    assert (killed / "train_head.jsonl").read_bytes() == (left_alone / "train_head.jsonl").read_bytes()
    assert_equal(torch.load(left_alone / "head.pt"), torch.load(killed / "head.pt"))
    before = (killed / "head.pt").stat().st_mtime_ns
    run(train_head, **settings, RUN_DIR=str(killed))
    assert "is finished" in capsys.readouterr().out and (killed / "head.pt").stat().st_mtime_ns == before
    made = torch.load(killed / "head.pt")["made_with"]
    assert made["STEPS"] == 40 and made["data_fingerprint"] == prepare_data.load(fitted).fingerprint
    with pytest.raises(Problem, match="WEIGHT_DECAY: 0.8 there, 0.3 now(?s:.)*--overwrite true"):
        run(train_head, **settings, RUN_DIR=str(killed), WEIGHT_DECAY=0.3)


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def change(path, **values):
    array = np.load(path)
    for name, value in values.items():
        array = {"rows": lambda v: array[:v], "columns": lambda v: array[:, :v], "dtype": array.astype}[name](value)
    np.save(path, array)


def put(path, where, value):
    array = np.load(path)
    array[where] = value
    np.save(path, array)


class Evil:
    """Unpickled freely, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


fmri = "training_split/training_fmri/{}_training_fmri.npy"
lh_mask = "roi_masks/lh.all-vertices_fsaverage_space.npy"
mapping = "roi_masks/mapping_streams.npy"
damages = {
    "activity missing": (fmri.format("lh"), remove, "lh_training_fmri.npy is missing"),
    "too few rows": (fmri.format("lh"), lambda p: change(p, rows=7), "7 rows, but 40 training pictures"),
    "too few columns": (fmri.format("lh"), lambda p: change(p, columns=3), "3 columns, but"),
    "integers": (fmri.format("lh"), lambda p: change(p, dtype=np.int32), "int32 of shape"),
    "NaN": (fmri.format("lh"), lambda p: put(p, (2, 3), np.nan), "1 values are NaN or infinite"),
    "infinity": (fmri.format("rh"), lambda p: put(p, (2, slice(3)), np.inf), "3 values are NaN or infinite"),
    "cut array": (fmri.format("rh"), cut, "not a whole npy array"),
    "short mask": (lh_mask, lambda p: change(p, rows=1000), r"shape \(1000,\), expected \(163842,\)"),
    "empty mask": (lh_mask, lambda p: put(p, slice(None), 0), "empty mask"),
    "mask of twos": (lh_mask, lambda p: put(p, 5, 2), "other than 0 and 1"),
    "no mask": (lh_mask, remove, "all-vertices_fsaverage_space.npy is missing"),
    "short labels": ("roi_masks/rh.streams_challenge_space.npy", lambda p: change(p, rows=3), r"of shape \(3,\)"),
    "no labels": ("roi_masks/rh.streams_challenge_space.npy", remove, "challenge_space.npy is missing"),
    "mapping of names": (mapping, lambda p: np.save(p, {"V1": 1}), "expected a dict of integers to names"),
    "mapping array": (mapping, lambda p: np.save(p, np.arange(3)), "refused, it holds int64"),
    "evil mapping": (mapping, lambda p: np.save(p, {1: Evil(p.with_name("touched"))}), "asks for pathlib.Path.touch|asks for"),
    "no pictures": ("training_split/training_images", shutil.rmtree, "training_images is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", damages)
def test_damaged_folder_is_refused(name, pair, tmp_path):
    shutil.copytree(pair / "subj01", tmp_path / "folder" / "subj01")
    file, damage, message = damages[name]
    damage(tmp_path / "folder" / "subj01" / file)
    with pytest.raises(Problem, match=message):
        run(prepare_data, CHALLENGE_DIR=str(tmp_path / "folder"), DATA_DIR=str(tmp_path / "data"))
    assert not (tmp_path / "data").exists() and not list(tmp_path.rglob("touched"))


def png_claiming(size):
    """A small PNG whose header says size x size: a decompression bomb."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()[:16] + 2 * size.to_bytes(4, "big") + file.getvalue()[24:]


def test_bad_pictures_are_told_at_once(pair, tmp_path):
    """One message with every fault, exit code 1, no traceback, nothing written."""
    folder = tmp_path / "folder"
    shutil.copytree(pair, folder)
    paths = sorted((folder / "subj01/training_split/training_images").iterdir())
    cut(paths[0])
    paths[1].write_bytes(b"")
    Image.open(paths[2]).save(paths[2], "JPEG")
    Image.open(paths[3]).convert("L").save(paths[3])
    Image.open(paths[4]).crop((0, 0, 80, 60)).save(paths[4])
    paths[5].write_bytes(png_claiming(60000))
    shutil.copy(paths[7], paths[7].with_name(f"train-9999_nsd-{paths[7].stem[-5:]}.png"))
    paths[8].rename(paths[8].with_name("picture.png"))
    shutil.rmtree(folder / "subj06/test_split")  # only predicting needs them
    change(folder / "subj06" / fmri.format("lh"), rows=7)
    code, _, errors = finish(start("prepare_data.py", "--challenge_dir", folder, "--data_dir", tmp_path / "data"))
    assert code == 1 and not (tmp_path / "data").exists()
    expected = ("truncated PNG", "empty file", "not a PNG", "greyscale", "80 x 60 px", "60000 x 60000 px",
                "stands 2 times", "name not understood", "7 rows, but", "problems in")  # fmt: skip
    assert [text for text in expected if text not in errors] == []


def test_picture_damaged_inside_leaves_old_data_alone(pair, tmp_path):
    folder, data = tmp_path / "folder", tmp_path / "data"
    shutil.copytree(pair, folder)
    run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data))
    before = contents(data)
    path = sorted((folder / "subj06/training_split/training_images").iterdir())[3]
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(400) + whole[600:])  # both ends as they were
    with pytest.raises(Problem, match=f"{path.name}: damaged picture"):
        run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data), OVERWRITE=True)
    assert_equal(before, contents(data))


def test_inputs_are_not_mixed(pair, fitted, phase_2, tmp_path):
    """A PCA of other data, a checkpoint of another PCA, files of two preparations, an old finetuned.pt."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    folders = dict(DATA_DIR=str(data), RUN_DIR=str(run_dir))
    run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(data))
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=8)
    options = folders | both | dict(BATCH_SIZE=8, STEPS=1)
    run(train_head, **options, **small)
    run(finetune, **options)
    with pytest.raises(Problem, match="head_fingerprint"):  # of a head trained again, differently
        run(train_head, **options | dict(SEED=5), **small, OVERWRITE=True)
        run(predict, **folders)
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=9, OVERWRITE=True)
    with pytest.raises(Problem, match="pca_fingerprint"):
        run(finetune, **options, OVERWRITE=True)
    with pytest.raises(Problem, match="PCA_DIM is 5000, expected 1 to"):
        run(fit_pca, DATA_DIR=str(data), PCA_DIM=5000, OVERWRITE=True)
    run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(data), SEED=9, OVERWRITE=True)
    with pytest.raises(Problem, match="pca.pt was fitted to data"):
        run(train_head, **options, **small, OVERWRITE=True)
    with pytest.raises(Problem, match="data_fingerprint"):
        run(predict, **folders, CHECKPOINT=str(run_dir / "head.pt"))
    shutil.copy(fitted / "activity.npy", data / "activity.npy")
    with pytest.raises(Problem, match="files of different runs"):
        run(fit_pca, DATA_DIR=str(data))


def test_full_disk(fitted, tmp_path, monkeypatch):
    """Files may not grow beyond 150 kB: the stage says so, and what was there stays."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    (tmp_path / "run").mkdir()
    arguments = ("--data_dir", fitted, "--run_dir", tmp_path / "run", "--trunk", tiny, "--pretrained", "false",
                 "--layers", "blocks.0", "--steps", 1, "--batch_size", 8)  # fmt: skip
    code, _, errors = finish(start("train_head.py", *arguments, before=limit))
    assert code == 1 and "File too large" in errors and "Free disk" in errors
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(Problem, match="0.0 GB of disk free, expected"):
        run(train_head, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "run"), **both | small)


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(fitted, tmp_path):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path))
    values = folders | both | small | dict(STEPS=12, VALIDATE_EVERY=4, LEARNING_RATE=1e30)
    with pytest.raises(Problem, match="loss is not finite"):
        run(train_head, **values)
    assert model.load_checkpoint(tmp_path / "head.pt")[2]["step"] == 0
    weights = torch.load(tmp_path / "head.pt")["head"]
    assert all(values.isfinite().all() for values in weights.values())


def test_files_from_outside_run_nothing(phase_1, fitted, tmp_path):
    path = tmp_path / "head.pt"
    torch.save({"format": "encoder-1", "head": Evil(tmp_path / "touched")}, path)
    with pytest.raises(Problem, match="cannot be read"):
        model.load_checkpoint(path)
    checkpoint = torch.load(fitted.parent / "run" / "head.pt")
    checkpoint["space"]["subjects"][0] = "../../elsewhere"
    torch.save(checkpoint, path)
    with pytest.raises(Problem, match="not one of our checkpoints"):
        model.load_checkpoint(path)
    path.write_bytes((fitted.parent / "run" / "head.pt").read_bytes()[:-1000])
    with pytest.raises(Problem, match="cannot be read"):
        model.load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(Problem, match="has format list, expected encoder-1"):
        model.load_checkpoint(path)
    assert not (tmp_path / "touched").exists()


def test_latents_in_float16_change_no_score():
    generator = torch.Generator().manual_seed(0)
    components = torch.linalg.qr(torch.randn(400, 40, generator=generator))[0]
    latents = torch.randn(60, 40, generator=generator) * torch.logspace(2, -1, 40)
    activity = latents @ components.T + 0.3 * torch.randn(60, 400, generator=generator)
    stored = fit_pca.narrow(latents)
    assert stored.dtype == torch.float16
    scores = [model.r2_score(activity, z.float() @ components.T) for z in (latents, stored)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    assert fit_pca.narrow(latents * 1e4).dtype == torch.float32  # would overflow


# ---- scores, figures, own pictures --------------------------------------------------------------


def original_test(challenge, subject, kind="test_fmri/{}_test_fmri.npy"):
    """A subject's held-out activity (n_images, n_vertices) or ceilings, left hemisphere first."""
    return np.concatenate([np.load(challenge / subject / "test_split" / kind.format(h)) for h in hemis], axis=-1)


def test_scores_are_scikit_learns_and_scipys(submission, challenge, fitted, subjects, tmp_path):
    """Of the submission against the files of the organisers' held-out data; the checkpoint's are the same."""
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"), CHALLENGE_DIR=str(challenge), DEVICE="cpu")
    ceilings = tmp_path / "percent"
    for name in subjects:
        for hemi in hemis:
            path = Path(name, "test_split/noise_ceiling", f"{hemi}_noise_ceiling.npy")
            (ceilings / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(ceilings / path, 100 * np.load(challenge / path))
    run(evaluate, **folders, SUBMISSION=str(submission), OUTPUT_DIR=str(tmp_path / "a"), FIGURES=False)
    run(evaluate, **folders, SPLIT="challenge", OUTPUT_DIR=str(tmp_path / "b"), FIGURES=False, PRECISION="float32",
        NOISE_CEILING_DIR=str(ceilings))  # fmt: skip
    a, b = (np.load(tmp_path / x / "vertices.npz") for x in "ab")
    expected = {"r2": [], "r": [], "challenge": []}
    for s, name in enumerate(subjects):
        y, ceiling = original_test(challenge, name), original_test(challenge, name, "noise_ceiling/{}_noise_ceiling.npy")
        mine = subjects[name].present
        prediction = np.concatenate([np.load(submission / name / f"{h}_pred_test.npy") for h in hemis], axis=1)
        expected["r2"].append(r2_of_vertices(y, prediction))
        r = np.array([scipy.stats.pearsonr(*pair).statistic for pair in zip(y.T, prediction.T)])
        expected["r"].append(r)
        expected["challenge"].append(np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1))
        for metric, values in expected.items():
            found = a[f"subject_{metric}"][s]
            np.testing.assert_allclose(found[mine], values[-1], rtol=1e-5, atol=1e-5)
            assert np.isnan(np.delete(found, mine)).all()
            # other batch sizes; a small r over a ceiling of nearly nothing magnifies that
            np.testing.assert_allclose(b[f"subject_{metric}"][s][mine], values[-1], rtol=1e-2, atol=1e-3)
    scores = json.loads((tmp_path / "a/scores.json").read_text())["scores"]["subject"]
    for metric, parts in expected.items():
        whole = np.concatenate(parts)
        assert scores["all"][metric] == pytest.approx({"median": np.median(whole), "mean": np.mean(whole)}, abs=1e-5)
        assert scores["subj06"][metric]["mean"] == pytest.approx(parts[5].mean(), abs=1e-5)
    rows = list(csv.DictReader((tmp_path / "a/scores.csv").open()))
    where = dict(subject="subj02", hemisphere="rh", roi_group="prf-visualrois", roi="V2v", metric="r", prediction="subject")
    (row,) = (row for row in rows if where.items() <= row.items())
    labels = np.load(challenge / "subj02/roi_masks/rh.prf-visualrois_challenge_space.npy")
    v2v = expected["r"][1][-len(labels) :][labels == 3]
    assert int(row["n_vertices"]) == len(v2v) and float(row["mean"]) == pytest.approx(v2v.mean(), abs=1e-5)
    assert len(json.loads((tmp_path / "b/scores.json").read_text())["scores"]["group"]) == 9


def test_figures(phase_2, challenge, fitted, tmp_path):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"), CHALLENGE_DIR=str(challenge), DEVICE="cpu")
    run(evaluate, **folders, OUTPUT_DIR=str(tmp_path))
    names = {path.name.split("_")[1] for path in tmp_path.glob("figure_*.png")}
    assert names == {"2a", "2b", "3", "4a", "4b", "4c"}
    for path in tmp_path.glob("figure_*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        assert len(pixels) > 300_000 and len(np.unique(pixels, axis=0)) > 50  # something is drawn
        assert (pixels == 255).all(1).mean() > 0.2  # and not all over


def test_flat_maps_show_values_where_the_vertices_are(fitted):
    """Every vertex that the flat patch holds has its value at its place; missing ones are NaN."""
    space = prepare_data.load(fitted).space
    flat = flatmap.FlatMap(space)
    values = np.random.default_rng(0).random(space.n_vertices)
    shown = flat.image(values)
    at = flat.weight.max(2) > 0.97  # pixels nearly on a vertex
    nearest = np.take_along_axis(flat.column, flat.weight.argmax(2)[:, :, None], 2)[:, :, 0]
    known = at & (nearest >= 0)
    assert known.sum() > 10
    np.testing.assert_allclose(shown[known], values[nearest[known]], atol=0.05)
    assert np.isnan(shown[at & (nearest < 0)]).all()
    assert np.isnan(flat.image(np.full(space.n_vertices, np.nan))).all()


def test_own_pictures(submission, subjects, fitted, tmp_path):
    """The challenge's test pictures as own pictures: the submission's predictions, for any mode and shape,
    without the prepared data."""
    checkpoint, pictures = tmp_path / "only.pt", tmp_path / "pictures"
    shutil.copy(fitted.parent / "run/finetuned.pt", checkpoint)
    (pictures / "more").mkdir(parents=True)
    for i, path in enumerate(subjects["subj06"].test_pictures):
        picture = Image.open(path)
        if i == 1:  # transparent outside of the middle, wider than high
            wide = Image.new("RGBA", (120, 80))
            wide.paste(picture, (20, 0))
            wide.save(pictures / "more" / f"{i}.png")
        elif i == 2:  # lying on its side, as cameras store it
            exif = Image.Exif()
            exif[274] = 6
            picture.rotate(90).save(pictures / f"{i}.tiff", exif=exif)
        else:
            picture.save(pictures / f"{i}.{('png', 'bmp', 'webp')[i % 3]}", **{"lossless": True} if i % 3 == 2 else {})
    (pictures / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    code, out, _ = finish(start(
        "predict.py", "--checkpoint", checkpoint, "--images", pictures, "--subject", "subj06,group", "--output_dir", output,
        "--data_dir", tmp_path / "none", "--precision", "float32",
    ))  # fmt: skip
    assert code == 0 and "centre-cropped to a square: 1 of" in out and "left out 1 files" in out
    n = len(subjects["subj06"].test_pictures)
    index = np.concatenate([np.flatnonzero(subjects["subj06"].mask[h]) for h in hemis[:1]])
    expected = np.load(submission / "subj06/lh_pred_test.npy")
    for i in range(n):
        stem = output / "subj06" / (f"more/{i}" if i == 1 else f"{i}")
        found = np.load(f"{stem}_lh.npy")
        np.testing.assert_allclose(found, expected[i], rtol=0, atol=1e-4)  # batches of other sizes
        surface = nibabel.load(f"{stem}_lh.func.gii").darrays[0].data
        assert surface.shape == (163842,) and (surface[index] == found).all()
        assert np.isnan(np.delete(surface, index)).all()
        assert Image.open(f"{stem}.png").format == "PNG"
    assert len(list((output / "group").rglob("*_rh.npy"))) == n
    rows = [r for r in csv.DictReader((output / "rois.csv").open()) if (r["picture"], r["subject"]) == ("0", "subj06")]
    whole = next(r for r in rows if r["roi"] == "all" and r["roi_group"] == "all")
    assert float(whole["lh"]) == pytest.approx(expected[0].mean(), abs=1e-4)
    cut(pictures / "0.png")
    (pictures / "bomb.png").write_bytes(png_claiming(60000))
    with pytest.raises(Problem, match="(?s)2 found.*0.png.*bomb.png"):
        run(predict, CHECKPOINT=str(checkpoint), IMAGES=str(pictures), OUTPUT_DIR=str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
