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
HOLD_OUT: bool = True  # false: fit to the validation and test pictures as well, without a curve
N_DRAWS: int = 5  # of the curve's pictures at random, at sizes up to half of all
SEED: int = 0  # of these draws and of the folds of cross-validation
BATCH_SIZE: int = 64  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace OUTPUT_DIR

SIZES = [0] + [n * 10**k for k in range(1, 6) for n in (1, 3)]  # of the curve: 0, 10, 30, 100, … pictures
PENALTIES = [10 ** (k / 2) for k in range(-4, 13)] + [float("inf")]  # a, in mean |h - h_mean|²; infinity: B = 0
MEAN_PENALTIES = [0, 3, 10, 30, 100, float("inf")]  # c, in pictures; 0: b is free
FEW_PICTURES = 100  # held out; below, cross-validation scores too
N_FOLDS = 10
METHODS = {"group": "the group's prediction", "adapted": "adapted", "ridge": "ridge regression"}


# ---- the closed form -----------------------------------------------------------------------------


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
    -> B (pca_dim, latent_dim), b (pca_dim,) as h's type, and the penalties (a, c).

    In the coordinates of decompose() the rows w_j of U'B separate: component j is a ridge regression of the targets on
    sqrt(g_j) h. With centred h the mean is apart from B, and c shrinks it to n / (n + c) of itself.
    """
    found = ridge.solve(h.double(), targets, penalties, mean_penalties, shared=True, gains=gains)
    weight = components @ (found.basis @ found.coefficients).T
    bias = components @ found.bias - weight @ found.centre
    return weight.to(h.dtype), bias.to(h.dtype), (float(found.penalty[0]), float(found.mean_penalty[0]))


class Person:
    """The new person's part of the prepared data, on the vertices that the checkpoint has. Pictures are numbered by the
    person's samples. columns (n_vertices,): of the checkpoint's space; fresh (n_pictures,) bool: not trained on with
    other people."""

    def __init__(self, data, name, encoder, space, trained_ids, precision):
        self.data, self.name, self.encoder, self.device = data, name, encoder, encoder.head.embed_bias.device
        self.s = data.space.subjects.index(name)
        self.rows = np.flatnonzero(data.subject == self.s)
        self.split, self.nsd_ids = data.split[self.rows], data.nsd_ids[data.image[self.rows]]
        self.fresh = ~np.isin(self.nsd_ids, trained_ids)
        columns = find(space, data.space)
        self.known = data.space.present(self.s) & (columns >= 0)
        self.columns = columns[self.known]
        functions = [encoder.latents, lambda features: ridge.pool_tokens(encoder.trunk, features)]
        with progress(total=len(self.rows), desc="pictures", unit="picture") as bar:
            images = data.images[data.image[self.rows]]
            self.h, self.features = trunk_outputs(encoder.trunk, images, functions, BATCH_SIZE, precision, bar.update)
        rows = encoder.head.embed_weight.detach()[self.columns]
        self.gains, self.components = decompose(rows)
        parts = np.array_split(np.arange(len(self.rows)), 1 + len(self.rows) // 512)
        targets = [(self.activity(part) - self.predict_group(part)) @ rows for part in parts]
        self.targets = torch.cat(targets).double() @ self.components

    def activity(self, pictures):
        """(len(pictures), n_vertices) float32."""
        values = self.data.read_activity(self.rows[pictures])[:, self.known]
        return torch.from_numpy(values).to(self.device, torch.float32)

    def fit(self, pictures):
        return fit_map(self.h[pictures], self.targets[pictures], self.gains, self.components)

    def predict_group(self, pictures):
        return self.encoder.predict(self.h[pictures])[:, self.columns]

    def predict_adapted(self, fitted, pictures):
        """Activity of pictures by the map that is fitted to others."""
        weight, bias, _ = self.fit(fitted)
        head = self.encoder.head.with_parameters(subject_weight=weight[None], subject_bias=bias[None])
        return Encoder(self.encoder.trunk, head).predict(self.h[pictures], 0)[:, self.columns]

    def predict_ridge(self, fitted, pictures):
        """The baseline, with all that helps our map: the same candidates, one a and c for all vertices, a shrunk mean."""
        model = ridge.fit(self.features[fitted], self.activity(fitted), PENALTIES, MEAN_PENALTIES, shared=True)
        return ridge.predict(model, self.features[pictures])


# ---- scores --------------------------------------------------------------------------------------


def measure_curve(person, train, scored):
    """-> DataFrame n_pictures, method, draw, median_r2 on the pictures scored. Draws take some of train."""
    activity, table = person.activity(scored), []
    sizes = [n for n in SIZES if n < len(train)] + [len(train)]

    def add(n, method, draw, prediction):
        table.append([n, method, draw, median(r2_score(activity, prediction))])

    group = person.predict_group(scored)
    add(0, "adapted", 0, group)
    for n in sizes:
        add(n, "group", 0, group)
    draws = [(n, draw) for n in sizes[1:] for draw in range(N_DRAWS if 2 * n <= len(train) else 1)]
    for n, draw in progress(draws, desc="learning curve", unit="draw"):
        drawn = np.random.default_rng([SEED, n, draw]).permutation(train)[:n]
        add(n, "adapted", draw, person.predict_adapted(drawn, scored))
        add(n, "ridge", draw, person.predict_ridge(drawn, scored))
    return pd.DataFrame(table, columns=["n_pictures", "method", "draw", "median_r2"])


def cross_validate(person, scored):
    """Predictions (len(scored), n_vertices), each by a map that is fitted to the other folds of all pictures."""
    fold = np.random.default_rng(SEED).permutation(len(person.rows)) % N_FOLDS
    prediction = torch.empty(len(scored), len(person.columns), device=person.device)
    for k in np.unique(fold[scored]):
        inside = fold[scored] == k
        prediction[inside] = person.predict_adapted(np.flatnonzero(fold != k), scored[inside])
    return prediction


def score(person, scored, prediction):
    """-> {n_pictures, median_r2, interval: 95 % over pictures or None}, the numbers of tools/evaluate.py."""
    activity, prediction = person.activity(scored).cpu(), prediction.cpu()
    result = {"n_pictures": len(scored), "median_r2": median(r2_score(activity, prediction)), "interval": None}
    if len(scored) >= evaluate.FEWEST_PICTURES:
        weights = evaluate.draw_pictures(len(scored), evaluate.RESAMPLES, evaluate.SEED)
        weights = weights[:, np.argsort(np.argsort(person.nsd_ids[scored]))]
        resampled = evaluate.resampled_scores(activity, prediction, weights, np.full(len(person.columns), np.nan))
        result["interval"] = evaluate.interval(result["median_r2"], np.nanmedian(resampled["r2"], axis=1))
    return result


def describe(result):
    ends = result["interval"]
    text = f"median R² {result['median_r2']:.4f}" + (f" (95 % CI {ends[0]:.4f} to {ends[1]:.4f})" if ends else "")
    return f"{text}, {result['n_pictures']} pictures"


# ---- what is written -----------------------------------------------------------------------------


def add_person(person, space, weight, bias):
    """-> (Encoder, Space) with the person as the last subject."""
    head = person.encoder.head
    larger = head.with_parameters(
        subject_weight=torch.cat([head.subject_weight.detach(), weight[None]]),
        subject_bias=torch.cat([head.subject_bias.detach(), bias[None]]),
    )
    mask = torch.zeros(1, space.n_vertices, dtype=torch.bool)
    mask[0, person.columns] = True
    own, rois = person.data.space.rois, {}
    for group in dict.fromkeys([*space.rois, *own]):
        before = space.rois.get(group, {"names": {}, "labels": torch.zeros_like(space.mask, dtype=torch.int16)})
        names, labels = dict(before["names"]), torch.zeros_like(mask, dtype=torch.int16)
        if group in own:
            values = own[group]["labels"][person.s].numpy()[person.known]
            merged = prepare_data.merge_labels(names, own[group]["names"], values)
            labels[0, person.columns] = torch.from_numpy(merged)
        rois[group] = {"names": names, "labels": torch.cat([before["labels"], labels])}
    subjects, mask = [*space.subjects, person.name], torch.cat([space.mask, mask])
    return Encoder(person.encoder.trunk, larger), dataclasses.replace(space, subjects=subjects, mask=mask, rois=rois)


def show_curve(curve, title):
    """Print the table and return the figure."""

    def show(values):
        return f"{values.mean():.4f}" + (f" ({values.min():.4f} to {values.max():.4f})" if len(values) > 1 else "")

    table = curve.pivot_table("median_r2", "n_pictures", "method", aggfunc=show)[list(METHODS)]
    print(f"\n{title}, mean over draws (lowest to highest)")
    print(table.rename(columns=METHODS).rename_axis(columns=None).to_string(na_rep="–") + "\n")
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="pictures fitted to", ylabel="median R² over vertices")
    for method, label in METHODS.items():
        rows = curve[curve.method == method].groupby("n_pictures")["median_r2"].agg(["mean", "min", "max"])
        [line] = axes.plot(rows.index, rows["mean"], label=label, marker="o", markersize=4)
        axes.fill_between(rows.index, rows["min"], rows["max"], color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("symlog", linthresh=10, linscale=0.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def print_fit(person, n, a, c):
    n_unknown = int(person.data.space.mask[person.s].sum()) - len(person.columns)
    print(
        f"{person.name}: fitted to {n} pictures, {len(person.columns)} vertices; {n_unknown} unknown to the checkpoint"
    )
    print("penalties with the least leave-one-out error (each picture predicted from all others):")
    print(f"  a {a:<8.3g} on the person's own map; 0: unconstrained, inf: the group's map")
    print(f"  c {c:<8.3g} on the shift of the mean from the group's, in pictures: {n / (n + c):.0%} of it is kept")


def choose_person(data, space, path):
    """The new person's name. Raises UserError where they cannot be added to this checkpoint."""
    name = SUBJECT or ", ".join(data.space.subjects)
    if name not in data.space.subjects:
        raise UserError(f"SUBJECT is {SUBJECT!r}, expected one of {', '.join(data.space.subjects)} in {DATA_DIR}.")
    s = data.space.subjects.index(name)
    if name in space.subjects:
        raise UserError(f"{path} already has {name}: prepare the new person under another name.")
    if not len(data.samples("train", s)) or not len(data.samples("val", s)):
        raise UserError(f"{name} has no training or no validation pictures in {DATA_DIR}.")
    if data.space.unit != space.unit or not (data.space.present(s) & (find(space, data.space) >= 0)).any():
        raise UserError(f"{name} and {path} have no {space.unit} in common.")
    return name


