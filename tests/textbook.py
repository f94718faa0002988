"""DINO written as plainly as it can be, from a state dict and in its precision.

Loops are explicit, and nothing is shared with the project.
"""

import math
import random

import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torchvision import transforms as T


def normed(x, state, name):
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def positions(state, patch, h, w):
    """The reference code's interpolation, in its own words: side + 0.1 over the native side."""
    embedding = state["pos_embed"]
    native = math.isqrt(embedding.shape[1] - 1)
    if native == h == w:
        return embedding
    grid = embedding[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid, scale_factor=((h + 0.1) / native, (w + 0.1) / native), mode="bicubic"
    )
    return torch.cat([embedding[:, :1], grid.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)


def vit(state, images, heads, patch):
    """(the normed tokens after each block, the last block's attention)."""
    kernel = state["patch_embed.proj.weight"]
    kernel = kernel.reshape(len(kernel), 3, patch, patch)
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=patch)
    h, w = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + positions(state, patch, h, w)
    outputs, depth = (
        [],
        1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
    )
    for i in range(depth):
        block = f"blocks.{i}"
        q, k, v = linear(normed(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv").chunk(
            3, -1
        )
        mixed, attention = [], []
        for q, k, v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
            attention.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1))
            mixed.append(attention[-1] @ v)
        x = x + linear(torch.cat(mixed, -1), state, f"{block}.attn.proj")
        x = x + linear(
            gelu(linear(normed(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1")),
            state,
            f"{block}.mlp.fc2",
        )
        outputs.append(normed(x, state, "norm"))
    return outputs, torch.stack(attention, 1)


def network(state, images, heads, patch):
    """Logits [b, k] of backbone and head."""
    backbone = {
        key.removeprefix("backbone."): value
        for key, value in state.items()
        if key.startswith("backbone.")
    }
    x = vit(backbone, images, heads, patch)[0][-1][:, 0]
    for i in (0, 2):
        x = gelu(linear(x, state, f"head.mlp.{i}"))
    x = linear(x, state, "head.mlp.4")
    x = x / x.norm(dim=-1, keepdim=True)
    v = state["head.last_layer.weight_v"]
    return x @ (state["head.last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T


def loss(student, teacher, center, student_temp, teacher_temp):
    """Algorithm 1's: lists of logits [b, k], one a view; the mean over pairs of different views."""
    pairs = []
    for i, t in enumerate(teacher):
        p_t = torch.softmax((t.detach() - center) / teacher_temp, -1)
        for j, s in enumerate(student):
            if i != j:
                pairs.append(-(p_t * torch.log_softmax(s / student_temp, -1)).sum(-1).mean())
    return sum(pairs) / len(pairs)


def update(student, teacher, optimizer, clip, momentum, frozen=()):
    """Clip each gradient's norm by itself, then update student and teacher, lists of parameters."""
    for p in student:
        if p.grad is not None:
            p.grad.mul_((clip / (p.grad.norm() + 1e-6)).clamp(max=1))
    for p in frozen:
        p.grad = None
    optimizer.step()
    with torch.no_grad():
        for t, s in zip(teacher, student):
            t.mul_(momentum).add_(s, alpha=1 - momentum)


def cosine(first, last, epochs, steps_per_epoch, warmup_epochs=0):
    """The reference code's schedule, a value a step; the warm-up's first is 0, its last first."""
    warmup, rest = warmup_epochs * steps_per_epoch, (epochs - warmup_epochs) * steps_per_epoch
    values = [first * i / (warmup - 1) if i else 0.0 for i in range(warmup)]
    return values + [
        last + (first - last) * (1 + math.cos(math.pi * i / rest)) / 2 for i in range(rest)
    ]


def temperature(first, last, epochs, steps_per_epoch, warmup_epochs):
    """tau_t, a value a step, the same throughout an epoch: the warm-up's first epoch has first."""
    values = []
    for epoch in range(epochs):
        value = last
        if epoch < warmup_epochs:
            value = first + (last - first) * epoch / (warmup_epochs - 1) if epoch else first
        values += [value] * steps_per_epoch
    return values


def multi_crop(local_crops=8):
    """The paper's multi-crop, a function of a PIL image, made of torchvision's transforms."""

    def view(size, scale, blur, solarize):
        bicubic = T.InterpolationMode.BICUBIC
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=bicubic),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([pil_blur], blur),
            T.RandomSolarize(128, solarize),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ])  # fmt: skip

    views = [view(224, (0.4, 1.0), blur=1.0, solarize=0.0)]
    views.append(view(224, (0.4, 1.0), blur=0.1, solarize=0.2))
    views += [view(96, (0.05, 0.4), blur=0.5, solarize=0.0)] * local_crops
    return lambda image: [view(image) for view in views]


def pil_blur(image):
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


def carry_labels(features, first, grid, context=7, radius=12, nearest=5, temperature=0.1):
    """Labels carried through a film: features [n, d] of each frame and the first frame's labels
    [n, c] -> each further frame's [n, c]. The whole matrix of affinities, one entry at a time.
    """
    h, w = grid
    labels = [first]
    for t in range(1, len(features)):
        sources = [0, *range(max(1, t - context), t)]
        frame = []
        for i in range(h * w):
            affinities = []
            for s in sources:
                for j in range(h * w):
                    down, right = abs(i // w - j // w), abs(i % w - j % w)
                    if radius == 0 or (down <= radius and right <= radius):
                        cosine = (features[t][i] @ features[s][j]).item()
                        affinities.append((math.exp(cosine / temperature), s, j))
            affinities = sorted(affinities, reverse=True)[:nearest]
            total = sum(affinity for affinity, _, _ in affinities)
            frame.append(sum(affinity / total * labels[s][j] for affinity, s, j in affinities))
        labels.append(torch.stack(frame))
    return labels[1:]


def boundary(mask):
    """Where a mask's pixel differs from its neighbours to the right, below and right below."""
    h, w = len(mask), len(mask[0])
    edges = [[False] * w for _ in range(h)]
    for y in range(h):
        for x in range(w):
            if y < h - 1 and x < w - 1:
                neighbours = mask[y][x + 1], mask[y + 1][x], mask[y + 1][x + 1]
            elif y < h - 1:
                neighbours = (mask[y + 1][x],)
            elif x < w - 1:
                neighbours = (mask[y][x + 1],)
            else:
                neighbours = ()
            edges[y][x] = any(neighbour != mask[y][x] for neighbour in neighbours)
    return edges


def region_and_contour(result, truth, void):
    """(J, F) of two masks, lists of rows of bools, outside void pixels."""
    h, w = len(truth), len(truth[0])
    pixels = [(y, x) for y in range(h) for x in range(w)]
    result = [[result[y][x] and not void[y][x] for x in range(w)] for y in range(h)]
    truth = [[truth[y][x] and not void[y][x] for x in range(w)] for y in range(h)]
    both = sum(result[y][x] and truth[y][x] for y, x in pixels)
    either = sum(result[y][x] or truth[y][x] for y, x in pixels)
    region = both / either if either else 1.0

    radius = math.ceil(0.008 * math.sqrt(h * h + w * w))
    found, wanted = boundary(result), boundary(truth)
    found = [(y, x) for y, x in pixels if found[y][x]]
    wanted = [(y, x) for y, x in pixels if wanted[y][x]]
    if not found and not wanted:
        return region, 1.0
    if not found or not wanted:
        return region, 0.0

    def near(y, x, points):
        return any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in points)

    precision = sum(near(y, x, wanted) for y, x in found) / len(found)
    recall = sum(near(y, x, found) for y, x in wanted) / len(wanted)
    together = precision + recall
    return region, 2 * precision * recall / together if together else 0.0


def average_precision(order, positives, junk):
    """The area under precision over recall of a ranking of images, without the junk, by trapezoids:
    for each positive the mean of the precision before it and with it."""
    ranked = [image for image in order if image not in junk or image in positives]
    total, found = 0.0, 0
    for rank, image in enumerate(ranked):
        if image in positives:
            before = found / rank if rank > 0 else 1.0
            found += 1
            total += (before + found / (rank + 1)) / 2
    return total / len(positives)


def precision_at(order, positives, junk, k):
    """The share of positives among the first k, or as far as the last positive."""
    ranked = [image for image in order if image not in junk or image in positives]
    last = max(rank for rank, image in enumerate(ranked) if image in positives)
    first = ranked[: min(k, last + 1)]
    return sum(image in positives for image in first) / len(first)
