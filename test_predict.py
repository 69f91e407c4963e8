"""Predictions: the challenge's, those of own pictures, contrasts, from Python, and what refuses them."""

import csv
import json
import re
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
from PIL import Image

import finetune
import flatmap
import predict
import prepare_data
import results
import train_head
from checkpoint import load_checkpoint, save_checkpoint
from common import Problem
from ensemble import choose_checkpoint, share_trunks
from model import Trunk
from pictures import find_pictures, look_at, to_picture
from shared_fixtures import (
    assert_equal, both, cut, finish, here, hemis, on_command_line, plain_input, png_claiming, run, small, start,
    tiny,
)  # fmt: skip


# ---- an independent prediction ------------------------------------------------------------------


def squared(picture):
    """The largest centred square at 256 px, by Pillow."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC))


@torch.no_grad()
def plain_prediction(checkpoint, pictures, subject):
    """(n_pictures, n_vertices of the common space) of PIL pictures by the formula in float64; an index or None."""
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

    def narrow(*arguments, **options):
        return create(*arguments, **options | dict(pretrained=False, embed_dim=24, num_heads=2))

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


@pytest.mark.parametrize("phase", [1, 2])
def test_what_is_saved_from_authors_weights_is_read_again(published, phase, fitted, tmp_path):
    """As adapt.py does."""
    space = prepare_data.load(fitted).space
    if phase == 2:
        content = torch.load(published, weights_only=False)
        content["trunk"] = load_checkpoint(published, space=space)[0].trunk.vit.state_dict()
        torch.save(content, published)
    encoder, space, made = load_checkpoint(published, space=space)
    path = tmp_path / "again.pt"
    save_checkpoint(path, encoder, space=space, made_with=made["made_with"], scores={}, step=3)
    again = load_checkpoint(path)[0]
    assert_equal(again.state_dict(), encoder.state_dict())
    assert again.head.bias_count == 2


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
            picture.save(
                pictures / f"{name}.{('png', 'bmp', 'webp')[i % 3]}", **{"lossless": True} if i % 3 == 2 else {}
            )
    (pictures / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    options = dict(CHECKPOINT=str(checkpoint), IMAGES=str(pictures), SUBJECT="subj06,group", PRECISION="float32")
    run(predict, **options, OUTPUT_DIR=str(output), DATA_DIR=str(tmp_path / "none"), BATCH_SIZE=2, MAPS=0, GIFTI=0)
    out = capsys.readouterr().out
    assert (
        "centre-cropped to a square: 1 of" in out
        and "left out 1 files" in out
        and f"predicting with {checkpoint}" in out
    )
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


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """{name: PIL picture} and the folder in which they lie."""
    folder = tmp_path_factory.mktemp("colours")
    shown = {"red": colour(200, 40, 30), "sky": colour(60, 120, 240, size=(70, 90)), "wood": colour(120, 90, 20)}
    for name, picture in shown.items():
        picture.save(folder / f"{name}.png")
    return folder, shown


def test_which_files_are_pictures(tmp_path):
    """Hidden ones, other kinds and predictions beside them are not; names stay apart, and so do pictures of equal size
    whose ends are equal."""
    folder = tmp_path / "photos"
    for name in ("a.jpg", "a.png", ".d.png", ".ipynb_checkpoints/b.png", "c.txt", "out/m.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour(9, 9, 9).save(folder / name, "PNG")
    assert list(find_pictures(folder, folder / "out")) == ["a.jpg", "a.png"]
    assert list(find_pictures(folder / "out", folder)) == ["m"]  # predictions above the pictures
    with pytest.raises(Problem, match="OUTPUT_DIR is .*photos, where the pictures are"):
        find_pictures(folder, folder)
    stamps = set()
    for shade in (0, 100):
        picture = Image.new("RGB", (60, 60), "white")
        picture.paste((shade, 0, 0), (20, 20, 40, 40))
        picture.save(tmp_path / "stimulus.bmp")
        stamps.add(look_at(tmp_path / "stimulus.bmp"))
    assert len(stamps) == 2 and {size for size, _ in stamps} == {(60, 60)}
    assert (to_picture(Image.fromarray(np.full((9, 9), 0x80FF, np.uint16))) == 0x80).all()
    assert (to_picture(Image.new("RGBA", (9, 9), (200, 0, 0, 0))) == 255).all()  # on white


def test_files_of_a_handful(finetuned, fitted, colours, tmp_path, monkeypatch):
    """Arrays, GIFTI, maps and the table of ROIs against the formula: hemispheres, subjects, group, whole areas."""
    folder, shown = colours
    drawn = {}
    monkeypatch.setattr(
        results, "save_figure", lambda figure, path: drawn.update({str(path.relative_to(path.parents[1])): figure})
    )
    run(predict, CHECKPOINT=str(finetuned), IMAGES=str(folder), SUBJECT="subj02,subj06,group", PRECISION="float32",
        OUTPUT_DIR=str(tmp_path), OUTLINES="floc-faces")  # fmt: skip
    data = prepare_data.load(fitted)
    space, left, flat_map = data.space, np.arange(data.space.n_vertices) < data.space.n_lh, flatmap.FlatMap(data.space)
    rows = {}
    for row in read_csv(tmp_path / "rois.csv"):
        rows[row["picture"], row["subject"], row["roi_group"], row["roi"]] = row
    expected = {
        name: plain_prediction(finetuned, shown.values(), s)
        for name, s in (("subj02", 1), ("subj06", 5), ("group", None))
    }
    assert (
        np.abs(expected["subj02"] - expected["group"]).mean()
        > 0.05
        < np.abs(expected["subj02"] - expected["subj06"]).mean()
    )
    for subject, whole in expected.items():
        has = np.ones(len(left), bool) if subject == "group" else space.mask[int(subject[-1]) - 1].numpy()
        found = np.full(whole.shape, np.nan)
        for hemi, side in zip(hemis, (left, ~left)):
            found[:, has & side] = np.load(tmp_path / subject / f"activity_{hemi}.npy")
        np.testing.assert_allclose(found, np.where(has, whole, np.nan), atol=1e-4)
        for i, picture in enumerate(shown):
            for hemi, side in zip(hemis, (left, ~left)):
                image = nibabel.load(tmp_path / subject / f"{picture}_{hemi}.func.gii")
                assert image.meta["AnatomicalStructurePrimary"] == {"lh": "CortexLeft", "rh": "CortexRight"}[hemi]
                surface = image.darrays[0].data
                index = space.vertices.numpy()[has & side]
                assert surface.shape == (163842,) and np.array_equal(
                    surface[index], found[i, has & side].astype(np.float32)
                )
                assert np.isnan(np.delete(surface, index)).all()
            figure = drawn.pop(f"{subject}/{picture}.png")
            assert figure.get_suptitle() == f"{picture}, {subject}"
            maps = [image for axes in figure.axes for image in axes.images if image.get_cmap().name == "RdBu_r"]
            np.testing.assert_allclose(maps[0].get_array().filled(np.nan), flat_map.image(found[i]), rtol=1e-5)
            seen = [
                image.get_array()
                for axes in figure.axes
                for image in axes.images
                if image.get_array().shape == (256, 256, 3)
            ]
            assert np.array_equal(seen[0], squared(shown[picture]))
            ends = maps[0].get_clim()
            assert ends[0] == -ends[1] and 0.95 < (np.abs(found[i][has]) <= ends[1]).mean()  # fits what is drawn
            for group, roi in space.rois.items():
                # the group's labels are another matter: those that most people have
                labels = space.roi_labels(group, None if subject == "group" else int(subject[-1]) - 1)
                whole_areas = {name: [v] for v, name in roi["names"].items() if v}
                whole_areas |= {"all": list(roi["names"])[1:]}
                parts = {"V1": "V1v V1d", "V2": "V2v V2d", "V3": "V3v V3d", "FFA": "FFA-1 FFA-2", "FBA": "FBA-1 FBA-2",
                         "VWFA": "VWFA-1 VWFA-2"}  # fmt: skip
                label_of = {name: v for v, name in roi["names"].items()}
                for name, pieces in parts.items():
                    if pieces.split()[0] in label_of:
                        whole_areas[name] = [label_of[piece] for piece in pieces.split()]
                assert {key[3] for key in rows if key[1:3] == (subject, group)} == set(whole_areas)
                for name, values in whole_areas.items():
                    row = rows.pop((picture, subject, group, name))
                    for column, side in (("both", True), ("lh", left), ("rh", ~left)):
                        area = has & np.isin(labels, values) & side
                        assert int(row[f"n_{column}"]) == area.sum()
                        if area.any():
                            assert float(row[column]) == pytest.approx(found[i, area].mean(), rel=1e-4, abs=1e-6)
                        else:
                            assert row[column] == ""
            row = rows.pop((picture, subject, "all", "all"))
            assert (
                float(row["rh"]) == pytest.approx(found[i, has & ~left].mean(), rel=1e-4)
                and int(row["n_both"]) == has.sum()
            )
    assert not rows and not drawn


def test_float16_arrays_are_the_float32_ones_rounded(finetuned, colours, tmp_path):
    options = dict(CHECKPOINT=str(finetuned), IMAGES=str(colours[0]), SUBJECT="group", MAPS=0, GIFTI=0)
    for kind in ("float32", "float16"):
        run(predict, **options, ARRAY_TYPE=kind, OUTPUT_DIR=str(tmp_path / kind))
    for hemi in hemis:
        exact, half = (np.load(tmp_path / kind / f"group/activity_{hemi}.npy") for kind in ("float32", "float16"))
        assert half.dtype == np.float16 and np.array_equal(exact.astype(np.float16), half)
    with pytest.raises(Problem, match="ARRAY_TYPE is 'int8', expected float32 or float16"):
        run(predict, **options, ARRAY_TYPE="int8")


# ---- killed, mended, mixed up -------------------------------------------------------------------

# dies as by kill -9 at the n-th call of a function of results.py
dies_at = """
import os, signal, results
results.seconds_between_records = 0
calls, real = 0, {name}
def mortal(*arguments, **options):
    global calls
    calls += 1
    if calls == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
{name} = mortal
"""


def contents(folder):
    """{name: bytes} of all files but the record, which names paths, and the lock."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if name not in ("predictions.json", ".lock")}


