"""What every script shares: constants on the command line, errors told in one message, the choice of
device, files that are written whole or not at all, files that are read without running code."""

import argparse
import contextlib
import errno
import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch

disk_errors = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip


class Problem(Exception):
    """Something the user can mend: printed as one message without a traceback, exit code 1."""


def run_script(main, namespace, many_processes=False):
    """Run a stage from the command line: override its constants by name, then main().

    many_processes: whether torchrun may run it.

    namespace: the script's globals(). A constant is an UPPER_CASE number, string, true/false or
    tuple of numbers; the type of its value is the type that the command line must have.
    """
    import processes  # builds on this file

    start = time.perf_counter()
    try:
        with processes.joined(many_processes):
            override_constants(namespace, sys.argv[1:])
            main()
        seconds = time.perf_counter() - start
        print(f"{Path(sys.argv[0]).name}: {seconds:.0f} s, peak memory {peak_memory()}")
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        ways = {"MICRO_BATCH": "set MICRO_BATCH below BATCH_SIZE", "BATCH_SIZE": "lower BATCH_SIZE"}
        way = next((text for name, text in ways.items() if name in namespace), "--device cpu runs without it")
        sys.exit(f"error: the GPU has too little memory; {way} ({str(error).splitlines()[0]})")
    except MemoryError as error:
        sys.exit(f"error: too little host memory ({error}); README tells what each stage needs")
    except (OSError, RuntimeError) as error:
        while error and getattr(error, "errno", None) not in disk_errors:
            error = error.__context__  # torch.save turns a full disk into an error of its own
        if not error:
            raise
        sys.exit(
            f"error: {error.filename or 'writing'}: {error.strerror}. Free disk or choose another folder; the same "
            "command starts again, finished files are untouched"
        )


def constants(namespace):
    """{NAME: value} of a script's UPPER_CASE constants."""
    return {
        name: value
        for name, value in namespace.items()
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and isinstance(value, (bool, int, float, str, tuple))
    }


def override_constants(namespace, arguments):
    known = constants(namespace)
    parser = argparse.ArgumentParser(
        description=namespace["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    about = constant_comments(namespace["__file__"])
    for name, value in known.items():
        spellings = {f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"}
        text = f"now {show(value)}; {about.get(name, '')}".replace("%", "%%").rstrip("; ")
        metavar = {bool: "true|false", int: "N", float: "X", tuple: "X,X"}.get(type(value), "TEXT")
        parser.add_argument(*sorted(spellings), dest=name, metavar=metavar, help=text)

    def refuse(message):
        names = " ".join("--" + name.lower() for name in known)
        raise Problem(f"{message}\nconstants of this script: {names} (--help tells about them)")

    parser.error = refuse
    for name, text in vars(parser.parse_args(arguments)).items():
        if text is not None:
            namespace[name] = parse_constant(name, text, known[name])


def parse_constant(name, text, value):
    """text as the type of value."""
    try:
        if isinstance(value, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(value, tuple):
            return tuple(float(part) for part in text.strip("()").split(","))
        return type(value)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            type(value), "numbers with commas between them"
        )
        raise Problem(f"--{name.lower()} is {text!r}, expected {kind}, such as {show(value)}")


def show(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def constant_comments(path):
    """The comment behind each constant's line, for --help."""
    text = Path(path).read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", text, re.MULTILINE)}


def check_least(namespace, **least):
    """Refuse constants below their least sensible values, NaN among them; names not there are passed over."""
    for name, limit in least.items():
        if name in namespace and not namespace[name] >= limit:
            raise Problem(f"{name} is {namespace[name]}, expected {limit} or more")


def choose_device(name):
    """"auto" is the GPU where there is one; "cuda", "cuda:1", "cpu"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Problem(f"DEVICE is {name}, but torch {torch.__version__} sees no GPU: --device cpu runs without")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise Problem(f"DEVICE is {name!r}, expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise Problem(f"DEVICE is {name}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # what is asked without naming a device is then asked of this one
    return device


def choose_precision(name, device):
    """"auto": bfloat16 where the hardware computes it, else float16 on a GPU, float32 on a CPU."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name in known:
        return known[name]
    if name != "auto":
        raise Problem(f"PRECISION is {name!r}, expected auto, float32, float16 or bfloat16")
    if device.type == "cuda":
        # without emulation: a V100 would else claim bfloat16
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


@contextlib.contextmanager
def write_whole(path):
    """A file that appears under its name complete or not at all: written aside, flushed, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself has to reach the disk
        os.fsync(folder)
        os.close(folder)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def check_disk(folder, n_bytes):
    """Refuse before the long work what would fill the disk at its end."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise Problem(f"{folder} cannot be written to; choose another folder or change its rights")
    free = shutil.disk_usage(folder).free
    if free < 1.02 * n_bytes:
        raise Problem(
            f"{folder}: {free / 1e9:.1f} GB of disk free, expected {n_bytes / 1e9:.1f} GB; free some or choose another"
        )


def load_torch(path, kind, what):
    """A dict saved by torch.save, read without running code. kind: its "format" entry."""
    return check_format(read_torch(path, what), path, kind, what)


def read_torch(path, what):
    """Any such dict; tensors are mapped and read when used."""
    if not Path(path).is_file():
        raise Problem(f"{path} not found, expected {what}")
    scalar = np._core.multiarray.scalar  # the authors' files hold a numpy float64
    harmless = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise Problem(f"{path} cannot be read ({' '.join(str(error).split())[:200]}), expected {what}")
    return content if isinstance(content, dict) else {"format": type(content).__name__}


def check_format(content, path, kind, what):
    if content.get("format") != kind:
        raise Problem(f"{path} has format {content.get('format')}, expected {kind}: {what}")
    return content


def fingerprint(*items):
    """16 hex digits of SHA-256 over arrays, tensors, strings and numbers."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().contiguous().view(torch.uint8).numpy() if item.ndim else str(item.item())
        if isinstance(item, np.ndarray):
            digest.update(str((item.dtype, item.shape)).encode())
            digest.update(np.ascontiguousarray(item).data)
        else:
            digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


def versions():
    """Of what can change a result, and the commit where there is git."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    found["numpy"] = np.__version__
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.check_output(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"],
            text=True, stderr=subprocess.DEVNULL,
        ).strip()  # fmt: skip
    return {name: str(value) for name, value in found.items()}


def peak_memory():
    text = f"{peak_resident():.1f} GB"
    if torch.cuda.is_available():
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


def peak_resident():
    """Peak resident memory of this process in GB."""
    with contextlib.suppress(OSError):  # on Linux ru_maxrss starts from the parent's
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
