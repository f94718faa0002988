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
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from copydays import Copies, evaluate_copydays, jpeg
from data import Files
from decode import read_image
from features import extract, represent_image
from files import write_whole
from film import stills
from index import Index, index_folder
from landmarks import evaluate_landmarks
from pictures import draw_panels, shown
from protocol import add_protocol, check_positive, check_workers, extraction, run_protocol
from terminal import first_process, json_line, progress, run_command, say
from vit import ViT

ROWS, COLUMNS = 10, 8  # of a picture, at most
SAMPLE = 200  # images, copies of which say how near copies are
BLOCK = (1024, 4096)  # similarities computed at once: 16 MB


def open_index(args, subject):
    """Return (Extraction, Index) of the folder --data, without the pictures that we draw there.

    ValueError: it is not a folder, or holds nothing else.
    """
    if not Path(subject.data).is_dir():
        raise ValueError(
            f"--data {subject.data} is no folder of images (python shapes.py FOLDER writes the "
            "built-in ones)"
        )
    how = extraction(args, subject)
    found = index_folder(subject.backbone, subject.data, how)
    ours = [subject.folder.resolve() / name for name in ("search.png", "copies.png")]
    root = Path(subject.data).resolve()
    kept = [i for i, name in enumerate(found.names) if root / name not in ours]
    if not kept:
        raise ValueError(f"--data {subject.data} holds nothing but the pictures drawn there")
    if len(kept) < len(found.names):
        found = Index([found.names[i] for i in kept], found.features[kept])
    return how, found


def panel(image):
    """Return an image as a picture shows it."""
    return rearrange(shown(image, 160), "c h w -> h w c")


def panel_of(path):
    """Return the panel of an image file; one that is gone by now is grey."""
    try:
        return panel(read_image(path))
    except Exception:  # whatever a decoder may raise
        return torch.full((160, 160, 3), 128, dtype=torch.uint8)


# ---- search ----


def search(args, subject):
    """Print the images of the folder that are nearest to each query, and draw them."""
    how, found = open_index(args, subject)
    root = Path(subject.data)
    rows = []
    queries = 0
    for source in args.query:
        for path, image in stills(source):
            feature = F.normalize(represent_image(subject.backbone, image, how), dim=-1).cpu()
            neighbours = nearest(feature, found, args.top, root, path)
            queries += 1
            say(str(path))
            for cosine, name in neighbours:
                say(f"  {cosine:6.3f}  {root / name}")
            if len(rows) < ROWS and first_process():
                row = {"query": panel(image)}
                for n, (cosine, name) in enumerate(neighbours[:COLUMNS]):
                    row[f"{n + 1}: {cosine:.3f}"] = panel_of(root / name)
                rows.append(row)
    if queries == 0:
        raise ValueError("none of the queries can be read")
    if first_process():
        draw_panels(rows, subject.folder / "search.png", "the nearest images, with their cosine")
        say(f"-> {subject.folder / 'search.png'}")
    return {"queries": queries, "images": len(found.names), "top": args.top}


def nearest(query, index, top, root, path):
    """Return [(cosine, name), ...] of the images nearest to a query [d], but not of itself."""
    similarity = index.features @ query
    value, order = similarity.topk(min(top + 10, len(index.names)))  # some may be links to it
    found = []
    for cosine, i in zip(value.tolist(), order.tolist()):
        place = root / index.names[i]
        if not (place.exists() and path.exists() and place.samefile(path)):
            found.append((cosine, index.names[i]))
    return found[:top]


# ---- copies ----


def find_copies(args, subject):
    """Print groups of images that are copies of one another, the largest first, and draw them."""
    how, found = open_index(args, subject)
    threshold = args.threshold
    if threshold is None:
        threshold = usual_threshold(subject, how, found)
    groups = near_duplicates(found.features, threshold)
    grouped = sum(map(len, groups))
    say(
        f"{subject.data}: {grouped} of {len(found.names)} images are in {len(groups)} groups "
        f"with a cosine of {threshold:.3f} or more"
    )
    for n, group in enumerate(groups):
        say(f"group {n + 1}, {len(group)} images")
        for i in group:
            say(f"  {Path(subject.data) / found.names[i]}")
    if groups and first_process():
        rows = []
        for n, group in enumerate(groups[:ROWS]):
            paths = [Path(subject.data) / found.names[i] for i in group[: COLUMNS + 1]]
            rows.append({f"{n + 1}.{m + 1}": panel_of(path) for m, path in enumerate(paths)})
        draw_panels(rows, subject.folder / "copies.png", "a group of near-duplicates in each row")
        say(f"-> {subject.folder / 'copies.png'}")
    figures = {"images": len(found.names), "groups": len(groups), "copies": grouped}
    return {"threshold": threshold, **figures}


