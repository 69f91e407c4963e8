"""Figures of the evaluation and flat maps."""

import numpy as np
from PIL import Image

import evaluate
import flatmap
import prepare_data
from conftest import run


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
