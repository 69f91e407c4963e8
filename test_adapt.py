"""A new person: the closed form against dense least squares, the checkpoint with the person in every later stage."""

import csv
import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

import adapt
import demo
import evaluate
import finetune
import predict
import prepare_data
import ridge
from checkpoint import check_scorable, load_checkpoint, save_checkpoint, trained_pictures
from common import Problem
from ensemble import load_for
from model import of_features
from pictures import read_picture
from shared_fixtures import hemis, r2_of_vertices, run

# ---- the closed form ----------------------------------------------------------------------------


def dense_solution(h, residual, rows, a, c=0.0, centre=0.0):
    """B, b of least norm that minimise sum |residual - E (B h + b)|² + a |B|² + c |E (B centre + b)|², as one
    least-squares problem."""
    latent_dim, pca_dim = h.shape[1], rows.shape[1]

    def seen(h):  # of B by columns, then b
        return np.concatenate([np.kron(h, rows), np.kron(np.ones((len(h), 1)), rows)], 1)

    system = [seen(h), np.sqrt(c) * seen(np.zeros((1, latent_dim)) + centre)]
    system.append(np.eye(latent_dim * pca_dim, system[0].shape[1]) * np.sqrt(a))
    system = np.concatenate(system)
    right = np.concatenate([residual.ravel(), np.zeros(len(system) - residual.size)])
    found = np.linalg.lstsq(system, right, rcond=None)[0]
    return found[: latent_dim * pca_dim].reshape(latent_dim, pca_dim).T, found[latent_dim * pca_dim :]


def problem(seed, n=14, latent_dim=5, pca_dim=4, n_vertices=9, level=1.0):
    """h, residual, level times its mean, E.

    With 9 of some 40 vertices E's columns are far from orthonormal, with 3 they are dependent.
    """
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.standard_normal((40, pca_dim)))[0][:n_vertices]
    h = rng.standard_normal((n, latent_dim)) * [3, 1, 1, 0.3, 0.1] + 2
    truth = rng.standard_normal((pca_dim, latent_dim)) * rng.choice([0.2, 2, 20])
    residual = h @ truth.T @ rows.T + rng.standard_normal((n, n_vertices)) + 1
    return h, residual - (1 - level) * residual.mean(0), rows


def absolute(h, a):
    """The penalty in the objective's own units."""
    return a * np.square(h - h.mean(0)).sum() / len(h)


def solve(h, residual, rows, *penalties):
    basis = adapt.decompose(torch.from_numpy(rows))
    return adapt.fit(torch.from_numpy(h), adapt.coordinates(basis, torch.from_numpy(residual)), basis, *penalties)


@pytest.mark.parametrize("n, n_vertices", [(14, 9), (4, 9), (14, 3)])
@pytest.mark.parametrize("a, c", [(1e-3, 0.0), (0.1, 3.0), (10.0, 20.0)])
def test_fit_is_the_dense_solution(n, n_vertices, a, c):
    """More pictures than latent units and fewer, missing vertices, and fewer vertices than components."""
    h, residual, rows = problem(0, n=n, n_vertices=n_vertices)
    weight, bias, _ = solve(h, residual, rows, [a], [c])
    expected_weight, expected_bias = dense_solution(h, residual, rows, absolute(h, a), c, h.mean(0))
    np.testing.assert_allclose(weight, expected_weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bias, expected_bias, rtol=1e-6, atol=1e-8)


def test_without_information_the_person_is_the_group():
    h, residual, rows = problem(1)
    weight, bias, _ = solve(h, residual, rows, [float("inf")], [0])
    assert (weight == 0).all()
    np.testing.assert_allclose(rows @ bias.numpy(), rows @ np.linalg.pinv(rows) @ residual.mean(0), atol=1e-8)
    weight, bias, _ = solve(h, residual, rows, [float("inf")], [float("inf")])
    assert (weight == 0).all() and (bias == 0).all()


def test_penalties_have_the_least_leave_one_out_error():
    """Each picture left out in turn and everything solved anew, densely; the centre of c stays all pictures' mean."""
    chosen = []
    for seed in range(8):
        h, residual, rows = problem(seed, level=(0, 0.2, 1)[seed % 3])
        grid = adapt.penalties[:-1:3], adapt.mean_penalties[:-1:2]
        errors = {}
        for a, c in itertools.product(*grid):
            error = 0.0
            for i in range(len(h)):
                others = np.arange(len(h)) != i
                weight, bias = dense_solution(h[others], residual[others], rows, absolute(h, a), c, h.mean(0))
                error += np.square(residual[i] - rows @ (weight @ h[i] + bias)).sum()
            errors[a, c] = error
        _, _, found = solve(h, residual, rows, *grid)
        assert found == min(errors, key=errors.get)
        chosen.append(found)
    assert all(len(set(values)) > 1 for values in zip(*chosen))


