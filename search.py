"""Search of phase 1's constants: Bayesian optimisation, HEADS trials at a time on one pass of the trunk.

Reads DATA_DIR (prepared data, PCA). Writes below RUN_DIR: head.pt, the best trial's checkpoint, which every later
stage takes; search.csv, one row a trial; search.png; study.journal, Optuna's storage. Ends with the command that
trains the winner in full. Stopped at any moment, the same command continues. Started several times, on other GPUs
or on other machines with the same folder, the processes share the trials of one study.

The report tuned its constants by some 50 trials of Bayesian optimisation on the validation median R² (Training
recipe). Its ranges are not published; those below are ours.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import shlex
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

import fit_pca
import prepare_data
import train_head
import training
from common import (
    Problem, check_least, choose_device, choose_precision, constants, differences, open_locked, run_script,
    sole_writer, write_whole,
)  # fmt: skip
from model import Trunk, split_patterns

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = "runs/search"  # the study, tables, figure and the best head.pt are written there
TRIALS = 48  # of the study, those of earlier runs and other processes included (report: roughly 50)
HEADS = 8  # trials at a time, which share pictures, crops and trunk

LEARNING_RATE_RANGE = (1e-4, 1e-2)  # drawn on a logarithmic scale; here and below: equal ends fix the constant
WEIGHT_DECAY_RANGE = (0.01, 3.0)  # logarithmic
FEATURE_DROPOUT_RANGE = (0.0, 0.97)
LATENT_DIM_RANGE = (256, 2048)
PCA_DIM_RANGE = (256, 2048)  # components used; what fit_pca.py fitted is the most there can be
LAYERS_CHOICES = "blocks.{0,2,4,6,8,10}; blocks.{4,6,8,10}; blocks.{2,5,8}"  # with semicolons between them
CROP_SCALE_RANGE = (0.5, 1.0)  # one for all heads of a round, which share their pictures

TRUNK = train_head.TRUNK  # timm name
PRETRAINED = True  # false: random weights, for tests
IMAGE_SIZE = train_head.IMAGE_SIZE  # px, input of the trunk
BATCH_SIZE = train_head.BATCH_SIZE  # samples per optimiser step, shared by the heads of a round
MICRO_BATCH = 0  # samples at a time; 0: the whole batch
STEPS = 1250  # of a trial, with a twentieth of warm-up: the report's short schedule (Table 4)
FULL_SCHEDULE = 4  # the winner is then trained for so many times STEPS (report: 5000)
VALIDATE_EVERY = 0  # steps; 0: once per epoch-equivalent
SEED = prepare_data.SEED  # governs what is drawn, initialisation, order, crops and dropout
PRECISION = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
COMPILE = False  # true: torch.compile the trunk
OVERWRITE = False  # start a new study although RUN_DIR holds one

own_pace = ("TRIALS", "HEADS", *training.unimportant)  # may differ between runs and processes of one study
searched = ("LEARNING_RATE", "WEIGHT_DECAY", "FEATURE_DROPOUT", "LATENT_DIM", "PCA_DIM", "LAYERS", "CROP_SCALE")


# ---- what is drawn ------------------------------------------------------------------------------


def new_sampler(seed):
    """After eight trials a Gaussian process, which knows what the running ones are trying: where good constants are
    far from the usual ones it finds more than Optuna's other samplers, elsewhere as much as the best of them
    (benchmark.py --parts search; docs/search.md)."""
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8)


def layers_choices():
    return [" ".join(split_patterns(part)) for part in LAYERS_CHOICES.split(";") if part.strip()]


def suggest(trial, n_components):
    """Draw what a trial's constants have not yet been given -> {NAME: value}."""

    def size(name, low, high):
        step = 8 if low % 8 == high % 8 == 0 else 1  # GPUs multiply matrices of such sizes faster
        return trial.suggest_int(name, low, high, step=step)

    return {
        "CROP_SCALE": trial.suggest_float("CROP_SCALE", *CROP_SCALE_RANGE),
        "LEARNING_RATE": trial.suggest_float("LEARNING_RATE", *LEARNING_RATE_RANGE, log=True),
        "WEIGHT_DECAY": trial.suggest_float("WEIGHT_DECAY", *WEIGHT_DECAY_RANGE, log=True),
        "FEATURE_DROPOUT": trial.suggest_float("FEATURE_DROPOUT", *FEATURE_DROPOUT_RANGE),
        "LATENT_DIM": size("LATENT_DIM", *LATENT_DIM_RANGE),
        "PCA_DIM": size("PCA_DIM", *(min(end, n_components) for end in PCA_DIM_RANGE)),
        "LAYERS": trial.suggest_categorical("LAYERS", layers_choices()),
    }


