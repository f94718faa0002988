"""Every hyper-parameter with the paper's value and ours, the command line, and how a command ends.

The paper's values are section 3.2's ("Implementation details"); where the reference code's defaults
differ or say more (tau_t, clipping, the frozen last layer), they are the code's. Flag names are the
reference code's; the short forms are ours. docs/laptop.md says why the laptop's recipe is as it is
(tour, stop 12).
"""

import argparse
import atexit
import multiprocessing
import os
import signal
import sys
import textwrap
from pathlib import Path

import torch

from util.misc import INPUTS, clear_progress
from vit import ARCHITECTURES


def number(kind, positive=False, most=2**31 - 1):
    """Return the type of a flag: an int or float from 0, or above it, to `most`."""

    def read(text):
        value = kind(text)
        if not 0 <= value <= most or (positive and value == 0):
            least = "above 0" if positive else "0 or more"
            raise argparse.ArgumentTypeError(f"{text} must be {least}, and at most {most}")
        return value

    read.__name__ = kind.__name__  # argparse prints it: invalid float value
    return read


def true_or_false(text):
    """Read a boolean as the reference code's commands have it."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


count, natural = number(int, positive=True), number(int)
positive, not_negative = number(float, positive=True), number(float)
share, positive_share = number(float, most=1), number(float, positive=True, most=1)
PAPER = {  # flag: (the paper's value, its type, what it is)
    # network
    "patch_size": (16, count, "side of a patch in pixels"),
    "drop_path_rate": (0.1, share, "stochastic depth in the student's last block; 0 in its first"),
    # multi-crop
    "global_crops_size": (224, count, "side of the two global crops"),
    "global_crops_scale": ([0.4, 1.0], share, "area of a global crop, as a share of the image's"),
    "local_crops_size": (96, count, "side of the local crops"),
    "local_crops_scale": ([0.05, 0.4], share, "area of a local crop"),
    "local_crops_number": (8, natural, "number of local crops"),
    "blur_sigma": (2.0, number(float, positive=True, most=2), "largest sigma of the blur"),
    # head
    "out_dim": (65536, count, "K, the outputs of the head"),
    "hidden_dim": (2048, count, "width of the head's hidden layers"),
    "bottleneck_dim": (256, count, "width of the head's bottleneck"),
    "norm_last_layer": (True, true_or_false, "keep the last layer's g at 1 (300 epochs: false)"),
    "freeze_last_layer": (1, natural, "epochs during which the head's last layer stays as it is"),
    # teacher and loss
    "momentum_teacher": (0.996, share, "the teacher's lambda at the start; it ends at 1"),
    "center_momentum": (0.9, share, "m of Eq. 4"),
    "student_temp": (0.1, positive, "tau_s"),
    "teacher_temp": (0.04, positive, "tau_t after its warm-up (the 300-epoch runs: 0.07)"),
    "warmup_teacher_temp": (0.04, positive, "tau_t at the start"),
    "warmup_teacher_temp_epochs": (0, natural, "epochs over which tau_t rises (300: 30)"),
    # optimisation
    "optimizer": ("adamw", str, "adamw or sgd"),
    "lr": (5e-4, positive, "peak learning rate for a global batch of 256; scales with the batch"),
    "min_lr": (1e-6, not_negative, "learning rate at the end"),
    "warmup_epochs": (10, natural, "epochs over which the learning rate rises"),
    "weight_decay": (0.04, not_negative, "weight decay at the start"),
    "weight_decay_end": (0.4, not_negative, "weight decay at the end"),
    "clip_grad": (3.0, not_negative, "largest norm of each parameter's gradient, 0 for any"),
    "epochs": (100, count, "passes over the data"),
    "batch_size_per_gpu": (64, count, "images a process a step"),
    "accumulate": (1, count, "batches a step, for a larger global batch on the same memory"),
    # the k-NN tests
    "knn_bank": (10_000, count, "images that vote in the k-NN tests during training"),
}
LAPTOP = dict(
    patch_size=4, drop_path_rate=0.0, global_crops_size=32, local_crops_size=16,
    local_crops_scale=[0.1, 0.4], local_crops_number=4, out_dim=256, hidden_dim=256,
    bottleneck_dim=64, freeze_last_layer=0, momentum_teacher=0.99, teacher_temp=0.02,
    warmup_teacher_temp=0.02, lr=0.03, min_lr=1e-5, warmup_epochs=1, weight_decay_end=0.04,
    clip_grad=0.1, epochs=7, batch_size_per_gpu=32, knn_bank=2_000,
)  # fmt: skip
PHOTOS = LAPTOP | dict(
    patch_size=8, global_crops_size=48, local_crops_size=24, blur_sigma=0.4, out_dim=1024,
    hidden_dim=512, bottleneck_dim=128, teacher_temp=0.04, warmup_teacher_temp_epochs=5, lr=4e-3,
    clip_grad=3.0, epochs=None, batch_size_per_gpu=None,
)  # fmt: skip
RESNET = dict(
    drop_path_rate=0.0, global_crops_scale=[0.14, 1.0], local_crops_scale=[0.05, 0.14],
    optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
)  # fmt: skip
RECIPES = {  # architecture: (name of its recipe, where that differs from the paper's)
    "vit_micro": ("the laptop's", LAPTOP),
    "vit_mini": ("photographs on a small machine", PHOTOS),
    "resnet50": ("the paper's for ResNet-50", RESNET),
}
# What the recipe for photographs takes from their number: a global batch of at most so many, and
# epochs in which so many images are seen, at most so many epochs.
MOST_IN_BATCH, PHOTOS_SEEN, MOST_EPOCHS = 64, 640_000, 250

SHORT = {  # short forms of flags
    "patch_size": "--patch",
    "batch_size_per_gpu": "--batch",
    "data_path": "--data",
    "output_dir": "--output",
    "num_workers": "--workers",
}


# ---- train.py's command line ----


def parse_args(description, argv=None):
    """Resolve train.py's command line: what it leaves open comes from the architecture's recipe."""
    parser = Parser(description=description, usage="%(prog)s [FLAG ...]")
    add_training_flags(parser)
    return resolve(parser.parse_args(argv))


def add_training_flags(parser):
    add = parser.add_argument
    add_flag(parser, "data_path", default="shapes", help="a folder of images, or shapes, cifar10, "
             "cifar100, stl10, imagenette, flowers102, pets")  # fmt: skip
    add("--arch", choices=[*ARCHITECTURES, "resnet50"],
        help=f"the network; {', '.join(RECIPES)} have recipes of their own (default: vit_micro for "
        "shapes, vit_mini for other data)")  # fmt: skip
    add_flag(parser, "output_dir", type=Path, help="the run's folder (default: runs/NAME, from "
             "architecture and data)")  # fmt: skip
    add("--centering", choices=("mean", "sinkhorn"), default="mean",
        help="Eq. 4, or Sinkhorn-Knopp in its place (Table 7)")  # fmt: skip
    add("--init", help="a checkpoint or a released name whose backbone to start from")
    add("--seed", type=natural, default=0)
    add("--steps", type=natural, default=0,
        help="stop after this many steps; changes no schedule (0: at the end)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the student")
    add("--recompute", action="store_true",
        help="compute activations again on the way back: less memory, more time")  # fmt: skip
    add_amp_flag(parser)
    add("--use_fp16", dest="amp", default=argparse.SUPPRESS, metavar="true|false",
        type=lambda text: "fp16" if true_or_false(text) else "off",
        help="the reference code's form of --amp fp16 or off")  # fmt: skip
    add("--use_bn_in_head", type=str.lower, choices=["false"], default=argparse.SUPPRESS,
        help="true is not built here: the paper's heads have no batch norm")  # fmt: skip
    add_device_flag(parser)
    add_flag(parser, "num_workers", type=natural, help="processes that load images (default: up to "
             "10 on a GPU; on a CPU 1, or 0 where there are only two cores)")  # fmt: skip
    add("--overwrite", action="store_true", help="start anew in a folder that holds another run")
    add("--log_every", type=count, default=10, help="steps between lines of the log")
    add("--saveckp_freq", type=natural, default=20,
        help="epochs between checkpoints that are kept (0: none)")  # fmt: skip
    add("--knn_every", type=natural, default=1,
        help="epochs between k-NN tests, where there are labels (0: never)")  # fmt: skip
    recipe = parser.add_argument_group("the recipe", "the paper's values, and ours that differ")
    for name, (value, kind, text) in PAPER.items():
        settings = {"metavar": "true|false"} if isinstance(value, bool) else {}
        if isinstance(value, list):
            settings = {"nargs": 2, "metavar": ("MIN", "MAX")}
        whose = "default" if name in ("accumulate", "knn_bank") else "paper"
        others = [f"{arch} {shown(r[name])}" for arch, (_, r) in RECIPES.items() if name in r]
        text = f"{text} ({'; '.join([f'{whose} {shown(value)}', *others])})"
        add_flag(recipe, name, type=kind, help=text, **settings)


def resolve(args):
    """Fill in what was left open, and check the whole. ValueError: it cannot be trained."""
    default_arch = "vit_micro" if args.data_path == "shapes" else "vit_mini"
    args.arch = args.arch or default_arch
    _, differs = RECIPES.get(args.arch, ("", {}))
    for name, (value, *_) in PAPER.items():
        if getattr(args, name) is None:
            setattr(args, name, differs.get(name, value))
    if args.num_workers is None:
        args.num_workers = default_workers(args.device)
    args.output_dir = args.output_dir or default_output(args, args.arch == default_arch)

    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            raise ValueError(f"--{name} {low:g} {high:g} must be two shares, the smaller first")
    if args.out_dim < 2:
        raise ValueError(f"--out_dim {args.out_dim} must be 2 or more")
    if args.optimizer not in ("adamw", "sgd"):
        raise ValueError(f"--optimizer {args.optimizer}: adamw or sgd")
    if args.epochs and args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs}: more than --epochs {args.epochs}")
    for name in ("global_crops_size", "local_crops_size"):
        size = getattr(args, name)
        if args.arch != "resnet50" and size % args.patch_size:
            raise ValueError(f"--patch {args.patch_size} must divide --{name} {size}")
    return args


def fit_to_data(args, images, world=1):
    """Return the arguments with what may follow from the number of images: batch and epochs."""
    fitted = {}
    if args.batch_size_per_gpu is None:
        most = min(MOST_IN_BATCH, images) // (args.accumulate * world)
        fitted["batch_size_per_gpu"] = max(1, most)
    if args.epochs is None:
        epochs = max(1, min(MOST_EPOCHS, round(PHOTOS_SEEN / images)))
        fitted["epochs"] = epochs
        for warmup in ("warmup_epochs", "warmup_teacher_temp_epochs"):
            fitted[warmup] = min(getattr(args, warmup), epochs - 1)
    return argparse.Namespace(**vars(args) | fitted)


def starts_anew(args):
    """Return whether --overwrite holds: after a restart by torchrun a run goes on."""
    return args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def crop_settings(args):
    """Return what augment.MultiCrop is made with."""
    sizes = args.global_crops_size, args.local_crops_size, args.local_crops_number
    return *sizes, args.global_crops_scale, args.local_crops_scale, args.blur_sigma


def default_workers(device):
    """How many processes load images. On two cores they and the model wait for one another: 0."""
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.startswith("cuda"):
        return max(1, min(10, cores))
    return 1 if cores > 2 else 0


def usable_cores():
    """How many cores this process may use: a container or taskset may allow few of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def default_output(args, laptop):
    """runs/NAME, from architecture and data."""
    if laptop and args.data_path == "shapes":
        return Path("runs/laptop")
    data = Path(args.data_path).absolute()
    start = "laptop" if laptop else f"{args.arch}_{args.patch_size}"
    return Path("runs", f"{start}-{data.parent.name if data.name == 'train' else data.name}")