def test_a_killed_call_continues(finetuned, colours, tmp_path, capsys):
    """Killed in the second batch and while files move to their places: the end is that of a call left alone. A picture
    that is mended meanwhile is no reason to start anew; other constants are, and so are other pictures."""
    folder = tmp_path / "pictures"
    shutil.copytree(colours[0], folder)
    for name in ("x", "y", "z"):
        colour(20, 200, 90 + ord(name)).save(folder / f"{name}.png")
    options = dict(CHECKPOINT=finetuned, IMAGES=folder, SUBJECT="subj06,group", BATCH_SIZE=2, MAPS=0, GIFTI=0)
    in_python = {name: value if isinstance(value, int) else str(value) for name, value in options.items()}
    command = ("predict.py", "--output_dir", tmp_path / "killed", *on_command_line(options))
    run(predict, **in_python, OUTPUT_DIR=str(tmp_path / "alone"))
    whole, killed = (folder / "z.png").read_bytes(), tmp_path / "killed"
    cut(folder / "z.png")
    trap = dies_at.format(name="results.ActivityWriter.write", n=2)
    assert finish(start(*command, before=trap))[0] == -signal.SIGKILL
    assert (
        not list(killed.glob("[!.]*")) and json.loads((killed / ".partial/predictions.json").read_text())["n_done"] == 2
    )
    with open(killed / ".partial/subj06/activity_lh.npy", "ab") as file:
        file.write(b"half of a row")  # as a kill leaves it
    again = in_python | dict(OUTPUT_DIR=str(killed))
    for changed, message in (
        (dict(ARRAY_TYPE="float16"), "unfinished predictions of other inputs .ARRAY_TYPE: float32 there, float16 now"),
        (dict(SUBJECT="subj06"), "unfinished predictions of other inputs .*subjects"),
    ):
        with pytest.raises(Problem, match=f"(?s){message}.*--overwrite true replaces them"):
            run(predict, **again | changed)
    with pytest.raises(Problem, match="1 found(?s:.)*z.png"):  # predicts the second batch before it comes to the third
        run(predict, **again)
    assert "continuing after 2 of 6" in capsys.readouterr().out
    (folder / "z.png").write_bytes(whole)
    assert finish(start(*command, before=dies_at.format(name="results.Path.replace", n=3)))[0] == -signal.SIGKILL
    assert "predictions.json" not in {path.name for path in killed.iterdir()} and list(killed.glob("[!.]*"))
    run(predict, **again)
    assert contents(killed) == contents(tmp_path / "alone") and not (killed / ".partial").exists()
    assert "continuing after 6 of 6" in capsys.readouterr().out
    record = json.loads((killed / "predictions.json").read_text())
    assert record["checkpoints"][0]["fingerprint"] == load_checkpoint(finetuned)[2]["fingerprint"]
    assert record["constants"]["BATCH_SIZE"] == 2 and {"torch", "python"} <= set(record["versions"])
    run(predict, **again)
    assert "holds these predictions already" in capsys.readouterr().out

    shutil.copy(folder / "x.png", folder / "red.png")  # another picture under the same name
    with pytest.raises(Problem, match="other predictions .stamps: .*--overwrite true replaces"):
        run(predict, **again)


