"""The recipes, the command line and the schedules."""

import math
import os

import pytest

import evaluate
import train
from test_train import run
from util.config import LAPTOP, PAPER, PHOTOS, RESNET, default_workers, summary, with_length


def test_the_papers_recipe(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = train.parse_args("--arch vit_small --patch 16".split())
    expected = dict(
        arch="vit_small",
        patch_size=16,
        global_crops_size=224,
        local_crops_size=96,
        local_crops_number=8,
        global_crops_scale=[0.4, 1.0],
        local_crops_scale=[0.05, 0.4],
        out_dim=65536,
        hidden_dim=2048,
        bottleneck_dim=256,
        norm_last_layer=True,
        student_temp=0.1,
        teacher_temp=0.04,
        warmup_teacher_temp=0.04,
        center_momentum=0.9,
        momentum_teacher=0.996,
        epochs=100,
        warmup_epochs=10,
        batch_size_per_gpu=64,
        accumulate=1,
        lr=5e-4,
        min_lr=1e-6,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_grad=3.0,
        drop_path_rate=0.1,
        freeze_last_layer=1,
    )
    assert {name: getattr(args, name) for name in expected} == expected
    assert str(args.output_dir) == "runs/vit_small_16-shapes-b512"
    lr, _, _, teacher_temp = train.schedules(10, args, 8 * 64)
    assert lr == pytest.approx(5e-4 * 512 / 256) and teacher_temp == 0.04
    resnet = train.parse_args("--arch resnet50".split())
    for name, (value, _) in PAPER.items():
        assert getattr(resnet, name) == RESNET.get(name, value)


def test_the_laptops_recipe_is_the_default_and_flags_override_it():
    args = train.parse_args([])
    assert args.arch == "vit_micro" and args.data_path == "shapes"
    assert str(args.output_dir) == "runs/laptop"
    for name, (value, _) in PAPER.items():
        assert getattr(args, name) == LAPTOP.get(name, value)
    assert set(LAPTOP) | set(PHOTOS) | set(RESNET) <= set(PAPER)
    flags = "--arch vit_base --patch 8 --lr 0.1 --global_crops_scale 0.2 1 --norm_last_layer false"
    args = train.parse_args(flags.split())
    assert args.patch_size == 8 and args.lr == 0.1
    assert args.global_crops_scale == [0.2, 1.0] and not args.norm_last_layer
    args = train.parse_args(["--centering", "sinkhorn"])
    assert str(args.output_dir) == "runs/laptop-centering_sinkhorn"


def test_photographs_have_a_recipe_of_their_own():
    args = train.parse_args(["--data", "some/photos"])
    assert args.arch == "vit_mini" and str(args.output_dir) == "runs/laptop-photos"
    for name, (value, _) in PAPER.items():
        assert getattr(args, name) == PHOTOS.get(name, value)
    assert "photographs on a small machine" in summary(args).splitlines()[0]
    assert "the laptop's" in summary(train.parse_args([])).splitlines()[0]
    assert train.parse_args("--data some/photos --arch vit_micro".split()).patch_size == 4
    # as many images in all, whatever their number, but no image too often
    lengths = [with_length(args, images).epochs for images in (50_000, 9_469, 800, 10**7)]
    assert lengths == [13, 68, 250, 1] and args.epochs is None
    short = with_length(args, 200_000)  # neither warm-up is longer than the run
    assert (short.epochs, short.warmup_epochs, short.warmup_teacher_temp_epochs) == (3, 1, 2)
    assert with_length(train.parse_args("--data some/photos --epochs 7".split()), 800).epochs == 7


def test_schedules_by_hand():
    args = train.parse_args("--arch vit_small --epochs 100 --teacher_temp 0.07".split())
    at = [train.schedules(epoch, args, 512) for epoch in (0, 5, 10, 55, 100)]
    lr, weight_decay, momentum, tau = zip(*at)
    assert lr == pytest.approx([0, 5e-4, 1e-3, (1e-3 + 1e-6) / 2, 1e-6])
    ends = weight_decay[0], weight_decay[-1], momentum[0], momentum[-1]
    assert ends == pytest.approx((0.04, 0.4, 0.996, 1))
    assert weight_decay[3] == pytest.approx(0.4 - 0.36 * (1 + math.cos(0.55 * math.pi)) / 2)
    assert momentum[3] == pytest.approx(1 - 0.004 * (1 + math.cos(0.55 * math.pi)) / 2)
    assert tau == pytest.approx([0.04, 0.04 + 0.03 / 6, 0.05, 0.07, 0.07])
    args.epochs = args.warmup_epochs  # the end of a run that is all warm-up
    assert train.schedules(args.epochs, args, 512)[0] == pytest.approx(1e-3)


def test_a_last_layer_that_is_frozen_to_the_end_is_said(tmp_path, capsys):
    run("--epochs 1 --warmup_epochs 0 --freeze_last_layer 1 --steps 1 --knn_every 0", tmp_path)
    said = "warning: --freeze_last_layer keeps the last layer as it is for the whole run"
    assert said in capsys.readouterr().out


def test_workers_are_as_many_as_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for allowed, cpu, gpu in ((1, 0, 1), (2, 0, 2), (8, 1, 8), (64, 1, 10)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
        assert (default_workers("cpu"), default_workers("cuda:0")) == (cpu, gpu)
        assert evaluate.parse_args(["knn", "a.pth"]).num_workers == min(2, allowed)


def test_teacher_temperature_by_hand():
    args = train.parse_args("--arch vit_small --teacher_temp 0.07".split())
    taus = [train.schedules(epoch, args, 512)[3] for epoch in (0, 15, 30, 99)]
    assert taus == pytest.approx([0.04, 0.055, 0.07, 0.07])
    args.warmup_teacher_temp_epochs = 0
    assert train.schedules(0, args, 512)[3] == 0.07


def test_the_summary_is_a_few_short_lines_and_names_all_that_is_not_off():
    args = train.parse_args("--arch vit_small --local_crops_number 0 --centering sinkhorn".split())
    lines = summary(args).splitlines()
    assert len(lines) < 15 and max(map(len, lines)) <= 100
    on = "local_crops_number 0", "global_crops_scale 0.4 1.0", "centering sinkhorn"
    for text in (*on, "(vit_small)"):
        assert text in summary(args)
    assert "compile" not in summary(args)
    assert "norm_last_layer false" in summary(train.parse_args(["--norm_last_layer", "false"]))
    for name in PAPER:
        assert name in summary(train.parse_args([]))
