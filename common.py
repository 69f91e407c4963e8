"""What every script shares: constants on the command line, errors told in one message, the choice of
device, files that are written whole or not at all, files that are read without running code."""

import argparse
import contextlib
import errno
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from tqdm import tqdm

try:  # Windows has neither
    import fcntl
    import resource
except ImportError:
    fcntl = resource = None


def numbers_of(names):
    """errno's numbers, as far as the system knows the names."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


seconds_between_lines = 30.0  # of progress where output is no terminal

disk_errors = numbers_of("ENOSPC EDQUOT EFBIG EIO EACCES EPERM EROFS ENOTDIR EEXIST EISDIR")
lock_is_held = numbers_of("EAGAIN EWOULDBLOCK EACCES EDEADLK EDEADLOCK")
no_locks_here = numbers_of("ENOLCK ENOTSUP EOPNOTSUPP ENOSYS")

# What the value of a constant has to be, wherever the name stands. Told from the value itself, an edited
# STEPS = 5e0 would make 5.0 right and 5 wrong.
kinds = {
    name: kind
    for kind, names in {
        int: """
            BATCH_SIZE FINETUNE_STEPS FLOAT16_STEPS FULL_SCHEDULE GIFTI HEADS IMAGE_SIZE LATENT_DIM MAPS
            MICRO_BATCH N_DRAWS N_PICTURES N_TEST N_TRAIN PASSES PCA_DIM PICTURE_SIZE REPEATS RESAMPLES SCALING_PCA_DIM
            SEARCH_RUNS SEED SEEDS STEPS TRIALS VALIDATE_EVERY WARMUP_STEPS WORKERS
        """,
        float: """
            ACTIVITY_LIMIT CROP_SCALE FEATURE_DROPOUT GPU_LIMIT HOST_SIZE LEARNING_RATE MAP_RANGE MAX_SIZE
            MIN_LEARNING_RATE PCA_SIZE WEIGHT_DECAY
        """,
        bool: "ALLOW_UNFINISHED COMPILE EXPORT FIGURES HOLD_OUT OVERWRITE PRETRAINED RIDGE TRAIN_EMBEDDING",
        str: """
            ARRAY_TYPE CHALLENGE_DIR CHECKPOINT COCO_DIR CONTRAST DATA_DIR DEMO_DIR DEVICE
            EXAMPLE_SUBJECT FLAT_DIR FSAVERAGE_DIR IMAGES LAYERS LAYERS_CHOICES NOISE_CEILING_DIR
            NSD_DIR OUTLINES OUTPUT_DIR PARTS PRECISION RSC_DIR RUN_DIR SPLIT SPLITS SUBJECT SUBJECTS
            SUBMISSION SUBMISSION_DIR SURFACE_DIR TEMPORARY TRUNK TRUNKS
        """,
        (int,): "HEAD_COUNTS LATENT_DIM_RANGE N_SESSIONS PCA_DIM_RANGE",  # a tuple of whole numbers
        (float,): "BETAS CROP_SCALE_RANGE FEATURE_DROPOUT_RANGE LEARNING_RATE_RANGE WEIGHT_DECAY_RANGE",
    }.items()
    for name in names.split()
}
kind_in_words = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text",
    (int,): "whole numbers with commas between them", (float,): "numbers with commas between them",
}  # fmt: skip


class Problem(Exception):
    """Something the user can mend: printed as one message without a traceback, exit code 1."""


def run_script(main, namespace, many_processes=False):
    """Run a stage from the command line: check its constants, override them by name, then main().

    many_processes: whether torchrun may run it.

    namespace: the script's globals(). A constant is an UPPER_CASE number, string, true/false or
    tuple of numbers; kinds, or else the type of its value, says what it must be.
    """
    import processes  # builds on this file

    start = time.perf_counter()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a job's log is read while the job runs
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
    except (MemoryError, OSError, RuntimeError) as error:
        message = explain(error, namespace)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def explain(error, namespace):
    """Memory and disk that ran out, in words; None for every other error."""
    text = str(error).strip().partition("\n")[0]
    ways = {"MICRO_BATCH": "set MICRO_BATCH below BATCH_SIZE", "BATCH_SIZE": "lower BATCH_SIZE"}
    way = next((words for name, words in ways.items() if name in namespace), None)
    gpu = r"CUDA.* out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and re.search(gpu, text):
        return f"the GPU has too little memory; {way or '--device cpu runs without it'} ({text})"
    # PyTorch's allocator on Linux and on Windows, and its mapping of files, raise no MemoryError
    host = "can't allocate memory|not enough memory|[Cc]annot allocate memory"
    if isinstance(error, MemoryError) or re.search(host, str(error)):
        advice = f"{way}, or see" if way else "see"
        return f"too little host memory; {advice} README for what each stage needs ({text or 'no more is known'})"
    if isinstance(error, OSError) and error.errno in disk_errors:
        return (
            f"{error.filename or 'a file'}: {error.strerror}. Free disk or choose another folder; the same command "
            "starts again, finished files are untouched"
        )
    return None


def constants(namespace):
    """{NAME: value} of a script's UPPER_CASE constants, which are of the right kind or refused."""
    check_kinds(namespace)
    return {
        name: value
        for name, value in namespace.items()
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and isinstance(value, (bool, int, float, str, tuple))
    }


