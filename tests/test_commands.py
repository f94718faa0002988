"""Every command, as a user types it, on a handful of images."""

import hashlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import train
from backbone import build_backbone
from conftest import ROOT, TINY, command_here


def command(file, *flags, cwd, status=0):
    """Run a command in a process of its own."""
    line = [sys.executable, str(ROOT / file), *map(str, flags)]
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert result.returncode == status, result.stderr
    return result


def test_train_evaluate_segment_and_visualize_a_folder(folder, tmp_path):
    trained = command("train.py", "--data", folder / "train", *TINY, "--epochs", 2, cwd=tmp_path)
    run = tmp_path / "runs" / "vit_micro_8-images"
    files = "attention.png config.json curves.png emergence.png last.pth log.jsonl".split()
    assert sorted(path.name for path in run.iterdir()) == files
    assert "left" in trained.stderr and "untrained" in trained.stdout
    assert "runs/vit_micro_8-images/curves.png" in trained.stdout

    last, here = run / "last.pth", ("--device", "cpu")
    evaluated = command("evaluate.py", "knn", last, *here, cwd=tmp_path).stdout
    assert "12 queries against 12 images, 2 classes; chance 50.0 %" in evaluated
    assert "(all 12 images)" in evaluated
    rows = [line.split() for line in evaluated.splitlines()[3:]]
    assert [row[0] for row in rows] == ["10", "20", "100", "200"]
    assert all(0 <= float(row[i]) <= 100 for row in rows for i in (1, 2))

    image = folder / "val" / "größe" / "0.png"
    many = folder / "val" / "größe", "--output", tmp_path / "many"
    drawn = command("visualize.py", last, image, *many, *here, cwd=tmp_path).stdout
    assert f"{image} -> {tmp_path / 'many' / '0_attention.png'}" in drawn
    assert min(Image.open(tmp_path / "many" / "0_attention.png").size) > 100
    assert len(list((tmp_path / "many").iterdir())) == 7


def test_errors_are_one_line(folder, tmp_path, monkeypatch):
    """One in a process of its own, the others here."""
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    state = build_backbone("vit_micro", 8, 16).state_dict()
    teacher = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"teacher": teacher}, tmp_path / "c.pth")
    error = command("train.py", "--data", "nowhere", cwd=tmp_path, status=1).stderr
    assert error.startswith("train.py: no folder 'nowhere'") and len(error.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    for file, flags, message in (
        ("evaluate.py", ["knn", "c.pth"], "give --data"),
        ("evaluate.py", ["knn", "c.pth", "--data", str(loose)], "has no labels"),
        ("segment.py", ["masks", "c.pth", "--data", str(loose)], "says where its objects are"),
        ("visualize.py", ["c.pth", "none.png"], "cannot read 'none.png'"),
    ):
        status, lines = command_here(file, *flags)
        errors = [line for line in lines if not line.startswith("images ")]  # progress
        assert status == 1 and len(errors) == 1
        assert message in errors[0] and errors[0].startswith(f"{file}: ")


COMMANDS = "train.py evaluate.py retrieve.py segment.py visualize.py checkpoint.py bench.py".split()


@pytest.mark.parametrize("file", COMMANDS)
def test_help(file, capsys):
    assert command_here(file, "--help", out=sys.stdout) == (0, [])
    assert f"usage: {file}" in capsys.readouterr().out


def test_the_cifar10_recipe_on_a_stand_in(tmp_path, monkeypatch, capsys):
    """The command in docs/recipes.md."""
    folder = tmp_path / "datasets" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    pixels = torch.randint(256, (10, 3072)).byte().numpy()
    batch = {"data": pixels, "labels": list(range(10))}
    for split in ("train_list", "test_list"):
        files = [[name, write(name, batch)] for name, _ in getattr(CIFAR10, split)]
        monkeypatch.setattr(CIFAR10, split, files)
    names = write(CIFAR10.meta["filename"], {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": names})

    text = (ROOT / "docs" / "recipes.md").read_text()
    recipe = re.search(r"`python train\.py (--data cifar10 .*?)`", text)[1].split()
    tiny = (
        "--batch 4 --out_dim 64 --hidden_dim 32 --bottleneck_dim 16 --epochs 1 --warmup_epochs 0 "
        "--steps 2 --workers 0 --device cpu"
    )
    train.main(train.parse_args([*recipe, *tiny.split()]))
    assert "50 images, 1 x 4 x 1 a step, 12 steps in 1 epochs" in capsys.readouterr().out
    assert (tmp_path / "runs" / "vit_tiny_4-cifar10" / "last.pth").exists()
