"""The recipe, the schedules, and the algorithm as a whole."""

import json
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY

import train
from head import DINOHead
from run import Run
from vit import build_backbone


def run(*flags):
    args = train.parse_args([*TINY, *map(str, flags)])
    with mock.patch.multiple(train, draw_attention=mock.DEFAULT, draw_curves=mock.DEFAULT, draw_emergence=mock.DEFAULT):  # see test_visualize.py
        train.main(args)
    return torch.load(args.output / "last.pth", weights_only=True)


def torchrun(processes, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", str(ROOT / "train.py"), *TINY, *map(str, flags)]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_papers_recipe(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = train.parse_args("--arch vit_small --patch 16".split())
    expected = dict(
        arch="vit_small", patch=16, global_size=224, local_size=96, local_crops=8, global_scale=[0.4, 1.0], local_scale=[0.05, 0.4],
        out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True, student_temp=0.1, teacher_temp=0.04, warmup_teacher_temp=0.04,
        center_momentum=0.9, momentum=0.996, epochs=100, warmup_epochs=10, batch=64, accumulate=1, lr=5e-4, min_lr=1e-6,
        weight_decay=0.04, weight_decay_end=0.4, clip=3.0, drop_path=0.1, freeze_last_layer=1,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    train.check(args)
    lr, weight_decay, momentum, tau = train.schedules(10 * 50, args, 50, 8 * 64)
    assert lr == pytest.approx(5e-4 * 512 / 256) and tau == 0.04


def test_the_laptops_recipe_is_the_default_and_flags_override_it():
    args = train.parse_args([])
    assert args.arch == "vit_micro" and args.data == "shapes" and str(args.output) == "runs/laptop"
    assert {name: getattr(args, name) for name in train.RECIPE} == {
        name: list(laptop) if isinstance(laptop, tuple) else laptop for name, (_, laptop, _) in train.RECIPE.items()
    }
    args = train.parse_args("--arch vit_base --patch 8 --lr 0.1 --global_scale 0.2 1 --no-norm_last_layer".split())
    assert args.patch == 8 and args.lr == 0.1 and args.global_scale == [0.2, 1.0] and not args.norm_last_layer


def test_schedules_by_hand():
    args = train.parse_args("--arch vit_small --epochs 100 --teacher_temp 0.07".split())
    at = [train.schedules(step, args, 10, 512) for step in (0, 50, 100, 550, 1000)]
    lr, weight_decay, momentum, tau = zip(*at)
    assert lr == pytest.approx([0, 5e-4, 1e-3, (1e-3 + 1e-6) / 2, 1e-6])
    assert (weight_decay[0], weight_decay[-1], momentum[0], momentum[-1]) == pytest.approx((0.04, 0.4, 0.996, 1))
    assert weight_decay[3] == pytest.approx(0.4 - 0.36 * (1 + math.cos(0.55 * math.pi)) / 2)
    assert momentum[3] == pytest.approx(1 - 0.004 * (1 + math.cos(0.55 * math.pi)) / 2)
    assert tau == pytest.approx([0.04, 0.04 + 0.03 / 6, 0.05, 0.07, 0.07])


def test_weight_decay_spares_biases_and_norms():
    backbone = build_backbone("vit_micro", 8, 16)
    network = train.Network(backbone, DINOHead(backbone.dim, 8, 8, 4, norm_last_layer=False))
    decayed, spared = ({id(p) for p in group["params"]} for group in train.parameter_groups(network))
    for name, p in network.named_parameters():
        assert (id(p) in spared) == (name.endswith("bias") or "norm" in name) and (id(p) in decayed) != (id(p) in spared)
    assert train.parameter_groups(network)[1]["weight_decay"] == 0


def test_network_puts_views_through_backbone_and_head():
    backbone = build_backbone("vit_micro", 8, 16)
    network = train.Network(backbone, DINOHead(backbone.dim, 8, 8, 4))
    big, small = torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)
    logits = network(big, small)
    assert logits.shape == (6, 3, 8)
    torch.testing.assert_close(logits[4, 1], network.head(network.backbone(small[2, 1:2]))[0])
    torch.testing.assert_close(network(big), logits[:2])


@pytest.mark.parametrize("momentum", [0, 1])
def test_teacher_is_the_student_at_momentum_0_and_stays_at_1(tmp_path, momentum):
    """After the very step: an average taken before it would miss the step at 0."""
    start = run("--steps", 1, "--warmup_epochs", 1, "--momentum", momentum, "--output", tmp_path / "a")  # the learning rate of step 0 is 0
    end = run("--steps", 1, "--warmup_epochs", 0, "--lr", 1, "--freeze_last_layer", 0, "--momentum", momentum, "--output", tmp_path / "b")
    same = start["teacher"] if momentum else end["student"]
    for name, value in end["teacher"].items():
        torch.testing.assert_close(value, same[name], rtol=0, atol=1e-6 if momentum else 0)
        assert name.endswith("weight_g") or not torch.equal(end["student"][name], start["student"][name])


def test_centering_and_sharpening_can_be_left_out(tmp_path):
    args = train.parse_args(["--no_sharpening", "--student_temp", "0.2"])
    assert train.schedules(5, args, 10, 64)[3] == 0.2 and str(args.output) == "runs/laptop-no_sharpening"
    for flags, moves in (([], True), (["--no_centering"], False)):
        assert run("--steps", 1, *flags, "--output", tmp_path / str(moves))["center"].any() == moves


def test_last_layer_is_frozen_at_first(tmp_path):
    flags = "--warmup_epochs", 0, "--lr", 1, "--steps", 2, "--output"
    start = run("--steps", 1, "--output", tmp_path / "start")["student"]
    for epochs, moves in ((1, False), (0, True)):
        end = run("--freeze_last_layer", epochs, *flags, tmp_path / str(epochs))["student"]
        assert torch.equal(start["head.last_layer.weight_v"], end["head.last_layer.weight_v"]) != moves
        assert not torch.equal(start["head.mlp.0.weight"], end["head.mlp.0.weight"])


def test_the_run_cuts_its_crops_as_configured(tmp_path, monkeypatch):
    seen = {}

    class Recorder(train.MultiCrop):
        def __init__(self, *args, **names):
            super().__init__(*args, **names)
            seen.update(views=self.views)

    monkeypatch.setattr(train, "MultiCrop", Recorder)
    run("--steps", 1, "--output", tmp_path)
    assert seen["views"] == [(16, [0.4, 1.0], 1.0, 0.0), (16, [0.4, 1.0], 0.1, 0.2)] + [(8, train.parse_args([]).local_scale, 0.5, 0.0)] * 2


def compare(one, two, tolerance):
    assert one["step"] == two["step"]
    for part in ("student", "teacher"):
        for name, value in one[part].items():
            if name.endswith("attn.qkv.bias"):  # the keys' bias has no gradient but rounding (softmax ignores it), and Adam enlarges that
                value, two[part][name] = (torch.cat(v.chunk(3)[::2]) for v in (value, two[part][name]))
            torch.testing.assert_close(value, two[part][name], rtol=0, atol=tolerance, msg=lambda text: f"{part} {name}: {text}")
    torch.testing.assert_close(one["center"], two["center"], rtol=0, atol=tolerance)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_and_accumulation_give_what_one_process_gives(tmp_path):
    """The same global batch of 8: crops, losses, centre and parameters agree, since every draw follows from the sample."""
    flags = "--steps", 4, "--warmup_epochs", 0, "--knn_every", 0, "--freeze_last_layer", 0, "--lr", 1e-2, "--output"
    one = run("--batch", 8, *flags, tmp_path / "one")
    torchrun(2, "--batch", 4, *flags, tmp_path / "two")
    accumulated = run("--batch", 4, "--accumulate", 2, *flags, tmp_path / "accumulated")
    two = torch.load(tmp_path / "two" / "last.pth", weights_only=True)
    compare(one, two, 1e-5)
    compare(one, accumulated, 1e-5)
    for line, other, third in zip(log(tmp_path / "one"), log(tmp_path / "two"), log(tmp_path / "accumulated"), strict=True):
        assert (line["loss"], line["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)
        assert line["loss"] == pytest.approx(third["loss"], abs=1e-5)


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path):
    flags = "--drop_path", 0.3, "--knn_every", 0, "--output"
    whole = run("--steps", 6, *flags, tmp_path / "whole")
    run("--steps", 2, *flags, tmp_path / "parts")
    parts = run("--steps", 6, *flags, tmp_path / "parts")
    compare(whole, parts, 0)
    assert whole["optimizer"]["state"][0]["step"] == parts["optimizer"]["state"][0]["step"] == 6
    assert log(tmp_path / "whole") == log(tmp_path / "parts") and len(log(tmp_path / "whole")) == 6


def test_another_configuration_is_refused_by_name(tmp_path):
    run("--steps", 1, "--output", tmp_path)
    with pytest.raises(ValueError, match=r"lr 0.\d+ -> 0.5.*--overwrite"):
        run("--steps", 1, "--lr", 0.5, "--output", tmp_path)
    assert run("--steps", 1, "--lr", 0.5, "--output", tmp_path, "--overwrite")["args"]["lr"] == 0.5


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_keeps_float32_weights(tmp_path, amp):
    end = run("--amp", amp, "--steps", 2, "--warmup_epochs", 0, "--output", tmp_path)
    assert all(value.dtype == torch.float32 for value in end["student"].values())
    assert all(math.isfinite(line["loss"]) for line in log(tmp_path) if "loss" in line)
    assert (end["scaler"]["scale"] > 1) == (amp == "fp16")
    full = run("--steps", 2, "--warmup_epochs", 0, "--output", tmp_path / "full")
    assert 0 < (end["center"] - full["center"]).abs().max() < 0.02  # other sums than in float32, but not far


def test_overwriting_leaves_nothing_to_resume_from(tmp_path):
    run("--steps", 1, "--output", tmp_path)
    (tmp_path / "epoch-0001.pth").write_bytes(b"old")
    args = train.parse_args([*TINY, "--output", str(tmp_path), "--overwrite"])
    assert Run(args, None, {}, None, 4).resume() == 0
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == []


def test_without_local_crops(tmp_path):
    run("--steps", 2, "--local_crops", 0, "--warmup_epochs", 0, "--output", tmp_path)
    assert all(0 < line["loss"] < 20 for line in log(tmp_path) if "loss" in line)


def test_too_many_bad_images_stop_the_run(folder, tmp_path):
    for path in (folder / "train" / "größe").glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="of 12 images cannot be read, more than 1 %"):
        run("--data", folder / "train", "--epochs", 2, "--output", tmp_path / "out")
