"""A new person: the closed form against dense normal equations, the baseline against scikit-learn, scores against
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
from model import Encoder, Head, UserError, trunk_outputs
from predict import load_encoder
from tests.conftest import run_stage
from tools import adapt, evaluate, ridge
from tools.simulate import simulate

OPTIONS = dict(PRECISION="float32", DEVICE="cpu", N_DRAWS=2, BATCH_SIZE=16)
SEED = 7  # of the person's splits: some held-out pictures are training pictures of the others


def dense_solution(h, residual, rows, a, c=0.0, centre=0.0):
    """B, b of least norm that minimise sum |residual - E (B h + b)|² + a |B|² + c |E (B centre + b)|²."""
    latent_dim, pca_dim = h.shape[1], rows.shape[1]
    inputs, centre = np.c_[h, np.ones(len(h))], np.append(np.zeros(latent_dim) + centre, 1)
    system = np.kron(inputs.T @ inputs + c * np.outer(centre, centre), rows.T @ rows)
    system += a * np.diag(np.repeat([1.0, 0.0], [latent_dim * pca_dim, pca_dim]))
    solution = np.linalg.lstsq(system, (inputs.T @ residual @ rows).ravel(), rcond=1e-13)[0].reshape(-1, pca_dim).T
    return solution[:, :-1], solution[:, -1]


def problem(seed, n=14, n_vertices=9, level=1.0):
    """h (n, 5), residual, E (n_vertices, 4). With 9 of 40 vertices E's columns are far from orthonormal, with 3
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


def fit(h, residual, rows):
    """The product's B, b, a, c."""
    gains, components = adapt.decompose(torch.from_numpy(rows))
    targets = torch.from_numpy(residual @ rows) @ components
    person = SimpleNamespace(h=torch.from_numpy(h), targets=targets, gains=gains, components=components)
    return adapt.Person.fit(person, slice(None))


@pytest.mark.parametrize("n, n_vertices", [(14, 9), (4, 9), (14, 3)])
@pytest.mark.parametrize("a, c", [(1e-3, 0), (0.1, 3), (np.inf, 20), (np.inf, np.inf)])
def test_fit_is_the_dense_solution(n, n_vertices, a, c, monkeypatch):
    """More pictures than latent units and fewer; fewer vertices than components; infinite penalties: the group."""
    monkeypatch.setattr(adapt, "PENALTIES", [a])
    monkeypatch.setattr(adapt, "MEAN_PENALTIES", [c])
    h, residual, rows = problem(0, n=n, n_vertices=n_vertices)
    dense = dense_solution(h, residual, rows, absolute(h, min(a, 1e9)), min(c, 1e9), h.mean(0))
    for values, expected in zip(fit(h, residual, rows), dense):
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_penalties_have_the_least_leave_one_out_error(monkeypatch):
    """Each picture left out in turn and everything solved anew, densely; the centre of c stays all pictures' mean."""
    chosen, grid = [], (adapt.PENALTIES[:-1:3], adapt.MEAN_PENALTIES[:-1:2])
    monkeypatch.setattr(adapt, "PENALTIES", grid[0])
    monkeypatch.setattr(adapt, "MEAN_PENALTIES", grid[1])
    for seed in range(8):
        h, residual, rows = problem(seed, level=(0, 0.2, 1)[seed % 3])
        errors = dict.fromkeys(itertools.product(*grid), 0.0)
        for (a, c), i in itertools.product(errors, range(len(h))):
            others = np.arange(len(h)) != i
            weight, bias = dense_solution(h[others], residual[others], rows, absolute(h, a), c, h.mean(0))
            errors[a, c] += np.square(residual[i] - rows @ (weight @ h[i] + bias)).sum()
        chosen.append(fit(h, residual, rows)[2:])
        assert chosen[-1] == min(errors, key=errors.get)
    assert all(len(set(values)) > 1 for values in zip(*chosen))


