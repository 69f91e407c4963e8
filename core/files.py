"""Files that are written atomically, a lock per folder, and one fingerprint for data, PCA and checkpoints."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import filelock
import numpy as np
import torch

from model import UserError


def aside_of(path):
    """Where a file or folder is written before it is renamed to path; leftovers of a killed run are overwritten."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name[:60]}.part")


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that is written beside path and renamed to it at the end."""
    aside = aside_of(path)
    with open(aside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextlib.contextmanager
def output_folder(path, overwrite=False, marker=None):
    """A folder that is filled beside path and renamed to it at the end. marker: name of a file that only this tool
    writes there; a folder without it is never replaced."""
    path, aside = Path(path).resolve(), aside_of(path)
    if path.exists() and any(path.iterdir()):
        if marker and not (path / marker).exists():
            raise UserError(f"{path} holds files that this script did not write (no {marker}): choose another folder.")
        if not overwrite:
            raise UserError(f"{path} is not empty; --overwrite true replaces it.")
    old = aside.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if path.exists():
            path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def lock(folder):
    """One writer per folder at a time; settings.run() reports filelock.Timeout."""
    path = Path(folder) / ".lock"
    with filelock.FileLock(path, timeout=0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def fingerprint(*items):
    """16 hexadecimal digits of arrays, tensors, text, and dicts and lists of them, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        if isinstance(item, dict):
            item = fingerprint(*item, *item.values())
        elif isinstance(item, (list, tuple)):
            item = fingerprint(*item)
        elif isinstance(item, torch.Tensor):
            item = item.detach().cpu().numpy()
        if isinstance(item, np.ndarray):
            digest.update(f"{item.dtype}{item.shape}".encode())
            digest.update(np.ascontiguousarray(item).reshape(-1).view(np.uint8))
        else:
            digest.update(str(item).encode())
        digest.update(b"|")
    return digest.hexdigest()


def save_torch(path, content, format):
    """torch.save, atomically, with the name of the format and a checksum."""
    content = {"format": format, **content}
    with atomic_write(path) as file:
        torch.save(content | {"checksum": fingerprint(content)}, file)


def load_torch(path, format, command):
    """The dict that save_torch wrote. command: the script that makes it. Raises UserError for any other file."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: run {command} first.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content["format"] == format and content.pop("checksum") == fingerprint(content):
            return content
        reason = "format or checksum"
    except (MemoryError, OSError):
        raise
    except Exception as error:  # unpickling a damaged file raises all kinds
        reason = str(error).partition("\n")[0][:100]
    raise UserError(f"{path} is damaged or was written by another version ({reason}): run {command} again.")
