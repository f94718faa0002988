"""Multi-crop (section 3.1 and 3.2): two global views, several local ones, each randomly cropped, flipped, jittered, greyed, blurred, solarised.

It is done in two halves. Geometry runs per image in the loader's workers on uint8: MultiCrop turns [3, h, w] into crops and, for each crop, the parameters
of its photometry. photometry() applies those to a whole batch on the training device. Every draw comes from the one generator passed in, so a view
depends on (seed, epoch, sample) alone, not on which process or device makes it. The distribution is that of the reference code's per-image pipeline.
"""

import math
from functools import cache
from itertools import permutations
from random import Random

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ORDERS = torch.tensor(list(permutations(range(4))))  # the orders in which colour jitter may apply its four operations
PARAMETERS = ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize")


def random_box(height, width, scale, rng: Random, ratio=(3 / 4, 4 / 3)):
    """A random resized crop's (top, left, height, width): area uniform in scale, aspect log-uniform in ratio, place uniform.

    As torchvision does it, ten tries to fit into the image, then the largest central crop within ratio.
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
    """uint8 [3, h, w] -> uint8 [3, height, width]: bicubic with antialiasing, as Pillow does it."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def draw_parameters(rng: Random, blur, solarize):
    """One view's photometry, in the order of PARAMETERS: jitter with p 0.8, grey 0.2, blur and solarise as given. Identities where not applied."""
    jitter = rng.random() < 0.8
    brightness, contrast, saturation, hue, order = (
        rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1), rng.randrange(len(ORDERS))
    )  # fmt: skip
    colour = [brightness, contrast, saturation, hue, order] if jitter else [1, 1, 1, 0, -1]
    sigma = rng.uniform(0.1, 2.0) if rng.random() < blur else 0
    return [*colour, rng.random() < 0.2, sigma, rng.random() < solarize]


class MultiCrop:
    """Geometry: uint8 [3, h, w] -> (global [2, 3, g, g], local [v - 2, 3, l, l], both uint8, and parameters [v, 8], float32)."""

    def __init__(self, global_size=224, local_size=96, local_crops=8, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)):
        views = [(global_size, global_scale, 1.0, 0.0), (global_size, global_scale, 0.1, 0.2)]
        self.views = views + [(local_size, local_scale, 0.5, 0.0)] * local_crops
        self.local_size = local_size

    def __call__(self, image, rng: Random):
        crops, parameters = [], []
        for size, scale, blur, solarize in self.views:
            top, left, h, w = random_box(*image.shape[1:], scale, rng)
            crop = resize(image[:, top : top + h, left : left + w], size, size)
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            parameters.append(draw_parameters(rng, blur, solarize))
        local = torch.stack(crops[2:]) if crops[2:] else torch.empty(0, 3, self.local_size, self.local_size, dtype=torch.uint8)
        return torch.stack(crops[:2]), local, torch.tensor(parameters, dtype=torch.float32)


@cache
def constant(values, device):
    """A tensor of numbers that is made, and copied to the device, once."""
    return torch.tensor(values, device=device)


