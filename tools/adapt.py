"""Add a new person: fit their map in closed form, given a trained checkpoint, their pictures and activity.

Everything stays frozen but the person's own B and b. With the latents h of a picture, the person's activity y of the
vertices that they and the checkpoint have, and those rows of E and mean:

    min over B, b of  sum_i |y_i - mean - E (A h_i + B h_i + b)|² + a |B|² + c |E (B h_mean + b)|²

a and c have the least leave-one-out error over the person's training pictures. OUTPUT_DIR gets adapted.pt, the
checkpoint with the person added, scores.json, and the learning curve, curve.csv and curve.png (docs/adapt.md).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.functional import pad

import predict
import prepare_data
from core.checkpoint import save_checkpoint
from core.files import output_folder
from core.scores import median, r2_score
from core.settings import constants, progress, run
from model import Encoder, UserError, trunk_outputs
from tools import evaluate, ridge
from tools.vertices import draw_pictures, find, interval, resampled_scores

DATA_DIR: str = "new_person_data"  # prepared data of this person alone: prepare_data.py --subjects NAME --data_dir …
OUTPUT_DIR: str = ""  # empty: runs/NAME
N_DRAWS: int = 5  # of the curve's pictures at random, at sizes up to half of all
SEED: int = 0  # of these draws and of the folds of cross-validation
OVERWRITE: bool = False  # replace OUTPUT_DIR
SHARED = predict, "RUN_DIR CHECKPOINT BATCH_SIZE PRECISION DEVICE"  # set there

SIZES = (10, 30, 100, 300, 1000, 3000, 10000)  # pictures, of the curve
PENALTIES = [10 ** (k / 2) for k in range(-4, 13)] + [float("inf")]  # a, in mean |h - h_mean|²; infinity: B = 0
MEAN_PENALTIES = [0, 3, 10, 30, 100, float("inf")]  # c, in pictures; 0: b is free
FEW_PICTURES = 100  # held out; below, cross-validation scores too
N_FOLDS = 10


def decompose(rows):
    """E (n_vertices, pca_dim) -> g (rank,), U / sqrt(g) (pca_dim, rank), float64, where E'E = U diag(g) U', the
    identity if no vertices are missing. y E U / sqrt(g) are orthonormal coordinates of y's part in the span of E."""
    gains, vectors = torch.linalg.eigh((rows.T @ rows).double())
    kept = gains > 1e-6 * gains.max()
    return gains[kept], vectors[:, kept] / gains[kept].sqrt()


