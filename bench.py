"""How fast each part is, and how much memory it takes, beside a plain textbook version.

    python bench.py [--quick] [--data FOLDER]

The textbook is multi-crop in PIL, image by image; a ViT with explicit attention and all tokens
through its last block; the loss pair by pair; and clipping, AdamW and EMA as loops over the
parameters. (What of it needs nothing of the project is in tests/textbook.py.) Both versions run in
turns in one process, in the precision of training, and the medians are compared. Peak memory is
what one version, alone in a fresh process, takes above what the process starts with.
"""

import argparse
import copy
import io
import multiprocessing
import random
import statistics
import sys
import time
from functools import partial

import torch
from einops import einsum, rearrange
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import train
from augment import MultiCrop
from data import Folder, Order, Samples, evenly, load_views, views_on
from decode import read_image
from distributed import amp_dtype, autocast, usable_device
from evaluate import knn
from loss import batch_center, dino_loss, teacher_probabilities, update_center
from optimizer import build_optimizer, parameter_groups, set_rates
from recipe import add_device_flag, crop_settings, schedules
from shapes import Shapes
from terminal import run_command, say
from tests import textbook
from vit import ARCHITECTURES, Attention, ViT

# ---- the textbook ----


class TextbookAttention(Attention):
    """softmax(q k^T / sqrt(d / heads)) v, all heads at once, with the weights in memory."""

    def forward(self, x, queries=None):
        q, k, v = self.split(x, queries)
        products = einsum(q, k, "b heads query d, b heads key d -> b heads query key")
        weights = (products * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj(rearrange(weights @ v, "b heads n d -> b n (heads d)"))


class TextbookViT(ViT):
    """A ViT that takes all tokens through its last block."""

    def forward(self, images):
        return self.tokens(images)[-1][:, 0]


def textbook_step(state, forward, batches, schedule, args, precision):
    """Take a step, as train.train_step() does."""
    views = next(batches)
    with precision:
        with torch.no_grad():
            t = state.teacher(views[0]).float()
        s = forward(*views).float()
    loss = textbook.loss(s, t, state.center, args.student_temp, schedule.teacher_temp)
    loss.backward()
    set_rates(state.optimizer, schedule.lr, schedule.weight_decay)
    student, teacher, optimizer = state.student, state.teacher, state.optimizer
    textbook.update(student, teacher, optimizer, args.clip, schedule.momentum)
    state.optimizer.zero_grad()
    update_center(state.center, batch_center(t), args.center_momentum)


# ---- what is compared: a part(plain, device, ...) sets the textbook's version up, or ours, and
# returns a function that runs it once ----


def read_and_crop(plain, device, jpegs, until):
    """Read JPEGs, crop and collate them, as a loader's worker does; until: "decode", "crop", "end".

    In the end stands our photometry, a batch at a time; the textbook's crops have theirs already.
    """
    crop = MultiCrop()
    textbook_crop = textbook.multi_crop()

    def run():
        samples = []
        for i, content in enumerate(jpegs):
            if plain:
                image = Image.open(io.BytesIO(content)).convert("RGB")
                sample = image if until == "decode" else textbook_crop(image)
            else:
                image = read_image(io.BytesIO(content), crop.least)
                sample = image if until == "decode" else crop(image, random.Random(i))
            samples.append(sample)
        batch = samples if until == "decode" else default_collate(samples)
        if until == "end" and not plain:
            views_on(device, batch)

    return run


def draw_jpegs(count, width, height):
    """Return JPEGs, as bytes: noise of three scales, of sizes about this one and many qualities."""
    rng, contents = random.Random(0), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        factor = rng.uniform(0.7, 1.4)
        w, h = round(width * factor), round(height / factor)
        image = Image.new("RGB", (w, h), "gray")
        for cell, share in ((60, 0.9), (10, 0.5), (2, 0.2)):
            cells = torch.randint(256, (h // cell, w // cell, 3), generator=generator)
            layer = Image.fromarray(cells.byte().numpy()).resize((w, h), Image.BICUBIC)
            image = Image.blend(image, layer, share)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(75, 95))
        contents.append(file.getvalue())
    return contents


def jpegs_of(folder, count):
    """Return so many of a folder's JPEGs, as bytes, spread evenly. ValueError: there is none."""
    images = Folder(folder)
    names = [name for name in images.paths if name.lower().endswith((".jpg", ".jpeg"))]
    if not names:
        raise ValueError(f"no JPEGs below {folder!r}")
    return [(images.root / names[i]).read_bytes() for i in evenly(len(names), count)]


def build_state(plain, device, args):
    """Return the train.State of our networks and optimiser, or of the textbook's."""
    student, teacher = train.build_networks(args, device, world=1)
    optimizer, scaler = build_optimizer("adamw", student, device, amp_dtype(args.amp, device))
    if plain:
        size = ARCHITECTURES[args.arch]
        vit = TextbookViT(args.patch, image_size=args.global_size, drop_path=args.drop_path, **size)
        for block in vit.blocks:
            block.attn = TextbookAttention(vit.dim, vit.heads)
        # The weight norm is torch's own; g, which it calls original0, is fixed as in ours.
        last_layer = weight_norm(nn.Linear(args.bottleneck_dim, args.out_dim, bias=False))
        last_layer.parametrizations.weight.original0.requires_grad = False
        student.backbone = vit.to(device)
        student.head.last_layer = last_layer.to(device)
        teacher = copy.deepcopy(student).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(parameter_groups(student), foreach=False, fused=False)
    center = torch.zeros(args.out_dim, device=device)
    return train.State(student, teacher, center, optimizer, scaler)


def draw_views(device, args):
    """Draw noise in place of views: [2, b, 3, g, g] and [v - 2, b, 3, l, l]."""
    b, g, l = args.batch, args.global_size, args.local_size
    global_views = torch.randn(2, b, 3, g, g, device=device)
    return global_views, torch.randn(args.local_crops, b, 3, l, l, device=device)


def head_and_loss(plain, device, args):
    """Run the head and the loss forward and backward, for all views of each image."""
    head = build_state(plain, device, args).student.head
    images, views = args.batch, 2 + args.local_crops
    features = torch.randn(views * images, head.mlp[0].in_features, device=device)
    t = torch.randn(2, images, args.out_dim, device=device)
    center = torch.zeros(args.out_dim, device=device)

    def run():
        with autocast(device, amp_dtype(args.amp, device)):
            s = rearrange(head(features), "(v b) k -> v b k", b=images)
        if plain:
            loss = textbook.loss(s.float(), t, center, args.student_temp, args.teacher_temp)
        else:
            p_t = teacher_probabilities(t, center, args.teacher_temp)
            loss = dino_loss(s, p_t, args.student_temp)
        del s  # as in train.train_step()
        loss.backward()
        head.zero_grad()

    return run


def update(plain, device, args):
    """Do what follows the gradient: clipping, AdamW and EMA."""
    state = build_state(plain, device, args)
    for p in state.student.parameters():
        p.grad = torch.randn_like(p)

    def run():
        if plain:
            student, teacher, optimizer = state.student, state.teacher, state.optimizer
            textbook.update(student, teacher, optimizer, args.clip, args.momentum)
            return
        nn.utils.clip_grad_norm_(state.student.parameters(), args.clip)
        state.optimizer.step()
        train.update_teacher(state.teacher, state.student, args.momentum)

    return run


def whole_step(plain, device, args):
    """Take a step of training, from noise unless views are given."""
    state = build_state(plain, device, args)
    noise = draw_views(device, args)
    precision = autocast(device, amp_dtype(args.amp, device))
    # The schedule half-way through: past the warm-ups, and nothing is frozen.
    schedule = schedules(args.epochs // 2, args, steps_per_epoch=1, global_batch=args.batch)
    take_step = textbook_step if plain else train.train_step

    def run(views=noise):
        take_step(state, state.student, iter([views]), schedule, args, precision)

    return run


def nearest_neighbours(plain, device, images, bank):
    """Classify by k-NN, k = 20; the textbook is the matrix product that it cannot do without."""
    features = torch.randn(bank, 384, device=device)
    queries = torch.randn(images, 384, device=device)
    labels = torch.arange(bank, device=device) % 1000

    def run():
        if not plain:
            knn(features, labels, queries, labels[:images], ks=(20,))
            return
        for chunk in queries.split(1000):
            chunk @ features.T

    return run


# ---- measuring ----


def seconds(run, device):
    """Time one call, to the end of what it starts on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak(part, plain, settings):
    """Run one version twice; return the bytes that it takes at most, above those at the start."""
    device = settings[0]
    before = 0 if device.type == "cuda" else resident("VmRSS:")
    run = part(plain, *settings)
    for _ in range(2):  # the optimiser's state is there from the second on
        run()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM:") - before


def resident(field):
    """Return this process's memory now (VmRSS:) or at most (VmHWM:), in bytes; Linux alone."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare(name, part, images, settings, turns, memory=False):
    """Print a row: images/s of both versions, their ratio, and if asked for their peak memory.

    settings: what the part takes, the device first. Returns the seconds that the textbook takes.
    """
    device = settings[0]
    runs = [part(plain, *settings) for plain in (False, True)]
    taken = [[seconds(run, device) for run in runs] for _ in range(1 + turns)]
    ours, plain = [statistics.median(times) for times in zip(*taken[1:])]  # the first warms up
    row = f"{name:48} {images / ours:9.1f} {images / plain:9.1f} {plain / ours:6.2f}"
    if memory and (device.type == "cuda" or sys.platform == "linux"):
        del runs  # and what they hold
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            here, there = [pool.apply(peak, (part, p, settings)) / 2**20 for p in (False, True)]
        row += f" {here:7.0f} {there:8.0f} {here / there:6.2f}"
    say(row)
    return plain


def laptop(device, steps, warm_up=5):
    """Run the laptop's recipe with its input. Returns (images/s, share of the time in the step).

    The rest is photometry and waiting for crops.
    """
    args = train.parse_args(["--device", str(device)])
    images = Shapes()
    for i in range(len(images)):
        images[i]  # is drawn now; in training that is over after the first epoch
    crop = MultiCrop(*crop_settings(args))
    batches = Order(len(images), args.batch).batches(0, warm_up + steps)
    loaded = load_views(Samples(images, crop), batches, args.workers, device, bad=set())
    step = whole_step(False, device, args)
    for _ in range(warm_up):
        step(next(loaded))

    start = time.perf_counter()
    in_step = 0.0
    for views in loaded:
        in_step += seconds(partial(step, views), device)
    total = time.perf_counter() - start
    return args.batch * steps / total, in_step / total


def matmul_rate(device):
    """Return the FLOP/s of a square matrix product in the precision of training."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(partial(torch.mm, a, a), device) for _ in range(8))


def paper_args(arch, batch):
    """Return train.py's arguments for the paper's recipe, with a smaller K for a smaller ViT."""
    out_dim = {"vit_tiny": 4096, "vit_small": 65536}[arch]
    return train.parse_args(["--arch", arch, "--out_dim", str(out_dim), "--batch", str(batch)])


def compare_workers(device, data, turns, quick):
    """Print the rows of a loader's worker, for photographs of ImageNet's size and of a camera's."""
    jpegs = jpegs_of(data, 32) if data else draw_jpegs(8 if quick else 32, 500, 375)
    images = len(jpegs)
    compare("decoding alone, 1 thread", read_and_crop, images, (device, jpegs, "decode"), turns)
    name = "a worker's half: decode, crop, collate"
    compare(name, read_and_crop, images, (device, jpegs, "crop"), turns)
    compare("  with photometry", read_and_crop, images, (device, jpegs, "end"), turns)
    if not data and not quick:
        jpegs = draw_jpegs(4, 4000, 3000)
        compare("  of 12 megapixels", read_and_crop, 4, (device, jpegs, "crop"), turns)


def compare_steps(device, batch, turns, quick, rate):
    """Print the rows of a step's parts and of whole steps."""
    arch = "vit_tiny" if quick else "vit_small"
    args = paper_args(arch, batch)
    name = f"head and loss, 64 images, K {args.out_dim}"
    compare(name, head_and_loss, 64, (device, paper_args(arch, 64)), turns, memory=True)
    compare("clip, AdamW and EMA (images: 1)", update, 1, (device, args), turns)

    recipes = [paper_args("vit_tiny", 2 * batch)]
    if not quick:
        recipes.append(args)
    for args in recipes:
        name = f"a whole step, {args.batch} images, {args.arch}, K {args.out_dim}"
        taken = compare(name, whole_step, args.batch, (device, args), turns, memory=not quick)
        with FlopCounterMode(display=False) as counter:
            whole_step(True, device, args)()
        share = counter.get_total_flops() / taken / rate
        say(f"  the textbook's runs at {share:.0%} of the matrix product's rate")


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true",
                        help="smaller sizes, fewer turns: half a minute on two cores")  # fmt: skip
    parser.add_argument("--data", help="a folder whose JPEGs are read (default: drawn ones)")
    add_device_flag(parser)
    return parser.parse_args(argv)


def main(args):
    device, quick = usable_device(args.device), args.quick
    threads = torch.get_num_threads()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
        batch, turns = 64, 10
    else:
        machine = f"{threads} threads of a CPU"
        batch, turns = 4, 1 if quick else 5
    torch.manual_seed(0)
    rate = matmul_rate(device)
    say(f"torch {torch.__version__}, {machine}, {rate / 1e9:.0f} GFLOP/s in a matrix product\n")
    say(f"{'':48} {'images/s':>19} {'':6} {'peak MB':>16}")
    columns = f"{'here':>9} {'textbook':>9} {'ratio':>6} {'here':>7} {'textbook':>8} {'ratio':>6}"
    say(f"{'part':48} {columns}")

    torch.set_num_threads(1)  # a loader's process has one
    compare_workers(device, args.data, turns, quick)
    torch.set_num_threads(threads)

    compare_steps(device, batch, turns, quick, rate)

    queries, bank = (1_000, 20_000) if quick else (10_000, 200_000)
    name = f"k-NN, {queries} in {bank}; textbook: product alone"
    settings = device, queries, bank
    compare(name, nearest_neighbours, queries, settings, min(turns, 3), memory=not quick)

    speed, share = laptop(device, 20 if quick else 150)
    took = f"{speed:.0f} images/s, {share:.0%} of the time in the step"
    say(f"the laptop's recipe with its input: {took}")


if __name__ == "__main__":
    run_command(main, parse_args)