def adapt(person, space, info, folder):
    train = np.flatnonzero((person.split == 0) | (not HOLD_OUT))
    scored = np.flatnonzero((person.split > 0) & person.fresh & HOLD_OUT)
    weight, bias, (a, c) = person.fit(train)
    print_fit(person, len(train), a, c)
    n_trained = int(((person.split > 0) & ~person.fresh).sum())
    if n_trained:
        print(f"{n_trained} held-out pictures are not scored: the checkpoint was trained on them with other people")
    scores = {"subject": person.name, "n_pictures": len(train), "n_left_out": n_trained, "a": f"{a:g}", "c": f"{c:g}"}
    in_checkpoint = dict(info["scores"])
    if len(scored) > 1:
        curve = measure_curve(person, train, scored)
        curve.to_csv(folder / "curve.csv", index=False, float_format="%.6g")
        figure = show_curve(curve, f"{person.name}: median R² of {len(scored)} held-out pictures")
        figure.savefig(folder / "curve.png", dpi=150)
        scores["held_out"] = score(person, scored, person.predict_adapted(train, scored))
        in_checkpoint[f"heldout_r2_{person.name}"] = scores["held_out"]["median_r2"]
        print(f"held-out pictures: {describe(scores['held_out'])}")
    every = np.flatnonzero(person.fresh)
    if len(scored) < FEW_PICTURES and len(every) > 1:
        scores["cross_validated"] = score(person, every, cross_validate(person, every))
        print(f"{N_FOLDS}-fold cross-validation over all pictures: {describe(scores['cross_validated'])}")
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    inputs = {"data_fingerprint": person.data.fingerprint, "checkpoint": info["fingerprint"]} | constants(globals())
    made_with = info["made_with"] | {"adapted": [*info["made_with"].get("adapted", []), inputs | scores]}
    encoder, space = add_person(person, space, weight, bias)
    save_checkpoint(
        folder / "adapted.pt", encoder, space=space, made_with=made_with, scores=in_checkpoint, step=info["step"],
        finished=info["finished"], train_nsd_ids=info["train_nsd_ids"],
        added=info["added"] | {person.name: person.nsd_ids[train]},
    )  # fmt: skip


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
