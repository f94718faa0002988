"""Every command, as a user types it, on a handful of images."""

import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import evaluate
import train
import visualize
from conftest import ROOT, TINY, backbone_of, command_here, errors


def command(file, *flags, cwd, status=0):
    """Run a command in a process of its own."""
    line = [sys.executable, str(ROOT / file), *map(str, flags)]
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == status, result.stderr
    return result


def here(file, *flags):
    """Run a command in this process, and return what it prints."""
    out = io.StringIO()
    assert command_here(file, *map(str, flags), out=out) == (0, [])
    return out.getvalue()


def test_train_evaluate_and_visualize_a_folder(folder, tmp_path):
    """The first in a process of its own, the others here."""
    trained = command("train.py", "--data", folder / "train", *TINY, "--epochs", 2, cwd=tmp_path)
    run = tmp_path / "runs" / "vit_micro_8-images"
    files = ".lock attention.png config.json curves.png emergence.png last.pth log.jsonl".split()
    assert sorted(path.name for path in run.iterdir()) == files
    assert errors(trained.stderr.splitlines()) == [] and "untrained" in trained.stdout
    assert "in runs/vit_micro_8-images:" in trained.stdout and "curves.png" in trained.stdout

    last, cpu = run / "last.pth", ("--device", "cpu")
    evaluated = here("evaluate.py", "knn", last, *cpu)
    assert "12 queries against 12 images, 2 classes; chance 50.0 %" in evaluated
    assert "(all 12 images)" in evaluated
    rows = [line.split() for line in evaluated.splitlines()[3:]]
    assert [row[0] for row in rows] == ["10", "20", "100", "200"]
    assert all(0 <= float(row[i]) <= 100 for row in rows for i in (1, 2))

    image = folder / "val" / "größe" / "0.png"
    many = folder / "val" / "größe", "--output", tmp_path / "many"
    drawn = here("visualize.py", last, image, *many, *cpu)
    assert f"{image} -> {tmp_path / 'many' / '0_attention.png'}" in drawn
    assert min(Image.open(tmp_path / "many" / "0_attention.png").size) > 100
    assert len(list((tmp_path / "many").iterdir())) == 7
    assert f"  {', '.join(files[1:])}\n" in trained.stdout  # what is hidden is not listed


def test_errors_are_one_line(folder, tmp_path, monkeypatch):
    """One in a process of its own, the others here."""
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    state = backbone_of("vit_micro", 8, 16).state_dict()
    teacher = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"teacher": teacher}, tmp_path / "c.pth")
    error = command("train.py", "--data", "nowhere", cwd=tmp_path, status=1).stderr
    assert error.startswith("train.py: no folder 'nowhere'") and len(error.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    for file, flags, message in (
        ("evaluate.py", ["knn", "c.pth"], "give --data"),
        ("evaluate.py", ["knn", "c.pth", "--data", str(loose)], "has no labels"),
        ("evaluate.py", ["masks", "c.pth", "--data", str(loose)], "says where its objects are"),
        ("visualize.py", ["c.pth", "none.png"], "cannot read 'none.png'"),
    ):
        status, lines = command_here(file, *flags)
        assert status == 1 and len(lines) == 1
        assert message in lines[0] and lines[0].startswith(f"{file}: ")


COMMANDS = [
    ("train.py",),
    ("evaluate.py",),
    ("visualize.py",),
    *(("evaluate.py", command) for command in evaluate.COMMANDS),
    *(("visualize.py", command) for command in visualize.COMMANDS),
    ("tests/bench.py",),
    ("util/shapes.py",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command, capsys):
    assert command_here(*command, "--help", out=sys.stdout) == (0, [])
    shown = capsys.readouterr().out
    usage = " ".join(command).split("/")[-1]
    assert f"usage: {usage} " in shown and "--help" in shown
    for line in shown.splitlines():
        assert "None" not in line, line


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
    out = capsys.readouterr().out
    assert out.startswith("50 images of 10 classes")
    assert "\n1 x 4 x 1 images a step, 12 steps in 1 epochs" in out
    assert (tmp_path / "runs" / "vit_tiny_4-cifar10" / "last.pth").exists()


def test_a_part_that_fails_on_a_gpu_leaves_the_others(tmp_path):
    """tests/gpu.sh, with a stand-in for Python that fails in the bench."""
    stand_in = tmp_path / "python3"
    stand_in.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *tests.bench*) exit 3; esac\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VOC": "VOC2007"}
    environment |= {"OUT": str(tmp_path / "out"), "PHOTOS": str(tmp_path)}
    result = subprocess.run([ROOT / "tests" / "gpu.sh"], env=environment, capture_output=True)
    assert result.returncode == 1 and not result.stderr
    written = (tmp_path / "out" / "summary.txt").read_text()
    ends = re.findall(r"^(\w+): status (\d+) ", written, re.MULTILINE)
    names = ["tests", "bench", "train", "knn", "masks", "pictures", "curves"]
    assert ends == [(name, "3" if name == "bench" else "0") for name in names]
    assert f"--data {Path.cwd() / 'VOC2007'} --device cuda" in written
