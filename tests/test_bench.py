"""What is compared: both versions of each part run, and the whole steps are the same step."""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from conftest import TINY
from tests import bench
from util.shapes import Shapes

CPU = torch.device("cpu")


def test_every_row_is_printed(monkeypatch, folder, capsys):
    parse, draw = train.parse_args, bench.draw_jpegs
    monkeypatch.setattr(train, "parse_args", lambda flags: parse([*TINY, *flags]))
    monkeypatch.setitem(bench.STEPS, "quick", [("--steps 4 --amp bf16", ["--recompute"])])
    monkeypatch.setattr(bench, "draw_jpegs", lambda folder, w, h: draw(folder, w // 10, h // 10))
    monkeypatch.setattr(bench, "Shapes", lambda: Shapes(length=100))
    bench.main(SimpleNamespace(device="cpu", quick=True, data=None))
    bench.compare_worker("a folder's images", folder, CPU, 1)
    torchs, _, header, *rows = capsys.readouterr().out.splitlines()
    assert torchs.startswith(f"torch {torch.__version__}, ") and "GFLOP/s" in torchs
    assert header.split() == ["images/s", "here", "textbook", "ratio"]
    names = "a worker's, with photometry, a step of 4, its peak memory, % of a matrix, "
    names += "photometry takes, k-NN, the laptop's, a folder's"
    for name, row in zip(names.split(", "), rows, strict=True):
        assert row.strip().startswith(name)
        if name in ("photometry takes", "the laptop's"):
            assert min(map(float, re.findall(r"\d\S*", row))) > 0, row
            continue
        if name == "% of a matrix":  # which may be rounded to nothing
            assert row.split()[-1] == rows[2].split()[-1]
            continue
        here, plain, ratio = map(float, row[48:].split())
        assert ratio == pytest.approx(here / plain, rel=0.05, abs=0.01), row


def test_drawn_jpegs_vary(tmp_path):
    bench.draw_jpegs(tmp_path, 200, 100)
    images = [Image.open(path) for path in tmp_path.iterdir()]
    assert len(images) == 8 and {image.size for image in images} == {(200, 100)}
    assert len({image.tobytes() for image in images}) == 8
    assert {image.format for image in images} == {"JPEG"}


def test_a_folder_without_images_is_a_value_error(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images below"):
        bench.compare_worker("", tmp_path, CPU, 1)


def test_the_textbooks_step_is_ours(monkeypatch):
    """From the same weights and views both change student, teacher and centre in the same way."""
    # AdamW's first step is the gradient's sign, so that rounding would show: SGD in its place
    sgd = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr, momentum=0.9)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    flags = (
        "--optimizer sgd --lr 6400 --warmup_epochs 0 --weight_decay 0 --weight_decay_end 0 "
        "--momentum_teacher 0.5 --clip_grad 0.001 --steps 1"
    )
    args = train.parse_args([*TINY, *flags.split()])
    views = [(torch.randn(2, 4, 3, 16, 16), None), (torch.randn(2, 4, 3, 8, 8), None)]
    run = bench.our_steps(args, CPU, iter([views]))
    *networks, center = bench.textbook_steps(args, CPU, iter([views]))
    torch.testing.assert_close(run.center, center)
    start = train.build_networks(args, CPU, world=1)[0].state_dict()
    for name, plain in zip(("student", "teacher"), networks):
        ours, plain = run.state[name].state_dict(), plain.state_dict()
        assert ours.keys() == plain.keys() == start.keys()
        for key, value in start.items():
            moved = (plain[key] - value).abs().max()
            assert (moved > 1e-4) == (not key.endswith("weight_g")), key
            torch.testing.assert_close(ours[key], plain[key], rtol=0, atol=1e-3 * moved.item())
