"""What the frozen features are worth (section 4): weighted k-nearest neighbours.

    python evaluate.py knn runs/laptop/last.pth [--data path/to/images]

Features are class tokens of the central crop, l2-normalised. A query's k nearest images by cosine similarity s vote for their class with weight
exp(s / 0.07). The figure of an untrained network of the same architecture, and chance, stand beside.
"""

import argparse
import sys
import time
from collections import Counter
from random import Random

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from augment import center_crop, normalize
from data import load
from run import command, minutes, say, status
from vit import describe, load_backbone, untrained, usable_device


class CenterCrops(Dataset):
    """Some of the images, each as (index, central crop); index -1 marks one that cannot be read."""

    def __init__(self, images, indices, size):
        self.images, self.indices, self.size = images, indices, size

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        try:
            return self.indices[i], center_crop(self.images[self.indices[i]], self.size)
        except Exception:  # whatever a decoder may raise
            return -1, torch.zeros(3, self.size, self.size, dtype=torch.uint8)


@torch.inference_mode()
def features(backbone, images, indices, device, batch=256, workers=0):
    """Class tokens of the given images' central crops: ([n, d] float32 on device, the n indices that could be read)."""
    crops = CenterCrops(images, indices, backbone.image_size)
    start, out, read, mode = time.monotonic(), [], [], backbone.training
    backbone.eval()
    for i, crop in DataLoader(crops, batch, num_workers=workers, pin_memory=device.type == "cuda"):
        tokens = backbone(normalize(crop.to(device, non_blocking=True).float() / 255))
        out.append(tokens[i >= 0].float())
        read += i[i >= 0].tolist()
        done = sum(map(len, out))
        status(f"features {done}/{len(indices)}, {minutes((time.monotonic() - start) * (len(indices) / max(1, done) - 1))} left")
    backbone.train(mode)
    if not read:
        raise ValueError(f"none of {len(indices)} images can be read, the first of them {images.name(indices[0])!r}" if indices else "no labelled images")
    if len(read) < len(indices):
        say(f"{len(indices) - len(read)} images cannot be read and are left out, the first {images.name(min(set(indices) - set(read)))!r}", sys.stderr)
    return torch.cat(out), read


def knn(bank, bank_labels, queries, labels, ks=(10, 20, 100, 200), temperature=0.07, leave_one_out=False):
    """Weighted k-NN's top-1 accuracy in per cent: {k: accuracy}.

    bank [n, d], queries [m, d]: features, normalised here. leave_one_out: the queries are the bank, and none votes for itself. A k above the number of
    candidates counts them all. A tie between classes goes to the lower index.
    """
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    classes = 1 + max(int(bank_labels.max()), int(labels.max()))
    limit, chunk = len(bank) - leave_one_out, max(1, 2**25 // len(bank))  # 128 MB of similarities at a time
    right = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T
        if leave_one_out:
            rows = torch.arange(len(similarity), device=bank.device)
            similarity[rows, start + rows] = -2
        similarity, nearest = similarity.topk(min(max(ks), limit))
        weight, voted = (similarity / temperature).exp(), bank_labels[nearest]
        for k in ks:
            votes = weight.new_zeros(len(weight), classes).scatter_add_(1, voted[:, :k], weight[:, :k])
            right[k] += (votes.argmax(1) == labels[start : start + chunk]).sum().item()
    return {k: 100 * n / len(queries) for k, n in right.items()}


def some(labels, limit):
    """Indices of labelled images: all of them, or limit drawn at random, the same each time."""
    indices = [i for i, label in enumerate(labels) if label >= 0]
    return sorted(Random(0).sample(indices, limit)) if limit and limit < len(indices) else indices


def knn_of(backbone, train, val, device, batch=256, workers=0, ks=(10, 20, 100, 200), limits=(None, None)):
    """The k-NN accuracy of a backbone, and (bank, queries), how many images that compares. val None: train against itself, leaving one out.

    limits: at most so many images in the bank and among the queries.
    """
    bank, read = features(backbone, train, some(train.labels, limits[0]), device, batch, workers)
    bank_labels = torch.tensor([train.labels[i] for i in read], device=device)
    if val is None:
        return knn(bank, bank_labels, bank, bank_labels, ks, leave_one_out=True), (len(bank), len(bank))
    queries, read = features(backbone, val, some(val.labels, limits[1]), device, batch, workers)
    labels = torch.tensor([val.labels[i] for i in read], device=device)
    return knn(bank, bank_labels, queries, labels, ks), (len(bank), len(queries))


def open_splits(data):
    """(training split, held-out split or None) of a labelled data set. ValueError: no labels, or splits whose classes differ."""
    train, val = load(data, "train"), load(data, "val")
    if train.labels is None:
        raise ValueError(f"{data!r} has no labels: put the images of each class into a folder of its own")
    if val is not None and val.classes != train.classes:
        raise ValueError(f"{data!r}: the training split has classes {train.classes}, the held-out one {val.classes}")
    return train, val


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("knn",))
    parser.add_argument("checkpoint", help="a checkpoint, or the name of released weights: dino_vits16, dino_vits8, dino_vitb16, dino_vitb8, dino_resnet50")
    parser.add_argument("--data", help="a folder or a data set's name (default: what the checkpoint was trained on)")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="which of a checkpoint's two networks")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (the paper's: 10 20 100 200, 20 is best)")
    parser.add_argument("--batch", type=int, default=256, help="images at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True, help="also evaluate a network with fresh weights")
    return parser.parse_args(argv)


def main(args):
    if min(args.k) < 1 or args.batch < 1 or args.workers < 0:
        raise ValueError("--k and --batch must be positive, --workers not negative")
    backbone, trained_with = load_backbone(args.checkpoint, args.network)
    device = usable_device(args.device)
    data = args.data or trained_with.get("data")
    if data is None:
        raise ValueError(f"{args.checkpoint!r} does not say what it was trained on: give --data")
    train, val = open_splits(data)
    say(f"{args.checkpoint}: {args.network}, {describe(backbone)}")

    def evaluate(network):
        return knn_of(network.to(device), train, val, device, args.batch, args.workers, args.k)

    top1, (n, m) = evaluate(backbone)
    base = evaluate(untrained(backbone))[0] if args.untrained else {}
    most = Counter((val or train).labels).most_common(1)[0][1]
    chance = f"chance {100 / len(train.classes):.1f} %, always the commonest class {100 * most / m:.1f} %"
    say(f"{data}: {m} queries against {n if val else n - 1} images, {len(train.classes)} classes; {chance}")
    print(f"{'k':>5}  {'top-1 %':>8}  {'untrained %':>11}")
    for k in args.k:
        beside = f"{base[k]:11.1f}" if base else ""
        print(f"{k:5}  {top1[k]:8.1f}  {beside}" + (f"  (all {n} images)" if k > n else ""))


if __name__ == "__main__":
    command(main, parse_args)
