"""What every vertex sees: receptive fields of the whole cortex, and what each place of a picture adds to an ROI.

A prediction is exactly a sum over layers l and tokens n, that is, places of the picture (docs/explain.md):

    y = constant + sum_l sum_n k_l[n],    k_l[n] = sum_d g[d] a_l[d] S_l[d,n] (W_l x_l[n])[d],    g = E (A + B_s)

with a_l the slope of batch norm and of the mean over layers. OUTPUT_DIR gets

    fields.npz, fields_{lh,rh}.func.gii, fields.png    where every vertex looks, and in which layers
    contributions.npz, 000_photo.png                   with IMAGES: k of every ROI; the picture with its explanation
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import prepare_data
from core.files import output_folder
from core.scores import r2_score
from core.settings import progress, run
from model import UserError, trunk_outputs
from predict import choose_checkpoints, load_encoder
from tools.flatmap import FlatMap, save_figure
from tools.pictures import find_pictures, plural, read_batches, report
from tools.predict_pictures import list_pictures, save_gifti, save_vertices

DATA_DIR: str = "data"  # prepared data: reference pictures, and activity for R²
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # one file; empty: finetuned.pt in RUN_DIR, else head.pt
SUBJECT: str = ""  # a name or group; empty: the checkpoint's first subject
SPLIT: str = "val"  # train, val or test: where reference pictures come from
N_REFERENCE: int = 300  # reference pictures at most
IMAGES: str = ""  # pictures to explain: files, folders and globs, separated by commas; empty: fields only
ROIS: tuple[str, ...] = ("V1v", "FFA", "PPA")  # ROIs, or rows of fields.npz such as 17; 17+18+19 is their mean
OUTPUT_DIR: str = "explanations"  # output
FIGURES: int = 20  # draw explanations of up to so many pictures
MIN_R2: float = 0.05  # vertices below are left out of fields.png
OUTLINES: str = "prf-visualrois"  # ROI group outlined on maps; empty: none
FSAVERAGE_DIR: str = ""  # with flat_left.gii.gz … of full fsaverage; empty: fsaverage5
BATCH_SIZE: int = 16  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace explanations that exist

CHUNK = 1024  # vertices at a time


class Decomposition:
    """y[v] = constant[v] + sum_l sum_n sum_d weights[v,d] terms[l,n,d] for some columns of the common space.

    constant (n_vertices,), weights (n_vertices, latent_dim). The head's functions are the only source of both, so that
    other affine ones are followed; for others check() raises UserError.
    """

    def __init__(self, encoder, subject, columns):
        self.encoder, self.subject, self.columns = encoder, subject, columns
        n_layers, latent_dim = len(encoder.layers), encoder.head.shared.shape[1]
        device = encoder.head.shared.device
        offset = encoder.head.combine(torch.zeros(n_layers, 1, latent_dim, device=device))
        layers = torch.eye(n_layers, device=device)[:, :, None].expand(-1, -1, latent_dim)  # one layer at a time is 1
        self.slopes = encoder.head.combine(layers) - offset  #                    (n_layers, latent_dim)
        basis = torch.eye(latent_dim, device=device)
        self.constant = self.predict(offset)[0]
        self.weights = (self.predict(basis) - self.predict(0 * offset)).T.contiguous()

    def predict(self, h):
        return self.encoder.predict(h, self.subject)[:, self.columns]

    def terms(self, features):
        """The trunk's features -> (n, n_layers, n_tokens, latent_dim); as Head.project, but not summed over tokens."""
        terms = []
        for projection, x, slope in zip(self.encoder.head.projections, self.encoder.choose(features), self.slopes):
            y = F.linear(x, projection.channel)
            terms.append(slope * (y * projection.spatial.T.to(y.dtype)).float())
        return torch.stack(terms, 1)

    def __call__(self, images, precision):
        """images (n, 256, 256, 3) uint8 -> terms, and latents h (n, latent_dim)."""
        functions = [self.terms, self.encoder.latents]
        terms, h = trunk_outputs(self.encoder.trunk, images, functions, len(images), precision)
        self.check(terms, h)
        return terms, h

    def check(self, terms, h):
        expected = self.predict(h)
        error = (self.constant + terms.sum((1, 2)) @ self.weights.T - expected).abs().max()
        if not error <= 1e-4 * max(1, expected.abs().max()):
            raise UserError(
                f"the contributions of layers and places miss the prediction by {error:.2g}: explanations need a head "
                "in model.py that is affine in every projected feature."
            )


