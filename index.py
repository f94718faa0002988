"""The features of a folder of images, kept between calls: only what is new or changed is computed.

A file counts as unchanged if its size and its time of modification are as they were. What is kept
lies in a file of its own for each folder and for what made the features: weights and settings. It
is written every ten minutes, so that of a long extraction that is stopped most remains.
"""

import hashlib
import os
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from checkpoint import load_checkpoint
from data import Folder, unreadable
from distributed import agree, in_turn
from features import compute, made_by
from files import write_whole
from terminal import first_process, say

CHUNK = 2_000  # images computed between looks at the clock
KEEP_EVERY = 600  # seconds


class Index(NamedTuple):
    """The images below a folder that can be read: names relative to it, and features [n, d]."""

    names: list
    features: torch.Tensor  # normalised, on the host


def index_folder(backbone, folder, how):
    """Return the Index of a folder; how.cache: where its features are kept, or None.

    ValueError: there is no image, none can be read, or processes see different folders.
    """
    images = in_turn(lambda: Folder(folder))
    digest = int(hashlib.sha256(repr(images.paths).encode()).hexdigest()[:12], 16)
    if agree(digest) != digest or agree(-digest) != -digest:
        raise ValueError(f"the processes do not see the same images in {str(folder)!r}")
    stats = torch.tensor([size_and_time(images.root / path) for path in images.paths])
    path = place_for(folder, backbone, how) if how.cache else None
    features, known, is_stale = recall(path, images.paths, stats, how.width(backbone))

    missing = (~known).nonzero()[:, 0].tolist()
    start = kept_at = time.monotonic()
    for done in range(0, len(missing), CHUNK):
        chunk = missing[done : done + CHUNK]
        computed, read = compute(backbone, images, chunk, how, (done, len(missing), start))
        features[chunk], known[chunk] = computed.cpu(), torch.tensor(read)
        is_stale = is_stale or any(read)
        if is_stale and time.monotonic() - kept_at > KEEP_EVERY:
            keep(path, images.paths, stats, features, known)
            kept_at = time.monotonic()
            is_stale = False
    if is_stale:
        keep(path, images.paths, stats, features, known)

    bad = (~known).nonzero()[:, 0].tolist()
    if bad:
        first, why = images.name(bad[0]), unreadable(images, bad[0])
        text = f"{len(bad)} of {len(images)} images cannot be read, the first {first!r}: {why}"
        if len(bad) == len(images):
            raise ValueError(text)
        say(f"{text}; they are left out", sys.stderr)
    names = [name for name, good in zip(images.paths, known.tolist()) if good]
    return Index(names, F.normalize(features[known], dim=-1))


def size_and_time(path):
    """Return what tells that a file has changed; of one that is gone, zeros."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def place_for(folder, backbone, how):
    """Choose where the features of a folder are kept."""
    digest = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape"))
    return how.cache / f"index-{made_by(backbone, how)}-{digest.hexdigest()[:8]}.pth"


def recall(path, names, stats, width):
    """Read what is kept of these files: (features [n, width], known [n] bool, whether it is stale).

    Features of a file that is new or has changed are 0, and it is not known. What is kept is stale
    if it has files that are gone or have changed.
    """
    features, known = torch.zeros(len(names), width), torch.zeros(len(names), dtype=torch.bool)
    if path is None or agree(int(not path.exists())):
        return features, known, False
    saved = load_checkpoint(path)
    row_of = {name: row for row, name in enumerate(saved["names"])}
    rows = torch.tensor([row_of.get(name, -1) for name in names])
    known = (rows >= 0) & (saved["stats"][rows] == stats).all(1)
    known = agree((~known).byte()) == 0  # known to all processes
    features[known] = saved["features"][rows[known]]
    return features, known, known.sum().item() < len(row_of)


def keep(path, names, stats, features, known):
    """Write the features that are known, if there are any."""
    if path is None or not known.any() or not first_process():
        return
    names = [name for name, good in zip(names, known.tolist()) if good]
    kept = {"names": names, "stats": stats[known], "features": features[known]}
    write_whole(path, lambda file: torch.save(kept, file))
