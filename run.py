"""What surrounds the algorithm so that nothing is lost: the terminal, signals, the other processes, and the run's folder.

The folder holds config.json, log.jsonl, last.pth and epoch-NNNN.pth. Rank 0 alone writes it, each file beside its place and then moved there, so that a kill or
a full disk at any moment leaves the one before. A run goes on from last.pth as if nothing had happened.
"""

import atexit
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vit import load_checkpoint, usable_device

FORMAT = 2  # of last.pth
FREE = {  # what resuming may change; the rest is the configuration
    "steps", "compile", "recompute", "workers", "device", "output", "overwrite", "stop_on_collapse",
    "log_every", "save_every", "keep_every", "keep", "knn_every", "knn_bank",
}  # fmt: skip
NOTED = ("epochs", "world", "batch", "accumulate")  # may change too, if the global batch stays, and the run says so
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what batch systems and Ctrl-C send
RECEIVED = []  # those that have asked this process to stop
REASONS = {  # what torch says -> what that means here
    "allocate memory|out of memory": "out of memory: lower --batch (and raise --accumulate as much, for the same global batch)",
    "DataLoader worker": "a process that loads images was killed (often for its memory: lower --workers); the same command goes on from the last checkpoint",
    "peer|gloo|NCCL": "another process of this run died or hangs; the same command goes on from the last checkpoint",
}
_last_status = [0.0]


def clear_status():
    """Takes the status line off a terminal, so that something else can be printed."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def first_process():
    return os.environ.get("RANK", "0") == "0"


def say(line, file=None):
    """Prints a line; of several processes, the first alone does."""
    if first_process():
        clear_status()
        print(line, file=file, flush=True)


def status(line, every=10):
    """Progress of the first process: on a terminal one line in place; elsewhere a plain line, at most one each so many seconds."""
    if not first_process():
        return
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif time.monotonic() - _last_status[0] > every:
        _last_status[0] = time.monotonic()
        print(line, file=sys.stderr, flush=True)


def minutes(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def command(main, parse_args):
    """Runs main(parse_args()). What a user can get wrong ends in one line on stderr and a status that is not 0; a traceback is a defect of ours."""
    atexit.register(end_children)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_args()
        said = None
        main(args)
    except SystemExit as stop:
        if said and stop.code:  # argparse puts the whole usage before what is wrong
            print(said.getvalue().splitlines()[-1], "(--help lists the flags)", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        clear_status()
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError) as error:
        line = (str(error).splitlines() or [repr(error)])[-1]  # an error of a loader's process ends its traceback
        if isinstance(error, RuntimeError):
            line = next((reason for pattern, reason in REASONS.items() if re.search(pattern, f"{error} {error.__context__}")), None)
        if line is None:
            raise
        clear_status()
        sys.exit(f"{Path(sys.argv[0]).name}: {re.sub(r'^[A-Za-z]+Error: ', '', line)}")


def on_signal(number, frame):
    """The first signal lets the step end and a checkpoint be written; the second ends the process at once."""
    if RECEIVED:
        os._exit(128 + number)
    RECEIVED.append(number)


def listen():
    """From here on, signals end a step, not the process. Before a run has begun there is nothing to save."""
    RECEIVED.clear()
    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)


def end_children():
    """At the end of the process, whatever ended it: Python would ask the loader's processes, which ignore it, and then wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def outlive_signals(worker):
    """A loader's process ignores what a batch system or Ctrl-C sends to the whole group: it ends with the process that it serves."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def join(name):
    """This process's (device, rank, world), once it has met the others that torchrun has started, if it has: gloo for CPU tensors, nccl for a GPU's.

    name: cuda is each process's own GPU. RuntimeError, then or later: one process keeps the rest waiting for ten minutes.
    """
    rank, world, local_rank = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = usable_device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # else a restart may find the dead processes' addresses
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    return device, rank, world


def agree(value):
    """The largest of all processes' values (a number, or a CPU tensor elementwise). It goes through gloo, so that no GPU is waited for."""
    if not dist.is_initialized():
        return value
    largest = torch.as_tensor(value).clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest if isinstance(value, torch.Tensor) else largest.item()