class Covariance:
    """Covariance over pictures of each token's and each layer's contribution with the vertex's prediction."""

    def __init__(self, decomposition):
        self.weights, self.n, self.terms, self.h, self.products = decomposition.weights, 0, 0, 0, 0

    def add(self, terms, h):
        """terms (n, n_layers, n_tokens, latent_dim), h (n, latent_dim)"""
        if not self.n:
            self.origin = h.mean(0)  # keeps rounding small
        h = h - self.origin
        self.n, self.terms, self.h = self.n + len(h), self.terms + terms.sum(0), self.h + h.sum(0)
        parts = torch.cat([terms.sum(1), terms.sum(2)], 1)  #                     (n, n_tokens + n_layers, latent_dim)
        products = []
        for weights in self.weights.split(CHUNK):
            products.append(torch.einsum("nkv,nv->kv", parts @ weights.T, h @ weights.T))
        self.products = self.products + torch.cat(products, 1).double()

    def result(self):
        """-> covariance of tokens (n_tokens, n_vertices) and layers (n_layers, n_vertices), and mean terms."""
        terms, h = self.terms / self.n, self.h / self.n
        means = torch.cat([terms.sum(0), terms.sum(1)]) @ self.weights.T
        covariance = (self.products / self.n - means * (h @ self.weights.T)).cpu().numpy()
        return *np.split(covariance, [terms.shape[1]]), terms


def describe_fields(tokens, layers, encoder):
    """Covariances -> {name: array}, the vertices first; see docs/explain.md. NaN where the prediction is constant."""
    n_prefix, (n_rows, n_columns) = encoder.trunk.n_prefix, encoder.trunk.grid
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = (layers / tokens.sum(0)).T
        depth = np.clip(shares, 0, None) @ encoder.layers / np.clip(shares, 0, None).sum(1)
        field = np.clip(tokens[n_prefix:], 0, None).T
        field = field / field.sum(1, keepdims=True)
        row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
        x, y = (column + 0.5) / n_columns, (row + 0.5) / n_rows
        variance = field @ x**2 - (field @ x) ** 2 + field @ y**2 - (field @ y) ** 2
        return {
            "x": field @ x,
            "y": field @ y,
            "size": np.sqrt(variance / 2),
            "depth": depth,
            "layer_share": shares,
            "prefix_share": tokens[:n_prefix].sum(0) / tokens.sum(0),
            "field": field.reshape(-1, n_rows, n_columns).astype(np.float16),
        }


def reference_samples(data, name):
    """Rows (n,) of the subject's samples in SPLIT, or for the group of one sample per picture; N_REFERENCE at most."""
    if SPLIT not in prepare_data.SPLIT_NAMES:
        raise UserError(f"SPLIT is {SPLIT!r}, expected train, val or test.")
    subjects = data.space.subjects
    rows = data.samples(SPLIT, subjects.index(name) if name in subjects else None)
    rows = rows[np.unique(data.image[rows], return_index=True)[1]]
    if len(rows) < 2:
        raise UserError(f"{DATA_DIR} has fewer than two pictures in {SPLIT}.")
    return rows[np.linspace(0, len(rows) - 1, min(N_REFERENCE, len(rows))).astype(int)]


def reference_r2(predictor, data, name, rows, latents):
    """R² (n_vertices of the common space,) on these samples; NaN where there is no activity, as for the group."""
    r2 = np.full(predictor.space.n_vertices, np.nan)
    if name in data.space.subjects:
        place = predictor.space.find(data.space)
        prediction = predictor.decode([latents], predictor.index(name))[:, place]
        scores = r2_score(torch.from_numpy(data.read_activity(rows)), prediction)
        has_both = (place >= 0) & data.space.present(data.space.subjects.index(name))
        r2[place[has_both]] = scores.numpy()[has_both]
    return r2


