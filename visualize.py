"""Pictures: the class token's attention (Figures 1 and 3), how it emerges, a run's curves (6, 7).

    python visualize.py ckpt.pth img.jpg       img_attention.png; also several images, or folders
    python visualize.py ckpt.pth film.gif      film_attention.gif; also a folder, with --fps
    python visualize.py runs/laptop            curves.png, from the run's log
    python visualize.py crops img.jpg          what happens in training: explain.py; also
    python visualize.py schedules | targets CKPT

A picture shows the image, each head's map, their mean, and the patches that hold most of the mean.
An image is shown to the network at 480 / 224 of the size it was trained at (480 for the paper's);
its last patches are filled up with the edge's pixels, so that unlike by the reference code's crop
nothing is lost. Images are uint8 [3, h, w], maps [heads, rows, columns] of patches, panels
uint8 [h, w, 3].
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image

import explain
from augment import resize
from checkpoint import RELEASED
from film import Film, is_film, stills, write_gif
from pictures import cut_out, draw_curve, draw_panels, overlay, save_figure, shown, upsample
from protocol import load_vit
from recipe import add_device_flag, add_network_flags
from run import read_log
from segment import attend, keep_mass
from terminal import progress, run_command, say

NOTE = (
    "attention of the class token in the last block, dark to bright: "
    "from 0 to the largest value of each map"
)


def panels(image, maps, covered, mass=0.6, smooth=False):
    """Return {title: panel}, each of the image's size: image, each head, mean of heads, mask."""
    h, w = image.shape[1:]
    mean = maps.mean(0, keepdim=True)
    heats = upsample(torch.cat([maps, mean]), covered, h, w, smooth)
    titles = [f"head {i + 1}" for i in range(len(maps))] + ["mean of heads"]
    row = {"image": rearrange(image, "c h w -> h w c")}
    for title, heat in zip(titles, heats):
        row[title] = overlay(image, heat)
    mask = upsample(keep_mass(mean, mass), covered, h, w, smooth)[0] > 0.5
    row["mask"] = cut_out(image, mask)
    return row


def draw_attention(backbone, images, path, sizes=(None,), mass=0.6, smooth=False):
    """Draw a row of panels for each image, and each short side at which the network sees it."""
    rows = []
    for image in images:
        for short in sizes:
            row = panels(shown(image), *attend(backbone, image, short), mass, smooth)
            if len(sizes) > 1:
                row = {f"seen at {short} pixels": row.pop("image"), **row}
            rows.append(row)
    draw_panels(rows, path, f"{NOTE}; mask: the fewest patches with {100 * mass:g} % of the mean")


def draw_emergence(images, kept, path):
    """Draw the heads' mean for each image at the first and the last seven steps of `kept`.

    kept: {step: what attend() gave for each of the images}.
    """
    rows = []
    steps = sorted(kept)
    for i, image in enumerate(images):
        image = shown(image)
        row = {"image": rearrange(image, "c h w -> h w c")}
        for step in steps[:1] + steps[1:][-7:]:
            maps, covered = kept[step][i]
            heat = upsample(maps.mean(0, keepdim=True), covered, *image.shape[1:])[0]
            row[f"step {step}" if step else "before training"] = overlay(image, heat)
        rows.append(row)
    draw_panels(rows, path, f"{NOTE}; mean of the heads")


def draw_curves(lines, path, out_dim):
    """Draw a run's log: loss, the collapse watch (Figure 7), k-NN (Figure 6), schedules."""
    full = math.log(out_dim)
    uniform = {"ln K: uniform": full, "0: one dimension": 0}
    both = {"knn": "teacher", "knn_student": "student"}
    two = {"entropy": "each output's", "mean_entropy": "their mean's"}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = iter(figure.subplots(2, 4).flat)
    draw_curve(next(axes), lines, "loss", {"loss": None}, {"ln K": full})
    draw_curve(next(axes), lines, "entropy of the teacher, nats", two, uniform)
    draw_curve(next(axes), lines, "KL(teacher, student), nats", {"kl": None}, {"0: collapse": 0})
    draw_curve(next(axes), lines, "k-NN top-1, %", both)
    draw_curve(next(axes), lines, "learning rate", {"lr": None})
    draw_curve(next(axes), lines, "weight decay", {"weight_decay": None})
    draw_curve(next(axes), lines, "momentum of the teacher", {"momentum": None})
    draw_curve(next(axes), lines, "temperature of the teacher", {"teacher_temp": None})
    figure.supxlabel("epoch", fontsize=10)
    save_figure(figure, path)


