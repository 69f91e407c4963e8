"""Killed, damaged, mixed up, out of disk: what a user can run into."""

import inspect
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import fit_pca
import predict
import prepare_data
import train_head
from checkpoint import load_checkpoint
from common import Problem
from shared_fixtures import assert_equal, both, cut, finish, on_command_line, png_claiming, run, small, start, tiny


# dies as by kill -9 in the middle of the n-th file that torch.save writes
dies_while_saving = """
import io, os, signal, torch
saves, save = 0, torch.save
def half_save(content, file):
    global saves
    saves += 1
    if saves < {n}:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half_save
"""
dies_while_decoding = """
import os, signal
from PIL import Image
opened, real = 0, Image.open
def mortal(*arguments):
    global opened
    opened += 1
    return real(*arguments) if opened < 60 else os.kill(os.getpid(), signal.SIGKILL)
Image.open = mortal
"""


def signalled(number):
    """AdamW.step that sends this process the signal at step 3: in the middle of the run."""
    steps, step = 0, torch.optim.AdamW.step

    def count(*arguments, **options):
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), number)
        return step(*arguments, **options)

    return count


terminated_at_step_3 = f"import os, signal, torch\n{inspect.getsource(signalled)}\n"
terminated_at_step_3 += "torch.optim.AdamW.step = signalled(signal.SIGTERM)"


def contents(folder):
    """What a stage left, loaded: npy arrays and torch dicts, by file name."""
    return {p.name: np.load(p) if p.suffix == ".npy" else torch.load(p) for p in sorted(folder.glob("[!.]*"))}


# ---- killed -------------------------------------------------------------------------------------


def test_preparation_and_pca_survive_kills(pair, tmp_path, capsys):
    def run_both(data):
        run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(data))
        run(fit_pca, DATA_DIR=str(data), PCA_DIM=8)

    run_both(tmp_path / "whole")
    prepare = ("prepare_data.py", "--challenge_dir", pair, "--data_dir", tmp_path / "killed")
    fit = ("fit_pca.py", "--data_dir", tmp_path / "killed", "--pca_dim", 8)
    for trap in (dies_while_decoding, dies_while_saving.format(n=1)):
        assert finish(start(*prepare, before=trap))[0] == -signal.SIGKILL
        with pytest.raises(Problem, match="not completely. prepared"):
            prepare_data.load(tmp_path / "killed")
    run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(tmp_path / "killed"))
    assert finish(start(*fit, before=dies_while_saving.format(n=1)))[0] == -signal.SIGKILL
    with pytest.raises(Problem, match="pca.pt not found"):
        fit_pca.load(tmp_path / "killed", prepare_data.load(tmp_path / "killed"))
    capsys.readouterr()
    run_both(tmp_path / "killed")
    assert "prepared already" in capsys.readouterr().out
    assert_equal(contents(tmp_path / "whole"), contents(tmp_path / "killed"))


def test_training_continues_bit_for_bit(fitted, tmp_path, capsys):
    """Killed while writing the first checkpoint, the first state and a later file, terminated once,
    interrupted once: the end is that of a run left alone."""
    settings = dict(DATA_DIR=str(fitted), STEPS=24, VALIDATE_EVERY=6, BATCH_SIZE=16, WARMUP_STEPS=2, LEARNING_RATE=0.01)
    settings |= small | dict(LAYERS="blocks.{0,1}")
    left_alone, killed = tmp_path / "left_alone", tmp_path / "killed"
    run(train_head, **settings, RUN_DIR=str(left_alone))
    command = ("train_head.py", "--run_dir", killed, *on_command_line(settings))
    for n in (1, 2, 3):
        assert finish(start(*command, before=dies_while_saving.format(n=n)))[0] == -signal.SIGKILL
    code, _, errors = finish(start(*command, before=terminated_at_step_3))
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM after step" in errors
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(torch.optim.AdamW, "step", signalled(signal.SIGINT))
        run(train_head, **settings, RUN_DIR=str(killed))
    assert end.value.code == 128 + signal.SIGINT and "stopped by SIGINT after step" in capsys.readouterr().err
    run(train_head, **settings, RUN_DIR=str(killed))
    assert "continuing after step" in capsys.readouterr().out
    assert (killed / "train_head.jsonl").read_bytes() == (left_alone / "train_head.jsonl").read_bytes()
    assert_equal(torch.load(left_alone / "head.pt"), torch.load(killed / "head.pt"))
    before = (killed / "head.pt").stat().st_mtime_ns
    run(train_head, **settings, RUN_DIR=str(killed))
    assert "is finished" in capsys.readouterr().out and (killed / "head.pt").stat().st_mtime_ns == before
    made = torch.load(killed / "head.pt")["made_with"]
    assert made["STEPS"] == 24 and made["data_fingerprint"] == prepare_data.load(fitted).fingerprint
    with pytest.raises(Problem, match="WEIGHT_DECAY: 0.8 there, 0.3 now(?s:.)*--overwrite true"):
        run(train_head, **settings, RUN_DIR=str(killed), WEIGHT_DECAY=0.3)


