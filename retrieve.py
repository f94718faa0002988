"""Nearest neighbours of images by their features: search, copies, benchmarks (section 4.2.1).

    python retrieve.py search   CKPT query.jpg --data FOLDER    the nearest images of a folder
    python retrieve.py copies   CKPT --data FOLDER              groups of near-duplicates in it
    python retrieve.py features CKPT --data FOLDER              features for other tools
    python retrieve.py oxford   CKPT --data FOLDER              Table 3; also paris
    python retrieve.py copydays CKPT --data FOLDER              Table 4; shapes: copies made here
    torchrun --nproc_per_node=8 retrieve.py ...                 each process with its share

The feature of an image is the class token of the last block, of the image's central crop as in
evaluate.py; similarity is the cosine. Features of a folder are kept with --cache, and only those of
new or changed files are computed again. The benchmarks are in landmarks.py and copydays.py.
"""

import argparse
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from backbone import trained_at
from copydays import Copies, evaluate_copydays, jpeg
from data import Files
from decode import read_image
from features import extract, represent
from files import write_whole
from film import stills
from index import index_folder
from landmarks import evaluate_landmarks
from pictures import draw_panels, shown
from protocol import (
    add_extraction_flags,
    add_flags,
    check_positive,
    check_workers,
    extraction,
    run_protocol,
)
from terminal import first_process, run_command, say

ROWS, COLUMNS = 10, 8  # of a picture, at most
SAMPLE = 200  # images, copies of which say how near copies are
PAIRS = 2**22  # similarities computed at once: 16 MB


def open_index(args, subject):
    """Return (Extraction, Index) of the folder --data. ValueError: it is not a folder."""
    if not Path(subject.data).is_dir():
        raise ValueError(f"--data {subject.data} is no folder of images")
    how = extraction(args, subject)
    return how, index_folder(subject.backbone, subject.data, how)


def panel(path):
    """Return an image as a picture shows it; one that is gone by now is grey."""
    try:
        image = read_image(path)
    except Exception:  # whatever a decoder may raise
        image = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    return rearrange(shown(image, 160), "c h w -> h w c")


# ---- search ----


def search(args, subject):
    """Print the images of the folder that are nearest to each query, and draw them."""
    how, index = open_index(args, subject)
    root, rows, queries = Path(subject.data), [], 0
    for path, image in chain.from_iterable(map(stills, args.query)):
        view = how.fit(image, trained_at(subject.backbone))[None]
        query = F.normalize(represent(subject.backbone, view, how), dim=-1).cpu()
        found = nearest(query[0], index, args.top, root, path)
        say(str(path))
        row = {"query": rearrange(shown(image, 160), "c h w -> h w c")}
        for n, (similarity, name) in enumerate(found):
            say(f"  {similarity:6.3f}  {root / name}")
            if n < COLUMNS and queries < ROWS:
                row[f"{n + 1}: {similarity:.3f}"] = panel(root / name)
        rows.append(row)
        rows, queries = rows[:ROWS], queries + 1
    if first_process():
        draw_panels(rows, subject.folder / "search.png", "the nearest images, with their cosine")
        say(f"-> {subject.folder / 'search.png'}")
    return {"queries": queries, "images": len(index.names), "top": args.top}


def nearest(query, index, top, root, path):
    """Return [(cosine, name), ...] of the images nearest to a query [d], but not of itself."""
    similarity = index.features @ query
    value, order = similarity.topk(min(top + 1, len(index.names)))
    found = []
    for cosine, i in zip(value.tolist(), order.tolist()):
        place = root / index.names[i]
        if not (place.exists() and path.exists() and place.samefile(path)):
            found.append((cosine, index.names[i]))
    return found[:top]


# ---- copies ----


def find_copies(args, subject):
    """Print groups of images that are copies of one another, the largest first, and draw them."""
    how, index = open_index(args, subject)
    threshold = args.threshold
    if threshold is None:
        threshold = usual_threshold(subject, how, index)
    groups = near_duplicates(index.features, threshold)
    copies = sum(map(len, groups))
    say(
        f"{subject.data}: {copies} of {len(index.names)} images are in {len(groups)} groups "
        f"with a cosine of {threshold:.3f} or more"
    )
    for n, group in enumerate(groups):
        say(f"group {n + 1}, {len(group)} images")
        for i in group:
            say(f"  {Path(subject.data) / index.names[i]}")
    if groups and first_process():
        rows = []
        for n, group in enumerate(groups[:ROWS]):
            paths = [Path(subject.data) / index.names[i] for i in group[: COLUMNS + 1]]
            rows.append({f"{n + 1}.{m + 1}": panel(path) for m, path in enumerate(paths)})
        draw_panels(rows, subject.folder / "copies.png", "a group of near-duplicates in each row")
        say(f"-> {subject.folder / 'copies.png'}")
    figures = {"images": len(index.names), "groups": len(groups), "copies": copies}
    return {"threshold": threshold, **figures}


def usual_threshold(subject, how, index):
    """Choose the cosine that nine in ten copies of these images reach, made here by JPEG.

    How near two images are depends on the network. If many pairs of different images are as near,
    that is said: such a network does not tell copies.
    """
    sample = Random(0).sample(range(len(index.names)), min(SAMPLE, len(index.names)))
    originals = Files([Path(subject.data) / index.names[i] for i in sample])
    copies, how = Copies(originals, jpeg), replace(how, cache=None)
    copies, read = extract(subject.backbone, copies, list(range(len(sample))), how)
    originals = index.features[[sample[n] for n in read]]
    cosines = F.normalize(copies, dim=-1).cpu() @ originals.T
    threshold = cosines.diagonal().quantile(0.1).item()
    others = cosines[~torch.eye(len(read), dtype=torch.bool)]
    share = (others >= threshold).float().mean().item() if len(others) else 0
    say(
        f"nine in ten copies by JPEG at quality 10 have a cosine of {threshold:.3f} or more; "
        f"so have {100 * share:.2g} % of pairs of different images"
    )
    return threshold