class Person:
    """The new person on the vertices that the checkpoint has. h, features, activity, group, targets: a row per picture;
    known (n_vertices of the data,) bool: these vertices; columns: theirs in the checkpoint's space."""

    def __init__(self, data, predictor):
        columns = find(predictor.space, data.space)
        self.known, self.columns = columns >= 0, columns[columns >= 0]
        self.nsd_ids, [self.encoder] = data.nsd_ids[data.image], predictor.encoders
        trunk = self.encoder.trunk
        functions = [self.encoder.latents, lambda features: ridge.pool_tokens(trunk, features)]
        with progress(total=len(data.image), desc="pictures", unit="picture") as bar:
            options = (predictor.batch_size, predictor.precision, bar.update)
            self.h, self.features = trunk_outputs(trunk, data.images[data.image], functions, *options)
        self.activity = torch.from_numpy(data.activity[:, self.known]).to(self.h.device, torch.float32)
        self.group = self.encoder.predict(self.h)[:, self.columns]
        rows = self.encoder.head.embed_weight[self.columns]
        self.gains, self.components = decompose(rows)
        self.targets = ((self.activity - self.group) @ rows).double() @ self.components

    def fit(self, pictures):
        """-> B (pca_dim, latent_dim), b (pca_dim,), and the penalties a, c.

        In the coordinates of decompose() the rows w_j of U'B separate: component j is a ridge regression of the targets
        on sqrt(g_j) h. With centred h the mean is apart from B, and c shrinks it to n / (n + c) of itself.
        """
        penalties, h = (PENALTIES, MEAN_PENALTIES), self.h[pictures]
        fitted = ridge.solve(h.double(), self.targets[pictures], *penalties, shared=True, gains=self.gains)
        weight = self.components @ fitted.weight.T
        bias = self.components @ fitted.bias - weight @ fitted.centre
        return weight.to(h.dtype), bias.to(h.dtype), float(fitted.penalty[0]), float(fitted.mean_penalty[0])

    def predict(self, fitted, pictures):
        """Activity of some pictures by a map of fit()."""
        weight, bias, *_ = fitted
        head = self.encoder.head.with_parameters(subject_weight=weight[None], subject_bias=bias[None])
        return Encoder(self.encoder.trunk, head).predict(self.h[pictures], 0)[:, self.columns]

    def cross_validate(self):
        """Predictions of all pictures, each by a map that is fitted to the other folds."""
        fold = np.random.default_rng(SEED).permutation(len(self.h)) % N_FOLDS
        prediction = torch.empty_like(self.activity)
        for k in np.unique(fold):
            prediction[fold == k] = self.predict(self.fit(fold != k), fold == k)
        return prediction

    def score(self, title, pictures, prediction):
        """Print and return {n_pictures, median_r2, interval: 95 % or None}, as tools/evaluate.py has them."""
        activity, n = self.activity[pictures], len(prediction)
        r2, order = median(r2_score(activity, prediction)), np.argsort(self.nsd_ids[pictures])
        weights = draw_pictures(n, evaluate.RESAMPLES, evaluate.SEED)
        resampled = resampled_scores(activity[order].cpu(), prediction[order].cpu(), weights, np.nan)["r2"]
        ends = interval(r2, np.nanmedian(resampled, axis=1)) if n >= evaluate.FEWEST_PICTURES else None
        text = f" (95 % CI {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
        print(f"{title}: median R² {r2:.4f}{text}, {n} pictures")
        return {"n_pictures": n, "median_r2": r2, "interval": ends}


