"""Stage 5: predict the challenge's test pictures and write the submission. load_encoder() predicts from Python.

Writes SUBMISSION_DIR/subjXX/{lh,rh}_pred_test.npy, float32 (n_test_images, n_vertices), and submission.zip.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import prepare_data
from core.checkpoint import load_checkpoint
from core.files import output_folder
from core.scores import check_finite
from core.settings import choose_device, choose_precision, run
from core.space import HEMIS, N_FSAVERAGE
from model import PICTURE_SIZE, UserError, trunk_outputs

DATA_DIR: str = "data"  # prepared data
RUN_DIR: str = "runs/base"  # input, with finetuned.pt or head.pt
CHECKPOINT: str = ""  # files to average (adapt, explain: one), by commas; empty: finetuned.pt in RUN_DIR, else head.pt
SUBMISSION_DIR: str = "runs/base/submission"  # output
BATCH_SIZE: int = 64  # pictures at a time
PRECISION: str = "auto"  # auto, bfloat16, float16 or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE: bool = False  # replace a submission that exists


class Activity:
    """Predicted activity of one subject: lh, rh (n_images, n_vertices of that hemisphere) float32."""

    def __init__(self, prediction, space, subject):
        columns = {hemi: space.columns(subject, hemi) for hemi in HEMIS}
        self.lh, self.rh = (prediction[:, columns[hemi]].numpy() for hemi in HEMIS)
        self.vertices = {hemi: space.vertices[columns[hemi]].numpy() for hemi in HEMIS}

    def to_fsaverage(self):
        """{hemi: (n_images, 163842) float32}, NaN where the model predicts nothing."""
        full = {hemi: np.full((len(self.lh), N_FSAVERAGE), np.nan, np.float32) for hemi in HEMIS}
        for hemi in HEMIS:
            full[hemi][:, self.vertices[hemi]] = getattr(self, hemi)
        return full


class Predictor:
    """One checkpoint, or the average of several with the same vertex space."""

    def __init__(self, paths, device, precision, batch_size=64):
        self.paths, self.device, self.precision, self.batch_size = paths, device, precision, batch_size
        loaded = [load_checkpoint(path, device) for path in paths]
        self.encoders, self.info = [each[0] for each in loaded], [each[2] for each in loaded]
        self.space = loaded[0][1]
        for path, (_, space, _) in zip(paths, loaded):
            if space.subjects != self.space.subjects or not torch.equal(space.vertices, self.space.vertices):
                raise UserError(f"{path} and {paths[0]} have different subjects or vertices and cannot be averaged.")

    def __repr__(self):
        names = ", ".join(map(str, self.paths))
        return f"Predictor({names}: {', '.join(self.subjects)}; {self.space.n_vertices} vertices)"

    @property
    def subjects(self):
        return list(self.space.subjects)

    @property
    def rois(self):
        groups = self.space.rois.values()
        return sorted({name for group in groups for label, name in group["names"].items() if label})

    def index(self, subject):
        """Index of a subject's name; None for the group."""
        if subject in (None, "group"):
            return None
        if subject not in self.space.subjects:
            raise UserError(f"unknown subject {subject!r}; this checkpoint has {', '.join(self.subjects)} and group.")
        return self.space.subjects.index(subject)

    def latents(self, images, update=None):
        """images (n, 256, 256, 3) uint8 -> per encoder h (n, latent_dim)."""
        options = self.batch_size, self.precision, update
        return [trunk_outputs(e.trunk, images, [e.latents], *options)[0] for e in self.encoders]

    @torch.inference_mode()
    def decode(self, latents, subject):
        """Latents -> activity (n, n_vertices of the common space) float32 on the CPU, of a subject's index or None."""
        parts = []
        for batch in zip(*(h.split(self.batch_size) for h in latents)):
            activity = torch.stack([encoder.predict(h, subject) for encoder, h in zip(self.encoders, batch)]).mean(0)
            check_finite(activity)
            parts.append(activity.cpu())
        return torch.cat(parts)

    def predict(self, images, subject=None):
        """Activity of pictures, (n, 256, 256, 3) uint8 or a list of files, for a subject's name; None: the group.

        The centre square of a file's picture is what the model sees.
        """
        if not hasattr(images, "shape"):
            pictures = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in images]
            images = np.stack([ImageOps.fit(picture, (PICTURE_SIZE, PICTURE_SIZE)) for picture in pictures])
        index = self.index(subject)
        return Activity(self.decode(self.latents(images), index), self.space, index)


def load_encoder(paths, device="auto", precision="auto", batch_size=64):
    """Checkpoint path, or several to average -> Predictor."""
    paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    device = choose_device(device)
    return Predictor(paths, device, choose_precision(precision, device), batch_size)


def load_chosen():
    """Predictor of the constants above, which all tools share."""
    finetuned = Path(RUN_DIR) / "finetuned.pt"
    usual = finetuned if finetuned.exists() else finetuned.with_name("head.pt")
    paths = [part.strip() for part in CHECKPOINT.split(",") if part.strip()]
    return load_encoder(paths or usual, DEVICE, PRECISION, BATCH_SIZE)


def main():
    data, predictor = prepare_data.load(DATA_DIR), load_chosen()
    if any(info["made_with"].get("data_fingerprint") != data.fingerprint for info in predictor.info):
        raise UserError(f"{predictor} was not trained on {DATA_DIR}.")
    if not len(data.test_image):
        raise UserError(f"{DATA_DIR} has no test pictures: prepare it from a folder with test_split.")
    rows = np.unique(data.test_image)
    latents = predictor.latents(data.images[rows])
    with output_folder(SUBMISSION_DIR, OVERWRITE, marker="submission.zip") as folder:
        with zipfile.ZipFile(folder / "submission.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for s in np.unique(data.test_subject).tolist():
                name, where = predictor.subjects[s], np.searchsorted(rows, data.test_image[data.test_subject == s])
                activity = Activity(predictor.decode([h[where] for h in latents], s), data.space, s)
                (folder / name).mkdir()
                for hemi in HEMIS:
                    path = folder / name / f"{hemi}_pred_test.npy"
                    np.save(path, getattr(activity, hemi))
                    archive.write(path, f"{name}/{path.name}")
    print(f"wrote {SUBMISSION_DIR}/submission.zip: {len(rows)} unique pictures")


if __name__ == "__main__":
    run(main, globals())
