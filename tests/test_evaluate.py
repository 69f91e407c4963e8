"""Scores, tables, intervals, maps and the page of tools/evaluate.py, against scikit-learn, scipy and plain loops."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from nilearn import datasets, surface
from PIL import Image
from sklearn.metrics import r2_score

import predict
import prepare_data
from core.checkpoint import save_checkpoint
from core.space import HEMIS, Space
from model import Encoder, Head, Trunk, UserError
from tests.conftest import run_stage
from tools import evaluate, figures, flatmap

N_PICTURES, N_TEST = 60, 15
NAMES = ["subj01", "subj02", "subj05"]
STREAMS = {0: "Unknown", 1: "early", 5: "ventral", 7: "parietal"}


def build_space():
    """The back of fsaverage5; subj02 lacks its lowest vertices, and everybody has other areas."""
    files = datasets.fetch_surf_fsaverage("fsaverage5")
    places = [surface.load_surf_mesh(files[f"infl_{half}"]).coordinates for half in ("left", "right")]
    chosen = [np.flatnonzero(place[:, 1] < -65) for place in places]
    _, y, z = np.concatenate([place[own] for place, own in zip(places, chosen)]).T
    mask = np.stack([z > -99, z > -35, z > -99])
    labels = mask * (y <= -70) * np.stack([np.select([z < s - 10, z < 10], [1, 5], 7) for s in (0, 5, 10)])
    quarters = {
        "names": {0: "Unknown", 1: "V1v", 2: "V1d"},
        "labels": torch.tensor(mask * np.where(z < 0, 1, 2)).short(),
    }
    rois = {"streams": {"names": STREAMS, "labels": torch.tensor(labels).short()}, "prf-visualrois": quarters}
    return Space(NAMES, torch.tensor(np.concatenate(chosen)), len(chosen[0]), torch.tensor(mask), rois)


def build_encoder(space):
    torch.manual_seed(0)
    trunk = Trunk("test_vit", "0,2", image_size=64, pretrained=False, seed=1)
    head = Head(trunk.feature_shapes, 8, 6, len(space.subjects), space.n_vertices)
    head.embed_weight.data.normal_()
    return Encoder(trunk, head).eval()


def save_sides(folder, name, values, space, s):
    """{lh,rh}_NAME.npy in the challenge's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for hemi in HEMIS:
        np.save(folder / f"{hemi}_{name}.npy", values[..., space.columns(s, hemi)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prepared data, a checkpoint and held-out activity; what subjects do is what the model says, and noise."""
    folder, space, rng = tmp_path_factory.mktemp("world"), build_space(), np.random.default_rng(0)
    encoder = build_encoder(space)
    coarse = rng.integers(0, 256, (N_PICTURES + N_TEST, 5, 5, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(c).resize((256, 256), Image.Resampling.BICUBIC)) for c in coarse])
    save = dict(space=space, made_with={}, scores={}, step=1, finished=True, train_nsd_ids=[])
    save_checkpoint(folder / "plain.pt", encoder, **save)
    predictor = predict.load_encoder(folder / "plain.pt", "cpu", "float32")
    latents = predictor.latents(images)
    signal = [predictor.decode(latents, s).numpy() for s in range(3)]
    noisy = [y + rng.normal(0, 1.2 * y.std(0).mean(), y.shape) for y in signal]
    activity = [np.where(mask, y, 0).astype(np.float32) for mask, y in zip(space.mask, noisy)]
    nsd_ids = np.concatenate([np.arange(N_PICTURES) * 7 + 3, np.arange(N_TEST) * 5 + 10000])
    split = np.resize([0, 0, 1, 2, 0, 1], N_PICTURES)
    samples = {
        "subject": np.repeat([0, 1, 2], N_PICTURES), "image": np.tile(np.arange(N_PICTURES), 3),
        "split": np.tile(split, 3), "test_subject": np.repeat([0, 1, 2], N_TEST),
        "test_image": np.tile(np.arange(N_TEST) + N_PICTURES, 3),
    }  # fmt: skip
    prepare_data.write_prepared(
        folder / "data", space=space, samples=samples, nsd_ids=nsd_ids, n_training_images=N_PICTURES,
        activity=[y[:N_PICTURES] for y in activity], images=images, splits="pictures", made_with={},
    )  # fmt: skip
    ceilings = rng.uniform(0, 0.9, space.mask.shape)
    ceilings[:, :4] = 0
    for s, name in enumerate(NAMES):
        save_sides(folder / f"challenge/{name}/test_split/test_fmri", "test_fmri", activity[s][N_PICTURES:], space, s)
        save_sides(folder / f"challenge/{name}/test_split/noise_ceiling", "noise_ceiling", ceilings[s] * 100, space, s)
    data = prepare_data.load(folder / "data")
    save["made_with"] = {"data_fingerprint": data.fingerprint}
    save["train_nsd_ids"] = nsd_ids[:N_PICTURES][split == 0]
    save_checkpoint(folder / "head.pt", encoder, **save)
    figure, _ = plt.subplots()
    flatmap.save_figure(figure, folder / "train_head.png")
    return SimpleNamespace(folder=folder, space=space, data=data, signal=signal, activity=activity, ceilings=ceilings,
                           predictor=predictor, latents=latents, split=split, encoder=encoder, save=save)  # fmt: skip


def run(world, **values):
    """evaluate.main() with these constants -> scores.json, its folder."""
    output = world.folder / "out" / str(len(list(world.folder.glob("out/*"))))
    settings = dict(DATA_DIR=world.folder / "data", RUN_DIR=world.folder, CHALLENGE_DIR=world.folder / "challenge")
    settings |= (
        dict(OUTPUT_DIR=output, DEVICE="cpu", PRECISION="float32", RESAMPLES=60, FIGURES=False, N_EXAMPLES=2) | values
    )
    run_stage(evaluate, **settings)
    return json.loads(Path(settings["OUTPUT_DIR"], "scores.json").read_text()), Path(settings["OUTPUT_DIR"])


@pytest.fixture(scope="module")
def evaluation(world):
    """An evaluation on the challenge's pictures, with what its figures show."""
    drawn = {}

    def spy(figure, path):
        drawn[path.name] = [(axes.get_title(), list(axes.collections)) for axes in figure.axes], figure.get_supxlabel()
        figure.savefig(path, dpi=30)
        plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", spy)
        content, folder = run(world, SPLIT="challenge", FIGURES=True)
    vertices, table = np.load(folder / "vertices.npz"), pd.read_csv(folder / "scores.csv")
    return SimpleNamespace(content=content, folder=folder, drawn=drawn, vertices=vertices, table=table)


def r2_of(world, s, rows, prediction):
    """R² by scikit-learn in float64, NaN where the subject has no vertex."""
    r2, has = np.full(world.space.n_vertices, np.nan), world.space.mask[s].numpy()
    r2[has] = r2_score(world.activity[s][rows][:, has], prediction[rows][:, has], multioutput="raw_values")
    return r2


def assert_scores(world, content, s, rows):
    """The headline of a subject is scikit-learn's median R² on these rows of activity."""
    expected = np.nanmedian(r2_of(world, s, rows, world.signal[s]))
    assert content["scores"]["subject"][NAMES[s]]["r2"]["median"] == pytest.approx(expected, abs=2e-3)


# ---- scores --------------------------------------------------------------------------------------


def test_scores_of_every_vertex(world, evaluation):
    """vertices.npz: every subject's own predictions, the group's, and the challenge score by the percent ceilings."""
    vertices, rows = evaluation.vertices, slice(N_PICTURES, None)
    group = world.predictor.decode(world.latents, None).numpy()
    for s in range(3):
        has = world.space.mask[s].numpy()
        np.testing.assert_allclose(vertices["subject_r2"][s], r2_of(world, s, rows, world.signal[s]), atol=1e-3)
        np.testing.assert_allclose(vertices["group_r2"][s], r2_of(world, s, rows, group), atol=1e-3)
        pair = world.activity[s][rows][:, has], world.signal[s][rows][:, has]
        r = scipy.stats.pearsonr(*pair, axis=0).statistic
        np.testing.assert_allclose(vertices["subject_r"][s][has], r, atol=1e-3)
        ceiling = np.where(world.ceilings[s] == 0, 1e-14, world.ceilings[s])[has]
        expected = np.minimum(np.maximum(r, 0) ** 2 / ceiling, 1)
        np.testing.assert_allclose(vertices["subject_challenge"][s][has], expected, atol=5e-3)
        np.testing.assert_allclose(vertices["noise_ceiling"][s][has], world.ceilings[s][has], rtol=1e-5)
    assert list(vertices["subjects"]) == NAMES and np.array_equal(vertices["fsaverage_index"], world.space.vertices)
    assert (vertices["hemisphere"] == "lh").sum() == world.space.n_lh


def test_tables_are_those_of_a_plain_loop(world, evaluation):
    """scores.csv, with the ROI labels of each subject, and the headlines of scores.json."""
    table, (_, n_vertices) = evaluation.table, world.space.mask.shape
    labels, left = world.space.rois["streams"]["labels"].numpy(), np.arange(n_vertices) < world.space.n_lh
    sides = {"both": left | True, "lh": left, "rh": ~left}
    members = {"all": [0, 1, 2], "subj01": [0], "subj02": [1], "subj05": [2]}
    areas = {("all", "all"): labels > -1, ("streams", "all"): labels > 0, ("streams", "ventral"): labels == 5}
    keys = ["prediction", "metric", "subject", "hemisphere", "roi_group", "roi"]
    indexed, n_areas = table.set_index(keys).sort_index(), 2 + 3 + 4  # all, streams and three, rois, V1v, V1d, V1
    assert indexed.index.is_unique and len(table) == (2 * 3 + 1) * 4 * 3 * n_areas  # with noise ceilings
    predictions = ("subject", "r2"), ("group", "r2"), ("subject", "challenge"), ("noise ceiling", "r2")
    for key, subject, hemi, area in itertools.product(predictions, members, sides, areas):
        values = evaluation.vertices["_".join(key).replace("noise ceiling_r2", "noise_ceiling")]
        inside = areas[area] & sides[hemi] & world.space.mask.numpy()
        chosen = np.concatenate([values[s, inside[s]] for s in members[subject]])
        row, expected = indexed.loc[(*key, subject, hemi, *area)], [np.median(chosen), chosen.mean()]
        assert row.n_vertices == len(chosen) and row.score == row["mean" if key[1] == "challenge" else "median"]
        np.testing.assert_allclose(row[["median", "mean"]].astype(float), expected, rtol=1e-4)
        if area == ("all", "all") and hemi == "both":
            numbers = evaluation.content["scores"][key[0]][subject][key[1]]
            np.testing.assert_allclose([numbers["median"], numbers["mean"]], expected, rtol=1e-4)


def test_resampled_scores_are_those_of_repeated_pictures():
    rng = np.random.default_rng(0)
    y = rng.normal(0.3, 1, (12, 23)).astype(np.float32)
    prediction = (0.4 * y + rng.normal(0.1, 0.6, y.shape)).astype(np.float32)
    y[:, 4], prediction[:, 7] = 0.5, -1  # constant
    ceiling = np.where(np.arange(23) == 2, 0, rng.uniform(0.1, 0.8, 23))
    weights = evaluate.draw_pictures(15, 40, seed=1)[:, 2:14]  # three of the pictures are others'
    assert (evaluate.draw_pictures(15, 40, seed=1).sum(1) == 15).all()
    weights[-1] = 0
    scores = evaluate.resampled_scores(torch.tensor(y), torch.tensor(prediction), weights, ceiling)
    for b, times in enumerate(weights[:-1]):
        drawn = np.repeat(np.arange(12), times.int())
        a, p = y[drawn].astype(float), prediction[drawn].astype(float)
        constant = (a == a[0]).all(0) | (p == p[0]).all(0)
        r = np.zeros(23)
        r[~constant] = scipy.stats.pearsonr(a[:, ~constant], p[:, ~constant], axis=0).statistic
        expected = {"r2": r2_score(a, p, multioutput="raw_values"), "r": r}
        expected["challenge"] = np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1)
        for metric, values in expected.items():
            np.testing.assert_allclose(scores[metric][b], values, rtol=1e-5, atol=1e-6)
    assert all(np.isnan(values[-1]).all() for values in scores.values())  # no picture says nothing


def test_intervals_hold_what_other_pictures_give():
    """How often does the interval of a median hold the mean over many sets of pictures?"""
    rng, numbers, ends = np.random.default_rng(0), [], []
    gain = rng.uniform(0.2, 0.8, 40)
    for i in range(150):
        signal, noise = rng.normal(size=(2, 25, 40)) + rng.normal(size=(2, 25, 1))
        y, prediction = torch.tensor(gain * signal + 0.7 * noise), torch.tensor(gain * signal)
        weights = evaluate.draw_pictures(25, 120, seed=i)
        resampled = evaluate.resampled_scores(y, prediction, weights, np.full(40, np.nan))["r2"]
        numbers.append(np.median(r2_score(y, prediction, multioutput="raw_values")))
        ends.append(evaluate.interval(numbers[-1], np.median(resampled, axis=1)))
    low, high = np.transpose(ends)
    assert 0.88 < ((low <= np.mean(numbers)) & (np.mean(numbers) <= high)).mean() < 0.99  # a little too short
    assert evaluate.interval(0.5, np.array([0.0, 0.1, np.nan, 0.2])) == pytest.approx([0.405, 0.595])


def test_intervals_in_the_scores(world, evaluation):
    """The bootstrap is paired over pictures: everybody, and both predictions, see the same resamples."""
    weights = evaluate.draw_pictures(N_TEST, 60, evaluate.SEED)
    group = world.predictor.decode(world.latents, None).numpy()
    rows = evaluation.table.query("hemisphere == 'both' and prediction == 'subject' and metric == 'r2'")
    [ventral] = rows.query("subject == 'subj05' and roi == 'ventral'").itertuples()
    for name in ("subject", "group"):
        resampled = []
        for s in range(3):
            has, prediction = world.space.mask[s].numpy(), world.signal[s] if name == "subject" else group
            pair = (torch.tensor(v[N_PICTURES:][:, has]).float() for v in (world.activity[s], prediction))
            resampled.append(evaluate.resampled_scores(*pair, weights, np.full(has.sum(), np.nan))["r2"])
        for subject, scores in zip(["all", *NAMES], [np.concatenate(resampled, 1), *resampled]):
            numbers = evaluation.content["scores"][name][subject]["r2"]
            expected = evaluate.interval(numbers["median"], np.median(scores, 1))
            np.testing.assert_allclose(numbers["median_95"], expected, atol=1e-4)
            assert numbers["median_95"][0] < numbers["median"] < numbers["median_95"][1]
        if name == "subject":
            scores = resampled[2][:, world.space.rois["streams"]["labels"][2].numpy() == 5]
            expected = evaluate.interval(ventral.score, np.median(scores, 1))
            np.testing.assert_allclose([ventral.low, ventral.high], expected, atol=1e-4)
    for metric, value in (("r", "median"), ("challenge", "mean")):
        numbers = evaluation.content["scores"]["subject"]["all"][metric]
        assert numbers[f"{value}_95"][0] < numbers[value] < numbers[f"{value}_95"][1]


# ---- what is scored ------------------------------------------------------------------------------


def test_validation_brings_the_private_test(world, capsys):
    """The number to report is the private test's; without ceilings no challenge score. Print and files agree."""
    options = dict(CHALLENGE_DIR="none", RESAMPLES=20)
    content, folder = run(world, **options)
    out = capsys.readouterr().out
    assert np.array_equal(np.isfinite(np.load(folder / "vertices.npz")["subject_r2"]), world.space.mask)
    test, _ = run(world, **options, SPLIT="test")
    assert content["to_report"]["scores"] == test["scores"] == test["to_report"]["scores"] != content["scores"]
    for part, split in ((content, 1), (test, 2)):
        assert part["n_images"] == dict.fromkeys(NAMES, (world.split == split).sum())
        assert part["n_pictures"] == (world.split == split).sum() and not any(part["n_left_out"].values())
        for s in range(3):
            assert_scores(world, part, s, np.flatnonzero(world.split == split))
    number = test["scores"]["subject"]["all"]
    low, high = number["r2"]["median_95"]
    cited = f"median R² {number['r2']['median']:.4f}, 95 % CI {low:.4f} to {high:.4f} (private test, 10 pictures per"
    assert "challenge" not in number and cited in out and "scores are optimistic" in out
    [line] = [line for line in out.splitlines() if line.split()[:3] == ["validation", "group", "subj02"]]
    numbers = content["scores"]["group"]["subj02"]
    shown = [f"{x:.4f}" for metric in ("r2", "r") for x in (numbers[metric]["median"], *numbers[metric]["median_95"])]
    assert re.findall(r"-?\d\.\d+", line) == shown


def test_counts_are_of_what_is_scored(world, tmp_path, monkeypatch):
    """One subject has activity: pictures and intervals are theirs. Too few pictures give no interval."""
    (tmp_path / "subj02").mkdir()
    (tmp_path / "subj02/test_split").symlink_to(world.folder / "challenge/subj02/test_split")
    options = dict(CHALLENGE_DIR=tmp_path, SPLIT="challenge")
    content, _ = run(world, **options)
    assert content["n_images"] == {"subj02": N_TEST} and content["n_pictures"] == N_TEST
    assert list(content["scores"]["subject"]) == ["all", "subj02"]
    assert content["scores"]["subject"]["all"] == content["scores"]["subject"]["subj02"]
    monkeypatch.setattr(evaluate, "FEWEST_PICTURES", N_TEST + 1)
    assert run(world, **options)[0]["scores"]["subject"]["all"]["r2"]["median_95"] is None
    with pytest.raises(UserError, match="nothing to score"):
        run(world, CHALLENGE_DIR="none", SPLIT="challenge")
    activity = np.concatenate([own[N_PICTURES:] for own in world.activity])  # as NSD-Flat's test split
    monkeypatch.setattr(prepare_data, "load", lambda folder: dataclasses.replace(world.data, test_activity=activity))
    content, _ = run(world, CHALLENGE_DIR="none", SPLIT="challenge")
    assert_scores(world, content, 2, slice(N_PICTURES, None))


def test_training_pictures_are_left_out(world, capsys, monkeypatch):
    """Pictures that the checkpoint was trained on, in whoever's folder they lie, are not scored, and counted."""
    ids, path, validation = world.data.nsd_ids, world.folder / "leaky.pt", np.flatnonzero(world.split == 1)
    trained = [*ids[N_PICTURES : N_PICTURES + 4], ids[validation[0]]]
    save_checkpoint(path, world.encoder, **world.save | {"train_nsd_ids": trained})
    content, _ = run(world, CHECKPOINT=path, SPLIT="challenge")
    assert content["n_images"] == dict.fromkeys(NAMES, N_TEST - 4) and content["n_pictures"] == N_TEST - 4
    assert (
        content["n_left_out"] == dict.fromkeys(NAMES, 4)
        and "subj05, challenge test: excluded 4" in capsys.readouterr().out
    )
    assert_scores(world, content, 0, slice(N_PICTURES + 4, None))
    content, _ = run(world, CHECKPOINT=path)
    assert content["n_pictures"] == len(validation) - 1
    assert_scores(world, content, 0, validation[1:])
    save_checkpoint(path, world.encoder, **world.save | {"train_nsd_ids": [], "added": {"subj05": trained[:4]}})
    content, _ = run(world, CHECKPOINT=path, SPLIT="challenge")
    assert content["n_images"] == dict(subj01=N_TEST, subj02=N_TEST, subj05=N_TEST - 4)
    for splits, n in (("authors", 0), ("pictures", (world.split == 0).sum())):  # the authors' leaks are the report's
        data = dataclasses.replace(world.data, splits=splits)
        info = {"made_with": {"data_fingerprint": data.fingerprint}, "added": {}} | world.save
        assert len(evaluate.trained_pictures([info], data, "val", "subj01")) == n


def test_an_added_person_is_scored_on_all_held_out_pictures(world, capsys):
    """Nothing was chosen on them. Their data have other people and vertices than the checkpoint, and no ROIs."""
    path, own = world.folder / "adapted.pt", world.folder / "own"
    save_checkpoint(path, world.encoder, **world.save | {"added": {"subj02": []}})
    keep = np.flatnonzero(world.space.mask[1].numpy())[::2]
    n_lh, mask = int((keep < world.space.n_lh).sum()), torch.ones(1, len(keep), dtype=torch.bool)
    space = Space(["subj02"], world.space.vertices[keep], n_lh, mask, {})
    samples = {"subject": [0] * N_PICTURES, "image": np.arange(N_PICTURES), "split": world.split}
    samples |= {"test_subject": np.zeros(0, int), "test_image": np.zeros(0, int)}
    prepare_data.write_prepared(
        own, space=space, samples=samples, nsd_ids=world.data.nsd_ids[:N_PICTURES], n_training_images=N_PICTURES,
        activity=[world.activity[1][:N_PICTURES, keep]], images=world.data.images[:N_PICTURES], splits="pictures",
        made_with={},
    )  # fmt: skip
    content, folder = run(world, DATA_DIR=own, CHECKPOINT=path, CHALLENGE_DIR="none", FIGURES=True)
    held_out = np.flatnonzero(world.split)
    assert content["n_images"] == {"subj02": len(held_out)} and content["to_report"]["scores"] == content["scores"]
    expected = np.median(r2_of(world, 1, held_out, world.signal[1])[keep])
    assert content["scores"]["subject"]["subj02"]["r2"]["median"] == pytest.approx(expected, abs=1e-3)
    out, text = capsys.readouterr().out, (folder / "report.html").read_text()
    assert "optimistic" not in out + text and "By ROI" not in text and "subj01" not in text.split("Provenance")[0]
    drawn = {"2a_pooling_maps", "2b_components", "4a_r2_maps", "4b_samples"}
    assert {path.stem.removeprefix("figure_") for path in folder.glob("*.png")} == drawn


def test_synthetic_pictures_beside_the_private_test(world, tmp_path, capsys):
    """NSD-synthetic's folder brings its own pictures; its noise ceilings are not those of the private test."""
    for s, name in enumerate(NAMES):
        folder = tmp_path / name / "test_split"
        (folder / "test_images").mkdir(parents=True)
        (tmp_path / name / "prepare_synthetic.json").touch()
        for i in range(12):
            path = folder / f"test_images/test-{i + 1:04d}_nsd-{73000 + i:05d}.png"
            Image.fromarray(world.data.images[i]).save(path, compress_level=1)
        save_sides(folder / "test_fmri", "test_fmri", world.activity[s][:12], world.space, s)
        save_sides(folder / "noise_ceiling", "noise_ceiling", world.ceilings[s], world.space, s)
    options = dict(SPLIT="challenge", CHALLENGE_DIR=tmp_path)
    content, _ = run(world, **options)
    out, [test] = capsys.readouterr().out, content["others"]
    assert content["split"] == "synthetic" and content["n_pictures"] == 12 and test["split"] == "test"
    assert re.findall("^ *(NSD-synthetic|private test)", out, re.M) == ["NSD-synthetic"] * 9 + ["private test"] * 8
    for s in range(3):
        assert_scores(world, content, s, slice(0, 12))
        assert_scores(world, test, s, np.flatnonzero(world.split == 2))
    assert "challenge" in content["scores"]["subject"]["all"] and "challenge" not in test["scores"]["subject"]["all"]
    for path in tmp_path.glob("*/prepare_synthetic.json"):
        path.unlink()
    with pytest.raises(UserError, match="are not the test pictures"):
        run(world, **options)


def test_noise_ceilings(world, tmp_path):
    """Fractions or percent; a little above 100 is rounding; anything else is refused."""
    folder, present = tmp_path / "subj01/test_split/noise_ceiling", world.space.mask[0].numpy()
    ceiling = world.ceilings[0] / world.ceilings[0, present].max()  # at most 1
    for factor in (1, 100, 100.0001):
        save_sides(folder, "noise_ceiling", factor * ceiling, world.space, 0)
        ceilings = evaluate.read_ceilings(tmp_path, world.space)
        np.testing.assert_allclose(ceilings[0, present], ceiling[present], rtol=1e-5)
        assert ceilings[0, present].max() == 1 and np.isnan(ceilings[1:]).all()
    for values in (110 * ceiling, ceiling - 0.1):
        save_sides(folder, "noise_ceiling", values, world.space, 0)
        with pytest.raises(UserError, match="expected 0 to 1"):
            evaluate.read_ceilings(tmp_path, world.space)


def test_numbers_that_are_not_finite_are_never_scored(world, tmp_path):
    head = build_encoder(world.space)
    head.head.embed_weight.data[: world.space.n_lh] = torch.nan  # the other half would score well
    save_checkpoint(tmp_path / "broken.pt", head, **world.save)
    with pytest.raises(UserError, match="finite"):
        run(world, CHECKPOINT=tmp_path / "broken.pt")
    values = world.activity[1][N_PICTURES:].copy()
    values[3, -1] = np.inf
    save_sides(tmp_path / "subj02/test_split/test_fmri", "test_fmri", values, world.space, 1)
    with pytest.raises(UserError, match="finite"):
        run(world, SPLIT="challenge", CHALLENGE_DIR=tmp_path)


def test_submissions_and_averages(world, evaluation, monkeypatch):
    """Both score as their checkpoint; of a submission, pictures that could be trained on are left out."""
    submission = world.folder / "submission"
    for s, name in enumerate(NAMES):
        save_sides(submission / name, "pred_test", world.signal[s][N_PICTURES:], world.space, s)
    content, _ = run(world, SUBMISSION=submission)
    assert list(content["scores"]) == ["subject", "noise ceiling"]
    average = world.folder / "evaluation_average_of_4_challenge"
    run_stage(
        evaluate, CHECKPOINT=",".join([str(world.folder / "head.pt")] * 4), DATA_DIR=world.folder / "data",
        CHALLENGE_DIR=world.folder / "challenge", SPLIT="challenge", RESAMPLES=0, DEVICE="cpu", FIGURES=False,
    )  # fmt: skip
    averaged = json.loads((average / "scores.json").read_text())["scores"]["subject"]
    for name, metric in itertools.product(["all", *NAMES], ["r2", "r", "challenge"]):
        expected = evaluation.content["scores"]["subject"][name][metric]
        for numbers in (content["scores"]["subject"][name][metric], averaged[name][metric]):
            assert numbers["median"] == pytest.approx(expected["median"], abs=1e-4)
    assert averaged["all"]["r2"]["median_95"] is None
    test_image = world.data.test_image.copy()
    test_image[:2] = np.flatnonzero(world.split == 0)[:2]  # of subj01
    data = dataclasses.replace(world.data, test_image=test_image)
    monkeypatch.setattr(prepare_data, "load", lambda folder: data)
    for source in ({"SUBMISSION": submission}, {"SPLIT": "challenge"}):
        content, _ = run(world, **source)
        assert content["n_left_out"] == dict(subj01=2, subj02=0, subj05=0)
        assert_scores(world, content, 1, slice(N_PICTURES, None))
        numbers, has = content["scores"]["subject"]["subj01"]["r2"], world.space.mask[0].numpy()
        pair = (torch.tensor(values[0][N_PICTURES + 2 :, has]) for values in (world.activity, world.signal))
        weights = evaluate.draw_pictures(N_TEST, 60, 0)[:, 2:]  # the others' resamples
        resampled = evaluate.resampled_scores(*pair, weights, world.ceilings[0, has])["r2"]
        expected = evaluate.interval(numbers["median"], np.median(resampled, 1))
        np.testing.assert_allclose(numbers["median_95"], expected, atol=1e-3)
    with pytest.raises(UserError, match="pred_test.npy is missing"):
        run(world, SUBMISSION=world.folder)


def test_an_evaluation_is_replaced_whole(world):
    """Nothing stale remains, and a folder that this tool did not write is refused."""
    _, folder = run(world, RESAMPLES=0)
    (folder / "figure_old.png").touch()
    with pytest.raises(UserError, match="not empty"):
        run(world, OUTPUT_DIR=folder)
    run(world, OUTPUT_DIR=folder, RESAMPLES=0, OVERWRITE=True)
    assert {path.name for path in folder.iterdir()} == {"scores.json", "scores.csv", "vertices.npz"}
    with pytest.raises(UserError, match="did not write"):
        run(world, OUTPUT_DIR=world.folder / "challenge", OVERWRITE=True)
    assert (world.folder / "challenge/subj01/test_split").exists()


# ---- figures and page ----------------------------------------------------------------------------


def assert_shown(world, collections, expected):
    """A map drawn by draw() holds these values (n_vertices,), NaN where nothing is drawn."""
    flat = flatmap.FlatMap(world.space)
    shown, has = np.ma.filled(collections[1].get_array(), np.nan), flat.column >= 0
    np.testing.assert_allclose(shown[has], expected[flat.column[has]], rtol=1e-3, atol=1e-3)
    assert has.sum() > 0.9 * world.space.n_vertices and np.isnan(shown[~has]).all()


def test_maps_show_the_scores(world, evaluation):
    """Figure 4a: median of the subjects, group, every subject; titles agree with their maps and the table."""
    vertices = evaluation.vertices
    for metric, name, average in (("r2", "r2", np.nanmedian), ("challenge", "noise_normalised", np.nanmean)):
        panels, note = evaluation.drawn[f"figure_4a_{name}_maps.png"]
        own, group = vertices[f"subject_{metric}"], vertices[f"group_{metric}"]
        expected = {"median of the subjects": np.nanmedian(own, 0), "group prediction": np.nanmedian(group, 0)}
        expected |= dict(zip(NAMES, own))
        for (title, collections), (name, values) in zip(panels, expected.items()):
            assert title == f"{name}: {average(values):.3f}"
            assert_shown(world, collections, values)
        for s, subject in enumerate(NAMES):
            numbers = evaluation.content["scores"]["subject"][subject][metric]
            assert panels[2 + s][0].endswith(f"{numbers['median' if metric == 'r2' else 'mean']:.3f}")
        assert note.startswith("outlined: streams")


def test_samples_from_best_to_worst(world, evaluation):
    """Figure 4b: of the first subject, with nsd ids, measured beside predicted."""
    has, rows = world.space.mask[0].numpy(), np.arange(N_PICTURES, N_PICTURES + N_TEST)
    r2 = r2_score(world.activity[0][rows][:, has].T, world.signal[0][rows][:, has].T, multioutput="raw_values")
    order, panels = np.argsort(-r2)[[0, 14]], evaluation.drawn["figure_4b_samples.png"][0]
    for i, (picture, measured, predicted) in zip(order, np.array(panels[:6], object).reshape(2, 3, 2)):
        assert picture[0] == f"nsd-{world.data.nsd_ids[rows[i]]:05d}, R² {r2[i]:z.2f}"
        for (_, collections), values in ((measured, world.activity[0]), (predicted, world.signal[0])):
            assert_shown(world, collections, np.where(has, values[rows[i]], np.nan))
        assert (measured[0], predicted[0]) == ("measured", "predicted")


def test_flat_maps(world):
    """Vertices lie where the flat mesh has them, hemispheres do not mix, outlines are the subject's own."""
    flat, space = flatmap.FlatMap(world.space), world.space
    files = datasets.fetch_surf_fsaverage("fsaverage5")
    left = surface.load_surf_mesh(files["flat_left"]).coordinates[:, :2]
    own = flat.left & (flat.column >= 0)
    place = left[space.vertices.numpy()[flat.column[own]]]
    assert np.ptp(place - flat.points[own], axis=0).max() < 1e-4  # moved as a whole
    is_left = flat.column < space.n_lh
    assert np.array_equal(flat.left[flat.column >= 0], is_left[flat.column >= 0])
    assert flat.points[own, 0].max() < 0 < flat.points[~flat.left, 0].min()
    in_left = flat.left[flat.faces]
    assert np.array_equal(in_left.any(1), in_left.all(1)) and np.array_equal(np.unique(flat.faces), range(len(own)))
    for s in range(3):
        outlines, labels = flat.outlines("streams", s), space.rois["streams"]["labels"][s].numpy()
        for label, name in ((1, "early"), (5, "ventral")):
            inside = outlines["streams", name]
            assert np.array_equal(inside[flat.column >= 0], (labels == label)[flat.column[flat.column >= 0]])
    assert flat.outlines("", 0) == {} == flat.outlines("floc-faces", 0)


def test_maps_of_pixels():
    """NSD-Flat's pixels, row by row from the top left, upright."""
    row, column = np.divmod(np.arange(215 * 200), 200)
    pixels = np.flatnonzero((abs(row - 100) < 20) & (abs(column - 100) < 60))
    pixels = pixels[np.argsort(pixels % 200 >= 100, kind="stable")]
    mask = torch.ones(1, len(pixels), dtype=torch.bool)
    flat = flatmap.FlatMap(Space(["a"], torch.tensor(pixels), len(pixels) // 2, mask, {}, "pixels"))
    inside = flat.column >= 0
    order = pixels[flat.column[inside]]
    np.testing.assert_array_equal(flat.points[inside], np.stack([order % 200 - 99.5, -(order // 200)], 1))
    assert inside.sum() == len(pixels) and np.array_equal(flat.left[inside], order % 200 < 100)
    assert np.ptp(flat.points[flat.faces], axis=1).max() == 1 and len(flat.faces) == 2 * 214 * 199


def test_colour_scales():
    values = np.concatenate([np.linspace(-1, 1, 99), [40, np.nan]])
    assert flatmap.fit_limits([values]) == (-1.4, 1.4)  # NaN, zeros and the outlier do not count
    assert flatmap.fit_limits([values / 50], symmetric=False) == (0, 0.42)
    assert flatmap.fit_limits([np.full(3, np.nan)]) == (-1, 1)


def test_pooling_maps(world):
    """Figure 2a: without the class token, signed by the strongest part, in the picture's layout."""
    encoder = build_encoder(world.space)
    rows, columns = encoder.trunk.grid
    maps = torch.zeros(8, rows, columns)
    maps[:4, : rows // 2], maps[4:7, :, : columns // 2], maps[7:, 0, -1] = 1, 0.1, -5
    for projection in encoder.head.projections:
        prefix = torch.full((8, encoder.trunk.n_prefix), 99.0)
        projection.spatial.data[:] = torch.cat([prefix, maps.flatten(1)], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "N_POOLING_MAPS", 3)
        means, shares = figures.pooling_exemplars(encoder, 0)
    np.testing.assert_allclose(shares, [4 / 8, 3 / 8, 1 / 8])
    expected = np.zeros((3, rows, columns))
    expected[0, : rows // 2], expected[1, :, : columns // 2], expected[2, 0, -1] = 1, 1, 1
    np.testing.assert_allclose(means, expected, atol=1e-6)


def test_loss_curves(world, evaluation):
    """Figure 3: as training draws it; phase 1 only of the head that phase 2 started from."""
    head = world.folder / "train_head.png"
    assert (evaluation.folder / "figure_3_train_head.png").read_bytes() == head.read_bytes()
    fingerprint, phase_2 = world.predictor.info[0]["fingerprint"], world.folder / "finetune.png"
    phase_2.touch()
    for before, expected in ((fingerprint, [phase_2, head]), ("another", [phase_2])):
        assert figures.loss_curves(world.folder / "finetuned.pt", {"head_fingerprint": before}) == expected


def test_one_subject_has_no_map_twice(world):
    maps = {(name, "r2"): np.full((3, 5), np.nan) for name in ("subject", "group")}
    for values in maps.values():
        values[1] = np.arange(5)
    assert list(figures.score_maps(maps, "r2", NAMES)) == ["group prediction", "subj02"]
    assert figures.score_maps(maps, "challenge", NAMES) == {}


def test_the_page(world, evaluation):
    """One file without network; its tables hold the scores, its cortex the maps."""
    text, tables = (evaluation.folder / "report.html").read_text(), []
    for table in re.findall("<table.*?</table>", text, re.DOTALL):
        rows = [re.findall("<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", table, re.DOTALL)]
        tables.append(pd.DataFrame(rows[1:], columns=rows[0]))
    headlines, *rois = tables
    for title, metric, value in (("median R²", "r2", "median"), ("challenge score", "challenge", "mean")):
        numbers = evaluation.content["scores"]["subject"]["all"][metric]
        low, high = numbers[f"{value}_95"]
        assert headlines[title][0] == f"{numbers[value]:.4f} ({low:.4f} to {high:.4f})"
    assert list(headlines.prediction) == ["subject"] * 4 + ["group"] * 4 + ["noise ceiling"]
    table = evaluation.table.query("prediction == 'subject' and metric == 'r2' and hemisphere == 'rh'")
    for subject, roi in zip(["all", *NAMES], rois, strict=True):
        assert list(roi["subject R² rh"]) == [f"{score:.3f}" for score in table[table.subject == subject].score]
    assert 'src="http' not in text and "<link" not in text and text.count("<img alt=") == 7
    assert "The number to report: median R²" in text and "width=device-width" in text and "optimistic" not in text
    pattern = r'Plotly.newPlot\(\s*"[^"]*",\s*(\[.*?\]),\s*(\{"scene".*?\}),\s*\{"responsive"'
    [mesh], layout = map(json.loads, re.search(pattern, text, re.DOTALL).groups())
    button = layout["updatemenus"][0]["buttons"][3]
    name, top = button["label"].split(": R², 0 to ")
    assert name == "subj02" and len(layout["updatemenus"][0]["buttons"]) == 2 * 5
    surface, n = np.full(2 * 10242, np.nan), world.space.n_lh
    surface[world.space.vertices[:n]] = evaluation.vertices["subject_r2"][1][:n]
    surface[10242 + world.space.vertices[n:]] = evaluation.vertices["subject_r2"][1][n:]
    expected = 100 * surface[np.stack([mesh[key] for key in "ijk"], 1)].mean(1) / float(top)
    assert np.max(mesh["x"][:10242]) < 0 < np.min(mesh["x"][10242:]) and len(np.unique(mesh["i"] + mesh["j"])) == 20484
    codes, shown = np.array(button["args"][0]["intensity"][0]), np.isfinite(expected)
    assert shown.sum() > n and (codes[~shown] < 0).all()
    np.testing.assert_allclose(codes[shown], np.clip(expected[shown], 0, 100), atol=1)
