"""What every vertex sees: receptive fields of the whole cortex, and what each place of a picture adds to an ROI.

    python -m tools.explain --images photo.jpg --rois V1v,FFA,PPA

A prediction is exactly a sum over layers l and tokens n, that is, places of the picture; a_l: slope of Head.combine:

    y = constant + sum_l sum_n k_l[n],    k_l[n] = sum_d g[d] a_l[d] S_l[d,n] (W_l x_l[n])[d],    g = E (A + B_s)

OUTPUT_DIR, described in docs/explain.md, gets

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


class Decomposition:
    """y = constant + sum_l sum_n sum_d weights[:, d] terms[l,n,d] of a subject (an index; None: the group).

    constant (n_vertices,), weights (n_vertices, latent_dim), slopes (n_layers, latent_dim) are measured on the head's
    functions. Vertices are those of the subject.
    """

    def __init__(self, encoder, subject, columns):
        self.encoder, self.subject, self.columns, head = encoder, subject, columns, encoder.head
        one = torch.eye(len(encoder.layers), device=head.shared.device)[:, :, None].expand(-1, -1, head.shared.shape[1])
        offset = head.combine(torch.zeros_like(one[:, :1]))  #                     (1, latent_dim)
        self.slopes = head.combine(one) - offset  #                                (n_layers, latent_dim)
        self.constant, zero = self.predict(offset)[0], self.predict(torch.zeros_like(offset))
        self.weights = (self.predict(torch.eye(offset.shape[1], device=offset.device)) - zero).T.contiguous()

    def predict(self, h):
        return self.encoder.predict(h, self.subject)[:, self.columns]

    def terms(self, features):
        """The trunk's features -> (n, n_layers, n_tokens, latent_dim): FeatureProjection before its sum over tokens."""
        terms = []
        for projection, x, slope in zip(self.encoder.head.projections, self.encoder.choose(features), self.slopes):
            y = F.linear(x, projection.channel)
            terms.append(slope * (y * projection.spatial.T.to(y.dtype)).float())
        return torch.stack(terms, 1)

    def __call__(self, images, precision):
        """images (n, 256, 256, 3) uint8 -> terms, latents h (n, latent_dim). UserError if they miss the prediction."""
        functions = [self.terms, self.encoder.latents]
        terms, h = trunk_outputs(self.encoder.trunk, images, functions, len(images), precision)
        expected = self.predict(h)
        error = (self.constant + terms.sum((1, 2)) @ self.weights.T - expected).abs().max()
        if not error <= 1e-4 * max(1, expected.abs().max()):
            raise UserError(
                f"contributions miss the prediction by {error:.2g}: the head in model.py is not affine in the features."
            )
        return terms, h


def measure_covariance(decomposition, images, precision):
    """Covariance over pictures of contributions with the prediction -> of tokens (n_tokens, n_vertices), of layers
    (n_layers, n_vertices), mean terms (n_layers, n_tokens, latent_dim), and latents (n, latent_dim)."""
    weights, products, terms_sum, latents = decomposition.weights, 0, 0, []
    for start in progress(range(0, len(images), BATCH_SIZE), desc="reference pictures", unit="batch"):
        terms, h = decomposition(images[start : start + BATCH_SIZE], precision)
        latents.append(h)
        terms_sum = terms_sum + terms.sum(0)
        parts = torch.cat([terms.sum(1), terms.sum(2)], 1)  #                     (n, n_tokens + n_layers, latent_dim)
        h = h - latents[0].mean(0)  # keeps rounding small
        chunks = [torch.einsum("nkv,nv->kv", parts @ w.T, h @ w.T) for w in weights.split(1024)]
        products = products + torch.cat(chunks, 1).double()
    terms, h = terms_sum / len(images), torch.cat(latents)
    mean_parts = torch.cat([terms.sum(0), terms.sum(1)]) @ weights.T
    covariance = products / len(images) - mean_parts * ((h.mean(0) - latents[0].mean(0)) @ weights.T)
    return *np.split(covariance.cpu().numpy(), [terms.shape[1]]), terms, h