# ---- damaged folders ----------------------------------------------------------------------------


def remove(path):
    path.unlink()


def change(path, **values):
    array = np.load(path)
    for name, value in values.items():
        array = {"rows": lambda v: array[:v], "columns": lambda v: array[:, :v], "dtype": array.astype}[name](value)
    np.save(path, array)


def put(path, where, value):
    array = np.load(path)
    array[where] = value
    np.save(path, array)


class Evil:
    """Unpickled freely, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


fmri = "training_split/training_fmri/{}_training_fmri.npy"
lh_mask = "roi_masks/lh.all-vertices_fsaverage_space.npy"
mapping = "roi_masks/mapping_streams.npy"
damages = {
    "activity missing": (fmri.format("lh"), remove, "lh_training_fmri.npy is missing"),
    "too few rows": (fmri.format("lh"), lambda p: change(p, rows=7), "7 rows, but 40 training pictures"),
    "too few columns": (fmri.format("lh"), lambda p: change(p, columns=3), "3 columns, but"),
    "integers": (fmri.format("lh"), lambda p: change(p, dtype=np.int32), "int32 of shape"),
    "NaN": (fmri.format("lh"), lambda p: put(p, (2, 3), np.nan), "1 values are NaN or infinite"),
    "infinity": (fmri.format("rh"), lambda p: put(p, (2, slice(3)), np.inf), "3 values are NaN or infinite"),
    "cut array": (fmri.format("rh"), cut, "not a whole npy array"),
    "short mask": (lh_mask, lambda p: change(p, rows=1000), r"shape \(1000,\), expected \(163842,\)"),
    "empty mask": (lh_mask, lambda p: put(p, slice(None), 0), "empty mask"),
    "mask of twos": (lh_mask, lambda p: put(p, 5, 2), "other than 0 and 1"),
    "no mask": (lh_mask, remove, "all-vertices_fsaverage_space.npy is missing"),
    "short labels": ("roi_masks/rh.streams_challenge_space.npy", lambda p: change(p, rows=3), r"of shape \(3,\)"),
    "no labels": ("roi_masks/rh.streams_challenge_space.npy", remove, "challenge_space.npy is missing"),
    "mapping of names": (mapping, lambda p: np.save(p, {"V1": 1}), "expected a dict of integers to names"),
    "mapping array": (mapping, lambda p: np.save(p, np.arange(3)), "refused, it holds int64"),
    "evil mapping": (mapping, lambda p: np.save(p, {1: Evil(p.with_name("touched"))}),
                     "asks for pathlib.Path.touch|asks for"),
    "no pictures": ("training_split/training_images", shutil.rmtree, "training_images is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", damages)
def test_damaged_folder_is_refused(name, pair, tmp_path):
    shutil.copytree(pair / "subj01", tmp_path / "folder" / "subj01")
    file, damage, message = damages[name]
    damage(tmp_path / "folder" / "subj01" / file)
    with pytest.raises(Problem, match=message):
        run(prepare_data, CHALLENGE_DIR=str(tmp_path / "folder"), DATA_DIR=str(tmp_path / "data"))
    assert not (tmp_path / "data").exists() and not list(tmp_path.rglob("touched"))


def test_bad_pictures_are_told_at_once(pair, tmp_path):
    """One message with every fault, exit code 1, no traceback, nothing written."""
    folder = tmp_path / "folder"
    shutil.copytree(pair, folder)
    paths = sorted((folder / "subj01/training_split/training_images").iterdir())
    cut(paths[0])
    paths[1].write_bytes(b"")
    Image.open(paths[2]).save(paths[2], "JPEG")
    Image.open(paths[3]).convert("L").save(paths[3])
    Image.open(paths[4]).crop((0, 0, 80, 60)).save(paths[4])
    paths[5].write_bytes(png_claiming(60000))
    shutil.copy(paths[7], paths[7].with_name(f"train-9999_nsd-{paths[7].stem[-5:]}.png"))
    paths[8].rename(paths[8].with_name("picture.png"))
    shutil.rmtree(folder / "subj06/test_split")  # only predicting needs them
    change(folder / "subj06" / fmri.format("lh"), rows=7)
    path = sorted((folder / "subj06/training_split/training_images").iterdir())[9]
    path.rename(path.with_name(path.name.replace("train-0010", "train-10")))
    code, _, errors = finish(start("prepare_data.py", "--challenge_dir", folder, "--data_dir", tmp_path / "data"))
    assert code == 1 and not (tmp_path / "data").exists()
    expected = ("truncated PNG", "empty file", "not a PNG", "greyscale", "80 x 60 px", "60000 x 60000 px",
                "stands 2 times", "name not understood", "7 rows, but", "pad these", "problems in")  # fmt: skip
    assert [text for text in expected if text not in errors] == []


def test_picture_damaged_inside_leaves_old_data_alone(pair, tmp_path):
    folder, data = tmp_path / "folder", tmp_path / "data"
    shutil.copytree(pair, folder)
    run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data))
    before = contents(data)
    path = sorted((folder / "subj06/training_split/training_images").iterdir())[3]
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(400) + whole[600:])  # both ends as they were
    with pytest.raises(Problem, match=f"{path.name}: damaged picture"):
        run(prepare_data, CHALLENGE_DIR=str(folder), DATA_DIR=str(data), OVERWRITE=True)
    assert_equal(before, contents(data))


# ---- mixed up, out of disk, from outside --------------------------------------------------------


def test_inputs_are_not_mixed(pair, fitted, phase_2, tmp_path):
    """A PCA of other data, a checkpoint of another PCA, files of two preparations, an old finetuned.pt."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    folders = dict(DATA_DIR=str(data), RUN_DIR=str(run_dir))
    run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(data))
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=8)
    options = folders | both | dict(BATCH_SIZE=8, STEPS=1, WARMUP_STEPS=0)
    run(train_head, **options, **small)
    run(finetune, **options)
    with pytest.raises(Problem, match="head_fingerprint"):  # of a head trained again, differently
        run(train_head, **options | dict(SEED=5), **small, OVERWRITE=True)
        run(predict, **folders)
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=9, OVERWRITE=True)
    with pytest.raises(Problem, match="pca_fingerprint"):
        run(finetune, **options, OVERWRITE=True)
    with pytest.raises(Problem, match="PCA_DIM is 5000, expected 1 to"):
        run(fit_pca, DATA_DIR=str(data), PCA_DIM=5000, OVERWRITE=True)
    run(prepare_data, CHALLENGE_DIR=str(pair), DATA_DIR=str(data), SEED=9, OVERWRITE=True)
    with pytest.raises(Problem, match="pca.pt was fitted to data"):
        run(train_head, **options, **small, OVERWRITE=True)
    with pytest.raises(Problem, match="data_fingerprint"):
        run(predict, **folders, CHECKPOINT=str(run_dir / "head.pt"))
    shutil.copy(fitted / "activity.npy", data / "activity.npy")
    with pytest.raises(Problem, match="files of different runs"):
        run(fit_pca, DATA_DIR=str(data))


