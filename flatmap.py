"""Activity and scores on the flattened cortex of fsaverage, drawn with nilearn's meshes and matplotlib.

Offline at the resolution of fsaverage5, which nilearn brings along; at that of full fsaverage where its files
are there already. Data in pixels of NSD-Flat are drawn as the flat picture that they are. To draw maps:

    flat_map = FlatMap(space, FSAVERAGE_DIR)
    limits = fit_limits([values])                                  # or limits of one's own
    outlines = flat_map.outlines("streams", subject)               # "": none
    shown = [flat_map.draw(axes, values, limits, "RdBu_r", outlines, named=True)]
    describe_maps(figure, shown, [axes], "activity (z)", outlines)  # colour bar; what is outlined, what is saturated
    save_figure(figure, path)                                      # moves names of areas apart
"""

import os
import textwrap
from pathlib import Path

import numpy as np

import prepare_data
from common import Problem, write_whole

map_corner, map_shape = (-100, 95), (215, 200)  # mm; rows, columns: NSD-Flat's maps, 1 mm a pixel
mm_per_pixel, margin = 0.5, 8  # mm of cortex shown around the data
smallest_named = 3  # mm; areas that are nowhere this far from their border get no name
area_name = "area name"  # marks the texts that save_figure moves apart


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
    (height, width, 3), of the common space or -1, and weight (height, width, 3). inside (height, width):
    where the nearest of them has a column, and nearest (n,) that one. Where vertices are missing the
    cortex beneath shows: grey (height, width), sulci darker, NaN outside. middle: first pixel column of
    the right hemisphere.
    """

    def __init__(self, space, folder=""):
        os.environ.setdefault("MPLBACKEND", "Agg")
        self.space = space
        sides = flat_picture(space) if space.unit == "pixels" else flat_surface(space, folder)
        self.middle = sides[0][0].shape[1]
        self.column, self.weight, self.grey = (np.concatenate(part, axis=1) for part in zip(*sides))
        nearest = np.take_along_axis(self.column, self.weight.argmax(2)[:, :, None], 2)[:, :, 0]
        self.inside, self.nearest = nearest >= 0, nearest[nearest >= 0]

    def image(self, values):
        """values (n_vertices,) -> (height, width), NaN where the nearest vertex is missing."""
        values = np.append(np.asarray(values, np.float32), np.float32(np.nan))  # of column -1, too
        value = values[self.column[self.inside]]
        weight = np.where(np.isnan(value), 0, self.weight[self.inside])
        image = np.full(self.inside.shape, np.nan)
        with np.errstate(invalid="ignore"):
            mean = (np.nan_to_num(value) * weight).sum(1) / weight.sum(1)
        image[self.inside] = np.where(np.isnan(values[self.nearest]), np.nan, mean)
        return image

    def outlines(self, roi_group, subject=None):
        """Areas of a ROI group as subject (an index; None: the group) has them -> {(ROI group, area): (border
        lines [(n, 2)], widest places [(x, y)])} in pixels, a place for each hemisphere where the area is wide
        enough for a name. Nothing without a group, or where the data have none."""
        from contourpy import contour_generator

        if roi_group and roi_group not in prepare_data.roi_groups:
            known = ", ".join(prepare_data.roi_groups)
            raise Problem(f"OUTLINES is {roi_group!r}, expected one of {known}, or nothing")
        if roi_group not in self.space.rois:
            return {}
        labels, found = self.space.roi_labels(roi_group, subject), {}
        for label, name in self.space.rois[roi_group]["names"].items():
            if label <= 0 or not (labels == label).any():
                continue
            area = np.nan_to_num(self.image(labels == label))
            places = []
            for start, half in ((0, area[:, : self.middle]), (self.middle, area[:, self.middle :])):
                depth, x, y = widest_place(half > 0.5)
                if depth * mm_per_pixel > smallest_named:
                    places.append((start + x, y))
            found[roi_group, name] = contour_generator(z=area).lines(0.5), places
        return found

    def draw(self, axes, values, limits, cmap, outlines, *, named=False, line_colour="black"):
        """values (n_vertices,), NaN where missing; limits: ends of the colour scale; outlines: of outlines();
        named: write their names into the areas -> the image, for describe_maps()."""
        from matplotlib.collections import LineCollection
        from matplotlib.patheffects import withStroke

        axes.imshow(np.dstack([self.grey] * 3 + [~np.isnan(self.grey)]), interpolation="nearest")
        shown = axes.imshow(self.image(values), cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
        axes.set_autoscale_on(False)
        lines = [line for lines, _ in outlines.values() for line in lines]
        axes.add_collection(LineCollection(lines, colors=line_colour, linewidths=0.6))
        for (_, name), (_, places) in outlines.items():
            for x, y in places if named else ():
                text = axes.text(x, y, name, ha="center", va="center", fontsize=7, gid=area_name)
                text.set_path_effects([withStroke(linewidth=2, foreground="white")])
                text.set_in_layout(False)  # it moves when the layout is known
        height, width = self.grey.shape
        for x, side, align in ((0, "L", "left"), (width, "R", "right")):
            axes.text(x, height, side, ha=align, va="bottom", fontsize=9)
        axes.set_axis_off()
        return shown


def widest_place(area):
    """Where in area (height, width) bool the outside is farthest -> that distance (0: no area), x, y; in pixels."""
    from scipy.ndimage import distance_transform_edt

    y, x = np.nonzero(area)
    if not len(y):
        return 0, 0, 0
    top, left = max(y.min() - 1, 0), max(x.min() - 1, 0)  # a frame of the outside is as good as all of it
    depth = distance_transform_edt(area[top : y.max() + 2, left : x.max() + 2])
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return depth[y, x], left + x, top + y


def flat_surface(space, folder):
    """-> for each hemisphere column, weight and grey of a FlatMap, from the flat fsaverage surface."""
    parts = []
    for hemi, (place, triangles, curvature) in load_flat_meshes(folder).items():
        column = np.full(prepare_data.n_fsaverage, -1)
        own = np.flatnonzero((np.arange(space.n_vertices) < space.n_lh) == (hemi == "lh"))
        column[space.vertices.numpy()[own]] = own
        edges = np.linalg.norm(place[triangles] - place[np.roll(triangles, 1, axis=1)], axis=2)
        triangles = triangles[edges.max(1) < 4 * np.median(edges)]  # longer ones span a cut
        inside = place[np.intersect1d(triangles, np.flatnonzero(column >= 0))]
        if not len(inside):
            raise Problem(f"no vertex of {hemi} lies on flat fsaverage5: point FSAVERAGE_DIR to full fsaverage")
        parts.append((place, triangles, curvature > 0, column, inside))
    top, bottom = (f([f(inside[:, 1]) for *_, inside in parts]) for f in (max, min))
    sides = []
    for place, triangles, sulcus, column, inside in parts:
        left, right = inside[:, 0].min() - margin, inside[:, 0].max() + margin
        shape = np.ceil(np.array([top - bottom + 2 * margin, right - left]) / mm_per_pixel).astype(int)
        corners = (place - [left, top + margin])[triangles] * [1, -1] / mm_per_pixel  # (m, 3, 2) pixels
        triangle, weight = rasterise(corners, shape)
        vertex = triangles[triangle]  # (height, width, 3)
        dark = (sulcus[vertex] * weight).sum(2) > 0.5
        grey = np.where(triangle < 0, np.nan, np.where(dark, 0.60, 0.74))
        sides.append((np.where(weight > 0, column[vertex], -1), weight, grey))
    return sides


def flat_picture(space):
    """As flat_surface, of a space whose vertices are pixels of NSD-Flat's maps, 1 mm each, row by row from the top."""
    column = np.full(map_shape, -1)
    column.flat[space.vertices.numpy()] = np.arange(space.n_vertices)
    rows, columns = np.nonzero(column >= 0)
    column = column[max(rows.min() - margin, 0) : rows.max() + margin]
    n, middle, sides = round(1 / mm_per_pixel), map_shape[1] // 2, []
    for first, last in ((max(columns.min() - margin, 0), middle), (middle, columns.max() + margin)):
        fine = column[:, first:last].repeat(n, axis=0).repeat(n, axis=1)
        grey = np.where(fine < 0, np.nan, 0.74)
        nearest = np.dstack([fine] + 2 * [np.full_like(fine, -1)])
        sides.append((nearest, np.broadcast_to([1.0, 0, 0], nearest.shape), grey))
    return sides