# ---- a person -----------------------------------------------------------------------------------

extra = 163841  # a vertex that nobody else has


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """A ninth person's folder: lacks some vertices, has one that nobody has, ROIs under other numbers."""
    folder = tmp_path_factory.mktemp("person") / "challenge"
    demo.simulate(folder, subjects=[9], n_train=200, n_test=5, picture_size=80, vertex_step=16, seed=1)
    root = folder / "subj09"
    for path in [root / "roi_masks/lh.all-vertices_fsaverage_space.npy", *root.rglob("lh_t*_fmri.npy")]:
        values = np.load(path)
        if "mask" in path.name or values.ndim == 1:
            values[extra] = 1
        else:
            values = np.concatenate([values, values[:, :1]], 1)
        np.save(path, values)
    for path in root.rglob("lh.*_challenge_space.npy"):
        np.save(path, np.append(np.load(path), 1))
    ceiling = root / "test_split/noise_ceiling/lh_noise_ceiling.npy"
    np.save(ceiling, np.append(np.load(ceiling), np.float32(0.5)))
    mapping = root / "roi_masks/mapping_prf-visualrois.npy"  # V1v is 1 for the others
    np.save(mapping, np.array({0: "Unknown", 1: "V1d", 2: "V1v", 3: "mine"}, dtype=object))
    for hemi in hemis:
        path = root / f"roi_masks/{hemi}.prf-visualrois_challenge_space.npy"
        labels = np.load(path)
        np.save(path, np.select([labels == 1, labels == 2, labels == 7], [2, 1, 3], 0))
    return folder


seed = 15  # holds out two pictures that others were trained on
options = dict(PRECISION="float32", DEVICE="cpu", N_DRAWS=2, SEED=seed, BATCH_SIZE=4)


@pytest.fixture(scope="module")
def adapted(phase_2, person, fitted, tmp_path_factory):
    """OUTPUT_DIR of the person, adapted from finetuned.pt of the eight."""
    output, fit, rows = tmp_path_factory.mktemp("adapted") / "p-09", adapt.Solver.fit, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt.Solver, "fit", lambda self, chosen: rows.append(set(chosen)) or fit(self, chosen))
        run(
            adapt, CHALLENGE_DIR=str(person), SUBJECT="subj09", RUN_DIR=str(fitted.parent / "run"),
            OUTPUT_DIR=str(output), **options,
        )  # fmt: skip
    assert len(rows) > 4 and all(chosen <= rows[0] for chosen in rows)  # smaller sizes see no held-out picture
    return output