def near_duplicates(features, threshold):
    """Group normalised features [n, d] that are linked by cosines of at least threshold.

    Returns lists of indices, the largest group first. Pairs are looked at in blocks.
    """
    n = len(features)
    root = torch.arange(n)  # of each one's group: the group's lowest index, once all is linked
    height = 1024
    width = max(1, PAIRS // height)
    for top in range(0, n, height):
        rows = features[top : top + height]
        for left in range(top, n, width):
            similarity = rows @ features[left : left + width].T
            near = (similarity > threshold - 1e-6).nonzero()  # of copies it may be 1 - 1e-7
            first, second = near[:, 0] + top, near[:, 1] + left
            root = link(root, first, second)
    order = root.argsort(stable=True)
    _, counts = root[order].unique_consecutive(return_counts=True)
    groups = [group.tolist() for group in order.split(counts.tolist()) if len(group) > 1]
    return sorted(groups, key=len, reverse=True)


def link(root, first, second):
    """Put the groups of first [m] and second [m] together, pair by pair: the new root [n]."""
    while True:
        a, b = root[first], root[second]
        if torch.equal(a, b):
            return root
        lower = torch.minimum(a, b)
        root = root.scatter_reduce(0, a, lower, "amin").scatter_reduce(0, b, lower, "amin")
        while not torch.equal(root[root], root):
            root = root[root]


# ---- features for other tools ----


def write_features(args, subject):
    """Write the folder's features and names, and what made them, by the suffix asked for."""
    how, index = open_index(args, subject)
    path = args.file or subject.folder / "features.pth"
    made = {"checkpoint": args.checkpoint, "network": args.network}
    made |= {"size": trained_at(subject.backbone), "kind": "class token of the central crop"}
    if first_process() and path.suffix == ".npy":
        write_whole(path, lambda file: np.save(file, index.features.numpy()))
        lines = "".join(f"{name}\n" for name in index.names)
        write_whole(path.with_suffix(".txt"), lambda file: file.write(lines.encode()))
        write_whole(path.with_suffix(".json"), lambda file: file.write(json.dumps(made).encode()))
    elif first_process():
        saved = {"names": index.names, "features": index.features, **made}
        write_whole(path, lambda file: torch.save(saved, file))
    n, width = index.features.shape
    say(f"{subject.data}: {n} features of {width} numbers, normalised -> {path}")
    return {"images": n, "width": width, "file": str(path)}


# ---- the commands ----


def add_protocol(commands, name, text):
    """Add a command with the flags that all of them have."""
    parser = commands.add_parser(name, help=text)
    add_flags(parser)
    add_extraction_flags(parser)
    return parser.add_argument


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="protocol", required=True)

    add = add_protocol(commands, "search", "the images of a folder that are nearest to others")
    add("query", nargs="+", type=Path, help="images, or folders of images")
    add("--top", type=int, default=8, help="how many neighbours of each")

    add = add_protocol(commands, "copies", "groups of near-duplicates in a folder")
    add("--threshold", type=float, help="the least cosine of a pair (default: what nine in ten "
        "copies by JPEG of a sample of these images reach)")  # fmt: skip

    add = add_protocol(commands, "features", "the features of a folder, for other tools")
    add("--file", type=Path, help="where they go, .pth, or .npy with the names in .txt "
        "(default: features.pth in the output folder)")  # fmt: skip

    for name, text in (("oxford", "revisited Oxford (Table 3)"), ("paris", "revisited Paris")):
        add = add_protocol(commands, name, text)
        add("--size", type=int, default=224, help="long side in pixels, at most (the paper's: 224)")
        add("--multiscale", action="store_true", help="mean over three sizes: 1, 1/sqrt 2, 1/2")

    add = add_protocol(commands, "copydays", "copy detection (Table 4)")
    add("--size", type=int, help="side in pixels (default: the training size; the paper's: 224, "
        "or 320 for ViT-B/8)")  # fmt: skip
    add("--distractors", type=Path, help="a folder of images that are no originals")
    add("--whitening", type=Path, help="a folder of other images to learn a whitening from")
    add("--untrained", action=argparse.BooleanOptionalAction,
        help="an untrained network beside (default: where the copies are made here)")  # fmt: skip
    return parser.parse_args(argv)


PROTOCOLS = {
    "search": search,
    "copies": find_copies,
    "features": write_features,
    "oxford": evaluate_landmarks,
    "paris": evaluate_landmarks,
    "copydays": evaluate_copydays,
}


def main(args):
    check_positive(args, "batch", *(flag for flag in ("top", "size") if hasattr(args, flag)))
    check_workers(args)
    if args.protocol == "copies" and args.threshold and not -1 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} must lie in [-1, 1]: it is a cosine")
    if args.protocol == "features" and args.file and args.file.suffix not in (".pth", ".npy"):
        raise ValueError(f"--file {args.file}: its name must end in .pth or .npy")
    run_protocol(args, PROTOCOLS[args.protocol])


if __name__ == "__main__":
    run_command(main, parse_args)
