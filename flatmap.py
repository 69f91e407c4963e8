"""Activity and scores on the flattened cortex of fsaverage, drawn with nilearn's meshes and matplotlib.

Offline at the resolution of fsaverage5, which nilearn brings along; at that of full fsaverage where
its files are there already.
"""

import os
from pathlib import Path

import numpy as np

import prepare_data
from common import Problem, write_whole

map_corner, map_shape = (-100, 95), (215, 200)
mm_per_pixel, margin = 0.5, 8  # mm of cortex shown around the data


def load_flat_meshes(folder):
    """{hemi: (mm (n, 2), triangles (m, 3), curvature (n,))} of the flat fsaverage surface.

    Full fsaverage (163,842 vertices) from folder or nilearn's data folders where it is there already,
    never downloaded; else fsaverage5, which nilearn brings along: the first 10,242 of these vertices.
    """
    from nilearn import datasets, surface

    def names(root):
        return {
            hemi: [Path(root) / f"{kind}_{half}.gii.gz" for kind in ("flat", "curv")]
            for hemi, half in zip(prepare_data.hemis, ("left", "right"))
        }

    roots = [folder] if folder else [Path(root) / "fsaverage" for root in datasets.get_data_dirs()]
    full = [files for files in map(names, roots) if all(p.is_file() for pair in files.values() for p in pair)]
    if folder and not full:
        expected = ", ".join(p.name for pair in names(folder).values() for p in pair)
        raise Problem(f"{folder} lacks files of full fsaverage, expected {expected}")
    fsaverage5 = Path(datasets.fetch_surf_fsaverage("fsaverage5")["flat_left"]).parent  # inside nilearn
    meshes = {}
    for hemi, (flat, curvature) in (full[0] if full else names(fsaverage5)).items():
        mesh = surface.load_surf_mesh(flat)
        meshes[hemi] = mesh.coordinates[:, :2], mesh.faces, surface.load_surf_data(curvature)
    return meshes


