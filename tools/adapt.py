"""A new person: a trained checkpoint and some of their pictures with activity -> their own map, in closed form.

    python -m tools.adapt --data_dir new_person_data --run_dir runs/base --output_dir runs/subj09

Everything stays frozen but the person's own B and b. With the latents h of a picture, the person's activity y of the
vertices that they and the checkpoint have, and those rows of E and mean:

    min over B, b of  sum_i |y_i - mean - E (A h_i + B h_i + b)|² + a |B|² + c |E (B h_mean + b)|²

Without data that is the group's prediction, with much data the person's own map; a and c have the least leave-one-out
error over the person's training pictures. OUTPUT_DIR gets

    adapted.pt            the checkpoint with the person added; predictions for everybody else do not change by a bit
    curve.csv, curve.png  score on held-out pictures against the number of pictures used, beside the group's prediction
                          and ridge regression from the trunk's features to every vertex (tools/ridge.py)
    scores.json           score on held-out pictures, for few of them also cross-validated, with 95 % intervals
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import predict
import prepare_data
from core.checkpoint import load_checkpoint, save_checkpoint
from core.files import output_folder
from core.scores import median, r2_score
from core.settings import choose_device, choose_precision, constants, progress, run
from model import Encoder, UserError, trunk_outputs
from tools import evaluate, ridge
from tools.vertices import find

DATA_DIR: str = "new_person_data"  # the person's prepared data: prepare_data.py --subjects NAME --data_dir …
SUBJECT: str = ""  # the person's name in DATA_DIR; empty: the only one there
RUN_DIR: str = "runs/base"  # holds finetuned.pt or head.pt
CHECKPOINT: str = ""  # input; empty: finetuned.pt in RUN_DIR, else head.pt
OUTPUT_DIR: str = ""  # empty: runs/NAME
N_DRAWS: int = 5  # of the curve's pictures at random, at sizes up to half of all
SEED: int = 0  # of these draws and of the folds of cross-validation
BATCH_SIZE: int = 64  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace OUTPUT_DIR

SIZES = (10, 30, 100, 300, 1000, 3000, 10000)  # pictures, of the curve
PENALTIES = [10 ** (k / 2) for k in range(-4, 13)] + [float("inf")]  # a, in mean |h - h_mean|²; infinity: B = 0
MEAN_PENALTIES = [0, 3, 10, 30, 100, float("inf")]  # c, in pictures; 0: b is free
FEW_PICTURES = 100  # held out; below, cross-validation scores too
N_FOLDS = 10


def decompose(rows):
    """E of the person's vertices (n_vertices, pca_dim) -> gains g (rank,) and U / sqrt(g) (pca_dim, rank), float64.

    E'E = U diag(g) U': without all vertices E's columns are not orthonormal. y E U / sqrt(g) are orthonormal coordinates
    of y's part in the span of E; directions that none of the vertices shows are left out.
    """
    gains, vectors = torch.linalg.eigh((rows.T @ rows).double())
    kept = gains > 1e-6 * gains.max()
    return gains[kept], vectors[:, kept] / gains[kept].sqrt()


def fit_map(h, targets, gains, components, penalties=PENALTIES, mean_penalties=MEAN_PENALTIES):
    """h (n, latent_dim), targets (n, rank) float64: coordinates of y minus the group's prediction
    -> B (pca_dim, latent_dim), b (pca_dim,) as h's type, and the penalties a, c.

    In the coordinates of decompose() the rows w_j of U'B separate: component j is a ridge regression of the targets on
    sqrt(g_j) h. With centred h the mean is apart from B, and c shrinks it to n / (n + c) of itself.
    """
    fitted = ridge.solve(h.double(), targets, penalties, mean_penalties, shared=True, gains=gains)
    weight = components @ fitted.weight.T
    bias = components @ fitted.bias - weight @ fitted.centre
    return weight.to(h.dtype), bias.to(h.dtype), float(fitted.penalty[0]), float(fitted.mean_penalty[0])


class Person:
    """The new person's part of the prepared data, on the vertices that the checkpoint has: one row per picture.

    h, features, activity, group (predicted): tensors; split, nsd_ids, fresh (not trained on with other people): arrays.
    known (n_vertices of the data,) bool; columns: those vertices' place in the checkpoint's space.
    """

    def __init__(self, data, name, encoder, space, trained_ids, precision):
        self.name, self.data, self.encoder, self.s = name, data, encoder, data.space.subjects.index(name)
        samples, device = np.flatnonzero(data.subject == self.s), encoder.head.embed_bias.device
        self.split, self.nsd_ids = data.split[samples], data.nsd_ids[data.image[samples]]
        self.fresh = ~np.isin(self.nsd_ids, trained_ids)
        columns = find(space, data.space)
        self.known = data.space.present(self.s) & (columns >= 0)
        self.columns = columns[self.known]
        functions = [encoder.latents, lambda features: ridge.pool_tokens(encoder.trunk, features)]
        with progress(total=len(samples), desc="pictures", unit="picture") as bar:
            images = data.images[data.image[samples]]
            self.h, self.features = trunk_outputs(encoder.trunk, images, functions, BATCH_SIZE, precision, bar.update)
        self.activity = torch.from_numpy(data.read_activity(samples)[:, self.known]).to(device, torch.float32)
        self.group = encoder.predict(self.h)[:, self.columns]
        rows = encoder.head.embed_weight[self.columns]
        self.gains, self.components = decompose(rows)
        self.targets = ((self.activity - self.group) @ rows).double() @ self.components

    def fit(self, pictures):
        return fit_map(self.h[pictures], self.targets[pictures], self.gains, self.components)

    def predict_adapted(self, fitted, pictures):
        """Activity of some pictures by the map that is fitted to others."""
        weight, bias, *_ = self.fit(fitted)
        head = self.encoder.head.with_parameters(subject_weight=weight[None], subject_bias=bias[None])
        return Encoder(self.encoder.trunk, head).predict(self.h[pictures], 0)[:, self.columns]

    def predict_ridge(self, fitted, pictures):
        """The baseline, with all that helps our map: the same candidates, one a and c for all vertices, a shrunk mean."""
        model = ridge.fit(self.features[fitted], self.activity[fitted], PENALTIES, MEAN_PENALTIES, shared=True)
        return ridge.predict(model, self.features[pictures])


def measure_curve(person, train, scored):
    """Fit to some of train, score on scored -> DataFrame n_pictures, method, draw, median_r2."""
    sizes = [n for n in SIZES if n < len(train)] + [len(train)]
    draws = [(n, draw) for n in sizes for draw in range(N_DRAWS if 2 * n <= len(train) else 1)]
    table = []
    for n, draw in progress(draws, desc="learning curve", unit="draw"):
        drawn = np.random.default_rng([SEED, n, draw]).permutation(train)[:n]
        predictions = {
            "group": person.group[scored],
            "adapted": person.predict_adapted(drawn, scored),
            "ridge": person.predict_ridge(drawn, scored),
        }
        for method, prediction in predictions.items():
            table.append((n, method, draw, median(r2_score(person.activity[scored], prediction))))
    return pd.DataFrame(table, columns=["n_pictures", "method", "draw", "median_r2"])


def save_curve(curve, title, folder):
    """curve.csv, curve.png, and the same printed."""
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


def cross_validate(person, scored):
    """Predictions (len(scored), n_vertices), each by a map that is fitted to the other folds of all pictures."""
    fold = np.random.default_rng(SEED).permutation(len(person.split)) % N_FOLDS
    prediction = torch.empty_like(person.group[scored])
    for k in np.unique(fold[scored]):
        prediction[fold[scored] == k] = person.predict_adapted(fold != k, scored[fold[scored] == k])
    return prediction


def score(person, scored, prediction, title):
    """Print and return {n_pictures, median_r2, interval: 95 % over pictures or None}, as tools/evaluate.py has them."""
    activity, prediction = person.activity[scored].cpu(), prediction.cpu()
    r2, ends = median(r2_score(activity, prediction)), None
    text = f"{title}: median R² {r2:.4f}"
    if len(scored) >= evaluate.FEWEST_PICTURES:
        weights = evaluate.draw_pictures(len(scored), evaluate.RESAMPLES, evaluate.SEED)
        weights = weights[:, np.argsort(np.argsort(person.nsd_ids[scored]))]
        resampled = evaluate.resampled_scores(activity, prediction, weights, np.full(len(person.columns), np.nan))
        ends = evaluate.interval(r2, np.nanmedian(resampled["r2"], axis=1))
        text += f" (95 % CI {ends[0]:.4f} to {ends[1]:.4f})"
    print(f"{text}, {len(scored)} pictures")
    return {"n_pictures": len(scored), "median_r2": r2, "interval": ends}


def add_person(person, space, weight, bias):
    """-> (Encoder, Space) with the person as the last subject."""
    head, new = person.encoder.head, person.data.space
    larger = head.with_parameters(
        subject_weight=torch.cat([head.subject_weight, weight[None]]),
        subject_bias=torch.cat([head.subject_bias, bias[None]]),
    )
    mask, rois = torch.cat([space.mask, torch.zeros(1, space.n_vertices, dtype=torch.bool)]), {}
    mask[-1, person.columns] = True
    for group in space.rois | new.rois:
        names, labels = {}, torch.zeros(mask.shape, dtype=torch.int16)
        if group in space.rois:
            names, labels[:-1] = dict(space.rois[group]["names"]), space.rois[group]["labels"]
        if group in new.rois:
            values = new.rois[group]["labels"][person.s].numpy()[person.known]
            values = prepare_data.merge_labels(names, new.rois[group]["names"], values)
            labels[-1, person.columns] = torch.from_numpy(values)
        rois[group] = {"names": names, "labels": labels}
    subjects = [*space.subjects, person.name]
    return Encoder(person.encoder.trunk, larger), dataclasses.replace(space, subjects=subjects, mask=mask, rois=rois)


def choose_person(data, space, path):
    """The new person's name. Raises UserError where they cannot be added to this checkpoint."""
    name = SUBJECT or ", ".join(data.space.subjects)
    if name not in data.space.subjects:
        raise UserError(f"SUBJECT is {SUBJECT!r}, expected one of {', '.join(data.space.subjects)} in {DATA_DIR}.")
    if name in space.subjects:
        raise UserError(f"{path} already has {name}: prepare the new person under another name.")
    s = data.space.subjects.index(name)
    if not len(data.samples("train", s)) or not len(data.samples("val", s)):
        raise UserError(f"{name} has no training or no validation pictures in {DATA_DIR}.")
    if data.space.unit != space.unit or not (data.space.present(s) & (find(space, data.space) >= 0)).any():
        raise UserError(f"{name} and {path} have no {space.unit} in common.")
    return name


