"""A simulated challenge folder with planted receptive fields, areas and noise ceilings, for the demo and tests.

Simulated people look at pictures made of two photographs. Each vertex weighs simple features of the picture
(brightness, colour, contrast, edges) within its receptive field, and noise is added:

    activity = sqrt(ceiling) * signal + sqrt(1 - ceiling) * noise        all with variance 1

so that no model can expect more than R² = ceiling. Vertices, areas and receptive fields lie on fsaverage5's visual
cortex roughly where they lie in people; nothing here is measured activity.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from nilearn.datasets import load_fsaverage
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.stats import zscore
from sklearn.datasets import load_sample_images

from core.space import HEMIS, N_FSAVERAGE, ROI_GROUPS

N_TRAINING = (9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779, 3280)  # pictures, challenge; subj09 is a new person
N_TEST = (159, 159, 293, 395, 159, 293, 159, 395, 159)
N_MISSING = {(6, "lh"): 2, (6, "rh"): 20, (8, "lh"): 2, (8, "rh"): 1, (9, "lh"): 4, (9, "rh"): 4}  # vertices
SHARED = 0.2  # part of subj01's pictures that everyone sees (challenge: 0.1); subj09 sees a quarter of them
GRID = 16  # receptive fields weigh GRID x GRID places of the picture
N_CHANNELS = 8  # luminance, red-green, blue-yellow, contrast, edges of four orientations
JITTER = 3.0  # mm, by how much landmarks differ between subjects
AREA_RADIUS = 9.0  # mm, of a body, face, place or word area

# mm away from the midline, forward and up on the white surface; 999: nowhere, BORDERS defines these areas
LANDMARKS = pd.read_csv(Path(__file__).with_name("landmarks.csv"), index_col="group")
BORDERS = (0, 9, 16, 23, 32, 60)  # mm from the calcarine sulcus: V1, V2, V3, hV4 and the rest lie between


class Cortex:
    """The visual patch of one hemisphere of fsaverage5.

    vertices (n,): fsaverage indices. white, sphere (n, 3): mm, x away from the midline; distances are taken on the
    sphere, which has no folds. blur (n, n) averages over neighbours. depth, from_pole, height (n,): mm from the
    calcarine sulcus, from the occipital pole, and above the sulcus.
    """

    def __init__(self, hemi):
        self.hemi, surface = hemi, load_fsaverage("fsaverage5")
        half, outward = ("left", [-1, 1, 1]) if hemi == "lh" else ("right", [1, 1, 1])
        self.white = surface["white_matter"].parts[half].coordinates * outward
        self.sphere = surface["sphere"].parts[half].coordinates * outward
        faces = surface["sphere"].parts[half].faces
        inside = self.distance(self.find("patch")) < 36
        inside |= self.distance(self.find(["calcarine", "around"])) < 24
        edges = faces.ravel(), np.roll(faces, 1, axis=1).ravel()  # every edge in both directions
        links = sparse.csr_matrix((np.ones(faces.size, np.float32), edges)) + sparse.identity(len(inside), np.float32)
        links = links[inside][:, inside]
        self.blur = sparse.diags(1 / links.sum(axis=1).A1) @ links
        self.vertices, self.white, self.sphere = np.flatnonzero(inside), self.white[inside], self.sphere[inside]
        sulcus = self.find("calcarine")
        path = np.concatenate([np.linspace(a, b, 9) for a, b in pairwise(sulcus)])
        self.depth, nearest = cKDTree(path).query(self.sphere)
        self.from_pole, self.height = self.distance(sulcus[:1]), self.sphere[:, 2] - path[nearest, 2]

    def find(self, group):
        """Places of a group of landmarks on the sphere (n_landmarks, 3)."""
        return self.sphere[cKDTree(self.white).query(LANDMARKS.loc[group, ["x", "y", "z"]])[1]]

    def distance(self, places):
        """(n,) mm to the nearest of the places (n_places, 3) on the sphere."""
        return cKDTree(places).query(self.sphere)[0]

    def smooth(self, rng, n_fields, n_steps):
        """(n_fields, n) smooth noise of variance 1; 20 steps: smooth over about 1 cm."""
        noise = rng.standard_normal((len(self.vertices), n_fields), dtype=np.float32)
        for _ in range(n_steps):
            noise = self.blur @ noise
        return noise.T / noise.std()


def label_areas(cortex, rng):
    """{ROI group: names (n,)} of one subject; rng shifts areas and borders."""

    def nearest(group, radius):
        """Number of the nearest area within radius mm, 0 where there is none."""
        landmarks = LANDMARKS.loc[group, ["x", "y", "z"]].to_numpy()
        gap, vertex = cKDTree(cortex.white).query(landmarks + JITTER * rng.standard_normal(landmarks.shape))
        distances = cdist(cortex.sphere, cortex.sphere[vertex])  # (n, n_areas)
        distances[:, gap > AREA_RADIUS] = np.inf  # outside the patch
        return np.where(distances.min(1) < radius, distances.argmin(1) + 1, 0)

    depth = cortex.depth * (1 + 0.06 * rng.standard_normal()) + cortex.smooth(rng, 1, 20)[0]
    dorsal = cortex.height > 0
    band = np.searchsorted(BORDERS[1:5], depth)  # 0 V1, 1 V2, 2 V3, 3 hV4, 4 beyond
    labels = {group: nearest(group, AREA_RADIUS) for group in ROI_GROUPS}
    labels["streams"] = np.where(band < 3, 1, nearest("streams", 30.0))
    hv4 = (band == 3) & ~dorsal & (cortex.from_pole < 50)
    labels["prf-visualrois"] = np.where(band < 3, 2 * band + 1 + dorsal, 7 * hv4)
    names = {group: ["Unknown", *LANDMARKS.area[group]] for group in ROI_GROUPS}
    return {group: pd.Categorical.from_codes(codes, names[group]) for group, codes in labels.items()}


def plant(cortex, subject, vertex_step, seed):
    """What is planted in one hemisphere of a subject -> (table with a row per vertex of the patch: planted_fields()'s
    columns and tuning; rows of the vertices in the challenge folder; random generator for the responses).

    Polar angle swings from the horizontal meridian in the calcarine sulcus to the vertical one at the end of V1 and
    back in V2; eccentricity grows away from the pole, field size with both.
    """
    key, side = ([seed, 0, 1], 0.5) if cortex.hemi == "lh" else ([seed, 0, 2], -0.5)
    common, rng = np.random.default_rng(key), np.random.default_rng([*key, subject])  # common to all subjects
    labels, depth = label_areas(cortex, rng), cortex.depth
    meridian = np.radians(np.interp(depth, BORDERS, [0, 80, 10, 75, 40, 0]))
    angle = -meridian * np.tanh(cortex.height / 4)  # below the sulcus one sees the upper half
    eccentricity = np.interp(cortex.from_pole, [0, 60], [0.1, 0.9]) * np.interp(depth, [23, 60], [1, 0.5])
    size = np.interp(depth, BORDERS, [0.10, 0.11, 0.13, 0.15, 0.18, 0.25]) * (0.7 + 0.6 * eccentricity)
    shift = 0.03 * (cortex.smooth(common, 2, 20) + cortex.smooth(rng, 2, 20))
    x = 0.5 + side * eccentricity * np.cos(angle) + shift[0]  # the left hemisphere sees the right half
    y = 0.5 - 0.5 * eccentricity * np.sin(angle) + shift[1]
    tuning = cortex.smooth(common, N_CHANNELS, 30) + 0.4 * cortex.smooth(rng, N_CHANNELS, 30)

    # the part of the variance due to the picture: highest in V1, 0 in a few vertices
    ceiling = np.interp(depth, [0, 20, 60], [0.7, 0.6, 0.35]) * rng.uniform(0.7, 1)
    ceiling = np.clip(ceiling * np.exp(0.2 * cortex.smooth(rng, 1, 10)[0]), 0, 0.9)
    ceiling[ceiling < np.quantile(ceiling, 0.01)] = 0

    kept = np.arange(0, len(depth), vertex_step)
    forward = kept[np.argsort(-cortex.white[kept, 1])]  # the most anterior vertices are missing
    kept = np.setdiff1d(kept, forward[: N_MISSING.get((subject, cortex.hemi), 0)])
    columns = {"hemi": cortex.hemi, "vertex": cortex.vertices, "x": x, "y": y, "size": size, "ceiling": ceiling}
    return pd.DataFrame(columns | labels | dict(enumerate(tuning))), kept, rng


def planted_fields(subject, vertex_step=1, seed=0):
    """What simulate() plants in a subject (1 to 9): DataFrame with a row per vertex in the challenge's order, lh first.
    Columns: hemi; vertex: fsaverage index; x, y, size: centre (right and down from the upper left corner) and standard
    deviation of the receptive field in picture widths; ceiling; for each ROI group the name of the vertex's ROI."""
    sides = [plant(Cortex(hemi), subject, vertex_step, seed) for hemi in HEMIS]
    return pd.concat([planted.iloc[kept] for planted, kept, _ in sides], ignore_index=True)


