"""One's own pictures: files of every kind, predictions, contrasts, and the model in BERG."""

import importlib
import os
import sys
from abc import ABC, abstractmethod
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ttest_ind
from sklearn.datasets import load_sample_images

import prepare_data
from core.checkpoint import load_checkpoint
from core.settings import constants, run
from core.space import HEMIS
from model import UserError, trunk_outputs
from tests.conftest import run_stage, set_constants
from tools import contrast, predict_pictures
from tools.pictures import find_pictures, predict_files, read_picture
from tools.vertices import roi_masks

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((320, 214))  # a landscape


def squared(picture):
    """(256, 256, 3): the centred square."""
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (256, 256)))


def plain_prediction(checkpoint, images, subject):
    """(n, n_vertices of the common space) of arrays, one by one."""
    encoder = load_checkpoint(checkpoint)[0]
    with torch.inference_mode():
        h = torch.cat([trunk_outputs(encoder.trunk, image[None], [encoder.latents])[0] for image in images])
        return encoder.predict(h, subject).numpy()


def test_files_are_read_as_a_viewer_shows_them(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    PHOTO.save(tmp_path / "turned.png", exif=rotated)
    turned = read_picture(tmp_path / "turned.png")
    assert (turned.width, turned.height) == (214, 320)
    square = PHOTO.transpose(Image.Transpose.ROTATE_270).crop((0, 53, 214, 267)).resize((256, 256), Image.BICUBIC)
    inside = np.s_[4:-4]  # the edges also see what was cut off
    np.testing.assert_allclose(turned.image[inside], np.asarray(square)[inside], atol=3)

    masked = PHOTO.copy()
    masked.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    masked.save(tmp_path / "masked.png")
    alpha = np.asarray(masked)[..., 3:] / 255
    on_white = np.asarray(PHOTO) * alpha + 255 * (1 - alpha)
    expected = squared(Image.fromarray(on_white.round().astype(np.uint8)))
    np.testing.assert_allclose(read_picture(tmp_path / "masked.png").image, expected, atol=2)

    pictures = {"plain.bmp": PHOTO, "palette.gif": PHOTO.quantize(64), "print.tif": PHOTO.convert("CMYK")}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(read_picture(tmp_path / name).image, squared(picture))
    PHOTO.save(tmp_path / "two.mpo", save_all=True, append_images=[PHOTO.rotate(180)])
    PHOTO.save(tmp_path / "one.jpg")
    np.testing.assert_array_equal(read_picture(tmp_path / "two.mpo").image, read_picture(tmp_path / "one.jpg").image)


@pytest.mark.parametrize("ending, options", [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})])
@pytest.mark.parametrize("bits", [16, 12])
def test_grey_values_are_scaled_by_the_bits_that_they_need(bits, ending, options, tmp_path):
    path, values = tmp_path / f"ramp.{ending}", np.linspace(0, 1, 300 * 300).reshape(300, 300)
    Image.fromarray((values * (2**bits - 1)).astype(np.uint16)).save(path, **options)
    picture = read_picture(path)
    assert (picture.note == "") == (bits == 16)
    expected = squared(Image.fromarray((values * 255.99).astype(np.uint8)))
    np.testing.assert_allclose(picture.image, expected, atol=1)


def colour_tiff(path, highest):
    """A 2 x 2 RGB TIFF of 16 bits, which Pillow cannot write."""
    fields = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128)]
    fields += [(277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24)]
    entries = b"".join(np.array(f[:2], "<u2").tobytes() + np.array(f[2:], "<u4").tobytes() for f in fields)
    head = b"II*\x00\x08\x00\x00\x00" + np.array(len(fields), "<u2").tobytes() + entries + bytes(4)
    pixels = np.full(12, highest, "<u2").tobytes()
    path.write_bytes(head + np.array([16, 16, 16], "<u2").tobytes() + pixels)


