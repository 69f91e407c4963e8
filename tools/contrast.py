"""A localiser without a scanner: predicted activity of pictures A minus pictures B (docs/pictures.md).

    python -m tools.contrast --images_a faces/ --images_b places/

OUTPUT_DIR gets per subject difference, t (Welch's, over pictures), mean_a and mean_b as arrays, GIFTI files and maps.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import false_discovery_control, ttest_ind

from core.files import output_folder
from core.settings import run
from core.space import HEMIS
from predict import choose_checkpoints, load_encoder
from tools.flatmap import FlatMap, fit_limits
from tools.pictures import find_pictures, list_pictures, predict_batches, report, shown
from tools.predict_pictures import average_rois, choose_subjects, save_gifti, save_map, save_vertices

IMAGES_A: str = ""  # files, folders and globs, separated by commas
IMAGES_B: str = ""  # the same of the condition that is subtracted
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # files separated by commas, averaged; empty: finetuned.pt in RUN_DIR, else head.pt
SUBJECT: str = "all"  # names separated by commas, group (subject-agnostic), or all
OUTPUT_DIR: str = "contrast"  # output
OUTLINES: str = "streams"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
BATCH_SIZE: int = 64  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace a contrast that exists


def compare(a, b):
    """a (n_a, n), b (n_b, n) -> {name: (n,)}. t and p are NaN for fewer than two pictures on a side."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of single and of equal pictures
        t, p = ttest_ind(a, b, equal_var=False)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    return {"difference": mean_a - mean_b, "t": t, "mean_a": mean_a, "mean_b": mean_b, "p": p}


def save_contrast(folder, flat, subject, maps, title):
    """Arrays, GIFTI files and maps of one subject (an index; None: the group). maps: of compare(), all vertices."""
    space = flat.space
    folder.mkdir()
    save_vertices(folder, space, subject)
    for name in ("difference", "t", "mean_a", "mean_b"):
        values = np.where(space.present(subject), maps[name], np.nan).astype(np.float32)
        for hemi in HEMIS:
            np.save(folder / f"{name}_{hemi}.npy", values[space.columns(subject, hemi)])
        save_gifti(folder / name, space, {name: values})
        if name in ("difference", "t") and np.isfinite(values).any():
            label = "t over pictures" if name == "t" else "difference of predicted activity (z)"
            outlines = flat.outlines(OUTLINES, subject)
            save_map(folder / f"{name}.png", flat, values, fit_limits([values]), label, outlines, title)


def main():
    paths = {"A": find_pictures(IMAGES_A, OUTPUT_DIR), "B": find_pictures(IMAGES_B, OUTPUT_DIR)}
    predictor = load_encoder(choose_checkpoints(CHECKPOINT, RUN_DIR), DEVICE, PRECISION, BATCH_SIZE)
    subjects, latents, rows, failures, tables = choose_subjects(SUBJECT, predictor), [], [], [], []
    for condition in "AB":
        parts = []
        for pictures, h in predict_batches(predictor, paths[condition], failures):
            rows += [{"condition": condition} | row for row in list_pictures(pictures)]
            parts.append(h)
        latents.append([torch.cat(h) for h in zip(*parts)])
    conditions = {"A": IMAGES_A, "B": IMAGES_B}  # a single folder or file names its condition
    title = " − ".join(shown(Path(p).name) if os.path.exists(p) else letter for letter, p in conditions.items())
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        flat = FlatMap(predictor.space, FSAVERAGE_DIR)
        for name, subject in subjects.items():
            activity = [predictor.decode(h, subject).numpy() for h in latents]
            a, b = (average_rois(part, predictor.space, subject) for part in activity)
            tables.append(pd.DataFrame({"subject": name, **compare(a, b)}, index=a.columns))
            maps = compare(*activity)
            save_contrast(folder / name, flat, subject, maps, f"{name}: {title}")
            p = maps["p"][predictor.space.present(subject) & np.isfinite(maps["p"])]
            n = (false_discovery_control(p) <= 0.05).sum()
            print(f"{name}: {n} of {len(p)} tested vertices differ at a false discovery rate of 5 %")
        pd.concat(tables).to_csv(folder / "rois.csv")
        pd.DataFrame(rows).drop(columns="picture").to_csv(folder / "pictures.csv", index=False)
    print(f"wrote {OUTPUT_DIR}: {title}, {' and '.join(str(len(h[0])) for h in latents)} pictures")
    print("t says how consistently pictures differ for the model; it has no scanner noise.")
    report(rows, failures)


if __name__ == "__main__":
    run(main, globals())