def side_by_side(backbone, film, short=None, mass=0.6, smooth=False):
    """Yield (PIL image, milliseconds): each frame, its mean map and its mask beside one another.

    All are of the first frame's size.
    """
    size = None
    start = time.monotonic()
    for i, (_, image, duration) in enumerate(film):
        size = size or image.shape[1:]
        image = resize(image, *size)
        row = panels(image, *attend(backbone, image, short), mass, smooth)
        pixels = torch.cat([row["image"], row["mean of heads"], row["mask"]], 1)
        yield Image.fromarray(pixels.numpy()), duration
        progress("frames", i + 1, len(film), start)


# ---- the command ----


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in explain.KINDS:
        return explain.parse_args(argv)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    vits = ", ".join(name for name in RELEASED if "vit" in name)
    add("checkpoint", help=f"a checkpoint, {vits} (released weights), or a run's folder for its "
        "curves")  # fmt: skip
    add("images", nargs="*", type=Path, help="images, folders of images, animated GIFs or WebPs")
    add_network_flags(parser)
    add("--size", type=int, nargs="+", default=[None], help="short side in pixels, or several "
        "(default: 480/224 of the training size, 480 for the paper's)")  # fmt: skip
    add("--mass", type=float, default=0.6,
        help="share of the attention inside the outlines (the paper's: 0.6)")  # fmt: skip
    add("--smooth", action="store_true",
        help="interpolate between patches (default: a block for each)")  # fmt: skip
    add("--panels", action="store_true",
        help="also write each panel of the figure alone, at the image's own size")  # fmt: skip
    add("--fps", type=float, help="take a folder as the frames of a film, so many a second")
    add_device_flag(parser)
    add("--output", type=Path, help="folder for the pictures (default: beside the image; of a "
        "folder, in FOLDER_attention)")  # fmt: skip
    return parser.parse_args(argv)


def check(args):
    """ValueError: a flag that makes no sense, or no images."""
    if not args.images:
        raise ValueError("no images given: name some, or folders of them, after the checkpoint")
    if not 0 < args.mass <= 1:
        raise ValueError(f"--mass {args.mass} must lie in (0, 1]")
    for size in args.size:
        if size is not None and size < 1:
            raise ValueError(f"--size {size} must be positive")
    if args.fps is not None and not 0 < args.fps <= 100:
        raise ValueError(f"--fps {args.fps} must lie in (0, 100]")


def redraw_curves(log, output):
    """Draw curves.png from a run's log."""
    path = (output or log.parent) / "curves.png"
    config = json.loads(log.with_name("config.json").read_text())
    draw_curves(read_log(log), path, config["out_dim"])
    say(f"{log} -> {path}")


def place_for(path, source, ending, output, written):
    """Choose where a picture goes: beside its image, beside its folder, or in --output."""
    folder = output or Path(f"{source.resolve()}_attention")
    if path == source:
        folder = output or source.absolute().parent
    stem = path.absolute().stem
    place = folder / path.relative_to(source).parent / f"{stem}_attention{ending}"
    while place in written:  # a.png and a.jpg
        place = place.with_stem(f"{place.stem}_")
    written.add(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def draw_source(backbone, source, args, written):
    """Draw an image, each image of a folder, or a film."""
    if is_film(source) or (args.fps and source.is_dir()):
        if args.panels or len(args.size) > 1:
            raise ValueError("of a film neither --panels nor several --size can be drawn")
        place = place_for(source, source, ".gif", args.output, written)
        film = Film(source, args.fps)
        write_gif(side_by_side(backbone, film, args.size[0], args.mass, args.smooth), place)
        say(f"{source} -> {place}")
        return
    for path, image in stills(source):
        place = place_for(path, source, ".png", args.output, written)
        try:
            draw_attention(backbone, [image], place, args.size, args.mass, args.smooth)
        except ValueError as error:
            if path == source:
                raise
            written.remove(place)
            say(f"{path}: {error}; left out")
            continue
        if args.panels:
            maps = attend(backbone, image, args.size[0])
            for title, pixels in panels(image, *maps, args.mass, args.smooth).items():
                alone = place.with_stem(f"{place.stem}_{title.replace(' ', '_')}")
                Image.fromarray(pixels.numpy()).save(alone)
        say(f"{path} -> {place}")


def main(args):
    if "kind" in args:
        explain.main(args)
        return
    log = Path(args.checkpoint, "log.jsonl")
    if log.is_file() and args.images:
        raise ValueError(f"to draw attention name the run's checkpoint, {log.parent / 'last.pth'}")
    if log.is_file():
        redraw_curves(log, args.output)
        return
    check(args)
    backbone = load_vit(args)
    written = set()
    for source in args.images:
        draw_source(backbone, source, args, written)
    if not written:
        raise ValueError("none of the images can be drawn")


if __name__ == "__main__":
    run_command(main, parse_args)