def respond(cortex, planted, features, rng):
    """(n_images, n) activity for features (n_images, N_CHANNELS, GRID * GRID)."""
    places = (np.arange(GRID) + 0.5) / GRID
    x, y, size, ceiling = planted[["x", "y", "size", "ceiling"]].to_numpy().T
    across, down = (np.exp(-(((places - c[:, None]) / size[:, None]) ** 2) / 2) for c in (x, y))  # (n, GRID)
    pooling = (down[:, :, None] * across[:, None, :]).reshape(len(x), GRID * GRID)
    pooling = (pooling / pooling.sum(1, keepdims=True)).astype(np.float32)
    features = (features - features.mean(0)) / features.std((0, 2), keepdims=True)
    signal = sum(features[:, c] @ pooling.T * planted[c].to_numpy() for c in range(N_CHANNELS))
    white = rng.standard_normal(signal.shape, dtype=np.float32)
    noise = zscore(cortex.smooth(rng, len(signal), 3)) + white  # partly smooth, as in real data
    return np.sqrt(ceiling) * zscore(signal) + np.sqrt(1 - ceiling) * zscore(noise)


def draw_picture(photos, rng, size):
    """A size x size RGB picture: two views of photographs blended, and some patches of others; drawn at half size."""
    half = size // 2 + 1

    def view(size):
        """A crop of a photograph in changed colours."""
        photo = photos[rng.integers(len(photos))]
        side = rng.uniform(60, min(photo.size))
        left, top = rng.uniform(0, np.subtract(photo.size, side))
        crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        mix = rng.uniform(0.4, 1.3) * np.eye(3) + rng.uniform(-0.35, 0.35, (3, 3))
        return crop.convert("RGB", np.column_stack([mix, rng.uniform(-40, 70, 3)]).ravel().tolist())

    mask = Image.fromarray(rng.integers(0, 256, (3, 3), np.uint8))
    picture = Image.composite(view(half), view(half), mask.resize((half, half), Image.Resampling.BICUBIC))
    for _ in range(rng.integers(1, 6)):
        width = int(rng.uniform(0.15, 0.5) * half)
        picture.paste(view(width), tuple(rng.integers(0, half - width, 2).tolist()))
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def picture_features(picture):
    """(N_CHANNELS, GRID * GRID) luminance, two opponent colours, contrast and four edge energies."""
    rgb = np.asarray(picture.resize((4 * GRID, 4 * GRID), Image.Resampling.BOX), np.float32) / 255
    red, green, blue = np.moveaxis(rgb, 2, 0)
    light = rgb.mean(2)
    down, across = np.gradient(light)
    edges = [np.abs(edge) for edge in (down, across, down + across, down - across)]
    maps = np.stack([light, red - green, blue - (red + green) / 2, light, *edges])
    maps = maps.reshape(N_CHANNELS, GRID, 4, GRID, 4)
    pooled = maps.mean((2, 4))
    pooled[3] = maps[3].std((1, 3))
    return pooled.reshape(N_CHANNELS, GRID * GRID)


