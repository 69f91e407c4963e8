"""A simulated challenge folder with a planted answer, every stage on it, then a new person: python demo.py

Needs no data, no network and no GPU. Eight simulated people look at pictures made from two
photographs; each of their cortical vertices weighs simple features of the picture (brightness,
colour, contrast, edges) within its receptive field, with noise added up to a known ceiling:

    activity = sqrt(ceiling) * signal + sqrt(1 - ceiling) * noise        all with variance 1

so that no model can expect more than R2 = ceiling. Vertices, areas and receptive fields lie on
fsaverage5's visual cortex about where they lie in people; nothing here is measured activity.
"""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from scipy import sparse
from scipy.spatial import cKDTree

from common import Problem, run_script

DEMO_DIR = "demo"  # everything is written below this folder; the next run replaces it
SEED = 0  # of the simulated data
N_TRAIN = 360  # training pictures of subj01; the others in the proportions of the challenge
N_TEST = 30  # test pictures of subj01, likewise
PICTURE_SIZE = 256  # px (challenge: 425); what prepare_data.py keeps
TRUNK = "eva02_tiny_patch14_224.mim_in22k"  # 5.5 M parameters; untrained, as weights need a network
LAYERS = "blocks.{0,1}"  # nothing above the last one is computed, so early ones are cheap
IMAGE_SIZE = 140  # px, input of the trunk (report: 224): less than half the time, the same scores here
LATENT_DIM = 256  # units of the feature projection
PCA_DIM = 64  # components of the group PCA
BATCH_SIZE = 64  # samples
STEPS = 80  # of phase 1
FINETUNE_STEPS = 40  # of phase 2, with half the batch: gradients of the trunk need memory

n_fsaverage = 163842  # vertices of an fsaverage hemisphere; its first 10,242 are fsaverage5
n_training = {1: 9841, 2: 9841, 3: 9082, 4: 8779, 5: 9841, 6: 9082, 7: 9841, 8: 8779, 9: 3280}  # challenge; 9 is new
n_held_out = {1: 159, 2: 159, 3: 293, 4: 395, 5: 159, 6: 293, 7: 159, 8: 395, 9: 159}  # its test pictures
n_missing = {6: {"lh": 2, "rh": 20}, 8: {"lh": 2, "rh": 1}, 9: {"lh": 4, "rh": 4}}  # vertices that a subject lacks
shared = 0.2  # part of subj01's pictures that everyone sees (challenge: 0.1); subj09 sees a quarter of them
grid = 16  # receptive fields weigh grid x grid places of the picture
n_channels = 8  # luminance, red-green, blue-yellow, contrast, edges of four orientations
jitter = 3.0  # mm, by how much landmarks differ between subjects
area_radius = 9.0  # mm, of a body, face, place or word area

# Landmarks on the white surface: mm away from the midline, forward and up.
calcarine = ((17, -100, -1), (15, -92, 3), (14, -85, 6), (17, -78, 8), (21, -71, 6), (22, -65, 9))
centres = ((30, -88, 3), (32, -72, -12), (26, -84, 18))
around = ((44, -68, 4), (36, -56, -18), (24, -74, 34), (13, -80, 20))
reach = {36: centres, 24: calcarine + around}  # visual cortex is what lies within so many mm
bands = {"V1": 9, "V2": 16, "V3": 23, "hV4": 32}  # mm from the calcarine sulcus where it ends
areas = {  # {group: {name: landmark}}, the organisers' names; their labels are 1, 2, ... in order
    "streams": {
        "early": None, "midventral": (28, -78, -13), "midlateral": (36, -86, 4), "midparietal": (22, -86, 24),
        "ventral": (36, -54, -18), "lateral": (47, -68, 4), "parietal": (26, -72, 38),
    },
    "prf-visualrois": dict.fromkeys(("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4")),
    "floc-bodies": {  # mTL and aTL, here and below, lie beyond the rim: hardly anybody has them
        "EBA": (47, -72, 2), "FBA-1": (42, -55, -19), "FBA-2": (41, -44, -20), "mTL-bodies": (50, -25, -22),
    },
    "floc-faces": {
        "OFA": (40, -79, -11), "FFA-1": (40, -59, -18), "FFA-2": (40, -46, -20),
        "mTL-faces": (48, -22, -24), "aTL-faces": (36, -8, -38),
    },
    "floc-places": {"OPA": (32, -81, 24), "PPA": (27, -50, -9), "RSC": (16, -58, 10)},
    "floc-words": {
        "OWFA": (36, -84, -9), "VWFA-1": (44, -62, -12), "VWFA-2": (45, -53, -16), "mfs-words": (42, -42, -20),
    },
}  # fmt: skip