@functools.cache
def patient_group():
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def in_turn(function):
    """function() in each process, rank 0 first, then one on each other machine, then the rest: what the first downloads, the others find.

    However long one takes, the others wait.
    """
    if not dist.is_initialized():
        return function()
    turn = 0 if dist.get_rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for now in range(3):
        if now == turn:
            result = function()
        dist.barrier(patient_group())
    return result


def write_whole(path, write):
    """write(file) to a file beside path, which then takes its place. OSError: path is as it was before."""
    beside = f"{path}.tmp"
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        if os.path.getsize(beside) != length:
            raise OSError(f"{os.path.getsize(beside)} of {length} bytes arrived")
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's error into its own
        if "DataLoader" in f"{error} {error.__context__}":  # the death of a loader's process may show anywhere
            raise
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise OSError(f"cannot write {path} (is the disk full?): {str(error).splitlines()[0]}; what was there before stands") from None
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)  # the move itself
    os.close(folder)


def read_log(path):
    """What has been logged: one dict a line. A line cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


class Run:
    """One training run: args, its folder args.output, and the state that a checkpoint holds.

    state: {name: module, optimizer or scaler}; center [k] goes with it. images: the training set. dtype: of autocast, or None.
    """

    def __init__(self, args, images, state, center, global_batch, dtype=None, rank=0, world=1):
        self.args, self.images, self.state, self.center, self.main = args, images, state, center, rank == 0
        self.bad, self.named, self.collapsed, self.start = set(), set(), 0, time.monotonic()
        self.attention = {}  # {step: what the teacher attends to in a few images}, for emergence.png
        self.config = {name: value for name, value in vars(args).items() if name not in FREE}
        self.config |= {"global_batch": global_batch, "precision": str(dtype), "world": world}
        if Path(args.data).is_dir():
            self.config["data"] = str(Path(args.data).resolve())
        self.log_path = args.output / "log.jsonl"

    def resume(self):
        """Loads last.pth, if there is one; the step to go on from. ValueError: it is of another configuration, with the differences."""
        path, first = self.args.output / "last.pth", 0
        anew = self.args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # a restart by torchrun goes on
        if path.exists() and not anew:
            checkpoint = load_checkpoint(path)
            if checkpoint.get("format") != FORMAT:
                raise ValueError(f"{path} is no run to resume, or of another version of this code: choose another --output, or --overwrite it")
            theirs = checkpoint["args"]
            changed = {name: f"{name} {theirs.get(name)} -> {value}" for name, value in self.config.items() if theirs.get(name) != value}
            differ = [text for name, text in changed.items() if name not in (*NOTED, "amp")]  # amp shows in the precision
            if differ:
                raise ValueError(f"{path} was made with another configuration ({', '.join(differ)}): choose another --output, or --overwrite it")
            for name, part in self.state.items():
                part.load_state_dict(checkpoint[name])
            self.center.copy_(checkpoint["center"])
            first, self.attention = checkpoint["step"], checkpoint.get("attention", {})
            noted = [text for name, text in changed.items() if name in NOTED]
            say(f"resumed from {path} at step {first}" + (f", with {', '.join(noted)}" if noted else ""))
            if "epochs" in changed:
                say("note: the schedules follow the new --epochs from here on")
        if agree(first) != -agree(-first):
            raise ValueError(f"the processes find different checkpoints at {path}: --output must lie on a file system that all machines share")
        if self.main:
            self.args.output.mkdir(parents=True, exist_ok=True)
            for old in [path, *self.args.output.glob("epoch-*.pth")] if anew else []:
                old.unlink(missing_ok=True)
            write_whole(self.args.output / "config.json", lambda file: file.write(json.dumps(self.config, indent=1).encode() + b"\n"))
            kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= first] if first else []  # nothing from after the checkpoint
            write_whole(self.log_path, lambda file: file.write("".join(kept).encode()))
        return first

    def lines(self):
        return read_log(self.log_path)

    def log(self, **values):
        if self.main:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def save(self, name, step, epoch):
        """Writes a checkpoint; of those kept at an interval, the newest --keep stay."""
        if not self.main:
            return
        checkpoint = {"format": FORMAT, "step": step, "epoch": epoch, "args": self.config, "classes": self.images.classes, "center": self.center}
        checkpoint |= {"attention": self.attention}
        checkpoint |= {name: part.state_dict() for name, part in self.state.items()}
        write_whole(self.args.output / name, lambda file: torch.save(checkpoint, file))
        for old in sorted(self.args.output.glob("epoch-*.pth"))[: -self.args.keep] if self.args.keep else []:
            old.unlink()

    def stop(self):
        """The signal that has asked some process to stop, the same in all of them; 0 if none has."""
        return agree(RECEIVED[0] if RECEIVED else 0)

    def check_finite(self, step, loss, norms, scale):
        """The steps among the last ones whose gradient was not finite, which the scaler has skipped in all processes alike: fp16 has some.

        ValueError: the loss is not finite, or the scale, which each halves, has fallen below 1: in fp16 after many, else at the first.
        """
        first = step - len(norms) + 1
        bad = [first + i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        if not math.isfinite(loss) or scale < 1:
            where = f"the gradient was not finite at step {bad[0]}" if bad else f"the loss is {loss} at step {step}"
            raise ValueError(f"{where}, and no step was taken from it: the checkpoint in {self.args.output} is from before; "
                             "--init a run from it in another --output, with a lower --lr, a smaller --clip, a higher --teacher_temp, or --amp off")  # fmt: skip
        return bad

    def check_images(self):
        """Names the images found bad since the last time, by any process. ValueError: more than 1 % of all are."""
        if not agree(len(self.bad - self.named)):
            return
        marks = torch.zeros(len(self.images), dtype=torch.uint8)
        marks[list(self.bad)] = 1
        self.bad = set(agree(marks).nonzero().flatten().tolist())
        for index in sorted(self.bad - self.named):
            say(f"cannot read {self.images.name(index)!r}: its place is taken by the next image", sys.stderr)
        self.named |= self.bad
        if len(self.bad) > 0.01 * len(self.images):
            raise ValueError(f"{len(self.bad)} of {len(self.images)} images cannot be read, more than 1 %: mend or remove them")

    def watch(self, epoch, entropy, mean_entropy, kl, patience=20):
        """Warns when the output has been collapsed for so many lines of the log after the warm-up (section 5.3, Figure 7). ValueError: --stop_on_collapse."""
        uniform = math.log(self.args.out_dim)
        kind = "uniform" if entropy > 0.99 * uniform and kl < 0.01 * uniform else "one-dimensional" if mean_entropy < 0.01 * uniform else None
        self.collapsed = self.collapsed + 1 if kind and epoch > self.args.warmup_epochs else 0
        if self.collapsed == patience:
            remedy = "lower --teacher_temp, or raise --lr" if kind == "uniform" else "raise --teacher_temp, lower --lr, or check that --center_momentum is below 1"
            message = f"the output has collapsed to the {kind} solution: {remedy}"
            if self.args.stop_on_collapse:
                raise ValueError(message)
            say(f"warning: {message}")

    def progress(self, done, first, last, epoch, loss, entropy):
        rate = (done - first) / (time.monotonic() - self.start)
        speed = f"{rate * self.config['global_batch']:.0f} images/s, {minutes((last - done) / rate)} left"
        status(f"epoch {epoch:.2f}/{self.args.epochs}  step {done}  loss {loss:.3f}  entropy {entropy:.3f}  KL {loss - entropy:.3f}  {speed}")
