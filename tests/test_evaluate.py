"""Scores, tables, intervals, maps and the page of tools/evaluate.py, against scikit-learn, scipy and plain loops."""

import json
import re
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
from tools import evaluate, figures, flatmap, page

N_PICTURES, N_TEST = 60, 15
NAMES = ["subj01", "subj02", "subj05"]
STREAMS = {0: "Unknown", 1: "early", 5: "ventral", 7: "parietal"}


def build_space():
    """The back of fsaverage5; subj02 lacks its lowest vertices, and everybody has other areas."""
    files = datasets.fetch_surf_fsaverage("fsaverage5")
    places = [surface.load_surf_mesh(files[f"infl_{half}"]).coordinates for half in ("left", "right")]
    chosen = [np.flatnonzero(place[:, 1] < -65) for place in places]
    where = np.concatenate([place[own] for place, own in zip(places, chosen)])
    mask = np.ones((3, len(where)), bool)
    mask[1] = where[:, 2] > -35
    labels = np.stack([np.select([where[:, 2] < s - 10, where[:, 2] < 10], [1, 5], 7) for s in (0, 5, 10)])
    labels[:, where[:, 1] > -70] = 0
    quarters = np.where(where[:, 2] < 0, 1, 2) * np.ones((3, 1), int)
    rois = {"streams": {"names": STREAMS, "labels": torch.tensor(labels * mask).short()}}
    names = {0: "Unknown", 1: "V1v", 2: "V1d"}
    rois["prf-visualrois"] = {"names": names, "labels": torch.tensor(quarters * mask).short()}
    return Space(NAMES, torch.tensor(np.concatenate(chosen)), len(chosen[0]), torch.tensor(mask), rois)


def build_encoder(space, seed=0):
    torch.manual_seed(seed)
    trunk = Trunk("test_vit", "0,2", image_size=64, pretrained=False, seed=1)
    head = Head(trunk.feature_shapes, 8, 6, len(space.subjects), space.n_vertices)
    with torch.no_grad():
        for projection in head.projections:
            projection.norm.running_var.fill_(1e-3)
        head.shared.mul_(6)
        head.embed_weight[:] = torch.linalg.qr(torch.randn(space.n_vertices, 6))[0] * space.n_vertices**0.5
    return Encoder(trunk, head).eval()


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
    activity = [np.where(space.mask[s], y + rng.normal(0, 8, y.shape), 0).astype(np.float32) for s, y in enumerate(signal)]
    nsd_ids = np.concatenate([np.arange(N_PICTURES) * 7 + 3, np.arange(N_TEST) * 5 + 10000])
    split = np.resize([0, 0, 1, 2, 0, 1], N_PICTURES)
    samples = {
        "subject": np.repeat([0, 1, 2], N_PICTURES), "image": np.tile(np.arange(N_PICTURES), 3), "split": np.tile(split, 3),
        "test_subject": np.repeat([0, 1, 2], N_TEST), "test_image": np.tile(np.arange(N_TEST) + N_PICTURES, 3),
    }  # fmt: skip
    prepare_data.write_prepared(
        folder / "data", space=space, samples=samples, nsd_ids=nsd_ids, n_training_images=N_PICTURES,
        activity=[y[:N_PICTURES] for y in activity], images=images, splits="pictures", made_with={},
    )  # fmt: skip
    ceilings = rng.uniform(0, 0.9, space.mask.shape)
    ceilings[:, :4] = 0
    for s, name in enumerate(NAMES):
        for part, kind, values in (("test_fmri", "test_fmri", activity[s][N_PICTURES:]), ("noise_ceiling",) * 2 + (ceilings[s] * 100,)):
            (folder / f"challenge/{name}/test_split/{part}").mkdir(parents=True)
            for hemi in HEMIS:
                np.save(folder / f"challenge/{name}/test_split/{part}/{hemi}_{kind}.npy", values[..., space.columns(s, hemi)])
    data = prepare_data.load(folder / "data")
    save["made_with"] = {"data_fingerprint": data.fingerprint}
    save["train_nsd_ids"] = nsd_ids[:N_PICTURES][split == 0]
    save_checkpoint(folder / "head.pt", encoder, **save)
    log = [dict(step=i, train_loss=None if not i else 1 / i, val_loss=1.0, val_r2=[-9.0, 0.1, 0.3, 0.2][i]) for i in range(4)]
    (folder / "train_head.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return SimpleNamespace(folder=folder, space=space, data=data, signal=signal, activity=activity, ceilings=ceilings,
                           predictor=predictor, latents=latents, split=split, encoder=encoder, save=save)  # fmt: skip


