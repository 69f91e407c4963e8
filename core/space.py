"""The common vertex space: the union over subjects of their vertices, left hemisphere first."""

import dataclasses

import numpy as np
import torch

N_FSAVERAGE = 163842  # vertices of one hemisphere
HEMIS = ("lh", "rh")
ROI_GROUPS = ("streams", "prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words")


@dataclasses.dataclass
class Space:
    """subjects: names. vertices (n_vertices,) int64: index on fsaverage, of one hemisphere. n_lh: how many are left.
    mask (n_subjects, n_vertices) bool: which vertices a subject has. rois: {group: {"names": {label: name}, "labels":
    (n_subjects, n_vertices) int16, 0 where unlabelled}}. unit: what a column is ("pixels" for NSD-Flat).
    """

    subjects: list
    vertices: torch.Tensor
    n_lh: int
    mask: torch.Tensor
    rois: dict
    unit: str = "vertices"

    @property
    def n_vertices(self):
        return len(self.vertices)

    def present(self, subject=None):
        """(n_vertices,) bool: vertices of a subject (an index); the group has all."""
        return self.mask[subject].numpy() if subject is not None else np.ones(self.n_vertices, bool)

    def columns(self, subject, hemi):
        """Columns of a subject's (None: group's) vertices in "lh" or "rh", in the challenge's order."""
        left = np.arange(self.n_vertices) < self.n_lh
        return np.flatnonzero((left if hemi == "lh" else ~left) & self.present(subject))
