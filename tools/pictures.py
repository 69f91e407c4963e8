"""Picture files of any common format and shape -> what the model sees: the largest centred square at 256 x 256 px,
as a viewer shows it: rotated as EXIF says, transparent parts on white, the first frame of several."""

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from core.settings import progress
from model import PICTURE_SIZE, UserError

HEIC = {".heic", ".heif", ".hif"}  # counted as pictures, so that they are listed as unreadable
ENDINGS = {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"} | HEIC


class Picture(NamedTuple):
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
            files |= dict.fromkeys(files_below(path, {Path(output_dir).resolve()}))
    pictures = [path for path in files if path.suffix.lower() in ENDINGS]
    if len(files) > len(pictures):
        print(f"skipped {plural(len(files) - len(pictures), 'non-image file')}")
    if not pictures:
        raise UserError(f"there are no pictures in {shown(images)}.")
    return pictures


def files_below(path, visited):
    """Yields a file, or those of a folder and its subfolders, linked ones too, except hidden and visited ones."""
    if not path.is_dir():
        yield path
    elif path.resolve() not in visited:  # links can form a circle
        visited.add(path.resolve())
        for inner in sorted(path.iterdir(), key=lambda inner: (inner.is_dir(), inner.name)):
            if not inner.name.startswith((".", "@") if inner.is_dir() else "."):  # @eaDir holds thumbnails
                yield from files_below(inner, visited)


def read_picture(path):
    """A file -> Picture. Raises UserError if it cannot be read."""
    try:
        if Path(path).suffix.lower() in HEIC:
            raise ValueError("HEIC cannot be read, save it as JPEG")
        with Image.open(path) as file:
            is_deep = ";16" in str(file.tile)
            picture, note = ImageOps.exif_transpose(file), ""
        if picture.mode[0] in "IF":  # grey of 16 bits, of which some files fill only 8 or 12
            values = np.asarray(picture)
            bits = next((bits for bits in (8, 12, 16) if 0 <= values.min() and values.max() < 2**bits), None)
            if not bits or picture.mode == "F":
                raise ValueError("its values are not 8, 12 or 16 bits deep")
            note = f"the largest value is {values.max()}, read as {bits} bits" if bits < 16 else ""
            picture = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
        elif is_deep and np.max(picture) < 64:  # Pillow keeps the upper 8 of 16 bits
            raise ValueError("its values fill few of its 16 bits, save it with 8 bits per colour")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        square = ImageOps.fit(picture.convert("RGB"), (PICTURE_SIZE, PICTURE_SIZE))
        return Picture(Path(path), np.asarray(square), *picture.size, note)
    except Exception as error:  # decoders raise all kinds
        raise UserError(f"{shown(path)}: {' '.join(str(error).split()) or type(error).__name__}")


def read_batches(paths, batch_size, failures):
    """Yields [Picture] of the readable files, while threads read the next ones; errors are appended to failures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        coming = []  # the batch that is being read
        for start in range(0, len(paths) + batch_size, batch_size):
            batch, coming = coming, [pool.submit(read_picture, path) for path in paths[start : start + batch_size]]
            failures += [str(future.exception()) for future in batch if future.exception()]
            if pictures := [future.result() for future in batch if not future.exception()]:
                yield pictures


def predict_files(predictor, paths, failures):
    """Files -> [Picture] of the readable ones, without image, which saves memory, and latents per encoder."""
    pictures, latents = [], []
    with progress(total=len(paths), desc="predicting", unit="picture") as bar:
        for batch in read_batches(paths, predictor.batch_size, failures):
            pictures += [picture._replace(image=None) for picture in batch]
            latents.append(predictor.latents(np.stack([picture.image for picture in batch]), bar.update))
    if not pictures:
        raise UserError("\n".join(["none of the pictures could be read:", *failures]))
    return pictures, [torch.cat(parts) for parts in zip(*latents)]


def report(pictures, failures):
    """Print warnings. Raises UserError, when all else is done, if files could not be read."""
    for picture in pictures:
        if picture.note:
            print(f"warning: {shown(picture.path)}: {picture.note}")
    if failures:
        head = f"{plural(len(failures), 'picture')} could not be read and had to be skipped:"
        raise UserError("\n".join([head, *failures]))