def rasterise(corners, shape):
    """corners (n_triangles, 3, 2) as x, y in pixels -> the triangle that holds each pixel (height, width),
    -1 for none, and the weights (height, width, 3) of its corners there."""
    triangle, weight = np.full(shape, -1), np.zeros((*shape, 3))
    first, last = np.ceil(corners.min(1)).astype(int), np.floor(corners.max(1)).astype(int)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]

    def doubled_area(u, v):
        return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]

    doubled = doubled_area(b - a, c - a)
    shown = np.flatnonzero((first <= last).all(1) & (last >= 0).all(1) & (first < shape[::-1]).all(1) & (doubled != 0))
    for step in np.ndindex(*(last - first)[shown].max(0, initial=0) + 1):
        p = first[shown] + step
        inside = (p <= last[shown]).all(1) & (p >= 0).all(1) & (p < shape[::-1]).all(1)
        here = shown[inside]
        q, u, v, w = p[inside], a[here], b[here], c[here]
        part = np.stack([doubled_area(v - q, w - q), doubled_area(w - q, u - q), doubled_area(u - q, v - q)], 1)
        part /= doubled[here, None]
        within = (part > -1e-9).all(1)
        x, y = q[within].T
        triangle[y, x], weight[y, x] = here[within], part[within]
    return triangle, weight


