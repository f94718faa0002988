"""README.md: its commands run, its Python runs, what it names is there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import evaluate
import visualize
from conftest import ROOT, backbone_of, command_here
from util import shapes
from util.checkpoint import RELEASED, export

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)  # (language, content), ...
COMMANDS = [
    line.split(" #")[0]
    for _, block in BLOCKS
    for line in block.splitlines()
    if line.startswith(("python ", "torchrun "))
]
IN_TABLES = [
    found
    for line in README.splitlines()
    if line.startswith("|")
    for found in re.findall(r"`(?:python )?(evaluate\.py [^`]+)`", line)
]
SMALL = "--global_crops_size 32 --local_crops_size 16 --local_crops_number 1 --out_dim 64 --batch 1"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands name; the built-in images are few, the weights small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(shapes, "LENGTHS", {"train": 200, "val": 100})
    monkeypatch.setattr(visualize, "draw_run", lambda run: None)
    weights = tmp_path / "torch" / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    for name, patch_size in (("dino_vits8", 8), ("dino_vits16", 16)):
        state = export(backbone_of("vit_micro", patch_size, 32))
        torch.save(state, weights / Path(RELEASED[name]).name)
    photographs = ["photos"]
    for split in ("train", "val"):
        photographs += [f"path/to/imagenet/{split}/{name}" for name in "ab"]
    for n, folder in enumerate(photographs):
        Path(folder).mkdir(parents=True)
        for i in range(4):
            to_pil_image(shapes.Shapes()[4 * n + i]).save(Path(folder, f"{i}.jpg"))
    shutil.copy("photos/0.jpg", "photo.jpg")


def test_every_command_runs(place):
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        file, *flags = shlex.split(re.sub(r"^python |^torchrun --nproc_per_node=8 ", "", command))
        if file == "train.py":
            flags += ["--steps", "1", "--knn_every", "0"]
        if "vit_small" in flags:
            flags += SMALL.split()
        if "linear" in flags:
            flags += ["--epochs", "1"]
        status, lines = command_here(file, *flags)
        assert status == 0, (command, lines)


def test_the_commands_of_the_tables_are_commands():
    assert len(IN_TABLES) >= 7
    for command in IN_TABLES:
        file, *flags = shlex.split(command.split(";")[0])
        assert evaluate.parse_args(flags).command in evaluate.COMMANDS


def test_its_python_runs():
    (code,) = [block for language, block in BLOCKS if language == "python"]
    names = {"images": torch.rand(1, 3, 224, 224), "center": torch.zeros(8)}
    names |= {"t": torch.rand(2, 1, 8), "s": torch.rand(3, 1, 8)}
    exec(code, names)
    assert names["features"].shape == (1, 384) and names["loss"].isfinite()


def test_what_it_names_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) <= 240
