"""How fast each part is, and how much memory a step takes, beside a plain textbook version.

    python -m tests.bench [--quick] [--data FOLDER]

The textbook (tests/textbook.py) is multi-crop in PIL, image by image; a ViT with explicit attention
and all tokens through its last block; the loss pair by pair; clipping, AdamW and EMA in loops. They
take turns, and medians are compared. Steps, ours train.train()'s own, run in fresh processes.
"""

import multiprocessing
import time
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import Mock, patch

import torch
from PIL import Image
from torch.utils.data import default_collate

import train
from augment import MultiCrop, photometry
from evaluate import knn
from tests import textbook
from util import config
from util.data import Folder, MultiCropDataset, evenly
from util.distributed import amp_dtype, processes
from util.misc import say
from util.shapes import Shapes


def say_row(name, here, plain):
    say(f"{name:48} {here:9.1f} {plain:9.1f} {here / plain:6.2f}")


def compare(name, images, here, plain, device, turns):
    """Print images/s of two functions; their first turn warms up."""
    taken = []
    for function in timed([here, plain] * (1 + turns), device, taken):
        function()
    say_row(name, images / median(taken[2::2]), images / median(taken[3::2]))


def timed(items, device, taken):
    """Pass items on, and note the seconds until the next is asked for, with a GPU's work done."""
    for item in items:
        torch.get_device_module(device).synchronize()
        start = time.perf_counter()
        yield item
        torch.get_device_module(device).synchronize()
        taken.append(time.perf_counter() - start)


def draw_jpegs(folder, width, height):
    """Write eight JPEGs of noise, in cells of eight pixels."""
    for i in range(8):
        cells = torch.randint(256, (height // 8, width // 8, 3)).byte().numpy()
        Image.fromarray(cells).resize((width, height), Image.BICUBIC).save(Path(folder, f"{i}.jpg"))


def compare_worker(name, folder, device, turns, with_photometry=False):
    """Read, crop and collate as a loader's worker does; the textbook's crops have photometry."""
    images, textbook_crop = Folder(folder), textbook.multi_crop()
    dataset, some = MultiCropDataset(images, MultiCrop()), evenly(len(images), 32)

    def here():
        batch, _ = default_collate([dataset[0, i] for i in some])
        return [photometry(crops.to(device), drawn) for crops, drawn in batch if with_photometry]

    def plain():
        decoded = [Image.open(images.name(i)).convert("RGB") for i in some]
        return default_collate([textbook_crop(image) for image in decoded])

    compare(name, len(some), here, plain, device, turns)


def compare_steps(args, device, turns):
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        taken = [pool.apply(measure_steps, (p, args, device)) for p in (False, True) * turns]
    (here, plain), memory = ([median(x[::2]), median(x[1::2])] for x in zip(*taken))
    b = args.batch_size_per_gpu
    say_row(f"a whole step, {b} images, {args.arch}, K {args.out_dim}", b / here, b / plain)
    say_row("  its peak memory in MB", *memory)


def measure_steps(plain, args, device):
    """Take steps of one version on noise: (the median's seconds, the megabytes that they add)."""

    def resident(field):
        return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0]) / 1024

    sides = (2, args.global_crops_size), (args.local_crops_number, args.local_crops_size)
    b, taken, before = args.batch_size_per_gpu, [], resident("VmRSS:")
    views = [(torch.randn(v, b, 3, side, side, device=device), None) for v, side in sides]
    batches = timed(repeat(views), device, taken)
    (textbook_steps if plain else our_steps)(args, device, batches)
    peak = torch.cuda.max_memory_allocated() / 2**20 or resident("VmHWM:") - before
    return median(taken[1:]), peak


def our_steps(args, device, batches=None, **replaced):
    """Take args.steps steps of train.train(), on prepared batches if given, and return the Run."""
    if batches:
        replaced = dict(view_loader=lambda *_: batches, photometry=lambda x, _: x)
    runs = []
    with (
        TemporaryDirectory() as folder,
        patch.multiple(train, draw_run=runs.append, watch_attention=Mock(), **replaced),
        patch("util.run.Run.save"), patch("util.run.STOP_SIGNALS", []), patch("builtins.print"),
    ):  # fmt: skip
        args.output_dir, args.knn_every, args.log_every = Path(folder), 0, 10**9
        train.train(args, device, rank=0, world=1)
    return runs[0]


