"""How fast each part is, and how much memory it takes, beside a plain textbook version written here.

    python bench.py [--quick]

The textbook is per-image multi-crop in PIL, explicit attention, all tokens through the last block, Algorithm 1's loss pair by pair, and a loop over the parameters for clipping, AdamW and EMA.
Both run in turns in one process; the medians are compared. Peak memory is what one version alone, in a fresh process, takes above what it starts with.
"""

import argparse
import copy
import io
import multiprocessing
import statistics
import sys
import time
from random import Random

import torch
from einops import rearrange
from PIL import Image, ImageFilter
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

from augment import MEAN, STD, MultiCrop, views
from data import Batches, Shapes, Views, read_image
from evaluate import knn
from head import DINOHead
from loss import batch_center, dino_loss, update_center
from run import command, say
from train import Network, parameter_groups
from train import parse_args as recipe
from vit import Attention, ViT, build_backbone, usable_device


class PlainViT(ViT):
    def forward(self, images):
        return self.tokens(images)[-1][:, 0]


class PlainAttention(Attention):
    def forward(self, x, rows=None):
        q, k, v = self.split(x)
        weights = (q @ rearrange(k, "b heads n d -> b heads d n") * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj(rearrange(weights @ v, "b heads n d -> b n (heads d)"))


def plain_crops(local_crops=8):
    """Multi-crop as torchvision's transforms of a PIL image, at the paper's sizes."""

    def view(size, scale, blurred, solarized):
        blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2).item())))
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2), T.RandomApply([blur], blurred),
            T.RandomSolarize(128, solarized), T.ToTensor(), T.Normalize(MEAN, STD),
        ])  # fmt: skip

    crops = [view(224, (0.4, 1), 1.0, 0.0), view(224, (0.4, 1), 0.1, 0.2), *[view(96, (0.05, 0.4), 0.5, 0.0)] * local_crops]
    return lambda image: [crop(image) for crop in crops]


def plain_loss(student, teacher, center, student_temp, teacher_temp):
    """Algorithm 1's H for each pair of different views."""

    def h(t, s):
        t, s = ((t.detach() - center) / teacher_temp).softmax(-1), (s / student_temp).softmax(-1)
        return -(t * s.log()).sum(-1).mean()

    pairs = [h(t, s) for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
    return sum(pairs) / len(pairs)


def plain_clip(parameters, largest=3.0):
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(min(1.0, largest / (p.grad.norm().item() + 1e-6)))


def plain_ema(momentum):
    def update(teacher, student, _):
        for t, s in zip(teacher, student):
            t.mul_(momentum).add_(s.detach(), alpha=1 - momentum)

    return torch.no_grad()(update)


def picture():
    """A JPEG of 500 x 375 pixels, as ImageNet has on average, with some detail in it."""
    image = Image.merge("RGB", [Image.effect_noise((60, 45), 90) for _ in range(3)]).resize((500, 375), Image.BICUBIC)
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def worker_half(plain, device, images, photometry=False):
    """Decoding, geometry, collating and, where asked for, photometry; the textbook does everything in the worker."""
    torch.set_num_threads(1)
    jpeg, crop, plain_crop = picture(), MultiCrop(), plain_crops()

    def run():
        if plain:
            return default_collate([plain_crop(Image.open(io.BytesIO(jpeg)).convert("RGB")) for _ in range(images)])
        batch = default_collate([crop(read_image(io.BytesIO(jpeg)), Random(i)) for i in range(images)])
        return views(batch, device) if photometry else batch

    return run


def network(plain, args):
    backbone = build_backbone(args.arch, args.patch, args.global_size, args.drop_path)
    head = DINOHead(backbone.dim, args.out_dim, args.hidden_dim, args.bottleneck_dim)
    if plain:
        backbone.__class__ = PlainViT
        for block in backbone.blocks:
            block.attn.__class__ = PlainAttention
        head.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(args.bottleneck_dim, args.out_dim, bias=False))
    return Network(backbone, head)


