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
import pandas as pd
from PIL import Image, ImageOps

from model import PICTURE_SIZE, UserError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
HEIC = {".heic", ".heif", ".hif"}  # counted as pictures, so that they are listed as unreadable
BIT_DEPTHS = (8, 10, 12, 14, 16)  # that occur in 16-bit files


@dataclasses.dataclass
class Picture:
    path: Path
    image: np.ndarray  # (256, 256, 3) uint8
    width: int  # px, after rotation
    height: int
    note: str  # what was done to it, or looks odd; mostly empty


def plural(n, singular):
    return f"{n} {singular}" + "s" * (n != 1)


def shown(path):
    """A path for people to read; names that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_pictures(images, output_dir):
    """Files, folders and globs, separated by commas -> [Path], each once. Raises UserError if there are none.

    Folders are searched with their subfolders, linked ones too, but not OUTPUT_DIR.
    """
    Image.init()  # registers all formats
    endings = HEIC | {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    files, name = [], ""
    for part in images.split(","):
        name = f"{name},{part}" if name else part.strip()  # names may hold commas themselves
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        for path in map(Path, matches):
            files += files_below(path, output_dir) if path.is_dir() else [path]
        name = "" if matches else name
    if name:
        raise UserError(f"{shown(name.split(',')[0])} does not exist.")
    files = dict.fromkeys(files)  # without repetitions
    pictures = [path for path in files if path.suffix.lower() in endings]
    if len(files) > len(pictures):
        print(f"skipped {plural(len(files) - len(pictures), 'non-image file')}")
    if not pictures:
        raise UserError(f"there are no pictures in {shown(images) or 'IMAGES, which is empty'}.")
    return pictures


def files_below(folder, output_dir):
    visited, files = {os.path.realpath(output_dir)} - {os.path.realpath(folder)}, []
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:  # links can lead round in a circle
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
        Image.init()
        with Image.open(path, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as file:
            is_deep = ";16" in str(file.tile)
            picture, notes = ImageOps.exif_transpose(file), []
        if picture.mode[0] in "IF":
            picture, notes = to_8_bit(picture)
        elif is_deep and np.max(picture) < 64:  # Pillow keeps the upper 8 of 16 bits
            raise ValueError("its values fill few of its 16 bits, save it with 8 bits per colour")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        notes += ["centre-cropped to a square"] * (left + top > 0)
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        square = square.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
        return Picture(Path(path), np.asarray(square), *picture.size, "; ".join(notes))
    except Exception as error:  # decoders raise all kinds
        raise UserError(f"{shown(path)}: {' '.join(str(error).split()) or type(error).__name__}")


def to_8_bit(picture):
    """16-bit grey -> 8-bit grey, and a note where the values fill fewer bits and are scaled up accordingly."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError("its values are not 8 or 16 bits deep")
    bits = next(depth for depth in BIT_DEPTHS if values.max() < 2**depth)
    notes = [f"warning: the largest value is {values.max()}, read as {bits} bits"] if bits < 16 else []
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)), notes


def read_batches(paths, batch_size, failures):
    """Yields [Picture] of the readable files, batch by batch; what is wrong with others is appended to failures.

    Threads decode the next batch while the caller works on this one. Raises UserError if none can be read.
    """
    n_before = len(failures)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        coming = [pool.submit(read_picture, path) for path in paths[:batch_size]]
        for start in range(batch_size, len(paths) + batch_size, batch_size):
            batch = coming
            errors = [str(future.exception()) for future in batch if future.exception()]
            coming = [pool.submit(read_picture, path) for path in paths[start : start + batch_size]]
            failures += errors
            if len(errors) < len(batch):
                yield [future.result() for future in batch if not future.exception()]
    if len(failures) - n_before == len(paths):
        raise UserError("none of the pictures could be read:\n" + "\n".join(failures[:20]))


def list_pictures(pictures, first=0):
    """[Picture] -> rows of pictures.csv: a name that can serve in file names, whatever the file is called, size, note."""
    table = pd.DataFrame([vars(picture) for picture in pictures]).drop(columns=["image", "path"])
    stems = [re.sub(r"[^A-Za-z0-9-]+", "_", picture.path.stem)[:60] for picture in pictures]
    table.insert(0, "picture", [f"{row:03d}_{stem}" for row, stem in enumerate(stems, first)])
    table.insert(1, "file", [shown(picture.path) for picture in pictures])
    return table


def report(pictures, failures):
    """Print the notes of list_pictures(). Raises UserError, when all else is done, if files could not be read."""
    noted = pictures[pictures.note != ""]
    for row in noted.head(5).itertuples():
        print(f"{row.file}: {row.width} x {row.height} px, {row.note}")
    if len(noted) > 5:
        print(f"… pictures.csv has notes on {len(noted)} pictures")
    if failures:
        listed = "\n".join(failures[:20] + ["…"] * (len(failures) > 20))
        raise UserError(f"{plural(len(failures), 'picture')} could not be read and had to be skipped:\n{listed}")