def test_predictions_of_two_calls_never_mix(finetuned, phase_1, fitted, subjects, colours, tmp_path):
    options = dict(
        CHECKPOINT=str(finetuned), IMAGES=str(colours[0]), SUBJECT="subj06", MAPS=0, OUTPUT_DIR=str(tmp_path)
    )
    run(predict, **options)
    before = contents(tmp_path)
    (tmp_path / "subj06/mine.txt").write_text("kept")
    other = options | dict(CHECKPOINT=str(fitted.parent / "run/head.pt"), SUBJECT="subj02", GIFTI=0)
    with pytest.raises(
        Problem, match="holds other predictions .*choose another OUTPUT_DIR, or --overwrite true replaces"
    ):
        run(predict, **other)
    assert contents(tmp_path) == before | {"subj06/mine.txt": b"kept"}
    run(predict, **other, OVERWRITE=True)
    assert {path.name for path in (tmp_path / "subj06").iterdir()} == {"mine.txt"}
    assert {path.name for path in tmp_path.glob("[!.]*")} == {
        "subj02",
        "subj06",
        "rois.csv",
        "pictures.csv",
        "predictions.json",
    }
    (tmp_path / "predictions.json").unlink()
    with pytest.raises(
        Problem, match="holds pictures.csv, rois.csv, subj02 … but no predictions.json that says what made them"
    ):
        run(predict, **other)

    submission = dict(DATA_DIR=str(fitted), CHECKPOINT=str(finetuned), SUBMISSION_DIR=str(tmp_path / "submission"))
    run(predict, **submission)
    before = contents(tmp_path / "submission")
    with pytest.raises(Problem, match="choose another SUBMISSION_DIR, or --overwrite true replaces them"):
        run(predict, **submission | dict(CHECKPOINT=str(fitted.parent / "run/head.pt")))
    assert contents(tmp_path / "submission") == before
    run(predict, **submission | dict(CHECKPOINT=str(fitted.parent / "run/head.pt")), OVERWRITE=True)
    after = contents(tmp_path / "submission")
    assert after.keys() == before.keys() and after["submission.zip"] != before["submission.zip"]
    rows = [
        (row["subject"], int(row["row"]), int(row["nsd_id"])) for row in read_csv(tmp_path / "submission/pictures.csv")
    ]
    paths = {name: files.test_pictures for name, files in subjects.items()}
    assert rows == [(name, i, int(path.stem[-5:])) for name in paths for i, path in enumerate(paths[name])]
    with zipfile.ZipFile(tmp_path / "submission/submission.zip") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == set(subjects)


