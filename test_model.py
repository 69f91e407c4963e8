"""The model and the formulas around it against independent references: timm's hooks, torchvision, scikit-learn, plain
loops in float64; and one run of all five stages. No data, network or GPU needed: pytest test_model.py
"""

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import timm
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import finetune
import fit_pca
import predict
import prepare_data
import train_head
from core.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from core.files import save_torch
from core.scores import median_r2, r2_score
from core.space import N_FSAVERAGE, Space
from core.training import learning_rate, loss_of
from model import (
    Crops,
    Encoder,
    Head,
    Trunk,
    UserError,
    parse_layers,
    random_boxes,
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
    ours = Crops(trunk, scale)(images, top, left, size)
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
    assert size.min() >= round(256 * 0.8**0.5) and abs(float(area.mean()) - 0.9) < 0.01
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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        Trunk(*arguments)


# ---- the formulas around the model ---------------------------------------------------------------


def test_loss_in_pca_space_has_the_value_and_gradients_of_the_loss_over_vertices(trunk):
    rng = torch.Generator().manual_seed(0)
    head = make_head(trunk).double()
    basis = torch.linalg.qr(torch.randn(20, 9, generator=rng, dtype=torch.float64))[0]  # a head of 7 of 9 components
    mean, activity = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((20,), (5, 20)))
    head.embed_weight.data, head.embed_bias.data = basis[:, :7], mean
    targets = (activity - mean) @ basis
    batch = {"latents": targets, "residual": (activity - mean).square().sum(1) - targets.square().sum(1)}
    z = torch.randn(5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    ours = loss_of(head, z, batch)
    expected = (head.decode(z) - activity).square().mean()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (ours, expected)))


def test_learning_rate_is_torchs_linear_then_cosine_schedule():
    s = SimpleNamespace(STEPS=50, WARMUP_STEPS=10, LEARNING_RATE=0.01, MIN_LEARNING_RATE=0.001)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=s.LEARNING_RATE)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.001)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [10])
    for step in range(51):
        assert learning_rate(step, s) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_splits_do_not_leak():
    """A picture has one split for everybody; every subject gets 85/10/5 %; shared pictures can be the test."""
    rng = np.random.default_rng(0)
    seen = np.eye(8, dtype=bool)[rng.integers(8, size=4000)]
    seen[rng.random(4000) < 0.1] = True
    split = prepare_data.split_pictures(seen, seed=1)
    assert split.shape == (4000,) and set(split) == {0, 1, 2}
    for s in range(8):
        shares = np.bincount(split[seen[:, s]]) / seen[:, s].sum()
        np.testing.assert_allclose(shares, [0.85, 0.10, 0.05], atol=0.01)
    assert (split != prepare_data.split_pictures(seen, seed=2)).any()
    shared = prepare_data.split_shared(seen, seed=1)
    assert np.array_equal(shared == 2, seen.all(1))
    assert (shared == 1).sum() == round(0.1 * (~seen.all(1)).sum())


def test_pca_is_the_exact_one():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((200, 60)) * np.geomspace(3, 0.1, 60) @ np.linalg.qr(rng.standard_normal((60, 60)))[0]
    y -= y.mean(0)
    components = fit_pca.fit(torch.from_numpy(y).float(), 8, passes=6, seed=0).double().numpy()
    exact = np.linalg.svd(y)[2][:8].T
    np.testing.assert_allclose(np.abs(components.T @ exact), np.eye(8), atol=1e-3)


def test_r2_is_scikit_learns():
    rng = np.random.default_rng(0)
    activity = rng.standard_normal((30, 40)).astype(np.float32)
    activity[:, 3] = 1.0  # constant vertices: one predicted exactly, one not
    activity[:, 4] = 2.0
    prediction = activity + rng.standard_normal((30, 40)).astype(np.float32)
    prediction[:, 3] = 1.0
    ours = r2_score(torch.from_numpy(activity), torch.from_numpy(prediction)).numpy()
    expected = sklearn.metrics.r2_score(activity, prediction, multioutput="raw_values")
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    medians = median_r2([ours[:10], ours[10:]], ["a", "b"])
    np.testing.assert_allclose([*medians.values()], [np.median(x) for x in (ours, ours[:10], ours[10:])])
    prediction[0, 7] = np.nan
    with pytest.raises(UserError, match="finite"):
        r2_score(torch.from_numpy(activity), torch.from_numpy(prediction))


# ---- checkpoints and stages ----------------------------------------------------------------------


@pytest.fixture
def space():
    return Space(["a", "b", "c"], torch.arange(20), 12, torch.ones(3, 20, dtype=torch.bool), {})