def choose_pictures(seed, n_train, n_test):
    """{subject: [training ids, test ids]}, each sorted. Everyone sees the shared pictures in the same split; apart from
    those no two people see the same picture."""
    ids = iter((1 + np.random.default_rng(seed).permutation(73000)).tolist())  # NSD has 73,000
    shared = [list(islice(ids, round(SHARED * n))) for n in (n_train, n_test)]
    chosen = {subject: [] for subject in range(1, 10)}
    for subject, splits in chosen.items():
        for n, counts, common in zip((n_train, n_test), (N_TRAINING, N_TEST), shared):
            common = common[:: 4 if subject == 9 else 1]
            n_others = round(n * counts[subject - 1] / counts[0]) - len(common)
            splits.append(sorted([*common, *islice(ids, n_others)]))
    return chosen


def write_pictures(folder, splits, size, seed):
    """Write a subject's training and test pictures -> (n_images, N_CHANNELS, GRID * GRID) features."""
    photos, files = [Image.fromarray(photo) for photo in load_sample_images().images], []
    for split, prefix, ids in zip(("training", "test"), ("train", "test"), splits):
        images = folder / f"{split}_split/{split}_images"
        images.mkdir(parents=True)
        files += [(i, images / f"{prefix}-{row:04d}_nsd-{i:05d}.png") for row, i in enumerate(ids, 1)]

    def write(file):
        nsd_id, path = file
        picture = draw_picture(photos, np.random.default_rng([seed, nsd_id]), size)
        picture.save(path, compress_level=1, compress_type=3)  # run lengths: fast
        return picture_features(picture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside the GIL
        return np.stack(list(pool.map(write, files)))


def simulate(folder, *, subjects=range(1, 9), n_train=360, n_test=30, picture_size=425, vertex_step=1, seed=0):
    """Write a simulated challenge folder; a subject's data do not depend on who else is simulated. n_train, n_test:
    pictures of subj01, the others' in the challenge's proportions; picture_size: px; vertex_step: every n-th vertex."""
    cortices, chosen = [Cortex(hemi) for hemi in HEMIS], choose_pictures(seed, n_train, n_test)
    for subject in subjects:
        subject_folder = Path(folder) / f"subj{subject:02d}"
        features = write_pictures(subject_folder, chosen[subject], picture_size, seed)
        for cortex in cortices:
            planted, kept, rng = plant(cortex, subject, vertex_step, seed)
            activity = respond(cortex, planted, features, rng).astype(np.float32)[:, kept]
            write_hemisphere(subject_folder, planted.iloc[kept], np.split(activity, [len(chosen[subject][0])]))


def write_hemisphere(folder, planted, activity):
    """One hemisphere in the organisers' layout. activity: (training, test), (n_images, n_vertices) each."""
    hemi = planted.hemi.iloc[0]
    arrays = {
        f"training_split/training_fmri/{hemi}_training_fmri": activity[0],
        f"test_split/test_fmri/{hemi}_test_fmri": activity[1],
        f"test_split/noise_ceiling/{hemi}_noise_ceiling": planted.ceiling.to_numpy(np.float32),
    }
    labels = {group: planted[group].cat.codes.to_numpy(np.int64) for group in ROI_GROUPS}
    for group, values in labels.items():
        arrays[f"roi_masks/{hemi}.{group}_challenge_space"] = values
        arrays[f"roi_masks/mapping_{group}"] = np.array(dict(enumerate(planted[group].cat.categories)), dtype=object)
    for name, values in (labels | {"all-vertices": 1}).items():
        fsaverage = arrays[f"roi_masks/{hemi}.{name}_fsaverage_space"] = np.zeros(N_FSAVERAGE, np.int64)
        fsaverage[planted.vertex] = values
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
