"""A new person: a trained checkpoint and a few of their pictures with activity -> their own model, in closed form.

Reads CHALLENGE_DIR/SUBJECT (or CHALLENGE_DIR itself), one person in the challenge's layout (docs/adapt.md), and a
checkpoint. All stays frozen but the person's own B and b. With the feature latents h of a picture, the person's
activity y on the vertices that the checkpoint knows and they have, and those rows of E and mean:

    min over B, b of  sum_i |y_i - mean - E (A h_i + B h_i + b)|² + a |B|² + c |E (B h_mean + b)|²

Without data that is the group's prediction, with much data the person's own map. c is in pictures: as if so many more,
of mean h, had shown the group's activity. The penalties a and c have the least leave-one-out error over the person's
training pictures. Solved exactly, see fit(). OUTPUT_DIR gets

    adapted.pt            the checkpoint with the person added; the others' predictions stay as they are to the bit
    curve.csv, curve.png  score on held-out pictures against the number of pictures used, beside the group's
                          prediction and a ridge regression from the trunk's features to every vertex (ridge.py)
    submission/SUBJECT/   predictions for the folder's test pictures, if it has any
"""

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import torch

import evaluate
import predict
import prepare_data
import ridge
from checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, trained_pictures
from common import (
    Problem, check_disk, check_least, choose_device, choose_precision, constants, differences, fingerprint,
    is_subject_name, progress, run_script, sole_writer, write_whole,
)  # fmt: skip
from ensemble import choose_checkpoint, describe_checkpoint
from flatmap import save_figure
from model import Encoder, Space, of_features
from results import csv_bytes
from scores import finite_median, score

CHALLENGE_DIR = prepare_data.CHALLENGE_DIR  # holds the person's folder SUBJECT, or is that folder
SUBJECT = "subj09"  # the new person's name, any but those that the checkpoint has
RUN_DIR = predict.RUN_DIR  # holds finetuned.pt or head.pt
CHECKPOINT = ""  # a checkpoint's path, also the authors' weights; empty: RUN_DIR/finetuned.pt, else head.pt
DATA_DIR = prepare_data.DATA_DIR  # prepared data: vertex masks for the authors' weights, else not needed
OUTPUT_DIR = ""  # adapted.pt, curve and submission are written there; empty: runs/SUBJECT
HOLD_OUT = True  # 15 % of the pictures, as everywhere, for the curve; false: fit to all, nothing to score
N_DRAWS = 5  # random draws of pictures at the curve's sizes up to half of all
ACTIVITY_LIMIT = prepare_data.ACTIVITY_LIMIT  # z; what is not z-scored is refused, see prepare_data.py
BATCH_SIZE = 64  # pictures at a time
SEED = prepare_data.SEED  # governs which pictures are held out, and the draws
PRECISION = "auto"  # auto, bfloat16, float16 or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE = False  # adapt again although OUTPUT_DIR has an adapted.pt

fewest = 5  # pictures
sizes = [0] + [n * 10**k for k in range(1, 6) for n in (1, 3)]  # of the curve: 0, 10, 30, 100, …
# one for all components, h of whole pictures: a penalty for each component is worse, random crops' mean h no better
# (benchmark.py --parts adapt)
penalties = [10 ** (k / 2) for k in range(-4, 13)] + [float("inf")]  # a, in mean |h - mean h|²; inf: B = 0, b alone
mean_penalties = [0, 3, 10, 30, 100, float("inf")]  # c, in pictures; 0: b is free
colours = {"group": "0.5", "adapted": "#0072B2", "ridge": "#D55E00"}  # of the curve's methods (Okabe and Ito)
titles = {"group": "the group's prediction", "adapted": "adapted", "ridge": "ridge on the trunk's features"}


# ---- the closed form ----------------------------------------------------------------------------


@dataclasses.dataclass
class Basis:
    """E's rows of the person's vertices, G = E'E = U diag(g) U': without all vertices no longer the identity."""

    rows: torch.Tensor  # E (n_vertices, pca_dim)
    vectors: torch.Tensor  # U (pca_dim, rank) float64
    values: torch.Tensor  # g (rank,) float64, above 0


