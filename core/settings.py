"""Constants on the command line, one message per error, and the choice of device and precision.

A script's settings are annotated UPPER_CASE constants at its top; people edit them there, or override them for one
run by name: `--steps 200`. The annotation gives the type, the comment behind it is the help text.
"""

import argparse
import difflib
import os
import platform
import re
import resource
import sys
import time
import typing
from pathlib import Path

import filelock
import timm
import torch
from tqdm import tqdm

from core import distributed
from core.files import load_torch
from model import UserError


def owners(namespace):
    """{NAME: globals() of the script that owns it} of a script's constants. namespace: its globals().

    SHARED = script, "NAME NAME …" lists constants of another script that this one uses, too: they are set there.
    """
    script, names = namespace.get("SHARED", (None, ""))
    shared = {name: owners(vars(script))[name] for name in names.split()}
    return dict.fromkeys(namespace["__annotations__"], namespace) | shared


def constants(namespace):
    """{NAME: value} of a script's constants."""
    return {name: owner[name] for name, owner in owners(namespace).items()}


def converter(kind):
    """The function that turns an option's text into the constant's type, or raises ValueError."""
    inner = typing.get_args(kind)

    def convert(text):
        if inner:
            return tuple(inner[0](part) for part in text.strip("()").split(",") if part.strip())
        return bool(["false", "true"].index(text.lower())) if kind is bool else kind(text)

    convert.__name__ = getattr(inner[0] if inner else kind, "__name__", "")  # argparse names it in its error
    return convert


def override(namespace, arguments):
    """Set a script's constants from the command line. Raises UserError for unknown options and wrong types."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=namespace["__doc__"], formatter_class=layout, allow_abbrev=False)
    for name, owner in owners(namespace).items():
        kind, value, source = owner["__annotations__"][name], owner[name], Path(owner["__file__"]).read_text("utf-8")
        default = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        default = default.lower() if kind is bool else default
        comment = re.search(rf"^{name}:[^#\n]*#? ?(.*)$", source, re.M)[1]
        help_text = f"{comment} (default: {default})".replace("%", "%%")
        number = {"nargs": "?", "const": "true"} if kind is bool else {}
        number = {"nargs": "+"} if name.startswith("IMAGES") else number  # a shell expands *.jpg
        number |= {"dest": name, "metavar": "VALUE", "type": converter(kind), "help": help_text}
        parser.add_argument(*sorted({f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"}), **number)

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise UserError(f"unknown option {unknown[0]}" + (f", did you mean {near[0]}?" if near else "; see --help."))
    for name, value in vars(chosen).items():
        if value is not None:
            owners(namespace)[name][name] = ",".join(value) if isinstance(value, list) else value


def check_same(path, before, now):
    """UserError if results in path were made with other settings: {name: value} recorded before, and of now."""
    names = [name for name in now | before if before.get(name) != now.get(name)]
    if names:
        listed = "; ".join(f"{name}: {before.get(name)} before, {now.get(name)} now" for name in names)
        raise UserError(f"{path} was made with different settings ({listed}): use another folder or --overwrite true.")


def is_finished(path, format, made_with, overwrite):
    """Whether a file of save_torch() holds the result for these settings; UserError if it was made with others."""
    if overwrite or not path.exists():
        return False
    check_same(path, load_torch(path, format, "this script with --overwrite true")["made_with"], made_with)
    print(f"{path} is finished already; --overwrite true makes it again")
    return True


def run(main, namespace, many=False):
    """Run a script's main() from the command line. many: whether torchrun may start it in several processes."""
    start = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # a job's log can be followed
    script = Path(sys.argv[0]).name
    try:
        if distributed.launched() and not many:
            raise UserError(f"{script} runs in one process: start it without torchrun.")
        with distributed.process_group():
            override(namespace, sys.argv[1:])
            main()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
            print(f"{script}: {time.perf_counter() - start:.0f} s, peak memory {memory:.1f} GB")
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: the GPU is out of memory: lower MICRO_BATCH or BATCH_SIZE. ({str(error).splitlines()[0]})")
    except filelock.Timeout as error:
        sys.exit(f"error: another process is writing to {Path(error.lock_file).parent}.")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")


def choose_device(name):
    """ "auto" uses a GPU if there is one; under torchrun each process uses its own."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not re.fullmatch(r"auto|cuda(:\d+)?", name) or distributed.launched() and name != "auto":
        raise UserError(f"DEVICE is {name}, expected auto, cpu, cuda or cuda:0, cuda:1 …; under torchrun auto or cpu.")
    index = int(os.environ["LOCAL_RANK"] if distributed.launched() else name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"DEVICE is {name}, but torch sees {torch.cuda.device_count()} GPUs.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_precision(name, device):
    """ "auto": bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU."""
    if name in ("float32", "float16", "bfloat16"):
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f"PRECISION is {name}, expected auto, float32, float16 or bfloat16.")
    if device.type == "cuda":  # a V100 emulates bfloat16: ask without emulation
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__}


def progress(iterable=None, **options):
    """tqdm; where output is not a terminal, one line every 30 s."""
    if not sys.stderr.isatty():
        options |= {"mininterval": 30, "delay": 30}
        options["bar_format"] = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]\n"
    return tqdm(iterable, disable=distributed.rank() > 0, **options)