def run(world, **values):
    """evaluate.main() with these constants -> scores.json, its folder."""
    output = world.folder / "out" / str(len(list(world.folder.glob("out/*"))))
    folders = dict(DATA_DIR=str(world.folder / "data"), RUN_DIR=str(world.folder), OUTPUT_DIR=str(output))
    folders |= dict(CHALLENGE_DIR=str(world.folder / "challenge"), DEVICE="cpu", PRECISION="float32", RESAMPLES=60)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (folders | values).items():
            patch.setattr(evaluate, name, value)
        evaluate.main()
    output = evaluate.Path((folders | values)["OUTPUT_DIR"])
    return json.loads((output / "scores.json").read_text()), output


@pytest.fixture(scope="module")
def evaluation(world):
    """An evaluation on the challenge's pictures, with what its figures show."""
    drawn, save = {}, evaluate.save_figure

    def spy(figure, path):
        drawn[path.name] = [(axes.get_title(), [c for c in axes.collections]) for axes in figure.axes], figure.get_supxlabel()
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "save_figure", spy)
        content, folder = run(world, SPLIT="challenge", EXAMPLE_SUBJECT="subj02")
    return SimpleNamespace(content=content, folder=folder, drawn=drawn, page=(folder / "report.html").read_text())


def read_tables(path):
    """The page's tables as DataFrames of text."""
    tables = []
    for content in re.findall("<table.*?</table>", path.read_text(), re.DOTALL):
        rows = [re.findall("<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", content, re.DOTALL)]
        tables.append(pd.DataFrame(rows[1:], columns=rows[0]))
    return tables


def r2_of(world, s, rows, prediction):
    """R² by scikit-learn in float64, NaN where the subject has no vertex."""
    r2, has = np.full(world.space.n_vertices, np.nan), world.space.mask[s].numpy()
    r2[has] = r2_score(world.activity[s][rows][:, has], prediction[rows][:, has], multioutput="raw_values")
    return r2


# ---- scores --------------------------------------------------------------------------------------


def test_scores_of_every_vertex(world, evaluation):
    """vertices.npz: every subject's own predictions, the group's, and the challenge score by the percent ceilings."""
    vertices, rows = np.load(evaluation.folder / "vertices.npz"), slice(N_PICTURES, None)
    group = world.predictor.decode(world.latents, None).numpy()
    for s in range(3):
        has = world.space.mask[s].numpy()
        np.testing.assert_allclose(vertices["subject_r2"][s], r2_of(world, s, rows, world.signal[s]), atol=1e-3)
        np.testing.assert_allclose(vertices["group_r2"][s], r2_of(world, s, rows, group), atol=1e-3)
        pairs = zip(world.activity[s][rows][:, has].T, world.signal[s][rows][:, has].T)
        r = np.array([scipy.stats.pearsonr(*pair).statistic for pair in pairs])
        np.testing.assert_allclose(vertices["subject_r"][s][has], r, atol=1e-3)
        ceiling = np.where(world.ceilings[s] == 0, 1e-14, world.ceilings[s])[has]
        expected = np.minimum(np.maximum(r, 0) ** 2 / ceiling, 1)
        np.testing.assert_allclose(vertices["subject_challenge"][s][has], expected, atol=5e-3)
        np.testing.assert_allclose(vertices["noise_ceiling"][s][has], world.ceilings[s][has], rtol=1e-5)
    assert list(vertices["subjects"]) == NAMES and np.array_equal(vertices["fsaverage_index"], world.space.vertices)
    assert (vertices["hemisphere"] == "lh").sum() == world.space.n_lh


