"""Every command, as a user types it, on a handful of images."""

import hashlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from torchvision.datasets import CIFAR10

import train
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


def test_the_readmes_cifar10_recipe_on_a_stand_in(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "datasets" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = {"data": torch.randint(256, (10, 3072)).byte().numpy(), "labels": list(range(10))}
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, files, [[name, write(name, batch)] for name, _ in getattr(CIFAR10, files)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write(CIFAR10.meta["filename"], {"label_names": list("abcdefghij")})})

    recipe = re.search(r"`python train\.py (--data cifar10 .*?)`", (ROOT / "README.md").read_text())[1].split()
    tiny = "--batch 4 --out_dim 64 --hidden_dim 32 --bottleneck_dim 16 --epochs 1 --warmup_epochs 0 --steps 2 --workers 0 --device cpu".split()
    train.main(train.parse_args([*recipe, *tiny]))
    out = capsys.readouterr().out
    assert "50 images, 1 x 4 x 1 a step, 12 steps" in out and (tmp_path / "runs" / "vit_tiny_4-cifar10" / "last.pth").exists()
