"""Every command, as a user types it, on a handful of images."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

from vit import build_backbone


def command(file, *flags, cwd, status=0):
    result = subprocess.run([sys.executable, str(ROOT / file), *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=100)
    assert result.returncode == status, result.stderr
    return result


def test_train_evaluate_and_visualize_a_folder(folder, tmp_path):
    trained = command("train.py", "--data", folder / "train", *TINY, "--epochs", 2, cwd=tmp_path)
    run = tmp_path / "runs" / "laptop-images"
    assert {path.name for path in run.iterdir()} == {"attention.png", "config.json", "curves.png", "emergence.png", "last.pth", "log.jsonl"}
    assert "left" in trained.stderr and "untrained" in trained.stdout and "runs/laptop-images/curves.png" in trained.stdout

    evaluated = command("evaluate.py", "knn", run / "last.pth", "--device", "cpu", cwd=tmp_path).stdout
    assert "12 queries against 12 images, 2 classes; chance 50.0 %" in evaluated and "(all 12 images)" in evaluated
    rows = [line.split() for line in evaluated.splitlines() if line.strip()[:1].isdigit() and "queries" not in line]
    assert [row[0] for row in rows] == ["10", "20", "100", "200"] and all(0 <= float(row[i]) <= 100 for row in rows for i in (1, 2))

    image = folder / "val" / "größe" / "0.png"
    command("visualize.py", run / "last.pth", folder / "val" / "größe", "--output", tmp_path / "many", "--device", "cpu", cwd=tmp_path)
    drawn = command("visualize.py", run / "last.pth", image, "--device", "cpu", cwd=tmp_path).stdout
    assert f"{image} -> {image.with_name('0_attention.png')}" in drawn and min(Image.open(image.with_name("0_attention.png")).size) > 100
    assert len(list((tmp_path / "many").iterdir())) == 6


def test_errors_are_one_line(folder, tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    torch.save({"teacher": {"backbone." + k: v for k, v in build_backbone("vit_micro", 8, 16).state_dict().items()}}, tmp_path / "c.pth")
    for file, flags, message in (
        ("train.py", ["--data", "nowhere"], "no folder 'nowhere'"),
        ("evaluate.py", ["knn", "c.pth"], "give --data"),
        ("evaluate.py", ["knn", "c.pth", "--data", loose], "has no labels"),
        ("visualize.py", ["c.pth", "none.png"], "cannot read 'none.png'"),
    ):
        error = command(file, *flags, cwd=tmp_path, status=1).stderr
        assert message in error and len(error.splitlines()) == 1 and error.startswith(f"{file}: ")


@pytest.mark.parametrize("file", ["train.py", "evaluate.py", "visualize.py", "vit.py"])
def test_help(file, tmp_path):
    assert "usage" in command(file, "--help", cwd=tmp_path).stdout
