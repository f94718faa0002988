"""What frozen features are worth: k-NN, linear probe (3.2, 4.1; docs/tour.md, stop 8).

    python evaluate.py knn    runs/laptop/last.pth       data: what the checkpoint was trained on
    python evaluate.py linear runs/laptop/last.pth       the paper's protocol, on random crops
    python evaluate.py linear runs/laptop/last.pth --cached     on central crops, in seconds
    python evaluate.py logistic runs/laptop/last.pth     with few of the labels (lowshot.py)
    python evaluate.py predict runs/laptop/last.pth runs/laptop/linear.pth img.jpg
    torchrun --nproc_per_node=8 evaluate.py ...          each process with its share of the images

Beside k-NN, logistic and cached linear figures stand an untrained network's; each evaluation adds
a line to evaluate.jsonl in the checkpoint's folder. The linear protocol differs from the reference
code's: its random crops are bicubic, its learning rates are tried all at once and follow the cosine
step by step, an epoch's last, smaller batch is left out, and the last epoch counts, not the best.
Axes: b batch, d features, c classes, s learning rates.
"""

import argparse
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import nn
from torch.utils.data import DataLoader

from backbone import RawPixels, trained_at
from checkpoint import load_backbone, load_checkpoint
from data import Order, load_labelled
from distributed import in_turn, usable_device
from features import (
    Crops,
    Extraction,
    choose_labelled,
    describe_tokens,
    labelled_features,
    made_by,
    probe_tokens,
    represent,
    represent_image,
)
from files import write_whole
from film import stills
from lowshot import evaluate_logistic
from protocol import add_protocol, check_positive, check_workers, extraction, run_protocol
from recipe import add_device_flag, add_network_flags
from terminal import first_process, progress, run_command, say

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


def bank_and_queries(backbone, train, val, how, limits=(None, None)):
    """Return the bank's features and labels, then the queries'; val None: the bank once more.

    limits: at most so many images of each.
    """
    bank = labelled_features(backbone, train, how, limits[0])
    queries = bank if val is None else labelled_features(backbone, val, how, limits[1])
    return *bank, *queries


def knn_of(backbone, train, val, how, ks=(10, 20, 100, 200), limits=(None, None)):
    """Return a backbone's k-NN accuracy, and how many images are in the bank and among the queries.

    val None: the training images against one another. limits: as in bank_and_queries().
    """
    bank, bank_labels, queries, labels = bank_and_queries(backbone, train, val, how, limits)
    top1 = knn(bank, bank_labels, queries, labels, ks, alone=val is None)
    return top1, (len(bank), len(queries))


def knn_of_pixels(train, val, how, ks):
    """Return what a network must beat: {name: k-NN accuracy} of central crops of 32 x 32 pixels.

    pixels: normalised as for a network; less mean: less their mean over the training images.
    """
    how = replace(how, size=None, cache=None)
    alone = val is None
    bank, bank_labels, queries, labels = bank_and_queries(RawPixels(), train, val, how)
    pixels = knn(bank, bank_labels, queries, labels, ks, alone=alone)
    mean = bank.mean(0)
    centred = knn(bank - mean, bank_labels, queries - mean, labels, ks, alone=alone)
    return {"pixels": pixels, "less mean": centred}


def evaluate_knn(args, subject):
    """The k-NN protocol: print its table, and return its figures."""
    train, val = in_turn(lambda: load_labelled(subject.data))
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
    columns = {name: result[0] for name, result in results.items() if name != "trained"}
    if args.pixels:
        columns |= knn_of_pixels(train, val, how, args.k)
    say(f"{'k':>5}  {'top-1 %':>8}" + "".join(f"  {name + ' %':>11}" for name in columns))
    for k in args.k:
        line = f"{k:5}  {top1[k]:8.1f}" + "".join(f"  {col[k]:11.1f}" for col in columns.values())
        if k > voters:
            line += f"  (all {voters} images)"
        say(line)
    return {"bank": voters, "queries": queries, "top1": top1, **columns}


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
    rates = torch.tensor(rates, device=device)
    start = time.monotonic()
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


def evaluate_linear(args, subject):
    """The linear protocol: print its table, save the best head, and return the figures."""
    train, val = in_turn(lambda: load_labelled(subject.data, held_out=True))
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
    made = made_by(subject.backbone, replace(how, dtype=None))
    save_head(path, heads[best], train.classes, args.cached, made, kind)
    say(f"the best, of learning rate {args.lr[best]:g} x batch / 256 -> {path}")
    figures = {"epochs": args.epochs, "cached": args.cached, **kind, "lr": args.lr}
    figures |= {"top1": top1.tolist(), "top5": top5.tolist(), "loss": loss.tolist()}
    if beside:
        figures["untrained"] = untrained_top1
    return figures