def grayscale(x):
    """[b, 3, h, w] -> [b, 1, h, w]: luma of ITU-R 601, as Pillow's."""
    r, g, b = x.unbind(1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def chosen(mask, device):
    """The indices of a mask that lies on the host, on the device: nothing is read back from there."""
    return mask.nonzero()[:, 0].to(device, non_blocking=True)


def shift_hue(x, shift):
    """Turns the hue of [b, 3, h, w] by shift [b] turns, at most a sixth (beyond, it is wrong), without a branch per pixel.

    As the hue goes round, a channel stays at the pixel's highest value for a third of a turn, falls for a sixth, stays at the lowest for a third and rises for a
    sixth. 2 x - middle is the line of the nearer slope, carried on beyond it; the turn moves along the line, and the bounds restore the plateaus.
    """
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    step = 6 * shift[:, None, None] * (high - low)
    direction = torch.stack([b - g, r - b, g - r], 1).sign_()  # 1: that slope rises, -1: it falls, 0: in the middle of a plateau, where either will do
    line = direction.mul_(step[:, None]).add_(x, alpha=2).sub_((r + g + b - high - low)[:, None])
    return torch.clamp(line, low[:, None], high[:, None])


def blend(x, operation, factor):
    """Brightness (0), contrast (1) or saturation (2), as operation [b] says, in place: [b, 3, h, w] is mixed with black, its mean grey or each pixel's grey.

    factor [b]: the share of the image itself, above 1 to go away from the other. At 1, as for hue (3), nothing changes.
    """
    gray = grayscale(x)
    mean = reduce(gray, "b c h w -> b c 1 1", "mean")
    is_contrast, is_saturation = (rearrange((operation == i).float(), "b -> b 1 1 1") for i in (1, 2))
    return x.lerp_(torch.addcmul(is_contrast * mean, is_saturation, gray), rearrange(1 - factor, "b -> b 1 1 1")).clamp_(0, 1)


def jitter(x, brightness, contrast, saturation, hue, order):
    """Colour jitter of [b, 3, h, w] in [0, 1], in place, each sample with its own factors [b] and its own order of operations.

    order [b] lies on the host. -1: no jitter, the factors being 1, and not a bit changes, as a hue turned by 0 might.
    """
    factors = torch.stack([brightness, contrast, saturation, torch.ones_like(hue)], 1)
    for operation in ORDERS[order.long()].unbind(1):
        turned = chosen((operation == 3) & (order >= 0), x.device)
        operation = operation.to(x.device, non_blocking=True)
        blend(x, operation, factors.gather(1, operation[:, None])[:, 0])
        x[turned] = shift_hue(x[turned], hue[turned])
    return x


def blur(x, sigma, radius=6):
    """Gaussian blur of [b, 3, h, w], each sample with its own sigma [b] in pixels; borders reflect. radius: 3 x the largest sigma, 2."""
    radius = min(radius, x.shape[2] - 1, x.shape[3] - 1)
    taps = (-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma[:, None]) ** 2).exp()
    taps = repeat(taps / taps.sum(-1, keepdim=True), "b k -> (b c) 1 k", c=3)
    x = rearrange(F.pad(x, (radius,) * 4, mode="reflect"), "b c h w -> 1 (b c) h w")
    x = F.conv2d(F.conv2d(x, taps[..., None], groups=len(taps)), taps[:, :, None], groups=len(taps))
    return rearrange(x, "1 (b c) h w -> b c h w", c=3)


def photometry(crops, parameters):
    """uint8 [b, 3, h, w] and the parameters [b, 8] drawn for them (on the host) -> normalised float32 [b, 3, h, w] on the crops' device."""
    device = crops.device
    host = dict(zip(PARAMETERS, parameters.unbind(1)))
    *factors, _, _, sigma, _ = parameters.to(device, non_blocking=True).unbind(1)
    x = jitter(crops.float().div_(255), *factors, host["order"])
    gray, blurred, solarized = (chosen(host[name] > 0, device) for name in ("gray", "sigma", "solarize"))
    x[gray] = repeat(grayscale(x[gray]), "b 1 h w -> b 3 h w")
    if len(blurred):
        x[blurred] = blur(x[blurred], sigma[blurred])
    some = x[solarized]
    x[solarized] = torch.where(some >= 128 / 255, 1 - some, some)
    return normalize(x)


def normalize(x):
    """[b, 3, h, w] in [0, 1] -> ImageNet's mean and standard deviation taken out."""
    return (x - constant(MEAN, x.device)[:, None, None]).div_(constant(STD, x.device)[:, None, None])


def views(batch, device):
    """A loader's batch -> the two tensors that the networks see, [2, b, 3, g, g] and [v - 2, b, 3, l, l], float32, on device."""
    *crops, parameters = batch
    out, start = [], 0
    for group in crops:
        v = group.shape[1]
        if v == 0:  # no local crops
            continue
        flat = rearrange(group.to(device, non_blocking=True), "b v c h w -> (v b) c h w")
        n = max(1, 2**20 // flat[0].numel()) if flat.device.type == "cpu" else len(flat)  # a CPU takes as many at a time as its cache holds
        parts = zip(flat.split(n), rearrange(parameters[:, start : start + v], "b v p -> (v b) p").split(n))
        out.append(rearrange(torch.cat([photometry(*part) for part in parts]), "(v b) c h w -> v b c h w", v=v))
        start += v
    return out


def center_crop(image, size):
    """Evaluation's view: uint8 [3, h, w] -> uint8 [3, size, size], the short side resized to 256 / 224 of size (section 4), then the middle."""
    h, w = image.shape[1:]
    short = size * 256 // 224
    image = resize(image, h * short // min(h, w), w * short // min(h, w))
    top, left = round((image.shape[1] - size) / 2), round((image.shape[2] - size) / 2)
    return image[:, top : top + size, left : left + size]