def main():
    demo = start_folder(Path(DEMO_DIR))
    challenge, data, run = (str(demo / name) for name in ("challenge", "data", "run"))
    print(f"simulating {challenge}: eight people looking at about {N_TRAIN + N_TEST} pictures each", flush=True)
    simulate(challenge, n_train=N_TRAIN, n_test=N_TEST, picture_size=PICTURE_SIZE, seed=SEED)

    train(stage, challenge, data, run)
    phase1 = dict(checkpoint=f"{run}/head.pt", submission_dir=f"{demo}/submission_head")
    stage("predict.py", data_dir=data, run_dir=run, **phase1)
    stage("predict.py", data_dir=data, run_dir=run, submission_dir=f"{demo}/submission")
    stage("evaluate.py", data_dir=data, run_dir=run, challenge_dir=challenge)

    print_scores(Path(challenge), Path(run))
    own_picture(demo, run)
    new_person(demo, run)
    print(f"\nCheckpoints, logs and loss curves are in {run}, the submission is {demo}/submission/submission.zip.")
    page = f"{run}/evaluation_finetuned_val/report.html"
    print(f"Open {page} in a browser: scores, the report's figures, the cortex to turn.")
    print(f"Next: python predict.py --run_dir {run} --images A_PICTURE_OF_YOURS, or the real data (README.md).")


def own_picture(demo, run):
    """A photograph that nobody has seen as a whole."""
    from sklearn.datasets import load_sample_images

    Image.fromarray(load_sample_images().images[0]).save(demo / "photo.jpg")
    predictions = demo / "predictions"
    stage("predict.py", run_dir=run, images=demo / "photo.jpg", subject="subj01,group", output_dir=predictions)
    print(f"The picture and its predicted activity are drawn in {predictions}/subj01/photo.png.")


def train(stage, challenge, data, run, subjects=""):
    """Prepare the data of subjects (all: empty) and train on them. stage: what runs a script with constants."""
    # little data and an untrained trunk: less regularisation and larger steps than in the report
    training = dict(weight_decay=0.1, feature_dropout=0.2)
    head = dict(trunk=TRUNK, pretrained="false", image_size=IMAGE_SIZE, layers=LAYERS, latent_dim=LATENT_DIM)
    rates = dict(
        batch_size=BATCH_SIZE, steps=STEPS, warmup_steps=STEPS // 10, learning_rate=5e-3, min_learning_rate=1e-4
    )
    chosen = dict(subjects=subjects) if subjects else {}
    stage("prepare_data.py", challenge_dir=challenge, data_dir=data, **chosen)
    stage("fit_pca.py", data_dir=data, pca_dim=PCA_DIM)
    stage("train_head.py", data_dir=data, run_dir=run, **head, **rates, **training)
    rates = dict(
        batch_size=BATCH_SIZE // 2, steps=FINETUNE_STEPS, warmup_steps=FINETUNE_STEPS // 10, learning_rate=2e-3
    )
    stage("finetune.py", data_dir=data, run_dir=run, **rates, **training)


def new_person(demo, run):
    """A ninth person, whom nothing was trained on, with some 100 pictures."""
    folder, output = demo / "new_person", demo / "subj09"
    print(f"\nsimulating {folder}: a ninth person, whom the checkpoint does not know", flush=True)
    simulate(folder, subjects=[9], n_train=N_TRAIN, n_test=N_TEST, picture_size=PICTURE_SIZE, seed=SEED)
    stage("adapt.py", challenge_dir=folder, subject="subj09", run_dir=run, output_dir=output)
    print(f"{output}/curve.png draws score against number of pictures; {output}/adapted.pt knows nine people.")


def start_folder(folder):
    """An empty folder that says whose it is, so that only a folder of this demo is ever replaced."""
    note = folder / "made_by_demo.txt"
    if note.exists():
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()):
        raise Problem(f"{folder} holds files that are not from this demo: choose another folder with --demo_dir")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text("Simulated data and what was trained on them. The next python demo.py replaces this folder.\n")
    return folder