def test_full_disk(fitted, tmp_path, monkeypatch):
    """Files may not grow beyond 150 kB: the stage says so, and what was there stays."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    (tmp_path / "run").mkdir()
    arguments = ("--data_dir", fitted, "--run_dir", tmp_path / "run", "--trunk", tiny, "--pretrained", "false",
                 "--layers", "blocks.0", "--steps", 1, "--warmup_steps", 0, "--batch_size", 8)  # fmt: skip
    code, _, errors = finish(start("train_head.py", *arguments, before=limit))
    assert code == 1 and "File too large" in errors and "Free disk" in errors
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(Problem, match="0.0 GB of disk free, expected"):
        run(train_head, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path / "run"), **both | small)


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(fitted, tmp_path):
    folders = dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path))
    values = folders | both | small | dict(STEPS=12, VALIDATE_EVERY=4, LEARNING_RATE=1e30)
    with pytest.raises(Problem, match="loss is not finite"):
        run(train_head, **values)
    assert load_checkpoint(tmp_path / "head.pt")[2]["step"] == 0
    weights = torch.load(tmp_path / "head.pt")["head"]
    assert all(values.isfinite().all() for values in weights.values())


def test_files_from_outside_run_nothing(phase_1, fitted, tmp_path):
    path = tmp_path / "head.pt"
    torch.save({"format": "encoder-2", "head": Evil(tmp_path / "touched")}, path)
    with pytest.raises(Problem, match="cannot be read"):
        load_checkpoint(path)
    checkpoint = torch.load(fitted.parent / "run" / "head.pt")
    checkpoint["space"]["subjects"][0] = "../../elsewhere"
    torch.save(checkpoint, path)
    with pytest.raises(Problem, match="not one of our checkpoints"):
        load_checkpoint(path)
    path.write_bytes((fitted.parent / "run" / "head.pt").read_bytes()[:-1000])
    with pytest.raises(Problem, match="cannot be read"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(Problem, match="has format list, expected encoder-2"):
        load_checkpoint(path)
    assert not (tmp_path / "touched").exists()
