"""Every hyper-parameter with the paper's value and ours, the command line, and the schedules.

The paper's values are section 3.2's ("Implementation details"); where the reference code's defaults
differ or say more (tau_t, clipping, the frozen last layer), they are the code's. The laptop's
recipe goes with vit_micro and the built-in images: docs/laptop.md says why it is so. In
docs/tour.md: stops 7 and 12.
"""

import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from vit import ARCHITECTURES

RECIPE = {  # flag: (the paper's value, the laptop's, what it is)
    # network
    "patch": (16, 4, "side of a patch in pixels"),
    "drop_path": (0.1, 0.0, "stochastic depth in the student's last block"),
    # multi-crop
    "global_size": (224, 32, "side of the two global crops"),
    "local_size": (96, 16, "side of the local crops"),
    "local_crops": (8, 4, "number of local crops"),
    "global_scale": ((0.4, 1.0), (0.4, 1.0), "area of a global crop, as a share of the image's"),
    "local_scale": ((0.05, 0.4), (0.1, 0.4), "area of a local crop"),
    "blur_sigma": (2.0, 2.0, "largest sigma of the blur, in pixels"),
    # head
    "out_dim": (65536, 256, "K, the outputs of the head"),
    "hidden_dim": (2048, 256, "width of the head's hidden layers"),
    "bottleneck_dim": (256, 64, "width of the head's bottleneck"),
    "norm_last_layer": (True, True, "keep g of the last layer at 1 (300-epoch runs: do not)"),
    # teacher and loss
    "student_temp": (0.1, 0.1, "tau_s"),
    "teacher_temp": (0.04, 0.02, "tau_t after its warm-up (the 300-epoch runs: 0.07)"),
    "warmup_teacher_temp": (0.04, 0.02, "tau_t at the start"),
    "warmup_teacher_temp_epochs": (30, 0, "epochs over which tau_t rises"),
    "center_momentum": (0.9, 0.9, "m of Eq. 4"),
    "momentum": (0.996, 0.99, "the teacher's lambda at the start; it ends at 1"),
    # optimisation
    "epochs": (100, 12, "passes over the data"),
    "batch": (64, 32, "images a process a step"),
    "accumulate": (1, 1, "batches a step, for a larger global batch on the same memory"),
    "optimizer": ("adamw", "adamw", "adamw or sgd"),
    "lr": (5e-4, 1.6e-2, "peak learning rate for a global batch of 256; scales with the batch"),
    "min_lr": (1e-6, 1e-5, "learning rate at the end"),
    "warmup_epochs": (10, 1, "epochs over which the learning rate rises"),
    "weight_decay": (0.04, 0.04, "weight decay at the start"),
    "weight_decay_end": (0.4, 0.04, "weight decay at the end"),
    "clip": (3.0, 3.0, "largest norm of the gradient, 0 for any"),
    "freeze_last_layer": (1, 0, "epochs during which the head's last layer stays as it is"),
}
PHOTOS = {  # where the recipe for photographs on a small machine differs from the laptop's
    "patch": 8,
    "global_size": 48,
    "local_size": 24,
    "blur_sigma": 0.4,  # 2 pixels of 224
    "out_dim": 1024,
    "hidden_dim": 512,
    "bottleneck_dim": 128,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 5,
    "epochs": None,  # as with_length() says
    "batch": 64,
    "lr": 4e-3,
}
PHOTOS_SEEN = 640_000  # images in all that this recipe trains on, an image once an epoch
MOST_EPOCHS = 250  # and no more epochs than this
RESNET = {  # where the paper's recipe for ResNet-50 differs
    "optimizer": "sgd",
    "lr": 0.03,
    "weight_decay": 1e-4,
    "weight_decay_end": 1e-4,
    "drop_path": 0.0,
    "global_scale": (0.14, 1.0),
    "local_scale": (0.05, 0.14),
}
BOUNDS = (  # flags, the least and the most that make sense
    ("patch global_size local_size hidden_dim bottleneck_dim epochs batch accumulate", 1, 1e9),
    ("log_every knn_bank", 1, 1e9),
    ("local_crops warmup_epochs warmup_teacher_temp_epochs freeze_last_layer", 0, 1e9),
    ("workers steps save_every keep_every keep knn_every", 0, 1e9),
    ("lr min_lr weight_decay weight_decay_end clip", 0, 1e9),
    ("student_temp teacher_temp warmup_teacher_temp", 1e-3, 1),
    ("momentum center_momentum", 0, 1),
    ("drop_path", 0, 0.99),
    ("blur_sigma", 1e-3, 2),
    ("out_dim", 2, 1e9),
)
SMALL = ("vit_micro", "vit_mini")  # whose recipes are for a laptop's CPU
GROUPS = {  # how summary() arranges the configuration
    "network": "arch patch drop_path init",
    "crops": "global_size global_scale local_size local_scale local_crops blur_sigma",
    "head": "out_dim hidden_dim bottleneck_dim norm_last_layer freeze_last_layer",
    "teacher": "momentum centering center_momentum no_sharpening",
    "softmax": "student_temp teacher_temp warmup_teacher_temp warmup_teacher_temp_epochs",
    "optimiser": "optimizer lr min_lr warmup_epochs weight_decay weight_decay_end clip",
    "length": "data epochs steps batch accumulate seed",
    "machine": "device amp workers output",
}