def stage(script, **constants):
    """Show the command line as a user types it and run it; a failure ends the demo with its exit code."""
    arguments = [part for name, value in constants.items() for part in (f"--{name}", str(value))]
    print(f"\n$ {shlex.join(['python', script, *arguments])}", flush=True)
    code = subprocess.run([sys.executable, Path(__file__).with_name(script), *arguments], check=False).returncode
    if code:
        print(f"demo: {script} failed", flush=True)
        sys.exit(code)


def print_scores(challenge, run):
    """Median R2 per subject and phase beside the median noise ceiling, which bounds it."""
    phase1, phase2 = (json.loads((run / f"{name}_scores.json").read_text()) for name in ("head", "finetuned"))
    ceilings = {
        folder.name: np.concatenate([np.load(path) for path in folder.glob("test_split/noise_ceiling/*.npy")])
        for folder in sorted(challenge.iterdir())
    }
    ceilings["all"] = np.concatenate(list(ceilings.values()))
    print("\nmedian R2 over vertices          phase 1 (head)         phase 2 (fine-tuned)")
    print("subject   noise ceiling    validation  private test    validation  private test")
    for subject, ceiling in ceilings.items():
        key = "" if subject == "all" else f"_{subject}"
        scores = [phase[f"{split}_r2{key}"] for phase in (phase1, phase2) for split in ("val", "test")]
        print("{:10}{:13.3f}{:14.3f}{:14.3f}{:14.3f}{:14.3f}".format(subject, np.median(ceiling), *scores))
    share = phase2["val_r2"] / np.median(ceilings["all"])
    print(f"Validation ({phase2['val_pictures']}) reaches {share:.0%} of the ceiling.")
    print(f"Private test has few pictures ({phase2['test_pictures']}), which lowers its R2.")


# ---- cortex -------------------------------------------------------------------------------------


@dataclass
class Cortex:
    """The visual patch of one hemisphere.

    vertices (n_vertices,) are places in fsaverage. white and sphere (n_vertices, 3) are mm, x away
    from the midline, on the white surface and on the sphere of radius 100 mm; distances are taken
    on the sphere, which has no folds. blur (n_vertices, n_vertices) averages over neighbours.
    """

    side: str
    vertices: np.ndarray
    white: np.ndarray
    sphere: np.ndarray
    blur: sparse.csr_matrix

    def find(self, landmarks):
        """(n_landmarks, 3) places on the sphere."""
        return self.sphere[cKDTree(self.white).query(landmarks)[1]]

    def distance(self, places):
        """(n_vertices,) mm to the nearest of the places (n_places, 3) on the sphere."""
        return cKDTree(places).query(self.sphere)[0]

    def calcarine(self):
        """mm from the calcarine sulcus, from the pole, and above the sulcus: (n_vertices,) each."""
        marks = self.find(calcarine)
        path = np.concatenate([np.linspace(a, b, 9) for a, b in pairwise(marks)])
        depth, nearest = cKDTree(path).query(self.sphere)
        return depth, self.distance(marks[:1]), self.sphere[:, 2] - path[nearest, 2]

    def smooth(self, rng, n_fields, n_steps):
        """(n_fields, n_vertices) smooth noise of variance 1; 20 steps: smooth over about 1 cm."""
        noise = rng.standard_normal((len(self.vertices), n_fields), dtype=np.float32)
        for _ in range(n_steps):
            noise = self.blur @ noise
        return noise.T / noise.std()


def load_cortex(side):
    """The visual patch of fsaverage5, side "lh" or "rh"."""
    from nilearn.datasets import load_fsaverage  # here: slow to import

    surface = load_fsaverage("fsaverage5")
    half, outward = ("left", [-1, 1, 1]) if side == "lh" else ("right", [1, 1, 1])
    white = surface["white_matter"].parts[half].coordinates * outward
    sphere = surface["sphere"].parts[half].coordinates * outward
    faces = surface["sphere"].parts[half].faces

    whole = Cortex(side, np.arange(len(white)), white, sphere, None)
    inside = np.any([whole.distance(whole.find(marks)) < mm for mm, marks in reach.items()], axis=0)
    ends = faces.ravel(), np.roll(faces, 1, axis=1).ravel()  # every edge both ways: no border
    link = sparse.coo_matrix((np.ones(faces.size, np.float32), ends), shape=(len(white),) * 2)
    link = (link.tocsr() + sparse.identity(len(white), np.float32))[inside][:, inside]
    blur = sparse.diags(1 / link.sum(axis=1).A1) @ link
    return Cortex(side, np.flatnonzero(inside), white[inside], sphere[inside], blur)