def report_constants(n_components):
    """train_head.py's constants (report, Table 2) as far as the ranges hold them: the first trial."""
    known = {name: getattr(train_head, name) for name in searched}
    known["PCA_DIM"] = min(known["PCA_DIM"] or n_components, n_components)
    known["LAYERS"] = " ".join(split_patterns(known["LAYERS"]))
    inside = {name: low <= known[name] <= high for name, (low, high) in ranges().items()}
    inside["LAYERS"] = known["LAYERS"] in layers_choices()
    return {name: value for name, value in known.items() if inside[name]}


def ranges():
    """{NAME: (least, most)} of the numbers that are searched."""
    return {name: globals()[f"{name}_RANGE"] for name in searched if f"{name}_RANGE" in globals()}


def round_crop_scale(n_rounds):
    """The crop scale of the round that follows n_rounds others, or None: it is the sampler's to choose.

    A sampler that has seen one crop scale in every trial has no reason to try another. So after two rounds at the
    report's (the range's middle where it is outside) two follow that spread over the range, with heads that are good
    by then.
    """
    if n_rounds > 3:
        return None
    low, high = CROP_SCALE_RANGE
    first = train_head.CROP_SCALE if low <= train_head.CROP_SCALE <= high else (low + high) / 2
    if n_rounds < 2 or high == low:
        return first
    golden = (math.sqrt(5) - 1) / 2  # steps of it, modulo the range, leave no wide gap
    return low + ((first - low) / (high - low) + (n_rounds - 1) * golden) % 1 * (high - low)


def draw(trials, n_components, crop_scale=None):
    """The next trial in the knowledge of all trials so far, running ones too. crop_scale: of its round, if known.

    The sampler is seeded by the trial's number: processes draw different ones, a continued study draws the same.
    """
    number = len(trials)
    fixed = report_constants(n_components) if number == 0 else {}
    fixed |= {} if crop_scale is None else {"CROP_SCALE": crop_scale}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = new_sampler(int(np.random.default_rng([SEED, 4, number]).integers(2**31)))
        sampler = optuna.samplers.PartialFixedSampler(fixed, sampler)
    study = optuna.create_study(direction="maximize", sampler=sampler)  # a copy: the trial reaches the disk whole
    study.add_trials(trials)
    suggest(study.ask(), n_components)
    return study.get_trials(deepcopy=False)[-1]