def test_tables_are_those_of_a_plain_loop(world, evaluation):
    """scores.csv, with the area labels of each subject, and the headlines of scores.json."""
    table, vertices = pd.read_csv(evaluation.folder / "scores.csv"), np.load(evaluation.folder / "vertices.npz")
    labels, left = world.space.rois["streams"]["labels"].numpy(), np.arange(world.space.n_vertices) < world.space.n_lh
    sides, members = {"both": left | True, "lh": left, "rh": ~left}, {"all": range(3)} | {n: [s] for s, n in enumerate(NAMES)}
    areas = {("all", "all"): labels > -1, ("streams", "all"): labels > 0, ("streams", "ventral"): labels == 5}
    keys = ["prediction", "metric", "subject", "hemisphere", "roi_group", "roi"]
    indexed, n_areas = table.set_index(keys).sort_index(), 2 + 3 + 4  # all, streams and three, rois, V1v, V1d, V1
    assert indexed.index.is_unique and len(table) == 2 * 3 * 4 * 3 * n_areas
    for prediction, metric in (("subject", "r2"), ("group", "r2"), ("subject", "challenge")):
        for subject, rows in members.items():
            for hemi, side in sides.items():
                for area, inside in areas.items():
                    values = vertices[f"{prediction}_{metric}"]
                    chosen = np.concatenate([values[s, inside[s] & side & world.space.mask[s].numpy()] for s in rows])
                    row = indexed.loc[(prediction, metric, subject, hemi, *area)]
                    assert row.n_vertices == len(chosen)
                    np.testing.assert_allclose([row["median"], row["mean"]], [np.median(chosen), chosen.mean()], rtol=1e-4)
                    if area == ("all", "all") and hemi == "both":
                        numbers = evaluation.content["scores"][prediction][subject][metric]
                        np.testing.assert_allclose([numbers["median"], numbers["mean"]], row[["median", "mean"]], rtol=1e-4)


def random_scores(seed=0, n_images=12, n_vertices=23):
    rng = np.random.default_rng(seed)
    y = rng.normal(0.3, 1, (n_images, n_vertices)).astype(np.float32)
    prediction = (0.4 * y + rng.normal(0.1, 0.6, y.shape)).astype(np.float32)
    y[:, 4], prediction[:, 7] = 0.5, -1  # constant
    ceiling = rng.uniform(0, 0.8, n_vertices)
    ceiling[2] = 0
    return y, prediction, ceiling


def test_resampled_scores_are_those_of_repeated_pictures():
    y, prediction, ceiling = random_scores()
    weights = evaluate.draw_pictures(15, 40, seed=1)[:, 2:14]  # three of the pictures are others'
    assert (evaluate.draw_pictures(15, 40, seed=1).sum(1) == 15).all()
    weights[-1] = 0
    scores = evaluate.resampled_scores(torch.tensor(y), torch.tensor(prediction), weights, ceiling)
    for b, times in enumerate(weights[:-1]):
        drawn = np.repeat(np.arange(12), times.int())
        a, p = y[drawn].astype(float), prediction[drawn].astype(float)
        constant = (a == a[0]).all(0) | (p == p[0]).all(0)
        r = [0 if c else scipy.stats.pearsonr(*pair).statistic for c, *pair in zip(constant, a.T, p.T)]
        expected = {"r2": r2_score(a, p, multioutput="raw_values"), "r": np.array(r)}
        expected["challenge"] = np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1)
        for metric, values in expected.items():
            np.testing.assert_allclose(scores[metric][b], values, rtol=1e-3, atol=1e-3)
    assert all(np.isnan(values[-1]).all() for values in scores.values())  # no picture says nothing
    assert "challenge" not in evaluate.resampled_scores(*map(torch.tensor, (y, prediction)), weights, ceiling * np.nan)


