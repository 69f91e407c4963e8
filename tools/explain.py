"""What every vertex sees: receptive fields of the whole cortex, and what each place of a picture adds to an ROI.

    python -m tools.explain --images photo.jpg --rois V1v,FFA,PPA

OUTPUT_DIR, described in docs/explain.md, gets fields.npz, GIFTI files and fields.png: where every vertex looks, and in
which layers; with IMAGES contributions.npz, and a figure of every picture with its explanation.
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
from tools.pictures import find_pictures, list_pictures, plural, read_batches, read_picture, report
from tools.predict_pictures import save_arrays, save_gifti
from tools.vertices import find, roi_masks

SUBJECT: str = ""  # a name or group; empty: the checkpoint's first subject
SPLIT: str = "val"  # train, val or test: where reference pictures come from
N_REFERENCE: int = 300  # reference pictures at most
IMAGES: str = ""  # pictures to explain: files, folders and globs, separated by commas; empty: fields only
ROIS: tuple[str, ...] = ("V1v", "FFA", "PPA")  # ROIs, or vertices as rows of fields.npz; 17+18+19 is their mean
OUTPUT_DIR: str = "explanations"  # output
FIGURES: int = 20  # draw explanations of up to so many pictures
MIN_R2: float = 0.05  # vertices below are left out of fields.png
OUTLINES: str = "prf-visualrois"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
BATCH_SIZE: int = 16  # pictures at a time
OVERWRITE: bool = False  # replace explanations that exist
SHARED = predict, "DATA_DIR RUN_DIR CHECKPOINT PRECISION DEVICE"  # set there


def choose_references(data, name):
    """Rows (n,) of a subject's samples in SPLIT, evenly spaced; for the group of everyone's, each picture once."""
    rows = data.samples(SPLIT, data.space.subjects.index(name) if name in data.space.subjects else None)
    rows = rows[np.unique(data.image[rows], return_index=True)[1]]
    return rows[np.linspace(0, len(rows) - 1, min(N_REFERENCE, len(rows))).astype(int)]


def reference_r2(predictor, data, name, rows, latents):
    """R² (n_vertices of the subject,) on these samples; NaN where there is no activity, as for the group."""
    subject = predictor.index(name)
    columns = predictor.space.present(subject)
    if name not in data.space.subjects:
        return np.full(columns.sum(), np.nan)
    place = find(data.space, predictor.space)[columns]
    measured = (place >= 0) & data.space.present(data.space.subjects.index(name))[place]
    activity = torch.from_numpy(data.read_activity(rows)[:, place])
    return np.where(measured, r2_score(activity, predictor.decode([latents], subject)[:, columns]), np.nan)


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
    for panel, column in zip(others, ("eccentricity", "size", "depth")):
        mesh = flat.draw(panel, maps[column], fit_limits([maps[column]], symmetric=False), "viridis", outlines)
        label = "block" if column == "depth" else "picture widths"
        figure.colorbar(mesh, ax=panel, shrink=0.7, extend="max", label=label)
        panel.set_title(column)
    figure.suptitle(title)
    save_figure(figure, path)


def parse_rois(space, subject):
    """ROIS -> weights (n_rois, n_vertices of the subject) float32 of their means."""
    present = space.present(subject)
    regions = {roi: region[present] for (_, roi), region in reversed(roi_masks(space, subject).items()) if region.any()}
    chosen = {str(row): row for row in range(present.sum())} | regions
    weights = np.zeros((len(ROIS), present.sum()), np.float32)
    for name, row in zip(ROIS, weights):
        for part in name.split("+"):
            if part not in chosen:
                raise UserError(f"unknown ROI {part!r}; the subject has {', '.join(sorted(regions))}.")
            row[chosen[part]] = 1
    return weights / weights.sum(1, keepdims=True)


def draw_picture(path, image, encoder, change, activity):
    """The picture; per ROI a heat map of places and bars of layers. change (n_rois, n_layers, n_tokens): relative to
    reference pictures; activity (n_rois, 2): predicted, and the mean over reference pictures."""
    heat = change[:, :, encoder.trunk.n_prefix :].sum(1).reshape(-1, *encoder.trunk.grid)
    bars, end = change.sum(2), np.abs(heat).max() or 1
    figure = plt.figure(figsize=(2.5 * len(ROIS) + 3, 4.2), layout="constrained")
    axes = figure.subplots(2, len(ROIS) + 1, height_ratios=[2.5, 1])
    axes[0, 0].imshow(image)
    axes[0, 0].set_title(path.stem, fontsize=10, parse_math=False)
    for name, panel, below, values, bar, (now, mean) in zip(ROIS, axes[0, 1:], axes[1, 1:], heat, bars, activity):
        panel.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        alpha = 0.85 * np.sqrt(np.abs(values) / end)
        mesh = panel.imshow(values, cmap="RdBu_r", vmin=-end, vmax=end, alpha=alpha, extent=(0, 1, 1, 0))
        panel.set_title(f"{name}: {now:+.2f} (mean {mean:+.2f})", fontsize=10)
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
    rois = torch.from_numpy(rois).to(mean_terms.device)
    weights = rois @ decomposition.weights  #                                     (n_rois, latent_dim)
    constant = (rois @ decomposition.constant).cpu().numpy()
    reference = (mean_terms @ weights.T).permute(2, 0, 1).cpu().numpy()  #        (n_rois, n_layers, n_tokens)
    for batch in read_batches(paths, BATCH_SIZE, failures):
        pictures += [picture._replace(image=None) for picture in batch]
        terms, _ = decomposition(np.stack([picture.image for picture in batch]), precision)
        contributions.extend((terms @ weights.T).permute(0, 3, 1, 2).cpu().numpy())
    rows = list_pictures(pictures)
    pd.DataFrame(rows).to_csv(folder / "pictures.csv", index_label="row")
    np.savez(
        folder / "contributions.npz", contributions=contributions, constant=constant, reference=reference, rois=ROIS,
        layers=encoder.layers, n_prefix=encoder.trunk.n_prefix, grid=encoder.trunk.grid,
    )  # fmt: skip
    for row, picture, k in zip(rows, pictures, contributions) if len(paths) <= FIGURES else ():
        activity = constant[:, None] + np.stack([k.sum((1, 2)), reference.sum((1, 2))], 1)
        image = read_picture(picture.path).image
        draw_picture(folder / f"{row['picture']}.png", image, encoder, k - reference, activity)
    return pictures, failures


@torch.inference_mode()
def main():
    paths = find_pictures(IMAGES, OUTPUT_DIR) if IMAGES else []
    data, predictor = prepare_data.load(predict.DATA_DIR), predict.load_chosen()
    if len(predictor.paths) > 1 or SPLIT not in prepare_data.SPLIT_NAMES:
        raise UserError("CHECKPOINT is one file here, and SPLIT train, val or test.")
    space, name = predictor.space, SUBJECT or predictor.subjects[0]
    subject = predictor.index(name)
    rois = parse_rois(space, subject) if paths else None
    columns = np.flatnonzero(space.present(subject))
    rows = choose_references(data, name)
    decomposition = Decomposition(predictor.encoders[0], subject, columns)
    images = data.images[data.image[rows]]
    tokens, layers, mean_terms, h = measure_covariance(decomposition, images, predictor.precision, BATCH_SIZE)
    r2 = reference_r2(predictor, data, name, rows, h)
    fields = describe_fields(tokens, layers, predictor.encoders[0])
    right, up = fields["x"] - 0.5, 0.5 - fields["y"]
    maps = {"polar angle": np.degrees(np.arctan2(up, right)), "eccentricity": np.hypot(right, up)}
    maps |= {"size": fields["size"], "depth": fields["depth"], "R2": r2}
    maps = pd.DataFrame(maps, columns).reindex(range(space.n_vertices))  # NaN where the subject has no vertex
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="fields.npz") as folder:
        np.savez(folder / "fields.npz", r2=r2, **fields)
        save_arrays(folder, space, subject)
        save_gifti(folder / "fields", space, maps)
        draw_fields(folder / "fields.png", FlatMap(space, FSAVERAGE_DIR), maps, subject, name)
        if paths:
            explained = explain_pictures(folder, paths, decomposition, predictor.precision, rois, mean_terms)
    print(f"wrote {OUTPUT_DIR}: {name}, {len(columns)} vertices, {plural(len(rows), 'reference picture')}")
    if paths:
        report(*explained)


if __name__ == "__main__":
    run(main, globals())
