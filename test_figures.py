"""Figures of the evaluation and flat maps: what is drawn is what was measured, predicted and scored."""

import csv
import json
import re
import shutil
from itertools import product
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from nilearn import datasets, surface
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt

import ensemble
import evaluate
import figures
import fit_pca
import flatmap
import model
import prepare_data
import scores
from checkpoint import load_checkpoint
from common import Problem
from shared_fixtures import hemis, r2_of_vertices, run


@pytest.fixture(scope="module")
def space(fitted):
    return prepare_data.load(fitted).space


@pytest.fixture(scope="module")
def flat(space):
    return flatmap.FlatMap(space)


@pytest.fixture(scope="module")
@torch.inference_mode()
def expected(phase_2, challenge, fitted, subjects):
    """Of the held-out pictures, by subject: rows of data.images, measured, predicted and the group's prediction
    (n_images, n_vertices), from the organisers' files and the head's formula."""
    data, encoder = prepare_data.load(fitted), load_checkpoint(fitted.parent / "run/finetuned.pt")[0]
    head, found = encoder.head, []
    for s, (name, files) in enumerate(subjects.items()):
        rows = data.test_image[data.test_subject == s]
        measured = np.full((len(rows), data.space.n_vertices), np.nan, np.float32)
        for hemi in hemis:
            measured[:, files.columns[hemi]] = np.load(challenge / name / f"test_split/test_fmri/{hemi}_test_fmri.npy")
        [h] = model.feature_latents([encoder], data.images[rows])
        shared = h @ head.shared.T
        own = shared + h @ head.subject_weight[s].T + head.subject_bias[s]
        parts = [(z @ head.embed_weight.T + head.embed_bias).detach().numpy() for z in (own, shared)]
        found.append((rows, measured, *(np.where(np.isnan(measured), np.nan, part) for part in parts)))
    return found


def r2_of_subjects(expected, which):
    """(n_subjects, n_vertices) by scikit-learn. which: 2 the subjects' predictions, 3 the group's."""
    r2 = np.full((len(expected), expected[0][1].shape[1]), np.nan)
    for s, parts in enumerate(expected):
        has = ~np.isnan(parts[1][0])
        r2[s, has] = r2_of_vertices(parts[1][:, has], parts[which][:, has])
    return r2


def same(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=atol)


def assert_outlined(panel, flat, subject):
    """The lines on a map are those of the subject's own areas."""
    wanted = [line for lines, _ in flat.outlines("streams", subject).values() for line in lines]
    assert len(wanted) > 5 and len(panel.lines) == len(wanted)
    assert all(np.array_equal(*pair) for pair in zip(panel.lines, wanted))


# ---- the report's figures -----------------------------------------------------------------------