def decompose(rows):
    """rows: E (n_vertices of the person, pca_dim) -> Basis."""
    values, vectors = torch.linalg.eigh((rows.T @ rows).double())
    known = values > 1e-6 * values.max()  # directions that none of these vertices shows stay the group's
    return Basis(rows, vectors[:, known], values[known])


def coordinates(basis, y):
    """y (n, n_vertices) -> (n, rank) float64, its part in the span of E in orthonormal coordinates."""
    return (y @ basis.rows).double() @ basis.vectors / basis.values.sqrt()


def fit(h, t, basis, penalties=penalties, mean_penalties=mean_penalties):
    """B (pca_dim, latent_dim), b (pca_dim,) and the penalties (a, c) that minimise the objective above; float64.

    h (n_pictures, latent_dim); t (n_pictures, rank): coordinates() of y less the group's prediction.

    In these coordinates the components separate: with w_j the rows of U'B and g_j the eigenvalues of G, component
    j is a ridge regression of t_j on sqrt(g_j) h with penalty a, whose leave-one-out residuals are e / (1 - H_ii).
    On the centred h the mean is apart from B: c shrinks it to n / (n + c) of itself. One decomposition of the
    centred h serves all components and penalties.
    """
    n, h = len(h), h.double()
    h_mean, t_mean = h.mean(0), t.mean(0)
    left, s, right = torch.linalg.svd(h - h_mean, full_matrices=False)  # (n, r), (r,), (r, latent_dim)
    known = s > 1e-7 * s.max().clamp(min=1e-30)
    left, s, right = left[:, known], s[known], right[known]
    inside = left.T @ (t - t_mean)  #                                (r, rank)
    energy = s[:, None].square() * basis.values  #                   (r, rank)
    unit = s.square().sum() / n
    errors = {}
    for a in penalties:
        kept = energy / (energy + a * unit)
        residual, leverage = t - t_mean - left @ (kept * inside), left.square() @ kept  # (n, rank) both
        for c in mean_penalties:
            share = n / (n + c)
            unseen = 1 - share / n - leverage  #                     1 - H_ii
            errors[a, c] = float(((residual + (1 - share) * t_mean) / unseen).square().sum())
    a, c = min(errors, key=errors.get)
    kept = energy / (energy + a * unit)
    components = basis.vectors / basis.values.sqrt()  #              (pca_dim, rank)
    weight = components @ (right.T @ (kept * inside / s[:, None])).T
    return weight, n / (n + c) * components @ t_mean - weight @ h_mean, (a, c)


# ---- the new person -----------------------------------------------------------------------------


@dataclasses.dataclass
class Person:
    """The new person's data, on the vertices that the checkpoint knows."""

    files: prepare_data.Subject
    space: Space  # of this person alone, all their vertices
    columns: np.ndarray  # (n_vertices of space,) columns of the checkpoint's space, -1 where it has none
    train: np.ndarray  # (n_pictures,) bool: not held out
    scored: np.ndarray  # (n_pictures,) bool: held out, and the checkpoint was not trained on it
    ceiling: np.ndarray  # (n_vertices known,) noise ceiling, NaN where there is none

    def known(self):
        """(n_vertices of space,) bool: the vertices that the checkpoint knows."""
        return self.columns >= 0

    def read_activity(self, rows):
        """(len(rows), n_vertices known) float32 tensor."""
        side = np.arange(self.space.n_vertices) < self.space.n_lh
        parts = []
        for hemi, own in zip(prepare_data.hemis, (side, ~side)):
            parts.append(prepare_data.read_npy(self.files.activity[hemi])[rows][:, self.known()[own]])
        return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))


def find_folder():
    """The person's folder: CHALLENGE_DIR/SUBJECT, else CHALLENGE_DIR itself."""
    folder = Path(CHALLENGE_DIR)
    for found in (folder / SUBJECT, folder):
        if (found / "training_split").is_dir():
            return found
    raise Problem(
        f"neither {folder / SUBJECT} nor {folder} has a training_split, expected the new person's data in the "
        "challenge's layout: pictures, activity and masks (docs/adapt.md)"
    )


