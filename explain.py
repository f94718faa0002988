"""What happens in training, drawn: the views, the schedules, the teacher's targets.

    python visualize.py crops img.jpg       crops.png: the views of one image (3.1, "multi-crop")
    python visualize.py schedules           schedules.png: what changes from step to step (3.2)
    python visualize.py targets CKPT        targets.png: P_t of a batch, with and without centring
                                            and sharpening (Eq. 1 and 4, Figure 7)

`crops` and `schedules` take train.py's flags, and the paper's recipe unless --arch names another.
"""

import argparse
from pathlib import Path
from random import Random

import torch
from einops import rearrange
from matplotlib.figure import Figure

import recipe
from augment import MEAN, STD, MultiCrop, normalize
from backbone import trained_at
from checkpoint import load_backbone, load_checkpoint
from data import load, views_on
from decode import read_image
from features import center_crop
from head import DINOHead
from loss import entropies, teacher_probabilities
from pictures import draw_curve, draw_panels, save_figure, shown
from terminal import say

KINDS = ("crops", "schedules", "targets")
BATCH = 64  # images whose targets are drawn
OUTPUTS = 32  # of them, the likeliest are drawn


def draw_crops(image, crop, rng, path):
    """Draw the views of an image, uint8 [3, h, w]: as they are cut out, then as they are seen."""
    *groups, parameters = (part[None] for part in crop(image, rng))
    seen = views_on(torch.device("cpu"), [*groups, parameters])
    names = [f"global {n + 1}" for n in range(2)]
    names += [f"local {n + 1}" for n in range(len(crop.views) - 2)]
    cut_out = [view for group in groups for view in group[0]]
    mean, std = (rearrange(torch.tensor(value), "c -> c 1 1") for value in (MEAN, STD))
    seen = [(view * std + mean).mul(255).byte() for group in seen for view in group[:, 0]]
    rows = []
    for views in (cut_out, seen):
        row = {"the image": rearrange(shown(image), "c h w -> h w c")}
        for name, view in zip(names, views):
            row[f"{name}, {view.shape[1]} px"] = rearrange(view, "c h w -> h w c")
        rows.append(row)
    draw_panels(rows, path, "above as they are cut out, below with colours, blur and solarisation")


def draw_schedules(args, path):
    """Draw the four schedules over the epochs; args: as recipe.parse_args() gives them."""
    lines, steps = [], 1000
    for step in range(steps + 1):
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


def teacher_logits(path, data, count):
    """Return the teacher's logits [1, b, K] of central crops, with the checkpoint they are from."""
    checkpoint = load_checkpoint(path)
    if not {"teacher", "center", "args"} <= checkpoint.keys():
        raise ValueError(f"{str(path)!r} has no head and no centre: name a run's last.pth")
    backbone = load_backbone(path).backbone
    prefix = "head."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["teacher"].items() if prefix in k}
    sizes = [checkpoint["args"][name] for name in ("out_dim", "hidden_dim", "bottleneck_dim")]
    head = DINOHead(backbone.dim, *sizes)
    head.load_state_dict(weights)
    data = data or checkpoint["args"]["data"]
    images = load(data, "val") or load(data, "train")
    chosen = range(0, len(images), max(1, len(images) // count))[:count]
    crops = torch.stack([center_crop(images[i], trained_at(backbone)) for i in chosen])
    with torch.inference_mode():
        return head(backbone(normalize(crops.float() / 255)))[None], checkpoint


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
        each, mean = entropies(logits, c, temperature).tolist()
        part = p[0][rows][:, columns].numpy()
        axis.imshow(part, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"{title}\nentropy {each:.2f}, of the mean {mean:.2f}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        say(f"{title:22} entropy of each {each:.2f}, of their mean {mean:.2f} nats")
    figure.supxlabel(f"outputs, the {len(columns)} likeliest first", fontsize=9)
    figure.supylabel("images", fontsize=9)
    save_figure(figure, path)


# ---- the command ----


def parse_args(argv):
    """Resolve what follows `python visualize.py`, when it begins with one of KINDS."""
    kind = argv[0]
    formatter = argparse.RawDescriptionHelpFormatter
    name = f"visualize.py {kind}"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    if kind == "crops":
        add("image", type=Path)
    if kind == "targets":
        add("checkpoint", type=Path, help="a run's last.pth, with its head and its centre")
        add("--data", help="(default: what it was trained on)")
    add("--output", type=Path, default=Path(), help="folder for the picture (default: here)")
    if kind == "targets":
        args = parser.parse_args(argv[1:])
    else:
        args, flags = parser.parse_known_args(argv[1:])
        args.recipe = recipe.parse_args(__doc__, ["--arch", "vit_small", *flags])
    args.kind = kind
    return args


def main(args):
    path = args.output / f"{args.kind}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.kind == "crops":
        recipe.check(args.recipe)
        crop = MultiCrop(*recipe.crop_settings(args.recipe))
        draw_crops(read_image(args.image), crop, Random(args.recipe.seed), path)
    elif args.kind == "schedules":
        recipe.check(args.recipe)
        if not args.recipe.epochs:
            raise ValueError("this recipe's length follows from the images: give --epochs")
        draw_schedules(args.recipe, path)
    else:
        logits, checkpoint = teacher_logits(args.checkpoint, args.data, BATCH)
        temperatures = (checkpoint["args"][f"{name}_temp"] for name in ("student", "teacher"))
        draw_targets(logits, checkpoint["center"], *temperatures, path)
    say(f"-> {path}")
