"""One process or many: what torchrun starts, told apart by the environment alone.

Without torchrun every function here does what one process needs, which is mostly nothing. With it the
processes are numbered by rank, and rank 0 alone prints and writes. Tensors on a CPU go through gloo, those on
GPUs through NCCL.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from common import Problem


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this process prints and writes."""
    return rank() == 0


def is_first_of_machine():
    return not launched() or int(os.environ["LOCAL_RANK"]) == 0


@contextlib.contextmanager
def joined(wanted=True):
    """Joins the processes that torchrun started, for as long as the block takes. Those after the first print
    nothing. A Problem of one of them, or its end, ends all: the first to know says so, once.

    wanted: whether the script can run in many; else that is a Problem.
    """
    if not launched():
        yield
        return
    if not wanted:
        name = os.path.basename(sys.argv[0])
        if os.environ["RANK"] != "0":
            sys.exit(1)
        raise Problem(f"{name} runs in one process, not under torchrun: python {name}")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    silence = contextlib.nullcontext()
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore(attempt, store), rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
        if not is_first():
            silence = contextlib.redirect_stdout(open(os.devnull, "w"))
        with silence:
            yield
            dist.barrier()  # nobody leaves while another still needs an answer
    except Problem as problem:
        if told_already(store, attempt):
            sys.exit(1)
        raise problem
    except (RuntimeError, MemoryError, OSError) as error:
        if told_already(store, attempt):
            sys.exit(1)
        if not is_lost_connection(error):
            raise
        raise Problem(
            "another process ended or can't be reached, so this one ends too; the same command continues after the "
            f"last validation ({' '.join(str(error).split())[:120]})"
        )
    else:
        dist.destroy_process_group()


def told_already(store, attempt):
    """Whether another process has told the user why all end."""
    with contextlib.suppress(RuntimeError):
        return store.add(f"{attempt} told", 1) > 1
    return False


def is_lost_connection(error):
    """gloo and NCCL have no error class of their own for a peer that is gone."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "NCCL",
        "gloo",
        "Broken pipe",
        "Connection refused",
    )
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


# ---- what they exchange ------------------------------------------------------------------------


class GatherRows(torch.autograd.Function):
    """x (n_layers, n, latent_dim) of every process -> that of all, rows in the order of ranks, on each.

    Backward needs no exchange: every process computes the same loss on the whole batch, so each has the whole
    gradient and keeps its own rows, times the number of processes, as average_gradients() divides by it.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(world_size(), 1)[rank()] * world_size()


def gather_rows(x):
    return GatherRows.apply(x) if world_size() > 1 else x


def average_gradients(parameters):
    """Mean of the gradients over the processes, in one flat exchange."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]  # what no loss depends on has none anywhere
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def highest(number):
    """The highest of the processes' whole numbers, known to all."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def own_part(n):
    """(start, stop) of this process's share of n items, as even as can be."""
    return n * rank() // world_size(), n * (rank() + 1) // world_size()


def gather_parts(x, n):
    """x (own share of n, …) as own_part() cut it -> (n, …) on every process."""
    if world_size() == 1:
        return x
    sizes = [n * (r + 1) // world_size() - n * r // world_size() for r in range(world_size())]
    padded = torch.zeros(max(sizes), *x.shape[1:], dtype=x.dtype, device=x.device)
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def gather_objects(item):
    """The processes' items, in the order of ranks, on each."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_first(item):
    """The first process's item, on each."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier():
    if world_size() > 1:
        dist.barrier()
