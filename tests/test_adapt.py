"""A new person: the closed form against dense least squares, the curve against scikit-learn, scores against
tools/evaluate.py, and the checkpoint that carries the person."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from torch import nn

import core.checkpoint
import prepare_data
from core.checkpoint import load_checkpoint, save_checkpoint
from core.files import load_torch, save_torch
from core.space import HEMIS
from model import Head, UserError, trunk_outputs
from predict import load_encoder
from tests.conftest import run_stage
from tools import adapt, evaluate, ridge
from tools.simulate import simulate

OPTIONS = dict(PRECISION="float32", DEVICE="cpu", N_DRAWS=2, BATCH_SIZE=16)
SEED = 7  # of the person's splits: some held-out pictures are training pictures of the others

# ---- the closed form -----------------------------------------------------------------------------


def dense_solution(h, residual, rows, a, c=0.0, centre=0.0):
    """B, b of least norm that minimise sum |residual - E (B h + b)|² + a |B|² + c |E (B centre + b)|², as one
    least-squares problem."""
    latent_dim, pca_dim = h.shape[1], rows.shape[1]

    def design(h):  # for B by columns, then b
        return np.concatenate([np.kron(h, rows), np.kron(np.ones((len(h), 1)), rows)], 1)

    system = [design(h), np.sqrt(c) * design(np.zeros((1, latent_dim)) + centre)]
    system.append(np.eye(latent_dim * pca_dim, system[0].shape[1]) * np.sqrt(a))
    system = np.concatenate(system)
    right = np.concatenate([residual.ravel(), np.zeros(len(system) - residual.size)])
    solution = np.linalg.lstsq(system, right, rcond=None)[0]
    return solution[: latent_dim * pca_dim].reshape(latent_dim, pca_dim).T, solution[latent_dim * pca_dim :]


def problem(seed, n=14, n_vertices=9, level=1.0):
    """h (n, 5), residual, E (n_vertices, 4). With 9 of 40 vertices E's columns are far from orthonormal, with 3 they are
    dependent. level: what remains of the mean."""
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.standard_normal((40, 4)))[0][:n_vertices]
    h = rng.standard_normal((n, 5)) * [3, 1, 1, 0.3, 0.1] + 2
    truth = rng.standard_normal((4, 5)) * rng.choice([0.2, 2, 20])
    residual = h @ truth.T @ rows.T + rng.standard_normal((n, n_vertices)) + 1
    return h, residual - (1 - level) * residual.mean(0), rows


def absolute(h, a):
    """The penalty in the objective's units."""
    return a * np.square(h - h.mean(0)).sum() / len(h)


def solve(h, residual, rows, *penalties):
    gains, components = adapt.decompose(torch.from_numpy(rows))
    targets = torch.from_numpy(residual @ rows) @ components
    return adapt.fit_map(torch.from_numpy(h), targets, gains, components, *penalties)


