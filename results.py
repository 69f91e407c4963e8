"""The folder of predictions: complete or not there, never those of two calls mixed; and what lies in it: arrays,
table of ROI means, GIFTI files, maps.

Files are written aside, in FOLDER/.partial, and moved to their places when all are there; predictions.json, written
last, records what made them. A call that was killed continues where its record aside says.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch

import prepare_data
from common import (
    NamedFile, Problem, check_disk, differences, fingerprint, name_error, sole_writer, versions, write_whole,
)  # fmt: skip
from flatmap import describe_maps, fit_limits, save_figure

record_name = "predictions.json"
seconds_between_records = 30.0  # of work that a kill may lose


class Results:
    """The results of one call, while they are made.

    folder: where they will be; aside: where they are written; record: what made them, and how far it is.
    """

    def __init__(self, folder, record):
        self.folder, self.aside, self.record = folder, folder / ".partial", record
        self.noted = time.monotonic()

    def path(self, name):
        """Where to write a file of that name."""
        path = self.aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name, array):
        with write_whole(self.path(name)) as file:
            np.save(file, array)

    def write_table(self, name, rows):
        with write_whole(self.path(name)) as file:
            file.write(csv_bytes(rows))

    def note(self, **state):
        """Record how far it is; what is recorded as done must have reached the disk before."""
        self.record |= state
        self.noted = time.monotonic()
        write_json(self.aside / record_name, self.record)

    def is_due(self):
        return time.monotonic() - self.noted >= seconds_between_records

    def finish(self):
        """All is written: move it to its place and remove what an earlier call left there."""
        files = [p.relative_to(self.aside).as_posix() for p in sorted(self.aside.rglob("*")) if p.is_file()]
        files = [name for name in files if name != record_name]
        if "files" not in self.record:  # else a call that was killed came this far
            self.note(files=files)
        remove(self.folder, read_record(self.folder))
        self.note(is_cleared=True)
        for name in files:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.aside / name).replace(self.folder / name)
        write_json(self.folder / record_name, {k: v for k, v in self.record.items() if k != "is_cleared"})
        shutil.rmtree(self.aside)


def write_json(path, content):
    with write_whole(path) as file:
        file.write(json.dumps(without_nan(content), indent=1).encode())


def without_nan(found):
    """For JSON, which has no NaN: None instead, through dicts and lists."""
    if isinstance(found, dict):
        return {key: without_nan(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [without_nan(value) for value in found]
    return None if isinstance(found, float) and np.isnan(found) else found


def read_record(folder):
    """The record in a folder; {} where there is none."""
    path = folder / record_name
    if not path.exists():
        return {}
    try:
        return {"inputs": {}, "files": [], **json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise Problem(f"{path} cannot be read ({error}), expected what predict.py wrote; remove it")


def remove(folder, record):
    """Remove the files that a folder's record names, subfolders that are empty then, and last the record."""
    files = [folder / name for name in record.get("files", [])]
    for path in files:
        path.unlink(missing_ok=True)
    parents = {parent for path in files for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, reverse=True):
        with contextlib.suppress(OSError):  # somebody else's files are in it
            parent.rmdir()
    (folder / record_name).unlink(missing_ok=True)


@contextlib.contextmanager
def open_results(folder, inputs, about, *, constant, overwrite, continues=None):
    """Yields Results to be made or continued; None where the same call has finished before.

    inputs: {name: value} of all that decides the results. about: what else to record. constant: the script's that
    says where, for messages. overwrite: replace other results. continues: from the record of unfinished results and
    inputs, whether this call can continue them; None: where the inputs are equal.
    """
    folder, inputs = Path(folder), json.loads(json.dumps(inputs))  # as they are read back
    with sole_writer(folder, "predict.py"):
        results = Results(folder, {"inputs": inputs, **about, "versions": versions()})
        finished, partial = read_record(folder), read_record(results.aside)
        if finished and partial.get("is_cleared"):  # killed at the very end
            shutil.rmtree(results.aside)
            partial = {}
        can_continue = bool(partial) and (continues(partial, inputs) if continues else partial["inputs"] == inputs)
        if not overwrite:
            if finished and finished["inputs"] != inputs:
                refuse_mixing(folder, "other predictions", finished["inputs"], inputs, constant)
            if finished and all((folder / name).exists() for name in finished["files"]):
                print(f"{folder} holds these predictions already; --overwrite true makes them anew")
                yield None
                return
            if partial and not can_continue:
                refuse_mixing(folder, "unfinished predictions of other inputs", partial["inputs"], inputs, constant)
            strays = sorted(p.name for p in folder.glob("[!.]*") if p.is_dir() or p.suffix in (".csv", ".zip"))
            if strays and not finished and not partial:
                some = ", ".join(strays[:3]) + " …" * (len(strays) > 3)
                raise Problem(
                    f"{folder} holds {some} but no {record_name} that says what made them: choose another {constant}, "
                    "or --overwrite true writes there all the same"
                )
        if can_continue:
            results.record |= {k: v for k, v in partial.items() if k not in results.record}
        elif results.aside.exists():
            if partial.get("is_cleared"):  # some of its files are in their places already
                remove(folder, partial)
            shutil.rmtree(results.aside)
        yield results


