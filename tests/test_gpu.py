"""What a GPU gives is what a CPU gives, and no step waits for it; skipped where there is no GPU.

DINO_TEST_DEVICE=cpu runs the same on a CPU, but for the GPU's memory, waiting and compiler: a test
of these tests.
"""

import functools
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from random import Random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

import evaluate
import train
from augment import MultiCrop, photometry
from conftest import TINY, backbone_of, command_here
from evaluation import davis
from evaluation.features import Extraction, attention_maps, extract_features
from head import DINOHead
from loss import batch_center, dino_loss, entropies, sinkhorn, teacher_probabilities, update_center
from test_survival import POISON
from test_train import arguments, log, run
from util.config import crop_settings
from util.shapes import LENGTHS, Shapes

CPU, DEVICE = torch.device("cpu"), torch.device(os.environ.get("DINO_TEST_DEVICE", "cuda:0"))
ON_GPU = DEVICE.type == "cuda"
FLAGS = f"--device {DEVICE} --knn_every 0 --warmup_epochs 0 --batch 16 --lr 0.003"
pytestmark = [
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("several_blocks"),
]


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch):
    """Few built-in images, of which 25 steps are an epoch; no TF32, which processes() asks for."""
    monkeypatch.setitem(LENGTHS, "train", 400)
    monkeypatch.setitem(LENGTHS, "val", 100)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


def cuda(name, *arguments):
    """Call a function of torch.cuda, on a GPU alone."""
    return getattr(torch.cuda, name)(*arguments) if ON_GPU else None


# ---- the parts ----


def networks(device):
    """Logits of two resolutions, a gradient, all tokens and attention."""
    network = train.Network(backbone_of("vit_mini", 8, 48), DINOHead(128, 512, 64, 32)).to(device)
    big, small = (torch.randn(shape).to(device) for shape in ((2, 3, 3, 48, 48), (4, 3, 3, 24, 24)))
    logits = network(big, small)
    logits.square().sum().backward()
    tokens = network.backbone.get_intermediate_layers(small[0], 2)
    return logits, network.backbone.pos_embed.grad, tokens, attention_maps(network.backbone, big[0])


def losses(device):
    """The loss and its gradient, both kinds of targets, the centre."""
    s, t, center = (torch.randn(*shape, 64).to(device) for shape in ((4, 3), (2, 3), ()))
    s.requires_grad_()
    p_t = teacher_probabilities(t, center, 0.04)
    loss = dino_loss(s, p_t, 0.1)
    loss.backward()
    update_center(center, batch_center(t), 0.9)
    return loss, s.grad, p_t, sinkhorn(t, 0.04), entropies(p_t), center


def prepared(args):
    """Sixteen images' views as a loader gives them: [(crops, drawn), ...]."""
    crop, images = MultiCrop(*crop_settings(args)), Shapes()
    views = default_collate([crop(images[i], Random(i)) for i in range(16)])
    return [(crops.pin_memory() if ON_GPU else crops, drawn) for crops, drawn in views]


def views(device):
    batch = prepared(train.parse_args(["--arch", "vit_mini"]))
    return [photometry(crops.to(device), drawn) for crops, drawn in batch]


def features(device):
    kind = dict(n_last_blocks=2, avgpool_patchtokens=True, gem=True, scales=(1, 0.5))
    backbone = backbone_of("vit_mini", 8, 48).to(device)
    return [extract_features(backbone, Shapes("val"), Extraction(device, **kind))[0]]


@pytest.mark.parametrize("part", [networks, losses, views, features])
def test_a_part_gives_what_it_gives_on_a_cpu(part):
    results = []
    for device in CPU, DEVICE:
        torch.manual_seed(0)
        results.append(part(device))
    for here, there in zip(*results, strict=True):
        assert there.device == DEVICE
        far = (here - there.cpu()).abs() > 1e-4 * (1 + here.abs())
        # a pixel next to solarisation's threshold may fall on its other side
        assert far.double().mean() <= (1e-4 if part is views else 0)


# ---- training ----


def losses_of(flags, output):
    """Train as the flags say, and return the loss of each step."""
    run(f"{FLAGS} {flags}", output)
    return [line["loss"] for line in log(output)]


@functools.cache
def float32_losses(flags):
    with tempfile.TemporaryDirectory() as folder:
        return losses_of(f"--amp off --steps 20 {flags}", Path(folder))


MIXED = [
    f"--amp {amp} {flags}"
    for amp in ("bf16", "fp16")
    for flags in ("", "--batch 8 --accumulate 2", "--drop_path_rate 0.3")
]


