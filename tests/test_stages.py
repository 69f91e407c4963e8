"""The five stages on the simulated folder: what they write against independent references, kills, many heads, many
processes, damaged input."""

import copy
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

import finetune
import fit_pca
import predict
import prepare_data
import train_head
from core import checkpoint, training
from core.checkpoint import load_checkpoint, save_checkpoint
from core.files import load_torch
from core.settings import constants, run
from core.space import HEMIS
from model import Crops, Encoder, Head, Trunk, UserError
from tests.conftest import (
    HEAD,
    ROOT,
    SIMULATED,
    TRAINING,
    assert_equal,
    on_command_line,
    read_log,
    run_process,
    run_stage,
)
from tools.simulate import planted_fields

ATTENTION = ("q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias")  # of EVA02-tiny
QUICK = HEAD | TRAINING | dict(LAYERS="0", BATCH_SIZE=16, STEPS=6, VALIDATE_EVERY=2, LEARNING_RATE=0.01)
FINETUNE = TRAINING | dict(BATCH_SIZE=16, STEPS=6, VALIDATE_EVERY=2, LEARNING_RATE=0.001)


def open_resized(path):
    return np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BICUBIC))


def vertex_r2(activity, prediction):
    return r2_score(activity.astype(float), prediction.astype(float), multioutput="raw_values")


@torch.no_grad()
def plain_prediction(encoder, paths, subject):
    """(n_pictures, n_vertices): files one by one through Pillow, torchvision and the encoder."""
    size, inputs = [encoder.trunk.image_size] * 2, []
    for path in paths:
        x = torch.tensor(open_resized(path)).permute(2, 0, 1).double()  # torchvision's float32 is off by 1e-4
        x = vision.resize(x, size, vision.InterpolationMode.BICUBIC, antialias=True)
        inputs.append(vision.normalize(x / 255, encoder.trunk.mean, encoder.trunk.std).float())
    z = torch.cat([encoder(x[None], torch.tensor([subject])) for x in inputs])
    return (z @ encoder.head.embed_weight.T + encoder.head.embed_bias).numpy()


def without_times(log):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "pictures_per_second")} for entry in log]


# ---- preparation and PCA -------------------------------------------------------------------------


def test_simulated_folder_has_what_was_planted(challenge, subjects):
    for number in (1, 6):
        planted = planted_fields(number, SIMULATED["vertex_step"], SIMULATED["seed"])
        folder = challenge / f"subj{number:02d}"
        for hemi in HEMIS:
            own = planted[planted.hemi == hemi]
            assert own.vertex.tolist() == np.flatnonzero(subjects[folder.name].mask[hemi]).tolist()
            ceiling = np.load(folder / f"test_split/noise_ceiling/{hemi}_noise_ceiling.npy")
            np.testing.assert_array_equal(ceiling, own.ceiling.astype(np.float32))
            right = own.x[(own["streams"] == "early") & (own.ceiling > 0.3)] > 0.5
            assert right.mean() > 0.8 if hemi == "lh" else right.mean() < 0.2  # each hemisphere sees the other side


def test_prepared_data_are_the_files(data_dir, subjects, challenge):
    data, facts_of_id = prepare_data.load(data_dir), {}
    assert data.space.subjects == list(subjects) == [f"subj{i:02d}" for i in range(1, 9)]
    for s, files in enumerate(subjects.values()):
        rows = np.flatnonzero(data.subject == s)
        np.testing.assert_array_equal(data.activity[rows], files.common.astype(np.float16))
        assert np.array_equal(np.flatnonzero(data.space.mask[s]), files.present)
        assert all(np.array_equal(data.space.columns(s, h), files.columns[h]) for h in HEMIS)
        for row, path in zip(rows, files.pictures, strict=True):
            assert np.array_equal(data.images[data.image[row]], open_resized(path))
            facts_of_id.setdefault(int(path.stem[-5:]), set()).add((data.split[row], data.image[row]))
        for row, path in zip(np.flatnonzero(data.test_subject == s), files.test_pictures, strict=True):
            assert np.array_equal(data.images[data.test_image[row]], open_resized(path))
            assert data.nsd_ids[data.test_image[row]] == int(path.stem[-5:])
        assert all(len(data.samples(split, s)) for split in prepare_data.SPLIT_NAMES)
    assert data.space.mask[5].sum() < data.space.mask[7].sum() < data.space.n_vertices  # subj06, subj08
    assert all(len(facts) == 1 for facts in facts_of_id.values())  # one split and one row, whoever saw it
    assert data.nsd_ids[: data.n_training_images].tolist() == sorted(facts_of_id)
    assert np.array_equal(training.read_pictures(data), data.images[: data.n_training_images])
    for group, roi in data.space.rois.items():
        for s, (name, files) in enumerate(subjects.items()):
            expected = np.zeros(data.space.n_vertices)
            for h in HEMIS:
                expected[files.columns[h]] = np.load(challenge / name / f"roi_masks/{h}.{group}_challenge_space.npy")
            assert np.array_equal(roi["labels"][s], expected)
        assert roi["names"] == np.load(challenge / f"subj01/roi_masks/mapping_{group}.npy", allow_pickle=True).item()


