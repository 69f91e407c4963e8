"""Files that are written atomically, a lock per folder, and one fingerprint for data, PCA and checkpoints."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import filelock
import numpy as np
import torch

from model import UserError


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that is written beside path and renamed to it at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name[:80]}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def output_folder(path, overwrite=False, marker=None):
    """A folder that is filled beside path and renamed to it at the end.

    marker: name of a file that only this tool writes there; a folder without it is never replaced.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"{path} is not empty; --overwrite true replaces it.")
        if marker and not (path / marker).exists():
            raise UserError(f"{path} holds files that this script did not write (no {marker}): choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
    aside.chmod(0o777 & ~current_umask())
    try:
        yield aside
        if path.exists():
            old = aside.with_name(aside.name + "-old")
            path.rename(old)
            aside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def lock(folder):
    """One writer per folder at a time."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        with filelock.FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except filelock.Timeout:
        raise UserError(f"another process is writing to {folder}.")


def fingerprint(*items):
    """16 hexadecimal digits of arrays, tensors and text."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().contiguous()
            item = (item.view(torch.int16) if item.dtype == torch.bfloat16 else item).numpy()
        if isinstance(item, np.ndarray):
            digest.update(f"{item.dtype}{item.shape}".encode())
            digest.update(np.ascontiguousarray(item).reshape(-1).view(np.uint8))
        else:
            digest.update(str(item).encode())
        digest.update(b"|")
    return digest.hexdigest()


def fingerprint_of(content):
    """Of a nested dict of tensors, numbers and text, in its order."""
    if isinstance(content, dict):
        return fingerprint(*(v for key in content for v in (key, fingerprint_of(content[key]))))
    if isinstance(content, (list, tuple)):
        return fingerprint(*map(fingerprint_of, content))
    return fingerprint(content)


def save_torch(path, content, format):
    """torch.save, atomically, with the name of the format and a checksum."""
    content = {"format": format, **content}
    with atomic_write(path) as file:
        torch.save(content | {"checksum": fingerprint_of(content)}, file)


def load_torch(path, format, command):
    """The dict that save_torch wrote. command: the script that makes it. Raises UserError for any other file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: run {command} first.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:100]}): run {command} again.")
    if not isinstance(content, dict) or content.get("format") != format:
        raise UserError(f"{path} was not written by this version of {command}: run {command} again.")
    checksum = content.pop("checksum", None)
    if checksum != fingerprint_of(content):
        raise UserError(f"{path} is damaged (its checksum is wrong): run {command} again.")
    return content