def plain(person, space):
    """The person's files, read plainly: pictures, nsd ids, activity on known vertices, their columns, which known."""
    root = person / "subj09"
    pictures = sorted((root / "training_split/training_images").iterdir())
    columns, known, activity = [], [], []
    for hemi, start, end in (("lh", 0, space.n_lh), ("rh", space.n_lh, space.n_vertices)):
        place = {int(v): start + i for i, v in enumerate(space.vertices[start:end])}
        own = np.flatnonzero(np.load(root / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy"))
        known.append(np.array([int(v) in place for v in own]))
        columns += [place[int(v)] for v in own if int(v) in place]
        activity.append(np.load(root / f"training_split/training_fmri/{hemi}_training_fmri.npy")[:, known[-1]])
    ids = np.array([int(path.stem.split("nsd-")[1]) for path in pictures])
    return pictures, ids, np.concatenate(activity, 1), np.array(columns), known


@pytest.mark.parametrize("bias_count", [1, 2])  # 2: the authors' weights
def test_adapted_is_the_least_squares_solution_of_the_training_pictures(
    bias_count, adapted, person, fitted, tmp_path, capsys
):
    path = fitted.parent / "run/finetuned.pt"
    if bias_count == 2:  # files that know neither pictures nor data
        encoder, space, _ = load_checkpoint(path.with_name("head.pt"))
        encoder.head.bias_count = 2
        encoder.head.embed_bias += 0.3
        path, adapted = tmp_path / "theirs.pt", tmp_path / "out"
        save_checkpoint(
            path, encoder, space=space, made_with={"published": "theirs.pt"}, scores={}, step=1, finished=True
        )
        run(
            adapt,
            CHALLENGE_DIR=str(person / "subj09"),
            SUBJECT="subj09",
            CHECKPOINT=str(path),
            OUTPUT_DIR=str(adapted),
            **options,
        )
        assert "does not say which pictures it was trained on" in capsys.readouterr().out
    before, space, _ = load_checkpoint(path)
    after, larger, made = load_checkpoint(adapted / "adapted.pt")
    pictures, ids, activity, columns, known = plain(person, space)
    assert larger.subjects == [*space.subjects, "subj09"] and after.head.bias_count == bias_count
    assert np.array_equal(np.flatnonzero(larger.mask[8]), np.sort(columns)) and known[0].sum() == len(known[0]) - 1

    # trained on: the training split of this folder prepared alone
    data = tmp_path / "data"
    run(prepare_data, CHALLENGE_DIR=str(person), DATA_DIR=str(data), SUBJECTS="subj09", SEED=seed)
    prepared = prepare_data.load(data)
    train = prepared.split[np.argsort(prepared.image)] == 0  # images are in the order of their ids
    train = train[np.argsort(np.argsort(ids))]
    assert 0 < (~train).sum() < 0.2 * len(train)

    images = np.stack([read_picture(path) for path in pictures])
    [h] = of_features(before.trunk, images, [before.latents])
    h, head = h.double().numpy(), before.head.double()
    rows, shared = head.embed_weight.numpy()[columns], head.shared.detach().numpy()
    mean = bias_count * head.embed_bias.numpy()[columns]
    residual = activity - mean - h @ shared.T @ rows.T
    a, c = map(float, made["made_with"]["adapted"][0]["penalties"])
    group = residual + (bias_count - 1) * head.embed_bias.numpy()[columns]  # less the group's prediction
    expected_weight, expected_bias = dense_solution(
        h[train], group[train], rows, absolute(h[train], a), min(c, 1e9), h[train].mean(0)
    )
    expected_bias -= np.linalg.pinv(rows) @ (mean - head.embed_bias.numpy()[columns])
    scale = np.abs(expected_weight).max()
    assert np.abs(after.head.subject_weight[8].detach().numpy() - expected_weight).max() < 1e-3 * scale
    prediction = after.predict(images, [8])[0].numpy()[:, columns]
    expected = mean + (h @ (shared + expected_weight).T + expected_bias) @ rows.T
    np.testing.assert_allclose(prediction, expected, atol=1e-3 * np.abs(expected).max())

    if bias_count == 2:  # the authors' own people are not scored on these splits, the new person is
        check_scorable(adapted / "adapted.pt", made, prepared, "val")
        with pytest.raises(Problem, match="the authors' weights"):
            check_scorable(adapted / "adapted.pt", made, prepare_data.load(fitted), "val")

    # the others, and the group, to the bit
    before = load_checkpoint(path)[0]
    for s in [*range(8), None]:
        assert torch.equal(after.predict(images[:9], [s])[0], before.predict(images[:9], [s])[0])


def test_curve(adapted, person, fitted, capsys):
    encoder, space, made = load_checkpoint(adapted / "adapted.pt")
    pictures, ids, activity, columns, _ = plain(person, space)
    train = prepare_data.split_pictures(np.ones((len(ids), 1), bool), seed)[np.argsort(np.argsort(ids))] == 0
    by_others = load_checkpoint(fitted.parent / "run/finetuned.pt")[2]["trained_nsd_ids"].numpy()
    data = prepare_data.load(fitted)
    assert set(by_others) == set(data.nsd_id[data.image[data.samples("train")]])
    scored = ~train & ~np.isin(ids, by_others)
    assert scored.sum() == (~train).sum() - 2
    assert set(made["trained_nsd_ids"].numpy()) == set(by_others)  # the person's own are in nobody else's predictions
    assert [set(trained_pictures(made, names)[0]) for names in (["subj01"], ["subj01", "subj09"])] == [
        set(by_others), set(by_others) | set(ids[train])
    ]  # fmt: skip

    images = np.stack([read_picture(path) for path in pictures])
    own, group = (p.numpy()[:, columns] for p in encoder.predict(images, [8, None]))
    [x] = of_features(encoder.trunk, images, [lambda features: ridge.pool_tokens(encoder.trunk, features)])
    z = StandardScaler().fit(x[train]).transform(x)
    alphas = np.array(ridge.penalties) * z.shape[1]
    standard = RidgeCV(alphas, alpha_per_target=True).fit(z[train], activity[train].astype(float)).predict(z)
    rows = list(csv.DictReader((adapted / "curve.csv").open()))
    assert list(rows[0]) == ["n_pictures", "method", "median_r2", "mean_r", "challenge", "draw"]
    n = {(int(r["n_pictures"]), r["method"]): [] for r in rows}
    for r in rows:
        n[int(r["n_pictures"]), r["method"]].append(r)
    for key, prediction in {
        (0, "group"): group, (0, "adapted"): group, (train.sum(), "adapted"): own, (train.sum(), "ridge"): standard,
    }.items():  # fmt: skip
        [row] = n[key]
        y, p = activity[scored], prediction[scored]
        assert float(row["median_r2"]) == pytest.approx(np.median(r2_of_vertices(y, p)), abs=2e-3)
        r = np.array([np.corrcoef(y[:, v], p[:, v])[0, 1] for v in range(y.shape[1])])
        assert float(row["mean_r"]) == pytest.approx(r.mean(), abs=2e-3)
        ceilings = [np.load(person / f"subj09/test_split/noise_ceiling/{h}_noise_ceiling.npy") for h in hemis]
        ceiling = np.concatenate([ceilings[0][:-1], ceilings[1]])  # less the unknown vertex
        challenge = np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1).mean()
        assert float(row["challenge"]) == pytest.approx(challenge, abs=5e-3)
    assert {k[0] for k in n} == {0, 10, 30, train.sum()} and len(n[10, "adapted"]) == len(n[10, "ridge"]) == 2
    assert len({row["median_r2"] for row in n[10, "adapted"]}) == 2  # draws differ
    assert (adapted / "curve.png").stat().st_size > 10_000


def test_later_stages_take_the_adapted_checkpoint(adapted, person, fitted, challenge, tmp_path, capsys):
    path = str(adapted / "adapted.pt")
    encoder, space, made = load_checkpoint(path)
    pictures, ids, activity, columns, known = plain(person, space)
    tests = sorted((person / "subj09/test_split/test_images").iterdir())
    expected = encoder.predict(np.stack([read_picture(p) for p in tests]), [8])[0].numpy()

    # test pictures: the challenge's layout, the vertex that nobody knows predicted as 0
    left = columns < space.n_lh
    for hemi, side, has in zip(hemis, (left, ~left), known):
        found = np.load(adapted / f"submission/subj09/{hemi}_pred_test.npy")
        assert found.dtype == np.float32 and found.shape == (len(tests), len(has)) and (found[:, ~has] == 0).all()
        np.testing.assert_allclose(found[:, has], expected[:, columns[side]], atol=1e-4)

    # own pictures
    out = tmp_path / "own"
    run(
        predict,
        CHECKPOINT=path,
        IMAGES=str(tests[0].parent),
        SUBJECT="subj09",
        OUTPUT_DIR=str(out),
        MAPS=0,
        PRECISION="float32",
    )
    np.testing.assert_allclose(np.load(out / "subj09/activity_rh.npy"), expected[:, columns[~left]], atol=1e-4)

    # areas go by their names
    v1d = {row["roi"]: row for row in csv.DictReader((out / "rois.csv").open()) if row["roi_group"] == "prf-visualrois"}
    labels = np.concatenate(
        [np.load(person / f"subj09/roi_masks/{h}.prf-visualrois_challenge_space.npy") for h in hemis]
    )
    labels = labels[np.concatenate(known)]
    names = space.rois["prf-visualrois"]["names"]
    for number, name in ((1, "V1d"), (2, "V1v"), (3, "mine")):
        [label] = [v for v, known_name in names.items() if known_name == name]
        found = np.flatnonzero(space.rois["prf-visualrois"]["labels"][8] == label)
        assert len(found) and set(found) == set(columns[labels == number]) and name in v1d
    old = prepare_data.load(fitted).space
    for group, roi in old.rois.items():
        assert torch.equal(space.rois[group]["labels"][:8], roi["labels"])
        assert roi["names"].items() <= space.rois[group]["names"].items()

    # the new person's data prepared alone: not what the checkpoint was trained on
    data = tmp_path / "data"
    run(prepare_data, CHALLENGE_DIR=str(person), DATA_DIR=str(data), SUBJECTS="subj09", SEED=seed)
    capsys.readouterr()
    evaluate_options = dict(CHECKPOINT=path, FIGURES=False, DEVICE="cpu", PRECISION="float32", RESAMPLES=0)
    run(
        evaluate, DATA_DIR=str(data), CHALLENGE_DIR=str(person), OUTPUT_DIR=str(tmp_path / "scores"), **evaluate_options
    )
    out_text = capsys.readouterr().out
    assert "1 of 173 vertices are none of" in out_text and "2 validation and private test samples show" in out_text
    prepared = prepare_data.load(data)
    scored = prepared.samples("val")
    scored = scored[~np.isin(prepared.nsd_id[prepared.image[scored]], trained_pictures(made, ["subj09"])[0])]
    prediction = encoder.predict(prepared.images[prepared.image[scored]], [8])[0].numpy()[:, columns]
    y = prepared.read_activity(scored)[:, np.concatenate(known)]
    found = json.loads((tmp_path / "scores/scores.json").read_text())
    assert found["n_images"] == {"subj09": len(scored)} and len(scored) < len(prepared.samples("val"))
    known_to = load_for(prepared, [adapted / "adapted.pt"], "cpu", "float32", "")[1].trained_nsd_ids
    assert set(known_to) == set(trained_pictures(made, ["subj09"])[0]) and len(known_to)
    median = found["scores"]["subject"]["subj09"]["r2"]["median"]
    assert median == pytest.approx(np.median(r2_of_vertices(y.astype(float), prediction)), abs=1e-4)
    run(
        predict,
        DATA_DIR=str(data),
        CHECKPOINT=path,
        SUBMISSION_DIR=str(tmp_path / "again"),
        DEVICE="cpu",
        PRECISION="float32",
    )
    again = np.load(tmp_path / "again/subj09/lh_pred_test.npy")
    np.testing.assert_allclose(again, np.load(adapted / "submission/subj09/lh_pred_test.npy"), atol=1e-4)

    # the data that it was trained on: the same scores as without the person
    for name, checkpoint in (("after", path), ("before", str(fitted.parent / "run/finetuned.pt"))):
        values = evaluate_options | dict(CHECKPOINT=checkpoint, OUTPUT_DIR=str(tmp_path / name))
        run(evaluate, DATA_DIR=str(fitted), CHALLENGE_DIR=str(challenge), **values)
    assert (tmp_path / "after/scores.csv").read_bytes() == (tmp_path / "before/scores.csv").read_bytes()

    # trained on no more
    with pytest.raises(Problem, match=r"people added by adapt.py \(subj09\)"):
        run(finetune, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path), CHECKPOINT=path, DEVICE="cpu", BATCH_SIZE=8)


