"""Training: many heads on one trunk, loss scaling, stop and continue, many processes."""

import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import batches
import finetune
import predict
import prepare_data
import train_head
import training
from checkpoint import read_checkpoint
from common import Problem, constants, run_script
from model import Encoder, Head, dropout_mask
from shared_fixtures import assert_equal, both, finish, here, on_command_line, run, small, start
from test_model import Patches

cpu = torch.device("cpu")
quick = (
    both | small | dict(LAYERS="blocks.0", BATCH_SIZE=16, WARMUP_STEPS=0, STEPS=4, VALIDATE_EVERY=2, LEARNING_RATE=0.01)
)


# ---- loss scaling -------------------------------------------------------------------------------


class Features(Patches):
    """Gives the features that it holds, whatever the pictures."""

    def forward(self, images):
        return [self.features[layer] for layer in self.layers]


def scaled_learner(features, dropout=0.9, **settings):
    """A learner in float16 whose trunk gives features {layer: (n, n_tokens, n_channels)}, and a batch for it."""
    torch.manual_seed(0)
    trunk = Features()
    trunk.features, n = features, len(features["blocks.0"])
    shapes = [tuple(x.shape[1:]) for x in features.values()]
    head = Head(shapes, 6, 3, 2, 9)
    settings = constants(vars(train_head)) | dict(FEATURE_DROPOUT=dropout, WARMUP_STEPS=0, STEPS=10) | settings
    learner = training.Learner(Encoder(trunk, head), settings, "head.pt", {}, cpu, torch.float16)
    zeros = dict.fromkeys(("images", "top", "left", "size"), torch.zeros(n))
    batch = zeros | {"subject": torch.arange(n) % 2, "latents": torch.randn(n, 3), "residual": torch.rand(n)}
    return learner, batch


def train_step(learner, batch, step=0):
    training.train_step([learner], lambda images, *_: images, batch, step)


def test_features_of_60000_train_in_float16():
    """Dropout's factor of 10 would make them infinite; what comes out is what float64 makes of the same mask."""
    features = {f"blocks.{i}": torch.full((8, 4, 48), 60000.0, dtype=torch.float16) for i in range(2)}
    learner, batch = scaled_learner(features)
    before = learner.encoder.head.shared.detach().clone()
    for step in range(4):
        train_step(learner, batch, step)
    assert learner.progress.n_losses == 4 and math.isfinite(learner.progress.loss_sum)
    assert all(v.isfinite().all() for v in learner.encoder.state_dict().values())
    assert not torch.equal(before, learner.encoder.head.shared)
    head = learner.encoder.head
    with torch.autocast("cpu", torch.float16):
        p = head.project(list(features.values()), (5, 3, 1))
    for layer, (projection, x) in enumerate(zip(head.projections, features.values())):
        kept = dropout_mask(x, 0.9, (5, 3, 1, layer)).double() / (1 - 0.9)
        w, s = (v.detach().half().double() for v in (projection.channel, projection.spatial))
        expected = torch.einsum("dt,dc,ntc->nd", s, w, kept * x.double())
        torch.testing.assert_close(p[layer].double(), expected, rtol=0.01, atol=0.01 * expected.std().item())


def test_a_skipped_step_leaves_nothing():
    features = {
        f"blocks.{i}": torch.randn(8, 4, 48, generator=torch.Generator().manual_seed(i)).half() for i in range(2)
    }
    learner, batch = scaled_learner(features, dropout=0.0)
    train_step(learner, batch)
    before = {name: v.clone() for name, v in learner.encoder.state_dict().items()}
    losses = learner.progress.loss_sum, learner.progress.n_losses
    features["blocks.1"][3, 2, 1] = math.inf
    train_step(learner, batch, 1)
    assert_equal(before, dict(learner.encoder.state_dict()))
    assert (learner.progress.loss_sum, learner.progress.n_losses) == losses and learner.is_finite()
    features["blocks.1"][3, 2, 1] = 0
    train_step(learner, batch, 2)
    assert learner.progress.n_losses == 2 and not torch.equal(before["head.shared"], learner.encoder.head.shared)
    learner.progress.n_skipped = training.most_skipped  # it never comes to an end: no longer a start too high
    assert not learner.is_finite()