def adapt(person, space, info, folder):
    """Fit, score and write OUTPUT_DIR."""
    train, scored = np.flatnonzero(person.split == 0), np.flatnonzero((person.split > 0) & person.fresh)
    weight, bias, a, c = person.fit(train)
    n, n_left_out = len(train), int((person.split > 0).sum()) - len(scored)
    n_unknown = int(person.data.space.present(person.s).sum()) - len(person.columns)
    print(f"{person.name}: {n} pictures, {len(person.columns)} vertices; {n_unknown} that the checkpoint lacks")
    print("penalties with the least leave-one-out error (each picture predicted from all others):")
    print(f"  a {a:<8.3g} on the person's own map; 0: unconstrained, inf: the group's map")
    print(f"  c {c:<8.3g} on the shift of the mean from the group's, in pictures: {n / (n + c):.0%} of it is kept")
    if n_left_out:
        print(f"{n_left_out} held-out pictures are not scored: the checkpoint was trained on them with other people")
    scores = {"subject": person.name, "n_pictures": n, "n_left_out": n_left_out, "a": f"{a:g}", "c": f"{c:g}"}
    if len(scored) > 1:
        title = f"{person.name}: median R² of {len(scored)} held-out pictures"
        save_curve(measure_curve(person, train, scored), title, folder)
        scores["held_out"] = score(person, scored, person.predict_adapted(train, scored), "held-out pictures")
    every = np.flatnonzero(person.fresh)
    if len(scored) < FEW_PICTURES and len(every) > 1:
        title = f"{N_FOLDS}-fold cross-validation over all pictures"
        scores["cross_validated"] = score(person, every, cross_validate(person, every), title)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    record = {"data_fingerprint": person.data.fingerprint, "checkpoint": info["fingerprint"]} | constants(globals())
    made_with = info["made_with"] | {"adapted": [*info["made_with"].get("adapted", []), record | scores]}
    encoder, space = add_person(person, space, weight, bias)
    rest = {key: info[key] for key in ("scores", "step", "finished", "train_nsd_ids")}
    added = info["added"] | {person.name: person.nsd_ids[train]}
    save_checkpoint(folder / "adapted.pt", encoder, space=space, made_with=made_with, added=added, **rest)


def main():
    device, data = choose_device(DEVICE), prepare_data.load(DATA_DIR)
    precision, [path] = choose_precision(PRECISION, device), predict.choose_checkpoints(CHECKPOINT, RUN_DIR)
    encoder, space, info = load_checkpoint(path, device)
    name = choose_person(data, space, path)
    output = Path(OUTPUT_DIR or Path("runs") / name)
    with output_folder(output, OVERWRITE, marker="adapted.pt") as folder, torch.inference_mode():
        adapt(Person(data, name, encoder, space, info["train_nsd_ids"].numpy(), precision), space, info, folder)
    print(f"wrote {output}: adapted.pt with {', '.join([*space.subjects, name])}")


if __name__ == "__main__":
    run(main, globals())