def trial_settings(parameters, folder):
    """train_head.py's constants for a trial: a head from the search is one that train_head.py could have made."""
    settings = constants(vars(train_head))
    settings |= {name: value for name, value in constants(globals()).items() if name in settings}
    settings |= parameters | {"RUN_DIR": str(folder), "WARMUP_STEPS": STEPS // 20, "OVERWRITE": False}
    share = train_head.MIN_LEARNING_RATE / train_head.LEARNING_RATE  # a twentieth in the report
    return settings | {"MIN_LEARNING_RATE": share * settings["LEARNING_RATE"]}


# ---- the study, which several processes share ---------------------------------------------------


@contextlib.contextmanager
def waiting_for(path):
    """Holds the kernel's lock on path, which ends with the process; yields None where there are no locks."""
    while True:
        try:
            file = open_locked(path)
            break
        except Problem:  # another process holds it, for as long as a few lines take
            time.sleep(0.02)
    with file or contextlib.nullcontext():
        yield file


class JournalLock:
    """Optuna's own locks are files, which a killed process leaves behind for the others to wait for."""

    def __init__(self, journal):
        self.journal, self.plain = Path(journal), JournalFileOpenLock(str(journal))

    def acquire(self):
        self.held = contextlib.ExitStack()
        if self.held.enter_context(waiting_for(self.journal.with_name(".journal.lock"))) is None:
            self.plain.acquire()
            self.held.callback(self.plain.release)
        text = self.journal.read_bytes()
        if text and not text.endswith(b"\n"):  # a line that a full disk cut off would spoil the next
            os.truncate(self.journal, text.rfind(b"\n") + 1)
        return True

    def release(self):
        self.held.close()


def open_study(folder, inputs):
    """The study in folder, begun where there is none. inputs: what all its processes have to agree on. OVERWRITE
    gives up one that is finished, or has other inputs."""
    path = folder / "study.journal"
    inputs = json.loads(json.dumps(inputs))
    if OVERWRITE and path.exists() and is_over(path, inputs):
        discard(folder)
    if not (path.exists() or OVERWRITE) and (folder / "head.pt").exists():
        raise Problem(f"{folder} holds the head.pt of another run, expected none: choose another RUN_DIR")
    study = read_study(path)
    if "inputs" not in study.user_attrs:
        study.set_user_attr("inputs", inputs)
    elif changed := differences(study.user_attrs["inputs"], inputs):
        raise Problem(
            f"{path} is a study with other inputs:\n  " + "\n  ".join(changed) + "\nwith their former values the same "
            "command continues it; or choose another RUN_DIR, or start anew with --overwrite true"
        )
    return study


def read_study(path):
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
        return optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} cannot be read as Optuna's journal ({error}); --overwrite true starts a new study")


def is_over(path, inputs):
    try:
        study = read_study(path)
    except Problem:
        return True
    trials = study.get_trials(deepcopy=False)
    finished = len(trials) >= TRIALS and all(trial.state.is_finished() for trial in trials)
    return finished or study.user_attrs.get("inputs", inputs) != inputs


def discard(folder):
    """Give up the study in folder, unless a process works on it; its head.pt stays until there is another."""
    with contextlib.ExitStack() as held:
        workers = [path for path in folder.glob("worker-*") if path.is_dir()]
        for path in workers:
            held.enter_context(sole_writer(path, "search.py"))
        (folder / "study.journal").unlink()
        for path in workers:
            clear(path)


def clear(worker):
    """Remove what a round that is told has left."""
    for path in worker.glob("[!.]*"):
        path.unlink()


def take_round(study, folder, held, precision, n_components):
    """-> (folder of a worker, its round's trials), or None: all are asked for. The worker's folder is locked in
    held, and by that a round known to be somebody's: one whose process was killed is taken over."""

    def hold(worker):
        try:
            held.enter_context(sole_writer(worker, "search.py"))
            return True
        except Problem:
            return False

    with waiting_for(folder / ".study.lock"):
        trials = study.get_trials(deepcopy=False)
        rounds = {trial.user_attrs["round"]["first"]: trial.user_attrs["round"] for trial in trials}
        unfinished = dict.fromkeys(t.user_attrs["round"]["first"] for t in trials if not t.state.is_finished())
        running = [rounds[first] for first in unfinished]
        for mark in running:
            if mark["precision"] == precision and hold(folder / mark["worker"]):
                break
        else:
            size = min(HEADS, TRIALS - sum(mark["size"] for mark in rounds.values()))
            if size <= 0:
                return None
            taken = {mark["worker"] for mark in running}
            names = (f"worker-{k}" for k in itertools.count())
            name = next(name for name in names if name not in taken and hold(folder / name))
            clear(folder / name)  # a process was killed between telling its round and this
            mark = {"worker": name, "first": len(trials), "size": size, "precision": precision}
        while True:
            trials = study.get_trials(deepcopy=False)
            mine = [trial for trial in trials if trial.user_attrs["round"] == mark]
            if len(mine) == mark["size"]:
                return folder / mark["worker"], mine
            n_before = sum(first < mark["first"] for first in rounds)
            new = draw(trials, n_components, mine[0].params["CROP_SCALE"] if mine else round_crop_scale(n_before))
            study.add_trial(optuna.trial.create_trial(
                state=TrialState.RUNNING, user_attrs={"round": mark}, params=new.params, distributions=new.distributions
            ))  # fmt: skip