def test_the_loss_is_scaled_before_backward():
    """Gradients of a loss of 1e-7 vanish in float16 unless scaled: float32 makes the expected ones."""
    features = {
        f"blocks.{i}": torch.randn(8, 4, 48, generator=torch.Generator().manual_seed(i)).half() for i in range(2)
    }
    gradients = []
    for precision in (torch.float16, torch.float32):
        learner, batch = scaled_learner({name: x.to(precision) for name, x in features.items()}, dropout=0.0)
        learner.precision = precision
        learner.scaler = torch.amp.GradScaler("cpu", enabled=precision == torch.float16)
        learner.update = lambda step: None
        batch |= {"latents": 1e-4 * batch["latents"]}
        with torch.no_grad():
            for p in (
                learner.encoder.head.shared,
                learner.encoder.head.subject_weight,
                learner.encoder.head.subject_bias,
            ):
                p *= 1e-4
        train_step(learner, batch)
        scale = learner.scaler.get_scale()
        gradients.append(learner.encoder.head.projections[0].channel.grad / scale)
    assert gradients[1].abs().max() < 6e-8  # below float16's smallest number
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_dropout_does_not_depend_on_parts():
    """The mask of a sample is that of its place in the batch, however the batch is cut."""
    x = torch.zeros(50, 3, 5)
    whole = dropout_mask(x, 0.7, (1, 2))
    parts = [dropout_mask(x[a:b], 0.7, (1, 2), first=a) for a, b in ((0, 7), (7, 16), (16, 49), (49, 50))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[:16], whole[16:32]) and not torch.equal(whole, dropout_mask(x, 0.7, (1, 3)))


# ---- stop and continue --------------------------------------------------------------------------


def stop_after(step, monkeypatch):
    """Training ends after the step as if terminated."""
    ask = training.StopRequest.agree
    seen = []

    def agree(self):
        seen.append(1)
        self.signal = signal.SIGTERM if len(seen) == step else self.signal
        ask(self)

    monkeypatch.setattr(training.StopRequest, "agree", agree)


def test_logged_training_loss_is_the_mean_of_the_steps(fitted, tmp_path, monkeypatch):
    losses, update = [], training.Learner.update

    def spy(learner, step):
        losses.append(float(learner.loss))
        update(learner, step)

    monkeypatch.setattr(training.Learner, "update", spy)
    run(train_head, **quick | dict(STEPS=5, MICRO_BATCH=8), DATA_DIR=str(fitted), RUN_DIR=str(tmp_path))
    log = training.read_log(tmp_path / "train_head.jsonl")
    assert [entry["step"] for entry in log] == [0, 2, 4, 5]
    expected = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose([entry["train_loss"] for entry in log[1:]], expected, rtol=1e-6)


def test_overwrite_keeps_the_old_until_there_is_better(fitted, tmp_path, monkeypatch, capsys):
    """--overwrite true: a finished run is replaced by the first trained weights, not by untrained ones; a stopped
    one continues with the same command; other inputs start anew."""
    settings = quick | dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path))
    run(train_head, **settings)
    assert read_checkpoint(tmp_path / "head.pt")["finished"]
    finished, log = (tmp_path / "head.pt").read_bytes(), (tmp_path / "train_head.jsonl").read_text()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(1, patch)
        run(train_head, **settings, OVERWRITE=True)
    assert (tmp_path / "head.pt").read_bytes() == finished  # one step is not validated yet
    capsys.readouterr()
    run(train_head, **settings, OVERWRITE=True)
    assert "continuing after step 1 of 4" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "head.pt")["step"] > 0 and log == (tmp_path / "train_head.jsonl").read_text()
    with pytest.raises(Problem, match="LEARNING_RATE: 0.01 there, 0.02 now"):
        run(train_head, **settings | dict(LEARNING_RATE=0.02))
    with pytest.raises(Problem, match="loss is not finite"):
        run(train_head, **settings | dict(LEARNING_RATE=1e30), OVERWRITE=True)
    assert read_checkpoint(tmp_path / "head.pt")["made_with"]["LEARNING_RATE"] == 0.01


