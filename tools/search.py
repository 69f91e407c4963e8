"""Search for good constants of phase 1 by Bayesian optimisation, HEADS trials at a time on one pass of the trunk.

DATA_DIR (prepared data, PCA) -> RUN_DIR with head.pt, the best trial's checkpoint, search.csv, one row per trial, and
study.journal, Optuna's storage. The same command continues a study; several processes may share one (docs/search.md).
"""

import contextlib
import copy
import math
import shlex
from pathlib import Path

import filelock
import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import train_head
from core import training
from core.files import atomic_write
from core.settings import check_same, constants, run
from model import Trunk, UserError
from tools.compare_trunks import record_inputs

RUN_DIR: str = "runs/search"  # the study, its table, figures and best head
TRIALS: int = 48  # in the study, including those of earlier runs and other processes (report: roughly 50)
HEADS: int = 8  # trials at a time, which share pictures, crops and trunk

LEARNING_RATE_RANGE: tuple[float, ...] = (1e-4, 1e-2)  # log scale; here and below, equal ends fix the constant
WEIGHT_DECAY_RANGE: tuple[float, ...] = (0.01, 3.0)  # log scale
FEATURE_DROPOUT_RANGE: tuple[float, ...] = (0.0, 0.97)
LATENT_DIM_RANGE: tuple[int, ...] = (256, 2048)
PCA_DIM_RANGE: tuple[int, ...] = (256, 2048)  # components used, at most as many as fit_pca.py computed
LAYERS_CHOICES: str = "0,2,4,6,8,10; 4,6,8,10; 2,5,8"  # separated by semicolons

STEPS: int = 1250  # per trial, a twentieth of them warm-up: the report's short schedule (Table 4)
OVERWRITE: bool = False  # start a new study and delete the one in RUN_DIR
SHARED = train_head, """DATA_DIR TRUNK PRETRAINED IMAGE_SIZE CROP_SCALE BATCH_SIZE MICRO_BATCH VALIDATE_EVERY SEED
    PRECISION DEVICE"""  # fmt: skip
USUAL = constants(vars(train_head))  # as the file has them


def search_space(n_components):
    """-> {constant: Optuna distribution}, and train_head.py's constants (report, Table 2) moved into these ranges, for
    the first trial. n_components: of the PCA."""
    layers = [part.strip() for part in LAYERS_CHOICES.split(";")]
    ranges = {
        "LEARNING_RATE": FloatDistribution(*LEARNING_RATE_RANGE, log=True),
        "WEIGHT_DECAY": FloatDistribution(*WEIGHT_DECAY_RANGE, log=True),
        "FEATURE_DROPOUT": FloatDistribution(*FEATURE_DROPOUT_RANGE),
        "LATENT_DIM": IntDistribution(*LATENT_DIM_RANGE, step=8),  # GPUs multiply matrices of such sizes faster
        "PCA_DIM": IntDistribution(*(min(end, n_components) for end in PCA_DIM_RANGE), step=8),
    }
    usual = {name: getattr(train_head, name) for name in ranges} | {"PCA_DIM": train_head.PCA_DIM or math.inf}
    usual = {name: min(max(usual[name], kind.low), kind.high) for name, kind in ranges.items()}
    return ranges | {"LAYERS": CategoricalDistribution(layers)}, usual | {"LAYERS": layers[0]}


