"""Predict activity for your own pictures. python -m tools.predict_pictures --images photo.jpg --subject subj01,group"""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from nibabel import gifti

import predict
from core.files import output_folder
from core.settings import run
from core.space import HEMIS
from tools.flatmap import FlatMap, describe_maps, fit_limits, save_figure
from tools.pictures import find_pictures, plural, predict_files, read_picture, report, shown
from tools.vertices import roi_masks

IMAGES: str = ""  # files, folders and globs, separated by commas
SUBJECT: str = "all"  # names separated by commas, group (subject-agnostic), or all
OUTPUT_DIR: str = "predictions"  # output: activity, ROI means, maps and GIFTI files, described in docs/pictures.md
MAPS: int = 20  # draw maps and write GIFTI files for up to so many pictures; 0: never
OUTLINES: str = "streams"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
OVERWRITE: bool = False  # replace predictions that exist
SHARED = predict, "RUN_DIR CHECKPOINT BATCH_SIZE PRECISION DEVICE"  # set there


def choose_subjects(predictor):
    """SUBJECT -> {name: index, None for the group}."""
    names = [*predictor.subjects, "group"] if SUBJECT == "all" else [name.strip() for name in SUBJECT.split(",")]
    return {name: predictor.index(name) for name in names}


def list_pictures(pictures):
    """[Picture] -> pictures.csv, a table. picture: a name that can serve in file names, whatever the file is called."""
    rows = []
    for row, p in enumerate(pictures):
        name = f"{row:03d}_" + re.sub(r"[^A-Za-z0-9-]+", "_", p.path.stem)[:60]
        rows.append((name, shown(p.path), p.width, p.height, p.note))
    return pd.DataFrame(rows, columns=["picture", "file", "width", "height", "note"]).rename_axis("row")


def average_rois(activity, space, subject):
    """Activity (n, n_vertices) -> table (n, n_rois) of ROI means for a subject (an index; None: the group)."""
    left, means = np.arange(space.n_vertices) < space.n_lh, {}
    for names, region in roi_masks(space, subject).items():
        for hemi, part in (("both", region), ("lh", region & left), ("rh", region & ~left)):
            if part.any():
                means[*names, hemi, part.sum()] = activity[:, part].mean(1)
    return pd.DataFrame(means).rename_axis(columns=["roi_group", "roi", "hemisphere", "n_vertices"])


def save_arrays(folder, space, subject, **arrays):
    """name_{lh,rh}.npy of arrays (n_vertices of the common space,) at a subject's vertices, and which these are."""
    folder.mkdir(exist_ok=True)
    arrays["fsaverage" if space.unit == "vertices" else "pixels"] = space.vertices.numpy()
    for name, values in arrays.items():
        for hemi in HEMIS:
            np.save(folder / f"{name}_{hemi}.npy", values[space.columns(subject, hemi)])


def save_gifti(stem, space, subject, maps):
    """stem_{lh,rh}.func.gii on fsaverage. maps {name: (n_vertices of the common space,)}; NaN without a vertex."""
    if space.unit != "vertices":
        return
    full = predict.Activity(torch.from_numpy(np.stack([maps[name] for name in maps])), space, subject).to_fsaverage()
    for hemi, side in {"lh": "CortexLeft", "rh": "CortexRight"}.items():
        image = gifti.GiftiImage(meta=gifti.GiftiMetaData(AnatomicalStructurePrimary=side))
        for name, array in zip(maps, full[hemi]):
            image.add_gifti_data_array(gifti.GiftiDataArray(array, "NIFTI_INTENT_NONE", meta={"Name": name}))
        image.to_filename(f"{stem}_{hemi}.func.gii")


def save_map(path, flat, subject, values, label, title, limits=None, image=None):
    """A flat map of a subject's values (n_vertices of the common space,); image: a picture that is shown beside it."""
    values, outlines = np.where(flat.space.present(subject), values, np.nan), flat.outlines(OUTLINES, subject)
    widths = [3.0] * (image is not None) + [3 * flat.size[0] / flat.size[1]]  # inches
    figure = plt.figure(figsize=(sum(widths) + 1.2, 3.7), layout="constrained")
    *left, axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for panel in left:
        panel.imshow(image)
        panel.set_axis_off()
    mesh = flat.draw(axes, values, limits or fit_limits([values]), "RdBu_r", outlines, named=True)
    describe_maps(figure, [mesh], [axes], label, outlines)
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
        for hemi, array in arrays.items():
            array[batch] = activity[:, space.columns(subject, hemi)]
        means.append(average_rois(activity, space, subject))
    return pd.concat(means)


def main():
    paths, failures = find_pictures(IMAGES, OUTPUT_DIR), []
    predictor = predict.load_chosen()
    subjects = choose_subjects(predictor)
    flat = FlatMap(predictor.space, FSAVERAGE_DIR) if len(paths) <= MAPS else None
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        pictures, latents = predict_files(predictor, paths, failures)
        table = list_pictures(pictures)
        table.to_csv(folder / "pictures.csv")
        for name, subject in subjects.items():
            save_arrays(folder / name, predictor.space, subject)
            means = save_activity(folder / name, predictor, latents, subject).set_axis(table["picture"])
            means = means.melt(ignore_index=False, value_name="mean").assign(subject=name)
            means.to_csv(folder / "rois.csv", mode="a", header=name == [*subjects][0], float_format="%.7g")
            if flat:
                activity, label = predictor.decode(latents, subject).numpy(), "predicted activity (z)"
                limits = fit_limits([activity[:, predictor.space.present(subject)]])
                for picture, stem, values in zip(pictures, table["picture"], activity):
                    image, path = read_picture(picture.path).image, folder / name / stem
                    save_map(f"{path}.png", flat, subject, values, label, f"{stem}, {name}", limits, image)
                    save_gifti(path, predictor.space, subject, {label: values})
    print(f"wrote {OUTPUT_DIR}: {plural(len(pictures), 'picture')} for {', '.join(subjects)}")
    report(pictures, failures)


if __name__ == "__main__":
    run(main, globals())