def noise(images, args, device):
    sizes = ((2, args.global_size), (args.local_crops, args.local_size))
    return [torch.randn(v, images, 3, size, size, device=device) for v, size in sizes]


def update(plain, student, teacher):
    """What follows the gradient: clipping, AdamW and EMA."""
    optimizer = torch.optim.AdamW(parameter_groups(student), 1e-4, fused=not plain, foreach=False)
    clip, ema = (plain_clip, plain_ema(0.996)) if plain else (lambda parameters: nn.utils.clip_grad_norm_(parameters, 3.0), get_ema_multi_avg_fn(0.996))

    def run():
        clip(student.parameters())
        optimizer.step()
        ema(list(teacher.parameters()), list(student.parameters()), None)

    return run


def step(plain, device, images, flags):
    """One step of training with the recipe that the flags of train.py give, from crops that are on the device."""
    args = recipe(flags.split())
    student = network(plain, args).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    center, fixed = torch.zeros(args.out_dim, device=device), noise(images, args, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    loss, follow = plain_loss if plain else dino_loss, update(plain, student, teacher)

    def run(crops=fixed):
        with autocast:
            with torch.no_grad() if plain else torch.inference_mode():
                t = teacher(crops[0])
            s = student(*crops)
        total = loss(s.float(), t.float(), center, 0.1, 0.04)
        if not plain:
            del s  # as in train.py
        total.backward()
        follow()
        student.zero_grad()
        update_center(center, batch_center(t), 0.9)

    return run


def networks(plain, device, images, flags):
    """Teacher and student forward, student backward."""
    args = recipe(flags.split())
    student, crops = network(plain, args).to(device), noise(images, args, device)

    def run():
        with torch.no_grad() if plain else torch.inference_mode():
            student(crops[0])
        student(*crops).sum().backward()

    return run


def head_and_loss(plain, device, images, flags):
    """The head and the loss for all views of each image, forward and backward."""
    args = recipe(flags.split())
    model, v = network(plain, args), 2 + args.local_crops
    head, center = model.head.to(device), torch.zeros(args.out_dim, device=device)
    tokens, teacher = torch.randn(v * images, model.backbone.dim, device=device), torch.randn(2, images, args.out_dim, device=device)

    def run():
        student = rearrange(head(tokens), "(v b) k -> v b k", b=images)
        total = (plain_loss if plain else dino_loss)(student, teacher, center, 0.1, 0.04)
        if not plain:
            del student  # as in train.py
        total.backward()

    return run


def optimizer_and_ema(plain, device, images, flags):
    """Clipping, AdamW and EMA alone."""
    student = network(plain, recipe(flags.split())).to(device)
    run = update(plain, student, copy.deepcopy(student).requires_grad_(False))
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    return run


def neighbours(plain, device, images, bank):
    """k-NN, k = 20, of so many queries; the textbook is the bare matrix product that k-NN cannot do without."""
    banked, queries = torch.randn(bank, 384, device=device), torch.randn(images, 384, device=device)
    labels = torch.arange(bank, device=device) % 1000

    def run():
        if not plain:
            return knn(banked, labels, queries, labels[:images], ks=(20,))
        for some in queries.split(1000):
            some @ banked.T

    return run


def timed(run, device):
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(part, plain, device, images, settings):
    """Bytes that a part's version takes at most, above those at its start. Of a fresh process."""

    def resident(line):
        with open("/proc/self/status") as file:
            return next(int(text.split()[1]) * 1024 for text in file if text.startswith(line))

    if device.type == "cuda":
        part(plain, device, images, *settings)()
        return torch.cuda.max_memory_allocated()
    before = resident("VmRSS:")
    part(plain, device, images, *settings)()
    return resident("VmHWM:") - before


def compare(name, part, device, images, settings, turns, memory):
    """Prints a line: images a second of ours and of the textbook, their ratio, and their peak memory. The seconds of ours."""
    threads = torch.get_num_threads()
    versions = [part(plain, device, images, *settings) for plain in (False, True)]
    seconds = [[], []]
    for turn in range(turns + 1):  # the first warms up
        for run, taken in zip(versions, seconds):
            taken.append(timed(run, device))
    ours, plain = (statistics.median(taken[1:]) for taken in seconds)
    del versions, run
    torch.set_num_threads(threads)
    line = f"{name:48} {images / ours:9.1f} {images / plain:9.1f} {plain / ours:6.2f}"
    if memory and (device.type == "cuda" or sys.platform == "linux"):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            bytes_ours, bytes_plain = (pool.apply(peak, (part, plain, device, images, settings)) for plain in (False, True))
        line += f" {bytes_ours / 2**20:7.0f} {bytes_plain / 2**20:8.0f} {bytes_ours / bytes_plain:6.2f}"
    say(line)
    return ours


def matmul_rate(device):
    """FLOP/s of a square product in the precision that training takes."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(8))


def laptop(device, steps):
    """The laptop's recipe with its input: (images/s, the share of the time that goes into the step, photometry and waiting for crops being the rest)."""
    args, images = recipe(["--device", device.type]), Shapes()
    for i in range(len(images)):
        images[i]  # drawn, as from the second epoch on
    crop = MultiCrop(args.global_size, args.local_size, args.local_crops, args.global_scale, args.local_scale)
    batches = Batches(len(images), args.batch, first=0, last=steps + 5)
    loader = iter(DataLoader(Views(images, crop), batch_sampler=batches, num_workers=args.workers))
    run, stepping = step(False, device, args.batch, ""), 0.0
    for i in range(steps + 5):
        if i == 5:  # warm
            start, stepping = time.perf_counter(), 0.0
        *batch, _ = next(loader)
        crops = views(batch, device)
        stepping += timed(lambda: run(crops), device)
    taken = time.perf_counter() - start
    return args.batch * steps / taken, stepping / taken


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer turns: under a minute on two cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(args):
    device, quick = usable_device(args.device), args.quick
    torch.manual_seed(0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    rate = matmul_rate(device)
    say(f"torch {torch.__version__}, {where}, {rate / 1e9:.0f} GFLOP/s in a matrix product\n")
    say(f"{'':48} {'images/s':>19} {'':6} {'peak MB':>16}")
    say(f"{'part':48} {'here':>9} {'textbook':>9} {'ratio':>6} {'here':>7} {'textbook':>8} {'ratio':>6}")
    b, turns = (64, 10) if device.type == "cuda" else (4, 1 if quick else 5)
    tiny = "--arch vit_tiny --out_dim 4096"
    small = tiny if quick else "--arch vit_small"
    compare("a worker's half: decode, crop, collate; 1 thread", worker_half, device, 8 if quick else 32, (), turns, False)
    compare("  with photometry; 1 thread", worker_half, device, 8 if quick else 32, (True,), turns, False)
    compare(f"forward and backward, {b} images, {small[7:]}", networks, device, b, (small,), turns, not quick)
    k = "--out_dim 4096" if quick else "--out_dim 65536 --hidden_dim 2048 --bottleneck_dim 256 --local_crops 8"
    compare(f"head and loss, 64 images, K {k.split()[1]}", head_and_loss, device, 64, (k,), turns, True)
    compare("clip, AdamW and EMA (images: 1)", optimizer_and_ema, device, 1, (small,), turns, False)
    for flags, images in ((tiny, 2 * b),) if quick else ((tiny, 2 * b), (small, b)):
        seconds = compare(f"a whole step, {images} images, {flags[7:]}", step, device, images, (flags,), turns, not quick)
        with FlopCounterMode(display=False) as flops:
            step(True, device, images, flags)()
        say(f"  {flops.get_total_flops() / seconds / rate:.0%} of the matrix product's rate")
    bank, queries = (20_000, 1_000) if quick else (200_000, 10_000)
    compare(f"k-NN of {queries} in {bank}; textbook: the product alone", neighbours, device, queries, (bank,), 1 if quick else 3, not quick)
    speed, share = laptop(device, 20 if quick else 150)
    say(f"the laptop's recipe with its input: {speed:.0f} images/s, {share:.0%} of the time in the step")


if __name__ == "__main__":
    command(main, parse_args)