def refuse_mixing(folder, what, before, now, constant):
    changed = differences(before, now)
    raise Problem(
        f"{folder} holds {what} ({'; '.join(changed[:6])}{' …' * (len(changed) > 6)}): choose another {constant}, or "
        "--overwrite true replaces them"
    )


# ---- what lies in the folder --------------------------------------------------------------------


class RoiMeans:
    """Means over every ROI and hemisphere of one subject's activity, and their rows of a table."""

    def __init__(self, space, subject, device):
        left = np.arange(space.n_vertices) < space.n_lh
        self.areas = space.regions(subject)
        parts = np.stack([area & side for area in self.areas.values() for side in (True, left, ~left)])
        self.counts = parts.sum(1).reshape(-1, 3)  # of both hemispheres, left, right
        self.filled = parts.any(1)
        weights = parts[self.filled] / parts[self.filled].sum(1, keepdims=True)
        self.weights = torch.from_numpy(weights.astype(np.float32)).to(device)  # (n_filled, n_vertices)

    def __call__(self, activity):
        """activity (n, n_vertices) on the device -> (n, n_filled)."""
        return activity @ self.weights.T

    def rows(self, first, *values):
        """Rows (*first, *roi_columns) of a table; values (n_filled,) each, as text or numbers: NaN leaves a gap."""

        def show(value):
            return value if isinstance(value, str) else "" if np.isnan(value) else f"{value:.6g}"

        table = np.full((len(values), self.filled.size), "", object)
        table[:, self.filled] = [list(map(show, part)) for part in values]
        table = table.reshape(len(values), -1, 3)
        for k, (names, counts) in enumerate(zip(self.areas, self.counts)):
            yield (*first, *names, *table[:, k].ravel(), *counts)

    def template(self, *first):
        """The rows with one value as text, in which the operator % puts the n_filled means: fast."""
        rows = self.rows(first, [mean_mark] * int(self.filled.sum()))
        return csv_bytes(rows).decode().replace("%", "%%").replace(mean_mark, "%.6g")


picture_mark, mean_mark = "\x1f", "\x1e"  # where a picture's name and a mean go in a template


def roi_columns(*values):
    """Names of the columns of RoiMeans.rows(); values: what stands before both, lh and rh, as "t_" in t_both."""
    return ("roi_group", "roi", *(f"{before}{side}" for before in (*values, "n_") for side in ("both", "lh", "rh")))


