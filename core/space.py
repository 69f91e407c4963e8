"""The common vertex space: the union over subjects of their vertices, left hemisphere first."""

import dataclasses
import re

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

    def find(self, other):
        """Columns here of another space's vertices, (other.n_vertices,) int64, -1 where missing."""
        keys = [2 * s.vertices.numpy() + (np.arange(s.n_vertices) >= s.n_lh) for s in (self, other)]
        place = {int(key): column for column, key in enumerate(keys[0])}
        return np.array([place.get(int(key), -1) for key in keys[1]], np.int64)

    def roi_labels(self, group, subject=None):
        """Labels (n_vertices,) of a subject; the group's are those that most subjects give a vertex."""
        labels = self.rois[group]["labels"].numpy()
        if subject is not None:
            return labels[subject]
        values = np.unique(labels)
        votes = [((labels == value) & self.mask.numpy()).sum(0) for value in values]
        return values[np.argmax(votes, axis=0)]

    def regions(self, subject=None):
        """{(ROI group, ROI): (n_vertices,) bool}: all vertices, each group's ROIs together and singly, and whole areas
        that are labelled in parts: V1 of V1v and V1d, FFA of FFA-1 and FFA-2."""
        present = self.present(subject)
        regions = {("all", "all"): present}
        for group, roi in self.rois.items():
            labels = self.roi_labels(group, subject)
            regions[group, "all"] = present & (labels > 0)
            names = {value: name for value, name in roi["names"].items() if value > 0}
            regions |= {(group, name): present & (labels == value) for value, name in names.items()}
            for name in names.values():
                part = re.fullmatch(r"(?P<whole>V\d)[vd]|(?P<area>.+)-\d", name)
                if part:
                    area = group, part["whole"] or part["area"]
                    regions[area] = regions.get(area, False) | regions[group, name]
        return regions
