"""The stages for real on the simulated folder, and what they leave looked at from several sides."""

import copy
import csv
import dataclasses
import json
import math
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from PIL import Image
from sklearn.decomposition import PCA

import evaluate
import finetune
import fit_pca
import model
import predict
import prepare_data
import train_head
from checkpoint import load_checkpoint, save_checkpoint
from common import Problem
from model import Crops
from shared_fixtures import (
    assert_equal, beit_attention, block_outputs, both, hemis, plain_input, r2_of_vertices, run, small, trained,
)  # fmt: skip


def open_resized(path):
    return np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BICUBIC))


beside = {"submission.zip", "pictures.csv", "predictions.json"}  # of the subjects' folders


# ---- preparation and PCA ------------------------------------------------------------------------


def test_prepared_data_are_the_files(prepared, subjects):
    data, facts_of_id = prepare_data.load(prepared), {}
    assert data.space.subjects == list(subjects) == [f"subj{i:02d}" for i in range(1, 9)]
    for s, files in enumerate(subjects.values()):
        rows = np.flatnonzero(data.subject == s)
        found = data.read_activity(rows)
        assert found.dtype == np.float16 and np.array_equal(found, files.common.astype(np.float16))
        assert np.array_equal(np.flatnonzero(data.space.mask[s]), files.present)
        assert all(np.array_equal(data.space.hemisphere(s, h), files.columns[h]) for h in hemis)
        for row, path in zip(rows, files.pictures, strict=True):
            assert np.array_equal(data.images[data.image[row]], open_resized(path))
            facts_of_id.setdefault(path.stem.split("nsd-")[1], set()).add((data.split[row], data.image[row]))
        for row, path in zip(np.flatnonzero(data.test_subject == s), files.test_pictures, strict=True):
            assert np.array_equal(data.images[data.test_image[row]], open_resized(path))
        assert all(len(data.samples(split, s)) for split in ("train", "val", "test"))
    assert data.space.mask[5].sum() < data.space.mask[7].sum() < data.space.n_vertices  # subj06, subj08
    assert all(len(facts) == 1 for facts in facts_of_id.values())  # one split and one row, whoever saw it
    assert len(facts_of_id) == data.n_training_images < len(data.subject)
    assert np.array_equal(data.read_training_images(), data.images[: data.n_training_images])
    # float16 moves no vertex's R² by more than 1e-4; over all samples, as many as a real validation split has
    exact, stored = np.concatenate([files.common for files in subjects.values()]), np.array(data.activity)
    prediction = 0.5 * exact + 0.3 * np.random.default_rng(0).standard_normal(exact.shape)
    r2 = [r2_of_vertices(y, prediction) for y in (exact, stored)]
    assert 0 < np.abs(r2[0] - r2[1]).max() < 1e-4 and np.median(r2[0]) > 0.3


def test_regions_are_the_files(prepared, challenge, subjects):
    space = prepare_data.load(prepared).space
    assert set(space.rois) == {"streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words"}
    for group, roi in space.rois.items():
        for s, (name, files) in enumerate(subjects.items()):
            masks, expected = challenge / name / "roi_masks", np.zeros(space.n_vertices)
            assert roi["names"] == np.load(masks / f"mapping_{group}.npy", allow_pickle=True).item()
            for h in hemis:
                expected[files.columns[h]] = np.load(masks / f"{h}.{group}_challenge_space.npy")
            assert np.array_equal(roi["labels"][s], expected)


def test_vertex_space_from_the_masks_alone(challenge, prepared, tmp_path):
    ours = prepare_data.find_space(tmp_path, challenge)
    expected = prepare_data.find_space(prepared, tmp_path)
    assert_equal(vars(ours), vars(expected))
    assert prepare_data.find_space(tmp_path, tmp_path) is None


def test_subset_of_subjects(challenge, subset, subjects, tmp_path):
    found, two = prepare_data.load(subset), [subjects["subj06"], subjects["subj08"]]
    assert found.space.subjects == ["subj06", "subj08"] and set(found.test_subject) == {0}
    n_vertices = sum((two[0].mask[h] | two[1].mask[h]).sum() for h in hemis)
    assert found.space.n_vertices == n_vertices < two[0].common.shape[1]
    # the same chosen by name from the whole folder; splits depend on pictures and seed only
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path), SUBJECTS="subj08, subj06", SEED=4)
    chosen = prepare_data.load(tmp_path)
    for name in ("activity", "subject", "image", "split"):
        assert np.array_equal(getattr(chosen, name), getattr(found, name)), name
    assert set(chosen.test_subject) == {0, 1}