def check_kinds(namespace):
    """Refuse what an edit made of another kind, before any work: STEPS = "6", BATCH_SIZE = 64, with its comma."""
    for name, value in namespace.items():
        if name in kinds and not is_kind(value, kinds[name]):
            where = f" (at the top of {Path(namespace['__file__']).name})" if "__file__" in namespace else ""
            raise Problem(f"{name} is {value!r}, expected {kind_in_words[kinds[name]]}{where}")


def is_kind(value, kind):
    if isinstance(kind, tuple):
        return isinstance(value, tuple) and all(is_kind(part, kind[0]) for part in value)
    if kind is float:  # a whole number is a number, too; nothing here can be infinite
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def kind_of(name, value):
    """What the constant has to be: a type, or a tuple of one type for a tuple."""
    if name in kinds or not isinstance(value, tuple):
        return kinds.get(name, type(value))
    return (int,) if is_kind(value, (int,)) else (float,)


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
        metavars = {bool: "true|false", int: "N", float: "X", (int,): "N,N", (float,): "X,X"}
        metavar = metavars.get(kind_of(name, value), "TEXT")
        parser.add_argument(*sorted(spellings), dest=name, metavar=metavar, help=text)

    def refuse(message):
        names = " ".join("--" + name.lower() for name in known)
        raise Problem(f"{message}\nconstants of this script: {names} (--help tells about them)")

    parser.error = refuse
    values, strays = parser.parse_known_args(arguments)
    if strays:
        message = f"not understood: {' '.join(strays)}"
        if not strays[0].startswith("-"):  # a shell turns blocks.{1,3} into blocks.1 blocks.3
            message += '. Values with spaces, braces or wildcards need quotes, as in --layers "blocks.{1,3}"'
        refuse(message)
    for name, text in vars(values).items():
        if text is not None:
            namespace[name] = parse_constant(name, text, known[name])


def parse_constant(name, text, value):
    """text as the kind of the constant, whose value is an example of it."""
    kind = kind_of(name, value)
    try:
        if kind is bool:
            parsed = {"true": True, "false": False}[text.lower()]
        elif isinstance(kind, tuple):
            parsed = tuple(kind[0](part) for part in text.strip("()").strip(",").split(","))
        else:
            parsed = kind(text)
        if not is_kind(parsed, kind):
            raise ValueError
        return parsed
    except (KeyError, ValueError):
        raise Problem(f"--{name.lower()} is {text!r}, expected {kind_in_words[kind]}, such as {show(value)}")