def read_person():
    """The person's files, checked -> Subject, fingerprints of the activity {path: …}."""
    findings = prepare_data.Findings()
    files = prepare_data.read_subject(find_folder(), findings)
    files.name = SUBJECT
    if 0 < len(files.pictures) < fewest:
        findings.append(f"{files.pictures[0].parent}: {len(files.pictures)} pictures, expected {fewest} at least")
    stamps = {}
    if len(files.activity) == len(prepare_data.hemis):
        _, stamps = prepare_data.scan_activity([files], findings, ACTIVITY_LIMIT)
    findings.refuse(f"problems in {find_folder()}")
    return files, stamps


def check_checkpoint(path, space):
    taken = [name for name in space.subjects if name.casefold() == SUBJECT.casefold()]
    if taken:
        known = ", ".join(space.subjects)
        raise Problem(f"{path} has {taken[0]} already, expected in SUBJECT a name that is new to it: it has {known}")
    if space.unit != "vertices":
        raise Problem(f"{path} predicts {space.unit} of NSD-Flat, expected a checkpoint of fsaverage's vertices")


def match(files, space, trained, path):
    """The person's part of the checkpoint's space, and what is held out -> Person. trained: nsd ids of the
    pictures that the checkpoint was trained on."""
    own = prepare_data.build_space([files])
    columns = space.find(own)
    n_known, n_unknown = (columns >= 0).sum(), (columns < 0).sum()
    if not n_known:
        raise Problem(f"none of {SUBJECT}'s {len(columns)} vertices is one of {path}, expected visual cortex's")
    if n_unknown:
        print(f"{SUBJECT}: {n_unknown} of {len(columns)} vertices are none of {path}: left out, predicted as 0")
    train = hold_out(files.nsd_ids) if HOLD_OUT else np.ones(len(files.pictures), bool)
    scored = ~train & ~np.isin(files.nsd_ids, trained)
    n_held, n_seen = (~train).sum(), (~train & ~scored).sum()
    if n_seen:
        print(
            f"{n_seen} of {n_held} held-out pictures are some that {path} was trained on with other people, by their "
            "nsd ids: left out of the scores"
        )
    ceiling = evaluate.read_ceiling(find_folder(), own, 0)
    ceiling = np.full(n_known, np.nan) if ceiling is None else ceiling[0][columns >= 0]
    return Person(files, own, columns, train, scored, ceiling)


def hold_out(nsd_ids):
    """(n_pictures,) bool: the train split, as prepare_data.py makes it from this folder alone with this SEED."""
    split = prepare_data.split_pictures(np.ones((len(nsd_ids), 1), bool), SEED)
    return split[np.argsort(np.argsort(nsd_ids))] == 0


def read_latents(encoder, paths, precision):
    """-> h (n_pictures, latent_dim) and ridge's features (n_pictures, n_features) of the files, on the CPU."""
    functions = [encoder.latents, lambda features: ridge.pool_tokens(encoder.trunk, features)]
    pictures, parts = prepare_data.decode_pictures([[path] for path in paths]), []
    while block := list(itertools.islice(pictures, BATCH_SIZE)):
        found = of_features(encoder.trunk, np.stack(block), functions, batch_size=BATCH_SIZE, precision=precision)
        parts.append([values.cpu() for values in found])
    return [torch.cat(part) for part in zip(*parts)]


# ---- the curve ----------------------------------------------------------------------------------


class Solver:
    """Fits the person's map to any of their pictures, of which it knows h and coordinates of y less the group's
    prediction."""

    def __init__(self, encoder, person, h):
        head, device = encoder.head, encoder.head.embed_bias.device
        columns = torch.from_numpy(person.columns[person.known()]).to(device)
        self.h, self.shared = h.to(device), head.shared.detach()
        self.basis = decompose(head.embed_weight.detach()[columns])
        self.mean = head.embed_bias.detach()[columns] * head.bias_count
        self.group_mean = head.embed_bias.detach()[columns]
        parts = []
        for rows in torch.arange(len(h)).split(512):
            y = person.read_activity(rows.numpy()).to(device)
            parts.append(coordinates(self.basis, y - self.predict_group(self.h[rows])))
        self.targets = torch.cat(parts)
        # in the authors' weights the mean counts twice in people's predictions, once in the group's
        between = coordinates(self.basis, (self.group_mean - self.mean)[None])[0]
        self.bias = self.basis.vectors / self.basis.values.sqrt() @ between

    def fit(self, rows):
        """-> B, b, penalties of the pictures in rows, in single precision."""
        weight, bias, found = fit(self.h[rows], self.targets[rows], self.basis)
        return weight.to(self.h.dtype), (bias + self.bias).to(self.h.dtype), found

    def predict(self, h, weight, bias):
        """h (n, latent_dim) -> activity (n, n_vertices known)."""
        return (h @ (self.shared + weight).T + bias) @ self.basis.rows.T + self.mean

    def predict_group(self, h):
        return h @ self.shared.T @ self.basis.rows.T + self.group_mean