def test_subset_of_subjects_and_splits(challenge, subjects, tmp_path):
    """Splits depend on pictures and seed; shared pictures can be the test; the authors' go by row."""
    loaded = {}
    for splits, seed in (("pictures", 0), ("pictures", 1), ("shared", 0), ("authors", 0)):
        options = dict(SUBJECTS="subj08, subj06", SPLITS=splits, SEED=seed, DATA_DIR=tmp_path / f"{splits}{seed}")
        run_stage(prepare_data, CHALLENGE_DIR=challenge, **options)
        loaded[splits, seed] = prepare_data.load(options["DATA_DIR"])
    data, shared, authors = (loaded[splits, 0] for splits in ("pictures", "shared", "authors"))
    two = [subjects["subj06"], subjects["subj08"]]
    assert data.space.subjects == ["subj06", "subj08"] and set(data.test_subject) == {0, 1}
    assert data.space.n_vertices == sum((two[0].mask[h] | two[1].mask[h]).sum() for h in HEMIS)
    assert 0.5 < (data.split == loaded["pictures", 1].split).mean() < 0.95  # chance: 0.735
    assert data.fingerprint != loaded["pictures", 1].fingerprint
    ids = [{int(path.stem[-5:]) for path in files.pictures} for files in two]
    assert set(shared.nsd_ids[shared.image[shared.samples("test")]]) == ids[0] & ids[1]
    seed = 0x2CFE11DA & 0x7FFFFFFF  # the last digits that md5sum gives for the text with subj01 in it
    split = prepare_data.split_as_authors("subj01", 9841)[np.random.default_rng(seed).permutation(9841)]
    assert split.tolist() == [0] * 8365 + [1] * (9349 - 8365) + [2] * (9841 - 9349)
    n = len(two[1].pictures)
    assert np.array_equal(authors.split[-n:], prepare_data.split_as_authors("subj08", n))


def test_finished_results_are_kept_or_refused(data_dir, challenge, capsys):
    """The same settings find them finished; others are refused, with both values."""
    before = {path: path.stat().st_mtime_ns for path in data_dir.iterdir()}
    pca = dict(DATA_DIR=data_dir, PASSES=20, DEVICE="cpu")
    run_stage(prepare_data, CHALLENGE_DIR=challenge, DATA_DIR=data_dir, SEED=3)
    run_stage(fit_pca, **pca, PCA_DIM=24)
    assert capsys.readouterr().out.count("is finished already") == 2
    with pytest.raises(UserError, match="SEED: 3 before, 4 now"):
        run_stage(prepare_data, CHALLENGE_DIR=challenge, DATA_DIR=data_dir, SEED=4)
    with pytest.raises(UserError, match="PCA_DIM: 24 before, 8 now"):
        run_stage(fit_pca, **pca, PCA_DIM=8)
    assert {path: path.stat().st_mtime_ns for path in data_dir.iterdir()} == before


