"""What happens in training, drawn: networks, views, schedules, the teacher's targets.

    python visualize.py networks            networks.png: from views to the loss (Figure 2)
    python visualize.py crops img.jpg       crops.png: the views of one image (3.1, "multi-crop")
    python visualize.py schedules           schedules.png: what changes from step to step (3.2)
    python visualize.py targets CKPT        targets.png: P_t of a batch, with and without centring
                                            and sharpening (Eq. 1 and 4, Figure 7)

`crops` and `schedules` take train.py's flags, and the paper's recipe unless --arch names another.
"""

import argparse
import importlib
from pathlib import Path
from random import Random

import torch

from augment import MEAN, STD, MultiCrop, photometry
from evaluation.features import Extraction, extract_features
from head import DINOHead
from loss import entropies, teacher_probabilities
from util import config
from util.checkpoint import load_backbone, load_checkpoint, load_strictly
from util.data import evenly, load
from util.images import stills
from util.misc import say
from util.plot import draw_log, draw_panels, new_figure, save_png
from util.shapes import Shapes

BATCH = 64  # images whose targets are drawn
OUTPUTS = 32  # of them, the likeliest are drawn


def as_seen(crops, drawn):
    """Return crops of one size as the networks see them, back in colors: uint8 [v, 3, h, w]."""
    views = photometry(crops[None], drawn[None])[:, 0]
    return (255 * (views * STD + MEAN)).round().byte()


def draw_crops(image, crop, rng, path):
    """Draw the views of an image, uint8 [3, h, w]: as they are cut out, then as they are seen."""
    cut, seen = [], []
    for crops, drawn in crop(image, rng):
        cut += list(crops)
        seen += list(as_seen(crops, drawn))
    names = ["global 1", "global 2"] + [f"local {n + 1}" for n in range(len(cut) - 2)]
    titles = ["the image"] + [f"{name}, {view.shape[1]} px" for name, view in zip(names, cut)]
    rows = [dict(zip(titles, [image, *views])) for views in (cut, seen)]
    draw_panels(rows, path, "above as they are cut out, below flipped, colored, blurred, solarized")


BOXES = [  # of networks.png, in tenths of an inch: middle, width, text
    (57, 36, 19, "student: a Network\nbackbone, then head"),
    (57, 13, 19, "teacher: a Network\nbackbone, then head"),
    (89, 36, 31, "P_s = softmax(s / student_temp)"),
    (89, 13, 31, "P_t = teacher_probabilities()\nsoftmax((t - center) / teacher_temp)"),
    (89, 3.5, 31, "update_center()\nthe running mean of t"),
    (113, 24.5, 13, "dino_loss()\nH(P_t, P_s)"),
]
ARROWS = [  # middle of the text, text, the points that the arrow passes
    (0, 0, "", (13, 25), (17, 25), (17, 36), (21, 36)),
    (0, 0, "", (17, 25), (17, 13), (21, 13)),
    (30.5, 44, "all views: MultiCrop, photometry()", (40, 36), (47.5, 36)),
    (30.5, 8.5, "the two global views", (40, 13), (47.5, 13)),
    (70, 37.5, "s", (66.5, 36), (73.5, 36)),
    (68, 14.5, "t", (66.5, 13), (73.5, 13)),
    (0, 0, "", (70, 13), (70, 3.5), (73.5, 3.5)),
    (93, 8.2, "center", (89, 6.5), (89, 10)),
    (0, 0, "", (104.5, 36), (113, 36), (113, 27.5)),
    (105, 19, "sg: no gradient", (104.5, 13), (113, 13), (113, 21.5)),
    (81, 24.5, "EMA: momentum * teacher + (1 - momentum) * student", (57, 33), (57, 16)),
    (86.5, 45.5, "gradient", (117, 27.5), (117, 44), (57, 44), (57, 39)),
]


def draw_networks(path):
    """Draw a step of training (Figure 2), by the names that the code has."""
    image = Shapes()[1]
    views = [as_seen(*group) for group in MultiCrop(64, 32, 4)(image, Random(2))]
    pictures = [(1, 19, 12, image)]  # left, bottom and side
    for bottom in (34, 11):  # the student's views, the teacher's
        pictures += [(22 + 9 * n, bottom, 8, view) for n, view in enumerate(views[0])]
    pictures += [(22 + 4.4 * n, 29.5, 3.8, view) for n, view in enumerate(views[1])]
    figure = new_figure(12, 5)
    axis = figure.subplots()
    for x, y, side, pixels in pictures:
        axis.imshow(pixels.movedim(0, 2).numpy(), extent=(x, x + side, y, y + side))
    for x, y, width, text in BOXES:
        axis.bar(x, 6, width, y - 3, color="whitesmoke", edgecolor="black")
        axis.text(x, y, text, ha="center", va="center", fontsize=11)
    for x, y, text, *points in ARROWS:
        axis.text(x, y, text, ha="center", va="center", fontsize=11)
        axis.plot(*zip(*points[:-1]), color="black", linewidth=1)
        axis.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "shrinkA": 0})
    axis.set(xlim=(0, 120), ylim=(0, 50))
    axis.axis("off")
    save_png(path, figure.savefig)