def trial_settings(params):
    """All constants of a trial, so that train_head.py with them trains the same head."""
    settings = constants(vars(train_head)) | {"RUN_DIR": RUN_DIR, "STEPS": STEPS, "WARMUP_STEPS": STEPS // 20} | params
    decay = train_head.MIN_LEARNING_RATE / train_head.LEARNING_RATE  # a twentieth in the report
    return settings | {"MIN_LEARNING_RATE": decay * settings["LEARNING_RATE"]}


def open_study(folder, inputs):
    """The study in folder, or a new one. inputs: settings and fingerprints that all its processes must agree on."""
    journal = folder / "study.journal"
    if not journal.exists() and (folder / "head.pt").exists():
        raise UserError(f"{folder} holds the head.pt of another run: choose another RUN_DIR.")
    if OVERWRITE:
        for path in folder.glob(".trial-*"):
            with trial_lock(path):  # filelock.Timeout: another process is training it
                pass
        for name in ("study.journal", "head.pt", "search.csv"):
            (folder / name).unlink(missing_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)
    check_same(folder, study.user_attrs.get("inputs", inputs), inputs)
    study.set_user_attr("inputs", inputs)
    return study


@contextlib.contextmanager
def trial_lock(path):
    """Held while a trial is trained; the file is removed at the end."""
    with filelock.FileLock(path, timeout=0):
        yield
        path.unlink()


def draw_trials(study, folder, space, usual):
    """Up to HEADS new trials, none if TRIALS are reached. Those whose process was killed do not count."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        with contextlib.suppress(filelock.Timeout), trial_lock(folder / f".trial-{trial.number}"):
            study.tell(trial.number, state=TrialState.FAIL)  # killed; the sampler would wait for its score
    trials = study.get_trials(deepcopy=False)
    n_counted = sum(trial.state != TrialState.FAIL for trial in trials)
    if not n_counted:
        study.enqueue_trial(usual)
    seed = np.random.default_rng([train_head.SEED, 4, len(trials)]).integers(2**31)
    study.sampler = optuna.samplers.GPSampler(seed=int(seed), n_startup_trials=8)  # eight are random
    return [study.ask(space) for _ in range(min(HEADS, TRIALS - n_counted))]


class Round(training.Run):
    """Trains a round's heads and keeps their best weights in memory: as checkpoints, each would hold the embedding."""

    def fail(self, learner):
        learner.failed = "diverged"

    def record(self, learner, scores, seconds):
        if scores["val_r2"] > learner.best:
            learner.best = scores["val_r2"]
            learner.at_best = copy.deepcopy((learner.state()["weights"], learner.step, scores))

    def save(self):
        """A round that is killed is lost."""


def write_head(path, learner, data):
    """The checkpoint of a learner at its best validation score."""
    weights, step, scores = learner.at_best
    learner.encoder.load_state_dict(weights, strict=False)
    learner.save(path, data, scores, step, finished=True)


def record_round(study, folder, trials, learners, data):
    """Record the scores of a round. head.pt is replaced first, so that it is never worse than a recorded trial.

    search.csv: trial, val_r2, state (COMPLETE; PRUNED: diverged; FAIL: killed; RUNNING), constants.
    """
    scores = [-math.inf if learner.failed else learner.best for learner in learners]
    if max(scores) > best_score(study):
        write_head(folder / "head.pt", learners[np.argmax(scores)], data)
    for trial, score in zip(trials, scores):
        outcome = {"values": score} if score > -math.inf else {"state": TrialState.PRUNED}
        study.tell(trial, **outcome)
    table = study.trials_dataframe(("number", "value", "state", "params"))
    table.columns = table.columns.str.removeprefix("params_")
    with atomic_write(folder / "search.csv") as file:
        table.rename(columns={"number": "trial", "value": "val_r2"}).to_csv(file, index=False)


def best_score(study):
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return max((trial.value for trial in trials), default=-math.inf)


def winner_command(params, folder):
    """The command line that trains the winner with train_head.py's schedule."""
    schedule = {name: USUAL[name] for name in ("STEPS", "WARMUP_STEPS")}
    settings = trial_settings(params) | schedule | {"RUN_DIR": f"{folder}_full"}
    options = [f"--{name.lower()}={value}" for name, value in settings.items() if value != USUAL[name]]
    return shlex.join(["python", "train_head.py", *options])


def main():
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # otherwise a line per trial
    data, pca, device, precision = train_head.load_inputs(constants(globals()))
    inputs = record_inputs(constants(globals()), data, pca, precision, "TRIALS", "HEADS")
    space, usual = search_space(pca.components.shape[1])
    training.check_settings(trial_settings({"FEATURE_DROPOUT": FEATURE_DROPOUT_RANGE[1]}))
    s, layers = train_head, ",".join(space["LAYERS"].choices)
    trunk = Trunk(s.TRUNK, layers, s.IMAGE_SIZE, s.PRETRAINED, s.SEED)
    folder = Path(RUN_DIR)
    study_lock = filelock.FileLock(folder / ".lock")  # makes the folder; other processes wait for it
    with study_lock:
        study = open_study(folder, inputs)
    while True:
        with contextlib.ExitStack() as held:
            with study_lock:
                trials = draw_trials(study, folder, space, usual)
                for trial in trials:
                    held.enter_context(trial_lock(folder / f".trial-{trial.number}"))
            if not trials:
                break
            learners = []
            for trial in trials:
                options = trial_settings(trial.params), f"trial-{trial.number:04d}.pt", data, pca, device, precision
                learners.append(train_head.new_learner(trunk, *options))
            Round("search", learners, data, pca, trial_settings({})).train()
            with study_lock:
                record_round(study, folder, trials, learners, data)
        print(f"finished trials {trials[0].number} to {trials[-1].number}, best so far {best_score(study):.4f}")
    if best_score(study) == -math.inf:
        raise UserError(f"all trials in {folder / 'search.csv'} diverged: lower LEARNING_RATE_RANGE.")
    with study_lock:
        (folder / ".lock").unlink()
    best = study.best_trial
    print(f"best: trial {best.number}, validation median R² {best.value:.4f}, {best.params}")
    print(f"wrote {folder / 'head.pt'}, {folder / 'search.csv'}")
    print(f"To train it in full:\n{winner_command(best.params, folder)}")


if __name__ == "__main__":
    run(main, globals())
