"""What the frozen features are worth (section 4): weighted k-nearest neighbours, a linear probe, and the class token's attention as masks (Figure 4).

    python evaluate.py knn    runs/laptop/last.pth [--data path/to/images]      data default: what the checkpoint was trained on
    python evaluate.py linear runs/laptop/last.pth                              the paper's protocol; --cached: on features extracted once, in seconds
    python evaluate.py masks  runs/laptop/last.pth                              shapes, voc2012, or a folder of images with an alpha channel
    torchrun --nproc_per_node=8 evaluate.py ...                                 the same, each process with its share of the images

A network's input is the central crop: the short side at 256 / 224 of the training size, then the middle. Beside each figure stands that of an untrained network. Each
evaluation adds a line to evaluate.jsonl in the checkpoint's folder. Unlike the reference code's, the linear probe's crops are bicubic and its learning rates swept at once.
"""

import argparse
import hashlib
import json
import math
import os
import sys
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from augment import center_crop, normalize, random_box, resize
from data import Batches, load
from run import agree, command, first_process, in_turn, join, minutes, patient_group, say, status, write_whole
from visualize import attention_maps, fit, keep_mass
from vit import RELEASED, ViT, amp_dtype, describe, load_backbone, load_checkpoint, untrained

KS, SWEEP = (10, 20, 100, 200), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


class Crops(Dataset):
    """(epoch, n) -> (n, crop of the n-th chosen image, uint8 [3, size, size]); -1 in place of n marks an image that cannot be read.

    seed None: the central crop. Else a random resized crop, flipped or not, as follows from (seed, epoch, image) alone.
    """

    def __init__(self, images, indices, size, seed=None):
        self.images, self.indices, self.size, self.seed = images, indices, size, seed

    def __getitem__(self, key):
        epoch, n = key
        try:
            image = self.images[self.indices[n]]
        except Exception:  # whatever a decoder may raise
            return -1, torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        if self.seed is None:
            return n, center_crop(image, self.size)
        rng = Random(f"{self.seed} {epoch} {self.indices[n]}")
        top, left, h, w = random_box(*image.shape[1:], (0.08, 1), rng)
        crop = resize(image[:, top : top + h, left : left + w], self.size, self.size)
        return n, crop.flip(-1) if rng.random() < 0.5 else crop


@torch.no_grad()
def represent(backbone, crops, device, last=1, mean_patches=False, dtype=None):
    """uint8 [b, 3, h, w] -> float32 [b, (last + mean_patches) d]: class tokens of the last blocks, and the last block's mean patch token. A convnet: what it pools."""
    images = normalize(crops.to(device, non_blocking=True).float() / 255)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        if not isinstance(backbone, ViT):
            return backbone(images).float()
        tokens = backbone.tokens(images, last).float()
    patches = [tokens[-1, :, 1:].mean(1)] if mean_patches else []
    return torch.cat([*tokens[:, :, 0], *patches], -1)


def progress(what, done, total, start):
    status(f"{what} {done}/{total}, {minutes((time.monotonic() - start) * (total / max(1, done) - 1))} left")


def combine(rows, world):
    """Each process has filled its share of the rows and left the others 0: their sum is what one process would have filled."""
    if world > 1:
        dist.barrier(patient_group())  # however much longer another takes
        dist.all_reduce(rows)
    return rows


