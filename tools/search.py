"""Search for phase 1's constants by Bayesian optimisation, HEADS trials at a time on one pass of the trunk.

Reads DATA_DIR (prepared data, PCA). Writes to RUN_DIR: head.pt, the best trial's checkpoint; search.csv, one row per
trial; search*.png; study.journal, Optuna's storage. Ends with the command that trains the winner in full. The same
command continues a study, and processes that share RUN_DIR share its trials. The trials of a killed round do not count.

The authors ran roughly 50 trials on the validation median R² (report, Training recipe). The ranges below are ours.
"""

import contextlib
import math
import shlex
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend

import fit_pca
import prepare_data
import train_head
from core import training
from core.files import atomic_write, lock
from core.settings import choose_device, choose_precision, constants, run, show
from model import Trunk, UserError, parse_layers
from tools.compare_trunks import check_same

DATA_DIR: str = "data"  # prepared data and PCA
RUN_DIR: str = "runs/search"  # the study, its table, figures and best head
TRIALS: int = 48  # in the study, including those of earlier runs and other processes (report: roughly 50)
HEADS: int = 8  # trials at a time, which share pictures, crops and trunk

LEARNING_RATE_RANGE: tuple[float, ...] = (1e-4, 1e-2)  # log scale; here and below, equal ends fix the constant
WEIGHT_DECAY_RANGE: tuple[float, ...] = (0.01, 3.0)  # log scale
FEATURE_DROPOUT_RANGE: tuple[float, ...] = (0.0, 0.97)
LATENT_DIM_RANGE: tuple[int, ...] = (256, 2048)
PCA_DIM_RANGE: tuple[int, ...] = (256, 2048)  # components used, at most as many as fit_pca.py computed
LAYERS_CHOICES: str = "0,2,4,6,8,10; 4,6,8,10; 2,5,8"  # separated by semicolons

TRUNK: str = train_head.TRUNK  # timm name
PRETRAINED: bool = True  # false: random weights, for tests
IMAGE_SIZE: int = train_head.IMAGE_SIZE  # px, input of the trunk
BATCH_SIZE: int = train_head.BATCH_SIZE  # samples per optimiser step, shared by the heads of a round
MICRO_BATCH: int = 0  # samples at a time; 0: the whole batch
CROP_SCALE: float = train_head.CROP_SCALE  # not searched: the heads of a round share their crops
STEPS: int = 1250  # per trial, a twentieth of them warm-up: the report's short schedule (Table 4)
FULL_SCHEDULE: int = 4  # the winner is then trained for this many times STEPS (report: 5000)
VALIDATE_EVERY: int = 0  # steps; 0: once per epoch
SEED: int = 0  # of the draws, initialisation, order, crops and dropout
PRECISION: str = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # start a new study and delete the one in RUN_DIR

NOT_COMPARED = {*training.FREE, "TRIALS", "HEADS", "FULL_SCHEDULE"}  # between the processes of one study


# ---- what is searched ----------------------------------------------------------------------------


def distributions(n_components):
    """{NAME: Optuna distribution}. n_components: those of the PCA."""

    def size(low, high):
        step = 8 if low % 8 == high % 8 == 0 else 1  # GPUs multiply matrices of such sizes faster
        return IntDistribution(low, high, step=step)

    layers = [part for part in LAYERS_CHOICES.split(";") if part.strip()]
    try:
        return {
            "LEARNING_RATE": FloatDistribution(*LEARNING_RATE_RANGE, log=True),
            "WEIGHT_DECAY": FloatDistribution(*WEIGHT_DECAY_RANGE, log=True),
            "FEATURE_DROPOUT": FloatDistribution(*FEATURE_DROPOUT_RANGE),
            "LATENT_DIM": size(*LATENT_DIM_RANGE),
            "PCA_DIM": size(*(min(end, n_components) for end in PCA_DIM_RANGE)),
            "LAYERS": CategoricalDistribution([same_layers(part) for part in layers]),
        }
    except ValueError as error:
        raise UserError(f"the ranges of the search are wrong: {error}")


def same_layers(text):
    return ",".join(map(str, parse_layers(text)))