# ---- the schedules: pure functions of the step ----


class Schedule(NamedTuple):
    """What changes from step to step: the four schedules, and whether the last layer is frozen."""

    lr: float
    weight_decay: float
    momentum: float  # the teacher's lambda
    teacher_temp: float  # tau_t
    frozen: bool  # whether the head's last layer stays as it is


def cosine(progress, start, end):
    """Go from start at progress 0 to end at 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(epoch, peak, end, warmup_epochs, epochs):
    """Rise linearly to the peak over the warm-up, then fall along a cosine."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return cosine((epoch - warmup_epochs) / (epochs - warmup_epochs), peak, end)


def teacher_temperature(epoch, start, end, warmup_epochs):
    """Go linearly from start to end over the warm-up, then stay (the paper: 0.04 -> 0.07 in 30)."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / warmup_epochs


def schedules(step, args, steps_per_epoch, global_batch):
    """Return the Schedule of a step (section 3.2, "Implementation details")."""
    epoch = step / steps_per_epoch  # a fraction
    progress = epoch / args.epochs
    peak = args.lr * global_batch / 256
    teacher_temp = teacher_temperature(
        epoch, args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs
    )
    return Schedule(
        lr=learning_rate(epoch, peak, args.min_lr, args.warmup_epochs, args.epochs),
        weight_decay=cosine(progress, args.weight_decay, args.weight_decay_end),
        momentum=cosine(progress, args.momentum, 1.0),
        teacher_temp=args.student_temp if args.no_sharpening else teacher_temp,
        frozen=epoch < args.freeze_last_layer,
    )


# ---- the command line ----


def parse_args(description, argv=None):
    """Resolve train.py's command line: what it leaves open comes from the architecture's recipe."""
    args = build_parser(description, argv).parse_args(argv)
    args.global_scale, args.local_scale = list(args.global_scale), list(args.local_scale)
    if args.knn_bank is None:
        args.knn_bank = 2_000 if args.arch in SMALL else 10_000
    if args.workers is None:
        args.workers = default_workers(args.device)
    if args.output is None:
        args.output = default_output(args)
    return args


def build_parser(description, argv=None):
    """Build train.py's parser; its defaults are those of the architecture that argv names.

    That, left open, follows from the data.
    """
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--arch")
    which.add_argument("--data", default="shapes")
    known = which.parse_known_args(argv)[0]
    arch = known.arch or default_arch(known.data)

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    add_hyper_parameters(parser, arch)
    add_run_flags(parser, arch)
    return parser


def add_hyper_parameters(parser, arch):
    """Add RECIPE's flags, with the defaults that go with the architecture."""
    for name, (paper, laptop, text) in RECIPE.items():
        if arch == "vit_micro":
            default = laptop
        elif arch == "vit_mini":
            default = PHOTOS.get(name, laptop)
        elif arch == "resnet50":
            default = RESNET.get(name, paper)
        else:
            default = paper
        if isinstance(paper, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(paper, tuple):
            kind = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
        else:
            kind = {"type": type(paper)}
        photos = PHOTOS.get(name, laptop)
        if photos is None:
            photos = f"{PHOTOS_SEEN} images in all, {MOST_EPOCHS} at most"
        text = f"{text} (paper {shown(paper)}, laptop {shown(laptop)}, photos {shown(photos)})"
        parser.add_argument(f"--{name}", default=default, help=text, **kind)


def shown(value):
    """Format a value of the configuration as it is typed: (0.4, 1.0) -> '0.4 1.0'."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value)


def add_run_flags(parser, arch):
    add = parser.add_argument
    add("--data", default="shapes", help="a folder of images, or shapes, cifar10, cifar100, stl10, "
        "imagenette, flowers102, pets")  # fmt: skip
    add("--arch", default=arch, choices=[*ARCHITECTURES, "resnet50"],
        help="vit_micro takes the laptop's recipe (default for shapes), vit_mini that for "
        "photographs there (default for other data), the others the paper's")  # fmt: skip
    add("--centering", choices=("mean", "sinkhorn", "none"), default="mean",
        help="Eq. 4; Sinkhorn-Knopp in its place (Table 7); none leaves C at 0, to see the "
        "collapse onto one dimension (Figure 7)")  # fmt: skip
    add("--no_sharpening", action="store_true",
        help="tau_t = tau_s, to see the collapse to the uniform output (Figure 7)")  # fmt: skip
    add("--init", help="a checkpoint or a released name whose backbone to start from, of this "
        "--arch and --patch")  # fmt: skip
    add_amp_flag(parser)
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=0,
        help="stop after this many steps; changes no schedule (0: at the end)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the student")
    add("--recompute", nargs="?", choices=("mlp", "blocks"), const="blocks",
        help="compute activations again on the way back, the MLPs' alone or the blocks': less "
        "memory, more time")  # fmt: skip
    add("--workers", type=int, help="processes that load images (default: up to 10 on a GPU; on a "
        "CPU 1, or 0 where there are only two cores)")  # fmt: skip
    add_device_flag(parser)
    add("--output", type=Path,
        help="the run's folder (default: runs/NAME, from architecture and data)")  # fmt: skip
    add("--overwrite", action="store_true", help="start anew in a folder that holds another run")
    add("--accept_data", action="store_true", help="go on with a run whose data has changed")
    add("--stop_on_collapse", action="store_true",
        help="end a run whose output has collapsed, rather than warn")  # fmt: skip
    add("--log_every", type=int, default=10, help="steps between lines of the log")
    add("--save_every", type=int, default=0,
        help="steps between writes of last.pth, besides each epoch's end")  # fmt: skip
    add("--keep_every", type=int, default=20,
        help="epochs between checkpoints that are kept (0: none)")  # fmt: skip
    add("--keep", type=int, default=0, help="how many of those to keep, the newest (0: all)")
    add("--knn_every", type=int, default=1,
        help="epochs between k-NN tests, where there are labels (0: never)")  # fmt: skip
    add("--knn_bank", type=int, help="images that vote in those tests (default: 10000, laptop "
        "2000)")  # fmt: skip


def add_device_flag(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="(default: cuda where there is a GPU)")


def add_size_flag(parser):
    parser.add_argument("--size", type=int, help="short side in pixels (default: 480/224 of the "
                        "training size, 480 for the paper's)")  # fmt: skip


def add_amp_flag(parser):
    choices = ("auto", "off", "bf16", "fp16")
    parser.add_argument("--amp", choices=choices, default="auto", help="mixed precision of the "
                        "networks (auto: on GPUs)")  # fmt: skip


def add_network_flags(parser):
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher",
                        help="which of a checkpoint's two networks")  # fmt: skip
    parser.add_argument("--heads", type=int, help="a ViT's number of heads, for foreign weights of "
                        "another than the paper's")  # fmt: skip


def default_workers(device):
    """How many processes load images. On two cores they and the model wait for one another: 0."""
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.startswith("cuda"):
        return max(1, min(10, cores))
    return 1 if cores > 2 else 0


def usable_cores():
    """How many cores this process may use: a container or taskset may allow few of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_arch(data):
    return "vit_micro" if data == "shapes" else "vit_mini"


def default_output(args):
    """runs/NAME from what tells runs apart: architecture, data, batch of several processes."""
    laptop = args.arch == default_arch(args.data)
    data = Path(args.data).absolute() if os.path.isdir(args.data) else Path(args.data)
    world = int(os.environ.get("WORLD_SIZE", 1))
    parts = ["laptop" if laptop else f"{args.arch}_{args.patch}"]
    if not (laptop and args.data == "shapes"):
        parts.append(data.parent.name if data.name == "train" else data.name)
    if world > 1:
        parts.append(f"b{args.batch * args.accumulate * world}")
    if args.centering != "mean":
        parts.append(f"centering_{args.centering}")
    if args.no_sharpening:
        parts.append("no_sharpening")
    return Path("runs", "-".join(parts))


def with_length(args, images):
    """Return the arguments with the number of epochs, which may follow from that of the images."""
    if args.epochs:
        return args
    epochs = max(1, min(MOST_EPOCHS, round(PHOTOS_SEEN / images)))
    length = {"epochs": epochs}
    for warmup in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        length[warmup] = min(getattr(args, warmup), epochs - 1)
    return argparse.Namespace(**vars(args) | length)


def crop_settings(args):
    """Return what MultiCrop is made with."""
    sizes = args.global_size, args.local_size, args.local_crops
    return *sizes, args.global_scale, args.local_scale, args.blur_sigma


def summary(args):
    """The configuration as a few lines, the first of which says which recipe it is.

    What is not given (None) and an ablation that is off are left out.
    """
    why = {
        "vit_micro": "the laptop's (vit_micro, the default for shapes)",
        "vit_mini": "photographs on a small machine (vit_mini, the default for other data)",
    }
    lines = [f"recipe     {why.get(args.arch, f'the paper, {args.arch}')}"]
    for group, names in GROUPS.items():
        given = []
        for name in names.split():
            value = getattr(args, name)
            if value is None or (value is False and name not in RECIPE):
                continue
            given.append(f"{name} {shown(value)}")
        lines.append(f"{group:9}  {', '.join(given)}")
    return "\n".join(lines)


def check(args):
    """ValueError: something that cannot be trained, with the flag."""
    for flags, least, most in BOUNDS:
        for flag in flags.split():
            value = getattr(args, flag)
            if value is not None and not least <= value <= most:
                above = f" and at most {most:g}" if most < 1e9 else ""
                raise ValueError(f"--{flag} {value} must be at least {least:g}{above}")
    for flag in ("global_scale", "local_scale"):
        low, high = getattr(args, flag)
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"--{flag} {low:g} {high:g} must be two shares of the image's area, "
                "the smaller first"
            )
    if args.optimizer not in ("adamw", "sgd"):
        raise ValueError(f"--optimizer {args.optimizer}: adamw or sgd")
    if args.epochs and args.warmup_epochs > args.epochs:
        raise ValueError(
            f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}: "
            "the learning rate would never reach its peak"
        )
    for flag in ("global_size", "local_size"):
        if args.arch != "resnet50" and getattr(args, flag) % args.patch:
            raise ValueError(f"--patch {args.patch} must divide --{flag} {getattr(args, flag)}")
