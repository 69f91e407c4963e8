"""The report's Table 4: the head on different trunks, a short schedule each, beside the standard approach.

Reads DATA_DIR (prepared data, PCA). Writes below RUN_DIR: trunks.csv, one row a trunk and method; trunks.png; and a
folder for every trunk with its best checkpoints and scores. A trunk that is finished is not trained again. One that
cannot be had is named at the end, when the others are there.

SEEDS heads a trunk are trained together. They differ in initialisation and dropout; their batches, order and crops
are the same. "ridge" is the standard approach on the same trunk: a ridge regression per subject (ridge.py) from class
token and mean of the picture's tokens of the same layers of the training pictures, uncropped; its penalty is chosen
by leave-one-out over them. Scores are those of the validation split, on which a head's checkpoint is chosen.
"""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import torch

import fit_pca
import prepare_data
import ridge
import train_head
import training
from checkpoint import read_checkpoint
from common import (
    Problem, check_least, choose_device, choose_precision, constants, differences, progress, run_script, sole_writer,
    write_whole,
)  # fmt: skip
from model import Crops, Trunk, autocast, feature_latents
from scores import Bootstrap, finite_median, interval, r2_score

table_4 = {  # median R² in the report
    "vit_base_patch16_224.mae": 0.1832,
    "vit_base_patch16_224.dino": 0.1863,
    "vit_base_patch16_224.augreg_in21k_ft_in1k": 0.1922,
    "vit_base_patch16_clip_224.openai": 0.1958,
    "vit_base_patch14_dinov2.lvd142m": 0.1968,
    "vit_base_patch16_clip_224.laion2b": 0.1971,
    "beitv2_base_patch16_224.in1k_ft_in22k": 0.1984,
    "eva02_base_patch14_224.mim_in22k": 0.2019,
    "eva02_base_patch16_clip_224.merged2b": 0.2023,
}

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = "runs/trunks"  # table, figure and a folder for every trunk are written there
TRUNKS = " ".join(table_4)  # timm names with spaces between them (report, Table 4)
SEEDS = 3  # heads a trunk
STEPS = 1250  # of every head, with a twentieth of warm-up (report, Table 4)
RIDGE = True  # false: without the standard approach

LAYERS = train_head.LAYERS  # module names or patterns, the same for all trunks
PRETRAINED = True  # false: random weights, for tests
IMAGE_SIZE = train_head.IMAGE_SIZE  # px, input of the trunk
BATCH_SIZE = train_head.BATCH_SIZE  # samples per optimiser step
MICRO_BATCH = 0  # samples at a time; 0: the whole batch
VALIDATE_EVERY = 0  # steps; 0: once per epoch-equivalent
SEED = prepare_data.SEED  # of order and crops, and of the first head; the others count up
PRECISION = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
COMPILE = False  # true: torch.compile the trunk
OVERWRITE = False  # train trunks anew although RUN_DIR holds them

n_resamples = 1000  # of the validation pictures, for the intervals
unimportant = ("TRUNKS", *training.unimportant)  # may differ between runs that fill one table


class NotTrained(Problem):
    """A trunk that cannot be had, or whose heads came to no end; the others go on."""


def find_trunk(name):
    try:
        return Trunk(name, LAYERS, image_size=IMAGE_SIZE, pretrained=PRETRAINED, seed=SEED)
    except Problem as problem:
        raise NotTrained(str(problem))