def draw_curve(person, train, fitted, scored, title, folder):
    """Fit to more and more of train (fitted: the map of all), score on scored; print, write curve.csv and curve.png."""
    table = []
    draws = [(n, draw) for n in SIZES if n < len(train) for draw in range(N_DRAWS if 2 * n <= len(train) else 1)]
    for n, draw in progress([*draws, (len(train), 0)], desc="learning curve", unit="draw"):
        drawn = np.random.default_rng([SEED, n, draw]).permutation(train)[:n]
        ours = person.predict(fitted if n == len(train) else person.fit(drawn), scored)
        x, y = person.features[drawn], person.activity[drawn]  # ridge has all that helps our map, too
        baseline = ridge.predict(ridge.fit(x, y, PENALTIES, MEAN_PENALTIES, shared=True), person.features[scored])
        for method, prediction in (("group", person.group[scored]), ("adapted", ours), ("ridge", baseline)):
            table.append((n, method, draw, median(r2_score(person.activity[scored], prediction))))
    curve = pd.DataFrame(table, columns=["n_pictures", "method", "draw", "median_r2"])
    curve.to_csv(folder / "curve.csv", index=False, float_format="%.6g")
    summary = curve.groupby(["n_pictures", "method"], sort=False)["median_r2"].agg(["mean", "min", "max"])
    print(f"\n{title}, over draws\n{summary.to_string(float_format='{:.4f}'.format)}\n")
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="pictures fitted to", ylabel="median R² over vertices", xscale="log")
    for method, rows in summary.reset_index("method").groupby("method", sort=False):
        [line] = axes.plot(rows["mean"], label=method, marker="o", markersize=4)
        axes.fill_between(rows.index, rows["min"], rows["max"], color=line.get_color(), alpha=0.2, linewidth=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(folder / "curve.png", dpi=150)


def add_person(person, new, space, weight, bias):
    """The person, whose own Space is new, becomes the last subject -> (Encoder, Space)."""
    head = person.encoder.head
    weights, biases = torch.cat([head.subject_weight, weight[None]]), torch.cat([head.subject_bias, bias[None]])
    encoder = Encoder(person.encoder.trunk, head.with_parameters(subject_weight=weights, subject_bias=biases))
    mask = pad(space.mask, (0, 0, 0, 1))
    mask[-1, person.columns] = True
    rois = {g: {"names": {**r["names"]}, "labels": pad(r["labels"], (0, 0, 0, 1))} for g, r in space.rois.items()}
    for group, own in new.rois.items():
        roi = rois.setdefault(group, {"names": {}, "labels": torch.zeros(mask.shape, dtype=torch.int16)})
        values = prepare_data.merge_labels(roi["names"], own["names"], own["labels"][0].numpy()[person.known])
        roi["labels"][-1, person.columns] = torch.from_numpy(values)
    return encoder, dataclasses.replace(space, subjects=[*space.subjects, *new.subjects], mask=mask, rois=rois)


def adapt(data, predictor, folder):
    """Fit, score, and write the files of OUTPUT_DIR to folder."""
    [name], [info] = data.space.subjects, predictor.info
    person = Person(data, predictor)
    fresh = ~np.isin(person.nsd_ids, info["train_nsd_ids"].numpy())
    train, scored = data.samples("train"), np.flatnonzero(fresh & (data.split > 0))
    n, n_left_out = len(train), len(data.split) - len(train) - len(scored)
    fitted = weight, bias, a, c = person.fit(train)
    print(f"{name}: {n} pictures, {len(person.columns)} vertices; the checkpoint lacks {(~person.known).sum()} others")
    print(f"penalties chosen by leave-one-out: a {a:.3g} on the person's own map (inf: the group's map),")
    print(f"c {c:.3g} (in pictures) on the offset of the mean from the group's: {n / (n + c):.0%} of it is retained")
    print(f"{n_left_out} held-out pictures are not scored: the checkpoint was trained on them with other people")
    scores = {"subject": name, "n_pictures": n, "n_left_out": n_left_out, "a": f"{a:g}", "c": f"{c:g}"}
    if len(scored) > 1:
        draw_curve(person, train, fitted, scored, f"{name}: {len(scored)} held-out pictures", folder)
        scores["held_out"] = person.score("held-out pictures", scored, person.predict(fitted, scored))
    if len(scored) < FEW_PICTURES and fresh.sum() > 1:
        title = f"{N_FOLDS}-fold cross-validation over all pictures"
        scores["cross_validated"] = person.score(title, fresh, person.cross_validate()[fresh])
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    record = {"data_fingerprint": data.fingerprint, "checkpoint": info["fingerprint"]} | constants(globals()) | scores
    made_with = info["made_with"] | {"adapted": [*info["made_with"].get("adapted", []), record]}
    encoder, space = add_person(person, data.space, predictor.space, weight, bias)
    added = info["added"] | {name: person.nsd_ids[train]}
    rest = {key: info[key] for key in ("scores", "step", "finished", "train_nsd_ids")}
    save_checkpoint(folder / "adapted.pt", encoder, space=space, made_with=made_with, added=added, **rest)


def main():
    data = prepare_data.load(DATA_DIR)
    predictor = predict.load_chosen()
    space, [path, *more] = predictor.space, predictor.paths
    [*others, name] = data.space.subjects
    if more or others or name in space.subjects:
        raise UserError(f"{DATA_DIR} must contain exactly one person, whose name is not in CHECKPOINT, one file.")
    if not len(data.samples("val")):
        raise UserError(f"{name} has no validation pictures in {DATA_DIR}.")
    if data.space.unit != space.unit or (find(space, data.space) < 0).all():
        raise UserError(f"{name} and {path} have no {space.unit} in common.")
    output = Path(OUTPUT_DIR or f"runs/{name}")
    with output_folder(output, OVERWRITE, marker="adapted.pt") as folder, torch.inference_mode():
        adapt(data, predictor, folder)
    print(f"wrote {output}: adapted.pt with {', '.join([*space.subjects, name])}")


if __name__ == "__main__":
    run(main, globals())
