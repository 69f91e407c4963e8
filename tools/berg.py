"""A trained checkpoint as a model of BERG, the Brain Encoding Response Generator (docs/berg.md)."""

from pathlib import Path

import numpy as np
from PIL import Image

from core.checkpoint import read_checkpoint
from core.space import HEMIS, N_FSAVERAGE, Space
from model import PICTURE_SIZE
from predict import load_encoder
from tools.vertices import roi_masks

try:
    from berg.interfaces.base_model import BaseModelInterface
except ImportError:  # without BERG the class works by itself
    BaseModelInterface = object


class EncodingModel(BaseModelInterface):
    """subject: 1 to 8. selection: {"roi": name} or {"lh_vertices": (163842,) 0/1, "rh_vertices": …}; None: all."""

    CHECKPOINT = "encoding_models/modality-fmri/train_dataset-nsd_fsaverage/model-blobgpt/finetuned.pt"

    def __init__(self, subject, selection=None, device="auto", berg_dir=None):
        self.subject, self.selection, self.device, self.berg_dir = subject, selection or {}, device, berg_dir

    def load_model(self, device=None):
        self.model = load_encoder(Path(self.berg_dir) / self.CHECKPOINT, device or self.device)
        every, roi = np.ones(N_FSAVERAGE), self.selection.get("roi")
        self.chosen = {hemi: np.flatnonzero(self.selection.get(f"{hemi}_vertices", every)) for hemi in HEMIS}
        if roi:
            self.chosen = rois_on_fsaverage(self.model.space, self.subject)[roi]

    def generate_response(self, stimulus, show_progress=True):
        """stimulus (n, 3, size, size) uint8 -> lh, rh (n, n_selected) float32, NaN where nothing is predicted."""
        images = [Image.fromarray(x).resize((PICTURE_SIZE, PICTURE_SIZE)) for x in stimulus.transpose(0, 2, 3, 1)]
        activity = self.model.predict(np.stack(images), f"subj{self.subject:02d}").to_fsaverage()
        return tuple(activity[hemi][:, self.chosen[hemi]] for hemi in HEMIS)

    @classmethod
    def get_metadata(cls, berg_dir=None, subject=None, model_instance=None, **_):
        """ROIs as fsaverage vertices, and the nsd ids (from 0) of all training pictures."""
        source = model_instance or cls(subject, berg_dir=berg_dir)
        content = read_checkpoint(Path(source.berg_dir) / cls.CHECKPOINT)
        rois = rois_on_fsaverage(Space(**content["space"]), source.subject)
        fmri = {f"{hemi}_fsaverage_rois": {roi: vertices[hemi] for roi, vertices in rois.items()} for hemi in HEMIS}
        return {"fmri": fmri, "encoding_models": {"train_img_num": content["train_nsd_ids"].numpy()}}

    @classmethod
    def get_model_id(cls):
        return "fmri-nsd_fsaverage-blobgpt"

    def cleanup(self):
        self.model = None


def rois_on_fsaverage(space, subject):
    """{ROI: {hemi: vertices of fsaverage}} of subject 1 to 8."""
    masks = reversed(roi_masks(space, space.subjects.index(f"subj{subject:02d}")).items())
    vertices, n = space.vertices.numpy(), space.n_lh
    return {roi: {"lh": vertices[:n][region[:n]], "rh": vertices[n:][region[n:]]} for (_, roi), region in masks}
