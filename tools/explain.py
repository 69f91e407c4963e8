"""What every vertex sees: receptive fields of the whole cortex, and what each place of a picture adds to an ROI.

python -m tools.explain --images photo.jpg --rois V1v,FFA,PPA
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import predict
import prepare_data
from core.files import output_folder
from core.scores import r2_score
from core.settings import run
from model import UserError
from tools.contributions import Decomposition, describe_fields, measure_covariance
from tools.flatmap import FlatMap, fit_limits, save_figure
from tools.pictures import find_pictures, plural, read_batches, read_picture, report
from tools.predict_pictures import list_pictures, save_arrays, save_gifti
from tools.vertices import find, roi_masks

SUBJECT: str = ""  # a name or group; empty: the checkpoint's first subject
SPLIT: str = "val"  # train, val or test: where reference pictures come from
N_REFERENCE: int = 300  # reference pictures at most
IMAGES: str = ""  # pictures to explain: files, folders and globs, separated by commas; empty: fields only
ROIS: tuple[str, ...] = ("V1v", "FFA", "PPA")  # ROIs, or vertices as rows of fields.npz; 17+18+19 is their mean
OUTPUT_DIR: str = "explanations"  # output, described in docs/explain.md
FIGURES: int = 20  # draw explanations of up to so many pictures
MIN_R2: float = 0.05  # vertices below are left out of fields.png
OUTLINES: str = "prf-visualrois"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
BATCH_SIZE: int = 16  # pictures at a time
OVERWRITE: bool = False  # replace explanations that exist
SHARED = predict, "DATA_DIR RUN_DIR CHECKPOINT PRECISION DEVICE"  # set there


def reference_r2(data, rows, person, space, prediction, columns):
    """R² (n_columns,) of a prediction (n, n_vertices); NaN where there is no activity, as for the group (None)."""
    if person is None:
        return np.full(len(columns), np.nan)
    place = find(data.space, space)[columns]
    measured = (place >= 0) & data.space.present(person)[place]
    activity = torch.from_numpy(data.activity[rows][:, place])
    return np.where(measured, r2_score(activity, prediction[:, columns]), np.nan)


def draw_fields(path, flat, maps, subject, name):
    """maps: table (n_vertices of the common space,) of polar angle, eccentricity, size, depth and R2."""
    outlines, title = flat.outlines(OUTLINES, subject), f"{name}: receptive fields"
    if maps["R2"].notna().any():
        title += f" where R² is at least {MIN_R2:g}"
        maps = maps[~(maps["R2"] < MIN_R2)].reindex(maps.index)
    figure = plt.figure(figsize=(8 * flat.size[0] / flat.size[1] + 1.5, 8.3), layout="constrained")
    angle, *others = figure.subplots(2, 2).flat
    flat.draw(angle, maps["polar angle"], (-180, 180), "hsv", outlines, named=True)
    angle.set_title("polar angle")
    wheel, degrees = angle.inset_axes([0.42, 0, 0.16, 0.16], projection="polar"), np.linspace(-180, 180, 181)
    wheel.pcolormesh(np.radians(degrees), [0, 1], [degrees[:-1]], cmap="hsv")
    wheel.set_axis_off()
    units = {"eccentricity": "picture widths", "size": "picture widths", "depth": "block"}
    for panel, (column, unit) in zip(others, units.items()):
        mesh = flat.draw(panel, maps[column], fit_limits([maps[column]], symmetric=False), "viridis", outlines)
        figure.colorbar(mesh, ax=panel, shrink=0.7, extend="max", label=unit)
        panel.set_title(column)
    figure.suptitle(title)
    save_figure(figure, path)


def parse_rois(space, subject):
    """ROIS -> weights (n_rois, n_vertices of the subject) float32 of their means, a tensor."""
    present = space.present(subject)
    regions = {roi: region[present] for (_, roi), region in reversed(roi_masks(space, subject).items()) if region.any()}
    chosen = {str(row): row for row in range(present.sum())} | regions
    weights = torch.zeros(len(ROIS), present.sum())
    for name, row in zip(ROIS, weights):
        for part in name.split("+"):
            if part not in chosen:
                raise UserError(f"unknown ROI {part!r}; the subject has {', '.join(sorted(regions))}.")
            row[chosen[part]] = 1
    return weights / weights.sum(1, keepdim=True)


def draw_picture(path, image, encoder, constant, k, reference):
    """The picture; per ROI a heat map of places and bars of layers: contributions k minus those on average over
    reference pictures, both (n_rois, n_layers, n_tokens). constant (n_rois,): added to both gives activity."""
    heat = (k - reference)[:, :, encoder.trunk.n_prefix :].sum(1).reshape(-1, *encoder.trunk.grid)
    bars, end = (k - reference).sum(2), np.abs(heat).max() or 1
    activity, mean = (constant + values.sum((1, 2)) for values in (k, reference))
    figure = plt.figure(figsize=(2.5 * len(ROIS) + 3, 4.2), layout="constrained")
    axes = figure.subplots(2, len(ROIS) + 1, height_ratios=[2.5, 1])
    axes[0, 0].imshow(image)
    axes[0, 0].set_title(path.stem, fontsize=10, parse_math=False)
    for i, (panel, below, values, bar) in enumerate(zip(*axes[:, 1:], heat, bars)):
        panel.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        alpha = 0.85 * np.sqrt(np.abs(values) / end)
        mesh = panel.imshow(values, cmap="RdBu_r", vmin=-end, vmax=end, alpha=alpha, extent=(0, 1, 1, 0))
        panel.set_title(f"{ROIS[i]}: {activity[i]:+.2f} (mean {mean[i]:+.2f})", fontsize=10)
        below.bar(range(len(bar)), bar, color=np.where(bar > 0, "#b2182b", "#2166ac"), tick_label=encoder.layers)
        below.set(xlabel="block", ylim=(min(1.1 * bars.min(), 0), max(1.1 * bars.max(), 0)))
        below.axhline(0, color="black", linewidth=0.8)
    for panel in (*axes[0], axes[1, 0]):
        panel.set_axis_off()
    figure.colorbar(plt.cm.ScalarMappable(mesh.norm, "RdBu_r"), ax=axes[0, -1], shrink=0.8, label="z per place")
    figure.suptitle("added to the ROI's mean activity (z), relative to the reference pictures", fontsize=10)
    save_figure(figure, path)


def explain_pictures(folder, paths, decomposition, precision, rois, mean_terms):
    """Write contributions.npz, pictures.csv and figures -> [Picture], and errors. rois: weights of parse_rois()."""
    encoder, pictures, failures, contributions = decomposition.encoder, [], [], []
    weights, constant = rois @ decomposition.weights, (rois @ decomposition.constant).cpu().numpy()
    reference = (mean_terms @ weights.T).permute(2, 0, 1).cpu().numpy()  #        (n_rois, n_layers, n_tokens)
    for batch in read_batches(paths, BATCH_SIZE, failures):
        pictures += [picture._replace(image=None) for picture in batch]
        terms, _ = decomposition(np.stack([picture.image for picture in batch]), precision)
        contributions.extend((terms @ weights.T).permute(0, 3, 1, 2).cpu().numpy())
    table = list_pictures(pictures)
    table.to_csv(folder / "pictures.csv")
    arrays = dict(contributions=contributions, constant=constant, reference=reference, rois=ROIS)
    arrays |= dict(layers=encoder.layers, n_prefix=encoder.trunk.n_prefix, grid=encoder.trunk.grid)
    np.savez(folder / "contributions.npz", **arrays)
    for name, picture, k in zip(table["picture"], pictures, contributions) if len(paths) <= FIGURES else ():
        draw_picture(folder / f"{name}.png", read_picture(picture.path).image, encoder, constant, k, reference)
    return pictures, failures


@torch.inference_mode()
def main():
    paths = find_pictures(IMAGES, OUTPUT_DIR) if IMAGES else []
    data, predictor = prepare_data.load(predict.DATA_DIR), predict.load_chosen()
    if len(predictor.paths) > 1 or SPLIT not in prepare_data.SPLIT_NAMES:
        raise UserError("CHECKPOINT is one file here, and SPLIT train, val or test.")
    space, name = predictor.space, SUBJECT or predictor.subjects[0]
    subject = predictor.index(name)
    rois = parse_rois(space, subject).to(predictor.device) if paths else None
    columns = np.flatnonzero(space.present(subject))
    person = data.space.subjects.index(name) if name in data.space.subjects else None
    rows = data.samples(SPLIT, person)
    rows = rows[np.unique(data.image[rows], return_index=True)[1]]  # each picture once, also for the group
    rows = rows[np.linspace(0, len(rows) - 1, min(N_REFERENCE, len(rows))).astype(int)]
    decomposition, images = Decomposition(predictor.encoders[0], subject, columns), data.images[data.image[rows]]
    tokens, layers, mean_terms, h = measure_covariance(decomposition, images, predictor.precision, BATCH_SIZE)
    fields = describe_fields(tokens, layers, predictor.encoders[0])
    r2 = reference_r2(data, rows, person, space, predictor.decode([h], subject), columns)
    right, up = fields["x"] - 0.5, 0.5 - fields["y"]
    maps = {"polar angle": np.degrees(np.arctan2(up, right)), "eccentricity": np.hypot(right, up)}
    maps |= {"size": fields["size"], "depth": fields["depth"], "R2": r2}
    maps = pd.DataFrame(maps, columns).reindex(range(space.n_vertices))  # NaN where the subject has no vertex
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="fields.npz") as folder:
        np.savez(folder / "fields.npz", r2=r2, **fields)
        save_arrays(folder, space, subject)
        save_gifti(folder / "fields", space, subject, maps)
        draw_fields(folder / "fields.png", FlatMap(space, FSAVERAGE_DIR), maps, subject, name)
        if paths:
            explained = explain_pictures(folder, paths, decomposition, predictor.precision, rois, mean_terms)
    print(f"wrote {OUTPUT_DIR}: {name}, {len(columns)} vertices, {plural(len(rows), 'reference picture')}")
    if paths:
        report(*explained)


if __name__ == "__main__":
    run(main, globals())