def test_adapting_again(adapted, person, fitted, tmp_path, capsys):
    values = dict(CHALLENGE_DIR=str(person), RUN_DIR=str(fitted.parent / "run"), OUTPUT_DIR=str(adapted), **options)
    before = (adapted / "adapted.pt").read_bytes()
    run(adapt, **values)
    assert "is there already from these inputs" in capsys.readouterr().out
    shutil.copytree(person / "subj09", tmp_path / "corrected/subj09")
    path = tmp_path / "corrected/subj09/training_split/training_fmri/rh_training_fmri.npy"
    activity = np.load(path)
    activity[7, 3] += 1
    np.save(path, activity)
    for other, message in (
        (dict(HOLD_OUT=False), "HOLD_OUT: True there, False now"),
        (dict(CHALLENGE_DIR=str(tmp_path / "corrected")), "activity: .* there"),
        (dict(CHECKPOINT=str(fitted.parent / "run/head.pt")), "checkpoint: .* there"),
    ):
        with pytest.raises(Problem, match=message):
            run(adapt, **values | other)
    assert (adapted / "adapted.pt").read_bytes() == before

    # somebody else on top, under another name, all pictures used
    values |= dict(CHALLENGE_DIR=str(person / "subj09"), SUBJECT="Zoë"[:2] + "-1", HOLD_OUT=False)
    values |= dict(CHECKPOINT=str(adapted / "adapted.pt"), OUTPUT_DIR=str(tmp_path / "more"))
    (tmp_path / "more").mkdir()
    for name in ("curve.csv", "curve.png"):  # of an earlier run
        (tmp_path / "more" / name).touch()
    run(adapt, **values)
    encoder, space, made = load_checkpoint(tmp_path / "more/adapted.pt")
    first = load_checkpoint(adapted / "adapted.pt")[2]["added_nsd_ids"]["subj09"]
    assert len(first) and torch.equal(made["added_nsd_ids"]["subj09"], first)
    assert space.subjects[8:] == ["subj09", "Zo-1"] and made["made_with"]["adapted"][1]["n_pictures"] == len(
        list((person / "subj09/training_split/training_images").iterdir())
    )
    assert {path.name for path in (tmp_path / "more").glob("[!.]*")} == {"adapted.pt", "submission"}