def test_pca_is_scikit_learns(data_dir):
    data = prepare_data.load(data_dir)
    pca = fit_pca.load(data_dir, data)
    activity, n = data.activity.astype(float), pca.components.shape[1]
    reference = PCA(svd_solver="full").fit(activity[data.samples("train")])
    basis, mean = pca.components.double().numpy(), pca.mean.double().numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-6)
    np.testing.assert_allclose(np.linalg.svd(reference.components_[:n] @ basis)[1], 1, atol=1e-5)  # same subspace
    np.testing.assert_allclose(pca.explained_variance, reference.explained_variance_[:n], rtol=1e-5)
    np.testing.assert_allclose(pca.total_variance, reference.explained_variance_.sum(), rtol=1e-5)
    z = np.random.default_rng(0).standard_normal((len(activity), n))  # the loss of any z is the one over vertices
    expected = ((z @ basis.T + mean - activity) ** 2).mean(1)
    loss = (((z - pca.latents.double().numpy()) ** 2).sum(1) + pca.residual.numpy()) / data.space.n_vertices
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(loss.mean(), expected.mean(), rtol=1e-4)


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch):
    """{"encoder": trained, "before": its weights before, "batches": […]} of the run that follows."""
    seen, train_step = {"batches": []}, training.train_step

    def spy(learners, crops, batch, micro_batch):
        if not seen["batches"]:
            seen["encoder"] = learners[0].encoder
            seen["before"] = copy.deepcopy(seen["encoder"].state_dict())
        seen["batches"].append({name: value.clone() for name, value in batch.items()})
        train_step(learners, crops, batch, micro_batch)

    monkeypatch.setattr(training, "train_step", spy)
    return seen


def test_training_sees_the_training_samples_with_their_targets(spied, data_dir, subjects, tmp_path):
    """Every sample once an epoch, nothing of the other splits."""
    run_stage(train_head, **QUICK | dict(BATCH_SIZE=48, STEPS=8), DATA_DIR=data_dir, RUN_DIR=tmp_path)
    data, batches = prepare_data.load(data_dir), spied["batches"]
    pca, seen = fit_pca.load(data_dir, data), {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    row_of = {}  # a sample is its subject and the bytes of its picture
    for s, files in enumerate(subjects.values()):
        for row, path in zip(np.flatnonzero(data.subject == s), files.pictures, strict=True):
            row_of[s, open_resized(path).tobytes()] = row
    rows = [row_of[s, x.numpy().tobytes()] for s, x in zip(seen["subject"].tolist(), seen["images"])]
    train = np.flatnonzero(data.split == 0)
    assert len(rows) == 8 * 48 > len(train)
    assert sorted(rows[: len(train)]) == train.tolist() and set(rows) == set(train)
    y = np.concatenate([files.common for files in subjects.values()])[rows]
    z = (y - pca.mean.numpy()) @ pca.components.numpy()
    np.testing.assert_allclose(seen["latents"], z, rtol=1e-2, atol=1e-2)  # stored as float16
    assert seen["size"].min() >= round(256 * 0.8**0.5) and len(torch.unique(seen["size"])) > 20


def test_steps_are_adamw_on_the_vertices(spied, data_dir, tmp_path):
    """Loss over vertices, gradient accumulation, schedule and AdamW, written out in float64."""
    options = dict(BATCH_SIZE=20, MICRO_BATCH=10, FEATURE_DROPOUT=0.0, STEPS=3, WARMUP_STEPS=1, LEARNING_RATE=0.01)
    options |= dict(MIN_LEARNING_RATE=0.002, BETAS=(0.8, 0.9), WEIGHT_DECAY=0.5, TRAIN_EMBEDDING=True, VALIDATE_EVERY=2)
    run_stage(train_head, **HEAD | TRAINING | options, DATA_DIR=data_dir, RUN_DIR=tmp_path)
    trained, before = spied["encoder"].head, spied["before"]
    head, trunk = copy.deepcopy(trained).train().double().requires_grad_(True), spied["encoder"].trunk
    head.load_state_dict({n.removeprefix("head."): v for n, v in before.items() if n.startswith("head.")})
    crops, parameters = Crops(trunk, 0.8), dict(head.named_parameters())
    first, second = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    losses, rates = [], [0.002, 0.01, 0.006]  # the minimum, the peak, half of the way down
    for t, (batch, rate) in enumerate(zip(spied["batches"], rates, strict=True), start=1):
        head.zero_grad()
        losses.append(0.0)
        for part in ({name: v[start : start + 10] for name, v in batch.items()} for start in (0, 10)):
            with torch.no_grad():
                features = trunk(crops(part["images"], part["top"], part["left"], part["size"]))
            z = head([x.double() for x in features], part["subject"])
            error = z @ head.embed_weight.T + head.embed_bias - part["activity"].double()
            loss = error.square().sum() / (20 * error.shape[1])
            loss.backward()
            losses[-1] += loss.item()
        for name, p in parameters.items():
            first[name] = 0.8 * first[name] + 0.2 * p.grad
            second[name] = 0.9 * second[name] + 0.1 * p.grad**2
            step = first[name] / (1 - 0.8**t) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-8)
            p.data -= rate * (0.5 * p.data + step)
    for name, p in trained.named_parameters():
        # a weight whose gradient drowns in float32's rounding may step anywhere; there are few
        assert (p - parameters[name]).norm() < 0.01 * (p - before["head." + name]).norm(), name
    log = [entry["train_loss"] for entry in read_log(tmp_path / "train_head.jsonl")]
    np.testing.assert_allclose(log[1:], [np.mean(losses[:2]), losses[2]], rtol=1e-4)