def summary(args):
    """The configuration as a few lines, the first of which says which recipe it is."""
    recipe, _ = RECIPES.get(args.arch, ("the paper's", {}))
    given = []
    for name, value in vars(args).items():
        if value is not None and (value is not False or name in PAPER):
            given.append(f"{name} {shown(value)}".replace(" ", "\xa0"))  # not to be parted
    wrapped = textwrap.wrap(", ".join(given), 98, break_long_words=False, break_on_hyphens=False)
    return "\n  ".join([f"recipe: {recipe} ({args.arch})", *wrapped]).replace("\xa0", " ")


def shown(value):
    """Format a value as it is typed: [0.4, 1.0] -> '0.4 1.0', True -> 'true'."""
    if value is None:
        return "as the data asks for"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- what all commands share ----


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **settings):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def add_flag(parser, name, **settings):
    """Add --name, and its short form if it has one."""
    short = [SHORT[name]] if name in SHORT else []
    parser.add_argument(f"--{name}", *short, **settings)


def add_device_flag(parser):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: cuda where there is a GPU)")


def add_amp_flag(parser):
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                        help="mixed precision of the networks (auto: on GPUs)")  # fmt: skip


def add_network_flags(parser):
    add = parser.add_argument
    add("--network", choices=("teacher", "student"), default="teacher",
        help="which of a checkpoint's two networks")  # fmt: skip
    add("--num_heads", type=count, help="a ViT's number of heads, for foreign weights of another "
        "than the paper's")  # fmt: skip


def run_command(main, parse_args):
    """Run main(parse_args()), and end in one line for what a user can get wrong."""
    atexit.register(kill_children)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name need not be printable
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse_args()
        read = [value for name, value in vars(args).items() if name not in ("file", "output_dir")]
        read += [value for values in read if isinstance(values, list) for value in values]
        INPUTS.update(os.path.realpath(v) for v in read if isinstance(v, (str, Path)))
        status = main(args)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        line = (str(error).splitlines() or [repr(error)])[-1]  # a loader's error ends its traceback
        status = f"{Path(sys.argv[0]).name}: {line.removeprefix('ValueError: ')}"
    clear_progress()
    sys.exit(status)


def kill_children():
    """At the process's end, kill the loader's processes: they ignore a polite request."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
