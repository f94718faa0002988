"""What frozen features are worth (3.2, "Evaluation protocols", and 4.1): k-NN and a linear probe.

    python evaluate.py knn    runs/laptop/last.pth       data: what the checkpoint was trained on
    python evaluate.py linear runs/laptop/last.pth       the paper's protocol, on random crops
    python evaluate.py linear runs/laptop/last.pth --cached     on central crops, in seconds
    torchrun --nproc_per_node=8 evaluate.py ...          each process with its share of the images

Beside each figure stands an untrained network's; each evaluation adds a line to evaluate.jsonl in
the checkpoint's folder. The linear protocol differs from the reference code's in three points: its
random crops are bicubic, its learning rates are tried all at once, and an epoch's last, smaller
batch is left out. Axes: b batch, d features, c classes, s learning rates swept.
"""

import argparse
import math
import time
from collections import Counter
from dataclasses import replace
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import nn
from torch.utils.data import DataLoader

from backbone import trained_at
from data import Order, load
from distributed import in_turn
from features import Crops, extract, represent
from files import write_whole
from protocol import (
    add_extraction_flags,
    add_flags,
    check_positive,
    check_workers,
    extraction,
    run_protocol,
)
from terminal import first_process, progress, run_command, say
from vit import ViT


def choose_labelled(labels, limit=None):
    """Return the indices of labelled images: all of them, or limit drawn at random.

    The draw is always the same. ValueError: there are none.
    """
    indices = [i for i, label in enumerate(labels) if label >= 0]
    if not indices:
        raise ValueError("no labelled images")
    if limit and limit < len(indices):
        return sorted(Random(0).sample(indices, limit))
    return indices


def labelled_features(backbone, images, how, limit=None):
    """Return (features [n, d], labels [n]) of the labelled images, or of limit of them."""
    x, read = extract(backbone, images, choose_labelled(images.labels, limit), how)
    return x, torch.tensor([images.labels[i] for i in read], device=x.device)


# ---- weighted k-NN ----