def usual_constants(space, n_components):
    """train_head.py's constants (report, Table 2) where they lie within the ranges: the first trial."""
    usual = {name: getattr(train_head, name) for name in space}
    usual["PCA_DIM"] = min(usual["PCA_DIM"] or n_components, n_components)
    usual["LAYERS"] = same_layers(usual["LAYERS"])
    within = {name: kind.low <= usual[name] <= kind.high for name, kind in space.items() if name != "LAYERS"}
    within["LAYERS"] = usual["LAYERS"] in space["LAYERS"].choices
    return {name: value for name, value in usual.items() if within[name]}


def trial_settings(params, run_dir):
    """train_head.py's constants for a trial, so that train_head.py alone would train the same head."""
    own = {name: value for name, value in constants(globals()).items() if hasattr(train_head, name)}
    settings = constants(vars(train_head)) | own | params
    share = train_head.MIN_LEARNING_RATE / train_head.LEARNING_RATE  # a twentieth in the report
    return settings | {
        "RUN_DIR": str(run_dir), "WARMUP_STEPS": STEPS // 20, "MIN_LEARNING_RATE": share * settings["LEARNING_RATE"]
    }  # fmt: skip


# ---- the study, which several processes share ----------------------------------------------------


@contextlib.contextmanager
def study_lock(folder):
    """Wait until no other process draws or records trials."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(folder))
                break
            except UserError:
                time.sleep(0.05)
        yield


def running_rounds(folder):
    """Names of the rounds whose process lives: it holds their lock. What killed ones left is removed."""
    running = set()
    for path in folder.glob("round-*"):
        try:
            with lock(path):
                shutil.rmtree(path)
        except UserError:
            running.add(path.name)
    return running


def open_study(folder, inputs):
    """The study in folder, or a new one. inputs: settings and fingerprints that all its processes must agree on."""
    path = folder / "study.journal"
    if OVERWRITE and path.exists():
        if running_rounds(folder):
            raise UserError(f"another process is working on the study in {folder}.")
        path.unlink()
        (folder / "head.pt").unlink(missing_ok=True)
    if not path.exists() and (folder / "head.pt").exists():
        raise UserError(f"{folder} contains the head.pt of another run; choose another RUN_DIR.")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)
    if "inputs" not in study.user_attrs:
        study.set_user_attr("inputs", inputs)
    check_same(path, study.user_attrs["inputs"], inputs)
    return study


@contextlib.contextmanager
def new_round(study, folder, space, usual):
    """Draw the next HEADS trials -> (folder for their training, removed at the end; trials, empty if none are left).

    usual: constants of the first trial. Finished trials count, and those that a living process trains.
    """
    with contextlib.ExitStack() as held:
        with study_lock(folder):
            running = running_rounds(folder)
            trials = study.get_trials(deepcopy=False)
            counted = [t for t in trials if t.state.is_finished() or t.user_attrs.get("round") in running]
            round_dir = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="round-", dir=folder)))
            held.enter_context(lock(round_dir))
            if not counted:
                study.enqueue_trial(usual)
            asked = []
            for _ in range(min(HEADS, TRIALS - len(counted))):
                seed = np.random.default_rng([SEED, 4, len(study.get_trials(deepcopy=False))]).integers(2**31)
                # a Gaussian process after eight random trials; docs/search.md compares it with other samplers
                study.sampler = optuna.samplers.GPSampler(seed=int(seed), n_startup_trials=8)
                asked.append(study.ask(space))
                asked[-1].set_user_attr("round", round_dir.name)
        yield round_dir, asked


def record_round(study, folder, trials, learners):
    """Record the scores of a round; head.pt is replaced first, so that it is never worse than a recorded trial."""
    with study_lock(folder):
        before = best_trial(study)
        learner = max(learners, key=score_of)
        if score_of(learner) > (before.value if before else -math.inf):
            with open(learner.output, "rb") as source, atomic_write(folder / "head.pt") as file:
                shutil.copyfileobj(source, file)
        for trial, learner in zip(trials, learners):
            if score_of(learner) > -math.inf:
                study.tell(trial, score_of(learner))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        write_results(study, folder)


def score_of(learner):
    """Best validation median R², -inf if the head diverged."""
    return -math.inf if learner.failed or math.isnan(learner.best) else learner.best


def best_trial(study):
    """The best complete trial, None if there is none."""
    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    return max(complete, key=lambda trial: trial.value, default=None)


# ---- results -------------------------------------------------------------------------------------


def write_results(study, folder):
    """search.csv: trial, val_r2 (empty unless complete), state, constants. From eight scores on also search.png: R²
    against each constant, search_history.png: best so far, search_importance.png: share of R²'s variance (fANOVA)."""
    table = study.trials_dataframe(("number", "value", "state", "params"))
    table = table.rename(columns=lambda name: name.removeprefix("params_"))
    table = table.rename(columns={"number": "trial", "value": "val_r2"})
    with atomic_write(folder / "search.csv") as file:
        table.to_csv(file, index=False)
    complete = table[table["state"] == "COMPLETE"]
    varied = [name for name in table.columns[3:] if complete[name].nunique() > 1]
    if complete["val_r2"].nunique() < 8 or not varied:
        return
    charts, label = optuna.visualization.matplotlib, "validation median R²"
    fanova = optuna.importance.FanovaImportanceEvaluator(seed=SEED)
    plt.switch_backend("Agg")
    with plt.rc_context():  # Optuna changes matplotlib's style
        figures = {
            "search.png": charts.plot_slice(study, varied, target_name=label),
            "search_history.png": charts.plot_optimization_history(study, target_name=label),
            "search_importance.png": charts.plot_param_importances(study, fanova, varied, target_name=label),
        }
        for name, axes in figures.items():
            figure = np.ravel(axes)[0].figure
            with atomic_write(folder / name) as file:
                figure.savefig(file, dpi=120, format="png", bbox_inches="tight")
            plt.close(figure)