def test_what_cannot_be_read_is_refused_in_words(tmp_path):
    colour_tiff(tmp_path / "deep.tif", 0x8000)
    assert (read_picture(tmp_path / "deep.tif").image == 0x80).all()
    colour_tiff(tmp_path / "dark.tif", 0x0FFF)
    (tmp_path / "phone.HEIC").write_bytes(b"....ftypheic")
    PHOTO.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    messages = {"phone.HEIC": "as JPEG", "cut.jpg": "truncated", "float.tif": "bits", "dark.tif": "few of its 16 bits"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            read_picture(tmp_path / name)


def test_batches_are_in_order_without_unreadable_files(tmp_path):
    paths, failures, batches = [tmp_path / f"{i}.png" for i in range(7)], [], []
    for i, path in enumerate(paths):
        Image.new("L", (9, 9), i).save(path)
    for i in (2, 3, 6):
        paths[i].write_bytes(b"")

    def latents(images, update):
        batches.append(images.max(axis=(1, 2, 3)).tolist())
        return [torch.tensor(batches[-1])]

    predictor = SimpleNamespace(batch_size=2, latents=latents)
    pictures, [h] = predict_files(predictor, paths, failures)
    assert batches == [[0, 1], [4, 5]] and h.tolist() == [0, 1, 4, 5]
    assert [picture.path for picture in pictures] == [paths[i] for i in (0, 1, 4, 5)]
    assert [message.split(":")[0] for message in failures] == [str(paths[i]) for i in (2, 3, 6)]


def test_which_files_are_pictures(tmp_path, capsys):
    for name in (
        "a/1.png", "a/sub/2.JPG", "a/.hidden.png", "a/@eaDir/1.png", "a/Thumbs.db", "a/notes.txt", "a/out/map.png",
        "b/1.png", "b/x[1].tif", "far/3.mpo", "c.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/round").symlink_to(tmp_path / "a")

    def find(images):
        return [str(path.relative_to(tmp_path)) for path in find_pictures(images, tmp_path / "a/out")]

    assert find(f"{tmp_path}/a") == ["a/1.png", "a/linked/3.mpo", "a/sub/2.JPG"]
    assert "skipped 2 non-image files" in capsys.readouterr().out
    several = f"{tmp_path}/b/1.png,{tmp_path}/c.png,{tmp_path}/b/x[1].tif, {tmp_path}/b/*.png"
    assert find(several) == ["b/1.png", "c.png", "b/x[1].tif"]
    for images in (f"{tmp_path}/c.png,{tmp_path}/d.png", ""):
        with pytest.raises(UserError, match="there is no file"):
            find(images)


@pytest.fixture
def photos(tmp_path):
    """Two pictures with trying names, and one that cannot be read."""
    folder, names = tmp_path / "photos", ["a" * 246 + ".png", os.fsdecode(b"z\xe9.png")]
    folder.mkdir()
    for i, name in enumerate(names):
        PHOTO.rotate(40 * i).crop((0, 0, 214 + 20 * i, 214)).save(folder / name)
    (folder / "broken.png").write_bytes(b"broken")
    return folder


def test_predictions_of_ones_own_pictures(photos, finetuned_dir, tmp_path, capsys):
    options = dict(RUN_DIR=finetuned_dir, IMAGES=photos, OUTPUT_DIR=tmp_path / "out", DEVICE="cpu", BATCH_SIZE=2)
    with pytest.raises(UserError, match="1 picture could not be read and had to be skipped:\n.*broken.png"):
        run_stage(predict_pictures, **options, SUBJECT="subj06, group", MAPS=6)
    assert "2 pictures for subj06, group" in capsys.readouterr().out

    paths = [path for path in sorted(photos.iterdir()) if path.name != "broken.png"]
    pictures = pd.read_csv(tmp_path / "out/pictures.csv")
    assert pictures["width"].tolist() == [214, 234] and pictures.file[0] == str(paths[0])
    images = [squared(Image.open(path)) for path in paths]
    space = load_checkpoint(finetuned_dir / "finetuned.pt")[1]
    rois = pd.read_csv(tmp_path / "out/rois.csv")
    for name, subject in (("subj06", 5), ("group", None)):
        expected, folder = plain_prediction(finetuned_dir / "finetuned.pt", images, subject), tmp_path / "out" / name
        for hemi in HEMIS:
            columns = space.columns(subject, hemi)
            activity = np.load(folder / f"activity_{hemi}.npy")
            np.testing.assert_allclose(activity, expected[:, columns], atol=1e-5)
            vertices = np.load(folder / f"fsaverage_{hemi}.npy")
            assert vertices.tolist() == space.vertices[columns].tolist()
            surface = nibabel.load(folder / f"{pictures.picture[1]}_{hemi}.func.gii").darrays[0].data
            np.testing.assert_array_equal(surface[vertices], activity[1])
            assert len(surface) == 163842 and np.isnan(np.delete(surface, vertices)).all()
            region = roi_masks(space, subject)["prf-visualrois", "V1"][columns]
            mean = rois[(rois.subject == name) & (rois.roi == "V1") & (rois.hemisphere == hemi)]
            np.testing.assert_allclose(mean["mean"], activity[:, region].mean(1), atol=1e-5)
            assert mean.picture.tolist() == pictures.picture.tolist() and (mean.n_vertices == region.sum()).all()
        assert all((folder / f"{picture}.png").stat().st_size > 10_000 for picture in pictures.picture)
    with pytest.raises(UserError, match="not empty"):
        run_stage(predict_pictures, **options)


def test_checkpoints_are_averaged_and_large_sets_get_no_maps(run_dir, finetuned_dir, tmp_path):
    PHOTO.save(tmp_path / "photo.jpg")
    paths = [run_dir / "head.pt", finetuned_dir / "finetuned.pt"]
    options = dict(IMAGES=tmp_path / "photo.jpg", SUBJECT="subj01", OUTPUT_DIR=tmp_path / "out", DEVICE="cpu", MAPS=0)
    run_stage(predict_pictures, **options, CHECKPOINT=",".join(map(str, paths)))
    image = [read_picture(tmp_path / "photo.jpg").image]
    expected = np.mean([plain_prediction(path, image, 0) for path in paths], axis=0)
    activity = np.concatenate([np.load(tmp_path / f"out/subj01/activity_{hemi}.npy") for hemi in HEMIS], 1)
    np.testing.assert_allclose(activity, expected[:, load_checkpoint(paths[0])[1].mask[0]], atol=1e-5)
    assert {path.suffix for path in (tmp_path / "out/subj01").iterdir()} == {".npy"}


def test_unreadable_pictures_give_exit_code_1_after_the_others(photos, run_dir, tmp_path, monkeypatch):
    """Through the command line, with several words, as a shell expands *.png."""
    set_constants(monkeypatch, predict_pictures, **constants(vars(predict_pictures)))  # restored at the end
    options = f"x --run_dir {run_dir} --subject group --device cpu --maps 0 --output_dir {tmp_path}/out".split()
    monkeypatch.setattr(sys, "argv", [*options, "--images", *map(str, sorted(photos.iterdir())[:2])])
    with pytest.raises(SystemExit) as end:
        run(predict_pictures.main, vars(predict_pictures))
    assert "broken.png: cannot identify" in end.value.code  # text: exit code 1
    assert len(np.load(tmp_path / "out/group/activity_lh.npy")) == 1
    monkeypatch.setattr(sys, "argv", [*options, "--images", f"{photos}/broken.png", "--overwrite"])
    with pytest.raises(SystemExit, match="none of the pictures"):
        run(predict_pictures.main, vars(predict_pictures))
    assert len(np.load(tmp_path / "out/group/activity_lh.npy")) == 1  # earlier results stay


def test_contrast_is_scipys_t_test_of_plain_predictions(run_dir, challenge, tmp_path):
    folder, output = challenge / "subj01/training_split/training_images", tmp_path / "out"
    sides = [sorted(folder.glob(name)) for name in ("train-000[1-4]*", "train-001*")]
    options = dict(zip(("IMAGES_A", "IMAGES_B"), (",".join(map(str, side)) for side in sides)))
    run_stage(contrast, RUN_DIR=run_dir, SUBJECT="subj06", OUTPUT_DIR=output, DEVICE="cpu", BATCH_SIZE=3, **options)
    space = load_checkpoint(run_dir / "head.pt")[1]
    images = [[prepare_data.decode_picture(path) for path in side] for side in sides]
    a, b = (plain_prediction(run_dir / "head.pt", side, 5) for side in images)
    assert (len(a), len(b)) == (4, 10)
    t = ttest_ind(a.astype(float), b.astype(float), equal_var=False).statistic
    for hemi in HEMIS:
        columns = space.columns(5, hemi)
        for name, expected in (("difference", a.mean(0) - b.mean(0)), ("mean_b", b.mean(0))):
            np.testing.assert_allclose(np.load(output / f"subj06/{name}_{hemi}.npy"), expected[columns], atol=1e-5)
        np.testing.assert_allclose(np.load(output / f"subj06/t_{hemi}.npy"), t[columns], rtol=0.01, atol=0.01)
        assert np.load(output / f"subj06/fsaverage_{hemi}.npy").tolist() == space.vertices[columns].tolist()
    region = roi_masks(space, 5)["prf-visualrois", "V1"]
    row = pd.read_csv(output / "rois.csv").query("roi == 'V1' and hemisphere == 'both'").iloc[0]
    expected = ttest_ind(a[:, region].mean(1), b[:, region].mean(1), equal_var=False).statistic
    assert row.t == pytest.approx(expected, rel=0.01) and (output / "subj06/t.png").exists()


def test_contrast_of_a_picture_with_itself_is_zero(run_dir, tmp_path):
    PHOTO.save(tmp_path / "photo.jpg")
    images = dict(IMAGES_A=tmp_path / "photo.jpg", IMAGES_B=tmp_path / "photo.jpg")
    run_stage(contrast, RUN_DIR=run_dir, SUBJECT="group", OUTPUT_DIR=tmp_path / "out", DEVICE="cpu", **images)
    assert not np.load(tmp_path / "out/group/difference_lh.npy").any()
    assert np.isnan(np.load(tmp_path / "out/group/t_lh.npy")).all() and not (tmp_path / "out/group/t.png").exists()


def test_berg_interface(finetuned_dir, tmp_path, monkeypatch):
    """With a stand-in for the base class, whose abstract methods are BERG's."""
    methods = ("load_model", "generate_response", "get_metadata", "get_model_id", "cleanup")
    base = type("BaseModelInterface", (ABC,), {name: abstractmethod(lambda self: None) for name in methods})
    for name in ("berg", "berg.interfaces", "berg.interfaces.base_model"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(BaseModelInterface=base))
    monkeypatch.delitem(sys.modules, "tools.berg", raising=False)
    berg = importlib.import_module("tools.berg")
    assert issubclass(berg.EncodingModel, base)
    path = tmp_path / berg.EncodingModel.CHECKPOINT
    path.parent.mkdir(parents=True)
    path.symlink_to(finetuned_dir / "finetuned.pt")

    stimulus = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    images = [squared(Image.fromarray(x.transpose(1, 2, 0))) for x in stimulus]
    expected = plain_prediction(path, images, 5)
    model = berg.EncodingModel(subject=6, device="cpu", berg_dir=tmp_path)
    model.load_model()
    space, metadata = model.model.space, berg.EncodingModel.get_metadata(model_instance=model)
    chosen = berg.EncodingModel(subject=6, selection={"roi": "V1"}, device="cpu", berg_dir=tmp_path)
    chosen.load_model()
    for hemi, activity, in_roi in zip(HEMIS, model.generate_response(stimulus), chosen.generate_response(stimulus)):
        columns = space.columns(5, hemi)
        vertices = space.vertices[columns].numpy()
        assert activity.shape == (2, 163842) and np.isnan(activity).sum() == 2 * (163842 - len(vertices))
        np.testing.assert_allclose(activity[:, vertices], expected[:, columns], atol=1e-4)
        v1 = metadata["fmri"][f"{hemi}_fsaverage_rois"]["V1"]
        np.testing.assert_array_equal(in_roi, activity[:, v1])
        assert len(v1) == roi_masks(space, 5)["prf-visualrois", "V1"][columns].sum() > 0
    assert model.get_model_id() == "fmri-nsd_fsaverage-blobgpt"
    model.cleanup()