def test_activity_that_float16_would_spoil_stays_float32(challenge, tmp_path):
    shutil.copytree(challenge / "subj08", tmp_path / "challenge" / "subj08")
    path = tmp_path / "challenge/subj08/training_split/training_fmri/rh_training_fmri.npy"
    activity = np.load(path)
    activity[:, 2] += 1000
    np.save(path, activity)
    run(prepare_data, CHALLENGE_DIR=str(tmp_path / "challenge"), DATA_DIR=str(tmp_path / "data"))
    data = prepare_data.load(tmp_path / "data")
    found = data.read_activity(np.arange(len(activity)))[:, data.space.hemisphere(0, "rh")]
    assert found.dtype == np.float32 and np.array_equal(found, activity)


@pytest.mark.parametrize("which", ["fitted", "subset"])
def test_pca_is_scikit_learns(which, request):
    folder = request.getfixturevalue(which)
    data = prepare_data.load(folder)
    pca = fit_pca.load(folder, data)
    activity, n = data.activity.astype(float), pca.components.shape[1]
    train = activity[data.samples("train")]
    assert (len(train) < data.space.n_vertices) == (which == "subset")
    reference = PCA(svd_solver="full").fit(train)
    basis, mean = pca.components.double().numpy(), pca.mean.double().numpy()
    # float32, and enough passes (fitted) or rank within the block (subset): equal but for rounding
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(reference.components_[:n] @ basis)[1], 1, atol=1e-5)  # same subspace
    np.testing.assert_allclose(pca.explained_variance, reference.explained_variance_[:n], rtol=1e-5)
    np.testing.assert_allclose(pca.total_variance, reference.explained_variance_.sum(), rtol=1e-5)
    signs = np.sign((reference.components_[:5].T * basis[:, :5]).sum(0))
    np.testing.assert_allclose(basis[:, :5] * signs, reference.components_[:5].T, atol=1e-3)  # and order

    # targets: the loss of any z is the one over the vertices
    z = np.random.default_rng(0).standard_normal((len(activity), n))
    expected = ((z @ basis.T + mean - activity) ** 2).mean(1)
    found = (((z - pca.latents.double().numpy()) ** 2).sum(1) + pca.residual.numpy()) / data.space.n_vertices
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # single samples, targets as float16
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=1e-4)

    # the bound on every model: what the basis leaves of the validation split
    scores = []
    for s, mask in enumerate(data.space.mask.numpy()):
        y = activity[data.samples("val", s)]
        scores.append(r2_of_vertices(y, (y - mean) @ basis @ basis.T + mean)[mask])
    assert abs(pca.val_r2 - np.median(np.concatenate(scores))) < 1e-3  # of four pictures, targets as float16


def test_default_passes_of_the_pca_are_enough(fitted):
    """A flat spectrum, the hardest case: more variance than scikit-learn's solver finds with twice the products."""
    data = prepare_data.load(fitted)
    rows = data.samples("train")
    train = data.activity[rows].astype(float)
    components, _ = fit_pca.fit(fit_pca.Activity(data, rows, torch.device("cpu")), 24, fit_pca.PASSES, 0)
    best = PCA(24, svd_solver="full").fit(train)
    other = PCA(24, svd_solver="randomized", iterated_power=3, random_state=0).fit(train)  # 8 products
    total = best.explained_variance_.sum()
    ours, theirs = (
        1 - (train @ b).var(0, ddof=1).sum() / total for b in (components.double().numpy(), other.components_.T)
    )
    assert -1e-6 < ours < theirs < 0.01


# ---- training -----------------------------------------------------------------------------------


def test_held_out_pictures_that_somebody_was_trained_on_are_not_scored(fitted, challenge, monkeypatch):
    """Of the organisers' pictures, too."""
    monkeypatch.setattr(evaluate, "CHALLENGE_DIR", str(challenge))
    data = prepare_data.load(fitted)
    rows = data.test_image[data.test_subject == 0]
    data = dataclasses.replace(data, trained_nsd_ids=data.nsd_id[rows[:2]])
    assert evaluate.read_split(data, "challenge", 0)[0].tolist() == rows[2:].tolist()
    assert not set(rows[:2]) & set(evaluate.all_pictures(data, "challenge"))


