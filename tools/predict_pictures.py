"""Predict activity for your own pictures. python -m tools.predict_pictures --images photo.jpg --subject subj01,group

OUTPUT_DIR gets

    pictures.csv                  the rows of the arrays: name, file, width and height in px, note
    subj01/activity_{lh,rh}.npy   (n_pictures, n_vertices of that hemisphere) float32, z-scores, the challenge's order
    subj01/fsaverage_{lh,rh}.npy  (n_vertices,) which vertices of fsaverage these are
    rois.csv                      means over every ROI: both hemispheres, left, right
    subj01/000_photo.png, 000_photo_{lh,rh}.func.gii   for up to MAPS pictures: flat map; activity on fsaverage
"""

import textwrap
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from nibabel import gifti

from core.files import output_folder
from core.settings import progress, run
from core.space import HEMIS, N_FSAVERAGE
from predict import choose_checkpoints, load_encoder
from tools.flatmap import FlatMap, describe_maps, fit_limits, save_figure
from tools.pictures import find_pictures, list_pictures, plural, read_batches, report
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


def predict_batches(predictor, paths, failures):
    """Yields [Picture] and their latents, batch by batch; files that cannot be read are added to failures. Meanwhile
    threads decode files and run the trunk on the next batch."""
    with ThreadPoolExecutor(1) as thread, progress(total=len(paths), desc="predicting", unit="picture") as bar:
        batches = read_batches(paths, predictor.batch_size, failures)

        def next_batch():
            pictures = next(batches, None)
            return pictures and (pictures, predictor.latents(np.stack([p.image for p in pictures]), bar.update))

        coming = thread.submit(next_batch)
        while batch := coming.result():
            coming = thread.submit(next_batch)
            yield batch


def region_weights(space, subject):
    """ROIs of a subject (an index; None: the group) -> table (roi_group, roi, hemisphere, n_vertices), and weights (n,
    n_vertices) of the mean over each."""
    left, rows, weights = np.arange(space.n_vertices) < space.n_lh, [], []
    for names, region in roi_masks(space, subject).items():
        for hemi, side in (("both", True), ("lh", left), ("rh", ~left)):
            part = region & side
            if part.any():
                rows.append((*names, hemi, part.sum()))
                weights.append(part / part.sum())
    table = pd.DataFrame(rows, columns=["roi_group", "roi", "hemisphere", "n_vertices"])
    return table, np.stack(weights).astype(np.float32)


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
    figure.suptitle(textwrap.shorten(title, 70), fontsize=10, parse_math=False)
    save_figure(figure, path)


class Output:
    """The files of one subject (a name) for at most n_pictures."""

    def __init__(self, folder, predictor, name, n_pictures):
        self.folder, self.predictor, self.name, self.subject = folder / name, predictor, name, predictor.index(name)
        self.folder.mkdir()
        save_vertices(self.folder, predictor.space, self.subject)
        self.table, self.weights = region_weights(predictor.space, self.subject)
        self.arrays = {self.folder / f"activity_{h}.npy": predictor.space.columns(self.subject, h) for h in HEMIS}
        for path, columns in self.arrays.items():
            np.lib.format.open_memmap(path, "w+", "<f4", (n_pictures, len(columns)))

    def write(self, first, names, latents):
        """Rows of all files from row first on -> activity (n, n_vertices), NaN where the subject has no vertex."""
        activity, space = self.predictor.decode(latents, self.subject).numpy(), self.predictor.space
        for path, columns in self.arrays.items():
            np.lib.format.open_memmap(path, "r+")[first : first + len(names)] = activity[:, columns]
        means = zip(names, activity @ self.weights.T)
        tables = {(name, self.name): self.table.assign(mean=mean) for name, mean in means}
        table, path = pd.concat(tables, names=["picture", "subject"]).droplevel(2), self.folder.parent / "rois.csv"
        table.to_csv(path, mode="a", header=not path.exists(), float_format="%.7g")
        return np.where(space.present(self.subject), activity, np.float32(np.nan))

    def draw(self, names, images, activity):
        """Maps on one colour scale, and GIFTI files."""
        flat, label = FlatMap(self.predictor.space, FSAVERAGE_DIR), "predicted activity (z)"
        limits, outlines = fit_limits([activity]), flat.outlines(OUTLINES, self.subject)
        for name, image, values in zip(names, images, activity):
            path, title = self.folder / f"{name}.png", f"{name}, {self.name}"
            save_map(path, flat, values, limits, label, outlines, title, image)
            save_gifti(self.folder / name, self.predictor.space, {label: values})

    def close(self, n_pictures):
        """Cut the arrays to the pictures that could be read. The header keeps its length: numpy pads it."""
        for path, columns in self.arrays.items():
            with open(path, "r+b") as file:
                shape = (n_pictures, len(columns))
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                file.truncate(file.tell() + 4 * n_pictures * len(columns))


def main():
    paths, failures, tables, n = find_pictures(IMAGES, OUTPUT_DIR), [], [], 0
    predictor = load_encoder(choose_checkpoints(CHECKPOINT, RUN_DIR), DEVICE, PRECISION, BATCH_SIZE)
    subjects = choose_subjects(SUBJECT, predictor)
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="pictures.csv") as folder:
        outputs = [Output(folder, predictor, name, len(paths)) for name in subjects]
        for pictures, latents in predict_batches(predictor, paths, failures):
            tables.append(list_pictures(pictures, n))
            for output in outputs:
                activity = output.write(n, tables[-1].picture, latents)
                if len(paths) <= MAPS:
                    output.draw(tables[-1].picture, [p.image for p in pictures], activity)
            n += len(pictures)
        for output in outputs:
            output.close(n)
        table = pd.concat(tables, ignore_index=True)
        table.to_csv(folder / "pictures.csv", index_label="row")
    print(f"wrote {OUTPUT_DIR}: {plural(n, 'picture')} for {', '.join(subjects)}")
    report(table, failures)


if __name__ == "__main__":
    run(main, globals())
