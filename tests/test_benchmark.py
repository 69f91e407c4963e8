"""tools/benchmark.py: what a GPU is asked, at toy size on the CPU, so that nothing is found broken on the day."""

import ast
import sys

from tests.conftest import ROOT, run_stage
from tools import benchmark

USERS = {"torch", "timm", "numpy", "sklearn", "tqdm", "PIL", "matplotlib", "filelock"}  # filelock comes with torch


def test_a_gpu_needs_the_first_packages_only():
    """On the machine with the GPU there may be nothing else: what benchmark.py imports, directly or not."""
    todo, packages = ["tools.benchmark"], set()
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py") if "env" not in p.parts
    }
    for name in todo:
        for node in ast.walk(ast.parse(modules[name].read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            todo += [each for each in names if each in modules and each not in todo]
            packages |= {each.split(".")[0] for each in names} - {module.split(".")[0] for module in modules}
    assert packages - set(sys.stdlib_module_names) <= USERS
    assert len(todo) > 10


def test_parts_gpu_and_run_at_toy_size(tmp_path, capsys):
    """Every check ends, what has to be equal is equal, and the file holds what was printed."""
    output = tmp_path / "table.md"
    run_stage(benchmark, PARTS="gpu,run", OUTPUT=output, DEVICE="cpu", REPEATS=1)
    text = output.read_text()
    assert "FAILED" not in text and "MISSED" not in text, text
    assert text == capsys.readouterr().out
    for name in [*benchmark.CHECKS["gpu"], *benchmark.CHECKS["run"]]:
        assert f"| *{name}, all of it* |" in text
    assert text.count(" | ok |") > 20


def test_a_check_that_fails_says_why_and_the_next_begins(tmp_path, monkeypatch):
    def broken(bench):
        yield "before", 1.0, "s", "≤ 2"
        raise ValueError("no such | kernel")

    def slow(bench):
        yield "rate", 0.4, "", "≥ 0.5"

    monkeypatch.setitem(benchmark.CHECKS, "gpu", {"broken": broken, "slow": slow})
    run_stage(benchmark, PARTS="gpu", OUTPUT=tmp_path / "table.md", DEVICE="cpu")
    rows = (tmp_path / "table.md").read_text().splitlines()[4:]
    assert rows[0] == "| broken: before | 1 s | ≤ 2 | ok |"
    assert rows[1] == "| broken | ValueError: no such / kernel | | FAILED |"
    assert rows[3] == "| slow: rate | 0.4  | ≥ 0.5 | MISSED |"


def test_commands_are_timed_in_alternation(tmp_path, monkeypatch):
    """A command here and in another checkout; what is subtracted is the same command's start-up."""
    called = []

    def command(folder, words):
        called.append((folder.name, words[-1]))
        return float(len(words)), float(len(words)), "prepare_data.py: 5 s, peak memory 2.5 GB"

    monkeypatch.setattr(benchmark, "command", command)
    run_stage(benchmark, PARTS="prepare", OUTPUT=tmp_path / "table.md", DEVICE="cpu", OTHER=tmp_path, REPEATS=2)
    assert called == 2 * [("here", "--help"), ("here", "true"), ("there", "--help"), ("there", "true")]
    assert "| preparation: there, peak memory 2.5 GB |" in (tmp_path / "table.md").read_text()
