"""What a frozen backbone makes of images: features of crops (section 4), extracted by one process or by several that share the images.

An image's central crop goes in, the middle of the image resized to 256 / 224 of the size that the backbone was trained at; a vector [d] comes out. However many
processes share the work, every image counts once, and what they get is in the order of the images.
"""

import hashlib
import sys
import time
from random import Random

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from augment import center_crop, normalize, random_box, resize
from run import agree, first_process, minutes, patient_group, say, status, write_whole
from vit import ViT, load_checkpoint


class Crops(Dataset):
    """(epoch, n) -> (n, a crop of the n-th chosen image, uint8 [3, size, size]); -1 in place of n marks an image that cannot be read.

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
    """uint8 [b, 3, h, w] -> float32 [b, (last + mean_patches) d]: the last blocks' class tokens, the last one's mean patch token; or what a convnet pools."""
    images = normalize(crops.to(device, non_blocking=True).float() / 255)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        if not isinstance(backbone, ViT):
            return backbone(images).float()
        tokens = backbone.tokens(images, last, None if mean_patches else 1).float()
    return torch.cat([*tokens[:, :, 0]] + [tokens[-1, :, 1:].mean(1)] * mean_patches, -1)


def progress(what, done, total, start):
    status(f"{what} {done}/{total}, {minutes((time.monotonic() - start) * (total / max(1, done) - 1))} left")


def combine(rows, world):
    """Each process has filled its share of the rows and left the others 0: their sum is what one process would have filled."""
    if world > 1:
        dist.barrier(patient_group())  # however much longer another takes
        dist.all_reduce(rows)
    return rows


def fingerprint(backbone, images, indices, *settings):
    """What features depend on, as sixteen digits: weights, the images' names and labels, settings. An image changed under its name is not noticed."""
    digest = hashlib.sha256(repr((settings, backbone.image_size, images.classes, images.labels, [images.name(i) for i in indices])).encode())
    for value in backbone.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def features(backbone, images, indices, device, batch=256, workers=0, last=1, mean_patches=False, dtype=None, ranks=(0, 1), cache=None):
    """Features (see represent) of the given images' central crops: ([n, d] float32 on device, the n indices that could be read, in the order given).

    ranks: (rank, world) where all processes call this together: each reads its share, all get the whole. By default a process is alone and talks to none.
    cache: a folder that keeps features, and from which they are read if they are there. ValueError: none of the images can be read.
    """
    rank, world = ranks
    path = cache and cache / f"features-{fingerprint(backbone, images, indices, last, mean_patches, dtype)}.pth"
    if path and not agree(int(not path.exists())):
        saved = load_checkpoint(path)
        return saved["features"].to(device), saved["read"]
    crops = Crops(images, indices, backbone.image_size)
    loader = DataLoader(crops, batch, sampler=[(0, n) for n in range(rank, len(indices), world)], num_workers=workers, pin_memory=device.type == "cuda")
    out, read = torch.zeros(len(indices), backbone.dim * (last + mean_patches), device=device), torch.zeros(len(indices), device=device)
    start, mode, done = time.monotonic(), backbone.training, 0
    backbone.eval()
    for n, crop in loader:
        good = n[n >= 0].to(device)
        out[good], read[good] = represent(backbone, crop[n >= 0], device, last, mean_patches, dtype), 1.0
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
    if path and first_process():
        write_whole(path, lambda file: torch.save({"features": out.cpu(), "read": indices}, file))
    return out, indices
