"""What pictures are made of: panels, pixels with something laid over them, and figures of these.

Images are uint8 [3, h, w], maps [c, rows, columns] of patches, masks [h, w], panels
uint8 [h, w, 3]. matplotlib is imported where it draws: that takes half a second.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import draw_segmentation_masks

from augment import resize
from util.misc import atomic_write

OUTLINE = torch.tensor([86, 180, 233], dtype=torch.uint8)
BLUE, ORANGE = "#0072b2", "#d55e00"  # the color-blind tell them apart


# ---- panels ----


def panel(image, side=320):
    """Return the image as a figure shows it: its long side at so many pixels."""
    return rearrange(shown(image, side), "c h w -> h w c")


def shown(image, side=320):
    """Resize an image to a long side of so many pixels."""
    scale = side / max(image.shape[1:])
    h, w = (max(1, round(length * scale)) for length in image.shape[1:])
    return resize(image, h, w)


def upsample(maps, height, width, smooth=False):
    """Bring maps [c, rows, columns] to [c, height, width]; a patch is one block, or smooth."""
    mode = "bilinear" if smooth else "nearest-exact"
    return F.interpolate(maps[None].float(), (height, width), mode=mode)[0]


def overlay(image, heat):
    """Lay a map [h, w] in colors, from 0 to its largest value, over the gray image [3, h, w]."""
    from matplotlib import colormaps

    gray = image.float().mean(0)[..., None]
    levels = (255 * heat / heat.max().clamp_min(1e-12)).long()
    colors = torch.from_numpy(colormaps["inferno"](levels.numpy())[..., :3]).float() * 255
    return (0.3 * gray + 0.7 * colors).byte()


def cut_out(image, mask):
    """Darken the image outside the mask [h, w], with an outline around it."""
    wide = max(1, round(min(mask.shape) / 100))
    grown = F.max_pool2d(mask[None].float(), (2 * wide + 1, 1), 1, (wide, 0))
    grown = F.max_pool2d(grown, (1, 2 * wide + 1), 1, (0, wide))[0] > 0
    pixels = rearrange(image, "c h w -> h w c")
    outside = torch.where(grown[..., None], OUTLINE, pixels // 4)
    return torch.where(mask[..., None], pixels, outside)


def tint(image, mask, palette):
    """Lay each object of a mask [h, w] over the image in its color of the palette."""
    numbers = [number for number in mask.unique().tolist() if number]
    if numbers:
        masks = torch.stack([mask == number for number in numbers])
        colors = [tuple(palette[3 * number : 3 * number + 3]) for number in numbers]
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)
    return rearrange(image, "c h w -> h w c")


# ---- figures ----


def new_figure(width, height):
    """Return an empty matplotlib Figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100, **options))


def draw_panels(rows, path, note):
    """Draw rows of {title: panel} as a PNG; more than nine panels a row take several lines."""
    longest = max(map(len, rows))
    lines = math.ceil(longest / 9)
    columns = math.ceil(longest / lines)
    ratios = []  # of each line's height to its panels' width
    for row in rows:
        h, w, _ = next(iter(row.values())).shape
        ratios += [min(4, max(0.2, h / w))] * lines
    height = sum(1.45 * ratio + 0.25 for ratio in ratios) + 0.4
    figure = new_figure(1.45 * columns, height)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
    axes = figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios)
    for axis in axes.flat:
        axis.axis("off")
    axes = rearrange(axes, "(rows lines) columns -> rows (lines columns)", lines=lines)
    for row, places in zip(rows, axes):
        for axis, (title, pixels) in zip(places, row.items()):
            axis.imshow(pixels.numpy())
            axis.set_title(title, fontsize=8, pad=3)
    figure.supxlabel(note, fontsize=8, wrap=True)
    save_figure(figure, path, pil_kwargs={"optimize": True})


def draw_curves(lines, path, plots, columns=4):
    """Draw the values of a log over its epochs as a PNG.

    plots: {title: ({name in the log: label}, {label of a level: its value})}.
    """
    rows = math.ceil(len(plots) / columns)
    figure = new_figure(2.75 * columns, 2.3 * rows)
    for axis, (title, (curves, levels)) in zip(figure.subplots(rows, columns).flat, plots.items()):
        for (name, label), color in zip(curves.items(), (BLUE, ORANGE)):
            known = [line for line in lines if name in line]
            epochs, values = [line["epoch"] for line in known], [line[name] for line in known]
            marker = "." if len(known) < 20 else None
            axis.plot(epochs, values, color=color, label=label, marker=marker)
        for label, level in levels.items():
            place, beside = axis.get_yaxis_transform(), "bottom" if level else "top"
            axis.axhline(level, color="gray", linestyle=":")
            axis.text(1, level, label, transform=place, ha="right", va=beside, fontsize=8)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", borderaxespad=0,
                        handlelength=1, columnspacing=1)  # fmt: skip
        axis.margins(y=0.3 if len(curves) > 1 else 0.15)  # room for the labels
        axis.set_title(title, fontsize=10)
        axis.ticklabel_format(useOffset=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("epoch", fontsize=10)
    save_figure(figure, path)
