"""Stage 5: predict activity, for the challenge's test pictures or for pictures of your own.

The challenge (IMAGES empty): reads DATA_DIR and a checkpoint; writes SUBMISSION_DIR/subjXX/
{lh,rh}_pred_test.npy, float32 (n_test_images, n_vertices of that hemisphere), and submission.zip with
these folders at its root. Prints median R² on the private test split, writes it beside the checkpoint.

Own pictures: python predict.py --images FOLDER_OR_FILE --subject subj01; needs the checkpoint only.
Pictures are centre-cropped to a square and resized as in preparation. OUTPUT_DIR gets

    pictures.csv                    names the rows of the arrays
    subj01/activity_{lh,rh}.npy     (n_pictures, n_vertices of that hemisphere), the challenge's order
    subj01/fsaverage_{lh,rh}.npy    (n_vertices,) which vertices of fsaverage these are
    rois.csv                        mean over every ROI, a row per picture, subject and ROI
    subj01/NAME_{lh,rh}.func.gii    float32 (163842,) on fsaverage, NaN where nothing is predicted,
    subj01/NAME.png                 the picture and its predicted activity on a flat map: both for a handful
                                    of pictures; for more where GIFTI and MAPS are set as high

Contrast: python predict.py --images faces/ --contrast places/ predicts both folders and writes the difference
of their means, with t over pictures, to OUTPUT_DIR: subj01/{difference,t}_{lh,rh}.npy and .func.gii, maps
subj01/{difference,t}.png, and rois.csv.

Every folder gets predictions.json: the checkpoint, constants and versions that made it. A call that was killed
goes on with the same command. From Python: load_encoder() (README).
"""

import contextlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import prepare_data
import train_head
from checkpoint import check_scorable
from common import Problem, check_least, constants, fingerprint, progress, run_script, write_whole
from ensemble import choose_checkpoints, choose_subjects, load_encoder, load_for
from flatmap import FlatMap, fit_limits, save_figure
from model import decode_mean
from pictures import check_headers, find_pictures, nsd_id, read_batches
from results import ActivityWriter, RoiMeans, draw_map, gifti_bytes, open_results, roi_columns, write_json
from scores import Moments, r2_score, welch
from training import Validation

DATA_DIR = prepare_data.DATA_DIR  # prepared data; not needed for IMAGES
CHALLENGE_DIR = prepare_data.CHALLENGE_DIR  # of IMAGES: vertex masks for the authors' weights, without DATA_DIR
RUN_DIR = train_head.RUN_DIR  # holds finetuned.pt or head.pt
CHECKPOINT = ""  # a checkpoint, or several with commas, averaged; empty: RUN_DIR/finetuned.pt if there, else head.pt
SUBMISSION_DIR = "submission"  # predictions and zip are written there
IMAGES = ""  # a picture, or a folder of them with its subfolders; empty: the challenge's test pictures
CONTRAST = ""  # a second folder: write the difference of mean predictions, IMAGES less CONTRAST
SUBJECT = "all"  # of IMAGES: names such as subj01,subj05; group: subject-agnostic; all: everyone and group
OUTPUT_DIR = "predictions"  # of IMAGES
ARRAY_TYPE = "float32"  # of activity_{lh,rh}.npy; float16 halves the disk, rounds to 1 in 2,000
GIFTI = 20  # write GIFTI files of up to so many pictures, for more arrays only; 0: of none
MAPS = 20  # draw flat maps of up to so many pictures, half a second for each picture and subject; 0: of none
OUTLINES = "streams"  # ROI group outlined on flat maps; empty: none
FSAVERAGE_DIR = ""  # flat_left.gii.gz … of full fsaverage; empty: nilearn's data folder, else fsaverage5
MAP_RANGE = 0.0  # z, colour scale of predicted activity ends at ± this; 0: what fits a picture's maps
BATCH_SIZE = 64  # pictures at a time
PRECISION = "auto"  # auto, bfloat16, float16 or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE = False  # replace other predictions in SUBMISSION_DIR or OUTPUT_DIR


# ---- the challenge ------------------------------------------------------------------------------