@pytest.mark.parametrize("n, n_features", [(30, 80), (90, 40)])
def test_ridge_is_scikit_learns(n, n_features):
    """Penalty of every vertex as RidgeCV's leave-one-out chooses it, predictions of Ridge."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n + 20, n_features)) * rng.uniform(0.1, 30, n_features) + 5
    x[:, 3] = 2.0  # a feature that is always the same
    noise = rng.standard_normal((n + 20, 11)) * np.geomspace(0.1, 100, 11)
    y = x[:, :6] @ rng.standard_normal((6, 11)) / 20 + noise + 3
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


def test_the_baseline_has_what_our_map_has():
    """One penalty and a shrunk mean, by brute-force leave-one-out with scikit-learn."""
    rng = np.random.default_rng(0)
    x, y, n = rng.standard_normal((8, 12)), rng.standard_normal((8, 6)) + 0.1, 8
    z, errors = StandardScaler().fit_transform(x), {}

    def model(kept, a, c):
        """Penalty c on b: c pictures more with mean features and activity 0."""
        inputs, targets = np.vstack([z[kept], np.zeros(12)]), np.vstack([y[kept], np.zeros(6)])
        return Ridge(a * np.square(z).sum() / n).fit(inputs, targets, np.append(np.ones(len(kept)), c))

    for a, c in itertools.product([0.1, 1, 10, 100], adapt.MEAN_PENALTIES[:-1]):
        left_out = [model(np.delete(np.arange(n), i), a, c).predict(z[i : i + 1]) for i in range(n)]
        errors[a, c] = np.square(y - np.concatenate(left_out)).sum()
    a, c = min(errors, key=errors.get)
    assert c > 0  # with a free mean the predictions would be others
    features, activity = torch.from_numpy(x), torch.from_numpy(y)
    fitted = ridge.fit(features, activity, [0.1, 1, 10, 100], adapt.MEAN_PENALTIES[:-1], shared=True)
    np.testing.assert_allclose(ridge.predict(fitted, features), model(np.arange(n), a, c).predict(z), atol=1e-6)


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """Folder of subj09: lacks every fifth vertex on the right, has one on the left that nobody has, and numbers V1's
    parts the other way round. Every third picture has no nsd id."""
    folder = tmp_path_factory.mktemp("person")
    simulate(folder, subjects=[9], n_train=240, n_test=5, picture_size=80, vertex_step=16, seed=1)
    masks = folder / "subj09/roi_masks"
    for hemi in HEMIS:
        path = masks / f"{hemi}.all-vertices_fsaverage_space.npy"
        vertices = np.flatnonzero(np.load(path))
        keep = np.flatnonzero(np.arange(len(vertices)) % 5) if hemi == "rh" else np.r_[: len(vertices), 0]
        kept = vertices[keep] if hemi == "rh" else [*vertices, 163841]
        np.save(path, np.isin(np.arange(163842), kept).astype(int))
        for other in [*folder.rglob(f"{hemi}_*.npy"), *folder.rglob(f"{hemi}.*_challenge_space.npy")]:
            np.save(other, np.load(other)[..., keep])
        path = masks / f"{hemi}.prf-visualrois_challenge_space.npy"
        np.save(path, np.choose(np.load(path), [0, 2, 1, 3, 4, 5, 6, 7]))
    path = masks / "mapping_prf-visualrois.npy"
    names = np.load(path, allow_pickle=True).item()
    np.save(path, np.array(names | {1: names[2], 2: names[1]}, dtype=object))
    for path in sorted((folder / "subj09/training_split/training_images").iterdir())[2::3]:
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
    columns = np.array([place.get((i < data.space.n_lh, int(v)), -1) for i, v in enumerate(data.space.vertices)])
    known, columns = columns >= 0, columns[columns >= 0]
    functions = [encoder.latents, lambda features: ridge.pool_tokens(encoder.trunk, features)]
    h, features = (x.double().numpy() for x in trunk_outputs(encoder.trunk, data.images[data.image], functions))
    head = {name: value.double().numpy() for name, value in encoder.head.state_dict().items()}
    rows, mean = head["embed_weight"][columns], head["embed_bias"][columns]
    return SimpleNamespace(
        data=data, encoder=encoder, space=space, info=info, known=known, columns=columns, h=h, features=features,
        rows=rows, group=mean + h @ head["shared"].T @ rows.T, activity=data.activity[:, known].astype(np.float64),
        fresh=~np.isin(data.nsd_ids[data.image], info["train_nsd_ids"].numpy()), train=data.split == 0,
    )  # fmt: skip


def fit_plainly(p, chosen, a, c):
    """Predictions of all pictures by the dense solution from those chosen."""
    h = p.h[chosen]
    weight, bias = dense_solution(h, (p.activity - p.group)[chosen], p.rows, absolute(h, a), min(c, 1e6), h.mean(0))
    return p.group + (p.h @ weight.T + bias) @ p.rows.T


def median_r2(p, scored, prediction):
    return np.median(r2_score(p.activity[scored], prediction[scored], multioutput="raw_values"))


def test_the_persons_prediction_is_the_least_squares_solution(adapted, plain, person):
    encoder, space, info = load_checkpoint(adapted / "adapted.pt")
    assert info["made_with"]["adapted"][0]["data_fingerprint"] == plain.data.fingerprint
    assert space.subjects == [*plain.space.subjects, "subj09"] and plain.known.sum() == len(plain.known) - 1
    assert np.array_equal(np.flatnonzero(space.mask[8]), plain.columns)
    [record] = info["made_with"]["adapted"]
    expected = fit_plainly(plain, plain.train, float(record["a"]), float(record["c"]))
    prediction = encoder.predict(torch.from_numpy(plain.h).float(), 8).detach()[:, plain.columns]
    np.testing.assert_allclose(prediction, expected, atol=2e-3 * np.abs(expected).max())
    assert torch.equal(info["added"]["subj09"], torch.from_numpy(plain.data.nsd_ids[plain.data.image[plain.train]]))
    assert torch.equal(info["train_nsd_ids"], plain.info["train_nsd_ids"])  # nobody else was trained on the person's
    # areas are matched by their names
    roi, masks = space.rois["prf-visualrois"], person / "subj09/roi_masks"
    assert torch.equal(roi["labels"][:8], plain.space.rois["prf-visualrois"]["labels"])
    labels = np.concatenate([np.load(masks / f"{hemi}.prf-visualrois_challenge_space.npy") for hemi in HEMIS])
    names = np.load(masks / "mapping_prf-visualrois.npy", allow_pickle=True).item()
    expected = [names[label] for label in labels[plain.known]]
    assert [roi["names"][int(v)] for v in roi["labels"][8, plain.columns]] == expected
    assert {"V1v", "V1d"} <= set(expected)


def test_everybody_else_is_predicted_as_before(adapted, plain, finetuned_dir, run_dir):
    """Bit for bit, with the trunk that phase 2 trained."""
    paths = finetuned_dir / "finetuned.pt", adapted / "adapted.pt"
    before, after = (load_encoder(path, "cpu", "float32") for path in paths)
    images, phase_1 = plain.data.images[:5], load_checkpoint(run_dir / "head.pt")[0].trunk.state_dict()
    for s in [*range(8), None]:
        assert torch.equal(before.decode(before.latents(images), s), after.decode(after.latents(images), s))
    trunks = [predictor.encoders[0].trunk.state_dict() for predictor in (before, after)]
    assert all(torch.equal(trunks[0][name], trunks[1][name]) for name in phase_1)
    assert any(not torch.equal(trunks[1][name], phase_1[name]) for name in phase_1)


def test_curve(adapted, plain):
    """Group, adapted map and ridge at full size, on held-out pictures that nobody was trained on."""
    scored, n = ~plain.train & plain.fresh, plain.train.sum()
    assert 2 < scored.sum() < (~plain.train).sum()
    table = pd.read_csv(adapted / "curve.csv")
    record = json.loads((adapted / "scores.json").read_text())
    x, y = (torch.from_numpy(v[plain.train]) for v in (plain.features, plain.activity))
    baseline = ridge.fit(x, y, adapt.PENALTIES, adapt.MEAN_PENALTIES, shared=True)
    predictions = {
        "group": plain.group,
        "adapted": fit_plainly(plain, plain.train, float(record["a"]), float(record["c"])),
        "ridge": ridge.predict(baseline, torch.from_numpy(plain.features)).numpy(),
    }
    for method, prediction in predictions.items():
        [value] = table[(table.n_pictures == n) & (table.method == method)].median_r2
        assert value == pytest.approx(median_r2(plain, scored, prediction), abs=2e-3)
    draws = table[(table.n_pictures == 10) & (table.method == "adapted")].median_r2
    assert sorted(set(table.n_pictures)) == [10, 30, n] and len(draws) == draws.nunique() == 2


def test_scores_are_those_of_evaluation(adapted, plain, person, person_data, tmp_path):
    scores = json.loads((adapted / "scores.json").read_text())
    assert scores["n_left_out"] == (~plain.train & ~plain.fresh).sum() > 0
    run_stage(
        evaluate, DATA_DIR=person_data, CHECKPOINT=adapted / "adapted.pt", CHALLENGE_DIR=person, FIGURES=False,
        OUTPUT_DIR=tmp_path / "scores", DEVICE="cpu", PRECISION="float32",
    )  # fmt: skip
    evaluated = json.loads((tmp_path / "scores/scores.json").read_text())
    numbers, held_out = evaluated["scores"]["subject"]["subj09"]["r2"], scores["held_out"]
    assert evaluated["n_images"] == {"subj09": held_out["n_pictures"]} == {"subj09": (~plain.train & plain.fresh).sum()}
    assert held_out["median_r2"] == pytest.approx(numbers["median"], abs=1e-5)
    assert held_out["interval"] == pytest.approx(numbers["median_95"], abs=1e-5)


def test_cross_validation_never_fits_to_what_it_scores(adapted, plain):
    scores = json.loads((adapted / "scores.json").read_text())["cross_validated"]
    fold = np.random.default_rng(0).permutation(len(plain.h)) % adapt.N_FOLDS
    prediction = np.empty_like(plain.activity)
    for k in range(adapt.N_FOLDS):
        penalties = fit(plain.h[fold != k], (plain.activity - plain.group)[fold != k], plain.rows)[2:]
        prediction[fold == k] = fit_plainly(plain, fold != k, *penalties)[fold == k]
    assert scores["n_pictures"] == plain.fresh.sum()
    assert scores["interval"][0] < scores["median_r2"] < scores["interval"][1]
    assert scores["median_r2"] == pytest.approx(median_r2(plain, plain.fresh, prediction), abs=2e-3)


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
    trunk, old = plain.encoder.trunk, plain.encoder.head
    head = ChangedHead(trunk.feature_shapes, old.shared.shape[1], len(old.shared), 8, len(old.embed_bias))
    head.load_state_dict(old.state_dict(), strict=False)
    info = {key: plain.info[key] for key in ("made_with", "scores", "step", "finished", "train_nsd_ids")}
    save_checkpoint(tmp_path / "changed.pt", Encoder(trunk, head).eval(), space=plain.space, **info)
    run_stage(adapt, DATA_DIR=person_data, CHECKPOINT=tmp_path / "changed.pt", OUTPUT_DIR=tmp_path / "out", **OPTIONS)
    state = load_checkpoint(tmp_path / "out/adapted.pt")[0].head.state_dict()
    assert state.keys() == head.state_dict().keys() and len(state["subject_bias"]) == 9
    for name, value in head.state_dict().items():
        assert torch.equal(state[name][:8] if name.startswith("subject_") else state[name], value)


def test_one_person_after_another(adapted, person, plain, tmp_path):
    shutil.copytree(person / "subj09", tmp_path / "anna")
    run_stage(prepare_data, CHALLENGE_DIR=tmp_path, DATA_DIR=tmp_path / "data", SUBJECTS="anna", SEED=SEED)
    options = OPTIONS | dict(CHECKPOINT=adapted / "adapted.pt", OUTPUT_DIR=tmp_path / "out")
    run_stage(adapt, DATA_DIR=tmp_path / "data", **options)
    before, after = (load_encoder(path / "adapted.pt", "cpu", "float32") for path in (adapted, tmp_path / "out"))
    images = plain.data.images[:5]
    assert torch.equal(before.decode(before.latents(images), 8), after.decode(after.latents(images), 8))
    assert after.subjects[8:] == ["subj09", "anna"]
    assert torch.equal(after.space.mask[9], after.space.mask[8])
    info = after.info[0]
    assert torch.equal(info["added"]["subj09"], before.info[0]["added"]["subj09"]) and len(info["added"]["anna"])
    assert [record["subject"] for record in info["made_with"]["adapted"]] == ["subj09", "anna"]


@pytest.mark.parametrize("fault, message", [
    ("no validation", "no validation pictures"), ("taken", "whose name is not in"),
    ("elsewhere", "no vertices in common"),
])  # fmt: skip
def test_bad_input_leaves_nothing(fault, message, adapted, person_data, finetuned_dir, tmp_path):
    shutil.copytree(person_data, tmp_path / "data")
    path = tmp_path / "data/prepared.pt"
    checkpoint = adapted / "adapted.pt" if fault == "taken" else finetuned_dir / "finetuned.pt"
    content = load_torch(path, prepare_data.FORMAT, "")
    if fault == "no validation":
        content["samples"]["split"][content["samples"]["split"] == 1] = 2
    elif fault == "elsewhere":
        content["space"]["vertices"] = 100000 + torch.arange(len(content["space"]["vertices"]))
    save_torch(path, content, prepare_data.FORMAT)
    with pytest.raises(UserError, match=message):
        run_stage(adapt, DATA_DIR=tmp_path / "data", CHECKPOINT=checkpoint, OUTPUT_DIR=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