def head_settings(trunk, folder, seed):
    """train_head.py's constants for one head."""
    settings = constants(vars(train_head))
    settings |= {name: value for name, value in constants(globals()).items() if name in settings}
    own = {"TRUNK": trunk, "RUN_DIR": str(folder), "SEED": seed, "WARMUP_STEPS": STEPS // 20}
    return settings | own


def run_trunk(trunk, folder, data, pca, device, precision):
    """Train and score the heads of one trunk, and the standard approach -> rows, see score_methods()."""
    settings = [head_settings(trunk.settings["name"], folder, SEED + i) for i in range(SEEDS)]
    learners = [
        train_head.new_learner(trunk, s, f"seed-{i}.pt", data, pca, device, precision) for i, s in enumerate(settings)
    ]
    together = training.Training("heads", learners, data, pca, settings[0], tolerant=True)
    together.run()
    if failed := [learner.progress.failed for learner in learners if learner.progress.failed]:
        raise NotTrained(failed[0])
    if together.stop.signal:
        raise SystemExit(128 + together.stop.signal)
    for learner in learners:
        learner.encoder.head.load_state_dict(read_checkpoint(learner.output)["head"])
    return score_methods([learner.encoder for learner in learners], data, precision)


# ---- scores -------------------------------------------------------------------------------------


def score_methods(encoders, data, precision):
    """Rows of the heads and the ridge regression on the validation split, one dict each: method, seed, val_r2, then
    the median R² of every stream; resampled (n_resamples,): val_r2 on resampled pictures, which are the same for all.
    """
    subjects = range(len(data.space.subjects))
    rows = [data.samples("val", s) for s in subjects]
    pictures = np.unique(data.image[np.concatenate(rows)])
    device = encoders[0].head.embed_bias.device
    at_once = MICRO_BATCH or BATCH_SIZE
    latents = feature_latents(encoders, data.images[pictures], batch_size=at_once, precision=precision)
    pooled = pool_pictures(encoders[0].trunk, data, device, precision) if RIDGE else None
    names = [f"head {i}" for i in range(len(encoders))] + ["ridge"] * RIDGE
    bootstrap = Bootstrap(pictures, n_resamples, SEED, device)
    r2 = {name: [] for name in names}
    for s in subjects:
        if not len(rows[s]):
            continue
        has = data.space.mask[s]
        activity = torch.from_numpy(data.read_activity(rows[s]))[:, has].to(device).float()
        where = torch.from_numpy(np.searchsorted(pictures, data.image[rows[s]])).to(device)
        with torch.inference_mode():
            found = {name: e.decode(h[where], s)[:, has] for name, e, h in zip(names, encoders, latents)}
        if RIDGE:
            found["ridge"] = predict_ridge(pooled, data, s, rows[s], device)
        bootstrap.add(data.space.subjects[s], data.image[rows[s]], activity, found)
        for name, prediction in found.items():
            whole = np.full(data.space.n_vertices, np.nan)
            whole[has] = r2_score(activity, prediction).numpy()
            r2[name].append((s, whole))
    return [describe(name, r2[name], data.space, bootstrap.resampled("all", name, "r2")) for name in names]


def describe(name, r2, space, resampled):
    """One row. r2: [(subject, R² (n_vertices,)), …]."""
    method, _, seed = name.partition(" ")
    row = {"method": method, "seed": int(seed or 0)}
    row["val_r2"] = finite_median(np.concatenate([values for _, values in r2]))
    regions = {s: space.regions(s) for s, _ in r2}
    for group, stream in next(iter(regions.values())):
        if group == "streams" and stream != "all":
            inside = [values[regions[s].get((group, stream), np.zeros(len(values), bool))] for s, values in r2]
            row[f"val_r2_{stream}"] = finite_median(np.concatenate(inside))
    return row | {"resampled": resampled["median"].tolist() if resampled else None}


@torch.inference_mode()
def pool_pictures(trunk, data, device, precision):
    """(n_training_images, n_features) float32 on the CPU: what ridge.py sees of every picture."""
    crops, parts = Crops(trunk, device=device), []
    batch = MICRO_BATCH or BATCH_SIZE
    for start in progress(range(0, data.n_training_images, batch), "features for ridge", unit="batch"):
        images = torch.from_numpy(np.array(data.images[start : min(start + batch, data.n_training_images)])).to(device)
        with autocast(device, precision):
            parts.append(ridge.pool_tokens(trunk, trunk(crops.whole(images))).float().cpu())
    return torch.cat(parts)


def predict_ridge(pooled, data, s, rows, device):
    """Fitted on the subject's training samples -> (len(rows), n_vertices of the subject)."""
    train = data.samples("train", s)
    activity = torch.from_numpy(data.read_activity(train))[:, data.space.mask[s]].to(device).float()
    fitted = ridge.fit(pooled[data.image[train]].to(device), activity)
    return ridge.predict(fitted, pooled[data.image[rows]].to(device))


# ---- table and figure ---------------------------------------------------------------------------


def summarise(results):
    """results {trunk: rows} -> lines of the table, best first: trunk, method, median R² as mean over the seeds with
    its deviation and single values, streams, the report's number, difference to the best line with its 95 %
    interval over resampled validation pictures."""
    lines = []
    for trunk, rows in results.items():
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            values = [row["val_r2"] for row in mine]
            line = {"trunk": trunk, "method": method, "n_seeds": len(mine), "val_r2": float(np.mean(values))}
            line["deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            line["report"] = table_4.get(trunk) if method == "head" else None
            line["values"] = values
            line |= {k: float(np.mean([row[k] for row in mine])) for k in mine[0] if k.startswith("val_r2_")}
            known = all(row["resampled"] for row in mine)
            line["resampled"] = np.mean([row["resampled"] for row in mine], axis=0) if known else None
            lines.append(line)
    lines.sort(key=lambda line: -line["val_r2"])
    for line in lines:
        line["difference"] = line["val_r2"] - lines[0]["val_r2"]
        known = line["resampled"] is not None and lines[0]["resampled"] is not None
        spread = line["resampled"] - lines[0]["resampled"] if known else None
        line["low"], line["high"] = interval(line["difference"], spread) if known else (None, None)
    return lines


def write_table(lines, folder):
    text = io.StringIO()
    columns = [name for name in dict.fromkeys(k for line in lines for k in line) if name not in ("values", "resampled")]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with write_whole(folder / "trunks.csv") as file:
        file.write(text.getvalue().encode())
    plot_table(lines, folder / "trunks.png")


def print_table(lines, pictures):
    streams = [name for name in lines[0] if name.startswith("val_r2_")]
    shown = [name.removeprefix("val_r2_")[:11] for name in streams]
    width = max(len(line["trunk"]) for line in lines)
    print(f"\nMedian R² on validation ({pictures}), mean and deviation over seeds")
    columns = " ".join(f"{s:>11}" for s in shown)
    print(f"{'trunk':{width}}  method  {'median R²':17} report  {'to the best, with 95 %':27} {columns}")
    for line in lines:
        deviation = "" if line["deviation"] is None else f"± {line['deviation']:.4f}"
        by_stream = " ".join(f"{line[s]:11.4f}" for s in streams)
        between = "" if line["low"] is None or not line["difference"] else f"{line['low']:+.4f} to {line['high']:+.4f}"
        print(
            f"{line['trunk']:{width}}  {line['method']:6}  {line['val_r2']:.4f} {deviation:10} "
            f"{line['report'] or '':>6}  {line['difference']:+.4f} {between:19} {by_stream}"
        )


def plot_table(lines, path):
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(lines)), layout="constrained")
    for place, line in enumerate(reversed(lines)):
        color = "C0" if line["method"] == "head" else "0.5"
        axes.plot(line["values"], [place] * len(line["values"]), "o", color=color, markersize=5, alpha=0.8)
        if line["report"]:
            axes.plot(line["report"], place, "|", color="C1", markersize=14, markeredgewidth=2)
    names = [f"{line['trunk']}{', ridge' if line['method'] == 'ridge' else ''}" for line in reversed(lines)]
    axes.set_yticks(range(len(lines)), names, fontsize=7)
    axes.plot([], [], "o", color="C0", label="head, one dot a seed")
    if any(line["method"] == "ridge" for line in lines):
        axes.plot([], [], "o", color="0.5", label="ridge regression per subject")
    if any(line["report"] for line in lines):
        axes.plot([], [], "|", color="C1", markersize=14, markeredgewidth=2, label="report, Table 4")
    axes.legend(fontsize=7, loc="lower right")
    axes.set(xlabel="validation median R²")
    axes.locator_params(axis="x", nbins=6)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="x", alpha=0.3)
    with write_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