def predict_challenge(paths):
    data = prepare_data.load(DATA_DIR)
    remedy = f"point DATA_DIR ({DATA_DIR}) to the data it was trained on, or train anew"
    ensemble, data = load_for(data, paths, DEVICE, PRECISION, remedy)
    ensemble.describe()
    inputs = {"kind": "submission", "data": data.fingerprint}
    with opened(SUBMISSION_DIR, "SUBMISSION_DIR", inputs, ensemble, data.space.subjects) as results:
        if results:
            write_submission(results, data, ensemble)
    (Path(SUBMISSION_DIR) / "scores.json").unlink(missing_ok=True)  # of several checkpoints before
    scores = score_private_test(ensemble, data)
    if scores:
        print(f"private test median R², {scores['test_pictures']}")
        for key, score in scores.items():
            if key.startswith("test_r2"):
                print(f"{key.removeprefix('test_r2').strip('_') or 'all':12} {score:.4f}")
        path, made = ensemble.checkpoints[0]
        if len(paths) == 1:
            path, scores = path.with_name(f"{path.stem}_scores.json"), made["scores"] | scores
        else:
            path = Path(SUBMISSION_DIR) / "scores.json"
        write_json(path, scores)
        print(f"wrote {path}")


def opened(folder, constant, inputs, ensemble, subjects, **options):
    """open_results for predictions of an ensemble for subjects (names)."""
    inputs |= {"checkpoints": ensemble.fingerprints(), "precision": str(ensemble.precision)[6:]}
    inputs |= {"subjects": list(subjects)}
    about = {"checkpoints": ensemble.record(), "constants": constants(globals())}
    return open_results(folder, inputs, about, constant=constant, overwrite=OVERWRITE, **options)


