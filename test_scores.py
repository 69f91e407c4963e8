"""Scores, their tables and their intervals: against scikit-learn, scipy and plain loops."""

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch

import scores
from model import Space
from shared_fixtures import r2_of_vertices


def random_scores(seed=0, n_images=(12, 9), n_vertices=23):
    """Two subjects who share six of their pictures: pictures, activity, two predictions, ceilings of each."""
    rng = np.random.default_rng(seed)
    pictures = [np.arange(n_images[0]) + 3, np.arange(n_images[1])]
    subjects = []
    for ids in pictures:
        y = rng.normal(0.3, 1, (len(ids), n_vertices)).astype(np.float32)
        y[:, 4] = 0.5  # constant
        predictions = {"a": 0.4 * y + rng.normal(0.1, 0.6, y.shape), "b": rng.normal(size=y.shape)}
        predictions["b"][:, 7] = -1
        ceiling = rng.uniform(0, 0.8, n_vertices)
        ceiling[2] = 0
        subjects.append((ids, y, {k: v.astype(np.float32) for k, v in predictions.items()}, ceiling))
    return subjects


def plain_scores(y, prediction, ceiling):
    """{metric: (n_vertices,)} by scikit-learn and scipy."""
    y, prediction = y.astype(float), prediction.astype(float)
    constant = (y == y[0]).all(0) | (prediction == prediction[0]).all(0)
    r = [0 if c else scipy.stats.pearsonr(*pair).statistic for c, *pair in zip(constant, y.T, prediction.T)]
    challenge = np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1)
    return {"r2": r2_of_vertices(y, prediction), "r": np.array(r), "challenge": challenge}