def describe_fields(tokens, layers, encoder):
    """Covariances -> {name: array}, vertices first, as in docs/explain.md; NaN where the prediction is constant."""
    n_prefix, (n_rows, n_columns) = encoder.trunk.n_prefix, encoder.trunk.grid
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    x, y = (column + 0.5) / n_columns, (row + 0.5) / n_rows
    with np.errstate(invalid="ignore", divide="ignore"):
        field = np.clip(tokens[n_prefix:], 0, None).T
        field /= field.sum(1, keepdims=True)  #                                   (n_vertices, n_places)
        share = (layers / tokens.sum(0)).T  #                                     (n_vertices, n_layers)
        positive = np.clip(share, 0, None)
        depth = positive @ encoder.layers / positive.sum(1)
        prefix_share = tokens[:n_prefix].sum(0) / tokens.sum(0)
    variance = field @ (x**2 + y**2) - (field @ x) ** 2 - (field @ y) ** 2
    fields = {"x": field @ x, "y": field @ y, "size": np.sqrt(variance / 2), "depth": depth}
    fields |= {"layer_share": share, "prefix_share": prefix_share, "layers": encoder.layers}
    return fields | {"field": field.reshape(-1, n_rows, n_columns).astype(np.float16)}


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
    labels = {"polar angle": "", "eccentricity": "picture widths", "size": "picture widths", "depth": "block"}
    for panel, (name, label) in zip(figure.subplots(2, 2).flat, labels.items()):
        shown = maps[name][np.isfinite(maps[name])]
        limits = np.quantile(shown, [0.02, 0.98]) if len(shown) else (0, 1)
        panel.set_title(name)
        if label:
            mesh = flat.draw(panel, maps[name], limits, "viridis", outlines)
            figure.colorbar(mesh, ax=panel, shrink=0.7, extend="both", label=label)
        else:
            flat.draw(panel, maps[name], (-180, 180), "hsv", outlines, named=True)
            wheel, angle = panel.inset_axes([0.42, 0, 0.16, 0.16], projection="polar"), np.linspace(-np.pi, np.pi, 181)
            wheel.pcolormesh(angle, [0, 1], [np.degrees(angle[:-1])], cmap="hsv")
            wheel.set_axis_off()
    figure.suptitle(title)
    save_figure(figure, path)


def parse_rois(space, subject):
    """ROIS -> {name: weights (n_vertices of the common space,) of the mean}."""
    columns, weights = np.flatnonzero(space.present(subject)), {}
    regions = {roi: region for (_, roi), region in reversed(roi_masks(space, subject).items())}
    for name in ROIS:
        mask = np.zeros(space.n_vertices, bool)
        for part in name.split("+"):
            if part not in regions and not (part.isdigit() and int(part) < len(columns)):
                raise UserError(
                    f"unknown ROI {part!r}; there are {', '.join(sorted(regions))}, and rows of fields.npz."
                )
            mask[columns[int(part)] if part.isdigit() else regions[part]] = True
        if mask.any():
            weights[name] = mask / mask.sum()
    if len(weights) < len(ROIS):
        print(f"the subject does not have {', '.join(sorted(set(ROIS) - set(weights)))}")
    if not weights:
        raise UserError("the subject has none of ROIS.")
    return weights


def draw_picture(path, picture, encoder, names, change, activity):
    """The picture and, per ROI, what places (a heat map) and layers (bars) add, relative to the reference pictures.
    change (n_rois, n_layers, n_tokens); activity (n_rois, 2): predicted, and mean over reference pictures."""
    heat = change[:, :, encoder.trunk.n_prefix :].sum(1).reshape(-1, *encoder.trunk.grid)
    bars, end = change.sum(2), np.abs(heat).max() or 1
    figure = plt.figure(figsize=(2.5 * len(names) + 3, 4.2), layout="constrained")
    axes = figure.subplots(2, len(names) + 1, height_ratios=[2.5, 1])
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title(path.stem, fontsize=10, parse_math=False)
    axes[1, 0].text(0, 0.5, "added to the ROI's mean\nactivity (z), relative to the\nreference pictures", va="center")
    for name, panel, below, values, bar, (now, mean) in zip(names, axes[0, 1:], axes[1, 1:], heat, bars, activity):
        panel.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
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
    save_figure(figure, path)