# ---- contrasts, averages ------------------------------------------------------------------------


def test_what_is_written_is_json(tmp_path):
    """Whose standard knows no NaN: what has no score is null."""
    results.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [{"c": np.float64("nan")}, (1.5, "nan")]})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [{"c": None}, [1.5, "nan"]]}


def test_contrast_is_scipys_t_test(finetuned, fitted, tmp_path):
    """In batches, against ttest_ind of the formula's predictions with variances that differ."""
    rng, sides = np.random.default_rng(0), {}
    for side, n in (("faces", 5), ("places", 4)):
        (tmp_path / side).mkdir()
        sides[side] = []
        for i in range(n):
            picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(
                (60, 60), Image.Resampling.NEAREST
            )
            picture.save(tmp_path / side / f"{i}.png")
            sides[side].append(picture)
    with pytest.raises(Problem, match="IMAGES and CONTRAST are both"):
        run(predict, CHECKPOINT=str(finetuned), IMAGES=str(tmp_path / "faces"), CONTRAST=f"{tmp_path}/faces/")
    run(predict, CHECKPOINT=str(finetuned), IMAGES=str(tmp_path / "faces"), CONTRAST=str(tmp_path / "places"),
        BATCH_SIZE=2,
        SUBJECT="subj08,group", OUTPUT_DIR=str(tmp_path / "out"), PRECISION="float32")  # fmt: skip
    space = prepare_data.load(fitted).space
    left = np.arange(space.n_vertices) < space.n_lh
    rows = read_csv(tmp_path / "out/rois.csv")
    for subject, s in (("subj08", 7), ("group", None)):
        a, b = (plain_prediction(finetuned, pictures, s) for pictures in sides.values())
        has = space.present(s)
        expected = {"difference": a.mean(0) - b.mean(0), "t": scipy.stats.ttest_ind(a, b, equal_var=False).statistic}
        for hemi, side in zip(hemis, (left, ~left)):
            for name, values in expected.items():
                found = np.load(tmp_path / f"out/{subject}/{name}_{hemi}.npy")
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, values[has & side], rtol=2e-3, atol=1e-3)
                surface = nibabel.load(tmp_path / f"out/{subject}/{name}_{hemi}.func.gii").darrays[0].data
                assert np.array_equal(surface[space.vertices.numpy()[has & side]], found)
        labels = space.roi_labels("streams", s)
        [row] = [r for r in rows if (r["subject"], r["roi_group"], r["roi"]) == (subject, "streams", "early")]
        for column, side in (("both", True), ("lh", left), ("rh", ~left)):
            area = has & (labels == 1) & side
            means = a[:, area].mean(1), b[:, area].mean(1)
            assert float(row[f"difference_{column}"]) == pytest.approx(means[0].mean() - means[1].mean(), abs=1e-4)
            t = scipy.stats.ttest_ind(*means, equal_var=False).statistic
            assert float(row[f"t_{column}"]) == pytest.approx(t, rel=2e-3) and int(row[f"n_{column}"]) == area.sum()
        assert all((tmp_path / f"out/{subject}/{name}.png").is_file() for name in expected)
    with pytest.raises(Problem, match="other predictions .*stamps"):  # less the other way round
        run(predict, CHECKPOINT=str(finetuned), IMAGES=str(tmp_path / "places"), CONTRAST=str(tmp_path / "faces"),
            SUBJECT="subj08,group", OUTPUT_DIR=str(tmp_path / "out"), PRECISION="float32")  # fmt: skip
    sides_of_rows = [Path(row["side"]).name for row in read_csv(tmp_path / "out/pictures.csv")]
    assert sides_of_rows == 5 * ["faces"] + 4 * ["places"]

    run(predict, CHECKPOINT=str(finetuned), IMAGES=str(tmp_path / "faces/0.png"), CONTRAST=str(tmp_path / "places"),
        SUBJECT="group", OUTPUT_DIR=str(tmp_path / "one"), PRECISION="float32", GIFTI=0)  # fmt: skip
    a, b = (plain_prediction(finetuned, pictures, None) for pictures in (sides["faces"][:1], sides["places"]))
    found = np.load(tmp_path / "one/group/difference_rh.npy")
    np.testing.assert_allclose(found, (a[0] - b.mean(0))[~left], rtol=2e-3, atol=1e-3)
    assert np.isnan(np.load(tmp_path / "one/group/t_rh.npy")).all()  # of one picture there is no variance
    assert {row["t_both"] for row in read_csv(tmp_path / "one/rois.csv")} == {""}
    assert {path.name for path in (tmp_path / "one/group").glob("*.png")} == {"difference.png"}