def test_held_out_pictures_go_by_their_ids():
    """Not by the order in which a folder has them."""
    ids = np.random.default_rng(0).permutation(60) + 73000
    assert (adapt.hold_out(ids)[np.argsort(ids)] == adapt.hold_out(np.sort(ids))).all()


def test_every_picture_is_fitted_to_its_own_activity(adapted):
    """Of more than one part of 512."""
    encoder, rng = load_checkpoint(adapted / "adapted.pt")[0], np.random.default_rng(0)
    sizes = (700, encoder.head.shared.shape[1]), (700, 9)
    h, y = (torch.from_numpy(rng.standard_normal(size).astype(np.float32)) for size in sizes)
    person = SimpleNamespace(columns=np.arange(9), known=lambda: np.ones(9, bool), read_activity=lambda rows: y[rows])
    solver = adapt.Solver(encoder, person, h)
    residual = y - encoder.decode(h, None).detach()[:, :9]
    torch.testing.assert_close(solver.targets, adapt.coordinates(solver.basis, residual), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fault, message", [
    ("few", "4 pictures, expected 5 at least"),
    ("taken", "has subj05 already"),
    ("nan", "1 values are NaN or infinite"),
    ("mask", r"shape \(163841,\), expected \(163842,\)"),
    ("elsewhere", "none of .* vertices is one of"),
    ("scale", "z-score it"),
    ("name", "expected a name of letters"),
    ("nothing", "has a training_split, expected the new person's data"),
])  # fmt: skip
def test_bad_input_leaves_nothing(fault, message, phase_2, person, fitted, tmp_path):
    folder, name = tmp_path / "challenge", {"taken": "subj05", "name": "../subj09"}.get(fault, "subj09")
    shutil.copytree(person / "subj09", folder / "person" if fault == "nothing" else folder / "subj09")
    root = folder / "subj09"
    train, masks = root / "training_split", root / "roi_masks"
    activity = {hemi: train / f"training_fmri/{hemi}_training_fmri.npy" for hemi in hemis}
    if fault == "few":
        for path in sorted((train / "training_images").iterdir())[4:]:
            path.unlink()
        for path in activity.values():
            np.save(path, np.load(path)[:4])
    elif fault == "nan":
        values = np.load(activity["rh"])
        values[3, 5] = np.nan
        np.save(activity["rh"], values)
    elif fault == "mask":
        path = masks / "rh.all-vertices_fsaverage_space.npy"
        np.save(path, np.load(path)[:-1])
    elif fault == "elsewhere":  # vertices before the first that anybody has
        for hemi in hemis:
            path = masks / f"{hemi}.all-vertices_fsaverage_space.npy"
            np.save(path, np.roll(np.load(path), 20000))
    elif fault == "scale":
        np.save(activity["lh"], np.load(activity["lh"]) * 40 + 500)
    elif fault == "taken":
        root.rename(folder / name)
    with pytest.raises(Problem, match=message):
        run(
            adapt, CHALLENGE_DIR=str(folder), SUBJECT=name, RUN_DIR=str(fitted.parent / "run"),
            OUTPUT_DIR=str(tmp_path / "out"), **options,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_pixels_have_no_new_people(phase_2, person, fitted, tmp_path):
    encoder, space, made = load_checkpoint(fitted.parent / "run/finetuned.pt")
    path = tmp_path / "pixels.pt"
    space = dataclasses.replace(space, unit="pixels")
    save_checkpoint(path, encoder, space=space, made_with=made["made_with"], scores={}, step=1)
    with pytest.raises(Problem, match="predicts pixels of NSD-Flat"):
        run(adapt, CHALLENGE_DIR=str(person), CHECKPOINT=str(path), OUTPUT_DIR=str(tmp_path / "out"), **options)
