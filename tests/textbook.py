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


def update(student, teacher, optimizer, clip, momentum):
    """Clip the gradient's norm, then update the student and the teacher, both modules."""
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (clip / norm).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor)
    optimizer.step()
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters()):
            t.mul_(momentum).add_(s, alpha=1 - momentum)


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
