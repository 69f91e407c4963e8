"""A localiser without a scanner: predicted activity of pictures A minus pictures B (docs/pictures.md).

    python -m tools.contrast --images_a faces/ --images_b places/

OUTPUT_DIR gets per subject difference, t (Welch's, over pictures), mean_a and mean_b as arrays, GIFTI files and maps.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ttest_ind

import predict
from core.files import output_folder
from core.settings import run
from tools import predict_pictures
from tools.flatmap import FlatMap, fit_limits
from tools.pictures import find_pictures, list_pictures, predict_files, report, shown
from tools.predict_pictures import average_rois, choose_subjects, save_arrays, save_gifti, save_map

IMAGES_A: str = ""  # files, folders and globs, separated by commas
IMAGES_B: str = ""  # the same of the condition that is subtracted
OUTPUT_DIR: str = "contrast"  # output
OVERWRITE: bool = False  # replace a contrast that exists
SHARED = predict_pictures, "RUN_DIR CHECKPOINT SUBJECT OUTLINES FSAVERAGE_DIR BATCH_SIZE PRECISION DEVICE"  # set there

LABELS = {"difference": "difference of predicted activity (z)", "t": "t over pictures"}  # of the maps that are drawn


def compare(a, b):
    """a (n_a, n), b (n_b, n) -> {name: (n,)}. t and p are NaN for fewer than two pictures on a side."""
    t, p = ttest_ind(a, b, equal_var=False)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    return {"difference": mean_a - mean_b, "t": t, "mean_a": mean_a, "mean_b": mean_b, "p": p}


def save_contrast(folder, flat, subject, maps, title):
    """Arrays, GIFTI files and maps of one subject (an index; None: the group). maps {name: (n_vertices,)}."""
    save_arrays(folder, flat.space, subject, **maps)
    outlines = flat.outlines(predict_pictures.OUTLINES, subject)
    for name, values in maps.items():
        values = np.where(flat.space.present(subject), values, np.nan)
        save_gifti(folder / name, flat.space, {name: values})
        if name in LABELS and np.isfinite(values).any():
            save_map(folder / f"{name}.png", flat, values, fit_limits([values]), LABELS[name], outlines, title)


def main():
    images = {"A": IMAGES_A, "B": IMAGES_B}
    paths = {condition: find_pictures(files, OUTPUT_DIR) for condition, files in images.items()}
    # a single folder or file names its condition
    title = " − ".join(shown(Path(files).name) if os.path.exists(files) else letter for letter, files in images.items())
    predictor = predict.load_chosen()
    subjects = choose_subjects(predictor)
    flat = FlatMap(predictor.space, predict_pictures.FSAVERAGE_DIR)
    pictures, latents, rows, rois, failures = [], [], [], [], []
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        for condition in images:
            part, h = predict_files(predictor, paths[condition], failures)
            rows += [{"condition": condition} | row for row in list_pictures(part)]
            pictures += part
            latents.append(h)
        for name, subject in subjects.items():
            activity = [predictor.decode(h, subject).numpy() for h in latents]
            means = [average_rois(part, predictor.space, subject) for part in activity]
            rois.append(pd.DataFrame({"subject": name} | compare(*means)))
            maps = compare(*activity)
            p = maps.pop("p")[predictor.space.present(subject)]
            differ = false_discovery_control(p[np.isfinite(p)]) <= 0.05
            save_contrast(folder / name, flat, subject, maps, f"{name}: {title}")
            print(f"{name}: {differ.sum()} of {len(differ)} tested vertices differ at a false discovery rate of 5 %")
        pd.concat(rois).to_csv(folder / "rois.csv")
        pd.DataFrame(rows).drop(columns="picture").to_csv(folder / "pictures.csv", index=False)
    print(f"wrote {OUTPUT_DIR}: {title}, {' and '.join(str(len(h[0])) for h in latents)} pictures")
    print("t measures how consistently the model's predictions differ; they have no scanner noise.")
    report(pictures, failures)


if __name__ == "__main__":
    run(main, globals())
