"""Predictions: the challenge's, those of own pictures, contrasts, from Python, and what refuses them."""

import csv
import io
import json
import re
import shutil
import signal
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.stats
import timm
import torch
from PIL import Image

import finetune
import flatmap
import predict
import prepare_data
import results
import train_head
from checkpoint import load_checkpoint
from common import Problem
from conftest import both, cut, finish, here, hemis, plain_input, png_claiming, run, run_process, small, start


# ---- an independent prediction ------------------------------------------------------------------


def squared(picture):
    """The largest centred square at 256 px, by Pillow."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC))


@torch.no_grad()
def plain_prediction(checkpoint, pictures, subject):
    """(n_pictures, n_vertices of the common space) of PIL pictures by the formula in float64; subject: an index or None."""
    encoder = load_checkpoint(checkpoint)[0]
    head, latents = encoder.head, []
    for picture in pictures:
        features = encoder.trunk(plain_input(squared(picture), encoder.trunk)[None])
        h = 0
        for projection, x in zip(head.projections, features):
            p = torch.einsum("dt,dc,ntc->nd", projection.spatial.double(), projection.channel.double(), x.double())
            norm = projection.norm.double()
            p = (p - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            h = h + p / len(features)
        latents.append(h)
    z = torch.cat(latents) @ head.shared.double().T
    if subject is not None:
        z = z + torch.cat(latents) @ head.subject_weight[subject].double().T + head.subject_bias[subject].double()
    return (z @ head.embed_weight.double().T + head.embed_bias.double()).numpy()


def colour(*rgb, size=(90, 70)):
    """A picture of one colour with a dark corner."""
    picture = Image.new("RGB", size, rgb)
    picture.paste((0, 30, 60), (0, 0, 50, 40))
    return picture


@pytest.fixture(scope="session")
def finetuned(phase_2, fitted):
    return fitted.parent / "run/finetuned.pt"


def read_csv(path):
    return list(csv.DictReader(path.open(newline="")))


@pytest.fixture
def published(fitted, tmp_path, monkeypatch):
    """A phase 1 file in the authors' layout for the simulated vertices, on a narrower trunk of theirs."""
    create, n_vertices = timm.create_model, prepare_data.load(fitted).space.n_vertices

    def narrow(*arguments, pretrained, **options):
        return create(*arguments, **options, pretrained=False, embed_dim=24, num_heads=2)

    monkeypatch.setattr(timm, "create_model", narrow)
    generator, shapes = torch.Generator().manual_seed(0), {}
    for i in range(6):
        shapes |= {f"feat_projs.{i}.proj.weight1": (5, 257), f"feat_projs.{i}.proj.weight2": (5, 24)}
        shapes |= {f"feat_projs.{i}.norm.{n}": (5,) for n in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"shared_proj.weight": (4, 5), "subj_proj.fc.weight": (8 * 4, 5), "subj_proj.fc.bias": (8 * 4,)}
    shapes |= {"embed.weight": (n_vertices, 4), "embed.bias": (n_vertices,)}
    weights = {name: 0.1 + torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {f"feat_projs.{i}.norm.num_batches_tracked": torch.tensor(7) for i in range(6)}
    torch.save({"epoch": 3, "metric": np.float64(0.2), "trunk": None, "encoder": weights}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_authors_weights_are_scored_on_their_splits_only(published, fitted, challenge, tmp_path, capsys):
    options = dict(DATA_DIR=str(fitted), CHECKPOINT=str(published), SUBMISSION_DIR=str(tmp_path / "submission"))
    run(predict, **options)
    out = capsys.readouterr().out
    assert "no private test scores" in out and "--splits authors" in out and "median R²\n" not in out
    assert (tmp_path / "submission/submission.zip").exists() and not published.with_name("theirs_scores.json").exists()
    with pytest.raises(Problem, match="theirs.pt holds the authors' weights.* val pictures"):
        run(finetune, DATA_DIR=str(fitted), CHECKPOINT=str(published), RUN_DIR=str(tmp_path / "run"), **both, STEPS=3)
    assert not (tmp_path / "run").exists()

    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "theirs"), SPLITS="authors")
    run(predict, **options | dict(DATA_DIR=str(tmp_path / "theirs"), SUBMISSION_DIR=str(tmp_path / "other")))
    assert "no private" not in capsys.readouterr().out and published.with_name("theirs_scores.json").exists()


# ---- own pictures -------------------------------------------------------------------------------


def test_own_pictures(finetuned, submission, subjects, fitted, tmp_path, capsys):
    """The challenge's test pictures as own pictures: the submission's predictions, for any mode and shape,
    without the prepared data; damaged ones are told at once."""
    checkpoint, pictures = tmp_path / "only.pt", tmp_path / "pictures"
    shutil.copy(finetuned, checkpoint)
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
            name = f"a, nsd-{path.stem[-5:]}" if i == 3 else f"{i}"
            picture.save(pictures / f"{name}.{('png', 'bmp', 'webp')[i % 3]}", **{"lossless": True} if i % 3 == 2 else {})
    (pictures / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    options = dict(CHECKPOINT=str(checkpoint), IMAGES=str(pictures), SUBJECT="subj06,group", PRECISION="float32")
    run(predict, **options, OUTPUT_DIR=str(output), DATA_DIR=str(tmp_path / "none"), BATCH_SIZE=2, MAPS=0, GIFTI=0)
    out = capsys.readouterr().out
    assert "centre-cropped to a square: 1 of" in out and "left out 1 files" in out and f"predicting with {checkpoint}" in out
    n = len(subjects["subj06"].test_pictures)
    rows = read_csv(output / "pictures.csv")
    assert [int(row["row"]) for row in rows] == list(range(n))
    order = [int(re.search(r"(\d+)$|a, ", row["picture"])[1] or 3) for row in rows]  # names are sorted otherwise
    assert sorted(order) == list(range(n)) and rows[order.index(1)]["picture"] == "more/1"
    named = rows[order.index(3)]
    assert named["nsd_id"] == str(int(subjects["subj06"].test_pictures[3].stem[-5:])) and Path(named["file"]).is_file()
    for hemi in hemis:
        expected = np.load(submission / f"subj06/{hemi}_pred_test.npy")[order]
        found = np.load(output / f"subj06/activity_{hemi}.npy")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # batches of other sizes
        index = np.load(output / f"subj06/fsaverage_{hemi}.npy")
        assert np.array_equal(index, np.flatnonzero(subjects["subj06"].mask[hemi]))
        assert len(np.load(output / f"group/activity_{hemi}.npy")) == n
    assert not list(output.rglob("*.gii")) + list(output.rglob("*.png")) + list(output.rglob(".partial"))
    cut(pictures / "0.png")
    for first_batch in (2, 64):
        (pictures / "bomb.png").unlink(missing_ok=True)
        with pytest.raises(Problem, match="(?s)1 found.*0.png"):
            run(predict, **options, OUTPUT_DIR=str(tmp_path / "again"), BATCH_SIZE=first_batch)
        (pictures / "bomb.png").write_bytes(png_claiming(60000))
        with pytest.raises(Problem, match="(?s)2 found.*0.png.*bomb.png"):
            run(predict, **options, OUTPUT_DIR=str(tmp_path / "again"), BATCH_SIZE=first_batch)
        assert not (tmp_path / "again").exists()