def save_head(path, head, classes, cached, made, kind):
    """Write a linear classifier, [c, d + 1], and what it needs to be used."""
    saved = {"weight": head[:, :-1].cpu(), "bias": head[:, -1].cpu(), "classes": classes}
    saved |= {"cached": cached, "made_by": made, **kind}
    if first_process():
        write_whole(path, lambda file: torch.save(saved, file))


def predict(args):
    """Print the likeliest classes of images, with the probability that linear.pth gives them."""
    head = load_checkpoint(args.head)
    if not {"weight", "bias", "classes", "last", "mean_patches", "made_by"} <= head.keys():
        raise ValueError(f"{str(args.head)!r} is no linear.pth: evaluate.py linear writes one")
    loaded = load_backbone(args.checkpoint, args.network, args.heads)
    device = usable_device(args.device)
    backbone = loaded.backbone.to(device)
    weight = head["weight"].to(device)
    how = Extraction(device, last=head["last"], mean_patches=head["mean_patches"])
    if head["made_by"] != made_by(backbone, how):
        raise ValueError(f"{str(args.head)!r} belongs to another network than {args.checkpoint}")
    say(loaded.description)
    images = 0
    for source in args.images:
        for path, image in stills(source):
            x = represent_image(backbone, image, how)
            probability = (x @ weight.T + head["bias"].to(device)).softmax(0)
            value, order = probability.topk(min(args.top, len(probability)))
            likeliest = []
            for share, number in zip(value.tolist(), order.tolist()):
                likeliest.append(f"{100 * share:.1f} % {head['classes'][number]}")
            say(f"{path}: {', '.join(likeliest)}")
            images += 1
    if images == 0:
        raise ValueError("none of the images can be read")


# ---- the commands ----


def add_evaluation(commands, name, text):
    """Add a command with the flags that all evaluations have: its add_argument."""
    add = add_protocol(commands, name, text)
    add("--untrained", action=argparse.BooleanOptionalAction, help="an untrained network beside "
        "(default: yes, in linear only if --cached)")  # fmt: skip
    return add


def add_token_flags(add):
    add("--last", type=int, help="how many blocks' class tokens (default: 4; from width 768 on, or "
        "of fewer than four blocks, 1)")  # fmt: skip
    add("--mean_patches", action=argparse.BooleanOptionalAction, help="the mean patch token too "
        "(default: from width 768 on, or of fewer than four blocks)")  # fmt: skip


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="protocol", required=True)

    add = add_evaluation(commands, "knn", "weighted k-NN")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200],
        help="neighbours (the paper's: 10 20 100 200, 20 is best)")  # fmt: skip
    add("--pixels", action="store_true", help="k-NN on the pixels themselves beside it "
        "(12 kB an image)")  # fmt: skip

    add = add_evaluation(commands, "linear", "a linear classifier on frozen features")
    add("--cached", action="store_true", help="train on features extracted once, in seconds; not "
        "the paper's protocol")  # fmt: skip
    add("--epochs", type=int, default=100, help="passes over the data (the paper's: 100)")
    add("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3],
        help="learning rates for a batch of 256")  # fmt: skip
    add("--seed", type=int, default=0, help="of the crops and their order")
    add_token_flags(add)

    add = add_evaluation(commands, "logistic", "logistic regression with few of the labels")
    add("--fraction", type=float, nargs="+", default=[0.01, 0.1],
        help="shares of each class's labels (the paper's: 0.01 0.1)")  # fmt: skip
    add("--draws", type=int, default=5, help="how often the images are drawn")
    add("--penalty", type=float, default=1.0, help="L2 penalty, for the sum over the images")
    add_token_flags(add)

    predicting = commands.add_parser("predict", help="the likeliest classes of images")
    add = predicting.add_argument
    add("checkpoint", help="a checkpoint, or the name of released weights")
    add("head", type=Path, help="linear.pth, as evaluate.py linear writes it")
    add("images", nargs="+", type=Path, help="images, or folders of images")
    add("--top", type=int, default=3, help="how many classes")
    add_network_flags(predicting)
    add_device_flag(predicting)
    return parser.parse_args(argv)


PROTOCOLS = {"knn": evaluate_knn, "linear": evaluate_linear, "logistic": evaluate_logistic}


def main(args):
    flags = "k lr batch epochs last fraction draws penalty top"
    check_positive(args, *flags.split())
    if args.protocol == "predict":
        predict(args)
        return
    if args.protocol == "logistic" and max(args.fraction) > 1:
        raise ValueError(f"--fraction {args.fraction} must not be above 1")
    check_workers(args)
    run_protocol(args, PROTOCOLS[args.protocol])


if __name__ == "__main__":
    run_command(main, parse_args)