def draw_fields(path, flat, maps, outlines, name):
    """maps {name: (n_vertices of the common space,)}, NaN where masked."""
    panels = [("polar angle", "hsv", (-180, 180)), ("eccentricity", "viridis", None)]
    panels += [("size", "viridis", None), ("depth", "plasma", None)]
    labels = {"eccentricity": "picture widths from the centre", "size": "picture widths", "depth": "block of the trunk"}
    width = 4 * flat.size[0] / flat.size[1]
    figure, axes = plt.subplots(2, 2, figsize=(2 * width + 2, 8), layout="constrained")
    for panel, (key, colours, limits) in zip(axes.flat, panels):
        limits = limits or np.nanquantile(maps[key], [0.02, 0.98])
        mesh = flat.draw(panel, maps[key], limits, colours, outlines, named=key == "polar angle")
        panel.set_title(key)
        if key in labels:
            figure.colorbar(mesh, ax=panel, shrink=0.7, extend="both", label=labels[key])
    wheel = axes[0, 0].inset_axes([0.42, 0.0, 0.16, 0.16], projection="polar")
    angle = np.linspace(-np.pi, np.pi, 181)
    wheel.pcolormesh(angle, [0, 1], [np.degrees(angle[:-1])], cmap="hsv")
    wheel.set_axis_off()
    figure.suptitle(name)
    save_figure(figure, path)


def parse_rois(space, subject):
    """ROIS -> {name: weights (n_vertices of the common space,) of the mean}."""
    regions, columns, weights = {}, np.flatnonzero(space.present(subject)), {}
    for (_, roi), region in space.regions(subject).items():
        regions[roi] = regions.get(roi, False) | region
    for name in ROIS:
        mask = np.zeros(space.n_vertices, bool)
        for part in name.split("+"):
            if part.isdigit() and int(part) < len(columns):
                mask[columns[int(part)]] = True
            elif part in regions:
                mask |= regions[part]
            else:
                raise UserError(f"unknown ROI {part!r}: expected {', '.join(regions)} or a row of fields.npz.")
        if mask.any():
            weights[name] = mask / mask.sum()
        else:
            print(f"the subject has no {name}, left out")
    if not weights:
        raise UserError("the subject has none of ROIS.")
    return weights