def test_intervals_hold_what_other_pictures_give():
    """95 % intervals of a median and of a difference: how often do they hold the mean over many sets of pictures?"""
    rng, n_images, n_vertices, has = np.random.default_rng(0), 25, 40, np.full(40, np.nan)
    gain, numbers, held = rng.uniform(0.2, 0.8, n_vertices), [], []
    for i in range(200):
        signal, shared = rng.normal(size=(2, n_images, n_vertices)) + rng.normal(size=(2, n_images, 1))
        y = torch.tensor(gain * signal + 0.7 * shared).float()
        pair = torch.tensor(gain * signal).float(), torch.tensor(0.7 * shared * gain).float()
        weights = evaluate.draw_pictures(n_images, 120, seed=i)
        a, b = (np.median(r2_score(y, p, multioutput="raw_values")) for p in pair)
        ra, rb = (np.median(evaluate.resampled_scores(y, p, weights, has)["r2"], axis=1) for p in pair)
        numbers.append([a, a - b])
        held.append([evaluate.interval(a, ra), evaluate.interval(a - b, ra - rb)])
    truth, ends = np.mean(numbers, 0), np.array(held)
    share = ((ends[..., 0] <= truth) & (truth <= ends[..., 1])).mean(0)
    assert (share > 0.88).all() and (share < 0.99).all(), share  # 25 pictures: a little too short
    assert evaluate.interval(0.5, np.array([0.0, 0.1, np.nan, 0.2])) == pytest.approx([0.405, 0.595])


def test_intervals_in_the_scores(world, evaluation):
    """The bootstrap is paired over pictures: everybody, and both predictions, see the same resamples."""
    weights = evaluate.draw_pictures(N_TEST, 60, evaluate.SEED)
    for name, i in (("subject", None), ("group", "group")):
        resampled = []
        for s in range(3):
            has = world.space.mask[s].numpy()
            prediction = world.signal[s] if i is None else world.predictor.decode(world.latents, None).numpy()
            pair = (torch.tensor(v[N_PICTURES:][:, has]).float() for v in (world.activity[s], prediction))
            resampled.append(evaluate.resampled_scores(*pair, weights, np.full(has.sum(), np.nan))["r2"])
        for subject, scores in zip(["all", *NAMES], [np.concatenate(resampled, 1), *resampled]):
            numbers = evaluation.content["scores"][name][subject]["r2"]
            expected = evaluate.interval(numbers["median"], np.median(scores, 1))
            np.testing.assert_allclose(numbers["median_95"], expected, atol=1e-4)
            assert numbers["median_95"][0] < numbers["median"] < numbers["median_95"][1]


# ---- what is scored ------------------------------------------------------------------------------


def test_validation_brings_the_private_test(world, capsys):
    """The number to report is the private test's. Few pictures get no interval; a subject without ceiling no
    challenge score. The printed tables agree with the files."""
    content, folder = run(world, FIGURES=False, CHALLENGE_DIR=str(world.folder / "none"), RESAMPLES=20)
    out = capsys.readouterr().out
    test, _ = run(world, FIGURES=False, CHALLENGE_DIR=str(world.folder / "none"), RESAMPLES=20, SPLIT="test")
    assert content["to_report"]["scores"] == test["scores"] == test["to_report"]["scores"] != content["scores"]
    for part, split in ((content, 1), (test, 2)):
        assert part["n_images"] == dict.fromkeys(NAMES, (world.split == split).sum())
        assert part["n_pictures"] == (world.split == split).sum()
    for s, name in enumerate(NAMES):
        expected = np.nanmedian(r2_of(world, s, np.flatnonzero(world.split == 2), world.signal[s]))
        assert test["scores"]["subject"][name]["r2"]["median"] == pytest.approx(expected, abs=1e-3)
        assert "challenge" not in test["scores"]["subject"][name]
    assert content["scores"]["subject"]["all"]["r2"]["median_95"] and test["scores"]["subject"]["all"]["r2"]["median_95"]
    number = test["scores"]["subject"]["all"]["r2"]
    low, high = number["median_95"]
    assert f"the number to report: median R² {number['median']:.4f} ({low:.4f} to {high:.4f})" in out
    assert "private test, 10 pictures per subject, 10 unique" in out and "scores are optimistic" in out
    table = pd.read_csv(folder / "scores.csv").query("prediction == 'subject' and subject == 'all' and metric == 'r2'")
    [printed] = [line.split() for line in out.splitlines() if line.startswith("ventral")]
    [line] = [line.split() for line in out.splitlines() if line.startswith("hemisphere")]
    for hemi, text in zip(line[1:], printed[1:], strict=True):
        [median] = table[(table.roi == "ventral") & (table.hemisphere == hemi)]["median"]
        assert text == f"{median:.4f}"


