"""What pictures are made of: panels, pixels with something laid over them, and figures of these.

Images are uint8 [3, h, w], maps [c, rows, columns] of patches, masks [h, w], panels
uint8 [h, w, 3].
"""

import math

import matplotlib
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure

from augment import resize
from files import write_whole

OUTLINE = torch.tensor([86, 180, 233], dtype=torch.uint8)
BLUE, ORANGE = "#0072b2", "#d55e00"  # the colour-blind tell them apart
COLORS = torch.tensor(matplotlib.colormaps["inferno"](range(256)))[:, :3].float() * 255


# ---- panels ----


def upsample(maps, covered, height, width, smooth=False):
    """Bring maps [c, rows, columns] to [c, height, width]; a patch is one block, or smooth.

    covered: the share (y, x) of the maps that the image covers, as attend() gives it.
    """
    y, x = covered
    corners = torch.tensor([[[x, 0, x - 1], [0, y, y - 1]]])
    grid = F.affine_grid(corners, (1, 1, height, width), align_corners=False)
    mode = "bilinear" if smooth else "nearest"
    return F.grid_sample(maps[None].float(), grid, mode, "border", align_corners=False)[0]


def overlay(image, heat):
    """Lay a map [h, w] in colours, from 0 to its largest value, over the grey image [3, h, w]."""
    gray = image.float().mean(0)[..., None]
    colors = COLORS[(255 * heat / heat.max().clamp_min(1e-12)).long()]
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
    """Lay each object of a mask [h, w] over the image in its colour of the palette."""
    colors = rearrange(torch.tensor(palette, dtype=torch.uint8), "(number c) -> number c", c=3)
    pixels = rearrange(image, "c h w -> h w c")
    mixed = pixels // 2 + colors[mask.long()] // 2
    return torch.where(mask[..., None] > 0, mixed, pixels)


def shown(image, side=320):
    """Return the image as a figure shows it: the long side at so many pixels."""
    scale = side / max(image.shape[1:])
    h, w = (max(1, round(length * scale)) for length in image.shape[1:])
    return resize(image, h, w)


# ---- figures ----


def save_figure(figure, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100, **options))


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
    figure = Figure(figsize=(1.45 * columns, height), layout="constrained")
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


def draw_curve(axis, lines, title, curves, levels=()):
    """Draw values of the log over epochs. curves: {its name: label}; levels: {label: value}."""
    for (name, label), color in zip(curves.items(), (BLUE, ORANGE)):
        known = [line for line in lines if name in line]
        epochs, values = [line["epoch"] for line in known], [line[name] for line in known]
        marker = "." if len(known) < 20 else None
        axis.plot(epochs, values, color=color, label=label, marker=marker)
    for label in levels:
        level = levels[label]
        place = axis.get_yaxis_transform()
        axis.axhline(level, color="gray", linestyle=":")
        beside = "bottom" if level else "top"
        axis.text(1, level, label, transform=place, ha="right", va=beside, fontsize=8)
    if len(curves) > 1:
        axis.legend(
            frameon=False,
            fontsize=8,
            ncols=2,
            loc="upper left",
            borderaxespad=0,
            handlelength=1,
            columnspacing=1,
        )
    axis.margins(y=0.3 if len(curves) > 1 else 0.15)  # room for the labels
    axis.set_title(title, fontsize=10)
    axis.ticklabel_format(useOffset=False)
    axis.spines[["top", "right"]].set_visible(False)
