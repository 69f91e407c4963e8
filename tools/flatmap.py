"""Values on the flattened cortex, drawn with matplotlib on nilearn's flat fsaverage mesh."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke
from nilearn import datasets, surface

from core.space import HEMIS, N_FSAVERAGE
from tools.vertices import roi_labels

MAP_SHAPE = (215, 200)  # rows and columns of NSD-Flat's maps, 1 mm each
MARGIN = 8  # mm of cortex shown around the data
FEWEST_POINTS = 20  # of an ROI in one hemisphere; smaller ones are outlined without their name


class FlatMap:
    """The visual cortex as one triangle mesh, both hemispheres side by side: points (n, 2) mm, faces (m, 3), column
    (n,): each point's column of the common space or -1, grey (n,): brightness of the cortex without data, size (2,) mm.

    folder: holds {flat,curv}_{left,right}.gii.gz of full fsaverage; empty: fsaverage5, which comes with nilearn.
    inflated: the whole inflated cortex in three dimensions instead, which cannot be drawn by draw().
    """

    def __init__(self, space, folder="", inflated=False):
        self.space = space
        if space.unit == "vertices":
            left, right = (surface_side(space, hemi, folder, inflated) for hemi in HEMIS)
            right = right[0], right[1] + len(left[0]), *right[2:]  # faces count points
            mesh = [np.concatenate(pair) for pair in zip(left, right)]
        else:
            mesh = pixels(space)
        self.points, self.faces, self.column, self.grey = mesh
        self.left, self.size = self.points[:, 0] < 0, np.ptp(self.points, axis=0)

    def on_points(self, values):
        """values (n_vertices,) -> (n_points,), NaN where there are none."""
        return np.append(np.asarray(values, float), np.nan)[self.column]

    def outlines(self, roi_group, subject=None):
        """ROIs of a group as a subject (an index; None: the group) has them -> {(group, ROI): (n_points,) bool}."""
        if roi_group not in self.space.rois:
            return {}
        labels, names = self.on_points(roi_labels(self.space, roi_group, subject)), self.space.rois[roi_group]["names"]
        return {(roi_group, name): labels == value for value, name in names.items() if value > 0 and value in labels}

    def draw(self, axes, values, limits, cmap, outlines, *, named=False, line_colour="black"):
        """Draw values (n_vertices,), NaN where missing. limits: ends of the colour scale; named: write the names of
        outlines into the areas -> the mesh drawn, for describe_maps()."""
        mesh, values = (*self.points.T, self.faces), np.ma.masked_invalid(self.on_points(values))
        axes.tripcolor(*mesh, self.grey, cmap="gray", vmin=0, vmax=1, shading="gouraud")
        missing = np.ma.getmaskarray(values)[self.faces].any(1)
        shown = axes.tripcolor(*mesh, values, mask=missing, cmap=cmap, clim=limits, shading="gouraud")
        for (_, name), inside in outlines.items():
            axes.tricontour(*mesh, inside.astype(float), levels=[0.5], colors=line_colour, linewidths=0.6)
            for side in (self.left, ~self.left):
                area = self.points[side & inside]
                if named and len(area) >= FEWEST_POINTS:
                    centre = area[np.linalg.norm(area - area.mean(0), axis=1).argmin()]
                    text = axes.text(*centre, name, ha="center", va="center", fontsize=6)
                    text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        for x, side in ((0.03, "L"), (0.97, "R")):
            axes.text(x, 0.02, side, ha="center", transform=axes.transAxes, fontsize=9)
        axes.set_aspect("equal")
        axes.set_axis_off()
        return shown


def surface_side(space, hemi, folder, inflated):
    """-> points mm, faces, column and grey of one hemisphere; of the flat surface what is near the data."""
    folder = Path(folder or Path(datasets.fetch_surf_fsaverage("fsaverage5")["flat_left"]).parent)
    half, columns = "left" if hemi == "lh" else "right", space.columns(None, hemi)
    points, faces = surface.load_surf_mesh(folder / f"{'infl' if inflated else 'flat'}_{half}.gii.gz")
    grey = np.where(surface.load_surf_data(folder / f"curv_{half}.gii.gz") > 0, 0.60, 0.74)  # sulci are darker
    column = np.full(N_FSAVERAGE, -1)
    column[space.vertices.numpy()[columns]] = columns
    column = column[: len(points)]  # fsaverage5 has the first 10,242 vertices of fsaverage
    if inflated:
        return points + [60 if hemi == "rh" else -60, 0, 0], faces, column, grey  # both lie around the origin
    points = points[:, :2]
    edges = np.linalg.norm(points[faces] - points[np.roll(faces, 1, axis=1)], axis=2).max(1)
    faces = faces[edges < 4 * np.median(edges)]  # longer ones span a cut
    data = points[np.unique(faces[(column[faces] >= 0).any(1)])]
    low, high = data.min(0) - MARGIN, data.max(0) + MARGIN
    used, faces = np.unique(faces[((points > low) & (points < high)).all(1)[faces].all(1)], return_inverse=True)
    inner = high[0] if hemi == "lh" else low[0]  # the hemispheres meet at x = 0
    return points[used] - [inner, 0], faces.reshape(-1, 3), column[used], grey[used]


def pixels(space):
    """The same of NSD-Flat's maps, whose pixels count row by row from the top left; the hemispheres meet at x = 0."""
    row, across = np.indices(MAP_SHAPE).reshape(2, -1)
    points = np.stack([across + 0.5 - MAP_SHAPE[1] / 2, -row], axis=1)
    column = np.full(len(points), -1)
    column[space.vertices.numpy()] = np.arange(space.n_vertices)
    corner = np.arange(len(points)).reshape(MAP_SHAPE)[:-1, :-1].reshape(-1, 1)
    faces = np.concatenate([corner + [0, 1, MAP_SHAPE[1]], corner + [1, MAP_SHAPE[1] + 1, MAP_SHAPE[1]]])
    return points, faces, column, np.full(len(points), 0.9)


def fit_limits(maps, symmetric=True):
    """Ends of one colour scale for maps: the 99 % quantile of |values| that are not 0, to two digits ->
    (-end, end); not symmetric: (0, end) of what is above zero."""
    values = np.abs(maps) if symmetric else np.asarray(maps)
    end = float(f"{np.quantile(values[values > 0], 0.99):.2g}") if (values > 0).any() else 1.0
    return (-end if symmetric else 0.0, end)


def describe_maps(figure, shown, axes, label, outlines):
    """One colour bar for maps with the same limits, whose pointed ends stand for values beyond; what is outlined."""
    figure.colorbar(shown[0], ax=axes, fraction=0.03, pad=0.01, shrink=0.8, aspect=30, extend="both", label=label)
    groups = sorted({group for group, _ in outlines})
    figure.supxlabel(f"outlined: {', '.join(groups)}" if groups else "", fontsize=9)


def save_figure(figure, path):
    """PNG; the figure is closed."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
