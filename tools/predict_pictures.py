"""Predict activity for your own pictures. python -m tools.predict_pictures --images photo.jpg --subject subj01,group

OUTPUT_DIR gets the predicted activity, ROI means, maps and GIFTI files that docs/pictures.md describes.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from nibabel import gifti

from core.files import output_folder
from core.settings import run
from core.space import HEMIS, N_FSAVERAGE
from predict import choose_checkpoints, load_encoder
from tools.flatmap import FlatMap, describe_maps, fit_limits, save_figure
from tools.pictures import find_pictures, list_pictures, plural, predict_batches, report
from tools.vertices import roi_masks

IMAGES: str = ""  # files, folders and globs, separated by commas
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # files separated by commas, averaged; empty: finetuned.pt in RUN_DIR, else head.pt
SUBJECT: str = "all"  # names separated by commas, group (subject-agnostic), or all
OUTPUT_DIR: str = "predictions"  # output
MAPS: int = 20  # draw maps and write GIFTI files for up to so many pictures; 0: never
OUTLINES: str = "streams"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
BATCH_SIZE: int = 64  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace predictions that exist


def choose_subjects(names, predictor):
    """SUBJECT -> {name: index, None for the group}."""
    names = [*predictor.subjects, "group"] if names == "all" else [name.strip() for name in names.split(",")]
    return {name: predictor.index(name) for name in names}


def average_rois(activity, space, subject):
    """Activity (n, n_vertices) -> table (n, n_rois) of ROI means for a subject (an index; None: the group)."""
    left, means = np.arange(space.n_vertices) < space.n_lh, {}
    for names, region in roi_masks(space, subject).items():
        for hemi, part in (("both", region), ("lh", region & left), ("rh", region & ~left)):
            if part.any():
                means[*names, hemi, part.sum()] = activity[:, part].mean(1)
    return pd.DataFrame(means).rename_axis(columns=["roi_group", "roi", "hemisphere", "n_vertices"])


def save_vertices(folder, space, subject):
    """Which vertices of fsaverage (or pixels of NSD-Flat's maps) the columns of a subject's arrays are."""
    for hemi in HEMIS:
        name = "fsaverage" if space.unit == "vertices" else "pixels"
        np.save(folder / f"{name}_{hemi}.npy", space.vertices.numpy()[space.columns(subject, hemi)])


def save_gifti(stem, space, maps):
    """stem_{lh,rh}.func.gii with maps {name: (n_vertices,)} on fsaverage, NaN where the model has no vertex."""
    for hemi in HEMIS if space.unit == "vertices" else ():
        image, columns = gifti.GiftiImage(), space.columns(None, hemi)
        for name, values in maps.items():
            full = np.full(N_FSAVERAGE, np.nan, np.float32)
            full[space.vertices.numpy()[columns]] = values[columns]
            image.add_gifti_data_array(gifti.GiftiDataArray(full, "NIFTI_INTENT_NONE", meta={"Name": name}))
        image.meta["AnatomicalStructurePrimary"] = {"lh": "CortexLeft", "rh": "CortexRight"}[hemi]
        image.to_filename(f"{stem}_{hemi}.func.gii")


def save_map(path, flat, values, limits, label, outlines, title, image=None):
    """A flat map of values (n_vertices,), NaN where missing, and the picture beside it if there is one."""
    widths = [3.0] * (image is not None) + [3 * flat.size[0] / flat.size[1]]  # inches
    figure = plt.figure(figsize=(sum(widths) + 1.2, 3.7), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    if image is not None:
        axes[0].imshow(image)
        axes[0].set_axis_off()
    mesh = flat.draw(axes[-1], values, limits, "RdBu_r", outlines, named=True)
    describe_maps(figure, [mesh], [axes[-1]], label, outlines)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def save_activity(folder, first, names, activity, space, subject):
    """Pictures' activity (n, n_vertices) -> rows from first on of a subject's arrays, and rows of rois.csv."""
    for hemi in HEMIS:
        array = np.load(folder / f"activity_{hemi}.npy", mmap_mode="r+")
        array[first : first + len(names)] = activity[:, space.columns(subject, hemi)]
    means, path = average_rois(activity, space, subject).set_axis(names), folder.parent / "rois.csv"
    means = means.melt(ignore_index=False, value_name="mean").assign(subject=folder.name)
    means.to_csv(path, mode="a", header=not path.exists(), index_label="picture", float_format="%.7g")


def draw_activity(folder, names, pictures, activity, flat, outlines):
    """Maps on one colour scale, and GIFTI files. activity (n, n_vertices): NaN where the subject has no vertex."""
    limits, label = fit_limits([activity]), "predicted activity (z)"
    for name, picture, values in zip(names, pictures, activity):
        title = f"{name}, {folder.name}"
        save_map(folder / f"{name}.png", flat, values, limits, label, outlines, title, picture.image)
        save_gifti(folder / name, flat.space, {label: values})


def main():
    paths, failures, rows = find_pictures(IMAGES, OUTPUT_DIR), [], []
    predictor = load_encoder(choose_checkpoints(CHECKPOINT, RUN_DIR), DEVICE, PRECISION, BATCH_SIZE)
    space, subjects = predictor.space, choose_subjects(SUBJECT, predictor)
    flat = FlatMap(space, FSAVERAGE_DIR) if len(paths) <= MAPS else None
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        for name, subject in subjects.items():
            (folder / name).mkdir()
            save_vertices(folder / name, space, subject)
            for hemi in HEMIS:
                shape = len(paths), len(space.columns(subject, hemi))
                np.lib.format.open_memmap(folder / name / f"activity_{hemi}.npy", "w+", "<f4", shape)
        for pictures, latents in predict_batches(predictor, paths, failures):
            batch = list_pictures(pictures, len(rows))
            names = [row["picture"] for row in batch]
            for name, subject in subjects.items():
                activity = predictor.decode(latents, subject).numpy()
                save_activity(folder / name, len(rows), names, activity, space, subject)
                if flat:
                    activity[:, ~space.present(subject)] = np.nan
                    draw_activity(folder / name, names, pictures, activity, flat, flat.outlines(OUTLINES, subject))
            rows += batch
        for path in folder.glob("*/activity_*.npy") if failures else ():  # fewer rows than expected
            np.save(folder / "cut.npy", np.load(path, mmap_mode="r")[: len(rows)])
            (folder / "cut.npy").replace(path)
        pd.DataFrame(rows).to_csv(folder / "pictures.csv", index_label="row")
    print(f"wrote {OUTPUT_DIR}: {plural(len(rows), 'picture')} for {', '.join(subjects)}")
    report(rows, failures)


if __name__ == "__main__":
    run(main, globals())