def test_counts_are_of_what_is_scored(world, capsys, monkeypatch):
    """One subject has activity: pictures and intervals are theirs. Too few pictures give no interval."""
    some = world.folder / "some"
    (some / "subj02").mkdir(parents=True)
    (some / "subj02/test_split").symlink_to(world.folder / "challenge/subj02/test_split")
    content, _ = run(world, FIGURES=False, CHALLENGE_DIR=str(some), SPLIT="challenge")
    assert content["n_images"] == {"subj01": 0, "subj02": N_TEST, "subj05": 0} and content["n_pictures"] == N_TEST
    assert content["scores"]["subject"]["subj01"]["r2"] == dict(median=None, mean=None, median_95=None, mean_95=None)
    assert content["scores"]["subject"]["all"]["r2"] == content["scores"]["subject"]["subj02"]["r2"]
    monkeypatch.setattr(evaluate, "FEWEST_PICTURES", N_TEST + 1)
    content, _ = run(world, FIGURES=False, CHALLENGE_DIR=str(some), SPLIT="challenge")
    assert content["scores"]["subject"]["all"]["r2"]["median_95"] is None
    with pytest.raises(UserError, match="nothing to score"):
        run(world, FIGURES=False, CHALLENGE_DIR=str(world.folder / "none"), SPLIT="challenge")


def test_training_pictures_are_left_out(world, capsys):
    """Pictures that the checkpoint was trained on, in whoever's folder they lie, are not scored, and counted."""
    trained = [*world.data.nsd_ids[N_PICTURES : N_PICTURES + 4], world.data.nsd_ids[np.flatnonzero(world.split == 1)[0]]]
    path = world.folder / "leaky.pt"
    save_checkpoint(path, world.encoder, **world.save | {"train_nsd_ids": trained})
    content, _ = run(world, FIGURES=False, CHECKPOINT=str(path), SPLIT="challenge")
    assert content["n_images"] == dict.fromkeys(NAMES, N_TEST - 4) and content["n_pictures"] == N_TEST - 4
    assert "left out 12 samples" in capsys.readouterr().out
    expected = np.nanmedian(r2_of(world, 0, slice(N_PICTURES + 4, None), world.signal[0]))
    assert content["scores"]["subject"]["subj01"]["r2"]["median"] == pytest.approx(expected, abs=1e-3)
    content, _ = run(world, FIGURES=False, CHECKPOINT=str(path))
    assert content["n_pictures"] == (world.split == 1).sum() - 1
    save_checkpoint(path, world.encoder, **world.save | {"train_nsd_ids": [], "added": {"subj05": trained[:4]}})
    content, _ = run(world, FIGURES=False, CHECKPOINT=str(path), SPLIT="challenge")
    assert content["n_images"] == dict(subj01=N_TEST, subj02=N_TEST, subj05=N_TEST - 4)