def test_an_unfinished_phase_1_is_told(fitted, tmp_path, monkeypatch, capsys):
    settings = quick | dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path), STEPS=6)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(4, patch)
        run(train_head, **settings)
    phase_2 = both | dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path), STEPS=1, WARMUP_STEPS=0, BATCH_SIZE=8)
    with pytest.raises(Problem, match="has not ended(?s:.)*--allow_unfinished true"):
        run(finetune, **phase_2)
    run(finetune, **phase_2, ALLOW_UNFINISHED=True)
    run(
        predict,
        DATA_DIR=str(fitted),
        CHECKPOINT=str(tmp_path / "head.pt"),
        SUBMISSION_DIR=str(tmp_path / "s"),
        DEVICE="cpu",
    )
    assert "training that has not ended" in capsys.readouterr().out
    # a state is of no use without its checkpoint, nor with another's
    (tmp_path / "head.pt").rename(tmp_path / "elsewhere.pt")
    with pytest.raises(Problem, match="whose checkpoint .*head.pt is gone(?s:.)*--overwrite true"):
        run(train_head, **settings)
    other = torch.load(tmp_path / "elsewhere.pt")
    other["made_with"]["SEED"] = 17
    torch.save(other, tmp_path / "head.pt")
    with pytest.raises(Problem, match="head.pt belongs to a run with other inputs(?s:.)*SEED: 17 there, 0 now"):
        run(train_head, **settings)


