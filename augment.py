"""Multi-crop and its augmentations (3.1 and 3.2, "Implementation details"; tour, stop 4).

    View          the recipe: what happens to each kind of view, how strongly and how often
    MultiCrop     geometry, image by image in the loader's workers, on uint8: crop, resize
    photometry    the rest, a batch at a time on the training device: flip, color jitter, gray,
                  blur, solarize, normalise, with the parameters that MultiCrop has drawn for each

The distribution is the reference code's, where Pillow approximates the blur and rounds after each
operation. Every draw comes from the generator passed in. Axes: b batch, v views, c channel.
"""

import math
from itertools import permutations
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
BRIGHTNESS, CONTRAST, SATURATION, NOTHING = range(4)
# 24 orders of the jitter: three of these, and the place (0 to 3) where hue goes in; last, no jitter
ORDERS = [(*three, turn) for three in permutations(range(3)) for turn in range(4)]
ORDERS = np.array([*ORDERS, (NOTHING, NOTHING, NOTHING, -1)])


class View(NamedTuple):
    """The recipe of a view. What differs between views has no default."""

    size: int  # side in pixels
    scale: tuple[float, float]  # area, as a share of the image's
    blur: float  # probability
    solarize: float  # probability
    flip: float = 0.5  # probability
    gray: float = 0.2  # probability
    jitter: float = 0.8  # probability, and its strengths:
    brightness: float = 0.4  # a factor from 0.6 to 1.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # in turns, either way


