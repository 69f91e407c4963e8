"""Predict activity for your own pictures. python -m tools.predict_pictures --images photo.jpg --subject subj01,group

OUTPUT_DIR gets the predicted activity, ROI means, maps and GIFTI files that docs/pictures.md describes.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from nibabel import gifti

import predict
from core.files import output_folder
from core.settings import run
from core.space import HEMIS, N_FSAVERAGE
from tools.flatmap import FlatMap, describe_maps, fit_limits, save_figure
from tools.pictures import find_pictures, list_pictures, plural, predict_files, read_picture, report
from tools.vertices import roi_masks

IMAGES: str = ""  # files, folders and globs, separated by commas
SUBJECT: str = "all"  # names separated by commas, group (subject-agnostic), or all
OUTPUT_DIR: str = "predictions"  # output
MAPS: int = 20  # draw maps and write GIFTI files for up to so many pictures; 0: never
OUTLINES: str = "streams"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
OVERWRITE: bool = False  # replace predictions that exist
SHARED = predict, "RUN_DIR CHECKPOINT BATCH_SIZE PRECISION DEVICE"  # set there


def choose_subjects(predictor):
    """SUBJECT -> {name: index, None for the group}."""
    names = [*predictor.subjects, "group"] if SUBJECT == "all" else [name.strip() for name in SUBJECT.split(",")]
    return {name: predictor.index(name) for name in names}


def average_rois(activity, space, subject):
    """Activity (n, n_vertices) -> table (n, n_rois) of ROI means for a subject (an index; None: the group)."""
    left, means = np.arange(space.n_vertices) < space.n_lh, {}
    for names, region in roi_masks(space, subject).items():
        for hemi, part in (("both", region), ("lh", region & left), ("rh", region & ~left)):
            if part.any():
                means[*names, hemi, part.sum()] = activity[:, part].mean(1)
    return pd.DataFrame(means).rename_axis(columns=["roi_group", "roi", "hemisphere", "n_vertices"])


def save_arrays(folder, space, subject, **arrays):
    """name_{lh,rh}.npy: arrays (n_vertices of the common space,) at a subject's vertices, in the challenge's order,
    and which vertices of fsaverage (or pixels of NSD-Flat's maps) these are."""
    folder.mkdir(exist_ok=True)
    arrays["fsaverage" if space.unit == "vertices" else "pixels"] = space.vertices.numpy()
    for name, values in arrays.items():
        for hemi in HEMIS:
            np.save(folder / f"{name}_{hemi}.npy", values[space.columns(subject, hemi)])


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


def save_activity(folder, predictor, latents, subject):
    """activity_{lh,rh}.npy of all pictures, batch by batch -> table (n, n_rois) of ROI means."""
    space, arrays, means = predictor.space, {}, []
    for hemi in HEMIS:
        shape = len(latents[0]), len(space.columns(subject, hemi))
        arrays[hemi] = np.lib.format.open_memmap(folder / f"activity_{hemi}.npy", "w+", "<f4", shape)
    for start in range(0, len(latents[0]), predictor.batch_size):
        batch = slice(start, start + predictor.batch_size)
        activity = predictor.decode([h[batch] for h in latents], subject).numpy()
        for hemi in HEMIS:
            arrays[hemi][batch] = activity[:, space.columns(subject, hemi)]
        means.append(average_rois(activity, space, subject))
    return pd.concat(means)


def draw_activity(folder, flat, pictures, names, activity, subject):
    """Maps on one colour scale, and GIFTI files, of activity (n, n_vertices)."""
    activity = np.where(flat.space.present(subject), activity, np.nan)
    limits, outlines = fit_limits([activity]), flat.outlines(OUTLINES, subject)
    label = "predicted activity (z)"
    for picture, name, values in zip(pictures, names, activity):
        image = read_picture(picture.path).image
        save_map(folder / f"{name}.png", flat, values, limits, label, outlines, f"{name}, {folder.name}", image)
        save_gifti(folder / name, flat.space, {label: values})


def main():
    paths, failures = find_pictures(IMAGES, OUTPUT_DIR), []
    predictor = predict.load_chosen()
    subjects = choose_subjects(predictor)
    flat = FlatMap(predictor.space, FSAVERAGE_DIR) if len(paths) <= MAPS else None
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        pictures, latents = predict_files(predictor, paths, failures)
        table = pd.DataFrame(list_pictures(pictures))
        table.to_csv(folder / "pictures.csv", index_label="row")
        for name, subject in subjects.items():
            save_arrays(folder / name, predictor.space, subject)
            means = save_activity(folder / name, predictor, latents, subject).set_axis(table["picture"])
            means = means.melt(ignore_index=False, value_name="mean").assign(subject=name)
            path = folder / "rois.csv"
            means.to_csv(path, mode="a", header=not path.exists(), float_format="%.7g")
            if flat:
                activity = predictor.decode(latents, subject)
                draw_activity(folder / name, flat, pictures, table["picture"], activity, subject)
    print(f"wrote {OUTPUT_DIR}: {plural(len(pictures), 'picture')} for {', '.join(subjects)}")
    report(pictures, failures)


if __name__ == "__main__":
    run(main, globals())