def test_figures_are_there(evaluation):
    names = {path.name.split("_")[1] for path in evaluation.folder.glob("figure_*.png")}
    assert names == {"2a", "2b", "3", "4a", "4b", "4c"}
    for path in evaluation.folder.glob("figure_*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3) @ [1 << 16, 1 << 8, 1]
        assert len(pixels) > 300_000 and len(np.unique(pixels)) > 50  # something is drawn
        assert (pixels == 0xFFFFFF).mean() > 0.2  # and not all over


def test_r2_maps(evaluation, expected, space, flat):
    """Figure 4a: the subjects in their order, medians on top, the table's numbers in the titles."""
    own, group = (r2_of_subjects(expected, which) for which in (2, 3))
    with np.load(evaluation.folder / "vertices.npz") as found:
        same(found["subject_r2"], own, 1e-3)
        same(found["group_r2"], group, 1e-3)
        assert list(found["subjects"]) == space.subjects
        assert np.array_equal(found["fsaverage_index"], space.vertices)
        assert np.array_equal(found["hemisphere"] == "lh", np.arange(space.n_vertices) < space.n_lh)
    panels = evaluation.figures["figure_4a_r2_maps.png"].panels
    maps = [("median of the subjects", np.nanmedian(own), np.nanmedian(own, axis=0))]
    maps.append(("group prediction", np.nanmedian(group), np.nanmedian(group, axis=0)))
    maps += [(name, np.nanmedian(own[s]), own[s]) for s, name in enumerate(space.subjects)]
    rows = list(csv.DictReader((evaluation.folder / "scores.csv").open()))
    for panel, (title, median, values) in zip(panels, maps, strict=False):
        name, number = panel.title.split(": ")
        assert name == title and float(number) == pytest.approx(median, abs=1.1e-3)
        same(panel.shown[1], flat.image(values), 1e-3)
        assert_outlined(panel, flat, space.subjects.index(name) if name in space.subjects else None)
        subject = name if name in space.subjects else "all"
        where = dict(prediction="group" if "group" in name else "subject", subject=subject, metric="r2")
        where |= dict(hemisphere="both", roi_group="all", roi="all")
        (row,) = (row for row in rows if where.items() <= row.items())
        assert f"{float(row['median']):.3f}" == number
    assert len([panel for panel in panels if len(panel.shown) > 1]) == len(maps)
    assert re.match("outlined: streams; saturated: .* % below 0", evaluation.figures["figure_4a_r2_maps.png"].note)


def test_samples(evaluation, expected, space, flat, fitted):
    """Figure 4b: pictures with their nsd ids from the best predicted to the worst, measured on the left."""
    data = prepare_data.load(fitted)
    rows, measured, predicted, _ = expected[5]  # EXAMPLE_SUBJECT is subj06, who lacks some vertices
    has = ~np.isnan(measured[0])
    r2 = r2_of_vertices(measured[:, has].T, predicted[:, has].T)
    order = np.argsort(-r2)[[0, 2, 3, 5, 6, 8]]  # of nine pictures
    panels = [panel for panel in evaluation.figures["figure_4b_samples.png"].panels if panel.shown]
    assert len(panels) == 3 * len(order) and len(rows) == 9 and not has.all()
    for i, (picture, left, right) in zip(order, zip(*[iter(panels)] * 3)):
        name, number = picture.title.split(", R² ")
        assert name == f"nsd-{data.nsd_id[rows[i]]:05d}" and float(number) == pytest.approx(r2[i], abs=0.006)
        assert np.array_equal(picture.shown[0], data.images[rows[i]])
        assert (left.title, right.title) == ("measured", "predicted")
        same(left.shown[1], flat.image(measured[i]))
        same(right.shown[1], flat.image(predicted[i]), 1e-3)
        assert_outlined(left, flat, 5)
        assert_outlined(right, flat, 5)


def test_components_are_the_checkpoints_own(evaluation, phase_2, fitted, space, flat):
    """Figure 2b: columns of the embedding, with shares of variance only from the PCA that they came from."""
    encoder, data = load_checkpoint(fitted.parent / "run/finetuned.pt")[0], prepare_data.load(fitted)
    pca = fit_pca.load(fitted, data)
    panels = [panel for panel in evaluation.figures["figure_2b_components.png"].panels if panel.shown[1:]]
    assert len(panels) == 4
    for k, panel in enumerate(panels):
        loading = encoder.head.embed_weight[:, k].numpy()
        same(panel.shown[1], flat.image(loading / np.sqrt(np.mean(loading**2))))
        share = pca.explained_variance[k] / pca.total_variance
        assert panel.title == f"component {k + 1}: {share:.1%} of variance"
    encoder.head.embed_weight.data = encoder.head.embed_weight.flip(1) * 3  # an embedding that is not this PCA's
    loadings, shares = figures.components(encoder, data, fitted)
    assert shares is None
    for k, loading in enumerate(loadings):
        wanted = pca.components[:, -1 - k].double().numpy()
        same(loading, wanted / np.sqrt(np.mean(wanted**2)))


def test_pooling_maps(phase_2, fitted):
    """Figure 2a: without the class token, weighted alike, signed by their strongest part, in the picture's layout."""
    encoder = load_checkpoint(fitted.parent / "run/finetuned.pt")[0]
    side = encoder.trunk.vit.patch_embed.grid_size[0]
    with torch.no_grad():
        for projection in encoder.head.projections:  # three kinds of maps: upper half, left half, one corner
            maps = torch.zeros(16, side, side)
            maps[:8, : side // 2] = 1
            maps[8:14, :, : side // 2] = 0.1
            maps[14:, 0, -1] = -5  # the sign is arbitrary
            projection.spatial[:] = torch.cat([torch.full((16, 1), 99.0), maps.flatten(1)], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "n_pooling_maps", 3)
        means, shares = figures.pooling_exemplars(encoder, 0)
    np.testing.assert_allclose(shares, [8 / 16, 6 / 16, 2 / 16])
    wanted = np.zeros((3, side, side))
    wanted[0, : side // 2], wanted[1, :, : side // 2], wanted[2, 0, -1] = 1, 1, 1
    np.testing.assert_allclose(means, wanted, atol=1e-6)


def log_of(path, entries):
    lines = [dict(zip(("step", "train_loss", "val_loss", "val_r2"), entry)) for entry in entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_loss_curves(evaluation, tmp_path):
    """Figure 3: both phases of finetuned.pt, only phase 1 of head.pt, the phase 1 that it came from of another."""
    first = [(0, None, 1.1, -0.4), (3, 1.0, 0.9, 0.1), (6, 0.8, 0.85, 0.3), (8, 0.7, 0.86, 0.2)]
    log_of(tmp_path / "train_head.jsonl", first)
    log_of(tmp_path / "finetune.jsonl", [(0, None, 0.85, 0.3), (4, 0.6, 0.84, 0.35)])
    (tmp_path / "other").mkdir()
    log_of(tmp_path / "other/train_head.jsonl", [(0, None, 1.2, float("nan"))])
    head, tuned = {"made_with": {}}, {"made_with": {"CHECKPOINT": ""}}
    [(title, drawn, best)] = figures.training_curves(tmp_path / "head.pt", head)
    assert title.startswith("phase 1") and best == (6, 0.3)
    assert drawn["train"] == ([3, 6, 8], [1.0, 0.8, 0.7])
    assert drawn["validation"] == ([3, 6, 8], [0.9, 0.85, 0.86]) and drawn["r2"] == ([3, 6, 8], [0.1, 0.3, 0.2])
    phase_1, (title, drawn, best) = figures.training_curves(tmp_path / "finetuned.pt", tuned)
    assert phase_1[1]["r2"] == ([3, 6, 8], [0.1, 0.3, 0.2])
    assert title.startswith("phase 2") and drawn["r2"] == ([0, 4], [0.3, 0.35]) and best == (4, 0.35)
    assert drawn["train"] == ([4], [0.6])
    elsewhere = {"made_with": {"CHECKPOINT": str(tmp_path / "other/head.pt")}}
    (_, drawn, best), (_, second, _) = figures.training_curves(tmp_path / "finetuned.pt", elsewhere)
    assert drawn["validation"] == ([0], [1.2]) and drawn["train"] == ([], []) and best is None  # one entry is shown
    assert second["r2"] == ([0, 4], [0.3, 0.35])
    assert figures.training_curves(tmp_path / "none/head.pt", head) == []
    figure = figures.figure_3(figures.training_curves(tmp_path / "finetuned.pt", elsewhere))
    (loss, _), (r2, tuned_r2) = figure.axes[:2], figure.axes[2:]
    assert [line.get_xydata().tolist() for line in loss.lines] == [[], [[0, 1.2]]]
    assert len(r2.lines) == 1 and tuned_r2.lines[1].get_xydata().tolist() == [[4, 0.35]]
    plt.close(figure)
    panels = evaluation.figures["figure_3_loss_curves.png"].panels
    assert [panel.title[:7] for panel in panels[:2]] == ["phase 1", "phase 2"]


def test_medians_of_areas(evaluation, expected, challenge, subjects):
    """Figure 4c's numbers, from the organisers' labels."""
    own = r2_of_subjects(expected, 2)
    rows = csv.DictReader((evaluation.folder / "scores.csv").open())
    table = [row | {"median": float(row["median"] or "nan")} for row in rows]
    found = figures.roi_medians(table, prepare_data.load(challenge.parent / "data").space)
    assert list(found)[:2] == [("streams", "early"), ("streams", "midventral")]
    for group, name, label in (("streams", "ventral", 5), ("prf-visualrois", "V2d", 4), ("floc-bodies", "EBA", 1)):
        for hemi in hemis:
            medians = []
            for s, (subject, files) in enumerate(subjects.items()):
                labels = np.load(challenge / subject / f"roi_masks/{hemi}.{group}_challenge_space.npy")
                values = own[s, files.columns[hemi]][labels == label]
                medians += [np.median(values)] if len(values) else []
            same(found[group, name][hemi], medians, 2e-3)


# ---- numbers ------------------------------------------------------------------------------------


def test_the_number_to_report(phase_2, challenge, fitted, subjects, tmp_path, capsys):
    """Validation brings the private test's number; a subject without a noise ceiling has no challenge score."""
    fewer = tmp_path / "challenge"
    shutil.copytree(challenge, fewer, ignore=shutil.ignore_patterns("*.png", "training_split"))
    shutil.rmtree(fewer / "subj03/test_split/noise_ceiling")
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"), CHALLENGE_DIR=str(fewer), DEVICE="cpu")
    run(evaluate, **folders, OUTPUT_DIR=str(tmp_path / "val"), FIGURES=False, PRECISION="float32")
    out = capsys.readouterr().out
    run(evaluate, **folders, OUTPUT_DIR=str(tmp_path / "test"), FIGURES=False, PRECISION="float32", SPLIT="test")
    val, test = (json.loads((tmp_path / x / "scores.json").read_text()) for x in ("val", "test"))
    assert val["to_report"]["split"] == "test" and val["to_report"]["scores"] == test["scores"]
    assert val["to_report"]["n_images"] == test["n_images"] and test["to_report"]["scores"] == test["scores"]
    assert val["scores"] != test["scores"]
    data = prepare_data.load(fitted)
    for found, split in ((val, "val"), (test, "test")):
        counts = {name: int((data.subject[data.samples(split)] == s).sum()) for s, name in enumerate(subjects)}
        assert found["n_images"] == counts
        assert found["n_pictures"] == len(set(data.image[data.samples(split)]))
    number = test["scores"]["subject"]["all"]["r2"]["median"]
    assert "validation chose the checkpoint, so its scores are optimistic" in out
    assert f"the number to report: median R² {number:.4f}" in out
    assert "on private test, 2 to 3 pictures a subject" in out
    assert "fewer than 100 pictures, numbers are uncertain (95 % interval): subj01 (4)" in out
    assert "no noise ceiling, no challenge score: subj03" in out
    own = val["scores"]["subject"]
    order = ("r2", "median"), ("r2", "mean"), ("r", "median"), ("r", "mean"), ("challenge", "mean")
    shown = [own["all"][metric][value] for metric, value in order]
    printed = re.search(r"^subject +all +\d+ +\d+ +(\S+) +– +(.*)$", out, re.MULTILINE)
    assert [printed[1], *printed[2].split()] == [f"{value:.4f}" for value in shown]
    challenge_score = test["scores"]["subject"]["all"]["challenge"]["mean"]
    assert f", challenge score {challenge_score:.4f} (–)" in out
    early = [
        row["median"] for row in csv.DictReader((tmp_path / "val/scores.csv").open())
        if [row[k] for k in ("prediction", "subject", "roi", "metric")] == ["subject", "all", "early", "r2"]
    ]  # fmt: skip
    printed = re.search(r"^streams early +(.*)$", out, re.MULTILINE)[1].split()
    assert printed == [f"{float(value):.4f}" for value in early] and len(set(printed)) == 3
    assert own["subj03"]["challenge"]["mean"] is None and own["subj02"]["challenge"]["mean"] > 0
    with np.load(tmp_path / "val/vertices.npz") as found:
        challenge_scores = found["subject_challenge"]
        assert np.isnan(challenge_scores[2]).all() and np.isnan(found["noise_ceiling"][2]).all()
        assert np.nanmean(challenge_scores) == pytest.approx(own["all"]["challenge"]["mean"])
    assert own["all"]["r2"]["median_95"] is None  # of four pictures a subject no interval is given


def test_every_checkpoint_and_split_has_a_folder_of_its_own():
    a, b, c = (Path("runs", name, "head.pt") for name in "abc")
    assert evaluate.default_folder([a], "val") == Path("runs/a/evaluation_head_val")
    calls = ([a], "val"), ([a], "test"), ([a, b], "val"), ([a, c], "val"), ([a.with_name("finetuned.pt")], "val")
    assert len({evaluate.default_folder(*call) for call in calls}) == len(calls)


def test_intervals_stand_in_the_scores(evaluation, expected, challenge, subjects, monkeypatch):
    """Headline intervals are those of the bootstrap of measured and predicted activity."""
    found = json.loads((evaluation.folder / "scores.json").read_text())["scores"]
    monkeypatch.setattr(scores, "fewest_pictures", 5)
    bootstrap = scores.Bootstrap(np.concatenate([rows for rows, *_ in expected]), 50, evaluate.SEED)
    for s, (rows, measured, predicted, group) in enumerate(expected):
        has = ~np.isnan(measured[0])
        predictions = {"subject": torch.tensor(predicted[:, has]), "group": torch.tensor(group[:, has])}
        folder = challenge / list(subjects)[s] / "test_split/noise_ceiling"
        ceiling = np.concatenate([np.load(folder / f"{hemi}_noise_ceiling.npy") for hemi in hemis])
        bootstrap.add(list(subjects)[s], rows, torch.tensor(measured[:, has]), predictions, ceiling)
    cases = [("r2", "median"), ("r", "mean"), ("r", "median"), ("challenge", "mean")]
    for prediction in ("subject", "group"):
        for subject, (metric, value) in product(("all", "subj04", "subj08"), cases):
            numbers = found[prediction][subject][metric]
            wanted = scores.interval(numbers[value], bootstrap.resampled(subject, prediction, metric)[value])
            same(numbers[f"{value}_95"], wanted, 1e-3)
            assert numbers[f"{value}_95"][0] < numbers[value] < numbers[f"{value}_95"][1]


def test_authors_weights_are_not_scored_on_their_training_pictures(phase_2, fitted, tmp_path, monkeypatch):
    """Refused on our own validation and private test; their splits and the organisers' pictures are scored."""
    seen = []

    def load(paths, device, precision, space):
        made = {"made_with": {"published": "theirs.pt"}, "fingerprint": "0", "step": 1, "finished": True, "scores": {}}
        found = load_ensemble(paths, device, precision, space)
        found.checkpoints = [(path, made) for path, _ in found.checkpoints]
        return found

    load_ensemble = ensemble.load_encoder
    monkeypatch.setattr(ensemble, "load_encoder", load)
    monkeypatch.setattr(evaluate, "measure", lambda data, split, *_, **__: seen.append(split) or 1 / 0)
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"), DEVICE="cpu", OUTPUT_DIR=str(tmp_path))
    for split in ("val", "test"):
        with pytest.raises(Problem, match=f"trained on most of these {split} pictures"):
            run(evaluate, **folders, SPLIT=split)
    with pytest.raises(ZeroDivisionError):
        run(evaluate, **folders, SPLIT="challenge")
    assert seen == ["challenge"]


# ---- flat maps ----------------------------------------------------------------------------------


def test_flat_maps_show_values_where_the_vertices_are(space, flat):
    """Every vertex that the flat patch holds has its value at its place; missing ones are NaN."""
    values = np.random.default_rng(0).random(space.n_vertices)
    shown = flat.image(values)
    at = flat.weight.max(2) > 0.97  # pixels nearly on a vertex
    nearest = np.take_along_axis(flat.column, flat.weight.argmax(2)[:, :, None], 2)[:, :, 0]
    known = at & (nearest >= 0)
    assert known.sum() > 10
    np.testing.assert_allclose(shown[known], values[nearest[known]], atol=0.05)
    assert np.isnan(shown[at & (nearest < 0)]).all()
    assert np.isnan(flat.image(np.full(space.n_vertices, np.nan))).all()
    left = np.arange(space.n_vertices) < space.n_lh
    values = np.where(values < 0.3, np.nan, 7)  # a missing neighbour dilutes nothing
    np.testing.assert_allclose(flat.image(values)[~np.isnan(flat.image(values))], 7, rtol=1e-6)
    sides = flat.image(left)[:, : flat.middle], flat.image(left)[:, flat.middle :]
    assert (sides[0] != 0).all() and (np.nan_to_num(sides[1]) == 0).all()


def test_pixels_are_drawn_as_the_picture_that_they_are():
    """A space of NSD-Flat's pixels: every one is a square at its place, row 0 on top, hemispheres side by side."""
    height, width = flatmap.map_shape
    row, column = np.mgrid[:height, :width]
    inside = ((row - 100) / 60) ** 2 + ((column - 100) / 80) ** 2 < 1
    pixels = np.flatnonzero(inside)
    pixels = np.concatenate([pixels[pixels % width < 100], pixels[pixels % width >= 100]])
    n_lh = int((pixels % width < 100).sum())
    mask = torch.ones(1, len(pixels), dtype=torch.bool)
    is_block = ((row - 110 == np.clip(row - 110, 0, 19)) & (column - 40 == np.clip(column - 40, 0, 29))).ravel()[pixels]
    rois = {"streams": {"names": {0: "Unknown", 1: "block"}, "labels": torch.tensor(is_block[None].astype(int))}}
    space = model.Space(["subj01"], torch.tensor(pixels), n_lh, mask, rois, unit="pixels")
    flat = flatmap.FlatMap(space)
    values = np.random.default_rng(0).random(len(pixels)).astype(np.float32)
    picture = np.full((height, width), np.nan, np.float32)
    picture.flat[pixels] = values
    rows, columns = (slice(axis.min() - 8, axis.max() + 8) for axis in np.nonzero(inside))
    wanted = np.kron(picture[rows, columns], np.ones((2, 2), np.float32))  # half a millimetre
    assert np.array_equal(flat.image(values), wanted, equal_nan=True)
    assert flat.middle == 2 * (100 - columns.start)
    [(lines, [(x, y)])] = flat.outlines("streams", 0).values()
    top, left = 2 * (110 - rows.start), 2 * (40 - columns.start)
    assert len(lines) == 1 and abs(y - (top + 19.5)) < 1 and 19 <= x - left <= 40  # in the middle of 40 x 60
    assert flat.outlines("floc-faces", 0) == {}


@pytest.fixture(scope="module")
def dense():
    """The back of both hemispheres of fsaverage5, cut into ten areas of one subject and nine of another."""
    inflated = datasets.fetch_surf_fsaverage("fsaverage5")
    place = np.stack([surface.load_surf_mesh(inflated[f"infl_{side}"]).coordinates for side in ("left", "right")])
    chosen = [np.flatnonzero(part[:, 1] < -35) for part in place]
    labels = []
    for side, own in zip(place, chosen):
        seeds = side[own[np.linspace(0, len(own) - 1, 10).astype(int)]]
        labels.append(1 + np.linalg.norm(side[own][:, None] - seeds, axis=2).argmin(1))
    labels = np.stack([np.concatenate(labels)] * 2)
    labels[1][labels[1] == 10] = 0
    vertices = torch.tensor(np.concatenate(chosen))
    names = {0: "Unknown"} | {k: f"midparietal-{k}" for k in range(1, 11)}
    rois = {"streams": {"names": names, "labels": torch.tensor(labels)}}
    mask = torch.ones(2, len(vertices), dtype=torch.bool)
    return flatmap.FlatMap(model.Space(["subj01", "subj02"], vertices, len(chosen[0]), mask, rois))


def test_outlines(dense):
    """Of every area lines around its pixels and its name at places inside; an unknown group is refused."""
    labels, names = (dense.space.rois["streams"][key] for key in ("labels", "names"))
    for subject, count in ((0, 10), (1, 9)):
        outlines = dense.outlines("streams", subject)
        assert list(outlines) == [("streams", names[k]) for k in range(1, count + 1)]
        for k, (lines, places) in enumerate(outlines.values(), 1):
            inside = np.nan_to_num(dense.image(labels[subject].numpy() == k)) > 0.5
            assert places and all(inside[y, x] for x, y in places)
            depths = [distance_transform_edt(half) for half in np.split(inside, [dense.middle], axis=1)]
            assert len(places) == sum(depth.any() for depth in depths)
            for x, y in places:  # the middle of its half
                depth, x = (depths[0], x) if x < dense.middle else (depths[1], x - dense.middle)
                assert depth[y, x] == depth.max()
            around = np.concatenate(lines).round().astype(int)
            border = [inside[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] for x, y in around]
            assert all(part.any() for part in border) and not any(part.all() for part in border)
            filled = np.zeros_like(inside)
            filled[around[:, 1], around[:, 0]] = True
            assert filled[inside & ~binary_erosion(inside)].mean() > 0.3  # all around
    assert dense.outlines("") == {} and dense.outlines("floc-words") == {}
    with pytest.raises(Problem, match="OUTLINES is 'stream', expected one of streams, prf-visualrois"):
        dense.outlines("stream")


@pytest.mark.parametrize("width, fits", [(2, False), (3, True), (5, True)])
def test_names_of_areas_never_overlap(dense, width, fits, tmp_path):
    figure, axes = plt.subplots(figsize=(width, width), layout="constrained")
    outlines = dense.outlines("streams", 0)
    shown = dense.draw(axes, np.zeros(dense.space.n_vertices), (-1, 1), "RdBu_r", outlines, named=True)
    flatmap.describe_maps(figure, [shown], axes, "z", outlines)
    figure.draw_without_rendering()
    names = [text for text in axes.texts if text.get_text() not in ("L", "R")]
    homes = [text.get_position() for text in names]
    assert [text.get_text() for text in names] == [name for (_, name), (_, places) in outlines.items() for _ in places]
    assert homes == [place for _, places in outlines.values() for place in places] and len(homes) > 12
    boxes = [text.get_window_extent() for text in names]
    assert any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])  # else this tests nothing
    flatmap.save_figure(figure, tmp_path / "map.png")
    figure.draw_without_rendering()
    kept = [(text, home) for text, home in zip(names, homes) if text.get_visible()]
    assert len(kept) == len(names) if fits else len(kept) > 5
    boxes, frame = [text.get_window_extent() for text, _ in kept], axes.get_window_extent().padded(1)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    moved = [home for text, home in kept if tuple(text.get_position()) != home]
    assert moved and [tuple(line.get_xydata()[0]) for line in axes.lines] == moved  # a line leads home


def test_ranges_and_what_they_leave_out(flat):
    """Limits hold 99 % of what is drawn; the colour bar and the note tell of the rest."""
    values = np.linspace(-3, 1, 1001)
    assert flatmap.fit_limits([values]) == (-3, 3)
    assert flatmap.fit_limits([values, values], symmetric=False) == (0, 1)
    assert flatmap.fit_limits([np.append(values / 100, np.nan)]) == pytest.approx((-0.03, 0.03))
    assert flatmap.fit_limits([np.append(np.full(1000, 0.13), 900)]) == pytest.approx((-0.15, 0.15))
    for nothing in ([], [np.nan], [0.0, 0.0]):
        assert flatmap.fit_limits([nothing]) == (-1, 1)
    figure, axes = plt.subplots(layout="constrained")
    values = np.linspace(-1, 1, flat.space.n_vertices)
    shown = flat.draw(axes, values, (-0.5, 2), "RdBu_r", {})
    flatmap.describe_maps(figure, [shown], axes, "activity (z)", {("streams", "early"): ([], [])})
    image = flat.image(values)
    share = (image < -0.5).sum() / (~np.isnan(image)).sum()
    assert figure.get_supxlabel() == f"outlined: streams; saturated: {100 * share:.1f} % below -0.5"
    bar = figure.axes[1]
    assert bar._colorbar.extend == "min" and bar.get_ylabel() == "activity (z)"
    shown = shown.to_rgba(shown.get_array())
    wanted = matplotlib.colormaps["RdBu_r"]((np.nan_to_num(image) + 0.5) / 2.5)
    np.testing.assert_allclose(shown[~np.isnan(image)], wanted[~np.isnan(image)], atol=0.01)
    plt.close(figure)
