"""What happens in training, drawn: the views, the schedules, the teacher's targets.

    python visualize.py crops img.jpg       crops.png: the views of one image (3.1, "multi-crop")
    python visualize.py schedules           schedules.png: what changes from step to step (3.2)
    python visualize.py targets CKPT        targets.png: P_t of a batch, with and without centring
                                            and sharpening (Eq. 1 and 4, Figure 7)

`crops` and `schedules` take train.py's flags, and the paper's recipe unless --arch names another.
"""

import argparse
import sys
from pathlib import Path
from random import Random

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import nn

import recipe
from augment import MEAN, STD, MultiCrop
from backbone import rebuild
from checkpoint import load_checkpoint, load_strictly
from data import evenly, load, views_on
from features import Extraction, extract
from film import stills
from head import DINOHead
from loss import entropies, teacher_probabilities
from pictures import draw_curve, draw_panels, save_figure, shown
from terminal import run_command, say

BATCH = 64  # images whose targets are drawn
OUTPUTS = 32  # of them, the likeliest are drawn


def draw_crops(image, crop, rng, path):
    """Draw the views of an image, uint8 [3, h, w]: as they are cut out, then as they are seen."""
    *groups, parameters = (part[None] for part in crop(image, rng))
    seen = views_on(torch.device("cpu"), [*groups, parameters])
    names = ["global 1", "global 2"] + [f"local {n + 1}" for n in range(len(crop.views) - 2)]
    mean, std = (rearrange(torch.tensor(value), "c -> c 1 1") for value in (MEAN, STD))
    geometry = [view for group in groups for view in group[0]]
    colored = []
    for group in seen:
        colored += [(255 * (view * std + mean)).round().byte() for view in group[:, 0]]
    rows = []
    for views in (geometry, colored):
        row = {"the image": rearrange(shown(image), "c h w -> h w c")}
        for name, view in zip(names, views):
            row[f"{name}, {view.shape[1]} px"] = rearrange(view, "c h w -> h w c")
        rows.append(row)
    draw_panels(rows, path, "above as they are cut out, below with colours, blur and solarisation")


def draw_schedules(args, path):
    """Draw the four schedules over the epochs; args: as recipe.parse_args() gives them."""
    lines = []
    steps = 1000
    for step in range(steps):
        epoch = step * args.epochs / steps
        schedule = recipe.schedules(epoch, args, steps_per_epoch=1, global_batch=256)
        lines.append({"epoch": epoch, **schedule._asdict()})
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    axes = figure.subplots(1, 4)
    draw_curve(axes[0], lines, "learning rate for 256 images a step", {"lr": None})
    draw_curve(axes[1], lines, "weight decay", {"weight_decay": None})
    draw_curve(axes[2], lines, "momentum of the teacher, lambda", {"momentum": None})
    draw_curve(axes[3], lines, "temperature of the teacher", {"teacher_temp": None})
    figure.supxlabel("epoch", fontsize=10)
    save_figure(figure, path)


def load_teacher(checkpoint, path):
    """Return the teacher's backbone and head from what load_checkpoint() gave for a run's path."""
    backbone = rebuild(checkpoint["architecture"])
    sizes = [checkpoint["args"][name] for name in ("out_dim", "hidden_dim", "bottleneck_dim")]
    head = DINOHead(backbone.dim, *sizes)
    load_strictly(nn.ModuleDict({"backbone": backbone, "head": head}), checkpoint["teacher"], path)
    return backbone.eval(), head


def central_logits(backbone, head, images, count):
    """Return the logits [1, b, K] for the central crops of so many of the images."""
    how = Extraction(torch.device("cpu"), batch=count)
    features, _ = extract(backbone, images, evenly(len(images), count), how)
    with torch.inference_mode():
        return head(features)[None]