def usual_threshold(subject, how, index):
    """Choose the cosine that nine in ten copies of these images reach, made here by JPEG.

    How near two images are depends on the network. If more than 1 % of pairs of different images
    are as near, it is said that the network does not tell copies.
    """
    sample = Random(0).sample(range(len(index.names)), min(SAMPLE, len(index.names)))
    originals = Files([Path(subject.data) / index.names[i] for i in sample])
    how = replace(how, cache=None)
    features, read = extract(
        subject.backbone, Copies(originals, jpeg), list(range(len(sample))), how
    )
    cosines = F.normalize(features, dim=-1).cpu() @ index.features[[sample[n] for n in read]].T
    threshold = cosines.diagonal().quantile(0.1).item()
    others = cosines[~torch.eye(len(read), dtype=torch.bool)]
    share = (others >= threshold).float().mean().item() if len(others) else 0
    say(
        f"nine in ten copies by JPEG at quality 10 have a cosine of {threshold:.3f} or more; "
        f"so have {100 * share:.3g} % of pairs of different images"
    )
    if share > 0.01:
        say("note: this network does not tell copies of these images from others")
    return threshold


def near_duplicates(features, threshold):
    """Group normalised features [n, d] that are linked by cosines of at least threshold.

    Returns lists of indices, the largest group first. Pairs are looked at in blocks.
    """
    n, (height, width) = len(features), BLOCK
    group = torch.arange(n)  # of each image; in the end the lowest index in its group
    start = time.monotonic()
    for top in range(0, n, height):
        rows = features[top : top + height]
        for left in range(top, n, width):
            similarity = rows @ features[left : left + width].T
            near = (similarity > threshold - 1e-6).nonzero()  # a copy's cosine may be 1 - 1e-7
            group = link(group, near[:, 0] + top, near[:, 1] + left)
        progress("images", min(top + height, n), n, start)
    order = group.argsort(stable=True)
    _, counts = group[order].unique_consecutive(return_counts=True)
    groups = [part.tolist() for part in order.split(counts.tolist()) if len(part) > 1]
    return sorted(groups, key=len, reverse=True)


def link(group, first, second):
    """Put the groups of first [m] and second [m] together, pair by pair: the new groups [n].

    This is union-find by the lowest label, for all pairs at once.
    """
    while True:
        a, b = group[first], group[second]
        if torch.equal(a, b):
            return group
        lower = torch.minimum(a, b)
        group = group.scatter_reduce(0, a, lower, "amin").scatter_reduce(0, b, lower, "amin")
        while not torch.equal(group[group], group):
            group = group[group]


# ---- features for other tools ----


def write_features(args, subject):
    """Write the folder's features and names, and what made them, by the suffix asked for."""
    how, found = open_index(args, subject)
    path = args.file or subject.folder / "features.pth"
    kind = "class token" if isinstance(subject.backbone, ViT) else "pooled features"
    made = {"checkpoint": args.checkpoint, "network": args.network}
    made |= {"size": how.size_for(subject.backbone), "kind": f"{kind} of the central crop"}
    if first_process() and path.suffix == ".npy":
        # a line for each row, whatever a name holds
        lines = "".join(name.replace("\n", "\\n") + "\n" for name in found.names)
        lines = lines.encode("utf-8", "surrogateescape")
        write_whole(path.with_suffix(".txt"), lambda file: file.write(lines))
        write_whole(path.with_suffix(".json"), lambda file: file.write(json_line(made).encode()))
        write_whole(path, lambda file: np.save(file, found.features.numpy()))
    elif first_process():
        saved = {"names": found.names, "features": found.features, **made}
        write_whole(path, lambda file: torch.save(saved, file))
    n, width = found.features.shape
    say(f"{subject.data}: {n} features of {width} numbers, normalised -> {path}")
    return {"images": n, "width": width, "file": str(path)}


# ---- the commands ----


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
        "and what made them in .json (default: features.pth in the output folder)")  # fmt: skip

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
    check_positive(args, "batch", "top", "size")
    check_workers(args)
    if args.protocol == "copies" and args.threshold and not -1 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} must lie in [-1, 1]: it is a cosine")
    if args.protocol == "features" and args.file:
        if args.file.suffix not in (".pth", ".npy"):
            raise ValueError(f"--file {args.file}: its name must end in .pth or .npy")
        if not args.file.absolute().parent.is_dir():
            raise ValueError(f"--file {args.file}: there is no such folder")
    for query in getattr(args, "query", ()):
        if not query.exists():
            raise ValueError(f"cannot read {str(query)!r}: there is no such file or folder")
    run_protocol(args, PROTOCOLS[args.protocol])


if __name__ == "__main__":
    run_command(main, parse_args)