def random_box(height, width, scale, rng: Random, ratio=(3 / 4, 4 / 3)):
    """Draw (top, left, height, width) as torchvision does: area uniform, aspect log-uniform.

    Of ten draws the first that fits is taken, else the largest central box within ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image, height, width):
    """Resize uint8 [c, h, w] to [c, height, width]: bicubic with antialiasing, as Pillow does."""
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def random_resized_crop(image, size, scale, rng: Random):
    """Crop a random box out of uint8 [3, h, w], an array, and resize it: [1, 3, size, size]."""
    top, left, h, w = random_box(*image.shape[1:], scale, rng)
    box = torch.from_numpy(image[None, :, top : top + h, left : left + w])
    return F.interpolate(box, (size, size), mode="bicubic", antialias=True)


class MultiCrop:
    """uint8 [3, h, w] -> [(crops, drawn), ...], of the global views and, if any, of the local ones.

    crops: uint8 [v, 3, size, size]; drawn: float32 [v, 9], as draw_photometry() has it.
    """

    def __init__(self, global_size=224, local_size=96, local_crops=8,
                 global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), blur_sigma=2.0):  # fmt: skip
        self.blur_sigma = blur_sigma
        global_1 = View(global_size, global_scale, blur=1.0, solarize=0.0)
        global_2 = View(global_size, global_scale, blur=0.1, solarize=0.2)
        local = View(local_size, local_scale, blur=0.5, solarize=0.0)
        self.views = [global_1, global_2] + [local] * local_crops
        # the short side in pixels of an image of which no crop is enlarged
        self.least = max(view.size / math.sqrt(3 / 4 * view.scale[0]) for view in self.views)

    def __call__(self, image, rng: Random):
        image = image.numpy()  # whose slices take a tenth of a tensor's time
        crops, drawn = [], []
        for view in self.views:
            crops.append(random_resized_crop(image, view.size, view.scale, rng))
            drawn.append(draw_photometry(view, self.blur_sigma, rng))
        pairs = (crops[:2], drawn[:2]), (crops[2:], drawn[2:])
        return [(torch.cat(c), torch.tensor(d)) for c, d in pairs if c]


def draw_photometry(view, blur_sigma, rng: Random):
    """Draw [flip, brightness, contrast, saturation, hue, order, gray, sigma, solarize] of a view.

    order: that of the jitter's operations, an index of ORDERS. Not applied: order -1, sigma 0.
    """
    flipped = rng.random() < view.flip
    jittered = rng.random() < view.jitter
    brightness = rng.uniform(1 - view.brightness, 1 + view.brightness)
    contrast = rng.uniform(1 - view.contrast, 1 + view.contrast)
    saturation = rng.uniform(1 - view.saturation, 1 + view.saturation)
    hue = rng.uniform(-view.hue, view.hue)
    order = rng.randrange(24)
    blurred = rng.random() < view.blur
    sigma = rng.uniform(blur_sigma / 20, blur_sigma) if blurred else 0.0
    gray, solarize = rng.random() < view.gray, rng.random() < view.solarize
    jitter = [brightness, contrast, saturation, hue, order if jittered else -1]
    return [flipped, *jitter, gray, sigma, solarize]


def photometry(crops, drawn):
    """Apply what was drawn: uint8 [b, v, 3, h, w] -> float32 [v, b, 3, h, w], normalised.

    drawn: [b, v, 9], as MultiCrop gives it; it stays on the host, so that no device is waited for.
    """
    v = crops.shape[1]
    crops = rearrange(crops, "b v c h w -> (v b) c h w")
    drawn = rearrange(drawn.numpy(), "b v parameters -> (v b) parameters")
    # On a CPU parts that fit its cache take half the time; the result is the same.
    part = max(1, 2**20 // math.prod(crops.shape[1:])) if crops.device.type == "cpu" else len(crops)
    starts = range(0, len(crops), part)
    parts = [apply_drawn(crops[i : i + part], *drawn[i : i + part].T) for i in starts]
    return rearrange(torch.cat(parts), "(v b) c h w -> v b c h w", v=v)


def apply_drawn(crops, flip, brightness, contrast, saturation, hue, order, gray, sigma, solarized):
    """uint8 [b, 3, h, w], and what was drawn [b] -> float32 [b, 3, h, w], normalised."""
    x = crops / 255
    change(x, flip > 0, lambda x: x.flip(-1))
    color_jitter(x, brightness, contrast, saturation, hue, order)
    change(x, gray > 0, grayscale)
    change(x, sigma > 0, gaussian_blur, sigma)
    change(x, solarized > 0, solarize)
    return normalize(x)


def change(x, mask, operation, *parameter):
    """Apply an operation to some of x [b, 3, h, w], in place; mask, parameter: host arrays [b]."""
    here = np.flatnonzero(mask)
    if len(here):
        index = torch.from_numpy(here).to(x.device, non_blocking=True)
        x[index] = operation(x[index], *(values[here] for values in parameter))


def to_device(values, x):
    """Bring an array to the device of x, as float32."""
    return torch.from_numpy(values.astype(np.float32)).to(x.device, non_blocking=True)


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """Jitter [b, 3, h, w] in place, each sample with its own values and order: arrays [b]."""
    *three, hue_turn = ORDERS[order.astype(int)].T
    factors = np.choose(three, [brightness, contrast, saturation, np.ones_like(order)])
    weights = np.stack([1 - factors, np.equal(three, CONTRAST), np.equal(three, SATURATION)], 1)
    weights = to_device(weights[..., None, None, None], x)
    for turn, (weight, to_mean, to_luma) in enumerate(weights):
        change(x, hue_turn == turn, adjust_hue, hue)
        # factor x + (1 - factor) target: the target of brightness is 0, that of contrast the mean
        # luma of the image, that of saturation the luma itself, pixel by pixel
        luma = grayscale(x)
        mean = luma.mean((2, 3), keepdim=True)
        x.lerp_(torch.addcmul(mean * to_mean, luma, to_luma), weight).clamp_(0, 1)
    change(x, hue_turn == 3, adjust_hue, hue)
    return x


def grayscale(x):
    """[b, 3, h, w] -> [b, 1, h, w]: luma = 0.299 r + 0.587 g + 0.114 b (ITU-R 601)."""
    r, g, b = x.split(1, 1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def adjust_hue(x, turns):
    """Turn the hue in HSV by turns, an array [b], at most a sixth either way, without leaving RGB.

    As the hue goes round, a channel is at the pixel's highest value for a third of a turn, falls
    for a sixth, is at the lowest for a third, rises for a sixth. 2 x - middle is the line of the
    nearer slope, carried on: turning moves along it, and the clamp restores the plateaus.
    """
    r, g, b = x.split(1, 1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle = x.sum(1, keepdim=True) - low - high
    slope = torch.cat([b - g, r - b, g - r], 1).sign_()  # 1 rising, -1 falling, 0: either will do
    moved = to_device(6 * turns[:, None, None, None], x) * (high - low)
    return slope.mul_(moved).add_(x, alpha=2).sub_(middle).clamp_(low, high)


def gaussian_blur(x, sigma, radius=6):
    """Convolve with exp(-r^2 / (2 sigma^2)); sigma is an array [b], of at most 2 = radius / 3."""
    radius = min(radius, x.shape[2] - 1, x.shape[3] - 1)
    r = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (r / sigma[:, None]) ** 2)
    taps = np.repeat(taps / taps.sum(1, keepdims=True), 3, axis=0)
    taps = to_device(taps[:, None, :, None], x)
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    x = rearrange(x, "b c h w -> 1 (b c) h w")  # each channel a group of its own
    x = F.conv2d(x, taps, groups=len(taps))
    x = F.conv2d(x, taps.mT, groups=len(taps))
    return rearrange(x, "1 (b c) h w -> b c h w", c=3)


def solarize(x):
    """Invert what is at least 128 of 255."""
    return torch.where(x >= 128 / 255, 1 - x, x)


def normalize(x):
    """(x - mean) / std of ImageNet, channel by channel: [b, 3, h, w] in [0, 1] -> about [-2, 3]."""
    return (x - MEAN.to(x.device, non_blocking=True)) / STD.to(x.device, non_blocking=True)
