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

from terminal import first_line, say

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def usable_device(name):
    """Return torch.device(name). ValueError: tensors cannot be put there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from None


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


def allow_open_files(needed=256):
    """Raise the limit on open files, which loading processes need, as far as is allowed.

    ValueError: that is not far enough; they would wait for one another in silence.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise ValueError(f"only {soft} files may be open at once: allow {needed} (ulimit -n)")


HELD = []  # descriptors of the folders that this process holds


def hold_folder(folder):
    """Hold a folder, which is made if need be, until let_go() or this process's end.

    The system lets go of it when the process ends, whatever ends it. ValueError: another process
    holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    HELD.append(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {folder}: wait for it, or choose another --output"
        ) from None
    except OSError:  # a file system without such locks
        pass


def let_go():
    """Let go of the folders that are held. A child does so too: it may outlive this process."""
    while HELD:
        os.close(HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


@contextmanager
def processes(name):
    """Meet the other processes that torchrun started, if it did, and part from them at the end.

    Yields (device, rank, world). name "cuda" is each process's own GPU. CPU tensors go through
    gloo, a GPU's through nccl.
    RuntimeError, then or later: one process keeps the others waiting for ten minutes.
    """
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in os.environ:
        say("note: this is one process on its own; to share the work, start it with torchrun")
    allow_open_files()
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
        part()
    finally:
        let_go()


def parallel(module, device, world):
    """Wrap a module so that its gradients are averaged over all processes (DDP)."""
    if world == 1:
        return module
    return DistributedDataParallel(module, [device.index] if device.type == "cuda" else None)


def synchronised(module, now):
    """A context in which backward averages the gradients over processes, if it is to do so now."""
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


def meet():
    """Wait for all processes: torch 2.6 hangs if one parts while another still works."""
    if dist.is_initialized():
        dist.barrier(patient_group())


def part():
    """Leave the other processes, once all have come here.

    On an error nobody parts: on GPUs parting waits for the others, who wait for this one.
    """
    meet()
    if dist.is_initialized():
        dist.destroy_process_group()


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
        meet()
    return result


def combine(rows, world):
    """Add up tensors of which each process has filled its share and left the others' rows 0."""
    if world > 1:
        dist.barrier(patient_group())
        dist.all_reduce(rows)
    return rows