def test_training_sees_the_training_samples_with_their_targets(phase_1, fitted, subjects):
    """Batches against the files: every sample once an epoch, nothing of the other splits."""
    data = prepare_data.load(fitted)
    pca = fit_pca.load(fitted, data)
    seen = {name: torch.cat([b[name] for b in phase_1.batches]) for name in phase_1.batches[0]}
    row_of = {  # a sample is its subject and the bytes of its picture
        (s, open_resized(path).tobytes()): row
        for s, files in enumerate(subjects.values())
        for row, path in zip(np.flatnonzero(data.subject == s), files.pictures, strict=True)
    }
    rows = [row_of[s, x.numpy().tobytes()] for s, x in zip(seen["subject"].tolist(), seen["images"])]
    train = np.flatnonzero(data.split == 0)
    assert len(rows) == 8 * 48 > len(train)
    assert len({tuple(batch["size"].tolist()) for batch in phase_1.batches}) == 8  # every step has crops of its own
    assert sorted(rows[: len(train)]) == train.tolist() and set(rows) == set(train)
    y = np.concatenate([files.common for files in subjects.values()])[rows]
    z = (y - pca.mean.numpy()) @ pca.components.numpy()
    np.testing.assert_allclose(seen["latents"], z, rtol=1e-2, atol=1e-2)  # stored as float16
    assert seen["size"].min() >= model.smallest_crop(0.8) and len(torch.unique(seen["size"])) > 20


def test_phase_1_trains_the_head_only(phase_1, fitted):
    parameters, state = dict(phase_1.encoder.named_parameters()), phase_1.before
    embedding = {"head.embed_weight", "head.embed_bias"}
    assert phase_1.trainable == {n for n in parameters if n.startswith("head.")} - embedding
    # all else is bit for bit what it was, but for batch norm's statistics
    assert phase_1.changed == {n for n in state if n.startswith("head.")} - embedding
    assert len(phase_1.trainable) == 2 * 4 + 3 and len(phase_1.changed) == 2 * 7 + 3
    assert phase_1.encoder.head.dropout == both["FEATURE_DROPOUT"]
    pca = fit_pca.load(fitted, prepare_data.load(fitted))
    assert torch.equal(parameters["head.embed_weight"], pca.components)
    assert torch.equal(parameters["head.embed_bias"], pca.mean)


def test_phase_2_trains_attention_and_head(phase_1, phase_2):
    attention = {f"trunk.vit.blocks.{i}.attn.{n}" for i in range(3) for n in beit_attention}
    assert phase_2.trainable == phase_1.trainable | attention
    assert phase_2.changed == phase_1.changed | attention
    assert phase_2.encoder.head.dropout == both["FEATURE_DROPOUT"]
    for name, before in phase_2.before.items():  # it started from the trunk of phase 1
        assert not name.startswith("trunk.") or torch.equal(before, phase_1.before[name])


def test_checkpoints_hold_what_was_trained(phase_1, phase_2, fitted):
    sizes = {n: v.numel() * v.element_size() for n, v in phase_1.encoder.state_dict().items()}
    head, trunk = (sum(v for n, v in sizes.items() if n.startswith(part)) for part in ("head.", "trunk."))
    run_dir = fitted.parent / "run"
    assert (run_dir / "head.pt").stat().st_size < head + 200_000 < trunk  # the rest: space, ROIs, settings
    assert torch.load(run_dir / "head.pt", weights_only=True)["trunk"] == {}
    found = torch.load(run_dir / "finetuned.pt", weights_only=True)["trunk"]
    assert {"trunk." + n for n in found} == {n for n in phase_2.trainable if n.startswith("trunk.")}


@pytest.mark.parametrize("phase", ["phase_1", "phase_2"])
@torch.no_grad()
def test_checkpoint_round_trip(phase, request, fitted, tmp_path):
    encoder, space = request.getfixturevalue(phase).encoder.eval(), prepare_data.load(fitted).space
    made = dict(made_with={"SEED": 0}, scores={"val_r2": 0.5}, step=7)
    save_checkpoint(tmp_path / "encoder.pt", encoder, space=space, **made)
    loaded, found_space, about = load_checkpoint(tmp_path / "encoder.pt")
    assert {n: about[n] for n in made} == made
    assert found_space.subjects == space.subjects and torch.equal(found_space.mask, space.mask)
    images = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for subject in (torch.arange(8), None):
        z = encoder(images, subject)
        assert torch.equal(loaded(images, subject), z)
        assert torch.equal(loaded.head.decode(z), encoder.head.decode(z))


