"""Picture files of any common format and shape -> what the model sees: the largest centred square at 256 x 256 px.
Files are read as a viewer shows them: rotated as EXIF says, transparent parts on white, the first frame of several.
"""

import dataclasses
import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from core.settings import progress
from model import PICTURE_SIZE, UserError

HEIC = {".heic", ".heif", ".hif"}  # counted as pictures, so that they are listed as unreadable
ENDINGS = {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"} | HEIC


@dataclasses.dataclass
class Picture:
    path: Path
    image: np.ndarray  # (256, 256, 3) uint8
    width: int  # px, after rotation
    height: int
    note: str  # a warning, mostly empty


def plural(n, singular):
    return f"{n} {singular}" + "s" * (n != 1)


def shown(path):
    """A path for people to read; names that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_pictures(images, output_dir):
    """Files, folders and globs, separated by commas -> [Path], each once. Raises UserError if there are none."""
    files = {}  # in order, without repetitions
    for name in map(str.strip, images.split(",")):
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f'there is no file or folder "{shown(name)}".')
        for path in map(Path, matches):
            files |= dict.fromkeys(files_below(path, output_dir) if path.is_dir() else [path])
    pictures = [path for path in files if path.suffix.lower() in ENDINGS]
    if len(files) > len(pictures):
        print(f"skipped {plural(len(files) - len(pictures), 'non-image file')}")
    if not pictures:
        raise UserError(f"there are no pictures in {shown(images)}.")
    return pictures


def files_below(folder, output_dir):
    """Files in a folder and its subfolders, linked ones too, except hidden ones and those in OUTPUT_DIR."""
    visited, files = {os.path.realpath(output_dir)}, []
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:  # links can form a circle
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if name[0] not in ".@")  # @eaDir holds thumbnails
        files += [Path(root, name) for name in sorted(names) if name[0] != "."]
    return files


def read_picture(path):
    """A file -> Picture. Raises UserError if it cannot be read."""
    try:
        if Path(path).suffix.lower() in HEIC:
            raise ValueError("HEIC cannot be read, save it as JPEG")
        with Image.open(path) as file:
            is_deep = ";16" in str(file.tile)
            picture, note = ImageOps.exif_transpose(file), ""
        if picture.mode[0] in "IF":
            picture, note = to_8_bit(picture)
        elif is_deep and np.max(picture) < 64:  # Pillow keeps the upper 8 of 16 bits
            raise ValueError("its values fill few of its 16 bits, save it with 8 bits per colour")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        square = ImageOps.fit(picture.convert("RGB"), (PICTURE_SIZE, PICTURE_SIZE))
        return Picture(Path(path), np.asarray(square), *picture.size, note)
    except Exception as error:  # decoders raise all kinds
        raise UserError(f"{shown(path)}: {' '.join(str(error).split()) or type(error).__name__}")


def to_8_bit(picture):
    """16-bit grey -> 8-bit grey, and a warning where the values fill only 8 or 12 bits and are scaled accordingly."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError("its values are not 8, 12 or 16 bits deep")
    bits = next(bits for bits in (8, 12, 16) if values.max() < 2**bits)
    note = f"the largest value is {values.max()}, read as {bits} bits" if bits < 16 else ""
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)), note


def read_batches(paths, batch_size, failures):
    """Yields [Picture] of the readable files; errors of the others are appended to failures. UserError if none is."""
    readable = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), batch_size):
            futures = [pool.submit(read_picture, path) for path in paths[start : start + batch_size]]
            failures += [str(future.exception()) for future in futures if future.exception()]
            batch = [future.result() for future in futures if not future.exception()]
            if batch:
                readable = True
                yield batch
    if not readable:
        raise UserError("\n".join(["none of the pictures could be read:", *failures]))


def predict_batches(predictor, paths, failures):
    """Yields [Picture] and their latents, batch by batch, as read_batches(); threads read and run the trunk ahead."""
    with progress(total=len(paths), desc="predicting", unit="picture") as bar:
        batches = ahead(read_batches(paths, predictor.batch_size, failures))
        yield from ahead(
            (batch, predictor.latents(np.stack([p.image for p in batch]), bar.update)) for batch in batches
        )


def ahead(items):
    """Yields the items of a generator; a thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while item := coming.result():
            coming = thread.submit(next, items, None)
            yield item


def list_pictures(pictures, first=0):
    """[Picture] -> rows of pictures.csv. picture: a name that can serve in file names, whatever the file is called."""
    rows = []
    for row, p in enumerate(pictures, first):
        name = f"{row:03d}_" + re.sub(r"[^A-Za-z0-9-]+", "_", p.path.stem)[:60]
        rows.append(dict(picture=name, file=shown(p.path), width=p.width, height=p.height, note=p.note))
    return rows


def report(rows, failures):
    """Print warnings of list_pictures(). Raises UserError, when all else is done, if files could not be read."""
    for row in rows:
        if row["note"]:
            print(f"warning: {row['file']}: {row['note']}")
    if failures:
        count = plural(len(failures), "picture")
        raise UserError("\n".join([f"{count} could not be read and had to be skipped:", *failures]))