@patch("vit.F.scaled_dot_product_attention",
       lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)  # fmt: skip
@patch("vit.ViT.forward", lambda vit, images: vit.get_intermediate_layers(images)[0, :, 0])
def textbook_steps(args, device, batches):
    """Take args.steps plain steps with the rates of our first: (student, teacher, centre)."""
    student, teacher = train.build_networks(args, device, world=1)
    center, m = torch.zeros(args.out_dim, device=device), args.center_momentum
    schedule = train.schedules(args, 1, args.batch_size_per_gpu)
    lr, decay, momentum, teacher_temp = schedule[0].tolist()
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=decay, foreach=False)
    for (big, _), (small, _) in islice(batches, args.steps):
        dtype = amp_dtype(args.amp, device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            with torch.no_grad():
                t = teacher(big).float()
            s = student(big, small).float()
        textbook.loss(s, t, center, args.student_temp, teacher_temp).backward()
        networks = list(student.parameters()), list(teacher.parameters())
        textbook.update(*networks, optimizer, args.clip_grad, momentum)
        optimizer.zero_grad()
        center = m * center + (1 - m) * t.mean((0, 1))
    return student, teacher, center


def main(args):
    with processes(args.device) as (device, _, _), TemporaryDirectory() as drawn:
        on_gpu, quick, threads = device.type == "cuda", args.quick, torch.get_num_threads()
        batch, n, dtype = (64, 8192, torch.bfloat16) if on_gpu else (4, 2048, torch.float32)
        a, taken, turns = torch.randn(n, n, device=device, dtype=dtype), [], 1 if quick else 5
        for _ in timed(range(5), device, taken):
            a @ a
        machine = torch.cuda.get_device_name() if on_gpu else f"{threads} threads of a CPU"
        rate = 2e-9 * n**3 / min(taken)
        say(f"torch {torch.__version__}, {machine}, {rate:.0f} GFLOP/s in a matrix product\n")
        say(f"{'images/s':48} {'here':>9} {'textbook':>9}  ratio")
        draw_jpegs(drawn, 500, 375)
        torch.set_num_threads(1)  # a loader's process has one
        compare_worker("a worker's half: decode, crop, collate", args.data or drawn, device, turns)
        compare_worker("  with photometry", args.data or drawn, device, turns, True)
        if not quick:
            draw_jpegs(drawn, 4000, 3000)
            compare_worker("  of 12 megapixels", drawn, device, turns)
        torch.set_num_threads(threads)
        network = "vit_tiny --out_dim 4096" if quick else "vit_small"
        flags = f"--arch {network} --batch {batch} --warmup_epochs 0 --freeze_last_layer 0"
        args = train.parse_args(f"{flags} --steps {3 + turns} --device {device}".split())
        compare_steps(args, device, 1 if quick else 2)
        m, n = (1_000, 20_000) if quick else (10_000, 200_000)
        bank, labels = torch.randn(n, 384, device=device), torch.arange(n, device=device) % 1000
        compare(f"k-NN, {m} in {n}; textbook: product alone", m,
                lambda: knn(bank, labels, bank[:m], labels[:m], ks=(20,)),
                lambda: [x @ bank.T for x in bank[:m].split(1000)], device, turns)  # fmt: skip

        args = train.parse_args(f"--device {device} --steps {20 if quick else 300}".split())
        images = Shapes()
        for i in range(0, len(images), images.block):
            images[i]  # painting them is over after the first epoch
        run = our_steps(args, device, load_splits=lambda _: (images, None))
        rate = run.last * run.global_batch / run.progress.seconds()
        say(f"the laptop's recipe with its input: {rate:.0f} images/s")


if __name__ == "__main__":
    parser = config.Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes: half a minute")
    parser.add_argument("--data", help="a folder of images to read (default: drawn ones)")
    config.add_device_flag(parser)
    config.run_command(main, parser.parse_args)