def plain_adamw(phase, *, micro_batch, betas, weight_decay, rates):
    """Adam with decoupled weight decay on the squared error over all vertices, in float64, from the same
    weights and batches -> {name: parameter of the head}."""
    head, trunk = copy.deepcopy(phase.encoder.head).train().double(), phase.encoder.trunk
    head.load_state_dict({n.removeprefix("head."): v for n, v in phase.before.items() if n.startswith("head.")})
    crops = Crops(trunk, model.smallest_crop(0.8))
    parameters = {n: p for n, p in head.named_parameters() if "head." + n in phase.trainable}
    first, second = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    for t, (batch, rate) in enumerate(zip(phase.batches, rates, strict=True), start=1):
        head.zero_grad()
        n = len(batch["subject"])
        for start in range(0, n, micro_batch):  # one after the other, as batch norm sees them
            part = {name: v[start : start + micro_batch] for name, v in batch.items()}
            with torch.no_grad():
                features = trunk(crops(part["images"], part["top"], part["left"], part["size"]))
            z = head([x.double() for x in features], part["subject"])
            error = z @ head.embed_weight.T + head.embed_bias - part["activity"].double()
            (error.square().sum() / (n * error.shape[1])).backward()
        for name, p in parameters.items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * p.grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * p.grad**2
            step = first[name] / (1 - betas[0] ** t) / ((second[name] / (1 - betas[1] ** t)).sqrt() + 1e-8)
            p.data -= rate * (weight_decay * p.data + step)
    return parameters


def test_trained_embedding_on_a_subset(subset, tmp_path, capsys):
    """Loss in vertex space, micro-batches, AdamW, prediction from head.pt, phase 2 that keeps the embedding."""
    folders = dict(DATA_DIR=str(subset), RUN_DIR=str(tmp_path / "run"))
    options = folders | both | dict(BATCH_SIZE=20, MICRO_BATCH=10, FEATURE_DROPOUT=0.0, STEPS=3, WARMUP_STEPS=1)
    options |= dict(LEARNING_RATE=0.01, MIN_LEARNING_RATE=0.002, BETAS=(0.8, 0.9), WEIGHT_DECAY=0.5)
    loaded, load = [], fit_pca.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_pca, "load", lambda *arguments: loaded.append(load(*arguments)) or loaded[-1])
        head = trained(train_head, **options, **small, TRAIN_EMBEDDING=True)
    pca = load(subset, prepare_data.load(subset))  # others use the PCA's memory, which is not trained
    assert torch.equal(loaded[0].components, pca.components) and torch.equal(loaded[0].mean, pca.mean)
    embedding = {"head.embed_weight", "head.embed_bias"}
    assert embedding < head.trainable and len(head.trainable) == 2 * 4 + 3 + 2
    rates = [0.002, 0.01, 0.006]  # the minimum, the peak, half of the way down
    expected = plain_adamw(head, micro_batch=10, betas=(0.8, 0.9), weight_decay=0.5, rates=rates)
    for name, p in head.encoder.head.named_parameters():
        # a weight whose gradient drowns in float32's rounding may step anywhere; there are few
        assert (p - expected[name]).norm() < 0.01 * (p - head.before["head." + name]).norm(), name

    capsys.readouterr()
    run(predict, **folders, SUBMISSION_DIR=str(tmp_path / "submission"), DEVICE="cpu")
    text = capsys.readouterr().out
    assert f"predicting with {tmp_path / 'run/head.pt'}" in text and "subj08: no test pictures" in text
    assert {path.name for path in (tmp_path / "submission").glob("[!.]*")} == {"subj06", *beside}

    tuned = trained(finetune, **options)
    assert not embedding & (tuned.trainable | tuned.changed)
    written = load_checkpoint(tmp_path / "run/head.pt")[0].head.state_dict()
    assert all(torch.equal(tuned.before["head." + n], v) for n, v in written.items())


# ---- predictions and scores ---------------------------------------------------------------------