def draw_schedules(args, path):
    """Draw the four schedules over the epochs; args: train.py's."""
    if not args.epochs:
        raise ValueError("this recipe's length follows from the images: give --epochs")
    train = importlib.import_module("train")  # which itself draws with visualize.py
    names = ("lr", "weight_decay", "momentum", "teacher_temp")
    lines = []
    for step, values in enumerate(train.schedules(args, 10, global_batch=256).tolist()):
        lines.append({"epoch": step / 10} | dict(zip(names, values)))
    draw_log(lines, path, args.out_dim)


def draw_targets(logits, center, student_temp, teacher_temp, path):
    """Draw P_t, an image a row and an output a column, with and without centring and sharpening.

    logits: [1, b, K]. Without sharpening the teacher has the student's temperature. The entropies
    are of all outputs.
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
    figure = new_figure(12, 3.2)
    for axis, (title, (c, temperature)) in zip(figure.subplots(1, 4, sharey=True), cases.items()):
        p = teacher_probabilities(logits, c, temperature)
        each, mean = entropies(p).tolist()
        part = p[0][rows][:, columns].numpy()
        shades = axis.imshow(part, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"{title}\nentropy {each:.2f}, of the mean {mean:.2f}", fontsize=9)
        axis.set(xticks=[], yticks=[])
        say(f"{title:22} entropy of each {each:.2f}, of their mean {mean:.2f} nats")
    figure.colorbar(shades, ax=figure.axes, label="probability", pad=0.01)
    figure.supxlabel(f"the {len(columns)} likeliest outputs", fontsize=9)
    figure.supylabel("images", fontsize=9)
    save_png(path, figure.savefig)


# ---- the commands ----


def targets(args, path):
    checkpoint = load_checkpoint(args.checkpoint)
    if not {"teacher", "num_heads", "center", "args"} <= checkpoint.keys():
        raise ValueError(f"{str(args.checkpoint)!r} has no head and no centre: name a last.pth")
    trained = argparse.Namespace(**checkpoint["args"])
    if trained.centering != "mean":
        raise ValueError("this run did without the centre: name another")
    data = args.data_path or trained.data_path
    images = load(data, "val") or load(data, "train")
    backbone = load_backbone(args.checkpoint).backbone
    head = DINOHead(backbone.embed_dim, trained.out_dim, trained.hidden_dim, trained.bottleneck_dim)
    weights = {key: value for key, value in checkpoint["teacher"].items() if "head." in key}
    load_strictly(head, {k.removeprefix("head."): v for k, v in weights.items()}, args.checkpoint)
    some = evenly(len(images), BATCH)
    features, _ = extract_features(backbone, images, Extraction(torch.device("cpu")), some)
    with torch.inference_mode():
        logits = head(features)[None]
    step, epoch = checkpoint["step"], checkpoint["epoch"]
    schedule = importlib.import_module("train").schedules(trained, round(step / epoch), 256)
    *_, teacher_temp = schedule[step - 1].tolist()
    draw_targets(logits, checkpoint["center"], trained.student_temp, teacher_temp, path)


def add_flags(parser, command):
    if command in ("crops", "schedules"):
        config.add_training_flags(parser)  # but here --arch and --output have other defaults
    else:
        config.add_flag(parser, "output_dir", type=Path, help="the picture's folder")
    if command == "crops":
        parser.add_argument("image", type=Path, help="an image, or a folder with one")
    if command == "targets":
        parser.add_argument("checkpoint", type=Path, help="a run's last.pth")
        config.add_flag(parser, "data_path", help="(default: what it was trained on)")
    parser.set_defaults(arch="vit_small", output_dir=Path())


def visualize(args):
    path = args.output_dir / f"{args.command}.png"
    if args.command == "crops":
        args = config.resolve(args)
        _, image = next(stills(args.image))
        draw_crops(image, MultiCrop(*config.crop_settings(args)), Random(args.seed), path)
    elif args.command == "schedules":
        draw_schedules(config.resolve(args), path)
    elif args.command == "targets":
        targets(args, path)
    else:
        draw_networks(path)
    say(f"-> {path}")