def test_several_checkpoints_are_averaged(finetuned, phase_1, fitted, subset, colours, tmp_path):
    """Two heads on one trunk run it once, a fine-tuned one runs its own; checkpoints of other vertices are refused."""
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "run"))
    run(train_head, **folders, **both | dict(STEPS=1, WARMUP_STEPS=0, LEARNING_RATE=0.01), **small | dict(LATENT_DIM=8))
    paths = [fitted.parent / "run/head.pt", tmp_path / "run/head.pt", finetuned]
    names = ",".join(map(str, paths))
    run(predict, CHECKPOINT=names, IMAGES=str(colours[0]), SUBJECT="subj06,group", PRECISION="float32",
        OUTPUT_DIR=str(tmp_path / "out"), MAPS=0, GIFTI=0)  # fmt: skip
    space = prepare_data.load(fitted).space
    for subject, s in (("subj06", 5), ("group", None)):
        expected = np.mean([plain_prediction(path, colours[1].values(), s) for path in paths], axis=0)
        for hemi in hemis:
            found = np.load(tmp_path / f"out/{subject}/activity_{hemi}.npy")
            np.testing.assert_allclose(found, expected[:, space.hemisphere(s, hemi)], atol=1e-4)
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [made["path"] for made in record["checkpoints"]] == list(map(str, paths))
    ensemble = predict.load_encoder(paths, "cpu")
    first, second, third = (encoder.trunk for encoder in ensemble.encoders)
    assert first is second is not third
    passes = []
    for trunk in (first, third):
        trunk.vit.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    ensemble.activity(list(colours[1].values()), "subj01", batch_size=2)
    assert len(passes) == 2 * 2  # batches, trunks

    run(
        train_head, DATA_DIR=str(subset), RUN_DIR=str(tmp_path / "two"), **both | dict(STEPS=1, WARMUP_STEPS=0), **small
    )
    with pytest.raises(Problem, match="differ in their subjects, vertices, expected checkpoints of one vertex space"):
        predict.load_encoder([finetuned, tmp_path / "two/head.pt"])
    submission = dict(DATA_DIR=str(fitted), SUBMISSION_DIR=str(tmp_path / "submission"))
    run(predict, CHECKPOINT=names, **submission)
    scores = json.loads((tmp_path / "submission/scores.json").read_text())
    assert {"test_r2", "test_loss", "test_r2_subj01"} <= scores.keys()