def label_areas(cortex, rng):
    """{group: (n_vertices,) labels} of one subject, whose borders rng shifts."""

    def nearest(landmarks, radius):
        """Number of the nearest landmark within radius mm, 0 where there is none."""
        distances = [np.full(len(cortex.vertices), radius)]
        for landmark in landmarks:
            moved = np.add(landmark or np.nan, jitter * rng.standard_normal(3))
            in_patch = landmark and np.linalg.norm(cortex.white - moved, axis=1).min() < area_radius
            far = np.full(len(cortex.vertices), np.inf)
            distances.append(cortex.distance(cortex.find([moved])) if in_patch else far)
        return np.argmin(distances, axis=0)

    depth, from_pole, height = cortex.calcarine()
    depth = depth * (1 + 0.06 * rng.standard_normal()) + cortex.smooth(rng, 1, 20)[0]
    dorsal = height > 0
    band = np.searchsorted(list(bands.values()), depth)  # 0 V1, 1 V2, 2 V3, 3 hV4, 4 beyond
    early = band < 3
    hv4 = (band == 3) & ~dorsal & (from_pole < 50)
    labels = {group: nearest(marks.values(), area_radius) for group, marks in areas.items()}
    labels["streams"] = np.where(early, 1, nearest(areas["streams"].values(), 30.0))
    labels["prf-visualrois"] = np.where(early, 2 * band + 1 + dorsal, 7 * hv4)
    return labels


def receptive_fields(cortex, common, own):
    """What one subject's vertices see: pooling (n_vertices, grid * grid), tuning (n_vertices, n_channels).

    Polar angle swings from the horizontal meridian in the calcarine sulcus to the vertical one at
    the end of V1 and back in V2; eccentricity grows away from the pole, field size with both.
    common is a generator in the state that all subjects start from, own the subject's.
    """
    depth, from_pole, height = cortex.calcarine()
    borders = [0, *bands.values(), 60]
    meridian = np.radians(np.interp(depth, borders, [0, 80, 10, 75, 40, 0]))
    angle = -meridian * np.tanh(height / 4)  # below the sulcus one sees the upper half
    eccentricity = np.interp(from_pole, [0, 60], [0.1, 0.9]) * np.interp(depth, [23, 60], [1, 0.5])
    size = np.interp(depth, borders, [0.10, 0.11, 0.13, 0.15, 0.18, 0.25]) * (0.7 + 0.6 * eccentricity)
    shift = 0.03 * (cortex.smooth(common, 2, 20) + cortex.smooth(own, 2, 20))
    half = 0.5 if cortex.side == "lh" else -0.5  # the left hemisphere sees the right half
    x = 0.5 + half * eccentricity * np.cos(angle) + shift[0]  # in picture widths
    y = 0.5 - 0.5 * eccentricity * np.sin(angle) + shift[1]

    places = (np.arange(grid) + 0.5) / grid
    across = np.exp(-(((places - x[:, None]) / size[:, None]) ** 2) / 2)  # (n_vertices, grid)
    down = np.exp(-(((places - y[:, None]) / size[:, None]) ** 2) / 2)
    pooling = (down[:, :, None] * across[:, None, :]).reshape(len(x), grid * grid)
    tuning = cortex.smooth(common, n_channels, 30) + 0.4 * cortex.smooth(own, n_channels, 30)
    return (pooling / pooling.sum(1, keepdims=True)).astype(np.float32), tuning.T


def noise_ceilings(cortex, common, own):
    """(n_vertices,) part of the variance due to the picture: best in V1, less at the rim, there some 0."""
    depth = cortex.calcarine()[0]
    n_near = np.diff(cortex.blur.indptr)  # neighbours and itself: 7 inside, rarely 6
    rim = cortex.distance(cortex.sphere[n_near < 6])
    ceiling = np.interp(depth, [0, 20, 60], [0.75, 0.65, 0.45]) * np.interp(rim, [0, 12], [0.4, 1])
    ceiling *= np.exp(0.1 * cortex.smooth(common, 1, 10)[0] + 0.1 * cortex.smooth(own, 1, 4)[0])
    ceiling = np.clip(ceiling * own.uniform(0.7, 1), 0, 0.9)
    return np.where(ceiling < np.quantile(ceiling, 0.01), 0, ceiling)