@pytest.mark.parametrize("n, n_vertices", [(14, 9), (4, 9), (14, 3)])
@pytest.mark.parametrize("a, c", [(1e-3, 0.0), (0.1, 3.0), (10.0, 20.0)])
def test_fit_is_the_dense_solution(n, n_vertices, a, c):
    """More pictures than latent units and fewer, missing vertices, and fewer vertices than components."""
    h, residual, rows = problem(0, n=n, n_vertices=n_vertices)
    weight, bias, _ = solve(h, residual, rows, [a], [c])
    expected_weight, expected_bias = dense_solution(h, residual, rows, absolute(h, a), c, h.mean(0))
    np.testing.assert_allclose(weight, expected_weight, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(bias, expected_bias, rtol=1e-6, atol=1e-7)


def test_with_infinite_penalties_the_person_is_the_group():
    h, residual, rows = problem(1)
    weight, bias, _ = solve(h, residual, rows, [np.inf], [0])
    assert (weight == 0).all()
    np.testing.assert_allclose(rows @ bias.numpy(), rows @ np.linalg.pinv(rows) @ residual.mean(0), atol=1e-8)
    assert all((values == 0).all() for values in solve(h, residual, rows, [np.inf], [np.inf])[:2])


def test_penalties_have_the_least_leave_one_out_error():
    """Each picture left out in turn and everything solved anew, densely; the centre of c stays all pictures' mean."""
    chosen = []
    for seed in range(8):
        h, residual, rows = problem(seed, level=(0, 0.2, 1)[seed % 3])
        grid = adapt.PENALTIES[:-1:3], adapt.MEAN_PENALTIES[:-1:2]
        errors = {}
        for a, c in itertools.product(*grid):
            error = 0.0
            for i in range(len(h)):
                others = np.arange(len(h)) != i
                weight, bias = dense_solution(h[others], residual[others], rows, absolute(h, a), c, h.mean(0))
                error += np.square(residual[i] - rows @ (weight @ h[i] + bias)).sum()
            errors[a, c] = error
        chosen.append(solve(h, residual, rows, *grid)[2])
        assert chosen[-1] == min(errors, key=errors.get)
    assert all(len(set(values)) > 1 for values in zip(*chosen))


# ---- the baseline --------------------------------------------------------------------------------


@pytest.mark.parametrize("n, n_features", [(30, 80), (90, 40)])
def test_ridge_is_scikit_learns(n, n_features, monkeypatch):
    """Penalty of every vertex as RidgeCV's leave-one-out chooses it, predictions of Ridge."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n + 20, n_features)) * rng.uniform(0.1, 30, n_features) + 5
    x[:, 3] = 2.0  # a feature that is always the same
    y = (
        x[:, :6] @ rng.standard_normal((6, 11)) / 20
        + rng.standard_normal((n + 20, 11)) * np.geomspace(0.1, 100, 11)
        + 3
    )
    monkeypatch.setattr(ridge, "COLUMNS_AT_ONCE", 4)
    z = StandardScaler().fit(x[:n]).transform(x)
    unit = np.square(z[:n]).sum() / n
    expected = RidgeCV(np.array(ridge.PENALTIES) * unit, alpha_per_target=True).fit(z[:n], y[:n])
    assert len(set(expected.alpha_)) > 2
    plain = Ridge(expected.alpha_).fit(z[:n], y[:n]).predict(z[n:])
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        features, activity = torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)
        fitted = ridge.fit(features[:n], activity[:n])
        np.testing.assert_allclose(fitted.penalty * unit, expected.alpha_)
        np.testing.assert_allclose(ridge.predict(fitted, features[n:]), plain, rtol=tolerance, atol=tolerance)


def shrunk_ridge(x, y):
    """The curve's baseline by scikit-learn: one a and one c for all vertices by brute-force leave-one-out, in which
    scaling and centre stay all pictures' -> function of features to predictions."""
    scaler, n = StandardScaler().fit(x), len(x)
    z, errors = scaler.transform(x), {}

    def model(rows, a, c):
        """Penalty c on b: c pictures more with mean features and activity 0."""
        weights = np.append(np.ones(len(rows)), c)
        inputs, targets = np.vstack([z[rows], 0 * z[:1]]), np.vstack([y[rows], 0 * y[:1]])
        return Ridge(a * np.square(z).sum() / n).fit(inputs, targets, sample_weight=weights)

    for a, c in itertools.product(adapt.PENALTIES, adapt.MEAN_PENALTIES):
        left_out = [model(np.delete(np.arange(n), i), min(a, 1e9), min(c, 1e9)).predict(z[i : i + 1]) for i in range(n)]
        errors[a, c] = np.square(y - np.concatenate(left_out)).sum()
    a, c = min(errors, key=errors.get)
    best = model(np.arange(n), min(a, 1e9), min(c, 1e9))
    return (a, c), lambda features: best.predict(scaler.transform(features))


def test_the_baseline_has_what_our_map_has():
    """One penalty and a shrunk mean: with a free mean or a penalty per vertex it is another, worse one."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 12)), rng.standard_normal((8, 6)) + 0.1
    penalties, expected = shrunk_ridge(x, y)
    person = SimpleNamespace(features=torch.from_numpy(x), activity=lambda rows: torch.from_numpy(y)[rows])
    prediction = adapt.Person.predict_ridge(person, np.arange(8), np.arange(8))
    np.testing.assert_allclose(prediction, expected(x), atol=1e-6)
    assert penalties[1] > 0  # with a free mean the predictions would be others


def test_pooled_features_are_class_token_and_mean_patch_token():
    x = torch.arange(48.0).reshape(2, 6, 4)
    for cls_token, expected in ((x, [x[:, 0], x[:, 2:].mean(1)]), (None, [x[:, 2:].mean(1)])):
        trunk = SimpleNamespace(vit=SimpleNamespace(cls_token=cls_token), n_prefix=2)  # the second is a register
        torch.testing.assert_close(
            ridge.pool_tokens(trunk, [x, 2 * x]), torch.cat([*expected, *(2 * e for e in expected)], 1)
        )


# ---- a person ------------------------------------------------------------------------------------

EXTRA = 163841  # a vertex that nobody else has


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """Folder of subj09: lacks every fifth vertex on the right, has one on the left that nobody has, and numbers V1's
    parts the other way round. Every third picture has no nsd id."""
    folder = tmp_path_factory.mktemp("person")
    simulate(folder, subjects=[9], n_train=240, n_test=5, picture_size=80, vertex_step=16, seed=1)
    root = folder / "subj09"
    for hemi in HEMIS:
        path = root / f"roi_masks/{hemi}.all-vertices_fsaverage_space.npy"
        mask = np.load(path)
        vertices = np.flatnonzero(mask)
        keep = np.arange(len(vertices)) % 5 > 0 if hemi == "rh" else np.append(np.arange(len(vertices)), 0)
        mask[:] = 0
        mask[vertices[keep] if hemi == "rh" else [*vertices, EXTRA]] = 1
        np.save(path, mask)
        for other in [*root.rglob(f"{hemi}_*.npy"), *root.rglob(f"{hemi}.*_challenge_space.npy")]:
            np.save(other, np.load(other)[..., keep])
        path = root / f"roi_masks/{hemi}.prf-visualrois_challenge_space.npy"
        np.save(path, np.choose(np.load(path), [0, 2, 1, 3, 4, 5, 6, 7]))
    path = root / "roi_masks/mapping_prf-visualrois.npy"
    names = np.load(path, allow_pickle=True).item()
    np.save(path, np.array(names | {1: names[2], 2: names[1]}, dtype=object))
    for path in sorted((root / "training_split/training_images").iterdir())[2::3]:
        path.rename(path.with_name(f"{path.name.split('_')[0]}.png"))
    return folder


@pytest.fixture(scope="module")
def person_data(person, tmp_path_factory):
    folder = tmp_path_factory.mktemp("person_data")
    run_stage(prepare_data, CHALLENGE_DIR=person, DATA_DIR=folder, SUBJECTS="subj09", SEED=SEED)
    return folder


@pytest.fixture(scope="module")
def adapted(person_data, finetuned_dir, tmp_path_factory):
    """OUTPUT_DIR of the person, added to finetuned.pt."""
    output = tmp_path_factory.mktemp("adapted") / "subj09"
    run_stage(adapt, DATA_DIR=person_data, RUN_DIR=finetuned_dir, OUTPUT_DIR=output, **OPTIONS)
    return output


@pytest.fixture(scope="module")
def plain(person_data, finetuned_dir):
    """What the closed form starts from, computed plainly."""
    data = prepare_data.load(person_data)
    encoder, space, info = load_checkpoint(finetuned_dir / "finetuned.pt")
    place = {(i < space.n_lh, int(v)): i for i, v in enumerate(space.vertices)}
    known = np.array([(i < data.space.n_lh, int(v)) in place for i, v in enumerate(data.space.vertices)])
    columns = [place[i < data.space.n_lh, int(v)] for i, v in enumerate(data.space.vertices) if known[i]]
    functions = [encoder.latents, lambda features: ridge.pool_tokens(encoder.trunk, features)]
    h, features = (x.double().numpy() for x in trunk_outputs(encoder.trunk, data.images[data.image], functions))
    rows, mean = (w.detach().double().numpy()[columns] for w in (encoder.head.embed_weight, encoder.head.embed_bias))
    fresh = ~np.isin(data.nsd_ids[data.image], info["train_nsd_ids"].numpy())
    return SimpleNamespace(
        data=data, encoder=encoder, space=space, info=info, known=known, columns=np.array(columns), h=h, rows=rows,
        features=features, activity=data.activity[:, known].astype(np.float64), mean=mean, fresh=fresh,
        shared=encoder.head.shared.detach().double().numpy(), train=data.split == 0,
    )  # fmt: skip


def fit_plainly(p, rows, a, c):
    """Predictions of all pictures by the dense solution from some."""
    residual = p.activity - p.mean - p.h @ p.shared.T @ p.rows.T
    h = p.h[rows]
    weight, bias = dense_solution(h, residual[rows], p.rows, absolute(h, a), min(c, 1e9), h.mean(0))
    return p.mean + (p.h @ (p.shared + weight).T + bias) @ p.rows.T


def test_the_persons_prediction_is_the_least_squares_solution(adapted, plain):
    encoder, space, info = load_checkpoint(adapted / "adapted.pt")
    assert space.subjects == [*plain.space.subjects, "subj09"] and plain.known.sum() == len(plain.known) - 1
    assert np.array_equal(np.flatnonzero(space.mask[8]), plain.columns)
    record = info["made_with"]["adapted"][0]
    expected = fit_plainly(plain, plain.train, float(record["a"]), float(record["c"]))
    predictor = load_encoder(adapted / "adapted.pt", "cpu", "float32")
    images = plain.data.images[plain.data.image]
    [h] = predictor.latents(images)
    prediction = predictor.decode([h], 8).numpy()[:, plain.columns]
    np.testing.assert_allclose(prediction, expected, atol=2e-3 * np.abs(expected).max())
    assert torch.equal(info["added"]["subj09"], torch.from_numpy(plain.data.nsd_ids[plain.data.image[plain.train]]))
    assert torch.equal(info["train_nsd_ids"], plain.info["train_nsd_ids"])  # nobody else was trained on the person's


def test_everybody_else_is_predicted_as_before(adapted, plain, finetuned_dir, run_dir):
    """Bit for bit, with the trunk that phase 2 trained."""
    before, after = (
        load_encoder(p, "cpu", "float32") for p in (finetuned_dir / "finetuned.pt", adapted / "adapted.pt")
    )
    phase_1 = load_checkpoint(run_dir / "head.pt")[0]
    images = plain.data.images[:5]
    for s in [*range(8), None]:
        assert torch.equal(before.decode(before.latents(images), s), after.decode(after.latents(images), s))
    trunks = [e.trunk.state_dict() for e in (before.encoders[0], after.encoders[0], phase_1)]
    assert all(torch.equal(trunks[0][name], trunks[1][name]) for name in trunks[0])
    assert any(not torch.equal(trunks[1][name], trunks[2][name]) for name in trunks[0])


def test_areas_go_by_their_names(adapted, plain, person):
    space = load_checkpoint(adapted / "adapted.pt")[1]
    roi = space.rois["prf-visualrois"]
    assert torch.equal(roi["labels"][:8], plain.space.rois["prf-visualrois"]["labels"])
    labels = [np.load(person / f"subj09/roi_masks/{h}.prf-visualrois_challenge_space.npy") for h in HEMIS]
    labels = np.concatenate(labels)[plain.known]
    names = np.load(person / "subj09/roi_masks/mapping_prf-visualrois.npy", allow_pickle=True).item()
    assert [roi["names"][int(v)] for v in roi["labels"][8, plain.columns]] == [names[v] for v in labels]
    assert {"V1v", "V1d"} <= {names[v] for v in labels}


# ---- scores --------------------------------------------------------------------------------------


def median_r2(p, scored, prediction):
    return np.median(r2_score(p.activity[scored], prediction[scored], multioutput="raw_values"))


def test_curve(adapted, plain):
    """Group, adapted map and ridge at full size, on held-out pictures that nobody was trained on."""
    scored = ~plain.train & plain.fresh
    assert 2 < scored.sum() < (~plain.train).sum()
    table = pd.read_csv(adapted / "curve.csv")
    record = load_checkpoint(adapted / "adapted.pt")[2]["made_with"]["adapted"][0]
    group = plain.mean + plain.h @ plain.shared.T @ plain.rows.T
    own = fit_plainly(plain, plain.train, float(record["a"]), float(record["c"]))
    x, y = (torch.from_numpy(v[plain.train]) for v in (plain.features, plain.activity))
    fitted = ridge.fit(x, y, adapt.PENALTIES, adapt.MEAN_PENALTIES, shared=True)
    baseline = ridge.predict(fitted, torch.from_numpy(plain.features)).numpy()
    n = plain.train.sum()
    for size, method, prediction in (
        (0, "group", group),
        (0, "adapted", group),
        (n, "adapted", own),
        (n, "ridge", baseline),
    ):
        [value] = table[(table.n_pictures == size) & (table.method == method)].median_r2
        assert value == pytest.approx(median_r2(plain, scored, prediction), abs=2e-3)
    draws = table[(table.n_pictures == 10) & (table.method == "adapted")].median_r2
    assert sorted(set(table.n_pictures)) == [0, 10, 30, n] and len(draws) == draws.nunique() == 2


def test_scores_are_those_of_evaluation(adapted, plain, person, person_data, tmp_path):
    scores = json.loads((adapted / "scores.json").read_text())
    assert scores["n_left_out"] == (~plain.train & ~plain.fresh).sum() > 0
    run_stage(
        evaluate, DATA_DIR=person_data, CHECKPOINT=adapted / "adapted.pt", CHALLENGE_DIR=person, FIGURES=False,
        OUTPUT_DIR=tmp_path / "scores", DEVICE="cpu", PRECISION="float32",
    )  # fmt: skip
    evaluated = json.loads((tmp_path / "scores/scores.json").read_text())
    numbers = evaluated["scores"]["subject"]["subj09"]["r2"]
    held_out = scores["held_out"]
    assert evaluated["n_images"] == {"subj09": held_out["n_pictures"]} == {"subj09": (~plain.train & plain.fresh).sum()}
    assert held_out["median_r2"] == pytest.approx(numbers["median"], abs=1e-5)
    assert held_out["interval"] == pytest.approx(numbers["median_95"], abs=1e-5)
    assert load_checkpoint(adapted / "adapted.pt")[2]["scores"]["heldout_r2_subj09"] == held_out["median_r2"]


def test_cross_validation_never_fits_to_what_it_scores(adapted, plain):
    scores = json.loads((adapted / "scores.json").read_text())["cross_validated"]
    fold = np.random.default_rng(0).permutation(len(plain.h)) % adapt.N_FOLDS
    residual = plain.activity - plain.mean - plain.h @ plain.shared.T @ plain.rows.T
    prediction = np.empty_like(plain.activity)
    for k in range(adapt.N_FOLDS):
        a, c = solve(plain.h[fold != k], residual[fold != k], plain.rows)[2]
        prediction[fold == k] = fit_plainly(plain, fold != k, a, c)[fold == k]
    assert (
        scores["n_pictures"] == plain.fresh.sum()
        and scores["interval"][0] < scores["median_r2"] < scores["interval"][1]
    )
    assert scores["median_r2"] == pytest.approx(median_r2(plain, plain.fresh, prediction), abs=2e-3)


# ---- checkpoints ---------------------------------------------------------------------------------


class ChangedHead(Head):
    """A head that somebody has added to: a parameter and a submodule."""

    def __init__(self, feature_shapes, latent_dim, *sizes, **options):
        super().__init__(feature_shapes, latent_dim, *sizes, **options)
        self.temperature = nn.Parameter(torch.full((latent_dim,), 1.5))
        self.mixing = nn.Linear(latent_dim, latent_dim)

    def combine(self, p):
        return self.mixing(super().combine(p)) * self.temperature


def test_a_changed_head_is_carried(plain, person_data, tmp_path, monkeypatch):
    monkeypatch.setattr(core.checkpoint, "Head", ChangedHead)
    old = plain.encoder.head
    head = ChangedHead(
        plain.encoder.trunk.feature_shapes, len(old.shared[0]), *old.shared.shape[:1], 8, len(old.embed_bias)
    )
    head.load_state_dict(old.state_dict(), strict=False)
    encoder = type(plain.encoder)(plain.encoder.trunk, head).eval()
    info = {k: plain.info[k] for k in ("made_with", "scores", "step", "finished", "train_nsd_ids")}
    save_checkpoint(tmp_path / "changed.pt", encoder, space=plain.space, **info)
    run_stage(adapt, DATA_DIR=person_data, CHECKPOINT=tmp_path / "changed.pt", OUTPUT_DIR=tmp_path / "out", **OPTIONS)
    state = load_checkpoint(tmp_path / "out/adapted.pt")[0].head.state_dict()
    assert state.keys() == head.state_dict().keys()
    for name, value in head.state_dict().items():
        grown = name in ("subject_weight", "subject_bias")
        assert torch.equal(state[name][:8] if grown else state[name], value)
    assert len(state["subject_bias"]) == 9


def test_one_person_after_another(adapted, person, plain, tmp_path):
    """The second, prepared together with the first, differs by one vertex; fitted to all pictures, only cross-validated."""
    for name in ("subj09", "anna"):
        shutil.copytree(person / "subj09", tmp_path / "people" / name)
    path = tmp_path / "people/anna/roi_masks/rh.all-vertices_fsaverage_space.npy"
    mask = np.load(path)
    moved = np.flatnonzero(mask)[0]
    mask[[moved, moved + 1]] = mask[[moved + 1, moved]]
    np.save(path, mask)
    options = dict(CHALLENGE_DIR=tmp_path / "people", DATA_DIR=tmp_path / "data", SUBJECTS="subj09,anna", SEED=SEED)
    run_stage(prepare_data, **options)
    options = OPTIONS | dict(CHECKPOINT=adapted / "adapted.pt", OUTPUT_DIR=tmp_path / "anna", HOLD_OUT=False)
    run_stage(adapt, DATA_DIR=tmp_path / "data", SUBJECT="anna", **options)
    before, after = (load_encoder(path / "adapted.pt", "cpu", "float32") for path in (adapted, tmp_path / "anna"))
    images = plain.data.images[:5]
    assert torch.equal(before.decode(before.latents(images), 8), after.decode(after.latents(images), 8))
    info = after.info[0]
    assert after.subjects[8:] == ["subj09", "anna"] and len(info["added"]["anna"]) == len(plain.h)
    first_right = np.searchsorted(plain.columns, plain.space.n_lh)
    assert np.array_equal(np.flatnonzero(after.space.mask[9]), np.delete(plain.columns, first_right))
    assert torch.equal(info["added"]["subj09"], before.info[0]["added"]["subj09"])
    records = info["made_with"]["adapted"]
    assert records[0]["data_fingerprint"] == plain.data.fingerprint != records[1]["data_fingerprint"]
    assert {p.name for p in (tmp_path / "anna").iterdir()} == {"adapted.pt", "scores.json"}
    assert list(json.loads((tmp_path / "anna/scores.json").read_text()))[-1] == "cross_validated"


@pytest.mark.parametrize("fault, message", [
    ("no validation", "no validation pictures"), ("taken", "already has subj09"), ("elsewhere", "no vertices in common"),
    ("who", "expected one of subj09"),
])  # fmt: skip
def test_bad_input_leaves_nothing(fault, message, adapted, person_data, finetuned_dir, tmp_path):
    shutil.copytree(person_data, tmp_path / "data")
    path, options = tmp_path / "data/prepared.pt", dict(CHECKPOINT=finetuned_dir / "finetuned.pt")
    content = load_torch(path, prepare_data.FORMAT, "")
    if fault == "no validation":
        content["samples"]["split"][content["samples"]["split"] == 1] = 2
    elif fault == "elsewhere":
        content["space"]["vertices"] = content["space"]["vertices"] * 0 + torch.arange(
            len(content["space"]["vertices"])
        )
        content["space"]["vertices"] += 100000
    elif fault == "taken":
        options["CHECKPOINT"] = adapted / "adapted.pt"
    else:
        options["SUBJECT"] = "subj10"
    save_torch(path, content, prepare_data.FORMAT)
    with pytest.raises(UserError, match=message):
        run_stage(adapt, DATA_DIR=tmp_path / "data", OUTPUT_DIR=tmp_path / "out", **OPTIONS | options)
    assert not (tmp_path / "out").exists()