# ---- checkpoints by name ------------------------------------------------------------------------


def test_trunks_are_shared_that_give_the_same_features():
    layers = 2 * ["blocks.{0,2}"] + ["blocks.{1,2}"]
    trunks = [Trunk(tiny, pattern, image_size=56, pretrained=False) for pattern in layers]
    encoders = [SimpleNamespace(trunk=trunk) for trunk in trunks]
    share_trunks(encoders)
    assert [encoder.trunk is trunks[0] for encoder in encoders] == [True, True, False]


def test_a_failed_write_ends_the_call(finetuned, colours, tmp_path, monkeypatch):
    """Though a thread writes, and the picture is not the last."""
    write, calls = results.ActivityWriter.write, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(results.ActivityWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(predict, CHECKPOINT=str(finetuned), IMAGES=str(colours[0]), SUBJECT="group", BATCH_SIZE=1, MAPS=0,
            OUTPUT_DIR=str(tmp_path))  # fmt: skip
    assert not (tmp_path / "group").exists()


def test_which_checkpoint_predicts(phase_1, fitted, tmp_path, capsys):
    """finetuned.pt made from another head is used beside whatever head.pt lies there; a folder is told to be one."""
    run_dir, other = tmp_path / "run", tmp_path / "other"
    options = dict(DATA_DIR=str(fitted)) | both | dict(STEPS=1, WARMUP_STEPS=0, BATCH_SIZE=16)
    run(train_head, **options, **small | dict(LATENT_DIM=8), RUN_DIR=str(run_dir))
    run(finetune, **options, RUN_DIR=str(run_dir), CHECKPOINT=str(fitted.parent / "run/head.pt"))
    capsys.readouterr()
    run(predict, DATA_DIR=str(fitted), RUN_DIR=str(run_dir), SUBMISSION_DIR=str(tmp_path / "submission"))
    made = load_checkpoint(run_dir / "finetuned.pt")[2]
    out = capsys.readouterr().out
    assert f"predicting with {run_dir / 'finetuned.pt'}" in out and f"fingerprint {made['fingerprint']}" in out
    with pytest.raises(
        Problem, match="run is a folder, expected a checkpoint's file, such as .*finetuned.pt or .*head.pt$"
    ):
        choose_checkpoint(str(run_dir), "")
    other.mkdir()
    with pytest.raises(Problem, match="other is a folder, expected a checkpoint's file, such as .*finetuned.pt$"):
        predict.load_encoder(str(other))
    content = torch.load(run_dir / "head.pt", weights_only=True)
    torch.save(content | {"finished": False}, tmp_path / "part.pt")
    predict.load_encoder(tmp_path / "part.pt").describe()
    assert "part.pt is the best so far of a training that has not ended" in capsys.readouterr().out
    torch.save({"epoch": 3, "trunk": None, "encoder": {}}, run_dir / "head.pt")  # the authors': says nothing of itself
    assert choose_checkpoint("", str(run_dir)) == run_dir / "finetuned.pt"


# ---- from Python --------------------------------------------------------------------------------


def run_code(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def readme_block():
    blocks = re.findall(r"^```python\n(.*?)^```", (here / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "from predict import" in block]
    return block


def test_readme_from_python(finetuned, fitted, tmp_path):
    """README's own lines in a new process, on a WebP, which Pillow does not know before it is asked to."""
    (tmp_path / "runs/base").mkdir(parents=True)
    shutil.copy(finetuned, tmp_path / "runs/base/finetuned.pt")
    picture = colour(200, 40, 30)
    picture.save(tmp_path / "photo.jpg", "WEBP", lossless=True)
    code = f"import sys; sys.path.insert(0, {str(here)!r})\n{readme_block()}\n"
    code += "import numpy; numpy.savez('found.npz', **vars(activity['subj01']), group=activity['group'].lh)\n"
    process = run_code(code, tmp_path)
    assert process.returncode == 0, process.stderr
    found, space = np.load(tmp_path / "found.npz"), prepare_data.load(fitted).space
    expected, group = (plain_prediction(finetuned, [picture], s) for s in (0, None))
    for hemi in hemis:
        columns = space.hemisphere(0, hemi)
        np.testing.assert_allclose(found[hemi], expected[:, columns], atol=0.05)  # in this processor's precision
        assert found[hemi].dtype == np.float32 and np.array_equal(found[f"{hemi}_fsaverage"], space.vertices[columns])
    np.testing.assert_allclose(found["group"], group[:, : space.n_lh], atol=0.05)
    assert np.abs(expected - group).mean() > 0.05


def test_pictures_of_every_kind_from_python(finetuned, colours, tmp_path):
    """Paths, PIL pictures and arrays are the same picture, and predict as predict.py does, to the bit."""
    folder, shown = colours
    encoder = predict.load_encoder(finetuned, "cpu", "float32")
    run(predict, CHECKPOINT=str(finetuned), IMAGES=str(folder), SUBJECT="subj06", PRECISION="float32", DEVICE="cpu",
        OUTPUT_DIR=str(tmp_path), MAPS=0, GIFTI=0)  # fmt: skip
    names = sorted(shown)
    for pictures in (
        [folder / f"{name}.png" for name in names],
        [str(folder / f"{name}.png") for name in names],
        [shown[name] for name in names],
        [np.asarray(shown[name]) for name in names],
        (np.asarray(shown[name]) for name in names),
    ):
        found = encoder.activity(pictures, ["subj06"])["subj06"]
        for hemi in hemis:
            assert np.array_equal(getattr(found, hemi), np.load(tmp_path / f"subj06/activity_{hemi}.npy"))
    single = np.asarray(shown["red"])
    parts = [
        encoder.activity(x, "subj06")["subj06"].rh for x in (single, single[None], shown["red"], folder / "red.png")
    ]
    assert all(np.array_equal(part, parts[0]) and len(part) == 1 for part in parts)
    assert list(encoder.activity(single)) == [f"subj{i:02}" for i in range(1, 9)] + ["group"]
    chunks = encoder.activity([shown[name] for name in names], "subj06", batch_size=2)["subj06"]
    np.testing.assert_allclose(chunks.lh, found.lh, atol=1e-4)


@pytest.mark.parametrize(
    "picture, message",
    [
        (np.zeros((50, 50, 3)), "ndarray of float64 .50, 50, 3., expected a path.*uint8 values 0 to 255.*255 . x"),
        (np.zeros((2, 50, 50, 3), np.float32), "ndarray of float32 .50, 50, 3."),
        (np.zeros((50, 50), np.uint8), "ndarray of uint8 .50, 50., expected"),
        (np.zeros((3, 50, 50), np.uint8), "ndarray of uint8 .3, 50, 50., expected .*height, width, 3"),
        (np.zeros((0, 50, 3), np.uint8), "ndarray of uint8 .0, 50, 3."),
        (torch.zeros(50, 50, 3, dtype=torch.uint8), "torch tensor of torch.uint8 .50, 50, 3."),
        (torch.zeros(4, 3, 224, 224), "torch tensor of torch.float32 .3, 224, 224."),
        (None, "a picture is a NoneType"),
        ([], "no pictures are given"),
        ("nowhere.png", "nowhere.png: .*No such file"),
        (here / "README.md", "README.md: cannot identify"),
        (here, "Is a directory"),
        (Image.new("F", (9, 9)), "32-bit grey values"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(picture, message, finetuned):
    encoder = predict.load_encoder(finetuned, "cpu")
    with pytest.raises(Problem, match=message):
        encoder.activity(picture, "subj01")


def test_subjects_are_named(finetuned):
    encoder = predict.load_encoder(finetuned, "cpu")
    for subjects in ("subj99", ["subj01", 3], [], "1"):
        with pytest.raises(Problem, match="expected of this checkpoint's subj01, .*, group, or all"):
            encoder.activity(Image.new("RGB", (9, 9)), subjects)
    for images in (np.zeros((1, 256, 256, 3)), torch.zeros(1, 256, 256, 3), np.zeros((1, 224, 224, 3), np.uint8)):
        with pytest.raises(Problem, match="pictures are .*, expected uint8 values 0 to 255 of shape .n, 256, 256, 3."):
            encoder.predict(images, [0])
