"""How fast each part is, and how much memory a step takes, beside a plain textbook version.

    python -m tests.bench [--quick] [--data FOLDER]

The textbook (tests/textbook.py) is multi-crop in PIL, image by image; a ViT with explicit attention
and all tokens through its last block; the loss pair by pair; clipping, AdamW and EMA in loops. They
take turns, and medians are compared. Steps, ours train.train()'s own, run in fresh processes on a
CPU, in the precisions of a GPU there.
"""

import argparse
import multiprocessing
import time
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import Mock, patch

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

import train
from augment import MultiCrop, photometry
from evaluate import knn
from tests import textbook
from util import config
from util.data import Folder, MultiCropDataset, evenly
from util.distributed import amp_dtype, processes
from util.misc import say
from util.shapes import Shapes

STEPS = {  # what is compared: [(train.py's flags, further ones of ours alone)]
    "quick": [("--arch vit_tiny --out_dim 4096 --batch 4 --steps 4", [""])],
    "cpu": [("--arch vit_small --batch 4 --steps 8", [""])],
    "cuda": [
        ("--arch vit_small --steps 13 --amp bf16", ["", "--recompute"]),
        ("--arch vit_small --steps 13 --amp fp16", [""]),
        ("--arch vit_small --steps 13 --amp off", [""]),
        ("--arch vit_base --steps 13 --amp bf16", ["", "--recompute"]),
        ("--arch vit_base --steps 13 --amp fp16", [""]),
        ("--arch vit_base --steps 13 --amp off", [""]),
        ("--arch vit_small --steps 13 --amp bf16", ["--compile"]),  # which takes minutes
        ("--arch vit_base --steps 13 --amp bf16", ["--compile"]),
    ],
}


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


def compare_steps(flags, variants, device, turns):
    """Compare steps of ours, in each variant, with the textbook's.

    Return the batch and the images/s of the first. Of both, the share of a matrix product's rate is
    by what ours computes.
    """
    flags = f"{flags} --warmup_epochs 0 --freeze_last_layer 0 --device {device}"
    args, *several = (train.parse_args(f"{flags} {extra}".split()) for extra in ("", *variants))
    measure = measure_steps if device.type == "cuda" else partial(freshly, measure_steps)
    calls = [(True, args), *((False, ours) for ours in several)]
    taken = [[measure(*call, device) for call in calls] for _ in range(turns)]
    plain, *here = ([median(values) for values in zip(*each)] for each in zip(*taken))
    b, dtype = args.batch_size_per_gpu, amp_dtype(args.amp, device) or torch.float32
    full = flop_of_an_image(args, device) * b / product_rate(device, dtype)  # seconds
    for extra, (seconds, memory) in zip(variants, here):
        precision = str(dtype).removeprefix("torch.")
        say_row(f"a step of {b}, {args.arch}, {precision} {extra}", b / seconds, b / plain[0])
        say_row("  its peak memory in MB", memory, plain[1])
        say_row("  % of a matrix product's rate", 100 * full / seconds, 100 * full / plain[0])
    return b, b / here[0][0]


def freshly(function, *arguments):
    """Call a function in a process of its own, whose peak of memory is the function's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def noise(args, device):
    """Views for steps, normalised: [(global, None), (local, None)]."""
    sides = (2, args.global_crops_size), (args.local_crops_number, args.local_crops_size)
    b = args.batch_size_per_gpu
    return [(torch.randn(v, b, 3, side, side, device=device), None) for v, side in sides]


def measure_steps(plain, args, device):
    """Take steps of one version on noise: (the median's seconds, the megabytes that they add)."""

    def resident(field):
        return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0]) / 1024

    on_gpu, taken = device.type == "cuda", []
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else resident("VmRSS:")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    batches = timed(repeat(noise(args, device)), device, taken)
    (textbook_steps if plain else our_steps)(args, device, batches)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident("VmHWM:")
    return median(taken[1:]), peak - before


def flop_of_an_image(args, device):
    """Return the floating-point operations of our step for one image, by torch's counter.

    Of a CPU's kinds of attention that knows the plain one.
    """
    one = argparse.Namespace(**vars(args) | {"batch_size_per_gpu": 1, "steps": 1})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        our_steps(one, device, iter([noise(one, device)]))
    return counter.get_total_flops()


