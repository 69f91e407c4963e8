"""What every vertex sees: receptive fields of the whole cortex, and what each place of a picture adds to an ROI.

    python -m tools.explain --images photo.jpg --rois V1v,FFA,PPA

OUTPUT_DIR, described in docs/explain.md, gets fields.npz, GIFTI files and fields.png: where every vertex looks, and in
which layers; with IMAGES contributions.npz, and a figure of every picture with its explanation.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import prepare_data
from core.files import output_folder
from core.scores import r2_score
from core.settings import run
from model import UserError
from predict import choose_checkpoints, load_encoder
from tools.contributions import Decomposition, describe_fields, measure_covariance
from tools.flatmap import FlatMap, fit_limits, save_figure
from tools.pictures import find_pictures, list_pictures, plural, read_batches, report
from tools.predict_pictures import save_gifti, save_vertices
from tools.vertices import find, roi_masks

DATA_DIR: str = "data"  # prepared data: reference pictures, and activity for R²
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # one file; empty: finetuned.pt in RUN_DIR, else head.pt
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
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace explanations that exist


def choose_references(data, name):
    """Rows (n,) of a subject's samples in SPLIT, evenly spaced; for the group of everyone's, each picture once."""
    rows = data.samples(SPLIT, data.space.subjects.index(name) if name in data.space.subjects else None)
    rows = rows[np.unique(data.image[rows], return_index=True)[1]]
    if len(rows) < 2:
        raise UserError(f"{DATA_DIR} has fewer than two pictures in the {SPLIT} split.")
    return rows[np.linspace(0, len(rows) - 1, min(N_REFERENCE, len(rows))).astype(int)]


def reference_r2(predictor, data, name, rows, latents):
    """R² (n_vertices of the common space,) on these samples; NaN where there is no activity, as for the group."""
    r2 = np.full(predictor.space.n_vertices, np.nan)
    if name in data.space.subjects:
        place = find(predictor.space, data.space)
        prediction = predictor.decode([latents], predictor.index(name))[:, place]
        measured = (place >= 0) & data.space.present(data.space.subjects.index(name))
        r2[place[measured]] = r2_score(torch.from_numpy(data.read_activity(rows)), prediction)[measured]
    return r2


def draw_fields(path, flat, maps, outlines, title):
    """maps {name: (n_vertices of the common space,)}, NaN where masked."""
    figure = plt.figure(figsize=(8 * flat.size[0] / flat.size[1] + 1.5, 8.3), layout="constrained")
    angle, *others = figure.subplots(2, 2).flat
    flat.draw(angle, maps["polar angle"], (-180, 180), "hsv", outlines, named=True)
    angle.set_title("polar angle")
    wheel, degrees = angle.inset_axes([0.42, 0, 0.16, 0.16], projection="polar"), np.linspace(-180, 180, 181)
    wheel.pcolormesh(np.radians(degrees), [0, 1], [degrees[:-1]], cmap="hsv")
    wheel.set_axis_off()
    for panel, name in zip(others, ("eccentricity", "size", "depth")):
        mesh = flat.draw(panel, maps[name], fit_limits([maps[name]], symmetric=False), "viridis", outlines)
        label = "block" if name == "depth" else "picture widths"
        figure.colorbar(mesh, ax=panel, shrink=0.7, extend="max", label=label)
        panel.set_title(name)
    figure.suptitle(title)
    save_figure(figure, path)


def parse_rois(space, subject):
    """ROIS -> weights (n_rois, n_vertices of the subject) float32 of their means."""
    present = space.present(subject)
    regions = {roi: region[present] for (_, roi), region in reversed(roi_masks(space, subject).items()) if region.any()}
    weights = np.zeros((len(ROIS), present.sum()), np.float32)
    for name, row in zip(ROIS, weights):
        for part in name.split("+"):
            if part not in regions and not (part.isdigit() and int(part) < len(row)):
                raise UserError(f"unknown ROI {part!r}; the subject has {', '.join(sorted(regions))}.")
            row[regions[part] if part in regions else int(part)] = 1
    return weights / weights.sum(1, keepdims=True)


def draw_picture(path, picture, encoder, change, activity):
    """The picture; per ROI a heat map of places and bars of layers. change (n_rois, n_layers, n_tokens): relative to
    reference pictures; activity (n_rois, 2): predicted, and the mean over reference pictures."""
    heat = change[:, :, encoder.trunk.n_prefix :].sum(1).reshape(-1, *encoder.trunk.grid)
    bars, end = change.sum(2), np.abs(heat).max() or 1
    figure = plt.figure(figsize=(2.5 * len(ROIS) + 3, 4.2), layout="constrained")
    axes = figure.subplots(2, len(ROIS) + 1, height_ratios=[2.5, 1])
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title(path.stem, fontsize=10, parse_math=False)
    for name, panel, below, values, bar, (now, mean) in zip(ROIS, axes[0, 1:], axes[1, 1:], heat, bars, activity):
        panel.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        colours = dict(cmap="RdBu_r", vmin=-end, vmax=end, alpha=0.85 * np.sqrt(np.abs(values) / end))
        mesh = panel.imshow(values, **colours, extent=(0, 1, 1, 0))
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
    """Write contributions.npz, pictures.csv and figures -> its rows, and errors. rois: weights of parse_rois()."""
    encoder, failures, table, contributions = decomposition.encoder, [], [], []
    means = torch.from_numpy(rois).to(mean_terms.device)  #                       (n_rois, n_vertices)
    weights, constant = means @ decomposition.weights, (means @ decomposition.constant).cpu().numpy()
    reference = (mean_terms @ weights.T).permute(2, 0, 1).cpu().numpy()  #        (n_rois, n_layers, n_tokens)
    for pictures in read_batches(paths, BATCH_SIZE, failures):
        terms, _ = decomposition(np.stack([p.image for p in pictures]), precision)
        contributions.extend((terms @ weights.T).permute(0, 3, 1, 2).cpu().numpy())
        rows = list_pictures(pictures, len(table))
        for p, row, k in zip(pictures, rows, contributions[len(table) :] if len(paths) <= FIGURES else ()):
            activity = constant[:, None] + np.stack([k.sum((1, 2)), reference.sum((1, 2))], 1)
            draw_picture(folder / f"{row['picture']}.png", p.image, encoder, k - reference, activity)
        table += rows
    np.savez(
        folder / "contributions.npz", contributions=contributions, constant=constant, reference=reference, rois=ROIS,
        layers=encoder.layers, n_prefix=encoder.trunk.n_prefix, grid=encoder.trunk.grid,
    )  # fmt: skip
    pd.DataFrame(table).to_csv(folder / "pictures.csv", index_label="row")
    return table, failures


@torch.inference_mode()
def main():
    paths, checkpoints = find_pictures(IMAGES, OUTPUT_DIR) if IMAGES else [], choose_checkpoints(CHECKPOINT, RUN_DIR)
    if len(checkpoints) > 1 or SPLIT not in prepare_data.SPLIT_NAMES:
        raise UserError("CHECKPOINT is one file here, and SPLIT train, val or test.")
    data, predictor = prepare_data.load(DATA_DIR), load_encoder(checkpoints, DEVICE, PRECISION, BATCH_SIZE)
    space, [encoder], name = predictor.space, predictor.encoders, SUBJECT or predictor.subjects[0]
    subject, rows = predictor.index(name), choose_references(data, name)
    rois, columns = parse_rois(space, subject) if paths else None, np.flatnonzero(space.present(subject))
    decomposition, images = Decomposition(encoder, subject, columns), data.images[data.image[rows]]
    tokens, layers, mean_terms, h = measure_covariance(decomposition, images, predictor.precision, BATCH_SIZE)
    fields, r2 = describe_fields(tokens, layers, encoder), reference_r2(predictor, data, name, rows, h)
    right, up, maps = fields["x"] - 0.5, 0.5 - fields["y"], {}
    polar = {"polar angle": np.degrees(np.arctan2(up, right)), "eccentricity": np.hypot(right, up)}
    for key, values in (polar | {"size": fields["size"], "depth": fields["depth"]}).items():
        maps[key] = np.full(space.n_vertices, np.nan)
        maps[key][columns] = values
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="fields.npz") as folder:
        np.savez(folder / "fields.npz", r2=r2[columns], **fields)
        save_vertices(folder, space, subject)
        save_gifti(folder / "fields", space, maps | {"R2": r2})
        flat = FlatMap(space, FSAVERAGE_DIR)
        maps = {key: np.where(r2 < MIN_R2, np.nan, values) for key, values in maps.items()}
        title = f"{name}: receptive fields" + f" where R² is at least {MIN_R2:g}" * bool(np.isfinite(r2).any())
        draw_fields(folder / "fields.png", flat, maps, flat.outlines(OUTLINES, subject), title)
        if paths:
            explained = explain_pictures(folder, paths, decomposition, predictor.precision, rois, mean_terms)
    print(f"wrote {OUTPUT_DIR}: {name}, {len(columns)} vertices, {plural(len(rows), 'reference picture')}")
    if paths:
        report(*explained)


if __name__ == "__main__":
    run(main, globals())