def show(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def constant_comments(path):
    """The comment behind each constant's line, for --help."""
    text = Path(path).read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", text, re.MULTILINE)}


def check_least(namespace, **least):
    """Refuse constants of a wrong kind or below their least sensible values; names not there are passed over."""
    check_kinds(namespace)
    for name, limit in least.items():
        if name in namespace and not namespace[name] >= limit:
            raise Problem(f"{name} is {namespace[name]}, expected {limit} or more")


def choose_device(name):
    """ "auto" is the GPU where there is one, under torchrun the process's own; "cuda", "cuda:1", "cpu"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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
    """ "auto": bfloat16 where the hardware computes it, else float16 on a GPU, float32 on a CPU."""
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


class NamedFile:
    """A file open for writing whose errors tell its name: numpy's and torch.save's do not, or hide the disk's.

    digest: of hashlib, updated with every byte written.
    """

    def __init__(self, file, path, digest):
        self.file, self.path, self.digest, self.error = file, path, digest, None

    def write(self, data):
        try:
            n = self.file.write(data)
        except OSError as error:
            self.error = name_error(error, self.path)
            raise
        if self.digest:
            self.digest.update(data)
        return n

    def __getattr__(self, name):
        return getattr(self.file, name)


def name_error(error, path):
    if isinstance(error, OSError) and error.errno and not error.filename:
        error.filename = str(path)
    return error


@contextlib.contextmanager
def write_whole(path, digest=None):
    """A file that appears under its name complete or not at all: written aside, flushed, renamed.

    digest: of hashlib, updated with every byte as it is written, which must be from start to end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, named = path.with_name(f".{path.name}.partial"), None
    try:
        with open(aside, "wb") as file:
            named = NamedFile(file, path, digest)
            yield named
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        name_error(error, path)
        if named and named.error and error is not named.error:
            raise named.error  # the disk's own words
        raise


def flush_folder(folder):
    """Make a renaming reach the disk; Windows does so by itself and opens no folders."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(opened)
        os.close(opened)


folders_held = {}  # {folder: whether it is locked} of this process's sole_writer blocks


@contextlib.contextmanager
def sole_writer(folder, what):
    """No other process writes to folder while the block runs: it is refused at once. Within a process blocks nest.

    what: this script's name, for whoever is refused. The lock on folder/.lock is the kernel's, which frees
    it when the process ends, by kill -9 too; the file itself means nothing. Yields whether there is a lock:
    some shared file systems have none, where it says so and goes on. A new folder that stays empty, as the
    work was refused, is removed again.
    """
    folder, path, key = Path(folder), Path(folder) / ".lock", os.path.realpath(folder)
    if key in folders_held:
        yield folders_held[key]
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_locked(path)
    except PermissionError:
        raise Problem(f"{folder} cannot be written to; choose another folder or change its rights")
    with file or contextlib.nullcontext():
        if file is None:
            print(f"{folder} is on a file system without locks: see to it that nothing else writes there meanwhile")
        else:
            with contextlib.suppress(OSError):  # a full disk is told by what comes
                file.truncate(0)
                os.write(file.fileno(), f"{what}, process {os.getpid()} on {platform.node()}\n".encode())
        folders_held[key] = file is not None
        try:
            yield folders_held[key]
        finally:
            del folders_held[key]
            with contextlib.suppress(OSError):  # Windows removes no open file
                if is_new and {found.name for found in folder.iterdir()} <= {path.name}:
                    path.unlink(missing_ok=True)
                    folder.rmdir()


def open_locked(path):
    """The file, open and locked until it is closed; None where there are no locks."""
    while True:
        file = open(path, "a+b", buffering=0)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)  # away from the text, which stays readable
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()  # removed by the process before, with the folder that it had made
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ImportError) as error:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            other = os.read(file.fileno(), 200).decode(errors="replace").strip()
            file.close()
            number = getattr(error, "errno", None)
            if number in no_locks_here or isinstance(error, ImportError):
                return None
            if number not in lock_is_held:
                raise
            raise Problem(
                f"{path.parent} is being written to by {other or 'another process'}: wait until it ends, end it, or "
                "choose another folder"
            )


class PlainProgress:
    """What progress() gives where output is no terminal: used like tqdm, it prints a line every 30 s at most."""

    def __init__(self, iterable=None, desc="", total=None, *, unit="it", unit_scale=False, initial=0, disable=False,
                 file=None, clock=time.monotonic):  # fmt: skip
        self.iterable, self.n, self.file, self.clock, self.disable = iterable, initial, file, clock, disable
        total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.meter = dict(total=total, prefix=desc, unit=unit, unit_scale=unit_scale, initial=initial)
        self.meter["bar_format"] = "{desc}: {n_fmt} of {total_fmt} ({unit}), {rate_fmt}, {remaining} left{postfix}"
        self.start = self.told = clock()
        self.n_told, self.postfix = initial, ""

    def update(self, n=1):
        self.n += n
        if self.clock() - self.told >= seconds_between_lines:
            self.tell()

    def tell(self):
        self.told, self.n_told = self.clock(), self.n
        if not self.disable:
            line = tqdm.format_meter(self.n, elapsed=self.told - self.start, postfix=self.postfix, **self.meter)
            print(line, file=self.file, flush=True)

    def set_postfix_str(self, text=""):
        self.postfix = text

    def close(self):
        """Work that took more than one line says how it ended."""
        if self.told > self.start and self.n > self.n_told:
            self.tell()

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def progress(iterable=None, desc="", total=None, *, file=None, **options):
    """tqdm's bar on a terminal, plain lines elsewhere, such as in a cluster's log. Arguments are tqdm's."""
    file = file or sys.stderr
    kind = tqdm if file.isatty() else PlainProgress
    return kind(iterable, desc, total, file=file, **options)


def say(text, file=None):
    """Print a line above a bar that may be shown."""
    tqdm.write(text, file=file or sys.stdout)


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
    except MemoryError:
        raise
    except Exception as error:
        raise Problem(f"{path} cannot be read ({' '.join(str(error).split())[:200]}), expected {what}")
    return content if isinstance(content, dict) else {"format": type(content).__name__}


def is_subject_name(name):
    """Whether a folder's name can be a subject's: safe in paths, and no word that means several of them."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)) and name not in ("all", "group")


def check_format(content, path, kind, what):
    found = str(content.get("format"))
    if found != kind:
        before = " of an earlier version" if found.partition("-")[0] == kind.partition("-")[0] and found < kind else ""
        raise Problem(f"{path} has format {found}{before}, expected {kind}: {what}")
    return content


def fingerprint(*items):
    """16 hex digits of SHA-256 over arrays, tensors, bytes, strings, numbers, and lists or dicts of the latter.

    Every item goes in behind its type and length, so that no two lists of items give the same bytes.
    """
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, torch.Tensor):
            kind, item = f"{item.dtype} {tuple(item.shape)}", item.detach().cpu().contiguous()
            content = item.reshape(-1).view(torch.uint8).numpy().data
        elif isinstance(item, np.ndarray):
            kind = f"array {item.dtype.str} {item.shape}"
            content = np.ascontiguousarray(item).reshape(-1).view(np.uint8).data
        elif isinstance(item, bytes):
            kind, content = "bytes", item
        else:
            kind, content = type(item).__name__, repr(item).encode()
        for part in (kind.encode(), content):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()[:16]


def differences(before, now):
    """Lines "NAME: … there, … now" for what differs between two dicts of constants or other inputs."""
    return [f"{k}: {before.get(k)} there, {now.get(k)} now" for k in before | now if before.get(k) != now.get(k)]


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
    text = f"{peak_resident():.1f} GB" if resource else "not known on this system"
    if torch.cuda.is_available():
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


def peak_resident():
    """Peak resident memory of this process in GB."""
    with contextlib.suppress(OSError):  # on Linux ru_maxrss starts from the parent's
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