def draw_targets(logits, center, student_temp, teacher_temp, path):
    """Draw P_t, an image a row and an output a column, with and without centring and sharpening.

    Without sharpening the teacher has the student's temperature. The entropies are of all outputs.
    """
    nothing = torch.zeros_like(center)
    cases = {
        "neither": (nothing, student_temp),
        "centred alone": (center, student_temp),
        "sharpened alone": (nothing, teacher_temp),
        "centred and sharpened": (center, teacher_temp),
    }
    # The outputs that win with both, and images of the same output side by side.
    full = teacher_probabilities(logits, center, teacher_temp)[0]
    columns = full.sum(0).topk(min(OUTPUTS, full.shape[1])).indices
    rows = full[:, columns].argmax(1).argsort()
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    for axis, (title, (c, temperature)) in zip(figure.subplots(1, 4, sharey=True), cases.items()):
        p = teacher_probabilities(logits, c, temperature)
        each, mean = entropies(p).tolist()
        part = p[0][rows][:, columns].numpy()
        axis.imshow(part, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"{title}\nentropy {each:.2f}, of the mean {mean:.2f}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        say(f"{title:22} entropy of each {each:.2f}, of their mean {mean:.2f} nats")
    figure.supxlabel(f"the {len(columns)} likeliest outputs", fontsize=9)
    figure.supylabel("images", fontsize=9)
    save_figure(figure, path)


# ---- the commands ----


def crops(args, path):
    recipe.check(args)
    _, image = next(stills(args.image), (None, None))
    if image is None:
        raise ValueError(f"no image in {str(args.image)!r} can be read")
    draw_crops(image, MultiCrop(*recipe.crop_settings(args)), Random(args.seed), path)


def schedules(args, path):
    recipe.check(args)
    if not args.epochs:
        raise ValueError("this recipe's length follows from the images: give --epochs")
    draw_schedules(args, path)


def targets(args, path):
    checkpoint = load_checkpoint(args.checkpoint)
    if not {"teacher", "architecture", "center", "args", "epoch"} <= checkpoint.keys():
        raise ValueError(f"{str(args.checkpoint)!r} has no head and no centre: name a last.pth")
    trained = argparse.Namespace(**{"centering": "mean"} | checkpoint["args"])  # older have none
    if trained.centering != "mean" or trained.no_sharpening:
        raise ValueError("this run did without the centre or without sharpening: name another")
    data = args.data or trained.data
    images = load(data, "val") or load(data, "train")
    logits = central_logits(*load_teacher(checkpoint, args.checkpoint), images, BATCH)
    start, epochs = trained.warmup_teacher_temp, trained.warmup_teacher_temp_epochs
    tau_t = recipe.teacher_temperature(checkpoint["epoch"], start, trained.teacher_temp, epochs)
    draw_targets(logits, checkpoint["center"], trained.student_temp, tau_t, path)


KINDS = {"crops": crops, "schedules": schedules, "targets": targets}


def parse_args(argv=None):
    """Resolve what follows `python visualize.py`, when it begins with one of KINDS."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in KINDS:
        raise ValueError(f"say what to draw: {', '.join(KINDS)}")
    kind, *flags = argv
    if kind == "targets":
        formatter = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
        parser.add_argument("checkpoint", type=Path, help="a run's last.pth")
        parser.add_argument("--data", help="(default: what it was trained on)")
        parser.add_argument("--output", type=Path, help="the picture's folder (default: this one)")
    else:
        flags = ["--arch", "vit_small", *flags]
        parser = recipe.build_parser(__doc__, flags)
    if kind == "crops":
        parser.add_argument("image", type=Path, help="an image, or a folder with one")
    parser.prog = f"visualize.py {kind}"
    args = parser.parse_args(flags)
    args.output = args.output or Path()  # of the picture, here
    args.kind = kind
    return args


def main(args):
    path = args.output / f"{args.kind}.png"
    KINDS[args.kind](args, path)
    say(f"-> {path}")


if __name__ == "__main__":
    run_command(main, parse_args)