def explain_pictures(folder, paths, decomposition, precision, rois, mean_terms):
    """Write contributions.npz, pictures.csv and figures -> table of the pictures, and files that cannot be read.
    rois: of parse_rois(); mean_terms: of reference pictures."""
    encoder, failures, tables, contributions = decomposition.encoder, [], [], []
    means = np.stack(list(rois.values()))[:, decomposition.columns].astype(np.float32)
    means = torch.from_numpy(means).to(mean_terms.device)  #                      (n_rois, n_vertices)
    weights, constant = means @ decomposition.weights, (means @ decomposition.constant).cpu().numpy()
    reference = (mean_terms @ weights.T).permute(2, 0, 1).cpu().numpy()  #        (n_rois, n_layers, n_tokens)
    for pictures in read_batches(paths, BATCH_SIZE, failures):
        terms, _ = decomposition(np.stack([p.image for p in pictures]), precision)
        tables.append(list_pictures(pictures, sum(map(len, tables))))
        contributions.append((terms @ weights.T).permute(0, 3, 1, 2).cpu().numpy())
        for name, p, k in zip(tables[-1].picture, pictures, contributions[-1] if len(paths) <= FIGURES else ()):
            activity = constant[:, None] + np.stack([k.sum((1, 2)), reference.sum((1, 2))], 1)
            draw_picture(folder / f"{name}.png", p.image, encoder, rois, k - reference, activity)
    np.savez(
        folder / "contributions.npz", contributions=np.concatenate(contributions), constant=constant,
        reference=reference, rois=list(rois), layers=encoder.layers, n_prefix=encoder.trunk.n_prefix,
        grid=encoder.trunk.grid,
    )  # fmt: skip
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(folder / "pictures.csv", index_label="row")
    return table, failures


@torch.inference_mode()
def main():
    paths, checkpoints = find_pictures(IMAGES, OUTPUT_DIR) if IMAGES else [], choose_checkpoints(CHECKPOINT, RUN_DIR)
    if len(checkpoints) > 1 or SPLIT not in prepare_data.SPLIT_NAMES:
        raise UserError("CHECKPOINT is one file here, and SPLIT train, val or test.")
    data, predictor = prepare_data.load(DATA_DIR), load_encoder(checkpoints, DEVICE, PRECISION, BATCH_SIZE)
    space, [encoder], name = predictor.space, predictor.encoders, SUBJECT or predictor.subjects[0]
    subject, rows = predictor.index(name), choose_references(data, name)
    rois, columns = parse_rois(space, subject) if paths else {}, np.flatnonzero(space.present(subject))
    decomposition = Decomposition(encoder, subject, columns)
    measured = measure_covariance(decomposition, data.images[data.image[rows]], predictor.precision)
    tokens, layers, mean_terms, latents = measured
    fields, r2 = describe_fields(tokens, layers, encoder), reference_r2(predictor, data, name, rows, latents)
    right, up = fields["x"] - 0.5, 0.5 - fields["y"]
    maps = {"polar angle": np.degrees(np.arctan2(up, right)), "eccentricity": np.hypot(right, up)}
    maps |= {key: fields[key] for key in ("size", "depth")}
    with output_folder(OUTPUT_DIR, OVERWRITE, marker="fields.npz") as folder:
        np.savez(folder / "fields.npz", r2=r2[columns], **fields)
        save_vertices(folder, space, subject)
        for key, values in maps.items():
            maps[key] = np.full(space.n_vertices, np.nan)
            maps[key][columns] = values
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