def test_what_each_phase_trains(run_dir, finetuned_dir):
    """Phase 1 the head without the embedding, phase 2 also the self-attention; all else stays bit for bit."""
    start = {f"trunk.{k}": v for k, v in Trunk(HEAD["TRUNK"], HEAD["LAYERS"], 56, False, 0).state_dict().items()}
    head = load_checkpoint(run_dir / "head.pt")[0].state_dict()
    assert all(torch.equal(head[k], v) for k, v in start.items())
    in_head = {n for n in head if n.startswith("head.")} - {"head.embed_weight", "head.embed_bias"}
    attention = {f"trunk.vit.blocks.{i}.attn.{n}" for i in range(3) for n in ATTENTION}
    tuned = load_checkpoint(finetuned_dir / "finetuned.pt")[0].state_dict()
    assert {n for n, v in tuned.items() if not torch.equal(v, head[n])} == in_head | attention
    assert (run_dir / "head.pt").stat().st_size < 200_000  # without the trunk


@pytest.mark.parametrize("stage, name", [("train_head", "head.pt"), ("finetune", "finetuned.pt")])
def test_log_and_best_checkpoint(stage, name, finetuned_dir, data_dir, subjects):
    log = read_log(finetuned_dir / f"{stage}.jsonl")
    assert log[0]["step"] == 0 and log[0]["train_loss"] is None and log[1]["train_loss"] > 0
    best = max(log, key=lambda entry: entry["val_r2"])
    encoder, _, info = load_checkpoint(finetuned_dir / name)
    assert info["step"] == best["step"] and info["finished"]
    assert best not in (log[0], log[-1])  # the settings of conftest.py are chosen so that this tells them apart
    data, scores, errors = prepare_data.load(data_dir), [], []
    for s, files in enumerate(subjects.values()):
        chosen = np.flatnonzero(data.split[data.subject == s] == 1)
        prediction = plain_prediction(encoder, [files.pictures[i] for i in chosen], s)
        scores.append(vertex_r2(files.common[chosen][:, files.present], prediction[:, files.present]))
        errors.extend(((prediction - files.common[chosen]) ** 2).mean(1))
    keys = ["val_r2", *(f"val_r2_{name}" for name in subjects)]
    expected = [np.median(np.concatenate(scores)), *map(np.median, scores)]
    np.testing.assert_allclose([best[key] for key in keys], expected, atol=1e-3)  # activity as float16
    np.testing.assert_allclose(best["val_loss"], np.mean(errors), rtol=1e-4)
    assert Image.open(finetuned_dir / f"{stage}.png").format == "PNG"


def scaled_learner(value):
    """A learner in float16 with features of this size, and its batch."""
    torch.manual_seed(0)
    encoder = Encoder(Trunk(HEAD["TRUNK"], "0,1", 56, False), Head([(4, 48)] * 2, 6, 3, 2, 9))
    features = [torch.full((8, 4, 48), value).half() * torch.rand(8, 4, 48).half() for _ in range(2)]
    encoder.trunk.forward = lambda images: features
    settings = constants(vars(train_head)) | dict(WARMUP_STEPS=0, STEPS=10)
    learner = training.Learner(encoder, settings, "head.pt", {}, torch.device("cpu"), torch.float16)
    batch = dict.fromkeys(training.IMAGE_KEYS, torch.zeros(8)) | {"subject": torch.arange(8) % 2}
    return learner, batch | {"latents": torch.randn(8, 3), "residual": torch.rand(8)}, features