def respond(cortex, features, pooling, tuning, ceiling, rng):
    """(n_images, n_vertices) activity for features (n_images, n_channels, grid * grid)."""
    features = (features - features.mean(0)) / features.std((0, 2), keepdims=True)
    signal = sum(features[:, c] @ pooling.T * tuning[:, c] for c in range(n_channels))
    white = rng.standard_normal(signal.shape, dtype=np.float32)
    noise = zscore(cortex.smooth(rng, len(signal), 3)) + white  # in part smooth, as in real data
    return np.sqrt(ceiling) * zscore(signal) + np.sqrt(1 - ceiling) * zscore(noise)


def zscore(x):
    """x (n_images, n_vertices) with mean 0 and variance 1 in every vertex."""
    return (x - x.mean(0)) / x.std(0)


# ---- pictures -----------------------------------------------------------------------------------


def draw_picture(photos, rng, size):
    """A size x size RGB picture: two views of photographs blended, some patches, coloured light.

    Drawn at half size, which halves the time; the model sees little more.
    """
    half = size // 2 + 1

    def view(size):
        """A crop of a photograph, zoomed, mirrored or not, in changed colours."""
        photo = photos[rng.integers(len(photos))]
        side = rng.uniform(60, min(photo.size))
        left, top = rng.uniform(0, np.subtract(photo.size, side))
        box = (left, top, left + side, top + side)
        crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=box)
        mix = rng.uniform(0.4, 1.3) * np.eye(3) + rng.uniform(-0.35, 0.35, (3, 3))
        crop = crop.convert("RGB", np.column_stack([mix, rng.uniform(-40, 70, 3)]).ravel().tolist())
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop

    def smooth(low, *channels):
        """Smooth random values from low to 255."""
        values = rng.uniform(low, 256, (3, 3, *channels)).astype(np.uint8)
        return Image.fromarray(values).resize((half, half), Image.Resampling.BICUBIC)

    picture = Image.composite(view(half), view(half), smooth(0))
    picture = ImageChops.multiply(picture, smooth(90, 3))
    for _ in range(rng.integers(0, 4)):
        width = int(rng.uniform(0.15, 0.5) * half)
        stencil = Image.new("L", (width, width))
        draw = ImageDraw.Draw(stencil)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((0, 0, width, width), fill=255)
        picture.paste(view(width), tuple(rng.integers(0, half - width, 2).tolist()), stencil)
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def picture_features(picture):
    """(n_channels, grid * grid) luminance, two opponent colours, contrast and four edge energies."""
    rgb = np.asarray(picture.resize((4 * grid, 4 * grid), Image.Resampling.BOX), np.float32) / 255
    red, green, blue = np.moveaxis(rgb, 2, 0)
    light = rgb.mean(2)
    down, across = np.gradient(light)
    edges = [np.abs(edge) for edge in (down, across, down + across, down - across)]
    maps = np.stack([light, red - green, blue - (red + green) / 2, light, *edges])
    maps = maps.reshape(n_channels, grid, 4, grid, 4)
    pooled = maps.mean((2, 4))
    pooled[3] = maps[3].std((1, 3))
    return pooled.reshape(n_channels, grid * grid)


def choose_pictures(seed, n_train, n_test, shared=shared):
    """{subject: (training ids, test ids)}, each sorted; the same whichever subjects are simulated.

    Everyone sees the shared pictures, subj09 a quarter of them, in the same split; apart from those nobody's ids meet.
    """
    ids = iter((1 + np.random.default_rng(seed).permutation(73000)).tolist())  # NSD has 73,000

    def draw(n):
        return [next(ids) for _ in range(n)]

    everyone = draw(round(shared * n_train)), draw(round(shared * n_test))
    chosen = {}
    for subject, n in n_training.items():
        common = [ids[:: 4 if subject == 9 else 1] for ids in everyone]
        n_own_train = round(n_train * n / n_training[1]) - len(common[0])
        n_own_test = round(n_test * n_held_out[subject] / n_held_out[1]) - len(common[1])
        chosen[subject] = sorted(common[0] + draw(n_own_train)), sorted(common[1] + draw(n_own_test))
    return chosen


