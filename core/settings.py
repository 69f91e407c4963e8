"""Constants on the command line, one message per error, and the choice of device and precision.

A script's settings are annotated UPPER_CASE constants at its top; people edit them there, or override them for one
run by name: `--steps 200`. The annotation says the type, the comment behind it is the help text.
"""

import argparse
import ast
import difflib
import os
import platform
import re
import sys
import time
import typing
from pathlib import Path

import numpy as np
import timm
import torch
from tqdm import tqdm

from core import distributed
from model import UserError


def constants(namespace):
    """{NAME: value} of a script's annotated constants. namespace: its globals(). Raises UserError on a wrong type."""
    values = {}
    for name, kind in namespace["__annotations__"].items():
        values[name] = check_type(name, namespace[name], kind)
    return values


def check_type(name, value, kind):
    """value, if it is of its annotated type (int counts as float); else UserError."""
    inner = typing.get_args(kind)
    if inner:
        right = isinstance(value, tuple) and all(is_a(part, inner[0]) for part in value)
    else:
        right = is_a(value, kind)
    if not right:
        raise UserError(f"{name} is {value!r}, expected {describe(kind)}.")
    return value


def is_a(value, kind):
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def describe(kind):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    inner = typing.get_args(kind)
    return f"values separated by commas, each {names[inner[0]]}" if inner else names[kind]


def parse(name, text, kind):
    """The text of a command-line option as the constant's type."""
    inner = typing.get_args(kind)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if inner:
            return tuple(inner[0](part.strip()) for part in text.strip("()").split(",") if part.strip())
        return check_type(name, kind(text), kind)
    except (KeyError, ValueError):
        raise UserError(f"--{name.lower()} is {text!r}, expected {describe(kind)}.")


def override(namespace, arguments):
    """Set a script's constants from the command line."""
    values = constants(namespace)
    kinds, comments = namespace["__annotations__"], read_comments(namespace["__file__"])
    parser = argparse.ArgumentParser(
        description=namespace["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, value in values.items():
        options = {f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"}
        help_text = f"{comments.get(name, '')} (default: {show(value)})".replace("%", "%%")
        bare = {"nargs": "?", "const": "true"} if kinds[name] is bool else {}
        several = {"nargs": "+"} if name == "IMAGES" else {}  # a shell expands *.jpg
        parser.add_argument(*sorted(options), dest=name, metavar="VALUE", help=help_text, **bare, **several)

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise UserError(f"unknown option {unknown[0]}" + (f", did you mean {near[0]}?" if near else "; see --help."))
    for name, text in vars(chosen).items():
        if text is not None:
            namespace[name] = parse(name, ",".join(text) if isinstance(text, list) else text, kinds[name])


def show(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def read_comments(path):
    """{NAME: comment} of a script's constants."""
    source = Path(path).read_text(encoding="utf-8")
    lines = source.splitlines()
    comments = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            comments[node.target.id] = lines[node.end_lineno - 1].partition("  # ")[2]
    return comments


def run(main, namespace, many=False):
    """Run a script's main() from the command line. many: whether torchrun may start it in several processes."""
    start = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # a job's log can be followed
    script = Path(sys.argv[0]).name
    if distributed.launched() and not many:
        sys.exit(f"error: {script} runs in one process: start it without torchrun.")
    try:
        with distributed.process_group():
            override(namespace, sys.argv[1:])
            main()
            print(f"{script}: {time.perf_counter() - start:.0f} s, peak memory {peak_memory()}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except torch.OutOfMemoryError as error:
        hint = " Lower MICRO_BATCH or BATCH_SIZE." if "BATCH_SIZE" in namespace else ""
        sys.exit(f"error: the GPU is out of memory.{hint} ({str(error).splitlines()[0]})")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")


def peak_memory():
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{peak / 1e9:.1f} GB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"
    return text


def choose_device(name):
    """ "auto" takes a GPU where there is one; under torchrun each process its own."""
    available = torch.cuda.is_available()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"DEVICE is {name}, expected auto, cpu, cuda or cuda:0, cuda:1 …")
    if name == "cpu" or name == "auto" and not available:
        return torch.device("cpu")
    if not available:
        raise UserError(f"DEVICE is {name}, but torch {torch.__version__} sees no GPU.")
    index = int(name.partition(":")[2] or 0)
    if distributed.launched():
        if ":" in name:
            raise UserError(f"DEVICE is {name}: under torchrun use auto, every process takes a GPU of its own.")
        index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no GPU {index}; torch sees {torch.cuda.device_count()}.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_precision(name, device):
    """ "auto": bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU."""
    precisions = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name in precisions:
        return precisions[name]
    if name != "auto":
        raise UserError(f"PRECISION is {name}, expected auto, float32, float16 or bfloat16.")
    if device.type == "cuda":  # a V100 emulates bfloat16: ask without emulation
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__}


def progress(iterable=None, **options):
    """tqdm; where output is no terminal, one line every 30 s."""
    if not sys.stderr.isatty():
        options |= {"mininterval": 30, "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]\n"}
    return tqdm(iterable, disable=not distributed.is_first(), **options)
