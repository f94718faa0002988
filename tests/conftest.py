import io
import os
import runpy
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the commands that tests start

TINY = (
    "--arch vit_micro --patch 8 --global_crops_size 16 --local_crops_size 8 --local_crops_number 2 "
    "--out_dim 64 --hidden_dim 32 --bottleneck_dim 16 --batch 4 --workers 0 "
    "--device cpu --knn_bank 20 --log_every 1"
).split()


def without_keys(bias):
    """The biases of queries and values: softmax ignores the keys', whose gradient is rounding.

    Adam enlarges such a gradient, so that two runs may differ in these.
    """
    queries, _, values = bias.chunk(3)
    return torch.cat([queries, values])


@pytest.fixture(autouse=True)
def temporary_files(monkeypatch):
    """The folder for temporary files of the processes that a test starts; its name is short."""
    with tempfile.TemporaryDirectory(prefix="dino") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture(autouse=True)
def same_every_time():
    torch.manual_seed(0)


@pytest.fixture
def several_blocks(monkeypatch):
    """Gives vit_micro four blocks and four heads, to be told apart, in this process alone."""
    import vit

    monkeypatch.setitem(vit.ARCHITECTURES, "vit_micro", dict(embed_dim=64, depth=4, num_heads=4))


@pytest.fixture
def folder(tmp_path):
    """Two classes of six images of every mode, in train/ and val/."""
    modes = ("RGB", "RGBA", "L", "P", "CMYK", "I;16")
    for split in ("train", "val"):
        for number, name in enumerate(("cats and dogs", "größe")):
            path = tmp_path / "images" / split / name
            path.mkdir(parents=True)
            for i, mode in enumerate(modes):
                pixels = Image.effect_noise((30 + i, 20), 60 + 60 * number)
                if mode == "I;16":
                    image = Image.new(mode, pixels.size, 30_000 * (1 + number))
                else:
                    image = pixels.convert("RGB").convert(mode)
                image.save(path / f"{i}.{'tif' if mode in ('CMYK', 'I;16') else 'png'}")
    return tmp_path / "images"


def backbone_of(arch, patch_size, img_size):
    """An untrained ViT of the architectures' table."""
    import vit

    return vit.ViT(patch_size, img_size=img_size, **vit.ARCHITECTURES[arch])


def errors(lines):
    """What stands on stderr but for the progress, of which there may be any number of lines."""
    return [line for line in lines if not line.endswith(" left")]


def command_here(file, *flags, out=None):
    """Run a command as typed, but in this process: (status, lines on stderr but progress).

    file: train.py, say, or what follows `python -m`.
    """
    out = out or io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", [file, *flags])
        with redirect_stderr(io.StringIO()) as err:
            try:
                if file.endswith(".py"):
                    runpy.run_path(str(ROOT / file), run_name="__main__")
                else:
                    runpy.run_module(file, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
                if isinstance(stop.code, str):  # the interpreter prints it
                    print(stop.code, file=sys.stderr)
                    status = 1
    return status, errors(err.getvalue().splitlines())