def fingerprint(backbone, images, indices, *settings):
    """Sixteen digits that follow from what features depend on: weights, the images' names and labels, settings. An image changed under its name is not noticed."""
    names = [images.name(i) for i in indices]
    digest = hashlib.sha256(repr((settings, backbone.image_size, images.classes, images.labels, names)).encode())
    for value in backbone.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def features(backbone, images, indices, device, batch=256, workers=0, last=1, mean_patches=False, dtype=None, ranks=(0, 1), cache=None):
    """Features (see represent) of the given images' central crops: ([n, d] float32 on device, the n indices that could be read, in the order given).

    ranks: (rank, world) where all processes call this together: each reads its share, all get the whole. By default a process is alone and talks to none.
    cache: a folder to keep the features in, or to read them from if they are there. ValueError: no image, or none that can be read.
    """
    rank, world = ranks
    path = cache and cache / f"features-{fingerprint(backbone, images, indices, last, mean_patches, dtype)}.pth"
    if path and not agree(not path.exists()):
        saved = load_checkpoint(path)
        return saved["features"].to(device), saved["read"]
    crops = Crops(images, indices, backbone.image_size)
    loader = DataLoader(crops, batch, sampler=[(0, n) for n in range(rank, len(indices), world)], num_workers=workers, pin_memory=device.type == "cuda")
    out, read = torch.zeros(len(indices), backbone.dim * (last + mean_patches), device=device), torch.zeros(len(indices), device=device)
    start, mode, done = time.monotonic(), backbone.training, 0
    backbone.eval()
    for n, crop in loader:
        good = n[n >= 0].to(device)
        out[good] = represent(backbone, crop[n >= 0], device, last, mean_patches, dtype)
        read[good] = 1
        done += world * len(n)
        progress("features", min(done, len(indices)), len(indices), start)
    backbone.train(mode)
    out, read = combine(out, world), combine(read, world).bool()
    if not read.all():
        bad = images.name(indices[(~read).nonzero()[0]])
        if not read.any():
            raise ValueError(f"none of {len(indices)} images can be read, the first of them {bad!r}")
        say(f"{(~read).sum()} images cannot be read and are left out, the first {bad!r}", sys.stderr)
        out, indices = out[read], [i for i, good in zip(indices, read.tolist()) if good]
    if path and rank == 0:
        write_whole(path, lambda file: torch.save({"features": out.cpu(), "read": indices}, file))
    return out, indices