@torch.no_grad()
def plain_prediction(encoder, paths, subject):
    """(n_pictures, n_vertices): files one by one through Pillow, torchvision and the encoder."""
    inputs = (plain_input(open_resized(path), encoder.trunk) for path in paths)
    z = torch.cat([encoder(x[None], torch.tensor([subject])) for x in inputs])
    return (z @ encoder.head.embed_weight.T + encoder.head.embed_bias).numpy()


def plain_scores(checkpoint, prepared, subjects, split):
    """Loss, median R² over all subjects, then of each: scikit-learn on the files."""
    encoder, data, scores, errors = load_checkpoint(checkpoint)[0], prepare_data.load(prepared), [], []
    for s, files in enumerate(subjects.values()):
        chosen = np.flatnonzero(data.split[data.subject == s] == ("train", "val", "test").index(split))
        prediction = plain_prediction(encoder, [files.pictures[i] for i in chosen], s)
        scores.append(r2_of_vertices(files.common[chosen][:, files.present], prediction[:, files.present]))
        errors.extend(((prediction - files.common[chosen]) ** 2).mean(1))
    return np.mean(errors), [np.median(np.concatenate(scores)), *map(np.median, scores)]


@pytest.mark.parametrize(
    "stage, output, steps", [("train_head", "head.pt", [0, 3, 6, 8]), ("finetune", "finetuned.pt", [0, 4])]
)
def test_log_and_best_checkpoint(stage, output, steps, phase_2, fitted, subjects):
    run_dir, keys = fitted.parent / "run", ["val_r2", *(f"val_r2_{name}" for name in subjects)]
    log = [json.loads(line) for line in (run_dir / f"{stage}.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == steps
    assert all({"train_loss", "val_loss", *keys} <= set(entry) for entry in log)
    assert log[0]["train_loss"] is None and all(0 < entry["train_loss"] < 10 for entry in log[1:])
    best = max(log, key=lambda entry: entry["val_r2"])
    assert load_checkpoint(run_dir / output)[2]["step"] == best["step"]
    loss, scores = plain_scores(run_dir / output, fitted, subjects, "val")
    # R² of four pictures magnifies the rounding of activity to float16
    np.testing.assert_allclose([best[key] for key in keys], scores, atol=1e-3)
    np.testing.assert_allclose(best["val_loss"], loss, rtol=1e-4)
    if stage == "finetune":  # begins where phase 1 was best
        phase_1 = [json.loads(line) for line in (run_dir / "train_head.jsonl").read_text().splitlines()]
        assert math.isclose(log[0]["val_r2"], max(entry["val_r2"] for entry in phase_1), abs_tol=1e-5)
    assert Image.open(run_dir / f"{stage}.png").format == "PNG"


def test_submission_file_by_file(submission, subjects, fitted):
    files = {path.relative_to(submission).as_posix() for path in submission.rglob("*.npy")}
    assert files == {f"{name}/{h}_pred_test.npy" for name in subjects for h in hemis}
    assert {path.name for path in submission.glob("[!.]*")} == {*subjects, *beside}
    encoder = load_checkpoint(fitted.parent / "run" / "finetuned.pt")[0]
    with zipfile.ZipFile(submission / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(files)
        for s, (name, of_subject) in enumerate(subjects.items()):
            expected = plain_prediction(encoder, of_subject.test_pictures, s)  # in sorted order
            assert len(expected) == len(of_subject.test_pictures)
            for h in hemis:
                path = submission / name / f"{h}_pred_test.npy"
                found = np.load(path)
                assert archive.read(f"{name}/{path.name}") == path.read_bytes()
                assert found.dtype == np.float32 and found.shape == (len(expected), of_subject.mask[h].sum())
                # float32 in batches of other sizes; pictures differ by far more
                np.testing.assert_allclose(found, expected[:, of_subject.columns[h]], rtol=0, atol=1e-4)
                assert np.abs(found[0] - found[1:]).max(1).min() > 1e-2


def test_private_test_scores(submission, subjects, fitted):
    found = json.loads((fitted.parent / "submission_scores.json").read_text())
    loss, scores = plain_scores(fitted.parent / "run" / "finetuned.pt", fitted, subjects, "test")
    np.testing.assert_allclose(found["test_loss"], loss, rtol=1e-4)
    # two or three pictures a subject: R² of minus some tens
    np.testing.assert_allclose([found["test_r2"], *(found[f"test_r2_{s}"] for s in subjects)], scores, rtol=2e-3)


def original_test(challenge, subject, kind="test_fmri/{}_test_fmri.npy"):
    """A subject's held-out activity (n_images, n_vertices) or ceilings, left hemisphere first."""
    return np.concatenate([np.load(challenge / subject / "test_split" / kind.format(h)) for h in hemis], axis=-1)


def test_nothing_to_score_is_told(fitted, capsys):
    """Where a checkpoint, such as one adapted to all of a person's pictures, was trained on all that are there."""
    data = prepare_data.load(fitted)
    data = dataclasses.replace(data, trained_nsd_ids=data.nsd_id)
    with pytest.raises(Problem, match="no pictures to score in val: the checkpoint was trained on all there are"):
        evaluate.measure(data, "val", None, None)
    assert predict.score_private_test(SimpleNamespace(checkpoints=[]), data) == {}
    assert "no private test scores" in capsys.readouterr().out


def test_scores_are_scikit_learns_and_scipys(submission, challenge, fitted, subjects, tmp_path):
    """Of the submission against the files of the organisers' held-out data; the checkpoint's are the same."""
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(fitted.parent / "run"), CHALLENGE_DIR=str(challenge), DEVICE="cpu")
    ceilings = tmp_path / "percent"
    for name in subjects:
        for hemi in hemis:
            path = Path(name, "test_split/noise_ceiling", f"{hemi}_noise_ceiling.npy")
            (ceilings / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(ceilings / path, 100 * np.load(challenge / path))
    folders |= dict(FIGURES=False, RESAMPLES=20)
    run(evaluate, **folders, SUBMISSION=str(submission), OUTPUT_DIR=str(tmp_path / "a"))
    run(evaluate, **folders, SPLIT="challenge", OUTPUT_DIR=str(tmp_path / "b"), PRECISION="float32",
        NOISE_CEILING_DIR=str(ceilings))  # fmt: skip
    a, b = (np.load(tmp_path / x / "vertices.npz") for x in "ab")
    expected = {"r2": [], "r": [], "challenge": []}
    for s, name in enumerate(subjects):
        y, ceiling = (
            original_test(challenge, name),
            original_test(challenge, name, "noise_ceiling/{}_noise_ceiling.npy"),
        )
        mine = subjects[name].present
        prediction = np.concatenate([np.load(submission / name / f"{h}_pred_test.npy") for h in hemis], axis=1)
        expected["r2"].append(r2_of_vertices(y, prediction))
        r = np.array([scipy.stats.pearsonr(*pair).statistic for pair in zip(y.T, prediction.T)])
        expected["r"].append(r)
        expected["challenge"].append(np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1))
        for metric, values in expected.items():
            found = a[f"subject_{metric}"][s]
            np.testing.assert_allclose(found[mine], values[-1], rtol=1e-5, atol=1e-5)
            assert np.isnan(np.delete(found, mine)).all()
            # other batch sizes; a small r over a ceiling of nearly nothing magnifies that
            np.testing.assert_allclose(b[f"subject_{metric}"][s][mine], values[-1], rtol=1e-2, atol=1e-3)
    scores = json.loads((tmp_path / "a/scores.json").read_text())["scores"]["subject"]
    for metric, parts in expected.items():
        whole = np.concatenate(parts)
        found = {key: scores["all"][metric][key] for key in ("median", "mean")}
        assert found == pytest.approx({"median": np.median(whole), "mean": np.mean(whole)}, abs=1e-5)
        assert scores["subj06"][metric]["mean"] == pytest.approx(parts[5].mean(), abs=1e-5)
    rows = list(csv.DictReader((tmp_path / "a/scores.csv").open()))
    where = dict(
        subject="subj02", hemisphere="rh", roi_group="prf-visualrois", roi="V2v", metric="r", prediction="subject"
    )
    (row,) = (row for row in rows if where.items() <= row.items())
    labels = np.load(challenge / "subj02/roi_masks/rh.prf-visualrois_challenge_space.npy")
    v2v = expected["r"][1][-len(labels) :][labels == 3]
    assert int(row["n_vertices"]) == len(v2v) and float(row["mean"]) == pytest.approx(v2v.mean(), abs=1e-5)
    assert len(json.loads((tmp_path / "b/scores.json").read_text())["scores"]["group"]) == 9


def test_a_submission_with_holes_is_refused(submission, fitted, challenge, tmp_path):
    shutil.copytree(submission, tmp_path / "submission")
    path = tmp_path / "submission/subj02/lh_pred_test.npy"
    prediction = np.load(path)
    prediction[1, 3] = np.nan
    np.save(path, prediction)
    with pytest.raises(Problem, match="1 values are NaN"):
        run(evaluate, DATA_DIR=str(fitted), CHALLENGE_DIR=str(challenge), SUBMISSION=str(path.parents[1]), DEVICE="cpu",
            OUTPUT_DIR=str(tmp_path / "scores"))  # fmt: skip
    assert not (tmp_path / "scores").exists()


@torch.no_grad()
def test_authors_weights(tmp_path, monkeypatch):
    """Their file (README) predicts by their formula: embed on either term, each with its bias."""
    create = timm.create_model  # their trunk, narrower for speed
    monkeypatch.setattr(timm, "create_model", lambda *a, **options: create(*a, **options, embed_dim=96, num_heads=3))
    torch.manual_seed(1)
    vit, shapes = timm.create_model(train_head.TRUNK, pretrained=False), {}
    for i in range(6):
        shapes |= {f"feat_projs.{i}.proj.weight1": (5, 257), f"feat_projs.{i}.proj.weight2": (5, 96)}
        shapes |= {f"feat_projs.{i}.norm.{n}": (5,) for n in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"shared_proj.weight": (4, 5), "subj_proj.fc.weight": (8 * 4, 5), "subj_proj.fc.bias": (8 * 4,)}
    shapes |= {"embed.weight": (9, 4), "embed.bias": (9,)}
    w = {name: 0.1 + torch.rand(shape) for name, shape in shapes.items()}
    w |= {f"feat_projs.{i}.norm.num_batches_tracked": torch.tensor(7) for i in range(6)}
    content = {"epoch": 3, "metric": np.float64(0.2), "trunk": vit.state_dict(), "encoder": w}
    torch.save(content, tmp_path / "theirs.pt")
    space = model.Space(["subj02", "subj05"], torch.arange(9), 4, torch.ones(2, 9, dtype=torch.bool), {})
    encoder, _, _ = load_checkpoint(tmp_path / "theirs.pt", space=space)

    images, h = torch.randn(2, 3, 224, 224), 0
    features = block_outputs(vit, images)
    for i in range(6):
        s, c = (w[f"feat_projs.{i}.proj.{n}"] for n in ("weight1", "weight2"))
        norm = (w[f"feat_projs.{i}.norm.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
        weight, bias, mean, var = norm
        p = torch.einsum("dt,dc,ntc->nd", s, c, features[2 * i])
        h = h + ((p - mean) / (var + 1e-5).sqrt() * weight + bias) / 6
    own_weight, own_bias = (w[f"subj_proj.fc.{n}"].unflatten(0, (8, 4))[[1, 4]] for n in ("weight", "bias"))
    shared = h @ w["shared_proj.weight"].T @ w["embed.weight"].T + w["embed.bias"]
    own = torch.einsum("npd,nd->np", own_weight, h) + own_bias  # picture 0: subj02, picture 1: subj05
    whole = shared + own @ w["embed.weight"].T + w["embed.bias"]
    found = encoder.head.decode(encoder(images, torch.tensor([0, 1])))
    group = encoder.head.decode(encoder(images), group=True)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)  # float32, thousands of terms
    torch.testing.assert_close(group, shared, rtol=1e-4, atol=1e-4)

    for part, names, message in (
        ("trunk", ["blocks.4.norm1.weight"], "a trunk without vit.blocks.4.norm1.weight"),  # never a random one
        ("encoder", ["shared_proj.weight"], "lacks shared_proj.weight"),
        ("encoder", [n for n in w if n.startswith("feat_projs.5")], "does not fit eva02_base"),
    ):
        kept = {name: v for name, v in content[part].items() if name not in names}
        torch.save(content | {part: kept}, tmp_path / "part.pt")
        with pytest.raises(Problem, match=message):
            load_checkpoint(tmp_path / "part.pt", space=space)
    with pytest.raises(Problem, match="9 vertices, but the prepared data gives no vertex space"):
        load_checkpoint(tmp_path / "theirs.pt")