def test_an_added_person_is_scored_on_all_held_out_pictures(world, capsys):
    """Nothing was chosen on them. Their data name other people and vertices than the checkpoint."""
    path, own = world.folder / "adapted.pt", world.folder / "own"
    save_checkpoint(path, world.encoder, **world.save | {"added": {"subj02": []}})
    keep = np.flatnonzero(world.space.mask[1].numpy())[::2]
    space = Space(
        ["subj02"], world.space.vertices[keep], int((keep < world.space.n_lh).sum()), torch.ones(1, len(keep)) > 0, {}
    )  # fmt: skip
    samples = {"subject": [0] * N_PICTURES, "image": np.arange(N_PICTURES), "split": world.split}
    samples |= {"test_subject": np.zeros(0, int), "test_image": np.zeros(0, int)}
    prepare_data.write_prepared(
        own, space=space, samples=samples, nsd_ids=world.data.nsd_ids[:N_PICTURES], n_training_images=N_PICTURES,
        activity=[world.activity[1][:N_PICTURES, keep]], images=world.data.images[:N_PICTURES], splits="pictures",
        made_with={},
    )  # fmt: skip
    content, folder = run(world, DATA_DIR=str(own), CHECKPOINT=str(path), CHALLENGE_DIR="none")
    held_out = np.flatnonzero(world.split)
    assert content["n_images"] == {"subj02": len(held_out)} and content["to_report"]["scores"] == content["scores"]
    expected = np.median(r2_of(world, 1, held_out, world.signal[1])[keep])
    assert content["scores"]["subject"]["subj02"]["r2"]["median"] == pytest.approx(expected, abs=1e-3)
    out, text = capsys.readouterr().out, (folder / "report.html").read_text()
    assert "optimistic" not in out + text and "By ROI" not in text and "Every subject" not in text
    assert "subj01" not in text.split("What made this")[0] and not (folder / "figure_4c_rois.png").exists()


def test_pictures_out_of_distribution(world):
    """Held-out activity of pictures that the prepared data lack, beside the private test, in one table."""
    outside = world.folder / "synthetic"
    for s, name in enumerate(NAMES):
        for part in ("test_images", "test_fmri"):
            (outside / name / "test_split" / part).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(world.data.images[i])
            picture.save(outside / name / f"test_split/test_images/test-{i + 1:04d}_nsd-{73000 + i:05d}.png")
        for hemi in HEMIS:
            values = world.activity[s][:12, world.space.columns(s, hemi)]
            np.save(outside / name / f"test_split/test_fmri/{hemi}_test_fmri.npy", values)
    content, folder = run(world, SPLIT="challenge", CHALLENGE_DIR=str(outside))
    assert content["split"] == "outside" and content["n_pictures"] == 12
    for s, name in enumerate(NAMES):
        expected = np.nanmedian(r2_of(world, s, slice(0, 12), world.signal[s]))
        assert content["scores"]["subject"][name]["r2"]["median"] == pytest.approx(expected, abs=2e-3)
    [headlines, *_] = read_tables(folder / "report.html")
    assert list(headlines.split) == ["out of distribution"] * 2 + ["private test"] * 2


def test_numbers_that_are_not_finite_are_never_scored(world):
    head = build_encoder(world.space)
    head.head.embed_weight.data[: world.space.n_lh] = torch.nan  # the other half would score well
    save_checkpoint(world.folder / "broken.pt", head, **world.save)
    with pytest.raises(UserError, match="finite"):
        run(world, CHECKPOINT=str(world.folder / "broken.pt"), FIGURES=False)
    path = world.folder / "challenge/subj02/test_split/test_fmri/rh_test_fmri.npy"
    values = np.load(path)
    try:
        np.save(path, np.where(values == values.max(), np.inf, values))
        with pytest.raises(UserError, match="expected finite"):
            run(world, SPLIT="challenge", FIGURES=False)
    finally:
        np.save(path, values)


