"""One process or several: the environment variables set by torchrun show which.

Without torchrun every function here does next to nothing. With it, rank 0 alone prints and writes.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun started; all but rank 0 print nothing."""
    if not launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(sys.stdout if rank() == 0 else null):
            yield
            dist.barrier()
    finally:
        dist.destroy_process_group()


def gather_rows(x):
    """x (n_layers, n, latent_dim) of every process -> all rows in the order of ranks, on each.

    Every process computes the same loss on the whole batch, and backward sums their gradients: average_gradients
    divides by the number of processes.
    """
    return torch.cat(all_gather(x.contiguous()), 1) if world_size() > 1 else x


def average_gradients(parameters):
    """Mean of the gradients over all processes."""
    for p in parameters:
        if world_size() > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world_size()


def gather_objects(item):
    """Every process's item, in the order of ranks, on each."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items
