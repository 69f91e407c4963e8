"""Pictures of one's own: found in a folder, read in any common format and size, made square, refused in words.

Whatever comes in, the model sees (256, 256, 3) uint8: the largest centred square, upright, resized as
prepare_data.py does.
"""

import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import prepare_data
from common import Problem, progress

picture_formats = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
largest_picture = 100e6  # pixels; protects memory


def find_pictures(images, output_dir):
    """{name: path} in sorted order. Names are paths below the folder without their ending, with it
    where two would be equal. Files of other kinds are left out and counted, what is hidden or in output_dir is left
    out."""
    root, output = Path(images), Path(output_dir).resolve()
    if root.is_file():
        return {root.stem: root}
    if not root.is_dir():
        raise Problem(f"{root} not found, expected a picture or a folder of pictures")
    endings = {e for e, kind in Image.registered_extensions().items() if kind in picture_formats}
    if output == root.resolve():
        raise Problem(f"OUTPUT_DIR is {root}, where the pictures are: choose another, or maps would count as pictures")
    files = [p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file()]
    files = [p for p in files if not any(part.startswith(".") for part in p.parts)]
    if root.resolve() in output.parents:
        files = [p for p in files if output not in (root / p).resolve().parents]
    pictures = [p for p in files if p.suffix.lower() in endings]
    others = [str(p) for p in files if p.suffix.lower() not in endings]
    if others:
        print(f"left out {len(others)} files whose names are no picture's: {some(others)}")
    if not pictures:
        raise Problem(f"{root} holds no picture, expected {', '.join(sorted(endings))}")
    unique = max(Counter(p.with_suffix("") for p in pictures).values()) == 1
    return {(p.with_suffix("") if unique else p).as_posix(): root / p for p in pictures}


def some(items):
    return ", ".join(items[:3]) + " …" * (len(items) > 3)


def nsd_id(name):
    """Which of NSD's 73,000 pictures a name such as train-0001_nsd-00013 speaks of; "" where it does not."""
    found = re.search(r"nsd-?(\d{5})(?!\d)", name)
    return int(found[1]) if found else ""


def open_file(path):
    Image.init()  # else Pillow knows a few formats only
    return Image.open(path, formats=[kind for kind in picture_formats if kind in Image.OPEN])


def open_picture(path):
    """-> RGB picture as a person sees the file, see as_seen."""
    with open_file(path) as picture:
        return as_seen(picture)


def as_seen(picture):
    """PIL picture -> RGB, upright as the camera held it. Transparent parts become white, 16-bit grey 8-bit."""
    check_size(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"32-bit grey values (mode {picture.mode}), expected 8 or 16 bit")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def check_size(picture):
    if np.prod(picture.size) > largest_picture:
        raise ValueError(f"{picture.width} x {picture.height} pixels, expected up to {largest_picture:.0f}")


def square(picture):
    """RGB picture -> (256, 256, 3) uint8: the largest centred square, resized as prepare_data.py does."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return prepare_data.resize_picture(picture.crop((left, top, left + side, top + side)))


def read_picture(path):
    """A file -> (256, 256, 3) uint8."""
    return square(open_picture(path))


def to_picture(item):
    """A path, PIL picture or uint8 array (height, width, 3) -> (256, 256, 3) uint8. All else is refused."""
    try:
        if isinstance(item, (str, Path)):
            return read_picture(item)
        if isinstance(item, Image.Image):
            return square(as_seen(item))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise Problem(f"{item}: {in_one_line(error)}")
    kind, shape = str(getattr(item, "dtype", type(item).__name__)), tuple(getattr(item, "shape", ()))
    if not isinstance(item, np.ndarray) or kind != "uint8" or len(shape) != 3 or shape[2] != 3 or not min(shape):
        what = type(item).__name__ if isinstance(item, np.ndarray) or not shape else f"{type(item).__module__} tensor"
        hint = "; values from 0 to 1 are (255 * x).round() of them" if "float" in kind else ""
        raise Problem(
            f"a picture is a {what} of {kind} {shape or ''}, expected a path, a PIL picture or a numpy array of uint8 "
            f"values 0 to 255 of shape (height, width, 3){hint}"
        )
    return square(Image.fromarray(item))


def in_one_line(error):
    return " ".join(str(error).split())


def try_picture(path):
    """(256, 256, 3) uint8, or what is wrong with the file as a string."""
    try:
        return to_picture(Path(path))
    except Problem as problem:
        return str(problem)


def look_at(path):
    """(width, height) by the file's header and a fingerprint of the file; or what is wrong as a string."""
    try:
        with open_file(path) as picture:
            check_size(picture)
            size = picture.size
        return size, prepare_data.sample_fingerprint(Path(path))
    except MemoryError:
        raise
    except Exception as error:
        return f"{path}: {in_one_line(error)}"


def check_headers(pictures, pool):
    """Refuse files that are no pictures by their headers, all together -> {name: stamp}. What is damaged further
    inside read_batches() finds."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # largest_picture decides
    bar = progress(pool.map(look_at, pictures.values()), "checking", len(pictures), unit="picture")
    found = dict(zip(pictures, bar))
    if any(isinstance(fault, str) for fault in found.values()):
        refuse(find_damage(pictures.values(), pool))
    oblong = [f"{name} ({w} x {h})" for name, ((w, h), _) in found.items() if w != h]
    if oblong:
        print(f"centre-cropped to a square: {len(oblong)} of {len(found)} pictures: {some(oblong)}")
    return {name: stamp for name, (_, stamp) in found.items()}


def find_damage(paths, pool):
    """What is wrong with files, in words."""
    return [fault for fault in pool.map(damage, paths) if fault]


def damage(path):
    found = try_picture(path)
    return found if isinstance(found, str) else ""


def refuse(faults):
    prepare_data.Findings(faults).refuse("pictures that cannot be read; once they are mended the same command works")


def read_batches(paths, batch_size, pool, first=0):
    """Yields (row of the first, images (n, 256, 256, 3) uint8), the next batch read meanwhile; from row first on.

    At the first damaged picture all that follow are read, so that all damaged ones are told at once.
    """

    def start_reading(start):
        return [pool.submit(try_picture, path) for path in paths[start : start + batch_size]]

    coming = start_reading(first)
    for start in range(first, len(paths), batch_size):
        found = [future.result() for future in coming]
        faults = [fault for fault in found if isinstance(fault, str)]
        if faults:
            refuse(faults + find_damage(paths[start + batch_size :], pool))
        coming = start_reading(start + batch_size)
        yield start, np.stack(found)