# ---- all trunks ---------------------------------------------------------------------------------


def finished_rows(path, inputs):
    """What an earlier run found with these inputs, None where there is nothing."""
    if not path.exists() or OVERWRITE:
        return None
    try:
        found = json.loads(path.read_text())
        changed = differences(found["inputs"], json.loads(json.dumps(inputs)))
        rows = found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} cannot be read ({error}), expected scores of a trunk: remove it, or --overwrite true")
    if changed:
        raise Problem(
            f"{path} was made with other inputs:\n  " + "\n  ".join(changed) + "\nchoose another RUN_DIR, or train "
            "anew with --overwrite true"
        )
    return rows


def main():
    check_least(globals(), SEEDS=1, STEPS=1)
    trunks = list(dict.fromkeys(TRUNKS.replace(",", " ").split()))
    if not trunks:
        raise Problem("TRUNKS is empty, expected timm names with spaces between them")
    training.check_settings(head_settings(trunks[0], RUN_DIR, SEED))
    data = prepare_data.load(DATA_DIR)
    pca = fit_pca.load(DATA_DIR, data)
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    folder = Path(RUN_DIR)
    shared = {name: value for name, value in head_settings("", "", SEED).items() if name not in (*unimportant, "TRUNK")}
    shared |= {"SEEDS": SEEDS, "RIDGE": RIDGE, "precision": str(precision).removeprefix("torch.")}
    shared |= {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    missing = {}
    with sole_writer(folder, "compare_trunks.py"):
        others = {path.parent.name for path in folder.glob("*/scores.json")} - set(trunks)
        found = {name: finished_rows(folder / name / "scores.json", shared) for name in sorted(others)}
        results = {name: rows for name, rows in found.items() if rows}
        for n, name in enumerate(trunks, 1):
            path = folder / name / "scores.json"
            rows = finished_rows(path, shared)
            if rows:
                print(f"{name} is finished with these inputs")
            else:
                print(f"{name}, {n} of {len(trunks)}")
                try:
                    trunk = find_trunk(name)
                    rows = run_trunk(trunk, folder / name, data, pca, device, precision)
                except NotTrained as problem:
                    missing[name] = problem
                    print(f"left out: {problem}")
                    continue
                with write_whole(path) as file:
                    file.write(json.dumps({"inputs": shared, "rows": rows}).encode())
                (folder / name / "heads.state.pt").unlink(missing_ok=True)  # large, and of no more use
            results[name] = rows
            write_table(summarise(results), folder)
        if results:
            print_table(summarise(results), data.count_pictures("val"))
            print(f"wrote {folder / 'trunks.csv'}, {folder / 'trunks.png'}")
    if missing:
        listed = "\n".join(f"  {name}: {str(problem).splitlines()[0]}" for name, problem in missing.items())
        raise Problem(f"{len(missing)} of {len(trunks)} trunks are not in the table:\n{listed}")


if __name__ == "__main__":
    run_script(main, globals())
