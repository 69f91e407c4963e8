"""What README and docs say: links lead somewhere, commands and options exist, the diffs of docs/change.md apply."""

import importlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import predict
import prepare_data
import train_head
from core import training
from core.files import load_torch
from core.settings import constants, override
from model import UserError
from tests.conftest import HEAD, ROOT, TRAINING, on_command_line, set_constants
from tools import contrast, predict_pictures, search

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHANGE = (ROOT / "docs/change.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", CHANGE, re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
    for command in re.findall(r"^\s*(?:python|torchrun \S.*?\d) (\S[^\n]*(?:\\\n[^\n]*)*)", text, re.M):
        words = command.replace("\\\n", " ").split("#")[0].split()
        name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        if words[0] == "-m" and not name.startswith(("tools.", "nsd.")):
            continue
        known = constants(vars(importlib.import_module(name)))
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert option[2:].upper() in known, f"{command}: {option}"


def copy_project(folder):
    for path in [*ROOT.glob("*.py"), ROOT / "core"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)


@pytest.mark.parametrize("diff", DIFFS, ids=["layers", "tracker", "loss"])
def test_documented_changes_apply(diff, data_dir, tmp_path):
    """At most ten lines each; with the changed head a run trains, and its checkpoint predicts."""
    copy_project(tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    lines = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert 0 < len(lines) <= 10
    if "layer_weight" in diff:
        settings = HEAD | TRAINING | dict(STEPS=3, DATA_DIR=data_dir, BATCH_SIZE=16)
        command = [sys.executable, "train_head.py", *on_command_line(settings)]
        subprocess.run(command, cwd=tmp_path, check=True)
        state = load_torch(tmp_path / "runs/base/train_head.state.pt", training.FORMAT, "")["learners"][0]
        assert state["weights"]["head.layer_weight"].abs().sum() > 0  # it was trained
        script = "import predict, numpy as np; encoder = predict.load_encoder('runs/base/head.pt')\n"
        script += "assert encoder.predict(np.zeros((1, 256, 256, 3), 'uint8')).lh.shape[0] == 1"
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_documented_data_set_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", CHANGE, re.S)[1], {})
    data = prepare_data.load("data")
    assert data.space.subjects == ["anna", "ben"] and np.isfinite(data.activity).all()
    assert all(len(data.samples(split, 1)) for split in prepare_data.SPLIT_NAMES)


def test_options_set_the_constant_where_it_lives():
    """A script's own constants, those that it shares with another script, and those that this one shares in turn."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (contrast, search):
            set_constants(patch, script, **constants(vars(script)))  # restored at the end
        override(
            vars(contrast), ["--images_a", "a.jpg", "b.jpg", "--subject", "group", "--batch_size=3", "--overwrite"]
        )
        assert (contrast.IMAGES_A, contrast.OVERWRITE) == ("a.jpg,b.jpg", True)
        assert (predict_pictures.SUBJECT, predict.BATCH_SIZE) == ("group", 3)
        override(vars(search), ["--latent_dim_range", "8,16", "--image_size", "56"])
        assert (search.LATENT_DIM_RANGE, train_head.IMAGE_SIZE) == ((8, 16), 56)
        for script, words in (
            (contrast, "--devise cpu"),
            (search, "--learning_rate 1"),
            (contrast, "--batch_size big"),
        ):
            with pytest.raises(UserError, match=f"{words.split()[0]}.*(did you mean|invalid int)"):
                override(vars(script), words.split())