def picture_paths(folder, chosen):
    """{nsd id: its files, one for everybody who sees it}; makes their folders."""
    paths = {}
    for subject, splits in chosen.items():
        for split, ids in zip(("training", "test"), splits):
            images = folder / f"subj{subject:02d}/{split}_split/{split}_images"
            images.mkdir(parents=True)
            for row, nsd_id in enumerate(ids, start=1):
                name = f"{split.removesuffix('ing')}-{row:04d}_nsd-{nsd_id:05d}.png"
                paths.setdefault(nsd_id, []).append(images / name)
    return paths


def write_pictures(folder, chosen, size, seed):
    """Draw every picture once, write it for all who see it; {nsd id: its features}."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    paths = picture_paths(folder, chosen)

    def write(nsd_id):
        picture = draw_picture(photos, np.random.default_rng([seed, nsd_id]), size)
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1, compress_type=3)  # run lengths: fast
        for path in paths[nsd_id]:
            path.write_bytes(file.getbuffer())
        return picture_features(picture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow does its work outside Python's lock
        return dict(zip(paths, pool.map(write, paths)))


# ---- the folder ---------------------------------------------------------------------------------


def simulate(folder, *, subjects=range(1, 9), n_train=360, n_test=30, picture_size=425, vertex_step=1, seed=0):
    """Write a simulated challenge folder; a subject's data do not depend on who else is simulated.

    n_train, n_test: pictures of subj01, the others' in the proportions of the challenge
    picture_size: pixels, 425 in the challenge; vertex_step: keep every n-th vertex
    """
    folder = Path(folder)
    if any(folder.glob("subj*")):
        raise Problem(f"{folder} already holds subjects: remove it or choose another folder")
    chosen = choose_pictures(seed, n_train, n_test)
    chosen = {subject: chosen[subject] for subject in subjects}
    features = write_pictures(folder, chosen, picture_size, seed)
    for side in ("lh", "rh"):
        cortex = load_cortex(side)
        for subject, splits in chosen.items():
            simulate_hemisphere(folder, cortex, subject, splits, features, vertex_step, seed)


def simulate_hemisphere(folder, cortex, subject, splits, features, vertex_step, seed):
    """Masks, activity and ceilings of one subject's hemisphere."""
    key = [seed, 0, 1 if cortex.side == "lh" else 2]
    common, own = np.random.default_rng(key), np.random.default_rng([*key, subject])
    seen = np.stack([features[nsd_id] for nsd_id in splits[0] + splits[1]])
    labels = label_areas(cortex, own)
    fields = receptive_fields(cortex, common, own)
    ceiling = noise_ceilings(cortex, common, own)
    activity = respond(cortex, seen, *fields, ceiling, own).astype(np.float32)

    kept = np.arange(0, len(cortex.vertices), vertex_step)
    forward = kept[np.argsort(-cortex.white[kept, 1])]  # missing are the most anterior ones
    kept = np.setdiff1d(kept, forward[: n_missing.get(subject, {}).get(cortex.side, 0)])
    write_hemisphere(
        folder / f"subj{subject:02d}",
        cortex.side,
        cortex.vertices[kept],
        {group: label[kept] for group, label in labels.items()},
        np.split(activity[:, kept], [len(splits[0])]),
        ceiling[kept],
    )


def write_hemisphere(folder, side, vertices, labels, activity, ceiling):
    """One hemisphere in the organisers' layout; activity is (training, test), (n_images, n_vertices) each."""

    def save(name, array):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)

    def on_fsaverage(values):
        whole = np.zeros(n_fsaverage, np.int64)
        whole[vertices] = values
        return whole

    save(f"roi_masks/{side}.all-vertices_fsaverage_space.npy", on_fsaverage(1))
    for group, label in labels.items():
        names = dict(enumerate(["Unknown", *areas[group]]))
        save(f"roi_masks/{side}.{group}_fsaverage_space.npy", on_fsaverage(label))
        save(f"roi_masks/{side}.{group}_challenge_space.npy", label.astype(np.int64))
        save(f"roi_masks/mapping_{group}.npy", np.array(names, dtype=object))
    save(f"training_split/training_fmri/{side}_training_fmri.npy", activity[0])
    save(f"test_split/test_fmri/{side}_test_fmri.npy", activity[1])
    save(f"test_split/noise_ceiling/{side}_noise_ceiling.npy", ceiling.astype(np.float32))


if __name__ == "__main__":
    run_script(main, globals())