def test_float16_survives_large_features_and_skipped_steps():
    """Dropout's factor of 10 would make features of 60,000 infinite; a step that overflows leaves no trace."""
    learner, batch, features = scaled_learner(60000.0)
    for _ in range(3):
        training.train_step([learner], lambda images, *_: images, batch)
    assert learner.n_losses == 3 and math.isfinite(learner.loss_sum)
    before, losses = copy.deepcopy(learner.encoder.head.state_dict()), learner.loss_sum
    features[1][3, 2] = math.inf
    training.train_step([learner], lambda images, *_: images, batch)
    assert_equal(dict(before), dict(learner.encoder.head.state_dict()))
    assert learner.loss_sum == losses and learner.n_losses == 3 and learner.is_finite()
    resumed = scaled_learner(1.0)[0]
    resumed.restore(learner.state())
    assert resumed.scaler.get_scale() == learner.scaler.get_scale() < 65536  # a run continues with its scale


def test_dropout_masks_differ_between_steps_and_parts_of_the_batch():
    learner, batch, features = scaled_learner(1.0)
    learner.encoder.train()
    losses = []
    for step, first in ((0, 0), (1, 0), (0, 4), (0, 0)):
        learner.step, learner.loss = step, 0.0
        learner.accumulate(features, batch, first, 1.0)
        losses.append(float(learner.loss))
    assert losses[0] == losses[3] and len(set(losses)) == 3


# ---- interruptions, many heads, many processes ---------------------------------------------------


def test_killed_runs_continue_exactly(data_dir, tmp_path):
    """kill -9 before the first state, while one is written, in a step, at the very end: all files are the uninterrupted
    run's, bit for bit. Other settings are refused, a finished run stays as it is."""
    stages = ((train_head, "train_head", "head.pt", QUICK), (finetune, "finetune", "finetuned.pt", FINETUNE))
    kills = [
        ("core.training", "save_torch", 1),  # after the first checkpoint, before the first state
        ("core.training", "save_torch", 3),
        ("core.training", "train_step", 2),
        ("core.training", "mark_finished", 1),
    ]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for module, stage, name, settings in stages:
        settings = settings | dict(DATA_DIR=data_dir)
        run_stage(module, **settings, RUN_DIR=folders[0])
        for number, kill in enumerate(kills):
            code, output = run_process(f"{stage}.py", dies_at=kill, **settings, RUN_DIR=folders[1])
            assert code == -9 and ("resuming after step 2" in output) == (number > 1), output
        for change in (dict(LEARNING_RATE=0.02), dict(FEATURE_DROPOUT=0.3), dict(BETAS=(0.8, 0.99))):
            with pytest.raises(UserError, match=next(iter(change))):
                run_stage(module, **settings | change, RUN_DIR=folders[1])
        for _ in range(2):
            before = [path.read_bytes() for path in folders[1].glob("*.pt")]
            run_stage(module, **settings, RUN_DIR=folders[1])
        assert before == [path.read_bytes() for path in folders[1].glob("*.pt")]
        whole, killed = (
            [load_checkpoint(f / name), f, load_torch(f / f"{stage}.state.pt", training.FORMAT, "")] for f in folders
        )
        assert_equal(dict(whole[0][0].state_dict()), dict(killed[0][0].state_dict()))
        assert_equal(*({k: v for k, v in each[0][2].items() if k != "added"} for each in (whole, killed)))
        logs = [without_times(each[2]["learners"][0].pop("log")) for each in (whole, killed)]
        assert_equal(whole[2], killed[2])
        assert logs[0] == logs[1] == without_times(read_log(folders[1] / f"{stage}.jsonl"))


def test_log_and_checkpoint_belong_together(run_dir, data_dir, tmp_path):
    """Overwriting removes the old checkpoint with the old log; without its state a checkpoint is not replaced."""
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run/train_head.state.pt").unlink()
    settings = QUICK | dict(DATA_DIR=data_dir, RUN_DIR=tmp_path / "run")
    with pytest.raises(UserError, match="training state is missing"):
        run_stage(train_head, **settings)
    code, output = run_process("train_head.py", dies_at=("core.training", "validate", 1), **settings, OVERWRITE=True)
    assert code == -9, output
    assert not any((tmp_path / "run" / name).exists() for name in ("head.pt", "train_head.jsonl", "train_head.png"))


