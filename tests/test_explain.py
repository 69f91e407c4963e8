"""Explanations: contributions add up to the prediction, and receptive fields are where they were planted."""

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import r2_score

import fit_pca
import prepare_data
from core.checkpoint import load_checkpoint, save_checkpoint
from core.space import HEMIS
from model import Crops, Encoder, Head, Trunk, UserError, trunk_outputs
from tests.conftest import TINY, run_stage
from tools import contributions, explain, predict_pictures
from tools.simulate import planted_fields, simulate

TRUNKS = {  # name: (size, prefix tokens)
    TINY: (56, 1),
    "vit_small_patch14_reg4_dinov2.lvd142m": (56, 5),
    "vit_relpos_small_patch16_224.sw_in1k": (64, 0),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3), dtype=np.uint8)


def make_encoder(name=TINY, size=56, n_vertices=9):
    """Two layers, two subjects, and batch norm that has seen data."""
    torch.manual_seed(1)
    trunk = Trunk(name, "0,2", size, pretrained=False)
    head = Head(trunk.feature_shapes, 6, 4, 2, n_vertices)
    torch.nn.init.normal_(head.embed_weight)
    torch.nn.init.normal_(head.embed_bias)
    for projection in head.projections:
        for values in (projection.norm.running_mean, projection.norm.weight.data, projection.norm.bias.data):
            torch.nn.init.normal_(values)
        projection.norm.running_var.uniform_(0.5, 2)
    return Encoder(trunk, head).eval()


def decompose(encoder, subject=1, images=IMAGES):
    """-> contributions (n_vertices, n, n_layers, n_tokens), predictions (n, n_vertices) and the decomposition."""
    with torch.inference_mode():
        decomposition = contributions.Decomposition(encoder, subject, np.arange(len(encoder.head.embed_bias)))
        terms, h = decomposition(images, torch.float32)
        return (terms @ decomposition.weights.T).movedim(-1, 0), encoder.predict(h, subject), decomposition


@pytest.mark.parametrize("subject", [1, None])
@pytest.mark.parametrize("name", TRUNKS)
def test_a_contribution_is_what_the_prediction_loses_without_that_token(name, subject):
    size, n_prefix = TRUNKS[name]
    encoder = make_encoder(name, size)
    k, prediction, decomposition = decompose(encoder, subject, IMAGES[:2])
    assert encoder.trunk.n_prefix == n_prefix and k.shape[3] == n_prefix + np.prod(encoder.trunk.grid)
    torch.testing.assert_close(decomposition.constant + k.sum((2, 3)).T, prediction, rtol=0, atol=1e-4)
    with torch.inference_mode():
        features = encoder.trunk(Crops(encoder.trunk).whole(torch.from_numpy(IMAGES[:2])))
        for layer, token in ((0, 0), (1, k.shape[3] - 1)):
            silenced = [x.clone() for x in features]
            silenced[layer][:, token] = 0
            lost = encoder.predict(encoder.latents(features), subject)
            lost -= encoder.predict(encoder.latents(silenced), subject)
            torch.testing.assert_close(k[:, :, layer, token].T, lost, rtol=0, atol=1e-4)


def test_another_affine_head_is_followed_and_others_are_refused(monkeypatch):
    def weighted(self, p):
        return sum(w * f.norm(p_l) for w, f, p_l in zip((0.8, 0.3), self.projections, p)) + 1

    encoder, mean = make_encoder(), Head.combine
    monkeypatch.setattr(Head, "combine", weighted)
    k, prediction, decomposition = decompose(encoder)
    torch.testing.assert_close(decomposition.constant + k.sum((2, 3)).T, prediction, rtol=0, atol=1e-4)
    monkeypatch.setattr(Head, "combine", lambda self, p: mean(self, p).relu())
    with pytest.raises(UserError, match="not affine"):
        decompose(encoder)