def winner_command(params, folder):
    """The command line that trains the winner in full."""
    steps, usual = FULL_SCHEDULE * STEPS, constants(vars(train_head))
    settings = trial_settings(params, f"{folder}_full") | {"STEPS": steps, "WARMUP_STEPS": steps // 20}
    options = [(f"--{name.lower()}", show(value)) for name, value in settings.items() if value != usual[name]]
    return shlex.join(["python", "train_head.py", *(word for option in options for word in option)])


def main():
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # else a line per trial
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    data = prepare_data.load(DATA_DIR)
    pca = fit_pca.load(DATA_DIR, data)
    n_components = pca.components.shape[1]
    space = distributions(n_components)
    usual = usual_constants(space, n_components)
    layers = space["LAYERS"].choices
    for end in ("low", "high"):
        params = {name: getattr(kind, end, layers[0]) for name, kind in space.items()}
        training.check_settings(trial_settings(params, RUN_DIR))
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    trunk = Trunk(TRUNK, ",".join(layers), image_size=IMAGE_SIZE, pretrained=PRETRAINED, seed=SEED)
    folder = Path(RUN_DIR)
    inputs = {name: value for name, value in constants(globals()).items() if name not in NOT_COMPARED}
    with study_lock(folder):
        study = open_study(folder, inputs | {"data": data.fingerprint, "pca": pca.fingerprint})
    while True:
        begin = time.monotonic()
        with new_round(study, folder, space, usual) as (round_dir, trials):
            if not trials:
                break
            settings = [trial_settings(trial.params, round_dir / "heads") for trial in trials]
            learners = [
                train_head.new_learner(trunk, s, f"trial-{trial.number:04d}.pt", data, pca, device, precision)
                for s, trial in zip(settings, trials)
            ]
            training.Run("search", learners, data, pca, settings[0], tolerant=True).run()
            record_round(study, folder, trials, learners)
        best, minutes = best_trial(study), (time.monotonic() - begin) / 60
        so_far = f"best so far {best.value:.4f} (trial {best.number})" if best else "none succeeded so far"
        print(f"trials {trials[0].number} to {trials[-1].number} of {TRIALS} took {minutes:.1f} min; {so_far}")
    best = best_trial(study)
    if best is None:
        raise UserError(f"no trial succeeded; lower LEARNING_RATE_RANGE ({folder / 'search.csv'} lists the trials).")
    print(f"best: trial {best.number}, validation median R² {best.value:.4f}, {best.params}")
    print(f"wrote {folder / 'head.pt'}, {folder / 'search.csv'} and figures")
    print(f"To train it in full, {FULL_SCHEDULE} times the steps:\n{winner_command(best.params, folder)}")


if __name__ == "__main__":
    run(main, globals())
