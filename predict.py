"""Stage 5: predict the challenge's test pictures, and score the private test split.

Reads DATA_DIR and a checkpoint; writes SUBMISSION_DIR/subjXX/{lh,rh}_pred_test.npy, float32
(n_test_images, n_vertices of that hemisphere), and submission.zip with these folders at its root.
Prints median R² on the private test split and writes it beside the checkpoint.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
import train_head
from model import (
    Crops, Problem, choose_device, choose_precision, load_checkpoint, predict_latents, run_script, write_whole,
)  # fmt: skip

DATA_DIR = prepare_data.DATA_DIR  # prepared data
RUN_DIR = train_head.RUN_DIR  # holds finetuned.pt or head.pt
CHECKPOINT = ""  # a checkpoint's path; empty: RUN_DIR/finetuned.pt where it exists, else head.pt
SUBMISSION_DIR = "submission"  # predictions and zip are written there
BATCH_SIZE = 64  # pictures at a time
PRECISION = "auto"  # auto, bfloat16, float16 or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N


def choose_checkpoint(path, run_dir):
    """The path given, else the run's finetuned.pt, else its head.pt."""
    candidates = [Path(path)] if path else [Path(run_dir) / name for name in ("finetuned.pt", "head.pt")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise Problem(
        f"no checkpoint: {' and '.join(map(str, candidates))} not found. Run python train_head.py --run_dir "
        f"{run_dir}, or name one with --checkpoint"
    )


def predict_subject(encoder, crops, images, subject, precision):
    """Activity (n_images, n_vertices of the common space) float32 of one subject (an index).

    images: (n_images, 256, 256, 3) uint8.
    """
    batches = (
        (torch.from_numpy(images[i : i + BATCH_SIZE]), torch.full((len(images[i : i + BATCH_SIZE]),), subject))
        for i in range(0, len(images), BATCH_SIZE)
    )
    with torch.inference_mode():
        return encoder.head.decode(predict_latents(encoder, crops, batches, precision)).cpu()


def write_submission(folder, data, predict):
    """predict: (images, subject index) -> (n_images, n_vertices) in the common space."""
    files = []
    for s, subject in enumerate(tqdm(data.space.subjects, desc="predicting", unit="subject")):
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


def main():
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    data = prepare_data.load(DATA_DIR)
    path = choose_checkpoint(CHECKPOINT, RUN_DIR)
    encoder, _, made = load_checkpoint(path, device)
    if made["made_with"]["data_fingerprint"] != data.fingerprint:
        raise Problem(
            f"{path} was trained on data {made['made_with']['data_fingerprint']}, {DATA_DIR} holds {data.fingerprint}: "
            "point DATA_DIR to the data it was trained on, or train anew"
        )
    print(f"predicting with {path} (step {made['step']}, validation median R² {made['scores']['val_r2']:.4f})")
    crops = Crops(encoder.trunk, device=device)
    write_submission(
        Path(SUBMISSION_DIR), data, lambda images, s: predict_subject(encoder, crops, images, s, precision)
    )
    validation = train_head.Validation(data, data.images, "test", BATCH_SIZE)
    scores = made["scores"] | validation(encoder, crops, precision, "test")
    print(f"{'private test':12} median R²")
    for key, score in scores.items():
        if key.startswith("test_r2"):
            print(f"{key.removeprefix('test_r2').strip('_') or 'all':12} {score:.4f}")
    scores_path = path.with_name(f"{path.stem}_scores.json")
    with write_whole(scores_path) as file:
        file.write(json.dumps(scores, indent=1).encode())
    print(f"wrote {scores_path}")


if __name__ == "__main__":
    run_script(main, globals())
