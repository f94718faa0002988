"""Devices, and the processes that torchrun starts: joining them, agreeing, taking turns.

Without torchrun the same code runs in one process, and none of this talks to anybody.
"""

import functools
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def usable_device(name):
    """Return torch.device(name). ValueError: tensors cannot be put there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None


def amp_dtype(amp, device):
    """Return autocast's dtype for --amp, or None for float32.

    auto: on a GPU bf16 where it has it, else fp16; off on a CPU.
    """
    if amp == "auto":
        if device.type != "cuda":
            return None
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device, dtype):
    """Mixed precision with that dtype; None: float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@contextmanager
def processes(name):
    """Meet the other processes that torchrun started, if it did, and part from them at the end.

    Yields (device, rank, world). name "cuda" is each process's own GPU. CPU tensors go through
    gloo, a GPU's through nccl.
    RuntimeError, then or later: one process keeps the others waiting for ten minutes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = usable_device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://"))
        # after a restart, a store of its own: the old one holds the dead processes' addresses
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10)
        )
    try:
        yield device, rank, world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parallel(module, device, world):
    """Wrap a module so that its gradients are averaged over all processes (DDP)."""
    if world == 1:
        return module
    return DistributedDataParallel(module, [device.index] if device.type == "cuda" else None)


def synchronised(module, now):
    """A context in which backward averages the gradients over processes; not now: it waits."""
    if isinstance(module, DistributedDataParallel) and not now:
        return module.no_sync()
    return nullcontext()


def mean_over_processes(values, world):
    """Return the mean of a tensor over all processes."""
    if world > 1:
        dist.all_reduce(values)
    return values / world


def agree(value):
    """Return the largest of all processes' values: a number, or a CPU tensor elementwise.

    It goes through gloo, so that no GPU is waited for.
    """
    if not dist.is_initialized():
        return value
    largest = torch.as_tensor(value).clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest if isinstance(value, torch.Tensor) else largest.item()


@functools.cache
def patient_group():
    """A group whose processes wait for one another however long one takes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def in_turn(function):
    """Return function(), called by rank 0 first, then by one on each other machine, then the rest.

    What the first downloads, the others find. However long one takes, the others wait.
    """
    if not dist.is_initialized():
        return function()
    if dist.get_rank() == 0:
        turn = 0
    elif os.environ.get("LOCAL_RANK") == "0":
        turn = 1
    else:
        turn = 2
    for now in range(3):
        if now == turn:
            result = function()
        dist.barrier(patient_group())
    return result


def combine(rows, world):
    """Add up tensors of which each process has filled its share and left the others' rows 0."""
    if world > 1:
        dist.barrier(patient_group())
        dist.all_reduce(rows)
    return rows