def test_changed_code_is_noticed(run_dir, data_dir, tmp_path, monkeypatch, capsys):
    """Another model.py is told when a run continues and a checkpoint loads; other parameters are refused by name."""
    settings = HEAD | TRAINING | dict(STEPS=8, VALIDATE_EVERY=3, LEARNING_RATE=0.003, DATA_DIR=data_dir)
    shutil.copytree(run_dir, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(training, "SOURCE", "another")
        patch.setattr(checkpoint, "SOURCE", "another")
        run_stage(train_head, RUN_DIR=tmp_path / "run", **settings)
        load_checkpoint(run_dir / "head.pt")
    out = capsys.readouterr().out
    assert "model.py has changed since this run began" in out and "head.pt was written with a different model.py" in out
    build = Head.__init__

    def with_scale(head, *sizes, **options):
        build(head, *sizes, **options)
        head.scale = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(Head, "__init__", with_scale)
    with pytest.raises(UserError, match=r"since this run began \(head.scale\)"):
        run_stage(train_head, RUN_DIR=tmp_path / "run", **settings)
    with pytest.raises(UserError, match="does not fit the head in model.py: .*scale"):
        load_checkpoint(run_dir / "head.pt")


def test_processes_that_restored_different_steps_stop(run_dir, data_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    monkeypatch.setattr(training.distributed, "gather_objects", lambda steps: [steps, [0]])  # rank 1 sees no file
    settings = HEAD | TRAINING | dict(STEPS=8, VALIDATE_EVERY=3, LEARNING_RATE=0.003, DATA_DIR=data_dir)
    with pytest.raises(UserError, match="different steps"):
        run_stage(train_head, **settings, RUN_DIR=tmp_path / "run")


def test_many_heads_train_as_each_alone(data_dir, tmp_path, capsys):
    """Bit for bit, with dropout; one whose loss is not finite stops and leaves the others alone."""
    data, device = prepare_data.load(data_dir), torch.device("cpu")
    pca, trunk = fit_pca.load(data_dir, data), Trunk(HEAD["TRUNK"], "0,1", 56, False)
    common = constants(vars(train_head)) | QUICK | dict(LAYERS="0,1", DATA_DIR=str(data_dir))
    own = [dict(LEARNING_RATE=0.01), dict(LAYERS="1", LATENT_DIM=8, SEED=5, PCA_DIM=7), dict(LEARNING_RATE=1e30)]
    own[1] |= dict(FEATURE_DROPOUT=0.5, WEIGHT_DECAY=0.3, STEPS=4)

    def train(folder, chosen):
        settings = common | dict(RUN_DIR=str(tmp_path / folder))
        heads = [(settings | own[i] | dict(SEED=0), f"{i}.pt") for i in chosen]
        learners = [train_head.new_learner(trunk, *head, data, pca, device, torch.float32) for head in heads]
        training.Run("search", learners, data, pca, settings).run()
        return learners

    together, alone = train("together", [0, 1, 2]), [train("alone0", [0])[0], train("alone1", [1])[0]]
    assert together[2].failed and not together[0].failed
    for a, b in zip(together, alone):
        assert_equal(dict(a.encoder.head.state_dict()), dict(b.encoder.head.state_dict()))
        assert_equal(without_times(a.log), without_times(b.log))
        assert_equal(*(load_torch(learner.output, "encoder-3", "")["head"] for learner in (a, b)))


TWO_PHASES = """
import torch, finetune, train_head
from core.settings import override
from core.distributed import process_group
with process_group():
    for module, arguments in ((train_head, {first}), (finetune, {second})):
        override(vars(module), arguments)
        module.main()
        torch.distributed.barrier()
"""


def test_two_processes_are_one(data_dir, tmp_path):
    """Both phases under torchrun, dropout off, micro-batches: log and weights of one process, to rounding."""
    first = QUICK | dict(DATA_DIR=data_dir, FEATURE_DROPOUT=0.0, MICRO_BATCH=8, STEPS=4, BATCH_SIZE=16)
    second = FINETUNE | dict(DATA_DIR=data_dir, FEATURE_DROPOUT=0.0, STEPS=3)
    run_stage(train_head, **first, RUN_DIR=tmp_path / "one")
    run_stage(finetune, **second, RUN_DIR=tmp_path / "one")
    first, second = first | dict(MICRO_BATCH=4, RUN_DIR=tmp_path / "two"), second | dict(RUN_DIR=tmp_path / "two")
    script = tmp_path / "both.py"
    script.write_text(TWO_PHASES.format(first=on_command_line(first), second=on_command_line(second)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    for stage, name in (("train_head", "head.pt"), ("finetune", "finetuned.pt")):
        one, two = (without_times(read_log(tmp_path / n / f"{stage}.jsonl")) for n in ("one", "two"))
        assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
        for a, b in zip(one, two):
            np.testing.assert_allclose(*([v or 0 for v in e.values()] for e in (a, b)), rtol=1e-4, atol=1e-5)
        a, b = (load_checkpoint(tmp_path / n / name)[0].state_dict() for n in ("one", "two"))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
        a, b = (gradient_averages(tmp_path / n / f"{stage}.state.pt") for n in ("one", "two"))
        assert (a - b).norm() < 1e-3 * a.norm()  # AdamW's steps do not show the gradients' scale


def gradient_averages(path):
    """AdamW's running means of all gradients in a state file, one after another."""
    [state] = load_torch(path, training.FORMAT, "")["learners"]
    return torch.cat([each["exp_avg"].flatten() for each in state["optimizer"]["state"].values()])


def test_what_runs_in_one_process_refuses_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit, match="predict.py runs in one process"):
        monkeypatch.setattr(sys, "argv", ["predict.py"])
        run(lambda: None, vars(predict))


# ---- submission ----------------------------------------------------------------------------------


def test_submission_file_by_file(finetuned_dir, data_dir, subjects, tmp_path):
    options = dict(DATA_DIR=data_dir, RUN_DIR=finetuned_dir, SUBMISSION_DIR=tmp_path / "s", DEVICE="cpu", BATCH_SIZE=5)
    code, output = run_process("predict.py", **options, PRECISION="float32")
    assert code == 0, output
    files = {path.relative_to(tmp_path / "s").as_posix(): path for path in (tmp_path / "s").rglob("*.npy")}
    assert set(files) == {f"{name}/{h}_pred_test.npy" for name in subjects for h in HEMIS}
    encoder = load_checkpoint(finetuned_dir / "finetuned.pt")[0]
    with zipfile.ZipFile(tmp_path / "s/submission.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            n: p.read_bytes() for n, p in files.items()
        }
    for s, (name, of_subject) in enumerate(subjects.items()):
        expected = plain_prediction(encoder, of_subject.test_pictures, s)  # in sorted order
        for h in HEMIS:
            prediction = np.load(files[f"{name}/{h}_pred_test.npy"])
            assert prediction.dtype == np.float32 and prediction.shape == (len(expected), of_subject.mask[h].sum())
            np.testing.assert_allclose(prediction, expected[:, of_subject.columns[h]], rtol=0, atol=1e-4)
            assert np.abs(prediction[0] - prediction[1:]).max(1).min() > 1e-2  # pictures differ by far more
    with pytest.raises(UserError, match="not empty"):
        run_stage(predict, **options)


def test_a_submission_is_replaced_as_a_whole(finetuned_dir, data_dir, tmp_path):
    options = dict(DATA_DIR=data_dir, RUN_DIR=finetuned_dir, SUBMISSION_DIR=tmp_path / "s", DEVICE="cpu")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        run_stage(predict, **options, OVERWRITE=True)
    assert (tmp_path / "s/notes.txt").read_text() == "mine"
    (tmp_path / "s/submission.zip").touch()
    run_stage(predict, **options, OVERWRITE=True)
    assert not (tmp_path / "s/notes.txt").exists() and (tmp_path / "s/subj01/lh_pred_test.npy").exists()


def test_damaged_artefacts_and_numbers_that_are_not_finite(finetuned_dir, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    content = bytearray((tmp_path / "data/pca.pt").read_bytes())
    content[len(content) // 2] ^= 64
    (tmp_path / "data/pca.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        fit_pca.load(tmp_path / "data", prepare_data.load(data_dir))
    with pytest.raises(UserError, match="fitted to other data"):
        fit_pca.load(data_dir, SimpleNamespace(fingerprint="another"))
    encoder, space, info = load_checkpoint(finetuned_dir / "finetuned.pt")
    encoder.head.embed_weight.data[3] = math.nan
    record = {name: info[name] for name in ("made_with", "scores", "step", "finished", "train_nsd_ids")}
    save_checkpoint(tmp_path / "nan.pt", encoder, space=space, **record)
    with pytest.raises(UserError, match="not finite"):
        run_stage(
            predict, DATA_DIR=data_dir, CHECKPOINT=tmp_path / "nan.pt", SUBMISSION_DIR=tmp_path / "s", DEVICE="cpu"
        )
    assert not (tmp_path / "s").exists()


def test_nsd_ids_are_what_names_mean(tmp_path):
    """The challenge's names count from 0, those of NSD's shared1000 folder from 1; stray files are ignored."""
    noise = Image.effect_noise((8, 8), 50).convert("RGB")
    for name in ("train-0001_nsd-00013.png", "train-0002.png", "train-0003.jpg", "._train-0004.png"):
        noise.rotate(90 * (name == "train-0003.jpg")).save(tmp_path / name)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "@eaDir").mkdir()
    paths, ids = prepare_data.list_pictures(tmp_path)
    assert [path.name for path in paths] == ["train-0001_nsd-00013.png", "train-0002.png", "train-0003.jpg"]
    assert ids[0] == 13 and ids[1] < 0 and ids[2] < 0 and ids[1] != ids[2]
    other = tmp_path / "other"
    other.mkdir()
    noise.save(other / "shared0953_nsd69215.png")
    noise.save(other / "test-1000.png")
    assert prepare_data.list_pictures(other)[1].tolist() == [69214, ids[1]]  # the same picture, the same id


# ---- what is refused -----------------------------------------------------------------------------

FMRI, PICTURES = "training_split/training_fmri/rh_training_fmri.npy", "training_split/training_images"


def picture(folder, row):
    return sorted((folder / PICTURES).iterdir())[row]


def change(path, function):
    np.save(path, function(np.load(path)))


def set_nan(activity):
    activity[3, 5] = np.nan
    return activity


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def keep_two(folder):
    for path in sorted((folder / PICTURES).iterdir())[2:]:
        path.unlink()
    for path in (folder / FMRI).parent.iterdir():
        change(path, lambda y: np.sign(y[:2] - y[:2].mean(0)))


DAMAGES = {  # what is done to subj06's folder: the word that the message needs
    "no activity": (lambda f: (f / FMRI).unlink(), "missing"),
    "truncated activity": (lambda f: truncate(f / FMRI), "rh_training_fmri.npy"),
    "NaN": (lambda f: change(f / FMRI, set_nan), "NaN"),
    "not z-scored": (lambda f: change(f / FMRI, lambda y: 40 * y + 500), "z-score"),
    "integers": (lambda f: change(f / FMRI, lambda y: y.astype(int)), "int64"),
    "a row less": (lambda f: change(f / FMRI, lambda y: y[1:]), "shape"),
    "pickled activity": (lambda f: np.save(f / FMRI, np.array([Evil()]), allow_pickle=True), "rh_training_fmri.npy"),
    "no pictures": (lambda f: shutil.rmtree(f / PICTURES), "PNG or JPEG"),
    "a picture less": (lambda f: picture(f, 4).unlink(), "shape"),
    "truncated picture": (lambda f: truncate(picture(f, 4)), "damaged"),
    "not square": (lambda f: Image.new("RGB", (80, 60)).save(picture(f, 4)), "square"),
    "foreign name": (lambda f: picture(f, 4).rename(f / PICTURES / "cat.png"), "cat.png"),
    "id twice": (lambda f: picture(f, 4).rename(f / PICTURES / f"train-0005_{picture(f, 5).stem[-9:]}.png"), "keep"),
    "order": (lambda f: picture(f, 4).rename(f / PICTURES / "train-05_nsd-72999.png"), "order"),
    "mask of 2": (lambda f: change(f / "roi_masks/lh.all-vertices_fsaverage_space.npy", lambda m: 2 * m), "mask"),
    "ROI labels": (lambda f: change(f / "roi_masks/lh.streams_challenge_space.npy", lambda m: m[1:]), "shape"),
    "evil mapping": (lambda f: np.save(f / "roi_masks/mapping_streams.npy", Evil()), "mapping_streams"),
    "few pictures": (keep_two, "too few"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_give_one_clear_message(damage, challenge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(challenge / "subj06", tmp_path / "challenge/subj06")
    function, word = DAMAGES[damage]
    function(tmp_path / "challenge/subj06")
    with pytest.raises(UserError) as error:
        run_stage(prepare_data, CHALLENGE_DIR="challenge", DATA_DIR="data")
    message = str(error.value)
    assert word in message and len(message) < 400 and "\n" not in message
    assert not (tmp_path / "data/prepared.pt").exists() and not (tmp_path / "touched").exists()
