"""The parts, each by itself: head, crops, scores, splits, training's order and schedule, constants.

Every test of the project compares with something independent (plain loops in float64, scikit-learn,
torchvision, Pillow, the files of the challenge folder) or with an identity.
"""

import copy
import math
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import batches
import demo
import evaluate
import finetune
import fit_pca
import model
import predict
import prepare_data
import train_head
import training
from common import Problem, constants, run_script
from model import Crops, Encoder, Head
from scores import median_r2, r2_score
from shared_fixtures import here, plain_input, r2_of_vertices, run


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
        base = Encoder(Patches(), Head([(257, 768)] * 6, 1024, 2048, 8, 39548, 0.9))
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
    loss = training.loss_of(head, head(features, subject), batch)
    loss.backward()
    found = {n: p.grad.double() for n, p in head.named_parameters() if p.requires_grad}
    assert len(found) == 2 * 4 + 3
    # in PCA space only the targets are rounded to float32, all else is float64
    tolerance = dict(rtol=1e-6, atol=1e-7) if space == "pca" else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **tolerance)
    torch.testing.assert_close(found, {n: plain.get_parameter(n).grad for n in found}, **tolerance)


# ---- crops --------------------------------------------------------------------------------------


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
    found = r2_score(torch.from_numpy(y), torch.from_numpy(prediction))
    assert (found[3], found[4]) == (0, 1) and found.dtype == torch.float64
    # a mean of 100 leaves float32 5 digits of the deviations from it
    np.testing.assert_allclose(found, r2_of_vertices(y, prediction), rtol=0, atol=1e-5)
    assert r2_score(torch.ones(1, 12), torch.zeros(1, 12)).isnan().all()  # one picture has none


def test_headline_survives_subjects_without_scores():
    """One with a single picture, one with none; test_log_and_best_checkpoint has the usual case."""
    scores = [torch.tensor([0.1, 0.5, 0.2]), torch.full((3,), torch.nan), None]
    found = median_r2(scores, ["subj02", "subj05", "subj08"], "val_r2")
    assert list(found) == ["val_r2", "val_r2_subj02", "val_r2_subj05", "val_r2_subj08"]
    np.testing.assert_allclose(list(found.values()), [0.2, 0.2, np.nan, np.nan], rtol=1e-6)


def test_latents_in_float16_change_no_score():
    generator = torch.Generator().manual_seed(0)
    components = torch.linalg.qr(torch.randn(400, 40, generator=generator))[0]
    latents = torch.randn(60, 40, generator=generator) * torch.logspace(2, -1, 40)
    activity = latents @ components.T + 0.3 * torch.randn(60, 400, generator=generator)
    stored = fit_pca.narrow(latents)
    assert stored.dtype == torch.float16
    scores = [r2_score(activity, z.float() @ components.T) for z in (latents, stored)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    assert fit_pca.narrow(latents * 1e4).dtype == torch.float32  # would overflow


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
    orders = [batches.sample_order(step, batch_size, 10, seed=3) for step in range(100 // batch_size)]
    epochs = np.concatenate(orders).reshape(10, 10)  # batches of 4 cross the ends of epochs, those of 25 span them
    assert (np.sort(epochs, axis=1) == np.arange(10)).all() and len(np.unique(epochs, axis=0)) == 10
    assert np.array_equal(orders[2], batches.sample_order(2, batch_size, 10, seed=3))
    assert not np.array_equal(orders[0], batches.sample_order(0, batch_size, 10, seed=4))


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
        assert math.isclose(training.learning_rate(step, train_head), rate, rel_tol=1e-9), step
    assert training.learning_rate(0, finetune) == 0 and training.learning_rate(100, finetune) == 1e-5


class Patches(nn.Module):
    """Stands in for a trunk: 4 x 4 px patches, and their squares, as features."""

    image_size, mean, std = 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
    layers, settings, stored = ["blocks.0", "blocks.1"], {"layers": "blocks.*"}, set()

    def forward(self, images):
        x = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return [x, x**2]  # (n, 4, 48) each


@pytest.mark.parametrize("micro_batch", [0, 2, 4])
def test_micro_batches_add_up_to_the_batch(micro_batch):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = Encoder(Patches(), Head([(4, 48)] * 2, 5, 3, 2, 9)).eval()
    batch = dict(zip(("top", "left", "size"), model.random_boxes(8, 0.5, rng, source=16)))
    batch["images"] = torch.from_numpy(rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    batch |= {"subject": torch.arange(8) % 2, "latents": torch.randn(8, 3), "residual": torch.rand(8)}
    crops = Crops(encoder.trunk, model.smallest_crop(0.5, source=16), source=16)
    learner = training.Learner(encoder, constants(vars(train_head)), "head.pt", {}, torch.device("cpu"), torch.float32)
    learner.update = encoder.train = lambda *_: None  # keeps gradients, and statistics fixed
    training.train_step([learner], crops, batch, 0, micro_batch)
    loss = learner.loss
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


def test_unknown_constant_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--run_dir", str(tmp_path / "run"), "--stepz", "5"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(here / "finetune.py"), run_name="__main__")
    message = end.value.code  # a string: Python prints it and exits with 1
    assert isinstance(message, str) and not (tmp_path / "run").exists()
    assert "--stepz" in message and "--warmup_steps" in message and "Traceback" not in message


@pytest.mark.parametrize(
    "stage, name, value",
    [
        (prepare_data, "SEED", -1), (prepare_data, "WORKERS", -1), (fit_pca, "PASSES", 0),
        (train_head, "LATENT_DIM", 0),
        (train_head, "BATCH_SIZE", 1), (train_head, "MICRO_BATCH", 100), (train_head, "LEARNING_RATE", math.nan),
        (train_head, "BETAS", (2.0, 1.0)), (train_head, "FEATURE_DROPOUT", 1.0), (train_head, "CROP_SCALE", 0.0),
        (train_head, "DEVICE", "meta"), (train_head, "PRECISION", "half"), (finetune, "WEIGHT_DECAY", -1.0),
        (predict, "BATCH_SIZE", 0), (evaluate, "SPLIT", "train"),
    ],
)  # fmt: skip
def test_senseless_values_are_refused_before_anything_is_read(stage, name, value):
    with pytest.raises(Problem, match=f"{name} is .*expected"):
        run(stage, **{name: value})
