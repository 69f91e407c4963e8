"""Stage 5: predict activity, for the challenge's test pictures or for pictures of your own.

The challenge (IMAGES empty): reads DATA_DIR and a checkpoint; writes SUBMISSION_DIR/subjXX/
{lh,rh}_pred_test.npy, float32 (n_test_images, n_vertices of that hemisphere), and submission.zip with
these folders at its root. Prints median R² on the private test split, writes it beside the checkpoint.

Own pictures: python predict.py --images FOLDER_OR_FILE --subject subj01; needs the checkpoint only.
Pictures are centre-cropped to a square and resized as in preparation. OUTPUT_DIR gets rois.csv, the
mean over every ROI (one row per picture, subject and ROI), and per subject and picture

    subj01/NAME_{lh,rh}.npy       float32 (n_vertices of that hemisphere,), the challenge's order
    subj01/NAME_{lh,rh}.func.gii  float32 (163842,) on fsaverage, NaN where nothing is predicted
    subj01/NAME.png               the picture and its predicted activity on a flat map
"""

import csv
import io
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import prepare_data
import train_head
from checkpoint import check_made, check_scorable, load_checkpoint, read_checkpoint
from common import Problem, check_least, choose_device, choose_precision, progress, run_script, write_whole
from flatmap import FlatMap, describe_maps, save_figure
from training import Validation

DATA_DIR = prepare_data.DATA_DIR  # prepared data; not needed for IMAGES
CHALLENGE_DIR = prepare_data.CHALLENGE_DIR  # of IMAGES: vertex masks for the authors' weights, without DATA_DIR
RUN_DIR = train_head.RUN_DIR  # holds finetuned.pt or head.pt
CHECKPOINT = ""  # a checkpoint's path; empty: RUN_DIR/finetuned.pt where it exists, else head.pt
SUBMISSION_DIR = "submission"  # predictions and zip are written there
IMAGES = ""  # a picture, or a folder of them with its subfolders; empty: the challenge's test pictures
SUBJECT = "all"  # of IMAGES: names such as subj01,subj05; group: subject-agnostic; all: everyone and group
OUTPUT_DIR = "predictions"  # of IMAGES
MAPS = True  # of IMAGES: draw flat maps; half a second for each picture and subject
OUTLINES = "streams"  # ROI group outlined on flat maps; empty: none
FSAVERAGE_DIR = ""  # flat_left.gii.gz … of full fsaverage; empty: nilearn's data folder, else fsaverage5
MAP_RANGE = 1.0  # z, colour scale of predicted activity ends at ± this, two of its deviations at R² 0.2
BATCH_SIZE = 64  # pictures at a time
PRECISION = "auto"  # auto, bfloat16, float16 or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N

picture_formats = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
largest_picture = 100e6  # pixels; protects memory


def choose_checkpoint(path, run_dir):
    """The path given, else the run's finetuned.pt, else its head.pt."""
    finetuned, head = (Path(run_dir) / name for name in ("finetuned.pt", "head.pt"))
    candidates = [Path(path)] if path else [finetuned, head]
    chosen = next((candidate for candidate in candidates if candidate.exists()), None)
    if chosen is None:
        raise Problem(
            f"no checkpoint: {' and '.join(map(str, candidates))} not found. Run python train_head.py --run_dir "
            f"{run_dir}, or name one with --checkpoint"
        )
    if not path and chosen == finetuned and head.exists():
        made = read_checkpoint(finetuned)
        if not made["made_with"]["CHECKPOINT"]:  # else it started from another one, whatever lies here
            remedy = f"run python finetune.py --run_dir {run_dir} --overwrite true, or name one with --checkpoint"
            check_made(finetuned, made, remedy, head_fingerprint=read_checkpoint(head)["fingerprint"])
    return chosen


def describe_checkpoint(path, made):
    """Say what predicts."""
    print(f"predicting with {path} (step {made['step']}, validation median R² {made['scores'].get('val_r2', np.nan):.4f})")
    if not made["finished"]:
        print(f"{path} is the best so far of a training that has not ended; the same training command continues it")


# ---- the challenge ------------------------------------------------------------------------------