def measure_curve(solver, person, features):
    """Rows (n_pictures, method, median_r2, mean_r, challenge, draw) of the curve."""
    device = solver.h.device
    train, scored = np.flatnonzero(person.train), np.flatnonzero(person.scored)
    activity = person.read_activity(scored).to(device)
    n_vertices = activity.shape[1]

    def measure(prediction):
        found = score(activity, prediction, np.ones(n_vertices, bool), person.ceiling)
        known = found["challenge"][~np.isnan(found["challenge"])]
        challenge = float(known.mean()) if len(known) else float("nan")
        return finite_median(found["r2"]), float(found["r"].mean()), challenge

    group, curve = measure(solver.predict_group(solver.h[scored])), []
    for n in [n for n in sizes if n < len(train)] + [len(train)]:
        curve.append((n, "group", *group, 0))
        if n == 0:
            curve.append((n, "adapted", *group, 0))
            continue
        n_draws = N_DRAWS if 2 * n <= len(train) else 1
        for draw in progress(range(n_draws), f"{n} pictures", unit="draw"):
            rows = np.random.default_rng([SEED, n, draw]).choice(train, n, replace=False) if n < len(train) else train
            weight, bias, _ = solver.fit(rows)
            curve.append((n, "adapted", *measure(solver.predict(solver.h[scored], weight, bias)), draw))
            fitted = ridge.fit(features[rows].to(device), person.read_activity(rows).to(device))
            curve.append((n, "ridge", *measure(ridge.predict(fitted, features[scored].to(device))), draw))
    return curve


def summarise_curve(curve, column):
    """{method: (n_pictures, mean, least, most)} over the draws, each (n_sizes,); column: place in the curve's rows."""
    found = {}
    for method in titles:
        points = {}
        for row in curve:
            if row[1] == method:
                points.setdefault(row[0], []).append(row[column])
        values = list(points.values())
        found[method] = [np.array(list(points))] + [np.array([f(v) for v in values]) for f in (np.mean, min, max)]
    return found


def print_curve(curve, n_scored):
    has_ceilings = not np.isnan(curve[0][4])
    print(f"\nmedian R² over vertices, of {n_scored} held-out pictures (mean of the draws, lowest to highest)")
    print(f"{'pictures':>8}", *(f"{name:>25}" for name in titles))
    summary = summarise_curve(curve, 2)
    for n in summary["group"][0]:
        cells = []
        for points in summary.values():
            at = np.flatnonzero(points[0] == n)
            mean, least, most = (values[at[0]] for values in points[1:]) if len(at) else (np.nan,) * 3
            spread = f" ({least:.3f} to {most:.3f})" if least < most else ""
            cells.append(f"{'–' if np.isnan(mean) else f'{mean:.4f}{spread}':>25}")
        print(f"{n:8}", *cells)
    if not has_ceilings:
        print(f"no noise ceilings in {find_folder()}, no challenge score")
    print()


