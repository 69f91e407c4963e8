"""A localiser without a scanner, pictures A minus B: python -m tools.contrast --images_a faces/ --images_b places/"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ttest_ind

import predict
from core.files import output_folder
from core.settings import run
from tools import predict_pictures
from tools.flatmap import FlatMap
from tools.pictures import find_pictures, predict_files, report, shown
from tools.predict_pictures import average_rois, choose_subjects, list_pictures, save_arrays, save_gifti, save_map

IMAGES_A: str = ""  # files, folders and globs, separated by commas
IMAGES_B: str = ""  # the same of the condition that is subtracted
OUTPUT_DIR: str = "contrast"  # output, described in docs/pictures.md
OVERWRITE: bool = False  # replace a contrast that exists
SHARED = predict_pictures, "RUN_DIR CHECKPOINT SUBJECT OUTLINES FSAVERAGE_DIR BATCH_SIZE PRECISION DEVICE"  # set there

LABELS = {"difference": "difference of predicted activity (z)", "t": "t over pictures"}  # of the maps that are drawn


def compare(a, b):
    """a (n_a, n), b (n_b, n) -> {name: (n,)}. t and p are NaN for fewer than two pictures on a side."""
    t, p = ttest_ind(a, b, equal_var=False)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    return {"difference": mean_a - mean_b, "t": t, "mean_a": mean_a, "mean_b": mean_b, "p": p}


def main():
    images = {"A": IMAGES_A, "B": IMAGES_B}
    paths = [find_pictures(files, OUTPUT_DIR) for files in images.values()]
    # a single folder or file names its condition
    title = " − ".join(shown(Path(files).name) if os.path.exists(files) else letter for letter, files in images.items())
    predictor = predict.load_chosen()
    subjects, space = choose_subjects(predictor), predictor.space
    flat = FlatMap(space, predict_pictures.FSAVERAGE_DIR)
    failures, rois = [], []
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        pictures, latents = zip(*[predict_files(predictor, part, failures) for part in paths])
        table = pd.concat(map(list_pictures, pictures), keys=images, names=["condition"])
        table.droplevel("row").drop(columns="picture").to_csv(folder / "pictures.csv")
        for name, subject in subjects.items():
            activity = [predictor.decode(h, subject).numpy() for h in latents]
            means = [average_rois(part, space, subject) for part in activity]
            rois.append(pd.DataFrame({"subject": name} | compare(*means)))
            maps = compare(*activity)
            p = maps.pop("p")[space.present(subject)]
            differ = false_discovery_control(p[np.isfinite(p)]) <= 0.05
            print(f"{name}: {differ.sum()} of {len(differ)} tested vertices differ at a false discovery rate of 5 %")
            save_arrays(folder / name, space, subject, **maps)
            for what, values in maps.items():
                save_gifti(folder / name / what, space, subject, {what: values})
                if what in LABELS and np.isfinite(values).any():
                    save_map(folder / name / f"{what}.png", flat, subject, values, LABELS[what], f"{name}: {title}")
        pd.concat(rois).to_csv(folder / "rois.csv")
    print(f"wrote {OUTPUT_DIR}: {title}, {' and '.join(str(len(part)) for part in pictures)} pictures")
    print("t measures how consistently the model's predictions differ; they have no scanner noise.")
    report(sum(pictures, []), failures)


if __name__ == "__main__":
    run(main, globals())