def product_rate(device, dtype):
    """Return the floating-point operations a second of a large matrix product."""
    n, times = (8192, 50) if device.type == "cuda" else (2048, 5)
    a, taken = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in timed(range(times), device, taken):
        a @ a
    return 2 * n**3 / min(taken)


def say_input(folder, device, b, rate):
    """Say what photometry takes of a step of so many images/s, and what all cores load."""
    cores, taken, dataset = config.usable_cores(), [], MultiCropDataset(Folder(folder), MultiCrop())
    keys = [(0, i % len(dataset.images)) for i in range(10 * cores * b)]
    loader = iter(DataLoader(dataset, b, sampler=keys, num_workers=cores))
    batch, _ = next(loader)
    start = time.perf_counter()
    loaded = b * sum(1 for _ in loader) / (time.perf_counter() - start)
    for _ in timed(range(4), device, taken):
        for crops, drawn in batch:
            photometry(crops.to(device), drawn)
    say(f"photometry takes {100 * median(taken[1:]) * rate / b:.1f} % of the first step above; "
        f"that takes {rate:.1f} images/s, {cores} processes load {loaded:.0f}")  # fmt: skip


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


def laptop_rate(device, steps):
    """Return how many images/s the laptop's recipe trains on, with its input."""
    args = train.parse_args(f"--device {device} --steps {steps}".split())
    images = Shapes()
    for i in range(0, len(images), images.block):
        images[i]  # painting them is over after the first epoch
    run = our_steps(args, device, load_splits=lambda _: (images, None))
    return run.last * run.global_batch / run.progress.seconds()


def main(args):
    folders = TemporaryDirectory(), TemporaryDirectory()
    with processes(args.device) as (device, _, _), folders[0] as drawn, folders[1] as large:
        on_gpu, threads = device.type == "cuda", torch.get_num_threads()
        quick, data, turns = args.quick and not on_gpu, args.data or drawn, 1 if args.quick else 5
        rate = product_rate(device, torch.bfloat16 if on_gpu else torch.float32)
        machine = torch.cuda.get_device_name() if on_gpu else f"{threads} threads of a CPU"
        rate = f"{1e-9 * rate:.0f} GFLOP/s in a matrix product"
        say(f"torch {torch.__version__}, {machine}, {rate}\n")
        say(f"{'images/s':48} {'here':>9} {'textbook':>9}  ratio")
        draw_jpegs(drawn, 500, 375)
        torch.set_num_threads(1)  # a loader's process has one
        compare_worker("a worker's half: decode, crop, collate", data, device, turns)
        compare_worker("  with photometry", data, device, turns, True)
        if not args.quick:
            draw_jpegs(large, 4000, 3000)
            compare_worker("  of 12 megapixels", large, device, turns)
        torch.set_num_threads(threads)
        first, *others = STEPS["cuda" if on_gpu else "quick" if quick else "cpu"]
        say_input(data, device, *compare_steps(*first, device, 1 if args.quick else 2))
        m, n = (1_000, 20_000) if quick else (10_000, 200_000)
        bank, labels = torch.randn(n, 384, device=device), torch.arange(n, device=device) % 1000
        compare(f"k-NN, {m} in {n}; textbook: product alone", m,
                lambda: knn(bank, labels, bank[:m], labels[:m], ks=(20,)),
                lambda: [x @ bank.T for x in bank[:m].split(1000)], device, turns)  # fmt: skip
        laptop = laptop_rate(device, 20 if quick else 300)
        say(f"the laptop's recipe with its input: {laptop:.0f} images/s")
        for steps in others:
            compare_steps(*steps, device, 1 if args.quick else 2)


if __name__ == "__main__":
    parser = config.Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true",
                        help="fewer turns; on a CPU smaller sizes: half a minute")  # fmt: skip
    parser.add_argument("--data", help="a folder of images to read (default: drawn ones)")
    config.add_device_flag(parser)
    config.run_command(main, parser.parse_args)