def test_submissions_and_folders(world, evaluation):
    """A submission scores as its checkpoint. An evaluation is replaced whole and on demand, other folders never."""
    submission = world.folder / "submission"
    for s, name in enumerate(NAMES):
        (submission / name).mkdir(parents=True)
        for hemi in HEMIS:
            values = world.signal[s][N_PICTURES:, world.space.columns(s, hemi)]
            np.save(submission / name / f"{hemi}_pred_test.npy", values)
    content, folder = run(world, SUBMISSION=str(submission), FIGURES=False)
    assert list(content["scores"]) == ["subject"]
    for name, numbers in evaluation.content["scores"]["subject"].items():
        for metric, found in content["scores"]["subject"][name].items():
            assert found["median"] == pytest.approx(numbers[metric]["median"], abs=1e-4)
    (folder / "figure_old.png").touch()
    with pytest.raises(UserError, match="not empty"):
        run(world, SUBMISSION=str(submission), OUTPUT_DIR=str(folder), FIGURES=False)
    run(world, SUBMISSION=str(submission), OUTPUT_DIR=str(folder), FIGURES=False, OVERWRITE=True)
    assert {path.name for path in folder.iterdir()} == {"scores.json", "scores.csv", "vertices.npz"}
    with pytest.raises(UserError, match="did not write"):
        run(world, OUTPUT_DIR=str(world.folder / "challenge"), FIGURES=False, OVERWRITE=True)
    assert (world.folder / "challenge/subj01").exists()


# ---- figures and page ----------------------------------------------------------------------------


def assert_shown(world, collections, expected):
    """A map drawn by draw() holds these values (n_vertices,), NaN where nothing is drawn."""
    flat = flatmap.FlatMap(world.space)
    shown, has = np.ma.filled(collections[1].get_array(), np.nan), flat.column >= 0
    np.testing.assert_allclose(shown[has], expected[flat.column[has]], rtol=1e-3, atol=1e-3)
    assert has.sum() > 0.9 * world.space.n_vertices and np.isnan(shown[~has]).all()


def test_maps_show_the_scores(world, evaluation):
    """Figure 4a: median of the subjects, group, every subject; titles agree with their maps and the table."""
    vertices = np.load(evaluation.folder / "vertices.npz")
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
    """Figure 4b: of subj02, with nsd ids, measured beside predicted."""
    has, rows = world.space.mask[1].numpy(), np.arange(N_PICTURES, N_PICTURES + N_TEST)
    r2 = r2_score(world.activity[1][rows][:, has].T, world.signal[1][rows][:, has].T, multioutput="raw_values")
    order, panels = np.argsort(-r2)[[0, 3, 6, 8, 11, 14]], evaluation.drawn["figure_4b_samples.png"][0]
    for i, (picture, measured, predicted) in zip(order, np.array(panels[:18], object).reshape(6, 3, 2)):
        assert picture[0] == f"nsd-{world.data.nsd_ids[rows[i]]:05d}, R² {r2[i]:.2f}"
        for (title, collections), values in ((measured, world.activity[1]), (predicted, world.signal[1])):
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
    assert (flat.column[own] < space.n_lh).all() and (flat.column[~flat.left] >= space.n_lh)[flat.column[~flat.left] >= 0].all()
    assert flat.points[own, 0].max() < 0 < flat.points[~flat.left, 0].min()
    for s in range(3):
        outlines, labels = flat.outlines("streams", s), space.rois["streams"]["labels"][s].numpy()
        for label, name in ((1, "early"), (5, "ventral")):
            inside = outlines["streams", name]
            assert np.array_equal(inside[flat.column >= 0], (labels == label)[flat.column[flat.column >= 0]])
            for x, y in flat.widest_places(inside):
                nearest = np.linalg.norm(flat.points - [x, y], axis=1).argmin()
                assert inside[nearest]
    assert flat.outlines("", 0) == {} == flat.outlines("floc-faces", 0)
    with pytest.raises(UserError, match="expected one of streams"):
        flat.outlines("stream")
    figure, axes = plt.subplots()
    values = np.where(np.arange(space.n_vertices) % 5, np.nan, 1.0)  # isolated vertices: no complete triangle
    shown = flat.draw(axes, values, (0, 1), "inferno", {})
    flatmap.describe_maps(figure, [shown], [axes], "R²", {})
    figure.canvas.draw()
    plt.close(figure)