class FlatMap:
    """Visual cortex on flat fsaverage as pixels, both hemispheres with their posterior ends side by side.

    Cropped to the vertices of space. A pixel interpolates the three vertices around it: column
    (height, width, 3), of the common space or -1, and weight (height, width, 3). Where vertices are
    missing the cortex beneath shows: grey (height, width), sulci darker, NaN outside.
    """

    def __init__(self, space, folder=""):
        os.environ.setdefault("MPLBACKEND", "Agg")
        parts = {}
        for hemi, (place, triangles, curvature) in load_flat_meshes(folder).items():
            column = np.full(prepare_data.n_fsaverage, -1)
            own = np.flatnonzero((np.arange(space.n_vertices) < space.n_lh) == (hemi == "lh"))
            column[space.vertices.numpy()[own]] = own
            edges = np.linalg.norm(place[triangles] - place[np.roll(triangles, 1, axis=1)], axis=2)
            triangles = triangles[edges.max(1) < 4 * np.median(edges)]  # longer ones span a cut
            inside = place[np.intersect1d(triangles, np.flatnonzero(column >= 0))]
            if not len(inside):
                raise Problem(f"no vertex of {hemi} lies on flat fsaverage5: point FSAVERAGE_DIR to full fsaverage")
            parts[hemi] = place, triangles, curvature > 0, column, inside
        top, bottom = (f([f(p[4][:, 1]) for p in parts.values()]) for f in (max, min))
        columns, weights, greys = [], [], []
        for place, triangles, sulcus, column, inside in parts.values():
            left, right = inside[:, 0].min() - margin, inside[:, 0].max() + margin
            shape = np.ceil(np.array([top - bottom + 2 * margin, right - left]) / mm_per_pixel).astype(int)
            corners = (place - [left, top + margin])[triangles] * [1, -1] / mm_per_pixel  # (m, 3, 2) pixels
            triangle, weight = rasterise(corners, shape)
            vertex = triangles[triangle]  # (height, width, 3)
            columns.append(np.where(weight > 0, column[vertex], -1))
            weights.append(weight)
            dark = (sulcus[vertex] * weight).sum(2) > 0.5
            greys.append(np.where(triangle < 0, np.nan, np.where(dark, 0.60, 0.74)))
        self.middle = greys[0].shape[1]
        self.column, self.weight, self.grey = (np.concatenate(part, axis=1) for part in (columns, weights, greys))

    def image(self, values):
        """values (n_vertices,) -> (height, width), NaN where the nearest vertex is missing."""
        value = np.where(self.column < 0, np.nan, np.asarray(values, np.float32)[self.column])
        known = ~np.isnan(value)
        weight = self.weight * known
        nearest = np.take_along_axis(known, self.weight.argmax(2)[:, :, None], 2)[:, :, 0]
        with np.errstate(invalid="ignore"):
            return np.where(nearest, (np.nan_to_num(value) * weight).sum(2) / weight.sum(2), np.nan)

    def outlines(self, labels):
        """labels (n_vertices,), 0 for none -> {label: (border lines [(n, 2)], widest places [(x, y)])} in
        pixels, a place for each hemisphere where the area is wide enough for a name."""
        from contourpy import contour_generator
        from scipy.ndimage import distance_transform_edt

        found = {}
        for v in np.unique(labels[labels > 0]):
            area = np.nan_to_num(self.image(labels == v))
            places = []
            for start, half in ((0, area[:, : self.middle]), (self.middle, area[:, self.middle :])):
                depth = distance_transform_edt(half > 0.5)
                if depth.max() * mm_per_pixel > 3:
                    y, x = np.unravel_index(depth.argmax(), depth.shape)
                    places.append((start + x, y))
            found[v] = contour_generator(z=area).lines(0.5), places
        return found

    def draw(self, axes, values, limits, cmap, outlines, names=None, line_colour="black"):
        """values (n_vertices,), NaN where missing; outlines: of outlines(); names: {label: name} to write
        into the areas -> the image, for a colour bar."""
        from matplotlib.collections import LineCollection
        from matplotlib.patheffects import withStroke

        axes.imshow(np.dstack([self.grey] * 3 + [~np.isnan(self.grey)]), interpolation="nearest")
        shown = axes.imshow(self.image(values), cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
        lines = [line for lines, _ in outlines.values() for line in lines]
        axes.add_collection(LineCollection(lines, colors=line_colour, linewidths=0.6))
        for label, (_, places) in outlines.items():
            for x, y in places if names else ():
                text = axes.text(x, y, names[label], ha="center", va="center", fontsize=7)
                text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        height, width = self.grey.shape
        for x, side, align in ((0, "L", "left"), (width, "R", "right")):
            axes.text(x, height, side, ha=align, va="bottom", fontsize=9)
        axes.set_axis_off()
        return shown


def rasterise(corners, shape):
    """corners (n_triangles, 3, 2) as x, y in pixels -> the triangle that holds each pixel (height, width),
    -1 for none, and the weights (height, width, 3) of its corners there."""
    triangle, weight = np.full(shape, -1), np.zeros((*shape, 3))
    first, last = np.ceil(corners.min(1)).astype(int), np.floor(corners.max(1)).astype(int)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]

    def area(u, v):
        return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]

    whole = area(b - a, c - a)
    for step in np.ndindex(*(last - first).max(0) + 1):
        p = first + step
        here = np.flatnonzero((p <= last).all(1) & (p >= 0).all(1) & (p < shape[::-1]).all(1) & (whole != 0))
        q, u, v, w = p[here], a[here], b[here], c[here]
        part = np.stack([area(v - q, w - q), area(w - q, u - q), area(u - q, v - q)], 1) / whole[here, None]
        within = (part > -1e-9).all(1)
        x, y = q[within].T
        triangle[y, x], weight[y, x] = here[within], part[within]
    return triangle, weight


def outlined(space, roi_group, subject=None):
    """Labels (n_vertices,) of a ROI group for FlatMap.outlines(), zeros where there is nothing to outline."""
    if roi_group and roi_group not in prepare_data.roi_groups:
        raise Problem(f"OUTLINES is {roi_group!r}, expected one of {', '.join(prepare_data.roi_groups)}, or nothing")
    return space.roi_labels(roi_group, subject) if roi_group in space.rois else np.zeros(space.n_vertices, int)


def save_figure(figure, path):
    import matplotlib.pyplot as plt

    with write_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
