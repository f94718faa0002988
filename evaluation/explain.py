"""What happens in training, drawn: the views, the schedules, the teacher's targets.

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
from einops import rearrange

from augment import MEAN, STD, MultiCrop, photometry
from evaluation.features import Extraction, extract_features
from head import DINOHead
from loss import entropies, teacher_probabilities
from util import config
from util.checkpoint import load_backbone, load_checkpoint, load_strictly
from util.data import evenly, load
from util.images import stills
from util.misc import say
from util.plot import draw_curves, draw_panels, new_figure, panel, save_figure

BATCH = 64  # images whose targets are drawn
OUTPUTS = 32  # of them, the likeliest are drawn


def draw_crops(image, crop, rng, path):
    """Draw the views of an image, uint8 [3, h, w]: as they are cut out, then as they are seen."""
    cut, seen = [], []
    for crops, drawn in crop(image, rng):
        cut += list(crops)
        views = photometry(crops[None], drawn[None])[:, 0]
        seen += [(255 * (view * STD + MEAN)).round().byte() for view in views]
    names = ["global 1", "global 2"] + [f"local {n + 1}" for n in range(len(cut) - 2)]
    rows = []
    for views in (cut, seen):
        row = {"the image": panel(image)}
        for name, view in zip(names, views):
            row[f"{name}, {view.shape[1]} px"] = rearrange(view, "c h w -> h w c")
        rows.append(row)
    draw_panels(rows, path, "above as they are cut out, below with colors, blur and solarization")


def draw_schedules(args, path):
    """Draw the four schedules over the epochs; args: train.py's."""
    if not args.epochs:
        raise ValueError("this recipe's length follows from the images: give --epochs")
    train = importlib.import_module("train")  # which itself draws with visualize.py
    names = ("lr", "weight_decay", "momentum", "teacher_temp")
    lines = []
    for step, values in enumerate(train.schedules(args, 10, global_batch=256).tolist()):
        lines.append({"epoch": step / 10} | dict(zip(names, values)))
    draw_curves(lines, path, {
        "learning rate for 256 images a step": ({"lr": None}, {}),
        "weight decay": ({"weight_decay": None}, {}),
        "momentum of the teacher, lambda": ({"momentum": None}, {}),
        "temperature of the teacher": ({"teacher_temp": None}, {}),
    })  # fmt: skip


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
    figure = new_figure(11, 2.9)
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
    _, image = next(stills(args.image))
    draw_crops(image, MultiCrop(*config.crop_settings(args)), Random(args.seed), path)


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
    if command == "targets":
        parser.add_argument("checkpoint", type=Path, help="a run's last.pth")
        config.add_flag(parser, "data_path", help="(default: what it was trained on)")
        config.add_flag(parser, "output_dir", type=Path, help="the picture's folder")
    else:
        config.add_training_flags(parser)  # but here --arch and --output have other defaults
    if command == "crops":
        parser.add_argument("image", type=Path, help="an image, or a folder with one")
    parser.set_defaults(arch="vit_small", output_dir=Path())


def visualize(args):
    if args.command != "targets":
        args = config.resolve(args)
    path = args.output_dir / f"{args.command}.png"
    functions = {"crops": crops, "schedules": draw_schedules, "targets": targets}
    functions[args.command](args, path)
    say(f"-> {path}")
