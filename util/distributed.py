"""Devices, and the processes that torchrun starts; without it all of this is one process's."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from util.misc import first_line


def amp_dtype(amp, device):
    """Return autocast's dtype for --amp, or None for float32.

    auto: on a GPU bf16 where it has it, else fp16; off on a CPU.
    """
    if amp == "auto" and device.type != "cuda":
        return None
    if amp == "auto":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def grad_scaler(device, dtype):
    """Return the scaler of gradients for autocast's dtype.

    It is there in every precision, since it skips a step whose gradient is not finite without
    making the host wait; in fp16 alone it scales.
    """
    if dtype is torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def usable_device(name):
    """Return torch.device(name). ValueError: tensors cannot be put there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from None


@contextmanager
def processes(name):
    """Join the other processes that torchrun started, if it did: yield (device, rank, world).

    name: --device; "cuda" is each process's own GPU. CPU tensors go through gloo, a GPU's through
    nccl. One process may keep the others waiting for two hours, as for a download.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = usable_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        # a store for each restart by torchrun: the old one has the dead processes' addresses
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        timeout = timedelta(hours=2)
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
    yield device, rank, world
    if world > 1:
        dist.barrier()  # torch 2.6 hangs if one parts while another still works
        dist.destroy_process_group()


def all_reduce_max(value):
    """Return the largest of all processes' values: a number, or a CPU tensor elementwise."""
    if not dist.is_initialized():
        return value
    largest = torch.as_tensor(value).clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest if isinstance(value, torch.Tensor) else largest.item()


def all_reduce_sum(rows):
    """Add up a tensor over the processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(rows)
    return rows


def rank0_first(function):
    """Return function(), called by rank 0 first: what it downloads, the others find."""
    if not dist.is_initialized():
        return function()
    if dist.get_rank() == 0:
        result = function()
    dist.barrier()
    return result if dist.get_rank() == 0 else function()
