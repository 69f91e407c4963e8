"""The ridge baseline against scikit-learn's, and its features against the trunk's blocks."""

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

import ridge
from model import Trunk, of_features
from shared_fixtures import block_outputs, plain_input, tiny


@pytest.mark.parametrize("n, n_features", [(30, 80), (90, 40)])
def test_ridge_is_scikit_learns(n, n_features, monkeypatch):
    """In float64: penalty of every vertex as RidgeCV's exact leave-one-out chooses it, predictions of Ridge."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n + 20, n_features)) * rng.uniform(0.1, 30, n_features) + 5
    x[:, 3] = 2.0  # a feature that is always the same
    signal = x[:, :6] @ rng.standard_normal((6, 11)) / 20
    y = signal + rng.standard_normal((n + 20, 11)) * np.geomspace(0.1, 100, 11) + 3
    monkeypatch.setattr(ridge, "at_once", 4)
    found = ridge.fit(torch.from_numpy(x[:n]), torch.from_numpy(y[:n]))
    scaler = StandardScaler().fit(x[:n])
    z = scaler.transform(x)
    alphas = np.array(ridge.penalties) * n_features
    expected = RidgeCV(alphas, alpha_per_target=True).fit(z[:n], y[:n])
    np.testing.assert_allclose(found.penalty, expected.alpha_)
    assert len(set(expected.alpha_)) > 2
    plain = Ridge(expected.alpha_).fit(z[:n], y[:n]).predict(z[n:])
    np.testing.assert_allclose(ridge.predict(found, torch.from_numpy(x[n:])), plain, rtol=1e-8, atol=1e-8)
    single = ridge.fit(torch.from_numpy(x[:n]).float(), torch.from_numpy(y[:n]).float())
    np.testing.assert_allclose(ridge.predict(single, torch.from_numpy(x[n:]).float()), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, has_class", [(tiny, True), ("vit_base_patch16_siglip_224.v2_webli", False)])
def test_features_are_class_token_and_mean_of_the_pictures_tokens(name, has_class, monkeypatch):
    size, create = 56 if has_class else 32, timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **options: create(*a, **options, depth=3))
    trunk = Trunk(name, "blocks.{0,2}", image_size=size, pretrained=False)
    images = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)
    [found] = of_features(trunk, images, [lambda features: ridge.pool_tokens(trunk, features)], batch_size=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model(name, num_classes=0, img_size=size)
    blocks = block_outputs(vit, torch.stack([plain_input(image, trunk) for image in images]))
    expected = []
    for x in (blocks[0], blocks[2]):
        expected += [x[:, 0], x[:, 1:].mean(1)] if has_class else [x.mean(1)]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-3, atol=1e-4)