def write_submission(results, data, ensemble):
    results.note()
    files, rows = [], [("subject", "row", "nsd_id")]
    for s, subject in enumerate(progress(data.space.subjects, desc="predicting", unit="subject")):
        shown = data.test_image[data.test_subject == s]
        if not len(shown):
            print(f"{subject}: no test pictures in the challenge folder, no prediction")
            continue
        rows += [(subject, row, i) for row, i in enumerate(data.nsd_id[shown])]
        [prediction] = ensemble.predict(data.images[shown], [s], batch_size=BATCH_SIZE)
        for hemi in prepare_data.hemis:
            files.append(results.path(f"{subject}/{hemi}_pred_test.npy"))
            results.save(f"{subject}/{hemi}_pred_test.npy", prediction[:, data.space.hemisphere(s, hemi)].numpy())
    results.write_table("pictures.csv", rows)
    if files:
        with write_whole(results.path("submission.zip")) as file, zipfile.ZipFile(file, "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(results.aside))
    results.finish()
    if files:
        print(f"wrote {results.folder / 'submission.zip'} with {len(files)} files")


def score_private_test(ensemble, data):
    """{"test_loss": …, "test_r2": …, "test_r2_subj01": …}; nothing where that would not be honest."""
    try:
        for path, made in ensemble.checkpoints:
            check_scorable(path, made, data, "test")
    except Problem as problem:
        print(f"no private test scores: {problem}")
        return {}
    if not len(data.samples("test")):
        print("no private test scores: the data hold no such pictures, or none that the checkpoint was not trained on")
        return {}
    validation = Validation(data, data.images, "test", BATCH_SIZE)
    scored = [None] * len(validation.rows)
    for s, rows in enumerate(validation.rows):
        if len(rows):
            [prediction] = ensemble.predict(data.images[data.image[rows]], [s], batch_size=BATCH_SIZE)
            activity = torch.from_numpy(data.read_activity(rows)).float()
            loss, has = (activity - prediction).square().mean().item(), data.space.mask[s].numpy() & data.is_known
            scored[s] = loss, r2_score(activity, prediction)[torch.from_numpy(has)]
    return validation.summary(scored, "test")


# ---- own pictures -------------------------------------------------------------------------------


def predict_pictures(ensemble):
    subjects = choose_subjects(SUBJECT, ensemble.space)
    pictures = find_pictures(IMAGES, OUTPUT_DIR)
    names, n = list(pictures), len(pictures)
    with ThreadPoolExecutor() as pool:
        stamps = list(check_headers(pictures, pool).values())
        draws = {"GIFTI": n <= GIFTI and ensemble.space.unit == "vertices", "MAPS": n <= MAPS}
        if ensemble.space.unit != "vertices":
            print("pixels of NSD-Flat have no place on fsaverage: no GIFTI files, no ROIs")
        inputs = {"kind": "activity", "pictures": fingerprint(names), "stamps": fingerprint(stamps)}
        inputs |= {"ARRAY_TYPE": ARRAY_TYPE, **draws}
        if draws["MAPS"]:
            inputs |= {"OUTLINES": OUTLINES, "FSAVERAGE_DIR": FSAVERAGE_DIR, "MAP_RANGE": MAP_RANGE}

        def continues(partial, now):
            """Whether the pictures predicted so far are the same; a damaged one among the others may be mended."""
            n_done = partial.get("n_done", 0)
            changed = {name for name in now if partial["inputs"].get(name) != now[name]}
            return changed <= {"stamps"} and partial.get("done") == fingerprint(stamps[:n_done])

        with opened(OUTPUT_DIR, "OUTPUT_DIR", inputs, ensemble, subjects, continues=continues) as results:
            if results:
                write_pictures(results, ensemble, subjects, pictures, stamps, draws, pool)


def write_pictures(results, ensemble, subjects, pictures, stamps, draws, pool):
    """Predict pictures {name: path} for subjects {name: index} batch by batch, written meanwhile by a thread."""
    space, names, device = ensemble.space, list(pictures), ensemble.encoders[0].head.embed_bias.device
    rois = {subject: RoiMeans(space, s, device) for subject, s in subjects.items()}
    flat_map = FlatMap(space, FSAVERAGE_DIR) if draws["MAPS"] else None
    output = ActivityWriter(
        results, space, subjects, names, stamps, rois, dtype=np.dtype(ARRAY_TYPE), gifti=draws["GIFTI"],
        flat_map=flat_map, roi_group=OUTLINES, map_range=MAP_RANGE,
    )  # fmt: skip
    with contextlib.closing(output), ThreadPoolExecutor(1) as writer, \
            progress(total=len(names), initial=output.n_done, desc="predicting", unit="picture") as bar:  # fmt: skip
        waiting = None
        for start, images in read_batches(list(pictures.values()), BATCH_SIZE, pool, output.n_done):
            latents = ensemble.latents(images)
            found = {name: activity_of(ensemble, latents, s, rois[name]) for name, s in subjects.items()}
            if waiting:
                waiting.result()
            waiting = writer.submit(output.write, start, images, found)
            bar.update(len(images))
        if waiting:
            waiting.result()
    rows = [(row, name, path, nsd_id(name)) for row, (name, path) in enumerate(pictures.items())]
    results.write_table("pictures.csv", [("row", "picture", "file", "nsd_id"), *rows])
    results.finish()
    print(f"wrote {results.folder}: {len(names)} pictures for {', '.join(subjects)}")
    less = [f"--{name.lower()} {len(names)}" for name, drawn in draws.items() if not drawn]
    if less and space.unit == "vertices":
        print(f"arrays and table only; with {' '.join(less)} every picture has files of its own as well")


@torch.inference_mode()
def activity_of(ensemble, latents, subject, roi_means):
    """Activity (n, n_vertices) as ARRAY_TYPE and ROI means (n, n_filled) of one subject, on the CPU."""
    activity = decode_mean(ensemble.encoders, latents, subject)
    means = roi_means(activity)
    return activity.to(getattr(torch, ARRAY_TYPE)).cpu().numpy(), means.cpu().numpy()


# ---- contrasts ----------------------------------------------------------------------------------


def predict_contrast(ensemble):
    space = ensemble.space
    if Path(IMAGES).resolve() == Path(CONTRAST).resolve():
        raise Problem(f"IMAGES and CONTRAST are both {IMAGES}, expected two different ones")
    subjects = choose_subjects(SUBJECT, space)
    sides = {folder: find_pictures(folder, OUTPUT_DIR) for folder in (IMAGES, CONTRAST)}
    with ThreadPoolExecutor() as pool:
        stamps = [list(check_headers(pictures, pool).values()) for pictures in sides.values()]
        names = [list(pictures) for pictures in sides.values()]
        inputs = {"kind": "contrast", "pictures": fingerprint(*names), "stamps": fingerprint(*stamps)}
        inputs |= {"OUTLINES": OUTLINES, "FSAVERAGE_DIR": FSAVERAGE_DIR, "MAPS": MAPS > 0, "GIFTI": GIFTI > 0}
        with opened(OUTPUT_DIR, "OUTPUT_DIR", inputs, ensemble, subjects) as results:
            if results:
                write_contrast(results, ensemble, subjects, sides, pool)


def measure_sides(ensemble, subjects, rois, sides, pool):
    """-> {subject: [Moments of activity and ROI means together, (n_vertices + n_filled,), of either side]}."""
    moments = {subject: [Moments() for _ in sides] for subject in subjects}
    n = sum(len(pictures) for pictures in sides.values())
    with progress(total=n, desc="predicting", unit="picture") as bar, torch.inference_mode():
        for k, pictures in enumerate(sides.values()):
            for _, images in read_batches(list(pictures.values()), BATCH_SIZE, pool):
                latents = ensemble.latents(images)
                for subject, s in subjects.items():
                    activity = decode_mean(ensemble.encoders, latents, s)
                    moments[subject][k].add(torch.cat([activity, rois[subject](activity)], 1))
                bar.update(len(images))
    return moments


def write_contrast(results, ensemble, subjects, sides, pool):
    space, device = ensemble.space, ensemble.encoders[0].head.embed_bias.device
    rois = {subject: RoiMeans(space, s, device) for subject, s in subjects.items()}
    moments = measure_sides(ensemble, subjects, rois, sides, pool)
    results.note()
    rows = [("subject", *roi_columns("difference_", "t_"))]
    flat_map = FlatMap(space, FSAVERAGE_DIR) if MAPS else None
    for subject, s in subjects.items():
        found = {name: v.cpu().numpy() for name, v in zip(("difference", "t"), welch(*moments[subject]))}
        rows += rois[subject].rows((subject,), *(v[space.n_vertices :] for v in found.values()))
        maps = {name: np.where(space.present(s), v[: space.n_vertices], np.nan) for name, v in found.items()}
        for name, values in maps.items():
            for hemi in prepare_data.hemis:
                results.save(f"{subject}/{name}_{hemi}.npy", values[space.hemisphere(s, hemi)].astype(np.float32))
                if GIFTI and space.unit == "vertices":
                    results.path(f"{subject}/{name}_{hemi}.func.gii").write_bytes(gifti_bytes(values, space, s, hemi))
        if MAPS:
            labels = {"difference": "difference of predicted activity (z)", "t": "t over pictures"}
            title = f"{subject}: {' less '.join(f'{Path(folder).name} ({len(p)})' for folder, p in sides.items())}"
            outlines = flat_map.outlines(OUTLINES, s)
            for name, values in maps.items():
                if np.isnan(values).all():  # t of single pictures
                    continue
                figure = draw_map(title, None, values, fit_limits([values]), labels[name], flat_map, outlines)
                save_figure(figure, results.path(f"{subject}/{name}.png"))
    results.write_table("rois.csv", rows)
    shown = [(folder, name, path) for folder, pictures in sides.items() for name, path in pictures.items()]
    rows = [(folder, name, path, nsd_id(name)) for folder, name, path in shown]
    results.write_table("pictures.csv", [("side", "picture", "file", "nsd_id"), *rows])
    results.finish()
    counts = " less ".join(f"{folder} ({len(pictures)} pictures)" for folder, pictures in sides.items())
    single = "; t needs two pictures or more on either side" if min(map(len, sides.values())) < 2 else ""
    print(f"wrote {results.folder}: {counts} for {', '.join(subjects)}{single}")


def main():
    check_least(globals(), BATCH_SIZE=1, GIFTI=0, MAPS=0, MAP_RANGE=0)
    if ARRAY_TYPE not in ("float32", "float16"):
        raise Problem(f"ARRAY_TYPE is {ARRAY_TYPE!r}, expected float32 or float16")
    if not IMAGES and (SUBJECT != "all" or CONTRAST):
        name, value = ("CONTRAST", CONTRAST) if CONTRAST else ("SUBJECT", SUBJECT)
        raise Problem(f"{name} is {value}, but without IMAGES every subject's challenge pictures are predicted")
    paths = choose_checkpoints(CHECKPOINT, RUN_DIR)
    if not IMAGES:
        predict_challenge(paths)
        return
    ensemble = load_encoder(paths, DEVICE, PRECISION, lambda: prepare_data.find_space(DATA_DIR, CHALLENGE_DIR))
    ensemble.describe()
    (predict_contrast if CONTRAST else predict_pictures)(ensemble)


if __name__ == "__main__":
    run_script(main, globals())
