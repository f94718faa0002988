"""What the commands that evaluate a checkpoint share: flags, opening it, and evaluate.jsonl."""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from backbone import require_vit, untrained
from checkpoint import RELEASED, load_backbone
from distributed import amp_dtype, in_turn, processes, usable_device
from features import Extraction
from recipe import add_amp_flag, add_device_flag, add_network_flags, usable_cores
from terminal import first_process, json_line, say


class Subject(NamedTuple):
    """What is evaluated, and where."""

    backbone: nn.Module | None
    data: str  # a folder or a data set's name
    folder: Path  # for evaluate.jsonl and other results
    device: torch.device
    rank: int
    world: int

    def networks(self, beside):
        """{name: network}: the trained one and, if asked for, an untrained one beside it."""
        networks = {"trained": self.backbone}
        if beside:
            networks["untrained"] = untrained(self.backbone)
        return networks


def add_flags(parser, nargs=None):
    """Add the flags that all evaluating commands have. nargs "?": no checkpoint is needed."""
    names = ", ".join(RELEASED)
    parser.add_argument("checkpoint", nargs=nargs,
                        help=f"a checkpoint, or released weights: {names}")  # fmt: skip
    parser.add_argument("--data", help="a folder or a data set's name "
                        "(default: what the checkpoint was trained on)")  # fmt: skip
    add_network_flags(parser)
    parser.add_argument("--output", type=Path,
                        help="folder for the results (default: the checkpoint's)")  # fmt: skip
    add_device_flag(parser)


def add_protocol(commands, name, text):
    """Add a command that extracts features, with the flags of all these: its add_argument."""
    parser = commands.add_parser(name, help=text)
    add_flags(parser)
    add = parser.add_argument
    add("--cache", action="store_true",
        help="keep features in the output folder, and read those that are there")  # fmt: skip
    add_amp_flag(parser)
    add("--batch", type=int, default=256, help="images a process at a time")
    workers = min(2, usable_cores())
    add("--workers", type=int, default=workers, help="processes that read images")
    return add


def extraction(args, subject):
    """Return the Extraction that the flags ask for."""
    return Extraction(
        subject.device,
        args.batch,
        args.workers,
        amp_dtype(args.amp, subject.device),
        rank=subject.rank,
        world=subject.world,
        cache=subject.folder if args.cache else None,
    )


def check_workers(args):
    """ValueError: --workers is negative."""
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers} must not be negative")


def check_positive(args, *flags):
    """ValueError: a flag's value, or one of its values, is not a positive number.

    A flag that the command lacks is passed over.
    """
    for flag in flags:
        value = getattr(args, flag, None)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(0 < v < math.inf for v in values):
            raise ValueError(f"--{flag} {value} must be positive")


def run_protocol(args, protocol):
    """Call protocol(args, subject) in each process, and add its figures to evaluate.jsonl."""
    with processes(args.device) as (device, rank, world):
        start = time.monotonic()
        subject = open_subject(args, device, rank, world)
        figures = protocol(args, subject)
        line = {
            "checkpoint": args.checkpoint,
            "network": args.network,
            "data": subject.data,
            "protocol": args.protocol,
            **figures,
            "seconds": round(time.monotonic() - start, 1),
        }
        if first_process():
            with open(subject.folder / "evaluate.jsonl", "a") as file:
                file.write(json_line(line))


def load_vit(args):
    """Load the checkpoint's ViT onto --device, and say what it is. ValueError: it is a convnet."""
    loaded = load_backbone(args.checkpoint, args.network, args.heads)
    backbone = require_vit(loaded.backbone, args.checkpoint).to(usable_device(args.device))
    say(loaded.description)
    return backbone


def open_subject(args, device, rank, world):
    """Load the checkpoint, if one is given, and say what it is.

    ValueError: it does not load or say what it was trained on, or the folder cannot be written.
    """
    backbone = None
    data = args.data
    if args.checkpoint:
        loaded = in_turn(lambda: load_backbone(args.checkpoint, args.network, args.heads))
        backbone = loaded.backbone.to(device)
        data = data or loaded.trained_with.get("data")
        if data is None:
            raise ValueError(
                f"{args.checkpoint!r} does not say what it was trained on: give --data"
            )
    if args.output:
        folder = args.output
        folder.mkdir(parents=True, exist_ok=True)
    elif args.checkpoint is None or args.checkpoint in RELEASED:
        folder = Path(".")
    else:
        folder = Path(args.checkpoint).parent
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: choose another --output")
    if args.checkpoint:
        say(loaded.description)
    return Subject(backbone, data, folder, device, rank, world)
