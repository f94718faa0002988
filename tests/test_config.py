"""The recipes, the command line and the schedules."""

import os
from pathlib import Path
from unittest import mock

import pytest

import evaluate
import train
from test_train import run
from tests import textbook
from util.config import LAPTOP, PAPER, PHOTOS, RESNET, default_workers, summary, fit_to_data


# The reference code's defaults, and the commands that its README publishes.
REFERENCE = dict(
    arch="vit_small", patch_size=16, out_dim=65536, norm_last_layer=True, momentum_teacher=0.996,
    warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=0, weight_decay=0.04,
    weight_decay_end=0.4, clip_grad=3.0, batch_size_per_gpu=64, epochs=100, freeze_last_layer=1,
    lr=0.0005, warmup_epochs=10, min_lr=1e-6, optimizer="adamw", drop_path_rate=0.1,
    global_crops_scale=[0.4, 1.0], local_crops_number=8, local_crops_scale=[0.05, 0.4],
    saveckp_freq=20, seed=0, hidden_dim=2048, bottleneck_dim=256, global_crops_size=224,
    local_crops_size=96, student_temp=0.1, center_momentum=0.9,
)  # fmt: skip
PUBLISHED = [
    ("--arch vit_small", {}),
    ("--arch vit_base", dict(arch="vit_base")),
    (
        "--arch vit_small --epochs 300 --warmup_teacher_temp 0.04 --teacher_temp 0.07 "
        "--warmup_teacher_temp_epochs 30 --norm_last_layer false",
        dict(epochs=300, teacher_temp=0.07, warmup_teacher_temp_epochs=30, norm_last_layer=False),
    ),
    (
        "--arch vit_small --local_crops_number 10 --global_crops_scale 0.25 1 "
        "--local_crops_scale 0.05 0.25 --use_fp16 true --use_bn_in_head false",
        dict(local_crops_number=10, global_crops_scale=[0.25, 1.0], local_crops_scale=[0.05, 0.25],
             amp="fp16"),
    ),
    (
        "--arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4 "
        "--global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14 --use_fp16 false",
        dict(arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
             global_crops_scale=[0.14, 1.0], local_crops_scale=[0.05, 0.14], amp="off",
             drop_path_rate=0.0),  # which the reference code gives to its ViTs alone
    ),
]  # fmt: skip


@pytest.mark.parametrize("flags, differs", PUBLISHED)
def test_published_commands_resolve_to_the_reference_codes_values(flags, differs):
    args = train.parse_args([*flags.split(), "--data_path", "imagenet", "--output_dir", "out"])
    expected = REFERENCE | dict(accumulate=1, centering="mean", amp="auto") | differs
    assert {name: getattr(args, name) for name in expected} == expected
    assert {*PAPER} <= {*expected, "knn_bank", "blur_sigma"}
    assert (args.data_path, str(args.output_dir)) == ("imagenet", "out")


def test_a_published_run_steps(folder, tmp_path):
    """With sizes of the test's own."""
    small = "--out_dim 64 --hidden_dim 32 --bottleneck_dim 16 --batch 4 --workers 0 --steps 1 "
    small += "--global_crops_size 32 --local_crops_size 16 --knn_every 0 --device cpu"
    for (flags, _), arch in zip(PUBLISHED[2:], ("vit_tiny", "vit_tiny", "resnet50")):
        paths = ["--data", str(folder), "--output", str(tmp_path / str(len(flags)))]
        flags = f"{flags} --arch {arch} --amp off {small}"
        with mock.patch.object(train, "draw_run"):
            train.main(train.parse_args([*flags.split(), *paths]))
        assert Path(paths[-1], "last.pth").exists()


def test_batch_norm_in_the_head_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse_args("--use_bn_in_head true".split())
    (line,) = capsys.readouterr().err.splitlines()
    assert "--use_bn_in_head: invalid choice: 'true' (choose from" in line


@pytest.mark.parametrize("flags, name", [
    ("--arch vit_small --patch 16", "vit_small_16-shapes"),
    ("--arch vit_small --patch 16 --data in/train", "vit_small_16-in"),
    ("--data in", "laptop-in"),
])
def test_names_follow_from_architecture_and_data(flags, name):
    assert str(train.parse_args(flags.split()).output_dir) == f"runs/{name}"