def test_resampled_scores_are_those_of_repeated_pictures(monkeypatch):
    """Of every vertex, and their medians and means of a subject and of all, against a loop over the resamples."""
    monkeypatch.setattr(scores, "vertices_at_once", 10)
    monkeypatch.setattr(scores, "fewest_pictures", 9)
    subjects = random_scores()
    bootstrap = scores.Bootstrap(np.concatenate([ids for ids, *_ in subjects]), 40, seed=1)
    assert bootstrap.weights.shape == (40, 15) and (bootstrap.weights.sum(1) == 15).all()
    for name, (ids, y, predictions, ceiling) in zip(("subj01", "subj02"), subjects):
        bootstrap.add(name, ids, torch.tensor(y), {k: torch.tensor(v) for k, v in predictions.items()}, ceiling)
    for prediction in "ab":
        loops = {"subj01": [], "subj02": []}
        for name, (ids, y, predictions, ceiling) in zip(loops, subjects):
            weights = bootstrap.weights[:, ids]  # ids are 0 to 14
            for b in range(40):
                drawn = np.repeat(np.arange(len(ids)), weights[b].int())
                loops[name].append(plain_scores(y[drawn], predictions[prediction][drawn], ceiling))
            parts = [torch.tensor(y), {"x": torch.tensor(predictions[prediction])}, weights, torch.tensor(ceiling)]
            for metric, values in scores.resampled_scores(*parts)["x"].items():
                expected = np.array([found[metric] for found in loops[name]])
                np.testing.assert_allclose(values.numpy(), expected, rtol=1e-3, atol=1e-4)
        for metric in ("r2", "r", "challenge"):
            loop = {name: np.array([found[metric] for found in values]) for name, values in loops.items()}
            loop["all"] = np.concatenate([loop["subj01"], loop["subj02"]], axis=1)
            for name, values in loop.items():
                found = bootstrap.resampled(name, prediction, metric)
                np.testing.assert_allclose(found["mean"], np.mean(values, 1), rtol=1e-3, atol=1e-4)
                # of few vertices the histogram takes a place within the bin, or between two values, for the median
                middle = np.sort(values, 1)
                low, high = (np.take(middle, i, 1) for i in ((middle.shape[1] - 1) // 2, middle.shape[1] // 2))
                width = (2 - low) ** 2 / scores.n_bins  # of a bin of 1 / (2 - x)
                assert (found["median"] > low - 1.1 * width).all() and (found["median"] < high + 1.1 * width).all()


def test_intervals_hold_what_other_pictures_give(monkeypatch):
    """95 % intervals of R², of the challenge score, and of a difference between two predictions: how often do
    they hold the mean over many sets of other pictures?"""
    monkeypatch.setattr(scores, "n_bins", 512)  # 0.004 at R² 0.6, a thirtieth of an interval
    rng = np.random.default_rng(0)
    n_images, n_vertices, n_sets = 25, 40, 250
    gain = rng.uniform(0.2, 0.8, n_vertices)
    found, held = [], []
    for i in range(n_sets):
        signal, shared = rng.normal(size=(2, n_images, n_vertices)) + rng.normal(size=(2, n_images, 1))
        y = torch.tensor(gain * signal + 0.7 * shared).float()
        predictions = {"a": torch.tensor(gain * signal).float(), "b": torch.tensor(0.7 * shared * gain).float()}
        ceiling = np.full(n_vertices, 0.9)
        bootstrap = scores.Bootstrap(np.arange(n_images), 120, seed=i)
        bootstrap.add("subj01", np.arange(n_images), y, predictions, ceiling)
        has = np.ones(n_vertices, bool)
        a, b = (scores.score(y, predictions[name], has, ceiling) for name in "ab")
        ra, rb = (bootstrap.resampled("all", name, "r2")["median"] for name in "ab")
        r_challenge = bootstrap.resampled("subj01", "a", "challenge")["mean"]
        numbers = [np.median(a["r2"]), np.median(a["r2"]) - np.median(b["r2"]), a["challenge"].mean()]
        found.append(numbers)
        held.append([scores.interval(*pair) for pair in zip(numbers, (ra, ra - rb, r_challenge))])
    truth, ends = np.mean(found, 0), np.array(held)
    share = ((ends[..., 0] <= truth) & (truth <= ends[..., 1])).mean(0)
    assert (share > 0.88).all() and (share < 0.99).all(), share  # 25 pictures: a little too short
    width = (ends[..., 1] - ends[..., 0]).mean(0) / (4 * 0.98 * np.std(found, 0))
    assert (abs(width - 1) < 0.15).all(), width
    assert scores.interval(0.5, np.array([0.0, 0.1, np.nan, 0.2])) == pytest.approx([0.405, 0.595])


def test_too_few_pictures_give_no_interval(monkeypatch):
    """Neither for a subject nor for all that it belongs to; the others have theirs."""
    (ids, y, predictions, _), _ = random_scores()
    predictions = {"subject": torch.tensor(predictions["a"])}
    bootstrap = scores.Bootstrap(np.arange(15), 20, seed=0)
    bootstrap.add("subj01", ids, torch.tensor(y), predictions)
    assert set(bootstrap.resampled("all", "subject", "r2")) == {"median", "mean"}
    assert bootstrap.resampled("all", "subject", "challenge") is None  # no ceilings
    bootstrap.add("subj02", ids[:9], torch.tensor(y[:9]), {k: v[:9] for k, v in predictions.items()})
    assert bootstrap.resampled("subj02", "subject", "r2") is None
    assert bootstrap.resampled("all", "subject", "r2") is None
    assert bootstrap.resampled("subj01", "subject", "r2")["median"].shape == (20,)
    # a resample without any picture of the subject says nothing about it
    monkeypatch.setattr(scores, "fewest_pictures", 5)
    rare = scores.Bootstrap(np.arange(40), 400, seed=0)
    rare.add("subj01", np.arange(5), torch.tensor(y[:5]), {"subject": predictions["subject"][:5]})
    without = (rare.weights[:, :5].sum(1) == 0).numpy()
    for values in rare.resampled("subj01", "subject", "r2").values():
        assert without.any() and np.array_equal(np.isnan(values), without)
    row = dict(prediction="subject", hemisphere="both", roi_group="all", roi="all", metric="r2", median=0.25, mean=0.5)
    table = [row | {"subject": name} for name in ("subj01", "subj02")]
    found = scores.headlines(table + [table[0] | {"roi": "V1v", "median": 9}], bootstrap)["subject"]
    assert found["subj02"]["r2"] == {"median": 0.25, "mean": 0.5, "median_95": None, "mean_95": None}
    resampled = bootstrap.resampled("subj01", "subject", "r2")
    assert found["subj01"]["r2"]["median_95"] == scores.interval(0.25, resampled["median"])
    assert found["subj01"]["r2"]["mean_95"] == scores.interval(0.5, resampled["mean"])


def random_space(seed=0):
    rng = np.random.default_rng(seed)
    n, mask = 60, rng.random((3, 60)) < 0.8
    labels = np.where(mask, rng.integers(0, 4, (3, n)), 0)
    names = {0: "Unknown", 1: "early", 2: "ventral", 3: "lateral"}
    rois = {"streams": {"names": names, "labels": torch.tensor(labels)}}
    return Space(["subj01", "subj03", "subj05"], torch.arange(n) * 2, 25, torch.tensor(mask), rois), mask, labels


def test_labels_of_the_group_are_those_of_most_subjects():
    space, mask, labels = random_space()
    found, n_decided = space.roi_labels("streams"), 0
    for v in range(space.n_vertices):
        votes = Counter(labels[mask[:, v], v]).most_common()  # of those who have the vertex
        if votes and (len(votes) == 1 or votes[0][1] > votes[1][1]):
            assert found[v] == votes[0][0]
            n_decided += 1
    assert n_decided > 15
    for s in range(3):
        assert (space.roi_labels("streams", s) == labels[s]).all()


def test_tables_are_those_of_a_plain_loop():
    space, mask, labels = random_space()
    rng = np.random.default_rng(1)
    values = {name: {metric: rng.normal(size=mask.shape) for metric in ("r2", "r")} for name in ("subject", "group")}
    for metrics in values.values():
        for array in metrics.values():
            array[~mask] = np.nan
    values["subject"]["r2"][1] = np.nan  # not scored
    table = scores.summarise(values, space)
    areas = [("all", "all", lambda label: True), ("streams", "all", lambda label: label > 0)]
    names = space.rois["streams"]["names"]
    areas += [("streams", names[k], lambda label, k=k: label == k) for k in (1, 2, 3)]
    assert len(table) == 4 * 4 * 3 * len(areas)  # metrics, subjects and all, hemispheres
    key = ("prediction", "metric", "subject", "hemisphere", "roi_group", "roi")
    rows = {tuple(row[k] for k in key): row for row in table}
    for prediction, metrics in values.items():
        for metric, array in metrics.items():
            for subject in ("all", *space.subjects):
                for hemi in ("both", "lh", "rh"):
                    for group, roi, is_inside in areas:
                        chosen = [
                            array[s, v]
                            for s, name in enumerate(space.subjects) if subject in ("all", name)
                            for v in range(60)
                            if mask[s, v] and is_inside(labels[s, v]) and hemi in ("both", "lh" if v < 25 else "rh")
                        ]  # fmt: skip
                        chosen = [x for x in chosen if x == x]
                        row = rows[prediction, metric, subject, hemi, group, roi]
                        assert row["n_vertices"] == len(chosen)
                        expected = [np.median(chosen), np.mean(chosen)] if chosen else [np.nan, np.nan]
                        np.testing.assert_allclose([row["median"], row["mean"]], expected)
