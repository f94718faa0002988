"""What the frozen features are worth (section 4): weighted k-nearest neighbours, a linear probe, and the class token's attention as masks (Figure 4).

    python evaluate.py knn    runs/laptop/last.pth [--data path/to/images]      data default: what the checkpoint was trained on
    python evaluate.py linear runs/laptop/last.pth                              the paper's protocol; --cached: on features extracted once, in seconds
    python evaluate.py masks  runs/laptop/last.pth                              shapes, voc2012, or a folder of images with an alpha channel
    torchrun --nproc_per_node=8 evaluate.py ...                                 the same, each process with its share of the images

Beside each figure stands an untrained network's; each evaluation adds a line to evaluate.jsonl in the checkpoint's folder. Unlike in the reference code, the
linear protocol's random crops are bicubic, its learning rates are tried all at once, and an epoch's last, smaller batch is left out.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import nn
from torch.utils.data import DataLoader

from augment import normalize, resize
from data import Batches, load
from features import Crops, combine, features, progress, represent
from run import command, first_process, in_turn, join, say, write_whole
from visualize import attention_maps, keep_mass, usual_size
from vit import RELEASED, ViT, amp_dtype, describe, load_backbone, untrained


def nearest(similarity, k):
    """The k largest of each row of [m, n], the largest first and of equal ones the lower index: (values, indices), both [m, k].

    The k blocks of columns with the largest maxima hold them all: one pass over the rows and two short sorts, which unlike topk keep the order of equals.
    """
    n, device = similarity.shape[1], similarity.device
    size = math.isqrt(n // k)
    whole = n // size * size  # the columns after these are always looked at
    best = reduce(similarity[:, :whole], "m (blocks size) -> m blocks", "max", size=size)
    blocks = best.sort(dim=1, descending=True, stable=True).indices[:, :k].sort().values
    columns = rearrange(blocks[..., None] * size + torch.arange(size, device=device), "m k size -> m (k size)")
    columns = torch.cat([columns, repeat(torch.arange(whole, n, device=device), "n -> m n", m=len(columns))], 1)
    value, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return value[:, :k], columns.gather(1, order[:, :k])


def knn(bank, bank_labels, queries, labels, ks=(10, 20, 100, 200), temperature=0.07, leave_one_out=False):
    """Weighted k-NN's top-1 accuracy in per cent (section 4), {k: accuracy}. The k nearest by cosine similarity s vote for their class, weight exp(s / 0.07).

    bank [n, d], queries [m, d]: features, normalised here. leave_one_out: the queries are the bank, and none votes for itself. A k above the number of
    candidates counts them all. Of images as near the lower index is taken, of classes with as many votes the lower. A class that the bank lacks is never right.
    """
    bank, classes, limit = F.normalize(bank, dim=-1), 1 + int(bank_labels.max()), min(max(ks), len(bank) - leave_one_out)
    if limit < 1:
        raise ValueError("one image has no neighbours: k-NN needs two")
    chunk, right = max(1, min(1024, 2**26 // max(len(bank), classes))), dict.fromkeys(ks, 0)  # 256 MB of similarities at a time
    for start in range(0, len(queries), chunk):
        similarity = F.normalize(queries[start : start + chunk], dim=-1) @ bank.T
        if leave_one_out:
            similarity.diagonal(start).fill_(-2)
        similarity, index = nearest(similarity, limit)
        weight, voted = (similarity.cpu().double() / temperature).exp(), bank_labels[index].cpu()  # float64: in float32 far votes vanish beside near ones
        for k in ks:
            votes = weight.new_zeros(len(weight), classes).scatter_add_(1, voted[:, :k], weight[:, :k])
            right[k] += (votes.argmax(1) == labels[start : start + chunk].cpu()).sum().item()
    return {k: 100 * n / len(queries) for k, n in right.items()}


def some(labels, limit=None):
    """Indices of labelled images: all of them, or limit drawn at random, the same each time. ValueError: there are none."""
    indices = [i for i, label in enumerate(labels) if label >= 0]
    if not indices:
        raise ValueError("no labelled images")
    return sorted(Random(0).sample(indices, limit)) if limit and limit < len(indices) else indices


def labelled(backbone, images, extract, limit=None):
    """(features [n, d], labels [n]) of the labelled images, or of limit of them."""
    tokens, read = extract(backbone, images, some(images.labels, limit))
    return tokens, torch.tensor([images.labels[i] for i in read], device=tokens.device)


def knn_of(backbone, train, val, extract, ks=(10, 20, 100, 200), limits=(None, None)):
    """The k-NN accuracy of a backbone, and (bank, queries), how many images that compares. val None: train against itself, leaving one out.

    extract(backbone, images, indices): features, its other arguments set. limits: at most so many images in the bank and among the queries.
    """
    bank, bank_labels = labelled(backbone, train, extract, limits[0])
    queries, labels = (bank, bank_labels) if val is None else labelled(backbone, val, extract, limits[1])
    return knn(bank, bank_labels, queries, labels, ks, leave_one_out=val is None), (len(bank), len(queries))


def logits(x, heads):
    """Features [b, d] and heads [sweep, classes, d + 1], whose last column is the bias -> [sweep, b, classes]."""
    return einsum(F.pad(x, (0, 1), value=1.0), heads, "b d, sweep c d -> sweep b c")


def losses(logits, labels):
    """Cross-entropy of logits [sweep, b, classes] with labels [b], -1 for none: [b, sweep]."""
    return F.cross_entropy(rearrange(logits, "sweep b c -> b c sweep"), repeat(labels, "b -> b sweep", sweep=len(logits)), reduction="none", ignore_index=-1)


def fit_heads(batches, steps, rates, classes, dim, device, world=1):
    """A linear classifier for each learning rate, trained on batches of (features [b, d], labels [b], -1 for none): heads for logits, [sweep, classes, d + 1].

    SGD with momentum 0.9, no weight decay, the rate to 0 on a cosine (section 4). The gradient of a sum of the heads' losses is each head's own, and in SGD a
    learning rate is a factor of the loss: one optimiser trains them all.
    """
    weight = 0.01 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))  # as in the reference code; no bias at the start
    heads = nn.Parameter(repeat(F.pad(weight, (0, 1)), "c d -> sweep c d", sweep=len(rates)).to(device, copy=True))
    optimizer, rates, start = torch.optim.SGD([heads], lr=1.0, momentum=0.9), torch.tensor(rates, device=device), time.monotonic()
    for step, (x, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        (rates / world * losses(logits(x, heads), labels).mean(0)).sum().backward()
        if world > 1:
            dist.all_reduce(heads.grad)
        optimizer.step()
        progress("steps", step + 1, steps, start)
    return heads.detach()


def score(heads, x, labels):
    """Of features [m, d]: top-1 and top-5 accuracy in per cent and mean loss, each [sweep]. A class without an output is wrong, and left out of the loss."""
    sums, classes = 0, heads.shape[1]
    for x, target in zip(x.split(1024), labels.split(1024)):
        out = logits(x, heads)
        right = (out.topk(min(5, classes)).indices == target[:, None]).float()
        sums = sums + torch.stack([right[..., 0].sum(1), right.sum((1, 2)), losses(out, target.where(target < classes, -1)).sum(0)]).cpu().double()
    return 100 * sums[0] / len(labels), 100 * sums[1] / len(labels), sums[2] / (labels < classes).sum().item()


def linear(backbone, train, val, extract, see, args, ranks):
    """(heads, score) of the linear protocol: tested on central crops, trained on random ones, or if args.cached on the features of the central ones.

    see(backbone, crops): represent, its other arguments set.
    """
    (x, labels), (rank, world) = labelled(backbone, val, extract), ranks
    device, chosen = x.device, some(train.labels)
    bank, targets = labelled(backbone, train, extract) if args.cached else (None, torch.tensor([train.labels[i] for i in chosen], device=device))
    order = Batches(len(targets), max(1, min(args.batch, len(targets) // world)), 1, rank, world, args.seed)
    order.last = args.epochs * order.steps_per_epoch
    crops = Crops(train, chosen, backbone.image_size, args.seed)

    def batches():
        for keys in order if args.cached else ():
            n = torch.tensor([n for _, n in keys], device=device)
            yield bank[n], targets[n]
        for n, crop in () if args.cached else DataLoader(crops, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda"):
            n = n.to(device)
            yield see(backbone, crop), targets[n].where(n >= 0, -1)

    heads = fit_heads(batches(), order.last, [rate * order.total / 256 for rate in args.lr], len(train.classes), x.shape[1], device, world)
    return heads, score(heads, x, labels)


def jaccard(masks, objects, void):
    """Intersection over union of masks [heads, h, w] and objects [o, h, w]: [o', heads]. Pixels in void [h, w] do not count, nor objects with no other."""
    masks, objects = (masks & ~void).float(), (objects & ~void).float()
    objects = objects[objects.sum((1, 2)) > 0]
    both = einsum(masks, objects, "heads h w, o h w -> o heads")
    return both / (masks.sum((1, 2)) + objects.sum((1, 2))[:, None] - both)


def fit(image, short, patch):
    """uint8 [c, h, w] -> the short side near short, each side cropped to a multiple of patch."""
    h, w = image.shape[1:]
    image = resize(image, *(max(patch, round(side * short / min(h, w))) for side in (h, w)))
    h, w = (side // patch * patch for side in image.shape[1:])
    return image[:, :h, :w]


def attention_masks(networks, images, device, short, mass=0.6, ranks=(0, 1)):
    """Figure 4: each head's class-token attention, cut to mass, against the objects: ([networks, 1 + heads] mean index in per cent, objects, images).

    The first figure takes each object's best head, the others are one head's. An image is fit to whole patches near short pixels, and its objects like it.
    Images that cannot be read or show no object are left out. ValueError: all are.
    """
    (rank, world), patch, heads, start = ranks, networks[0].patch, networks[0].blocks[-1].attn.heads, time.monotonic()
    sums, counts = torch.zeros(len(images), len(networks), 1 + heads, dtype=torch.float64), torch.zeros(len(images), dtype=torch.long)
    for n in range(rank, len(images), world):
        progress("images", n + 1, len(images), start)
        try:
            image, numbers = images[n], images.mask(n)
        except Exception:  # whatever a decoder may raise
            continue
        names = [] if numbers is None else [i for i in numbers.unique().tolist() if 0 < i < 255]
        if not names:
            continue
        void, *objects = fit(255 * (numbers == torch.tensor([255, *names])[:, None, None]).byte(), short, patch).to(device) > 127
        image = normalize(fit(image, short, patch)[None].to(device).float() / 255)
        for network, row in zip(networks, sums[n]):
            kept = repeat(keep_mass(attention_maps(network, image)[0], mass), "heads h w -> heads (h p) (w q)", p=patch, q=patch)
            index = jaccard(kept, torch.stack(objects), void).cpu().double()
            row += torch.cat([index.amax(1, keepdim=True), index], 1).sum(0)
        counts[n] = len(index)
    sums, counts = combine(sums, world), combine(counts, world)
    if not counts.any():
        raise ValueError(f"none of {len(images)} images says where its objects are: take shapes, voc2012, or images with an alpha channel")
    return 100 * sums.sum(0) / counts.sum(), counts.sum().item(), (counts > 0).sum().item()


def open_splits(data):
    """(training split, held-out split or None) of a labelled data set; held-out labels are numbered like the training split's, further classes after those.

    ValueError: no labels, or no class in common.
    """
    train, val = load(data, "train"), load(data, "val")
    for name, images in ((repr(data), train), (f"the held-out split of {data!r}", val)):
        if images is not None and images.labels is None:
            raise ValueError(f"{name} has no labels: put the images of each class, two or more, into a folder of its own")
    if val is not None and val.classes != train.classes:
        unseen = [name for name in val.classes if name not in train.classes]
        if len(unseen) == len(val.classes):
            raise ValueError(f"{data!r}: the training split has classes {train.classes}, the held-out one {val.classes}: none in common")
        if unseen:
            say(f"note: the training split lacks {', '.join(map(repr, unseen))}: held-out images of it count as wrong")
        val.labels = [label if label < 0 else (train.classes + unseen).index(val.classes[label]) for label in val.labels]
    return train, val


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("knn", "linear", "masks"))
    parser.add_argument("checkpoint", help=f"a checkpoint, or the name of released weights: {', '.join(RELEASED)}")
    parser.add_argument("--data", help="a folder or a data set's name (default: what the checkpoint was trained on)")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="which of a checkpoint's two networks")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="knn: neighbours (the paper's: 10 20 100 200, 20 is best)")
    parser.add_argument("--cached", action="store_true", help="linear: train on features extracted once, in seconds; not the paper's protocol")
    parser.add_argument("--epochs", type=int, default=100, help="linear: passes over the data (the paper's: 100)")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3], help="linear: learning rates for a batch of 256")
    parser.add_argument("--last", type=int, help="linear: how many blocks' class tokens (default: 4; from width 768 on, or of fewer than four blocks, 1)")
    parser.add_argument("--mean_patches", action=argparse.BooleanOptionalAction, help="linear: the mean patch token too (default: from width 768 on, or of fewer than four blocks)")
    parser.add_argument("--mass", type=float, default=0.6, help="masks: share of the attention inside (the paper's: 0.6)")
    parser.add_argument("--size", type=int, help="masks: short side in pixels (default: 480/224 of the training size, 480 for the paper's)")
    parser.add_argument("--untrained", action=argparse.BooleanOptionalAction, help="an untrained network beside (default: yes, in linear only if --cached)")
    parser.add_argument("--cache", action="store_true", help="knn, linear: keep features in the output folder, and read those that are there")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="knn, linear: mixed precision of the network (auto: on GPUs)")
    parser.add_argument("--batch", type=int, default=256, help="images a process at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0, help="linear: of the crops and their order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for evaluate.jsonl, linear.pth and kept features (default: the checkpoint's)")
    return parser.parse_args(argv)


def main(args):
    for flag in ("k", "lr", "batch", "epochs", "last", "size", "mass"):
        value = getattr(args, flag)
        if value is not None and not all(0 < v < math.inf for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--{flag} {value} must be positive")
    if args.workers < 0 or args.mass > 1:
        raise ValueError(f"--workers {args.workers} must not be negative, nor --mass {args.mass} above 1")
    device, *ranks = join(args.device)
    try:
        evaluate(args, device, ranks)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def evaluate(args, device, ranks):
    start = time.monotonic()
    backbone, trained_with = in_turn(lambda: load_backbone(args.checkpoint, args.network))
    data, folder = args.data or trained_with.get("data"), args.output or Path("." if args.checkpoint in RELEASED else args.checkpoint).parent
    if data is None:
        raise ValueError(f"{args.checkpoint!r} does not say what it was trained on: give --data")
    if args.output:
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: choose another --output")
    say(f"{args.checkpoint}: {args.network}, {describe(backbone)}")
    beside = args.untrained if args.untrained is not None else args.protocol != "linear" or args.cached
    networks = [backbone.to(device), untrained(backbone)][: 1 + beside]
    dtype = amp_dtype(args.amp, device)
    extract = partial(features, device=device, batch=args.batch, workers=args.workers, dtype=dtype, ranks=ranks, cache=folder if args.cache else None)

    if args.protocol == "masks":
        if not isinstance(backbone, ViT):
            raise ValueError(f"{args.checkpoint} is a {describe(backbone)}: a convnet has no attention")
        images = in_turn(lambda: load(data, "val") or load(data, "train"))
        short = args.size or usual_size(backbone)
        means, objects, used = attention_masks(networks, images, device, short, args.mass, ranks)
        if used < len(images):
            say(f"{len(images) - used} of {len(images)} images show no object or cannot be read, and are left out")
        say(f"{data}: {objects} objects in {used} images at {short} pixels, {100 * args.mass:g} % of the attention; Jaccard index in %")
        say(f"{'':9}  {'best head':>9}" + "".join(f"  {f'head {i}':>7}" for i in range(means.shape[1] - 1)))
        for name, (best, *single) in zip(("trained", "untrained"), means.tolist()):
            say(f"{name:9}  {best:9.1f}" + "".join(f"  {one:7.1f}" for one in single))
        figures = {"objects": objects, "images": used, "size": short, "mass": args.mass, "heads": means[0, 1:].tolist()}
        figures |= zip(("best_head", "untrained"), means[:, 0].tolist())
    elif args.protocol == "knn":
        train, val = in_turn(lambda: open_splits(data))
        (top1, (n, m)), *base = (knn_of(network, train, val, extract, args.k) for network in networks)
        counts, n = Counter(label for label in (val or train).labels if label >= 0), n - (val is None)
        chance = f"chance {100 / len(train.classes):.1f} %, always the commonest class {100 * max(counts.values()) / counts.total():.1f} %"
        say(f"{data}: {m} queries against {n} images, {len(train.classes)} classes; {chance}")
        say(f"{'k':>5}  {'top-1 %':>8}" + f"  {'untrained %':>11}" * len(base))
        for k in args.k:
            say(f"{k:5}  {top1[k]:8.1f}" + "".join(f"  {one[k]:11.1f}" for one, _ in base) + (f"  (all {n} images)" if k > n else ""))
        figures = {"bank": n, "queries": m, "top1": top1} | {"untrained": one for one, _ in base}
    else:
        train, val = in_turn(lambda: open_splits(data))
        if val is None:
            raise ValueError(f"{data!r} has no held-out split to test a linear classifier on: put its images into train/ and val/")
        vit = isinstance(backbone, ViT)
        as_vit_b = vit and (backbone.dim >= 768 or len(backbone.blocks) < 4)  # the paper: for ViT-S four class tokens, for ViT-B one and the mean patch token
        last = min(args.last or (1 if as_vit_b else 4), len(backbone.blocks)) if vit else 1
        kind = dict(last=last, mean_patches=vit and (as_vit_b if args.mean_patches is None else args.mean_patches))
        see = partial(represent, device=device, dtype=dtype, **kind)
        (heads, (top1, top5, loss)), *base = (linear(network, train, val, partial(extract, **kind), see, args, ranks) for network in networks)
        tokens = f"class tokens of the last {last} block{'s' * (last > 1)}" + ", mean patch token" * kind["mean_patches"] if vit else "pooled features"
        how = "central crops' features, extracted once: not the paper's protocol" if args.cached else "random crops"
        say(f"{data}: {len(train)} images to train on, {len(val)} to test on, {len(train.classes)} classes; {tokens}; {args.epochs} epochs on {how}")
        say(f"{'lr':>7}  {'top-1 %':>8}  {'top-5 %':>8}  {'loss':>6}" + f"  {'untrained %':>11}" * len(base))
        for i, rate in enumerate(args.lr):
            say(f"{rate:7g}  {top1[i]:8.1f}  {top5[i]:8.1f}  {loss[i]:6.3f}" + "".join(f"  {one[0][i]:11.1f}" for _, one in base))
        best = top1.argmax().item()
        saved = {"weight": heads[best, :, :-1].cpu(), "bias": heads[best, :, -1].cpu(), "classes": train.classes, "cached": args.cached, **kind}
        if first_process():
            write_whole(folder / "linear.pth", lambda file: torch.save(saved, file))
        say(f"the best, of learning rate {args.lr[best]:g} x batch / 256 -> {folder / 'linear.pth'}")
        figures = {"epochs": args.epochs, "cached": args.cached, **kind, "lr": args.lr, "top1": top1.tolist(), "top5": top5.tolist(), "loss": loss.tolist()}
        figures |= {"untrained": one[0].tolist() for _, one in base}

    line = {"checkpoint": args.checkpoint, "network": args.network, "data": data, "protocol": args.protocol, **figures}
    line |= {"seconds": round(time.monotonic() - start, 1)}
    if first_process():
        with open(folder / "evaluate.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    command(main, parse_args)