def test_checkpoint_round_trip(trunk, space, tmp_path):
    """Predictions survive, also of a fine-tuned trunk that is loaded and saved again; a flipped bit is noticed."""
    tuned = Trunk("eva02_tiny_patch14_224.mim_in22k", "0,2", 56, pretrained=False)
    for name in tuned.attention_parameters():
        tuned.get_parameter(name).data += 0.1
        tuned.get_parameter(name).requires_grad_(True)
    encoder = Encoder(tuned, make_head(trunk)).eval()
    images, subject = torch.randn(2, 3, 56, 56), torch.tensor([1, 2])
    record = dict(made_with={"STEPS": 3}, scores={"val_r2": 0.1}, step=3, finished=True, train_nsd_ids=[5, 5, 7])
    paths = [tmp_path / "first.pt", tmp_path / "second.pt"]
    save_checkpoint(paths[0], encoder, space=space, **record)
    for path in paths:
        loaded, loaded_space, info = load_checkpoint(path)
        with torch.no_grad():
            assert torch.equal(loaded(images, subject), encoder(images, subject))
        save_checkpoint(paths[1], loaded, space=loaded_space, **record)
    assert info["made_with"] == {"STEPS": 3} and info["train_nsd_ids"].tolist() == [5, 7]
    assert loaded_space.subjects == space.subjects and torch.equal(loaded_space.mask, space.mask)
    content = read_checkpoint(paths[1])
    save_torch(paths[1], content | {"trunk_settings": content["trunk_settings"] | {"seed": 1}}, content["format"])
    with pytest.raises(UserError, match="trained with other"):
        load_checkpoint(paths[1])
    content = bytearray(paths[0].read_bytes())
    content[len(content) // 2] ^= 16
    paths[0].write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(paths[0])


def write_challenge_folder(root, n_pictures=40, n_test=3):
    """Two subjects with 12 and 11 vertices a hemisphere who see noise and answer with noise."""
    rng = np.random.default_rng(0)
    for number, missing in ((1, 0), (2, 1)):
        folder = root / f"subj{number:02d}"
        for split, n in (("training", n_pictures), ("test", n_test)):
            (folder / f"{split}_split/{split}_images").mkdir(parents=True)
            for i in range(n):
                nsd_id = 1000 * number + n - i  # not in the order of the names
                name = f"{split.removesuffix('ing')}-{i + 1:04d}_nsd-{nsd_id:05d}.png"
                noise = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{split}_split/{split}_images" / name)
        (folder / "roi_masks").mkdir()
        (folder / "training_split/training_fmri").mkdir()
        for hemi in ("lh", "rh"):
            mask = np.zeros(N_FSAVERAGE)
            mask[100 : 112 - missing] = 1
            np.save(folder / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy", mask)
            activity = rng.standard_normal((n_pictures, 12 - missing)).astype(np.float32)
            np.save(folder / f"training_split/training_fmri/{hemi}_training_fmri.npy", activity)


def test_all_five_stages(tmp_path, monkeypatch):
    """From a challenge folder to submission.zip, whose numbers are those of load_encoder."""
    write_challenge_folder(tmp_path / "challenge")
    monkeypatch.chdir(tmp_path)
    small = dict(BATCH_SIZE=16, STEPS=4, WARMUP_STEPS=1, DEVICE="cpu", PRECISION="float32")
    head = dict(TRUNK="eva02_tiny_patch14_224.mim_in22k", PRETRAINED=False, LAYERS="0,1", IMAGE_SIZE=56, LATENT_DIM=8)
    stages = (
        (prepare_data, {}),
        (fit_pca, dict(PCA_DIM=6)),
        (train_head, head | small),
        (finetune, small),
        (predict, {}),
    )
    for stage, constants in stages:
        for name, value in constants.items():
            monkeypatch.setattr(stage, name, value)
        stage.main()
    encoder = predict.load_encoder("runs/base/finetuned.pt", device="cpu", precision=predict.PRECISION)
    assert encoder.subjects == ["subj01", "subj02"] and encoder.space.n_vertices == 24
    with zipfile.ZipFile("runs/base/submission/submission.zip") as archive:
        assert len(archive.namelist()) == 4
        for name, n_vertices in (("subj01", 12), ("subj02", 11)):
            paths = sorted((tmp_path / f"challenge/{name}/test_split/test_images").iterdir())
            images = np.stack([prepare_data.decode_picture(path) for path in paths])
            activity = encoder.predict(images, name)
            for hemi, expected in (("lh", activity.lh), ("rh", activity.rh)):
                submitted = np.load(io.BytesIO(archive.read(f"{name}/{hemi}_pred_test.npy")))
                assert submitted.dtype == np.float32 and submitted.shape == (3, n_vertices)
                np.testing.assert_allclose(submitted, expected, atol=1e-5)