def write_submission(folder, data, predict):
    """predict: (images, subject index) -> (n_images, n_vertices) in the common space."""
    files = []
    for s, subject in enumerate(progress(data.space.subjects, desc="predicting", unit="subject")):
        images = data.images[data.test_image[data.test_subject == s]]
        if not len(images):
            print(f"{subject}: no test pictures in the challenge folder, no prediction")
            continue
        prediction = predict(images, s)
        for hemi in prepare_data.hemis:
            files.append(folder / subject / f"{hemi}_pred_test.npy")
            with write_whole(files[-1]) as file:
                np.save(file, prediction[:, data.space.hemisphere(s, hemi)].numpy())
    if files:
        with write_whole(folder / "submission.zip") as file, zipfile.ZipFile(file, "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))
        print(f"wrote {folder / 'submission.zip'} with {len(files)} files")


def predict_challenge(path, device, precision):
    data = prepare_data.load(DATA_DIR)
    encoder, _, made = load_checkpoint(path, device, space=data.space)
    remedy = f"point DATA_DIR ({DATA_DIR}) to the data it was trained on, or train anew"
    check_made(path, made, remedy, data_fingerprint=data.fingerprint)
    describe_checkpoint(path, made)

    def predict(images, s):
        return encoder.predict(images, [s], batch_size=BATCH_SIZE, precision=precision)[0]

    write_submission(Path(SUBMISSION_DIR), data, predict)
    try:
        check_scorable(path, made, data, "test")
    except Problem as problem:
        print(f"no private test scores: {problem}")
        return
    [found] = Validation(data, data.images, "test", BATCH_SIZE)([encoder], precision, "test")
    scores = made["scores"] | found
    print(f"{'private test':12} median R²")
    for key, score in scores.items():
        if key.startswith("test_r2"):
            print(f"{key.removeprefix('test_r2').strip('_') or 'all':12} {score:.4f}")
    scores_path = path.with_name(f"{path.stem}_scores.json")
    with write_whole(scores_path) as file:
        file.write(json.dumps(scores, indent=1).encode())
    print(f"wrote {scores_path}")


# ---- own pictures -------------------------------------------------------------------------------


def find_pictures(images, output_dir):
    """{name: path} in sorted order. Names are paths below the folder without their ending, with it
    where two would be equal. Files of other kinds are left out and counted."""
    root = Path(images)
    if root.is_file():
        return {root.stem: root}
    if not root.is_dir():
        raise Problem(f"{root} not found, expected a picture or a folder of pictures in IMAGES")
    endings = {e for e, kind in Image.registered_extensions().items() if kind in picture_formats}
    files = [p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if Path(output_dir).resolve() not in (root / p).resolve().parents]
    pictures = [p for p in files if p.suffix.lower() in endings]
    others = [str(p) for p in files if p.suffix.lower() not in endings]
    if others:
        some = ", ".join(others[:3]) + " …" * (len(others) > 3)
        print(f"left out {len(others)} files whose names are no picture's: {some}")
    if not pictures:
        raise Problem(f"{root} holds no picture, expected {', '.join(sorted(endings))}")
    unique = max(Counter(p.with_suffix("") for p in pictures).values()) == 1
    return {(p.with_suffix("") if unique else p).as_posix(): root / p for p in pictures}


def open_picture(path):
    """-> RGB picture, upright as the camera held it. Transparent parts become white, 16-bit grey 8-bit."""
    with Image.open(path, formats=[kind for kind in picture_formats if kind in Image.OPEN]) as picture:
        if np.prod(picture.size) > largest_picture:
            raise ValueError(f"{picture.width} x {picture.height} pixels, expected up to {largest_picture:.0f}")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise ValueError(f"32-bit grey values (mode {picture.mode}), expected 8 or 16 bit")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def read_picture(path):
    """-> (256, 256, 3) uint8: the largest centred square, resized as prepare_data.py does."""
    picture = open_picture(path)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return prepare_data.resize_picture(picture.crop((left, top, left + side, top + side)))


def check_pictures(pictures, pool):
    """Decode every picture once, so that damaged ones are told before anything is written."""

    def look(path):
        try:
            return open_picture(path).size
        except Exception as error:  # decoders raise whatever they like
            return f"{path}: {' '.join(str(error).split())}"

    Image.init()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # largest_picture decides
    bar = progress(pool.map(look, pictures.values()), "checking", len(pictures), unit="picture")
    found = dict(zip(pictures, bar))
    findings = prepare_data.Findings(fault for fault in found.values() if isinstance(fault, str))
    findings.refuse("pictures that cannot be read; mend or remove them, nothing was written")
    oblong = [f"{name} ({w} x {h})" for name, (w, h) in found.items() if w != h]
    if oblong:
        some = ", ".join(oblong[:3]) + " …" * (len(oblong) > 3)
        print(f"centre-cropped to a square: {len(oblong)} of {len(found)} pictures: {some}")


def choose_subjects(names, space):
    """{name: index in space, None for the group}."""
    known = dict(zip(space.subjects, range(len(space.subjects)))) | {"group": None}
    chosen = list(known) if names == "all" else [n for n in re.split(r"[,\s]+", names) if n]
    if not chosen or set(chosen) - set(known):
        raise Problem(f"SUBJECT is {names!r}, expected of this checkpoint's {', '.join(known)}, or all")
    return {name: known[name] for name in chosen}


def write_activity(stem, activity, space, subject):
    """activity (n_vertices of the common space,) -> npy and GIFTI of both hemispheres."""
    from nibabel import gifti

    for hemi, structure in zip(prepare_data.hemis, ("CortexLeft", "CortexRight")):
        side = (np.arange(space.n_vertices) < space.n_lh) == (hemi == "lh")
        own = side & space.present(subject)
        with write_whole(f"{stem}_{hemi}.npy") as file:
            np.save(file, activity[own])
        whole = np.full(prepare_data.n_fsaverage, np.nan, np.float32)
        whole[space.vertices.numpy()[own]] = activity[own]
        array = gifti.GiftiDataArray(whole, intent="NIFTI_INTENT_NONE", datatype="NIFTI_TYPE_FLOAT32")
        meta = gifti.GiftiMetaData(AnatomicalStructurePrimary=structure)
        with write_whole(f"{stem}_{hemi}.func.gii") as file:
            file.write(gifti.GiftiImage(darrays=[array], meta=meta).to_bytes())


def csv_bytes(rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def roi_means(activity, areas, space):
    """Means of activity (n_vertices,) over areas (regions()): rows of roi_group, roi, both, lh, rh."""
    left = np.arange(space.n_vertices) < space.n_lh
    for (roi_group, roi), area in areas.items():
        parts = [activity[area & side] for side in (True, left, ~left)]
        yield roi_group, roi, *(f"{part.mean():.6g}" if len(part) else "" for part in parts)


def predict_pictures(path, device, precision):
    # only the authors' weights need a space from elsewhere
    encoder, space, made = load_checkpoint(path, device, lambda: prepare_data.find_space(DATA_DIR, CHALLENGE_DIR))
    describe_checkpoint(path, made)
    subjects = choose_subjects(SUBJECT, space)
    pictures, output = find_pictures(IMAGES, OUTPUT_DIR), Path(OUTPUT_DIR)
    areas = {subject: space.regions(s) for subject, s in subjects.items()}
    if MAPS:
        flat_map = FlatMap(space, FSAVERAGE_DIR)
        outlines = {subject: flat_map.outlines(OUTLINES, s) for subject, s in subjects.items()}
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        check_pictures(pictures, pool)
        names = list(pictures)
        with write_whole(output / "rois.csv") as file, progress(total=len(names), desc="predicting", unit="picture") as bar:
            file.write(csv_bytes([("picture", "subject", "roi_group", "roi", "both", "lh", "rh")]))
            for start in range(0, len(names), BATCH_SIZE):
                batch = names[start : start + BATCH_SIZE]
                images = np.stack(list(pool.map(read_picture, [pictures[name] for name in batch])))
                predictions = encoder.predict(images, subjects.values(), batch_size=BATCH_SIZE, precision=precision)
                for i, name in enumerate(batch):
                    for (subject, s), prediction in zip(subjects.items(), predictions):
                        activity, stem = prediction[i].numpy(), output / subject / name
                        write_activity(stem, activity, space, s)
                        rows = roi_means(activity, areas[subject], space)
                        file.write(csv_bytes((name, subject, *row) for row in rows))
                        if MAPS:
                            shown = np.where(space.present(s), activity, np.nan)
                            title = f"{name}, {subject}"
                            plot_picture(f"{stem}.png", title, images[i], shown, flat_map, outlines[subject])
                    bar.update()
    print(f"wrote {output}: {len(names)} pictures for {', '.join(subjects)}; rois.csv has the mean over every ROI")


def plot_picture(path, title, picture, activity, flat_map, outlines):
    """The picture as the model saw it beside its predicted activity (n_vertices,), NaN where missing."""
    import matplotlib.pyplot as plt

    width = 3 * flat_map.grey.shape[1] / flat_map.grey.shape[0]  # inches
    figure, (left, right) = plt.subplots(1, 2, figsize=(4.2 + width, 3.4), width_ratios=(3, width), layout="constrained")
    left.imshow(picture)
    left.set_axis_off()
    shown = flat_map.draw(right, activity, (-MAP_RANGE, MAP_RANGE), "RdBu_r", outlines, named=True)
    describe_maps(figure, [shown], right, "predicted activity (z)", outlines)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def main():
    check_least(globals(), BATCH_SIZE=1)
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    path = choose_checkpoint(CHECKPOINT, RUN_DIR)
    if IMAGES:
        predict_pictures(path, device, precision)
    elif SUBJECT != "all":
        raise Problem(f"SUBJECT is {SUBJECT}, but without IMAGES every subject's challenge pictures are predicted")
    else:
        predict_challenge(path, device, precision)


if __name__ == "__main__":
    run_script(main, globals())