def draw_picture(path, picture, title, encoder, names, change, activity):
    """The picture and, per ROI, what places (a heat map) and layers (bars) add, relative to the reference pictures.
    change (n_rois, n_layers, n_tokens); activity (n_rois, 2): predicted, and mean of the reference pictures."""
    heat = change[:, :, encoder.trunk.n_prefix :].sum(1).reshape(-1, *encoder.trunk.grid)
    bars, end = change.sum(2), np.abs(heat).max() or 1
    figure = plt.figure(figsize=(2.5 * len(names) + 3.2, 4.4), layout="constrained")
    axes = figure.subplots(2, len(names) + 1, height_ratios=[2.5, 1])
    axes[0, 0].imshow(picture)
    axes[1, 0].text(0, 0.5, "z-scores added to the ROI's mean,\nrelative to the mean\nover reference pictures", va="center")
    for name, panel, below, values, bar, (now, mean) in zip(names, axes[0, 1:], axes[1, 1:], heat, bars, activity):
        panel.imshow(np.mean(picture, 2), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        alpha = 0.85 * np.sqrt(np.abs(values) / end)
        panel.imshow(values, cmap="RdBu_r", vmin=-end, vmax=end, alpha=alpha, extent=(0, 1, 1, 0))
        panel.set_title(f"{name}: {now:+.2f} (mean {mean:+.2f})", fontsize=10)
        below.bar(range(len(bar)), bar, color=np.where(bar > 0, "#b2182b", "#2166ac"), tick_label=encoder.layers)
        below.axhline(0, color="black", linewidth=0.8)
        below.set(xlabel="block", ylim=(min(1.1 * bars.min(), 0), max(1.1 * bars.max(), 0)))
    for panel in (*axes[0], axes[1, 0]):
        panel.set_axis_off()
    scale = plt.cm.ScalarMappable(plt.Normalize(-end, end), "RdBu_r")
    figure.colorbar(scale, ax=axes[0, -1], shrink=0.8, label="z per place")
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def explain_pictures(folder, paths, predictor, decomposition, rois, reference):
    """contributions.npz and figures. reference: mean terms -> table of the pictures, and failures."""
    encoder, failures, rows, contributions = decomposition.encoder, [], [], []
    means = np.stack(list(rois.values()))[:, decomposition.columns].astype(np.float32)
    means = torch.from_numpy(means).to(reference.device)  #                       (n_rois, n_vertices)
    weights, constant = means @ decomposition.weights, (means @ decomposition.constant).cpu().numpy()
    average = (reference @ weights.T).permute(2, 0, 1).cpu().numpy()  #           (n_rois, n_layers, n_tokens)
    for pictures in read_batches(paths, BATCH_SIZE, failures):
        terms, _ = decomposition(np.stack([p.image for p in pictures]), predictor.precision)
        listed = list_pictures(pictures, len(rows))
        rows += listed
        contributions.append((terms @ weights.T).permute(0, 3, 1, 2).cpu().numpy())
        for row, p, k in zip(listed, pictures, contributions[-1]):
            activity = constant[:, None] + np.stack([k.sum((1, 2)), average.sum((1, 2))], 1)
            if len(paths) <= FIGURES:
                draw_picture(folder / f"{row['picture']}.png", p.image, row["picture"], encoder, rois, k - average, activity)
    np.savez(
        folder / "contributions.npz", contributions=np.concatenate(contributions), constant=constant, reference=average,
        rois=list(rois), layers=encoder.layers, n_prefix=encoder.trunk.n_prefix, grid=encoder.trunk.grid,
    )  # fmt: skip
    table = pd.DataFrame(rows)
    table.drop(columns="warning").to_csv(folder / "pictures.csv", index_label="row")
    return table, failures


@torch.inference_mode()
def main():
    paths, checkpoints = find_pictures(IMAGES, OUTPUT_DIR) if IMAGES else [], choose_checkpoints(CHECKPOINT, RUN_DIR)
    if len(checkpoints) > 1:
        raise UserError("CHECKPOINT names several files: explanations are of one checkpoint.")
    data, predictor = prepare_data.load(DATA_DIR), load_encoder(checkpoints, DEVICE, PRECISION, BATCH_SIZE)
    space, [encoder], name = predictor.space, predictor.encoders, SUBJECT or predictor.subjects[0]
    subject, rows = predictor.index(name), reference_samples(data, name)
    rois = parse_rois(space, subject) if paths else {}
    columns = np.flatnonzero(space.present(subject))
    decomposition = Decomposition(encoder, subject, columns)
    covariance, latents = Covariance(decomposition), []
    for start in progress(range(0, len(rows), BATCH_SIZE), desc="reference pictures", unit="batch"):
        terms, h = decomposition(data.images[data.image[rows[start : start + BATCH_SIZE]]], predictor.precision)
        covariance.add(terms, h)
        latents.append(h)
    tokens, layers, reference = covariance.result()
    fields = describe_fields(tokens, layers, encoder)
    r2 = reference_r2(predictor, data, name, rows, torch.cat(latents))
    fields["r2"] = r2[columns]
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="fields.npz") as folder:
        np.savez(folder / "fields.npz", **fields, layers=encoder.layers)
        save_vertices(folder, space, subject)
        x, y = fields["x"] - 0.5, 0.5 - fields["y"]
        maps = {"polar angle": np.degrees(np.arctan2(y, x)), "eccentricity": np.hypot(x, y)}
        maps |= {key: fields[key] for key in ("size", "depth", "r2")}
        full = {key: np.full(space.n_vertices, np.nan) for key in maps}
        for key, values in maps.items():
            full[key][columns] = values
        save_gifti(folder / "fields", space, full)
        hidden = r2 < MIN_R2
        shown = {key: np.where(hidden, np.nan, values) for key, values in full.items()}
        flat = FlatMap(space, FSAVERAGE_DIR)
        draw_fields(folder / "fields.png", flat, shown, flat.outlines(OUTLINES, subject), name)
        table, failures = (
            explain_pictures(folder, paths, predictor, decomposition, rois, reference) if paths else (None, [])
        )
    print(f"wrote {OUTPUT_DIR}: {name}, {len(columns)} vertices, {plural(len(rows), 'reference picture')}")
    if paths:
        report(table, failures)


if __name__ == "__main__":
    run(main, globals())