def knn(bank, bank_labels, queries, labels, ks=(10, 20, 100, 200), temperature=0.07, alone=False):
    """Return weighted k-NN's top-1 accuracy, {k: per cent} ("Evaluation protocols").

    bank [n, d], queries [m, d]: features, normalised here; labels are class indices. alone: the
    queries are the bank, and none votes for itself. A k above the number of candidates counts them
    all. Of classes with as many votes the lower is taken; a class that the bank lacks is wrong.
    """
    most = min(max(ks), len(bank) - alone)
    if most < 1:
        raise ValueError("one image has no neighbours: k-NN needs two")
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    classes = 1 + int(bank_labels.max())
    right = dict.fromkeys(ks, 0)
    chunk = max(1, min(1024, 2**26 // max(len(bank), classes)))  # 256 MB of similarities
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T
        if alone:
            similarity.diagonal(start).fill_(-2)
        similarity, nearest = similarity.topk(most)
        # float64 on the host: in float32 far votes vanish beside near ones
        weights = (similarity.cpu().double() / temperature).exp()
        voted, truth = bank_labels[nearest].cpu(), labels[start : start + chunk].cpu()
        for k in ks:
            votes = torch.zeros(len(weights), classes, dtype=torch.double)
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            right[k] += (votes.argmax(1) == truth).sum().item()
    return {k: 100 * count / len(queries) for k, count in right.items()}


def knn_of(backbone, train, val, how, ks=(10, 20, 100, 200), limits=(None, None)):
    """Return a backbone's k-NN accuracy, and how many images are in the bank and among the queries.

    val None: the training images against one another. limits: at most so many of each.
    """
    bank, bank_labels = labelled_features(backbone, train, how, limits[0])
    if val is None:
        top1 = knn(bank, bank_labels, bank, bank_labels, ks, alone=True)
        return top1, (len(bank), len(bank))
    queries, labels = labelled_features(backbone, val, how, limits[1])
    return knn(bank, bank_labels, queries, labels, ks), (len(bank), len(queries))


def evaluate_knn(args, subject):
    """The k-NN protocol: print its table, and return its figures."""
    train, val = in_turn(lambda: open_splits(subject.data))
    how = extraction(args, subject)
    networks = subject.networks(args.untrained is not False)
    results = {name: knn_of(net, train, val, how, args.k) for name, net in networks.items()}
    top1, (bank, queries) = results["trained"]
    voters = bank if val else bank - 1

    counts = Counter(label for label in (val or train).labels if label >= 0)
    chance = 100 / len(train.classes)
    commonest = 100 * max(counts.values()) / counts.total()
    say(
        f"{subject.data}: {queries} queries against {voters} images, {len(train.classes)} classes; "
        f"chance {chance:.1f} %, always the commonest class {commonest:.1f} %"
    )
    columns = {name: result[0] for name, result in results.items()}
    say(f"{'k':>5}  {'top-1 %':>8}" + ("  untrained %" if len(columns) > 1 else ""))
    for k in args.k:
        line = f"{k:5}  {top1[k]:8.1f}"
        if len(columns) > 1:
            line += f"  {columns['untrained'][k]:11.1f}"
        if k > voters:
            line += f"  (all {voters} images)"
        say(line)
    figures = {"bank": voters, "queries": queries, "top1": top1}
    if len(columns) > 1:
        figures["untrained"] = columns["untrained"]
    return figures


# ---- linear probe ----


def head_logits(x, heads):
    """Features [b, d], heads [s, c, d + 1] (the last column: the bias) -> logits [s, b, c]."""
    return einsum(F.pad(x, (0, 1), value=1.0), heads, "b d, s c d -> s b c")


def cross_entropies(logits, labels):
    """Logits [s, b, c] and labels [b], -1 for none (a loss of 0) -> cross-entropy [b, s]."""
    labels = repeat(labels, "b -> b s", s=len(logits))
    logits = rearrange(logits, "s b c -> b c s")
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)


def fit_heads(batches, steps, rates, classes, dim, device, world=1):
    """Train a linear classifier for each learning rate: heads for head_logits(), [s, c, d + 1].

    batches: (features [b, d], labels [b], -1 for none). SGD with momentum 0.9, no weight decay, the
    rate falling to 0 on a cosine. One optimiser trains all heads: the gradient of a sum of losses
    is each head's own, and in SGD a learning rate is a factor of the loss.
    """
    # the reference code's start: weights of standard deviation 0.01, no bias
    weight = 0.01 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    heads = repeat(F.pad(weight, (0, 1)), "c d -> s c d", s=len(rates))
    heads = nn.Parameter(heads.to(device, copy=True))
    optimizer = torch.optim.SGD([heads], lr=1.0, momentum=0.9)
    rates, start = torch.tensor(rates, device=device), time.monotonic()
    for step, (x, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        losses = cross_entropies(head_logits(x, heads), labels).mean(0)
        (rates / world * losses).sum().backward()
        if world > 1:
            dist.all_reduce(heads.grad)
        optimizer.step()
        progress("steps", step + 1, steps, start)
    return heads.detach()


def score(heads, x, labels):
    """Return top-1 and top-5 accuracy in per cent and the mean loss of features [m, d], each [s].

    An image of a class without an output counts as wrong, and is left out of the loss.
    """
    right1, right5, loss = 0, 0, 0
    classes = heads.shape[1]
    for part, target in zip(x.split(1024), labels.split(1024)):
        logits = head_logits(part, heads)
        best = logits.topk(min(5, classes)).indices == target[:, None]  # [s, m, 5]
        known = target.where(target < classes, -1)
        right1 = right1 + best[..., 0].sum(1).cpu().double()
        right5 = right5 + best.sum((1, 2)).cpu().double()
        loss = loss + cross_entropies(logits, known).sum(0).cpu().double()
    known = (labels < classes).sum().item()
    return 100 * right1 / len(labels), 100 * right5 / len(labels), loss / known


def probe(backbone, train, val, how, args):
    """Train heads on one split and score them on the other: (heads, score()).

    They are tested on central crops, and trained on random ones; with args.cached on the features
    of central ones.
    """
    x, labels = labelled_features(backbone, val, how)
    if args.cached:
        bank, targets = labelled_features(backbone, train, how)
    else:
        indices = choose_labelled(train.labels)
        targets = torch.tensor([train.labels[i] for i in indices], device=x.device)

    batch = max(1, min(args.batch, len(targets) // how.world))
    order = Order(len(targets), batch, 1, how.rank, how.world, args.seed)
    steps = args.epochs * order.steps_per_epoch
    if args.cached:
        batches = cached_batches(bank, targets, order.batches(0, steps))
    else:
        crops = Crops(train, indices, trained_at(backbone), args.seed)
        batches = random_batches(backbone, crops, targets, order.batches(0, steps), how)
    rates = [rate * order.global_batch / 256 for rate in args.lr]
    classes = len(train.classes)
    heads = fit_heads(batches, steps, rates, classes, x.shape[1], x.device, how.world)
    return heads, score(heads, x, labels)


def cached_batches(bank, targets, batches):
    """Yield batches of features that have been extracted once."""
    for keys in batches:
        n = torch.tensor([n for _, n in keys], device=bank.device)
        yield bank[n], targets[n]


def random_batches(backbone, crops, targets, batches, how):
    """Yield batches of features of random crops; an image that cannot be read has label -1."""
    pin = how.device.type == "cuda"
    loader = DataLoader(crops, batch_sampler=batches, num_workers=how.workers, pin_memory=pin)
    for n, crop in loader:
        n = n.to(how.device)
        yield represent(backbone, crop, how), targets[n].where(n >= 0, -1)


def probe_tokens(backbone, args):
    """Choose the tokens that the probe sees: {"last": ..., "mean_patches": ...}, as in Extraction.

    The paper takes the last four blocks' class tokens for ViT-S; for ViT-B the last one's and its
    mean patch token. So do we for a ViT with fewer than four blocks, which the paper lacks.
    """
    if not isinstance(backbone, ViT):
        return {"last": 1, "mean_patches": False}
    depth = len(backbone.blocks)
    as_vit_b = backbone.dim >= 768 or depth < 4
    last = args.last or (1 if as_vit_b else 4)
    mean_patches = as_vit_b if args.mean_patches is None else args.mean_patches
    return {"last": min(last, depth), "mean_patches": mean_patches}


def describe_tokens(backbone, last, mean_patches):
    if not isinstance(backbone, ViT):
        return "pooled features"
    blocks = "1 block" if last == 1 else f"{last} blocks"
    mean = ", mean patch token" if mean_patches else ""
    return f"class tokens of the last {blocks}{mean}"


def evaluate_linear(args, subject):
    """The linear protocol: print its table, save the best head, and return the figures."""
    train, val = in_turn(lambda: open_splits(subject.data))
    if val is None:
        raise ValueError(
            f"{subject.data!r} has no held-out split to test a linear classifier on: "
            "put its images into train/ and val/"
        )
    kind = probe_tokens(subject.backbone, args)
    how = replace(extraction(args, subject), **kind)
    beside = args.cached if args.untrained is None else args.untrained
    networks = subject.networks(beside)
    results = {name: probe(net, train, val, how, args) for name, net in networks.items()}
    heads, (top1, top5, loss) = results["trained"]

    crops = "random crops"
    if args.cached:
        crops = "central crops' features, extracted once: not the paper's protocol"
    say(
        f"{subject.data}: {len(train)} images to train on, {len(val)} to test on, "
        f"{len(train.classes)} classes; {describe_tokens(subject.backbone, **kind)}; "
        f"{args.epochs} epochs on {crops}"
    )
    header = f"{'lr':>7}  {'top-1 %':>8}  {'top-5 %':>8}  {'loss':>6}"
    say(header + ("  untrained %" if beside else ""))
    untrained_top1 = results["untrained"][1][0].tolist() if beside else []
    for i, rate in enumerate(args.lr):
        line = f"{rate:7g}  {top1[i]:8.1f}  {top5[i]:8.1f}  {loss[i]:6.3f}"
        say(line + "".join(f"  {value:11.1f}" for value in untrained_top1[i : i + 1]))

    best = top1.argmax().item()
    path = subject.folder / "linear.pth"
    save_head(path, heads[best], train.classes, args.cached, kind)
    say(f"the best, of learning rate {args.lr[best]:g} x batch / 256 -> {path}")
    figures = {"epochs": args.epochs, "cached": args.cached, **kind, "lr": args.lr}
    figures |= {"top1": top1.tolist(), "top5": top5.tolist(), "loss": loss.tolist()}
    if beside:
        figures["untrained"] = untrained_top1
    return figures


def save_head(path, head, classes, cached, kind):
    """Write a linear classifier, [c, d + 1], and what it needs to be used."""
    saved = {"weight": head[:, :-1].cpu(), "bias": head[:, -1].cpu(), "classes": classes}
    saved |= {"cached": cached, **kind}
    if first_process():
        write_whole(path, lambda file: torch.save(saved, file))


# ---- the command ----


def open_splits(data):
    """Return (training split, held-out split or None) of a labelled data set.

    Held-out labels are numbered like the training split's, further classes after those.
    ValueError: no labels, or no class in common.
    """
    train, val = load(data, "train"), load(data, "val")
    for name, images in ((repr(data), train), (f"the held-out split of {data!r}", val)):
        if images is not None and images.labels is None:
            note = f" ({images.note})" if images.note else ""
            raise ValueError(
                f"{name} has no labels: put the images of each class, two or more, into a folder "
                f"of its own{note}"
            )
    if val is None or val.classes == train.classes:
        return train, val
    unseen = [name for name in val.classes if name not in train.classes]
    if len(unseen) == len(val.classes):
        raise ValueError(
            f"{data!r}: the training split has classes {train.classes}, "
            f"the held-out one {val.classes}: none in common"
        )
    if unseen:
        names = ", ".join(map(repr, unseen))
        say(f"note: the training split lacks {names}: held-out images of it count as wrong")
    number = {name: i for i, name in enumerate(train.classes + unseen)}
    val.labels = [label if label < 0 else number[val.classes[label]] for label in val.labels]
    return train, val


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("protocol", choices=("knn", "linear"))
    add_flags(parser)
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200],
        help="knn: neighbours (the paper's: 10 20 100 200, 20 is best)")  # fmt: skip
    add("--cached", action="store_true", help="linear: train on features extracted once, in "
        "seconds; not the paper's protocol")  # fmt: skip
    add("--epochs", type=int, default=100, help="linear: passes over the data (the paper's: 100)")
    add("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3],
        help="linear: learning rates for a batch of 256")  # fmt: skip
    add("--last", type=int, help="linear: how many blocks' class tokens (default: 4; from width "
        "768 on, or of fewer than four blocks, 1)")  # fmt: skip
    add("--mean_patches", action=argparse.BooleanOptionalAction, help="linear: the mean patch "
        "token too (default: from width 768 on, or of fewer than four blocks)")  # fmt: skip
    add("--untrained", action=argparse.BooleanOptionalAction,
        help="an untrained network beside (default: yes, in linear only if --cached)")  # fmt: skip
    add_extraction_flags(parser)
    add("--seed", type=int, default=0, help="linear: of the crops and their order")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, "k", "lr", "batch", "epochs", "last")
    check_workers(args)
    run_protocol(args, evaluate_knn if args.protocol == "knn" else evaluate_linear)


if __name__ == "__main__":
    run_command(main, parse_args)