def plot_curve(curve, n_scored):
    """Median R², mean r and, with ceilings, the challenge score against the number of pictures."""
    import matplotlib.pyplot as plt

    panels = {"median R² over vertices": 2, "mean r over vertices": 3}
    if not np.isnan(curve[0][4]):
        panels["challenge score"] = 4
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    for panel, (label, column) in zip(axes.flat, panels.items()):
        for method, (n, mean, least, most) in summarise_curve(curve, column).items():
            panel.fill_between(n, least, most, color=colours[method], alpha=0.2, linewidth=0)
            panel.plot(n, mean, color=colours[method], label=titles[method], marker="o", markersize=4)
        panel.set_xscale("symlog", linthresh=10, linscale=0.5)
        ticks = sorted({row[0] for row in curve})
        ticks = [n for n in ticks[:-1] if n < 0.7 * ticks[-1]] + ticks[-1:]  # labels apart
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.set(xlabel="pictures used", ylabel=label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    # a few pictures of a ridge regression would squash all else
    axes[0, 0].set_ylim(bottom=max(axes[0, 0].get_ylim()[0], -0.1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(f"{SUBJECT}: score on {n_scored} held-out pictures (bands: lowest and highest draw)", fontsize=10)
    return figure


def write_curve(output, curve, n_scored):
    rows = [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in curve]
    names = ("n_pictures", "method", "median_r2", "mean_r", "challenge", "draw")
    with write_whole(output / "curve.csv") as file:
        file.write(csv_bytes([names, *([("" if v == "nan" else v) for v in row] for row in rows)]))
    save_figure(plot_curve(curve, n_scored), output / "curve.png")
    print(f"wrote {output / 'curve.csv'}, {output / 'curve.png'}")


# ---- the checkpoint with the person -------------------------------------------------------------


def add_person(encoder, space, person, weight, bias):
    """-> (encoder, space) with one subject more, the last. The others' numbers are those of before."""
    head = encoder.head
    n_subjects = len(head.subject_bias)
    maps = torch.cat([head.subject_weight.detach(), weight[None]]), torch.cat([head.subject_bias.detach(), bias[None]])
    larger = head.replaced(*maps, head.embed_weight.detach(), head.embed_bias.detach())
    known = person.known()
    mask = torch.zeros(1, space.n_vertices, dtype=torch.bool)
    mask[0, person.columns[known]] = True
    labels = {group: (roi["names"], roi["labels"][0].numpy()[known]) for group, roi in person.space.rois.items()}
    rois = add_rois(space.rois, labels, person.columns[known], (n_subjects, space.n_vertices))
    subjects, mask = [*space.subjects, SUBJECT], torch.cat([space.mask, mask])
    return Encoder(encoder.trunk, larger, encoder.layers).eval(), dataclasses.replace(
        space, subjects=subjects, mask=mask, rois=rois
    )


def add_rois(rois, own, columns, shape):
    """ROIs of the space with a row more. own: {group: ({label: name}, labels (n_known,))} of the person, whose areas
    are found by their names, whatever their numbers; shape: (n_subjects, n_vertices) before."""
    found = {}
    for group in dict.fromkeys([*rois, *own]):
        before = rois.get(group, {"names": {}, "labels": torch.zeros(shape, dtype=torch.int16)})
        names, labels = dict(before["names"]), torch.zeros(1, shape[1], dtype=torch.int16)
        if group in own:
            labels[0, columns] = torch.from_numpy(prepare_data.merge_areas(names, *own[group]))
        found[group] = {"names": names, "labels": torch.cat([before["labels"], labels])}
    return found


def write_test_predictions(folder, encoder, person, index, h):
    """{lh,rh}_pred_test.npy in the challenge's layout; vertices that the checkpoint does not know are 0."""
    known, side = person.known(), np.arange(person.space.n_vertices) < person.space.n_lh
    whole = np.zeros((len(h), len(known)), np.float32)
    with torch.inference_mode():
        for rows in torch.arange(len(h)).split(BATCH_SIZE):
            prediction = encoder.decode(h[rows].to(encoder.head.embed_bias.device), index).cpu().numpy()
            whole[rows[0] : rows[-1] + 1, known] = prediction[:, person.columns[known]]
    for hemi, own in zip(prepare_data.hemis, (side, ~side)):
        with write_whole(folder / SUBJECT / f"{hemi}_pred_test.npy") as file:
            np.save(file, whole[:, own])
    print(f"wrote {folder / SUBJECT}: predictions of {len(h)} test pictures")


def is_adapted(output, inputs):
    """Whether output is what would be made; says so. Refuses another one, unless it is to be overwritten."""
    if OVERWRITE or not output.exists():
        return False
    before = (read_checkpoint(output)["made_with"].get("adapted") or [{"inputs": {}}])[-1]["inputs"]
    changed = differences(before, inputs)
    if changed:
        mend = "--overwrite true adapts anew; or choose another OUTPUT_DIR"
        raise Problem(f"{output} was adapted with {'; '.join(changed[:6])}. {mend}")
    print(f"{output} is there already from these inputs; --overwrite true adapts anew")
    return True


def main():
    check_least(globals(), BATCH_SIZE=1, SEED=0, N_DRAWS=1, ACTIVITY_LIMIT=1)
    if not is_subject_name(SUBJECT):
        raise Problem(f"SUBJECT is {SUBJECT!r}, expected a name of letters, digits and _.-, but not all or group")
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    path = choose_checkpoint(CHECKPOINT, RUN_DIR)
    files, stamps = read_person()
    output = Path(OUTPUT_DIR or Path("runs") / SUBJECT)
    with sole_writer(output, "adapt.py"):
        adapt(path, files, stamps, output, device, precision)


def adapt(path, files, stamps, output, device, precision):
    start = time.perf_counter()
    encoder, space, made = load_checkpoint(
        path, device, lambda: prepare_data.find_space(DATA_DIR, prepare_data.CHALLENGE_DIR)
    )
    check_checkpoint(path, space)
    rois = {group: fingerprint(names, *labels.values()) for group, (names, labels) in files.rois.items()}
    inputs = {
        "SUBJECT": SUBJECT, "SEED": SEED, "HOLD_OUT": HOLD_OUT, "N_DRAWS": N_DRAWS, "checkpoint": made["fingerprint"],
        "precision": str(precision)[6:], "pictures": files.picture_stamp,
        "activity": fingerprint(list(stamps.values())),
        "masks and ROIs": fingerprint(*files.vertices.values(), rois),
    }  # fmt: skip
    if is_adapted(output / "adapted.pt", inputs):
        return
    describe_checkpoint(path, made)
    trained, is_all = trained_pictures(made)
    if not is_all:
        print(f"{path} does not say which pictures it was trained on: held-out ones among them cannot be left out")
    person = match(files, space, trained, path)
    n_train, n_scored = int(person.train.sum()), int(person.scored.sum())
    check_disk(output, 2 * sum(p.numel() * p.element_size() for p in encoder.parameters()))
    h, features = read_latents(encoder, files.pictures, precision)
    h_test = read_latents(encoder, files.test_pictures, precision)[0] if files.test_pictures else None

    fitting = time.perf_counter()
    solver = Solver(encoder, person, h)
    weight, bias, chosen = solver.fit(np.flatnonzero(person.train))
    fitted = time.perf_counter()
    print(
        f"{SUBJECT}: fitted to {n_train} pictures, {int(person.known().sum())} vertices; penalties a {chosen[0]:g}, c "
        f"{chosen[1]:g} by leave-one-out; pictures through the trunk {fitting - start:.0f} s, closed form "
        f"{fitted - fitting:.1f} s"
    )
    scores = dict(made["scores"])
    if n_scored > 1:
        curve = measure_curve(solver, person, features)
        scores[f"heldout_r2_{SUBJECT}"] = next(row[2] for row in curve if row[:2] == (n_train, "adapted"))
        print_curve(curve, n_scored)
        write_curve(output, curve, n_scored)
    elif HOLD_OUT:
        print(f"{n_scored} held-out pictures to score, expected 2 at least: no curve")
    encoder, space = add_person(encoder, space, person, weight, bias)
    if h_test is not None:
        write_test_predictions(output / "submission", encoder, person, len(space.subjects) - 1, h_test)
    stale = [] if n_scored > 1 else ["curve.csv", "curve.png"]  # of an earlier run
    if h_test is None:
        stale += [f"submission/{SUBJECT}/{hemi}_pred_test.npy" for hemi in prepare_data.hemis]
    for name in stale:
        (output / name).unlink(missing_ok=True)
    about = {"inputs": inputs, "n_pictures": n_train, "penalties": [f"{v:g}" for v in chosen]}
    about["constants"] = constants(globals())
    made_with = made["made_with"] | {"adapted": [*made["made_with"].get("adapted", ()), about]}
    save_checkpoint(
        output / "adapted.pt", encoder, space=space, made_with=made_with, scores=scores, step=made["step"],
        finished=made["finished"], trained_nsd_ids=trained if is_all else None,
        added_nsd_ids=made.get("added_nsd_ids", {}) | {SUBJECT: files.nsd_ids[person.train]},
    )  # fmt: skip
    print(f"wrote {output / 'adapted.pt'}: {', '.join(space.subjects)}")


if __name__ == "__main__":
    run_script(main, globals())