def nearest(similarity, k):
    """The k largest of each row of [m, n], the largest first and of equal ones the lower index: (values, indices), both [m, k].

    The k blocks of columns with the largest maxima hold them all. So one pass over the rows and two short sorts do, which unlike topk keep the order of equals.
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


def knn(bank, bank_labels, queries, labels, ks=KS, temperature=0.07, leave_one_out=False):
    """Weighted k-NN's top-1 accuracy in per cent (section 4): {k: accuracy}. The k nearest by cosine similarity s vote for their class with weight exp(s / 0.07).

    bank [n, d], queries [m, d]: features, normalised here. leave_one_out: the queries are the bank, and none votes for itself. A k above the number of
    candidates counts them all. Of images as near the lower index is taken, of classes with as many votes the lower. A class that the bank lacks is never right.
    """
    bank, classes = F.normalize(bank, dim=-1), 1 + int(bank_labels.max())
    limit, chunk = min(max(ks), len(bank) - leave_one_out), max(1, min(1024, 2**26 // max(len(bank), classes)))  # 256 MB of similarities at a time
    right = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), chunk):
        similarity = F.normalize(queries[start : start + chunk], dim=-1) @ bank.T
        if leave_one_out:
            similarity.diagonal(start).fill_(-2)
        similarity, index = nearest(similarity, limit)
        weight, voted = (similarity / temperature).exp(), bank_labels[index]
        for k in ks:
            votes = weight.new_zeros(len(weight), classes).scatter_add_(1, voted[:, :k], weight[:, :k])
            right[k] += (votes.argmax(1) == labels[start : start + chunk]).sum().item()
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


def knn_of(backbone, train, val, extract, ks=KS, limits=(None, None)):
    """The k-NN accuracy of a backbone, and (bank, queries), how many images that compares. val None: train against itself, leaving one out.

    extract(backbone, images, indices): features with its other arguments set. limits: at most so many images in the bank and among the queries.
    """
    bank, bank_labels = labelled(backbone, train, extract, limits[0])
    if val is None:
        return knn(bank, bank_labels, bank, bank_labels, ks, leave_one_out=True), (len(bank), len(bank))
    queries, labels = labelled(backbone, val, extract, limits[1])
    return knn(bank, bank_labels, queries, labels, ks), (len(bank), len(queries))


class Heads(nn.Module):
    """A linear classifier for each of several learning rates, [b, d] -> logits [sweep, b, classes]. All start alike: weights of deviation 0.01, no bias."""

    def __init__(self, sweep, classes, dim):
        super().__init__()
        weight = 0.01 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
        self.weight, self.bias = nn.Parameter(repeat(weight, "c d -> sweep c d", sweep=sweep).clone()), nn.Parameter(torch.zeros(sweep, 1, classes))

    def forward(self, x):
        return einsum(x, self.weight, "b d, sweep c d -> sweep b c") + self.bias


def losses(logits, labels):
    """Cross-entropy of logits [sweep, b, classes] with labels [b], -1 for none: [b, sweep]."""
    return F.cross_entropy(rearrange(logits, "sweep b c -> b c sweep"), repeat(labels, "b -> b sweep", sweep=len(logits)), reduction="none", ignore_index=-1)


def fit_heads(batches, steps, rates, classes, dim, device, world=1):
    """Heads trained on batches of (features [b, d], labels [b], -1 for none): SGD with momentum 0.9, no weight decay, rates [sweep] to 0 on a cosine.

    The gradient of a sum of the heads' losses is each head's own, and in SGD a learning rate is a factor of the loss: one optimiser trains them all.
    """
    heads, rates, start = Heads(len(rates), classes, dim).to(device), torch.tensor(rates, device=device), time.monotonic()
    forward = DistributedDataParallel(heads) if world > 1 else heads  # the mean of the processes' gradients
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    for step, (x, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        (rates * losses(forward(x), labels).mean(0)).sum().backward()
        optimizer.step()
        progress("steps", step + 1, steps, start)
    return heads


@torch.no_grad()
def score(heads, x, labels):
    """Of features [m, d]: top-1 and top-5 accuracy in per cent and mean loss, each [sweep]. A class without an output is wrong, and left out of the loss."""
    sums, classes = 0, heads.weight.shape[1]
    for x, target in zip(x.split(1024), labels.split(1024)):
        logits = heads(x)
        right = (logits.topk(min(5, classes)).indices == target[:, None]).float()
        sums = sums + torch.stack([right[..., 0].sum(1), right.sum((1, 2)), losses(logits, target.where(target < classes, -1)).sum(0)]).cpu().double()
    return 100 * sums[0] / len(labels), 100 * sums[1] / len(labels), sums[2] / (labels < classes).sum().item()


def linear(backbone, train, val, extract, args, device, dtype, ranks):
    """(Heads, score) of the linear protocol: trained on random crops, or, if args.cached, on the central crops' features; tested on central crops."""
    x, labels = labelled(backbone, val, extract)
    if args.cached:
        bank, targets = labelled(backbone, train, extract)
    else:
        chosen = some(train.labels)
        targets = torch.tensor([train.labels[i] for i in chosen], device=device)
    rank, world = ranks
    order = Batches(len(targets), max(1, min(args.batch, len(targets) // world)), 1, rank, world, args.seed, 0)
    order.last = args.epochs * order.steps_per_epoch

    def batches():
        if args.cached:
            for keys in order:
                n = torch.tensor([n for _, n in keys], device=device)
                yield bank[n], targets[n]
        else:
            crops = Crops(train, chosen, backbone.image_size, args.seed)
            for n, crop in DataLoader(crops, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda"):
                n = n.to(device)
                yield represent(backbone, crop, device, args.last, args.mean_patches, dtype), targets[n].where(n >= 0, -1)

    heads = fit_heads(batches(), order.last, [rate * order.total / 256 for rate in args.lr], len(train.classes), x.shape[1], device, world)
    return heads, score(heads, x, labels)


class Objects(Dataset):
    """n -> (n, an image fit to whole patches, masks [1 + objects, h, w]: what its ground truth leaves open, then each object); None for masks: there are none."""

    def __init__(self, images, short, patch):
        self.images, self.short, self.patch = images, short, patch

    def __getitem__(self, n):
        try:
            image, objects = self.images[n], self.images.mask(n)
        except Exception:  # whatever a decoder may raise
            return n, None, None
        if objects is None:
            return n, image, None
        values = torch.tensor([255] + [i for i in objects.unique().tolist() if 0 < i < 255])
        masks = 255 * (objects == values[:, None, None]).byte()
        return n, fit(image, self.short, self.patch), fit(masks, self.short, self.patch) > 127  # an object goes the way of its image


def jaccard(masks, objects, void):
    """Intersection over union of masks [heads, h, w] with objects [o, h, w], all bool: [o', heads]. Pixels of void [h, w] do not count, nor objects with no other."""
    masks, objects = (masks & ~void).float(), (objects & ~void).float()
    objects = objects[objects.sum((1, 2)) > 0]
    both = einsum(masks, objects, "heads h w, o h w -> o heads")
    return both / (masks.sum((1, 2)) + objects.sum((1, 2))[:, None] - both)


@torch.no_grad()
def attention_masks(networks, images, device, short, mass=0.6, workers=0, ranks=(0, 1)):
    """Figure 4: each head's class-token attention, cut to mass, against the objects: ([networks, 1 + heads] mean index in per cent, objects, images).

    The first figure takes each object's best head, the others are one head's. Images are fit to whole patches near short pixels, and the objects with them.
    """
    rank, world = ranks
    patch, heads, start = networks[0].patch, networks[0].blocks[-1].attn.heads, time.monotonic()
    sums, counts = torch.zeros(len(images), len(networks), 1 + heads, dtype=torch.float64), torch.zeros(len(images), dtype=torch.int64)
    for n, image, objects in DataLoader(Objects(images, short, patch), None, sampler=range(rank, len(images), world), num_workers=workers):
        progress("images", n + 1, len(images), start)
        if objects is None:
            continue
        image, (void, *objects) = normalize(image[None].to(device).float() / 255), objects.to(device)
        for i, network in enumerate(networks if objects else ()):
            kept = repeat(keep_mass(attention_maps(network, image)[0], mass), "heads h w -> heads (h p) (w q)", p=patch, q=patch)
            index = jaccard(kept, torch.stack(objects), void).double().cpu()
            sums[n, i] = torch.cat([index.amax(1, keepdim=True), index], 1).sum(0)
            counts[n] = len(index)
    sums, counts = combine(sums, world), combine(counts, world)
    return 100 * sums.sum(0) / counts.sum(), counts.sum().item(), (counts > 0).sum().item()


def open_splits(data):
    """(training split, held-out split or None) of a labelled data set; labels are those of the training split's classes, then of classes that it lacks.

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
            say(f"note: the training split has no {', '.join(unseen)}: those held-out images count as wrong")
        val.labels = [label if label < 0 else (train.classes + unseen).index(val.classes[label]) for label in val.labels]
    return train, val


def report_knn(networks, data, extract, args):
    """Prints the table of k-NN accuracies; the figures."""
    train, val = in_turn(lambda: open_splits(data))
    (top1, (n, m)), *beside = (knn_of(network, train, val, extract, args.k) for network in networks)
    counts, others = Counter(label for label in (val or train).labels if label >= 0), n - (val is None)
    chance = f"chance {100 / len(train.classes):.1f} %, always the commonest class {100 * counts.most_common(1)[0][1] / counts.total():.1f} %"
    say(f"{data}: {m} queries against {others} images, {len(train.classes)} classes; {chance}")
    say(f"{'k':>5}  {'top-1 %':>8}" + f"  {'untrained %':>11}" * len(beside))
    for k in args.k:
        say(f"{k:5}  {top1[k]:8.1f}" + "".join(f"  {base[k]:11.1f}" for base, _ in beside) + (f"  (all {others} images)" if k > others else ""))
    return {"bank": others, "queries": m, "top1": top1} | {"untrained": base for base, _ in beside}


def report_linear(networks, data, extract, args, device, dtype, ranks, folder):
    """Prints the table of the heads and writes the best of them to linear.pth; the figures."""
    train, val = in_turn(lambda: open_splits(data))
    if val is None:
        raise ValueError(f"{data!r} has no held-out split to test a linear classifier on: put its images into train/ and val/")
    say(f"{data}: {len(train)} images to train on, {len(val)} to test on, {len(train.classes)} classes, {args.epochs} epochs")
    (heads, scores), *beside = (linear(network, train, val, partial(extract, last=args.last, mean_patches=args.mean_patches), args, device, dtype, ranks) for network in networks)
    if args.cached:
        say("not the paper's protocol: --cached trains on central crops only, seen once by the network")
    say(f"{'lr':>7}  {'top-1 %':>8}  {'top-5 %':>8}  {'loss':>6}" + f"  {'untrained %':>11}" * len(beside))
    for i, (rate, top1, top5, loss) in enumerate(zip(args.lr, *(part.tolist() for part in scores))):
        say(f"{rate:7g}  {top1:8.1f}  {top5:8.1f}  {loss:6.3f}" + "".join(f"  {base[0][i]:11.1f}" for _, base in beside))
    best = scores[0].argmax().item()
    saved = {"weight": heads.weight[best].detach().cpu(), "bias": heads.bias[best, 0].detach().cpu(), "classes": train.classes}
    saved |= {"last": args.last, "mean_patches": args.mean_patches, "lr": args.lr[best], "cached": args.cached}
    if first_process():
        write_whole(folder / "linear.pth", lambda file: torch.save(saved, file))
    say(f"best: learning rate {args.lr[best]:g} (x batch / 256) -> {folder / 'linear.pth'}")
    return {name: part.tolist() for name, part in zip(("top1", "top5", "loss"), scores)} | {"untrained": base[0].tolist() for _, base in beside}


def report_masks(networks, data, device, args, ranks):
    """Prints the table of Jaccard indices; the figures."""
    if not isinstance(networks[0], ViT):
        raise ValueError(f"{args.checkpoint} is a {describe(networks[0])}: a convnet has no attention")
    images = in_turn(lambda: load(data, "val") or load(data, "train"))
    short = args.size or max(networks[0].patch, networks[0].image_size * 480 // 224 // networks[0].patch * networks[0].patch)
    means, objects, used = attention_masks(networks, images, device, short, args.mass, args.workers, ranks)
    if used < len(images):
        say(f"{len(images) - used} of {len(images)} images have no object, or cannot be read, and are left out")
    say(f"{data}: {objects} objects in {used} images, short side {short}, {100 * args.mass:g} % of the attention; Jaccard index in %")
    say(f"{'':9}  {'best head':>9}" + "".join(f"  {f'head {i}':>7}" for i in range(means.shape[1] - 1)))
    for name, (best, *single) in zip(("trained", "untrained"), means.tolist()):
        say(f"{name:9}  {best:9.1f}" + "".join(f"  {one:7.1f}" for one in single))
    return {"objects": objects, "images": used, "size": short, "jaccard": means[0].tolist()} | {"untrained": base.tolist() for base in means[1:]}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("knn", "linear", "masks"))
    parser.add_argument("checkpoint", help=f"a checkpoint, or the name of released weights: {', '.join(RELEASED)}")
    parser.add_argument("--data", help="a folder or a data set's name (default: what the checkpoint was trained on)")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="which of a checkpoint's two networks")
    parser.add_argument("--k", type=int, nargs="+", default=list(KS), help="knn: neighbours (the paper's: 10 20 100 200, 20 is best)")
    parser.add_argument("--cached", action="store_true", help="linear: train on features extracted once, in seconds; not the paper's protocol")
    parser.add_argument("--epochs", type=int, default=100, help="linear: passes over the data (the paper's: 100)")
    parser.add_argument("--lr", type=float, nargs="+", default=list(SWEEP), help="linear: learning rates for a batch of 256, all tried at once")
    parser.add_argument("--last", type=int, help="linear: how many blocks' class tokens (default, as in the paper: 4, from width 768 on 1)")
    parser.add_argument("--mean_patches", action=argparse.BooleanOptionalAction, help="linear: the mean patch token too (default, as in the paper: from width 768 on)")
    parser.add_argument("--mass", type=float, default=0.6, help="masks: share of the attention inside (the paper's: 0.6)")
    parser.add_argument("--size", type=int, help="masks: short side in pixels (default: 480/224 of the training size, 480 for the paper's)")
    parser.add_argument("--untrained", action=argparse.BooleanOptionalAction, help="a network with fresh weights beside (default: yes, but for linear only if --cached)")
    parser.add_argument("--cache", action="store_true", help="knn, linear: keep features in the output folder, and read those that are there")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision of the network in knn and linear (auto: on GPUs)")
    parser.add_argument("--batch", type=int, default=256, help="images a process at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0, help="linear: of the crops and their order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for evaluate.jsonl, linear.pth and kept features (default: the checkpoint's)")
    return parser.parse_args(argv)


def main(args):
    if min(*args.k, args.batch, args.epochs) < 1 or args.workers < 0:
        raise ValueError("--k and --batch must be positive, --epochs too, --workers not negative")
    if not all(0 < rate < math.inf for rate in args.lr) or not 0 < args.mass <= 1 or (args.size is not None and args.size < 1):
        raise ValueError(f"--lr {args.lr} and --size {args.size} must be positive, --mass {args.mass} in (0, 1]")
    device, *ranks = join(args.device)
    try:
        evaluate(args, device, ranks)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def evaluate(args, device, ranks):
    start, dtype = time.monotonic(), amp_dtype(args.amp, device)
    backbone, trained_with = in_turn(lambda: load_backbone(args.checkpoint, args.network))
    data = args.data or trained_with.get("data")
    if data is None:
        raise ValueError(f"{args.checkpoint!r} does not say what it was trained on: give --data")
    blocks, large = len(backbone.blocks) if isinstance(backbone, ViT) else 1, backbone.dim >= 768
    args.last = args.last or (1 if large else min(4, blocks))
    args.mean_patches = large and isinstance(backbone, ViT) if args.mean_patches is None else args.mean_patches
    if not 1 <= args.last <= blocks or (args.mean_patches and not isinstance(backbone, ViT)):
        raise ValueError(f"--last {args.last} --mean_patches {args.mean_patches}: not with a {describe(backbone)}")
    folder = args.output or (Path(".") if args.checkpoint in RELEASED else Path(args.checkpoint).parent)
    if args.output:
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: choose another --output")
    say(f"{args.checkpoint}: {args.network}, {describe(backbone)}")
    beside = args.untrained if args.untrained is not None else args.protocol != "linear" or args.cached
    networks = [backbone.to(device), untrained(backbone)][: 1 + beside]
    extract = partial(features, device=device, batch=args.batch, workers=args.workers, dtype=dtype, ranks=ranks, cache=folder if args.cache else None)
    if args.protocol == "knn":
        figures = report_knn(networks, data, extract, args)
    elif args.protocol == "linear":
        figures = report_linear(networks, data, extract, args, device, dtype, ranks, folder)
    else:
        figures = report_masks(networks, data, device, args, ranks)
    line = {"checkpoint": args.checkpoint, "network": args.network, "data": data, "protocol": args.protocol, **figures, "seconds": round(time.monotonic() - start, 1)}
    if first_process():
        with open(folder / "evaluate.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    command(main, parse_args)
