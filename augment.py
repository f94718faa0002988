"""Multi-crop and its augmentations (3.1 and 3.2, "Implementation details"; tour, stop 4).

    View          the recipe: what happens to each kind of view, how strongly and how often
    MultiCrop     geometry, image by image in the loader's workers, on uint8: crop, resize, flip
    photometry    the rest, a batch at a time on the training device: color jitter, gray, blur,
                  solarize, normalise, with the parameters that MultiCrop has drawn for each view

The distribution is that of the reference code's per-image pipeline, but for the blur, which Pillow
approximates. Every draw comes from the generator passed in. Axes: b batch, v views, c channel.
"""

import math
from itertools import permutations
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ORDERS = torch.tensor(list(permutations(range(4))))  # of the jitter's four operations


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


def random_resized_crop(image, size, scale, rng: Random, flip=0.5):
    """Crop a random box out of uint8 [3, h, w], resize it to [3, size, size], flip it or not."""
    top, left, h, w = random_box(*image.shape[1:], scale, rng)
    crop = resize(image[:, top : top + h, left : left + w], size, size)
    return crop.flip(-1) if rng.random() < flip else crop


class MultiCrop:
    """uint8 [3, h, w] -> [(crops, drawn), ...], of the global views and, if any, of the local ones.

    crops: uint8 [v, 3, size, size]; drawn: float32 [v, 8], as draw_photometry() has it.
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
        crops, drawn = [], []
        for view in self.views:
            crops.append(random_resized_crop(image, view.size, view.scale, rng, view.flip))
            drawn.append(draw_photometry(view, self.blur_sigma, rng))
        pairs = (crops[:2], drawn[:2]), (crops[2:], drawn[2:])
        return [(torch.stack(c), torch.tensor(d)) for c, d in pairs if c]


def draw_photometry(view, blur_sigma, rng: Random):
    """Draw [brightness, contrast, saturation, hue, order, gray, sigma, solarize] of one view.

    order: that of the jitter's operations, an index of ORDERS. Not applied: order -1, sigma 0.
    """
    jittered = rng.random() < view.jitter
    brightness = rng.uniform(1 - view.brightness, 1 + view.brightness)
    contrast = rng.uniform(1 - view.contrast, 1 + view.contrast)
    saturation = rng.uniform(1 - view.saturation, 1 + view.saturation)
    hue = rng.uniform(-view.hue, view.hue)
    order = rng.randrange(len(ORDERS))
    blurred = rng.random() < view.blur
    sigma = rng.uniform(blur_sigma / 20, blur_sigma) if blurred else 0.0
    gray, solarize = rng.random() < view.gray, rng.random() < view.solarize
    jitter = [brightness, contrast, saturation, hue, order if jittered else -1]
    return [*jitter, gray, sigma, solarize]


def photometry(crops, drawn):
    """Apply what was drawn: uint8 [b, v, 3, h, w] -> float32 [v, b, 3, h, w], normalised.

    drawn: [b, v, 8], as MultiCrop gives it; it stays on the host, so that no device is waited for.
    """
    v = crops.shape[1]
    crops = rearrange(crops, "b v c h w -> (v b) c h w")
    drawn = rearrange(drawn, "b v parameters -> (v b) parameters")
    # On a CPU parts that fit its cache take half the time; the result is the same.
    part = max(1, 2**20 // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
    parts = [change_colors(x, *d.unbind(1)) for x, d in zip(crops.split(part), drawn.split(part))]
    return rearrange(torch.cat(parts), "(v b) c h w -> v b c h w", v=v)


def change_colors(crops, brightness, contrast, saturation, hue, order, gray, sigma, solarized):
    """uint8 [b, 3, h, w], and what was drawn [b] -> float32 [b, 3, h, w], normalised."""
    device = crops.device
    factors = torch.stack([brightness, contrast, saturation, hue]).to(device, non_blocking=True)
    x = color_jitter(crops.float().div_(255), factors, order)
    here = indices(gray > 0, device)
    x[here] = repeat(grayscale(x[here]), "b 1 h w -> b 3 h w")
    here = indices(sigma > 0, device)
    if len(here):
        x[here] = gaussian_blur(x[here], sigma.to(device, non_blocking=True)[here])
    here = indices(solarized > 0, device)
    x[here] = solarize(x[here])
    return normalize(x)


def indices(mask, device):
    """Return where a mask on the host is true, on the device: nothing is read back from there."""
    return mask.nonzero()[:, 0].to(device, non_blocking=True)


def color_jitter(x, factors, order):
    """Jitter [b, 3, h, w] in place, each sample with its own factors [4, b] and order [b]."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    orders = ORDERS[order.long()].masked_fill((order < 0)[:, None], -1)
    for turn in range(4):
        for number, operation in enumerate(operations):
            samples = indices(orders[:, turn] == number, x.device)
            x[samples] = operation(x[samples], factors[number, samples])
    return x


def grayscale(x):
    """[b, 3, h, w] -> [b, 1, h, w]: luma = 0.299 r + 0.587 g + 0.114 b (ITU-R 601)."""
    r, g, b = x.unbind(1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def adjust_brightness(x, factor):
    """factor x, within [0, 1]. x [b, 3, h, w], factor [b], here and below."""
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x, factor):
    """factor x + (1 - factor) m, where m is the mean of the image's luma."""
    mean = reduce(grayscale(x), "b 1 h w -> b 1 1 1", "mean")
    return torch.lerp(mean, x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(x, factor):
    """factor x + (1 - factor) luma, pixel by pixel."""
    return torch.lerp(grayscale(x), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x, turns):
    """Turn the hue in HSV by turns [b], at most a sixth either way, without leaving RGB.

    As the hue goes round, a channel is at the pixel's highest value for a third of a turn, falls
    for a sixth, is at the lowest for a third, rises for a sixth. 2 x - middle is the line of the
    nearer slope, carried on: turning moves along it, and the clamp restores the plateaus.
    """
    r, g, b = x.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    middle = r + g + b - high - low
    slope = torch.stack([b - g, r - b, g - r], 1).sign_()  # 1 rising, -1 falling, 0: either will do
    moved = 6 * turns[:, None, None] * (high - low)
    line = slope.mul_(moved[:, None]).add_(x, alpha=2).sub_(middle[:, None])
    return torch.clamp(line, low[:, None], high[:, None])


def gaussian_blur(x, sigma, radius=6):
    """Convolve with exp(-r^2 / (2 sigma^2)); sigma [b], radius in pixels (3 x 2, the largest)."""
    radius = min(radius, x.shape[2] - 1, x.shape[3] - 1)
    r = torch.arange(-radius, radius + 1, device=x.device)
    taps = (-0.5 * (r / sigma[:, None]) ** 2).exp()
    taps = repeat(taps / taps.sum(-1, keepdim=True), "b r -> (b c) 1 r", c=3)
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    x = rearrange(x, "b c h w -> 1 (b c) h w")  # each channel a group of its own
    x = F.conv2d(x, rearrange(taps, "g 1 r -> g 1 r 1"), groups=len(taps))
    x = F.conv2d(x, rearrange(taps, "g 1 r -> g 1 1 r"), groups=len(taps))
    return rearrange(x, "1 (b c) h w -> b c h w", c=3)


def solarize(x):
    """Invert what is at least 128 of 255."""
    return torch.where(x >= 128 / 255, 1 - x, x)


def normalize(x):
    """(x - mean) / std of ImageNet, channel by channel: [b, 3, h, w] in [0, 1] -> about [-2, 3]."""
    return torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