def test_maps_of_pixels():
    """NSD-Flat's pixels, row by row from the top left, upright."""
    row, column = np.divmod(np.arange(215 * 200), 200)
    pixels = np.flatnonzero((abs(row - 100) < 20) & (abs(column - 100) < 60))
    pixels = np.concatenate([pixels[pixels % 200 < 100], pixels[pixels % 200 >= 100]])
    space = Space(["a"], torch.tensor(pixels), int((pixels % 200 < 100).sum()), torch.ones(1, len(pixels)) > 0, {}, "pixels")
    flat = flatmap.FlatMap(space)
    inside = flat.column >= 0
    x, y = flat.points[inside].T
    order = pixels[flat.column[inside]]
    assert np.ptp(x - order % 200) == 0 and np.ptp(y + order // 200) == 0 and inside.sum() == len(pixels)
    assert np.array_equal(flat.left[inside], order % 200 < 100)


def test_scales_and_notes(world):
    values = np.concatenate([np.linspace(-1, 1, 99), [40]])
    assert flatmap.fit_limits([values]) == (-1.5, 1.5) and flatmap.fit_limits([values / 50], symmetric=False) == (0, 0.03)
    assert flatmap.fit_limits([np.full(3, np.nan)]) == (-1, 1)
    flat, (figure, axes) = flatmap.FlatMap(world.space), plt.subplots()
    values = np.where(np.arange(world.space.n_vertices) % 10 == 0, -1, 0.5)
    shown = flat.draw(axes, values, (0, 1), "inferno", flat.outlines("streams"))
    flatmap.describe_maps(figure, [shown], [axes], "R²", flat.outlines("streams"))
    note = " ".join(figure.get_supxlabel().split())
    share = 100 * (flat.on_points(values) < 0).sum() / (flat.column >= 0).sum()
    assert note == f"outlined: streams; clipped: {share:.1f} % below 0"
    plt.close(figure)


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
    """Figure 3: without step 0; phase 1 only of the head that phase 2 started from."""
    [(title, lines)] = figures.training_curves(world.folder / "head.pt", {})
    assert title.startswith("phase 1") and lines["r2"] == ([1, 2, 3], [0.1, 0.3, 0.2])
    (world.folder / "finetune.jsonl").write_text(json.dumps(dict(step=0, train_loss=None, val_loss=1.0, val_r2=0.3)))
    fingerprint = world.predictor.info[0]["fingerprint"]
    for head, n in ((fingerprint, 2), ("another", 1)):
        phases = figures.training_curves(world.folder / "finetuned.pt", {"head_fingerprint": head})
        assert len(phases) == n and phases[-1][1]["r2"] == ([0], [0.3])
    assert "figure_3_loss_curves.png" in evaluation.drawn


def test_the_page(world, evaluation):
    """One file; its tables hold the scores, its cortex their colours, and the report's numbers are not beside others'."""
    headlines, every, *rois = read_tables(evaluation.folder / "report.html")
    numbers = evaluation.content["scores"]["subject"]["all"]
    assert headlines["median R²"][0] == evaluate.show(numbers["r2"], "median")
    assert headlines["challenge score"][0] == evaluate.show(numbers["challenge"], "mean")
    assert list(headlines.split) == ["challenge test", "challenge test", "noise ceiling of R²"] and len(every) == 6
    table = pd.read_csv(evaluation.folder / "scores.csv").query("prediction == 'subject' and metric == 'r2'")
    for subject, area in zip(["all", *NAMES], rois, strict=True):
        own = table[(table.subject == subject) & (table.hemisphere == "rh")]
        assert list(area["median R² rh"]) == [f"{median:.3f}" for median in own["median"]]
    assert 'src="http' not in evaluation.page and evaluation.page.count("<img alt=") == 7
    assert "divided by the noise ceiling" in evaluation.page and "width=device-width" in evaluation.page
    values = page.surface_values(np.load(evaluation.folder / "vertices.npz")["subject_r2"][1], world.space)
    for column in (0, world.space.n_lh - 1, world.space.n_lh, world.space.n_vertices - 1):
        place = world.space.vertices[column] + page.N_FSAVERAGE5 * (column >= world.space.n_lh)
        assert np.isnan(values[place]) == ~world.space.mask[1][column].numpy()
    assert np.isfinite(values).sum() == world.space.mask[1].sum() and "subj05: noise-normalised score" in evaluation.page