def csv_bytes(rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def gifti_bytes(activity, space, subject, hemi):
    """activity (n_vertices of the common space,) -> a GIFTI file of one hemisphere, NaN where the subject has none."""
    from nibabel import gifti

    own = space.hemisphere(subject, hemi).numpy()
    on_fsaverage = np.full(prepare_data.n_fsaverage, np.nan, np.float32)
    on_fsaverage[space.vertices.numpy()[own]] = activity[own]
    array = gifti.GiftiDataArray(on_fsaverage, intent="NIFTI_INTENT_NONE", datatype="NIFTI_TYPE_FLOAT32")
    meta = gifti.GiftiMetaData(AnatomicalStructurePrimary={"lh": "CortexLeft", "rh": "CortexRight"}[hemi])
    return gifti.GiftiImage(darrays=[array], meta=meta).to_bytes()


class ActivityWriter:
    """Predictions written as they come, from where an earlier call was killed: a row at the end of every array, rows of
    rois.csv, GIFTI files and maps of every picture where wanted.

    subjects: {name: index in space, None for the group}; names, stamps: of the pictures; rois: {subject: RoiMeans}.
    dtype: of the arrays; gifti: whether to write such files; flat_map: a FlatMap, or None for no maps; on maps
    roi_group is outlined, and map_range ends the colour scale (0: what fits).
    """

    def __init__(self, results, space, subjects, names, stamps, rois, *, dtype, gifti, flat_map, roi_group, map_range):
        self.results, self.space, self.subjects, self.names, self.stamps = results, space, subjects, names, stamps
        self.dtype, self.gifti, self.flat_map, self.map_range = dtype, gifti, flat_map, map_range
        if flat_map:
            self.outlines = {subject: flat_map.outlines(roi_group, s) for subject, s in subjects.items()}
        self.templates = {subject: means.template(picture_mark, subject) for subject, means in rois.items()}
        self.files, self.n_done = {}, results.record.get("n_done", 0)
        self.n_roi_bytes = results.record.get("n_roi_bytes")
        if self.n_done:
            print(f"continuing after {self.n_done} of {len(names)} pictures")

    def open(self):
        """Not before there is something to write."""
        n_bytes = len(self.names) * len(self.subjects) * self.space.n_vertices * self.dtype.itemsize
        check_disk(self.results.folder, n_bytes)
        self.columns = {}
        for subject, s in self.subjects.items():
            for hemi in prepare_data.hemis:
                own = self.space.hemisphere(s, hemi).numpy()
                self.columns[subject, hemi] = own
                index = "fsaverage" if self.space.unit == "vertices" else "pixels"
                self.results.save(f"{subject}/{index}_{hemi}.npy", self.space.vertices.numpy()[own])
                header = io.BytesIO()
                prepare_data.write_npy_header(header, (len(self.names), len(own)), self.dtype)
                n_bytes = len(header.getvalue()) + self.n_done * len(own) * self.dtype.itemsize
                self.append(f"{subject}/activity_{hemi}.npy", header.getvalue(), n_bytes)
        header = csv_bytes([("picture", "subject", *roi_columns(""))])
        self.append("rois.csv", header, self.n_roi_bytes or len(header))

    def append(self, name, header, n_bytes):
        """Open a file that holds n_bytes already, or the header alone."""
        path = self.results.path(name)
        if not self.n_done:
            path.write_bytes(header)
        if path.stat().st_size < n_bytes:
            raise Problem(f"{path} is shorter than it was left: remove {self.results.aside} and start again")
        os.truncate(path, n_bytes)
        self.files[name] = NamedFile(open(path, "ab"), path, None)

    def write(self, start, images, found):
        """images (n, 256, 256, 3); found: {subject: (activity (n, n_vertices), ROI means (n, n_filled))}."""
        if not self.files:
            self.open()
        names = self.names[start : start + len(images)]
        for subject, (activity, _) in found.items():
            for hemi in prepare_data.hemis:
                file = self.files[f"{subject}/activity_{hemi}.npy"]
                file.write(np.ascontiguousarray(activity[:, self.columns[subject, hemi]]).data)
        for i, name in enumerate(names):
            quoted = csv_bytes([(name, "")]).decode()[:-2]
            for subject, (_, means) in found.items():
                rows = self.templates[subject] % tuple(means[i].tolist())
                self.files["rois.csv"].write(rows.replace(picture_mark, quoted).encode())
            if self.gifti or self.flat_map:
                self.draw(name, images[i], {subject: activity[i] for subject, (activity, _) in found.items()})
        self.n_done, self.n_roi_bytes = start + len(images), self.files["rois.csv"].tell()
        if self.results.is_due():
            self.note()

    def draw(self, name, picture, activities):
        """Files of a single picture. activities: {subject: (n_vertices,)}."""
        has = {subject: self.space.present(s) for subject, s in self.subjects.items()}
        shown = {subject: np.where(has[subject], y, np.float32(np.nan)) for subject, y in activities.items()}
        limits = (-self.map_range, self.map_range) if self.map_range else fit_limits(shown.values())
        for subject, activity in shown.items():
            stem = f"{subject}/{name}"
            for hemi in prepare_data.hemis if self.gifti else ():
                gifti = gifti_bytes(activity, self.space, self.subjects[subject], hemi)
                self.results.path(f"{stem}_{hemi}.func.gii").write_bytes(gifti)
            if self.flat_map:
                title, outlines = f"{name}, {subject}", self.outlines[subject]
                figure = draw_map(title, picture, activity, limits, "predicted activity (z)", self.flat_map, outlines)
                save_figure(figure, self.results.path(f"{stem}.png"))

    def note(self):
        """Record what is done, once it has reached the disk."""
        for file in self.files.values():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise name_error(error, file.path)
        done = fingerprint(self.stamps[: self.n_done])
        self.results.note(n_done=self.n_done, done=done, n_roi_bytes=self.n_roi_bytes)

    def close(self):
        if self.files:
            self.note()
            for file in self.files.values():
                file.close()


def draw_map(title, picture, activity, limits, label, flat_map, outlines):
    """-> figure: activity (n_vertices,), NaN where missing, on a flat map; picture (256, 256, 3) beside it, or None."""
    import matplotlib.pyplot as plt

    width = 3 * flat_map.grey.shape[1] / flat_map.grey.shape[0]  # inches
    ratios = [3] * (picture is not None) + [width]
    size = (sum(ratios) + 1.2, 3.7)
    figure, axes = plt.subplots(1, len(ratios), figsize=size, width_ratios=ratios, squeeze=False, layout="constrained")
    axes = axes[0]
    if picture is not None:
        axes[0].imshow(picture)
        axes[0].set_axis_off()
    shown = flat_map.draw(axes[-1], activity, limits, "RdBu_r", outlines, named=True)
    describe_maps(figure, [shown], [axes[-1]], label, outlines)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
