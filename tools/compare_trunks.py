"""The report's Table 4: the head on different trunks, trained on a short schedule, beside ridge regression.

DATA_DIR (prepared data, PCA) -> RUN_DIR with trunks.csv, a row per trunk and method, and per trunk a folder with its
best checkpoints and scores.json. Trunks that are there already are not trained again (docs/trunks.md).
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import train_head
from core import training
from core.checkpoint import read_checkpoint
from core.files import atomic_write, lock
from core.scores import median, r2_score
from core.settings import check_same, constants, run
from model import Trunk, UserError, trunk_outputs
from tools import ridge
from tools.vertices import draw_pictures, interval, resampled_scores

TABLE_4 = pd.read_csv(Path(__file__).with_name("table4.csv"), index_col="trunk")["median_r2"]  # (report)
TABLE_4_SETTINGS = {  # (report, Tables 1, 2 and 4); only with these its numbers are shown beside ours
    "LAYERS": "0,2,4,6,8,10", "PCA_DIM": 2048, "SUBJECTS": 8, "STEPS": 1250, "BATCH_SIZE": 512, "IMAGE_SIZE": 224,
    "LATENT_DIM": 1024, "LEARNING_RATE": 6e-4, "MIN_LEARNING_RATE": 3e-5, "BETAS": (0.9, 0.99), "WEIGHT_DECAY": 0.8,
    "FEATURE_DROPOUT": 0.9, "CROP_SCALE": 0.8, "PRETRAINED": True, "TRAIN_EMBEDDING": False, "MICRO_BATCH": 0,
}  # fmt: skip

RUN_DIR: str = "runs/trunks"  # table, figure and one folder per trunk
TRUNKS: tuple[str, ...] = tuple(TABLE_4.index)  # timm names, separated by commas (report, Table 4)
SEEDS: int = 3  # heads per trunk
RIDGE: bool = True  # false: without ridge regression

STEPS: int = 1250  # per head, a twentieth of them warm-up (report, Table 4)
RESAMPLES: int = 500  # of the validation pictures, for the intervals
OVERWRITE: bool = False  # train trunks again that RUN_DIR already contains
SHARED = train_head, """DATA_DIR LAYERS PRETRAINED IMAGE_SIZE LATENT_DIM PCA_DIM LEARNING_RATE MIN_LEARNING_RATE BETAS
    WEIGHT_DECAY FEATURE_DROPOUT CROP_SCALE BATCH_SIZE MICRO_BATCH VALIDATE_EVERY SEED PRECISION DEVICE"""  # fmt: skip


def head_settings(trunk, run_dir, i=0):
    """train_head.py's constants for one head, the i-th of SEEDS."""
    own = {"TRUNK": trunk, "RUN_DIR": str(run_dir), "SEED": train_head.SEED + i}
    return constants(vars(train_head)) | own | {"STEPS": STEPS, "WARMUP_STEPS": STEPS // 20}


def run_trunk(name, folder, data, pca, device, precision):
    """Train and score the heads of one trunk -> rows, see score_methods()."""
    (folder / "scores.json").unlink(missing_ok=True)  # before the checkpoints that it describes
    s, learners = train_head, []
    trunk = Trunk(name, s.LAYERS, s.IMAGE_SIZE, s.PRETRAINED, s.SEED)
    for i in range(SEEDS):
        options = head_settings(name, folder, i), f"seed-{i}.pt", data, pca, device, precision
        learners.append(train_head.new_learner(trunk, *options))
    training.Run("heads", learners, data, pca, head_settings(name, folder)).run()
    failures = [f"{learner.output}: {learner.failed}" for learner in learners if learner.failed]
    if failures:
        raise UserError("; ".join(failures))
    for learner in learners:  # the best weights, not the last
        learner.encoder.head.load_state_dict(read_checkpoint(learner.output)["head"])
    return score_methods([learner.encoder for learner in learners], data, precision)


@torch.inference_mode()
def score_methods(encoders, data, precision):
    """-> rows {method, seed, val_r2, val_r2_STREAM …, resampled: [val_r2 on resampled pictures]}.

    All methods and trunks see the same resamples, in which a picture is drawn for all its subjects together.
    """
    trunk, device, shape = encoders[0].trunk, encoders[0].head.embed_bias.device, data.space.mask.shape
    options = {"batch_size": train_head.MICRO_BATCH or train_head.BATCH_SIZE, "precision": precision}
    pictures = np.unique(data.image[data.samples("val")])
    latents = trunk_outputs(trunk, data.images[pictures], [e.eval().latents for e in encoders], **options)
    if RIDGE:
        pool = [lambda features: ridge.pool_tokens(trunk, features).cpu()]
        [pooled] = trunk_outputs(trunk, data.images[: data.n_training_images], pool, **options)
    counts = draw_pictures(len(pictures), RESAMPLES, train_head.SEED)
    r2 = defaultdict(lambda: np.full(shape, np.nan))
    resampled = defaultdict(lambda: np.full((RESAMPLES, *shape), np.nan, np.float32))
    for s, mask in enumerate(data.space.mask.numpy()):
        rows, train = data.samples("val", s), data.samples("train", s)
        activity = torch.from_numpy(data.activity[rows][:, mask]).to(device, torch.float32)
        place = np.searchsorted(pictures, data.image[rows])
        predictions = {("head", i): e.predict(latents[i][place], s)[:, mask] for i, e in enumerate(encoders)}
        if RIDGE:
            targets = torch.from_numpy(data.activity[train][:, mask]).to(device, torch.float32)
            fitted = ridge.fit(pooled[data.image[train]].to(device), targets)
            predictions["ridge", 0] = ridge.predict(fitted, pooled[data.image[rows]].to(device))
        for key, prediction in predictions.items():
            r2[key][s, mask] = r2_score(activity, prediction)
            repeated = resampled_scores(activity.cpu(), prediction.cpu(), counts[:, place], np.nan)
            resampled[key][:, s, mask] = repeated["r2"]
    streams, table = data.space.rois.get("streams", {"names": {}}), []
    for (method, seed), scores in r2.items():
        row = {"method": method, "seed": seed, "val_r2": median(scores)}
        for label, name in streams["names"].items():
            if label > 0:
                row[f"val_r2_{name}"] = median(scores[streams["labels"].numpy() == label])
        table.append(row | {"resampled": np.nanmedian(resampled[method, seed], axis=(1, 2)).tolist()})
    return table


def summarise(results, with_report=False):
    """results {trunk: see score_methods()} -> DataFrame, best first: trunk, method, n_seeds, val_r2 and val_r2_STREAM
    (means over seeds), deviation (over seeds), report (Table 4), difference to the best row, low and high (its 95 %
    interval over validation pictures, not seeds)."""
    rows = pd.DataFrame([{"trunk": trunk, **row} for trunk, scores in results.items() for row in scores])
    groups = rows.groupby(["trunk", "method"])
    table = groups["val_r2"].agg(n_seeds="size", val_r2="mean", deviation="std")
    table = table.join(groups[[name for name in rows if name.startswith("val_r2_")]].mean())
    table = table.sort_values("val_r2", ascending=False)
    resampled = groups["resampled"].apply(lambda lists: np.mean(list(lists), axis=0))[table.index]
    difference = table["val_r2"] - table["val_r2"].iloc[0]
    low, high = np.transpose([interval(d, values - resampled.iloc[0]) for d, values in zip(difference, resampled)])
    report = [TABLE_4.get(trunk) if with_report and method == "head" else None for trunk, method in table.index]
    return table.assign(report=report, difference=difference, low=low, high=high).reset_index()


def print_table(table, data):
    rows, train = data.samples("val"), data.samples("train")
    n_pictures = len(np.unique(data.image[rows]))
    print(f"\nMedian R² on the validation split ({len(rows)} samples, {n_pictures} unique pictures), mean over seeds")
    print(table.dropna(axis=1, how="all").to_string(index=False, float_format="{:.4f}".format, na_rep=""))
    print("low, high: 95 % interval of the difference to the best over pictures; it does not cover seeds.")
    if STEPS < 500 or STEPS * train_head.BATCH_SIZE < 5 * len(train) or table["val_r2"].max() <= 0:
        print("This schedule is too short to compare trunks (report: 1250 steps of 512, 10 epochs).")


def has_report_settings(data, pca):
    settings = head_settings(TRUNKS[0], RUN_DIR) | {"SUBJECTS": len(data.space.subjects)}
    settings["PCA_DIM"] = settings["PCA_DIM"] or pca.components.shape[1]
    return all(settings[name] == value for name, value in TABLE_4_SETTINGS.items())


def record_inputs(settings, data, pca, precision, *free):
    """What results rest on, to compare with an earlier run's: settings but the free ones, data, PCA and precision."""
    inputs = {name: value for name, value in settings.items() if name not in (*training.FREE, *free)}
    inputs |= {"precision": str(precision), "data": data.fingerprint, "pca": pca.fingerprint}
    return json.loads(json.dumps(inputs))


def main():
    training.check_settings(head_settings(TRUNKS[0], RUN_DIR))
    for name in TRUNKS:  # refuse unknown names and layers before the first trunk trains
        with torch.device("meta"):
            Trunk(name, train_head.LAYERS, train_head.IMAGE_SIZE, pretrained=False)
    data, pca, device, precision = train_head.load_inputs(constants(globals()))
    inputs = record_inputs(constants(globals()), data, pca, precision, "TRUNKS")
    folder, results, failures = Path(RUN_DIR), {}, []
    with lock(folder):
        for path in sorted(folder.glob("*/scores.json")):
            if not OVERWRITE or path.parent.name not in TRUNKS:
                recorded = json.loads(path.read_text())
                check_same(path, recorded["inputs"], inputs)
                results[path.parent.name] = recorded["rows"]
        for name in [name for name in TRUNKS if name not in results]:
            print(name)
            try:
                results[name] = run_trunk(name, folder / name, data, pca, device, precision)
            except UserError as error:
                failures.append(f"{name}: {error}")
                continue
            with atomic_write(folder / name / "scores.json") as file:
                file.write(json.dumps({"inputs": inputs, "rows": results[name]}).encode())
            (folder / name / "heads.state.pt").unlink()  # large, no longer needed
        if results:
            table = summarise(results, has_report_settings(data, pca))
            with atomic_write(folder / "trunks.csv") as file:
                table.to_csv(file, index=False)
            print_table(table, data)
            print(f"wrote {folder / 'trunks.csv'}")
    if failures:
        raise UserError("\n".join(["not in the table:", *failures]))


if __name__ == "__main__":
    run(main, globals())