def test_the_laptops_recipe_is_the_default_and_flags_override_it():
    args = train.parse_args([])
    assert args.arch == "vit_micro" and args.data_path == "shapes"
    assert str(args.output_dir) == "runs/laptop"
    for name, (value, *_) in PAPER.items():
        assert getattr(args, name) == LAPTOP.get(name, value)
    assert set(LAPTOP) | set(PHOTOS) | set(RESNET) <= set(PAPER)
    flags = "--arch vit_base --patch 8 --lr 0.1 --global_crops_scale 0.2 1 --norm_last_layer false"
    args = train.parse_args(flags.split())
    assert args.patch_size == 8 and args.lr == 0.1
    assert args.global_crops_scale == [0.2, 1.0] and not args.norm_last_layer


def test_photographs_have_a_recipe_of_their_own():
    args = train.parse_args(["--data", "some/photos"])
    assert args.arch == "vit_mini" and str(args.output_dir) == "runs/laptop-photos"
    for name, (value, *_) in PAPER.items():
        assert getattr(args, name) == PHOTOS.get(name, value)
    assert "photographs on a small machine" in summary(args).splitlines()[0]
    assert "the laptop's" in summary(train.parse_args([])).splitlines()[0]
    assert train.parse_args("--data some/photos --arch vit_micro".split()).patch_size == 4
    # as many images in all, whatever their number, but no image too often
    lengths = [fit_to_data(args, images).epochs for images in (50_000, 9_469, 800, 10**7)]
    assert lengths == [13, 68, 250, 1] and args.epochs is None
    short = fit_to_data(args, 200_000)  # neither warm-up is longer than the run
    assert (short.epochs, short.warmup_epochs, short.warmup_teacher_temp_epochs) == (3, 1, 2)
    assert fit_to_data(train.parse_args("--data some/photos --epochs 7".split()), 800).epochs == 7
    # and the batch that fits
    batches = [fit_to_data(args, *of).batch_size_per_gpu for of in ((800,), (63,), (63, 2), (1, 2))]
    assert batches == [64, 63, 31, 1]
    given = train.parse_args("--data some/photos --batch 32".split())
    assert fit_to_data(given, 9).batch_size_per_gpu == 32


@pytest.mark.parametrize("epochs, peak_temp", [(100, 0.04), (300, 0.07)])
@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("temp_warmup", [0, 1, 30])
def test_schedules_are_the_reference_codes(epochs, peak_temp, warmup, temp_warmup):
    flags = f"--arch vit_small --epochs {epochs} --warmup_epochs {warmup} "
    flags += f"--teacher_temp {peak_temp} --warmup_teacher_temp_epochs {temp_warmup}"
    got = train.schedules(train.parse_args(flags.split()), 7, 512)
    expected = (
        textbook.cosine(1e-3, 1e-6, epochs, 7, warmup),
        textbook.cosine(0.04, 0.4, epochs, 7),
        textbook.cosine(0.996, 1, epochs, 7),
        textbook.temperature(0.04, peak_temp, epochs, 7, temp_warmup),
    )
    assert len(got) == 7 * epochs
    for ours, theirs in zip(zip(*got), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=1e-12)


def test_schedules_at_their_ends():
    args = train.parse_args("--arch vit_small --warmup_epochs 1 --epochs 1".split())
    args.warmup_teacher_temp, args.warmup_teacher_temp_epochs = 0.01, 5  # longer than the run
    lr, weight_decay, momentum, temp = zip(*train.schedules(args, 3, 256))
    assert lr == pytest.approx((0, 2.5e-4, 5e-4)) and temp == (0.01,) * 3
    args.epochs = 2
    lr, weight_decay, momentum, temp = zip(*train.schedules(args, 3, 256))
    assert lr[2] == lr[3] == 5e-4 and temp == pytest.approx([0.01] * 3 + [0.0175] * 3)
    assert (weight_decay[0], momentum[0]) == pytest.approx((0.04, 0.996))


def test_a_last_layer_that_is_frozen_to_the_end_is_said(tmp_path, capsys):
    run("--epochs 1 --warmup_epochs 0 --freeze_last_layer 1 --steps 1 --knn_every 0", tmp_path)
    said = "warning: --freeze_last_layer keeps the last layer as it is for the whole run"
    out = capsys.readouterr().out
    assert said in out and "built-in drawings" not in out


def test_a_paper_sized_network_on_the_built_in_drawings_is_said(tmp_path, capsys):
    run("--arch vit_tiny --steps 1 --warmup_epochs 0 --knn_every 0", tmp_path)
    out = capsys.readouterr().out
    assert "built-in drawings of 64 pixels; --data path/to/imagenet/train" in out


def test_workers_are_as_many_as_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for allowed, cpu, gpu in ((1, 0, 1), (2, 0, 2), (8, 1, 8), (64, 1, 10)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
        assert (default_workers("cpu"), default_workers("cuda:0")) == (cpu, gpu)
        assert evaluate.parse_args(["knn", "a.pth"]).num_workers == min(2, allowed)


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