def tell_round(study, folder, trials, ended):
    """Enter what train_round() found; the best trial's checkpoint is copied first, so that a told one is there."""
    with waiting_for(folder / ".study.lock"):
        scores = [float("nan") if progress.failed else progress.best for _, progress in ended]
        told = [trial.value for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]
        best = max(range(len(scores)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
        if scores[best] > max(told, default=-math.inf):
            with open(ended[best][0], "rb") as source, write_whole(folder / "head.pt") as file:
                shutil.copyfileobj(source, file, 1 << 24)
        for trial, score in zip(trials, scores):
            failed = not math.isfinite(score)
            study.tell(
                trial.number, None if failed else score, TrialState.FAIL if failed else None, skip_if_finished=True
            )
        write_results(study, folder)
    return scores


# ---- table and figure ---------------------------------------------------------------------------


def write_results(study, folder, all_told=False):
    """search.csv and, at the end or some seconds after the last, search.png, which takes a second."""
    trials = study.get_trials(deepcopy=False)
    text = io.StringIO()
    rows = [row_of(trial) for trial in trials]
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table, figure, content = folder / "search.csv", folder / "search.png", text.getvalue().encode()
    if not table.exists() or table.read_bytes() != content:
        with write_whole(table) as file:
            file.write(content)
    drawn_at = figure.stat().st_mtime if figure.exists() else trials[0].datetime_start.timestamp()
    is_old = drawn_at < table.stat().st_mtime
    if time.time() - drawn_at > training.seconds_between_drawings or all_told and is_old:
        plot_search(search_curves(study), figure)


def row_of(trial):
    """trial, val_r2 (empty without one), state (complete, fail, running), then every constant."""
    settings = trial_settings(trial.params, "")
    kept = {name: value for name, value in settings.items() if name not in training.unimportant}
    shown = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in kept.items()}
    return {"trial": trial.number, "val_r2": trial.value, "state": trial.state.name.lower(), **shown}


def search_curves(study):
    """What the figure shows: number and val_r2 (n,) of the finished trials and best (n,) so far; constants
    {NAME: (n,)} that differ between trials; importance {NAME: share of R²'s variance}, empty for few trials."""
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    r2 = np.array([trial.value for trial in trials])
    values = {name: [trial.params[name] for trial in trials] for name in searched}
    varied = {name: np.array(v) for name, v in values.items() if len(set(v)) > 1}
    importance = {}
    if len(trials) >= 8 and len(set(r2)) > 1 and varied:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=SEED)
        importance = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(varied))
    best = np.maximum.accumulate(r2) if len(r2) else r2
    numbers = np.array([trial.number for trial in trials])
    return {"number": numbers, "val_r2": r2, "best": best, "constants": varied, "importance": importance}


