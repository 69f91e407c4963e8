"""Figures of the evaluation, flat maps, and predictions for own pictures."""

import csv
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

import evaluate
import flatmap
import predict
import prepare_data
from common import Problem
from conftest import cut, hemis, png_claiming, run


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


def test_own_pictures(submission, subjects, fitted, tmp_path, capsys):
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
    capsys.readouterr()
    run(predict, CHECKPOINT=str(checkpoint), IMAGES=str(pictures), SUBJECT="subj06,group", OUTPUT_DIR=str(output),
        DATA_DIR=str(tmp_path / "none"), PRECISION="float32")  # fmt: skip
    out = capsys.readouterr().out
    assert "centre-cropped to a square: 1 of" in out and "left out 1 files" in out
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