def test_a_run_moves_to_other_hardware(fitted, tmp_path, monkeypatch):
    """PRECISION may be named another way; where hardware would choose another, the message names what continues."""
    settings = quick | dict(DATA_DIR=str(fitted), RUN_DIR=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(1, patch)
        run(train_head, **settings | dict(PRECISION="float32"))
    monkeypatch.setattr(sys, "argv", ["train_head.py", "--run_dir", str(tmp_path)])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with pytest.raises(Problem, match="python train_head.py --run_dir .* --precision float32 continues it"):
        run(train_head, **settings | dict(PRECISION="auto"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    run(train_head, **settings | dict(PRECISION="auto"))
    assert read_checkpoint(tmp_path / "head.pt")["finished"]


def test_compile_is_used_in_training(fitted, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(training, "compile_trunk", lambda trunk, images, precision: compiled.append(images.shape))
    run(train_head, **quick, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path), COMPILE=True)
    assert compiled == [(16, 3, 56, 56)]


@pytest.mark.parametrize("seconds, drawn", [(1e9, [3]), (0.0, [1, 2, 3])])
def test_curves_are_drawn_at_the_end_and_now_and_then(seconds, drawn, fitted, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(training, "plot_curves", lambda log, *_: found.append(len(log)))
    monkeypatch.setattr(training, "seconds_between_drawings", seconds)
    run(train_head, **quick, DATA_DIR=str(fitted), RUN_DIR=str(tmp_path))
    assert found == drawn


def test_schedules_that_warm_up_to_their_end_are_refused():
    with pytest.raises(Problem, match="WARMUP_STEPS is 250 of 200 STEPS(?s:.)*--warmup_steps 10"):
        run(train_head, STEPS=200)


def test_a_subject_that_stands_out_is_named():
    scores = {"val_loss_a": 0.9, "val_loss_b": 1600.0, "val_loss_c": 0.8, "val_loss_d": float("nan"), "val_loss_e": 0.7}
    assert "b stands out with val loss 1600" in training.standing_out(scores, list("abcde"))
    assert training.standing_out(scores | {"val_loss_b": 1.0}, list("abcde")) == ""


# ---- many processes -----------------------------------------------------------------------------

step_in_float64 = """
import torch, processes, training
from common import Problem, run_script
from test_training import float64_learner
def main():
    learner, batch = float64_learner()
    for step in range(2):
        training.train_step([learner], lambda images, *_: images, batch, step, 3)
    if processes.is_first():
        torch.save({{"state": dict(learner.encoder.state_dict()), "loss": learner.progress.loss_sum}}, {out!r})
    print("the highest is", processes.highest(processes.rank()))  # of the first process: the others are silent
    if processes.rank() == 1:
        raise Problem("the second process does not like it")
    processes.highest(1)
run_script(main, dict(globals(), __doc__=""), many_processes=True)
"""


def float64_learner():
    """A learner in float64 with dropout on pictures of random pixels, its process's share of a batch of 12."""
    torch.manual_seed(0)
    encoder = Encoder(Patches(), Head([(4, 48)] * 2, 5, 3, 2, 9)).double()
    settings = constants(vars(train_head)) | dict(WARMUP_STEPS=0, FEATURE_DROPOUT=0.3, LEARNING_RATE=0.1)
    learner = training.Learner(encoder, settings, "head.pt", {}, cpu, torch.float32)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)
    own = batches.own_rows(12, 3)
    batch = {"images": images[own], "subject": torch.arange(12) % 2}
    batch |= dict.fromkeys(("top", "left", "size"), torch.zeros(len(own)))
    batch["latents"] = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return learner, batch | {"residual": torch.rand(12, generator=generator, dtype=torch.float64)}


dies_in_the_fourth_step = """
import os, runpy, signal, sys
sys.path.insert(0, {here!r})
import batches
prepare = batches.Batches.prepare
def die(self, step):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare(self, step)
batches.Batches.prepare = die
runpy.run_path({here!r} + "/finetune.py", run_name="__main__")
"""


def torchrun(n, script, *arguments):
    """The ended process; nothing may hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=150)


def forked(n, script, *arguments):
    """What finish() gives of n processes that get what torchrun's get, without its seconds of importing."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = dict(TORCHELASTIC_RUN_ID="x", MASTER_ADDR="localhost", MASTER_PORT=str(store.port), WORLD_SIZE=str(n))
    ranks = [shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(n)]
    started = [start(script, *arguments, before=f"import os; os.environ |= {own}") for own in ranks]
    return [finish(process, 100) for process in started]


def test_two_processes_take_the_step_of_one(tmp_path):
    """Weights, batch norm and loss in float64, micro-batches and dropout included; then a refusal in one process
    ends both, told once."""
    script = tmp_path / "step.py"
    script.write_text(step_in_float64.format(out=str(tmp_path / "two.pt")))
    ends = forked(2, script)
    assert [code for code, _, _ in ends] == [1, 1]
    told = [line for _, _, err in ends for line in err.splitlines() if line.startswith("error:")]
    assert told == ["error: the second process does not like it"] and "the highest is 1" in ends[0][1]
    found = torch.load(tmp_path / "two.pt")
    learner, batch = float64_learner()
    for step in range(2):
        training.train_step([learner], lambda images, *_: images, batch, step, 6)  # 3 of each of two processes
    expected = learner.encoder.state_dict()
    assert found["state"].keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found["state"][name], values, rtol=1e-12, atol=1e-13)
    assert math.isclose(found["loss"], learner.progress.loss_sum, rel_tol=1e-14)


def test_both_phases_in_many_processes(fitted, tmp_path, monkeypatch):
    """Phase 1 stopped in one process, continued in three; phase 2 in two of which one is killed, continued in one:
    the logs are those of one process, to rounding."""
    settings = both | small | dict(DATA_DIR=str(fitted), LAYERS="blocks.{0,1}", BATCH_SIZE=24, VALIDATE_EVERY=2)
    settings |= dict(STEPS=6, LEARNING_RATE=0.01)
    second = both | dict(
        DATA_DIR=str(fitted), BATCH_SIZE=12, STEPS=4, WARMUP_STEPS=1, LEARNING_RATE=1e-3, VALIDATE_EVERY=2
    )
    run(train_head, **settings, RUN_DIR=str(tmp_path / "one"))
    run(finetune, **second, RUN_DIR=str(tmp_path / "one"))

    folder, step, n_steps = ["--run_dir", tmp_path / "many"], training.train_step, 0

    def stopped(*arguments):
        nonlocal n_steps
        n_steps += 1
        step(*arguments)
        if n_steps == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training, "train_step", stopped)
        run(train_head, **settings, RUN_DIR=str(tmp_path / "many"))
    codes, outs, errs = zip(*forked(3, "train_head.py", *folder, *on_command_line(settings)))
    assert codes == (0, 0, 0) and "".join(outs).count("continuing after step 3 of 6") == 1, errs
    trap = tmp_path / "finetune.py"  # its second process dies in the fourth step
    trap.write_text(dies_in_the_fourth_step.format(here=str(here)))
    ended = torchrun(2, trap, *folder, *on_command_line(second))
    assert ended.returncode == 1 and ended.stderr.count("error: another process ended") == 1
    [state] = torch.load(tmp_path / "many/finetune.state.pt")["learners"]
    assert state["progress"]["step"] == 2
    run(finetune, **second, RUN_DIR=str(tmp_path / "many"))
    for stage in ("train_head", "finetune"):
        one, many = (training.read_log(tmp_path / name / f"{stage}.jsonl") for name in ("one", "many"))
        assert [entry["step"] for entry in one] == [entry["step"] for entry in many]
        for a, b in zip(one, many):
            for key in a.keys() - {"made_with", "versions", "val_pictures"}:
                np.testing.assert_allclose(b[key] or 0, a[key] or 0, rtol=1e-4, atol=1e-6, err_msg=f"{a['step']} {key}")


def test_one_process_scripts_say_so_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py"])
    for rank, message in (("0", "error: prepare_data.py runs in one process"), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            run_script(prepare_data.main, dict(vars(prepare_data)))
        assert end.value.code == message or str(end.value.code).startswith(str(message) + ", not under torchrun")