def plot_search(found, path):
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    n_columns = 3
    n_rows = -(-(2 + len(found["constants"])) // n_columns)
    figure, panels = plt.subplots(n_rows, n_columns, figsize=(10, 2.8 * n_rows), layout="constrained", squeeze=False)
    first, *others = panels.flat
    first.plot(found["number"], found["val_r2"], ".", color="0.6", label="trial")
    first.step(found["number"], found["best"], where="post", color="C1", label="best so far")
    first.set(xlabel="trial", ylabel="validation median R²")
    if len(found["number"]):
        first.legend(loc="lower right")
        # a trial that went astray would flatten all others
        least = max(found["val_r2"].min(), np.median(found["val_r2"]) - np.ptp(found["best"]) - 0.05)
        first.set_ylim(bottom=least - 0.05 * (found["best"][-1] - least))
    for panel, (name, values) in zip(others, found["constants"].items()):
        if values.dtype.kind in "if":
            panel.scatter(values, found["val_r2"], c=found["number"], s=12, cmap="viridis")
            if name in ("LEARNING_RATE", "WEIGHT_DECAY"):
                panel.set_xscale("log")
        else:
            kinds = sorted(set(values))
            panel.scatter([kinds.index(v) for v in values], found["val_r2"], c=found["number"], s=12, cmap="viridis")
            panel.set_xticks(range(len(kinds)), kinds, fontsize=6)
            panel.margins(x=0.3)
        panel.set(xlabel=name, ylim=first.get_ylim())
    last = others[len(found["constants"])]
    last.barh(list(found["importance"])[::-1], list(found["importance"].values())[::-1], color="0.5")
    last.tick_params(axis="y", labelsize=7)
    last.set(xlabel="importance (share of R²'s variance)")
    for panel in others[len(found["constants"]) + 1 :]:
        panel.axis("off")
    with write_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


# ---- the search ---------------------------------------------------------------------------------


def check_settings():
    check_least(globals(), TRIALS=1, HEADS=1, STEPS=1, FULL_SCHEDULE=1)
    for name, limits in ranges().items():
        if len(limits) != 2 or limits[0] > limits[1]:
            raise Problem(f"{name}_RANGE is {limits}, expected two numbers, the smaller one first")
        if name in ("LEARNING_RATE", "WEIGHT_DECAY") and limits[0] <= 0:
            raise Problem(f"{name}_RANGE is {limits}, expected numbers above 0: it is drawn on a logarithmic scale")
    layers = layers_choices()
    if not layers:
        raise Problem("LAYERS_CHOICES is empty, expected patterns of layers with semicolons between them")
    for end in range(2):  # as train_head.py would
        drawn = {name: limits[end] for name, limits in ranges().items()}
        training.check_settings(trial_settings(drawn | {"LAYERS": layers[0]}, RUN_DIR))


def train_round(trunk, folder, trials, data, pca, device, precision):
    """-> [(checkpoint, progress)] of a round's trials, and the signal that asked to stop, or 0.

    HEADS at a time: the round may have been begun with more, which were too many for the memory.
    """
    ended = []
    for first in range(0, len(trials), HEADS):
        part = trials[first : first + HEADS]
        stage = "search" if len(part) == len(trials) else f"search-{part[0].number}-{len(part)}"
        settings = [trial_settings(trial.params, folder) for trial in part]
        learners = [
            train_head.new_learner(trunk, s, f"trial-{trial.number:04d}.pt", data, pca, device, precision)
            for s, trial in zip(settings, part)
        ]
        if not (folder / f"{stage}.state.pt").exists():  # begun in parts of another size: anew, to the same result
            for learner in learners:
                learner.output.unlink(missing_ok=True)
        together = training.Training(stage, learners, data, pca, settings[0], tolerant=True)
        together.run()
        ended += [(learner.output, learner.progress) for learner in learners]
        if together.stop.signal:
            return ended, together.stop.signal
    return ended, 0


def main():
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # GPSampler says at every draw what would make it faster
    check_settings()
    settings = constants(globals())
    data = prepare_data.load(DATA_DIR)
    pca = fit_pca.load(DATA_DIR, data)
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    n_components = pca.components.shape[1]
    folder = Path(RUN_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    trunk = Trunk(TRUNK, " ".join(layers_choices()), image_size=IMAGE_SIZE, pretrained=PRETRAINED, seed=SEED)
    inputs = {name: value for name, value in settings.items() if name not in own_pace}
    inputs |= {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    with waiting_for(folder / ".study.lock"):
        study = open_study(folder, inputs)
    begun, n_done = time.monotonic(), 0
    while True:
        with contextlib.ExitStack() as held:
            found = take_round(study, folder, held, str(precision), n_components)
            if not found:
                break
            worker, trials = found
            ended, stopped = train_round(trunk, worker, trials, data, pca, device, precision)
            if len(ended) < len(trials):
                raise SystemExit(128 + stopped)
            scores = tell_round(study, folder, trials, ended)
            clear(worker)
            with contextlib.suppress(OSError):  # Windows removes no open file
                (worker / ".lock").unlink()
                worker.rmdir()
        n_done += len(trials)
        describe_round(study, trials, scores, (time.monotonic() - begun) / n_done)
        if stopped:
            raise SystemExit(128 + stopped)
    conclude(study, folder, data.count_pictures("val"))


def best_trial(study):
    """The best one that is finished, or None."""
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return max(trials, key=lambda trial: (trial.value, -trial.number), default=None)


def describe_round(study, trials, scores, seconds_a_trial):
    everyone = study.get_trials(deepcopy=False)
    finished = sum(trial.state.is_finished() for trial in everyone)
    running = [trial for trial in everyone if not trial.state.is_finished()]
    workers = {trial.user_attrs["round"]["worker"] for trial in running}
    left = (TRIALS - finished) * seconds_a_trial / 60 / (len(workers) + 1)
    good = [score for score in scores if math.isfinite(score)]
    failed = f", {len(scores) - len(good)} failed" if len(good) < len(scores) else ""
    best = best_trial(study)
    so_far = f"best so far {best.value:.4f} (trial {best.number})" if best else "none so far"
    print(
        f"trials {trials[0].number} to {trials[-1].number}: best {max(good, default=math.nan):.4f}{failed}; {so_far}; "
        f"{finished} of {TRIALS} finished, about {max(left, 0):.0f} min left",
        flush=True,
    )


def conclude(study, folder, pictures):
    with waiting_for(folder / ".study.lock"):
        write_results(study, folder, all_told=True)
    trials = study.get_trials(deepcopy=False)
    unfinished = [trial.number for trial in trials if not trial.state.is_finished()]
    if unfinished:
        listed = ", ".join(map(str, unfinished))
        print(f"trials {listed} are with other processes; the same command continues what these leave unfinished")
    best = best_trial(study)
    if best is None:
        table = folder / "search.csv"
        raise Problem(f"none of {len(trials)} trials came to its end: lower LEARNING_RATE_RANGE ({table} lists them)")
    print(f"best of {len(trials)} trials: trial {best.number}, val median R² {best.value:.4f} ({pictures})")
    for name in searched:
        value = best.params[name]
        print(f"  {name} {value:.4g}" if isinstance(value, float) else f"  {name} {value}")
    if best.value <= 0:
        print("which is not above zero: no better than predicting every vertex's mean (README, small data)")
    print(f"wrote {folder / 'head.pt'}, {folder / 'search.csv'}, {folder / 'search.png'}")
    print(f"In full, {FULL_SCHEDULE} times the steps:\n{winner_command(best, folder)}")


def winner_command(trial, folder):
    """The command line that trains a trial's head in full."""
    settings = trial_settings(trial.params, f"{folder}_full") | {"STEPS": FULL_SCHEDULE * STEPS}
    settings["WARMUP_STEPS"] = settings["STEPS"] // 20
    usual = constants(vars(train_head))
    given = {name: v for name, v in settings.items() if v != usual[name] or name in ("DATA_DIR", "RUN_DIR", *searched)}
    words = {name: str(v).lower() if isinstance(v, bool) else v for name, v in given.items()}
    words = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in words.items()}
    return shlex.join(["python", "train_head.py", *(part for n, v in words.items() for part in (f"--{n.lower()}", v))])


if __name__ == "__main__":
    run_script(main, globals())