@pytest.mark.parametrize("phase, subject", [(1, "group"), (2, "subj06")])
def test_contributions_add_up_to_the_predicted_roi_means(
    phase, subject, run_dir, finetuned_dir, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(explain, "draw_fields", lambda *arguments: None)  # the test below draws them
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(IMAGES[:3]):
        Image.fromarray(image[:, 20 * i :]).save(photos / f"{i}.png")
    options = dict(RUN_DIR=run_dir if phase == 1 else finetuned_dir, IMAGES=photos, SUBJECT=subject, DEVICE="cpu")
    run_stage(predict_pictures, **options, OUTPUT_DIR=tmp_path / "predictions", MAPS=0)
    rois = ("V1v", "V1", "early+PPA", "3", "0+100+0")
    explained = dict(OUTPUT_DIR=tmp_path / "explained", DATA_DIR=data_dir, ROIS=rois, BATCH_SIZE=2, FIGURES=1)
    run_stage(explain, **options, **explained)
    saved = np.load(tmp_path / "explained/contributions.npz")
    total = saved["contributions"].sum((2, 3)) + saved["constant"]
    assert saved["rois"].tolist() == list(rois) and saved["contributions"].shape == (3, 5, 2, 17)

    table = pd.read_csv(tmp_path / "predictions/rois.csv").query("hemisphere == 'both'")
    for column, roi in enumerate(rois[:2]):
        np.testing.assert_allclose(total[:, column], table[table.roi == roi]["mean"], atol=1e-4)
    parts = table[table.roi.isin(["early", "PPA"])]
    together = parts.groupby("picture").apply(lambda part: np.average(part["mean"], weights=part.n_vertices))
    np.testing.assert_allclose(total[:, 2], together, atol=1e-4)
    activity = np.concatenate([np.load(tmp_path / f"predictions/{subject}/activity_{h}.npy") for h in HEMIS], 1)
    np.testing.assert_allclose(total[:, 3:].T, [activity[:, 3], activity[:, [0, 100]].mean(1)], atol=1e-4)

    (tmp_path / "broken.png").touch()
    with pytest.raises(UserError, match="1 picture could not be read"):
        run_stage(explain, **options | explained | dict(IMAGES=tmp_path / "broken.png", OUTPUT_DIR=tmp_path / "fields"))
    assert (tmp_path / "fields/fields.npz").exists()

    both = f"{run_dir}/head.pt,{run_dir}/head.pt"
    for change, message in ((dict(ROIS=("V9",)), "unknown ROI 'V9'"), (dict(CHECKPOINT=both), "one file")):
        with pytest.raises(UserError, match=message):
            run_stage(explain, **options, **explained | dict(OUTPUT_DIR=tmp_path / "other") | change)


def test_fields_are_covariances_and_shares_add_up():
    encoder = make_encoder()
    k, prediction, decomposition = decompose(encoder)
    with torch.inference_mode():
        tokens, layers, mean_terms, h = contributions.measure_covariance(decomposition, IMAGES, torch.float32, 2)
    centred = (prediction - prediction.mean(0)).T.double()[:, :, None, None]
    expected = (centred * k).mean(1)  #                                            (n_vertices, n_layers, n_tokens)
    np.testing.assert_allclose(tokens, expected.sum(1).T, atol=1e-5)
    np.testing.assert_allclose(layers, expected.sum(2).T, atol=1e-5)
    np.testing.assert_allclose(mean_terms @ decomposition.weights.T, k.mean(1).movedim(0, -1), atol=1e-5)
    np.testing.assert_allclose(tokens.sum(0), prediction.var(0, correction=0), rtol=1e-3)

    fields = contributions.describe_fields(tokens, layers, encoder)
    np.testing.assert_allclose(fields["layer_share"].sum(1), 1, atol=1e-4)
    v, (n_rows, n_columns) = 4, encoder.trunk.grid
    weight = np.clip(tokens[1:, v], 0, None).reshape(n_rows, n_columns)
    centres = [[((c + 0.5) / n_columns, (r + 0.5) / n_rows) for c in range(n_columns)] for r in range(n_rows)]
    x, y = np.average(np.reshape(centres, (-1, 2)), axis=0, weights=weight.ravel())
    np.testing.assert_allclose([fields["x"][v], fields["y"][v]], [x, y], rtol=1e-5)


def test_a_planted_patch_is_where_it_was_planted():
    """Vertices that pool one token: upper left, upper right, lower left, and the class token alone."""
    encoder = make_encoder(n_vertices=4)
    head, (n_rows, n_columns) = encoder.head, encoder.trunk.grid
    head.shared.data, head.embed_weight.data = torch.eye(4, 6), torch.eye(4)
    head.subject_weight.data.zero_()
    places = [1, n_columns, 1 + (n_rows - 1) * n_columns, 0]
    for layer, projection in enumerate(head.projections):
        projection.spatial.data.zero_()
        projection.norm.weight.data.fill_(1)
        for unit, token in enumerate(places):
            projection.spatial.data[unit, token] = float(layer == 1)
    with torch.inference_mode():
        decomposition = contributions.Decomposition(encoder, None, np.arange(4))
        tokens, layers, *_ = contributions.measure_covariance(decomposition, IMAGES, torch.float32, 2)
    fields = contributions.describe_fields(tokens, layers, encoder)
    near, far = 0.5 / n_columns, 1 - 0.5 / n_columns
    np.testing.assert_allclose(fields["x"], [near, far, near, np.nan], atol=1e-6)
    np.testing.assert_allclose(fields["y"], [near, near, far, np.nan], atol=1e-6)
    np.testing.assert_allclose(fields["size"][:3], 0, atol=1e-3)
    np.testing.assert_allclose(fields["prefix_share"], [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(fields["depth"], 2, atol=1e-6)  # block 2 is the second layer
    assert fields["field"][0, 0, 0] == 1 and fields["field"][1, 0, -1] == 1


@pytest.fixture(scope="module")
def trained(build_once):
    """A folder with data of one simulated person and a head trained on features that are computed once: seconds."""

    def build(folder):
        simulate(folder / "challenge", subjects=[1], n_train=320, n_test=0, picture_size=96, vertex_step=8)
        run_stage(prepare_data, CHALLENGE_DIR=folder / "challenge", DATA_DIR=folder / "data")
        run_stage(fit_pca, DATA_DIR=folder / "data", PCA_DIM=48, DEVICE="cpu")
        data, torch_seed = prepare_data.load(folder / "data"), torch.manual_seed(0)
        pca, rows = fit_pca.load(folder / "data", data), data.samples("train")
        trunk = Trunk(TINY, "0,1", 70, pretrained=False)
        head = Head(trunk.feature_shapes, 128, 48, 1, data.space.n_vertices)
        head.embed_weight.data, head.embed_bias.data = pca.components.clone(), pca.mean.clone()
        layers = [lambda features: features[0], lambda features: features[1]]
        features = [x.clone() for x in trunk_outputs(trunk, data.images[data.image[rows]], layers)]
        optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100)
        for _ in range(100):
            batch = torch.randint(len(rows), (64,), generator=torch_seed)
            z = head([x[batch] for x in features], torch.zeros(64, dtype=torch.int64))
            optimizer.zero_grad()
            (z - pca.latents[rows[batch]]).square().mean().backward()
            optimizer.step()
            schedule.step()
        record = dict(made_with={}, scores={}, step=100, finished=True, train_nsd_ids=[1])
        save_checkpoint(folder / "head.pt", Encoder(trunk, head).eval(), space=data.space, **record)

    return build_once("explain", build)


def test_planted_fields_are_recovered(trained, tmp_path):
    settings = dict(DATA_DIR=trained / "data", SPLIT="train", N_REFERENCE=150, DEVICE="cpu", PRECISION="float32")
    run_stage(explain, **settings, CHECKPOINT=trained / "head.pt", OUTPUT_DIR=tmp_path / "explained")
    fields, planted = np.load(tmp_path / "explained/fields.npz"), planted_fields(1, vertex_step=8)
    early = planted["streams"] == "early"
    for axis in ("x", "y"):
        assert np.corrcoef(fields[axis][early], planted[axis][early])[0, 1] > 0.9
    assert np.corrcoef(fields["size"][early], planted["size"][early])[0, 1] > 0.6

    data = prepare_data.load(trained / "data")
    rows = data.samples("train")
    rows = rows[np.argsort(data.image[rows])][np.linspace(0, len(rows) - 1, 150).astype(int)]
    encoder = load_checkpoint(trained / "head.pt")[0]
    with torch.inference_mode():
        [h] = trunk_outputs(encoder.trunk, data.images[data.image[rows]], [encoder.latents])
        prediction = encoder.predict(h, 0).numpy()
    r2 = r2_score(data.activity[rows].astype(float), prediction.astype(float), multioutput="raw_values")
    np.testing.assert_allclose(fields["r2"], r2, atol=1e-4)

    x, y = fields["x"] - 0.5, 0.5 - fields["y"]
    for hemi in HEMIS:
        vertices = np.load(tmp_path / f"explained/fsaverage_{hemi}.npy")
        of_hemi = (planted.hemi == hemi).to_numpy()
        assert vertices.tolist() == planted.vertex[of_hemi].tolist()
        gifti = nibabel.load(tmp_path / f"explained/fields_{hemi}.func.gii")
        angle = gifti.darrays[0].data
        np.testing.assert_allclose(angle[vertices], np.degrees(np.arctan2(y, x))[of_hemi], rtol=1e-4)
        assert np.isnan(np.delete(angle, vertices)).all()
    assert (tmp_path / "explained/fields.png").stat().st_size > 10_000


@pytest.mark.parametrize("name, subject", [("subj06", 5), ("group", None)])
def test_reference_pictures(name, subject, data_dir, run_dir, tmp_path, monkeypatch):
    """Those of the subject's own samples; for the group everyone's, each picture once."""
    data, seen = prepare_data.load(data_dir), []
    monkeypatch.setattr(explain, "measure_covariance", lambda _, images, *rest: seen.append(images) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage(explain, DATA_DIR=data_dir, RUN_DIR=run_dir, SUBJECT=name, DEVICE="cpu", OUTPUT_DIR=tmp_path / "out")
    np.testing.assert_array_equal(seen[0], data.images[np.unique(data.image[data.samples("val", subject)])])