# ---- colour scales, captions, names -------------------------------------------------------------


def fit_limits(maps, symmetric=True):
    """Ends of one colour scale for maps ([(n_vertices,)], NaN where missing): the 99 % quantile of their size,
    rounded up to 1, 1.5, 2, 3, 4, 5, 6 or 8 times a power of ten -> (-end, end); not symmetric: (0, end) of
    what is above zero."""
    values = np.concatenate([np.asarray(v, float).ravel() for v in maps])
    values = np.abs(values) if symmetric else np.maximum(values, 0)
    values = values[~np.isnan(values)]
    end = np.quantile(values, 0.99) if len(values) else 0
    if end <= 0:
        end = max(values, default=0) or 1
    power = 10.0 ** np.floor(np.log10(end))
    end = power * next(step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if end <= step * power * (1 + 1e-9))
    return (-end if symmetric else 0, float(end))


def beyond_scale(shown):
    """Of maps drawn with one colour scale: shares of the cortex shown whose values lie below and above it."""
    values = np.concatenate([image.get_array().compressed() for image in shown])
    low, high = shown[0].get_clim()
    return ((values < low).mean(), (values > high).mean()) if len(values) else (0.0, 0.0)


def describe_maps(figure, shown, axes, label, outlines):
    """One colour bar for all maps of a figure, and below them what is outlined and how much is saturated.

    shown: what draw() returned, all with the same limits; axes: those to stand beside; outlines: those drawn,
    of any of the maps.
    """
    below, above = beyond_scale(shown)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get((below > 0, above > 0), "both")
    bar = figure.colorbar(shown[0], ax=axes, fraction=0.03, pad=0.01, shrink=0.8, aspect=30, extend=extend)
    bar.set_label(label, size=12)
    groups = sorted({group for group, _ in outlines})
    notes = [f"outlined: {', '.join(groups)}"] if groups else []
    for share, side, end in zip((below, above), ("below", "above"), shown[0].get_clim()):
        if share:
            notes.append(f"saturated: {'under 0.1' if share < 0.001 else f'{100 * share:.1f}'} % {side} {end:g}")
    if notes:
        n_characters = int(figure.get_figwidth() * 13)  # of this size in an inch
        figure.supxlabel("\n".join(textwrap.wrap("; ".join(notes), n_characters)), fontsize=9)


def separate_names(figure):
    """Move names of areas so that none overlaps another, or leave them out; a line leads a moved one home."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # fixes the layout, so that sizes are known
    for axes in figure.axes:
        texts, taken = [text for text in axes.texts if text.get_gid() == area_name], []
        frame = axes.get_window_extent()
        for text in texts:
            box = text.get_window_extent().padded(1.5)
            for radius in np.arange(0, max(frame.width, frame.height), box.height / 3):
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False) if radius else [0.0]
                moves = [radius * np.array([np.cos(a), np.sin(a)]) for a in angles]
                free = [
                    move for move in moves
                    if not any(Bbox(box.get_points() + move).overlaps(other) for other in taken)
                    and frame.containsx(box.x0 + move[0]) and frame.containsx(box.x1 + move[0])
                    and frame.containsy(box.y0 + move[1]) and frame.containsy(box.y1 + move[1])
                ]  # fmt: skip
                if free:
                    break
            else:
                text.set_visible(False)
                continue
            taken.append(Bbox(box.get_points() + free[0]))
            if radius:
                home = text.get_position()
                moved = axes.transData.inverted().transform(axes.transData.transform(home) + free[0])
                text.set_position(moved)
                axes.plot(*zip(home, moved), color="black", linewidth=0.4, zorder=text.get_zorder() - 1)


def save_figure(figure, path):
    import matplotlib.pyplot as plt

    separate_names(figure)
    figure.set_layout_engine("none")  # the layout is done, and takes as long as the drawing
    with write_whole(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