@pytest.mark.parametrize("flags", [*MIXED, "--amp bf16 --compile"])
def test_mixed_precision_follows_float32(flags, tmp_path, monkeypatch):
    """With a third of the learning rate the last losses are a tenth higher."""
    if not ON_GPU:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found = losses_of(f"{flags} --steps 20", tmp_path)
    expected = float32_losses("--drop_path_rate 0.3" if "drop_path" in flags else "")
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("micro, flags", [(1, ""), (2, "--centering sinkhorn --optimizer sgd")])
def test_a_wrong_gradient_is_skipped_and_no_step_waits(amp, micro, flags, tmp_path, monkeypatch):
    """The fifth is not finite. A GPU that is waited for raises an error.

    But for the first of six steps and the last, which are logged.
    """
    poison = {"__name__": "poison"}
    exec(POISON, poison)
    poison["poison"](monkeypatch.setattr, "0", "0")
    flags = f"{FLAGS} --amp {amp} --accumulate {micro} {flags} --steps 6 --log_every 100"
    batch = prepared(arguments(flags, tmp_path))

    def batches(*args):
        for i in range(6 * micro):
            cuda("set_sync_debug_mode", "error" if micro <= i < 5 * micro else "default")
            yield batch

    monkeypatch.setattr(train, "view_loader", batches)
    monkeypatch.setattr(train, "watch_attention", lambda run, step: None)
    ends = nullcontext()
    if amp != "fp16":  # which has some by design, and goes on
        ends = pytest.raises(ValueError, match=f"not finite at step {5 if micro == 1 else 3},")
    try:
        with ends:
            run(flags, tmp_path)
            assert log(tmp_path)[-1]["skipped"] >= 1
    finally:
        cuda("set_sync_debug_mode", "default")


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path):
    flags = "--amp fp16 --drop_path_rate 0.3 --workers 1"
    whole = losses_of(f"{flags} --steps 10", tmp_path / "whole")
    losses_of(f"{flags} --steps 5", tmp_path / "parts")
    assert losses_of(f"{flags} --steps 10", tmp_path / "parts") == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("flags", ["", "--centering sinkhorn"])
def test_a_group_of_one_process_gives_what_none_gives(flags, tmp_path, monkeypatch):
    """On a GPU through nccl. torchrun makes no group of one, so that it is made here."""
    alone = losses_of(f"{flags} --steps 10", tmp_path / "alone")
    monkeypatch.setattr(torch, "compile", DDP)  # where the student may be wrapped
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        grouped = losses_of(f"{flags} --steps 10 --compile", tmp_path / "grouped")
    finally:
        dist.destroy_process_group()
    assert grouped == pytest.approx(alone, rel=1e-3)


def test_recomputing_takes_less_memory(tmp_path):
    size, peaks = "--arch vit_tiny --global_crops_size 96 --batch 32" if ON_GPU else "", []
    for flags in "", "--recompute":
        cuda("reset_peak_memory_stats")
        losses_of(f"{size} {flags} --steps 2", tmp_path / f"run{flags}")
        peaks.append(cuda("max_memory_allocated"))
    assert not ON_GPU or peaks[1] < 0.6 * peaks[0]


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    cuda("empty_cache")
    cuda("set_per_process_memory_fraction", 0.001)
    if not ON_GPU:
        error = torch.OutOfMemoryError("out of memory")
        monkeypatch.setattr(torch.nn.Module, "to", mock.Mock(side_effect=error))
    large = "--out_dim 65536 --bottleneck_dim 1024"  # 256 MB
    flags = [*TINY, *FLAGS.split(), *large.split(), "--output", str(tmp_path)]
    try:
        status, lines = command_here("train.py", *flags)
    finally:
        cuda("set_per_process_memory_fraction", 1.0)
    assert status == 1 and len(lines) == 1 and "out of memory" in lines[0]


# ---- evaluations ----

EVALUATIONS = """knn --pixels
linear --epochs 3 --lr 0.01 0.1
linear --cached --lr 0.01 0.1
logistic --fraction 0.1
masks
davis
search {query}"""


def test_evaluations_give_a_cpus_figures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(davis, "SHAPES_FILMS", 2)
    losses_of("--steps 20", tmp_path / "run")
    results = []
    for name, device in ("here", CPU), ("there", DEVICE):
        for command in EVALUATIONS.format(query=folder / "val" / "größe" / "0.png").splitlines():
            command, *flags = command.split()
            data = folder / "train" if command == "search" else "shapes"
            flags += ["--data", data, "--device", device, "--output", tmp_path / name]
            flags += ["--workers", 0, "--amp", "off"] if command not in ("masks", "davis") else []
            flags = [command, tmp_path / "run" / "last.pth", *flags]
            evaluate.main(evaluate.parse_args([str(flag) for flag in flags]))
        lines = (tmp_path / name / "evaluate.jsonl").read_text().splitlines()
        leaves = tree_leaves([json.loads(line) | {"seconds": 0} for line in lines])
        printed = capsys.readouterr().out.splitlines()[-9:]
        found = [float(line.split()[0]) for line in printed if line.startswith("  ")]
        results.append((found, [x for x in leaves if isinstance(x, (int, float))]))
    (cosines, figures), (cosines_there, figures_there) = results
    assert figures_there == pytest.approx(figures, abs=2, rel=0.02)  # two of a hundred images
    assert cosines_there == pytest.approx(cosines, abs=0.002) and len(cosines) == 8
