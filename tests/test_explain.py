"""What happens in training, drawn: the pictures show what the code does."""

import io
import re
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

import visualize
from augment import MultiCrop, normalize
from conftest import ROOT, TINY, command_here
from evaluation import explain
from evaluation.features import center_crop
from head import DINOHead
from loss import teacher_probabilities
from test_visualize import figures, overlaps  # noqa: F401
from train import Network
from util import config
from util.checkpoint import load_backbone, load_checkpoint
from util.shapes import Shapes


def shown_by(monkeypatch, name):
    """Take the place of a drawing function; returns what it is called with."""
    calls = []
    monkeypatch.setattr(explain, name, lambda *drawn: calls.append(drawn))
    return calls


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's last.pth."""
    folder = tmp_path_factory.mktemp("run")
    flags = "--steps", "2", "--knn_every", "0", "--output", str(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "draw_run", lambda run: None)
        assert command_here("train.py", *TINY, *flags) == (0, [])
    return folder / "last.pth"


def test_the_views_drawn_are_the_crops_and_what_is_seen_of_them(monkeypatch, tmp_path):
    calls = shown_by(monkeypatch, "draw_panels")
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    crop = MultiCrop(32, 16, 3)
    explain.draw_crops(image, crop, Random(6), tmp_path / "a.png")
    (above, below), _, _ = calls[0]
    assert torch.equal(above["the image"], image)
    names = ["global 1, 32 px", "global 2, 32 px"] + [f"local {n}, 16 px" for n in (1, 2, 3)]
    assert list(above) == list(below) == ["the image", *names]
    (globals_, of_globals), (locals_, of_locals) = crop(image, Random(6))
    parameters, unchanged = [*of_globals, *of_locals], 0
    for name, view, drawn in zip(names, [*globals_, *locals_], parameters, strict=True):
        assert torch.equal(above[name], view)
        changed = drawn[0] or drawn[5] >= 0 or drawn[6:].any()
        assert torch.equal(below[name], above[name]) != bool(changed), name
        unchanged += not changed
    assert unchanged == 1


def test_the_schedules_drawn_are_the_recipes(monkeypatch, tmp_path):
    calls = shown_by(monkeypatch, "draw_log")
    flags = "schedules --epochs 50 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30".split()
    args = config.resolve(visualize.parse_args(flags))
    explain.draw_schedules(args, tmp_path / "a.png")
    lines, _, _ = calls[0]
    assert [*lines[0]] == ["epoch", "lr", "weight_decay", "momentum", "teacher_temp"]
    assert lines[100]["epoch"] == 10 and lines[100]["lr"] == lines[99]["lr"] == 5e-4
    assert lines[0]["lr"] == 0 and lines[-1]["lr"] == pytest.approx(1e-6, rel=0.01)
    assert (lines[0]["momentum"], lines[-1]["momentum"]) == (0.996, pytest.approx(1, abs=1e-7))
    temps = [lines[step]["teacher_temp"] for step in (0, 9, 10, 299, 499)]
    assert temps == pytest.approx([0.04, 0.04, 0.04 + 0.03 / 29, 0.07, 0.07])
    args = config.resolve(visualize.parse_args(["schedules", "--epochs", "10"]))  # the warm-up's
    explain.draw_schedules(args, tmp_path / "a.png")


def test_centring_and_sharpening_are_drawn_each_alone_and_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    logits, center = torch.randn(1, 20, 50) / 10, torch.randn(50)
    explain.draw_targets(logits - center, -center, 0.1, 0.02, tmp_path / "a.png")
    said = re.findall(r"each ([\d.]+), of their mean ([\d.]+)", capsys.readouterr().out)
    cases = [(0, 0.1), (-center, 0.1), (0, 0.02), (-center, 0.02)]
    for (each, mean), (c, temperature) in zip(said, cases, strict=True):
        p = teacher_probabilities(logits - center, torch.zeros(50) + c, temperature)[0].double()
        assert float(each) == pytest.approx(-(p * p.log()).nansum(-1).mean().item(), abs=0.01)
        p = p.mean(0)
        assert float(mean) == pytest.approx(-(p * p.log()).nansum().item(), abs=0.01)
    assert Image.open(tmp_path / "a.png").size[0] > 500


def test_targets_have_a_color_bar(figures, tmp_path):
    explain.draw_targets(torch.randn(1, 20, 50), torch.randn(50), 0.1, 0.02, tmp_path / "a.png")
    *panels, bar = figures[0].axes
    assert len(panels) == 4 and bar.get_ylabel() == "probability" and bar.get_ylim() == (0, 1)
    assert {panel.images[0].get_clim() for panel in panels} == {(0, 1)}
    assert not overlaps(figures[0])


def test_figure_2_has_the_names_of_the_code_and_no_overlaps(figures, tmp_path):
    explain.draw_networks(tmp_path / "a.png")
    assert not overlaps(figures[0])
    (axis,) = figures[0].axes
    texts = [text for text in axis.texts if text.get_text()]
    words = re.findall(r"\w+", " ".join(text.get_text() for text in texts))
    code = set(re.findall(r"\w+", (ROOT / "train.py").read_text()))
    for name in (
        "MultiCrop photometry Network student teacher backbone head teacher_probabilities center "
        "update_center student_temp teacher_temp dino_loss momentum"
    ).split():
        assert name in words and name in code, name
    assert "sg" in words and "EMA" in words
    boxes = [bar.patches[0].get_window_extent() for bar in axis.containers]
    for text in texts:
        x0, y0, x1, y1 = text.get_window_extent().extents
        around = [box for box in boxes if box.overlaps(text.get_window_extent())]
        for box in around:  # at most one, and the text lies inside
            assert box.x0 < x0 and x1 < box.x1 and box.y0 < y0 and y1 < box.y1
        assert len(around) <= 1


def test_targets_are_the_teachers_and_pictures_are_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 90).save("a.png")
    few = "--local_crops_number", "2"
    crops = ["crops", "a.png", *few]
    for flags in (["targets", str(checkpoint)], ["schedules"], ["networks"], crops):
        assert command_here("visualize.py", *flags, "--output", "out") == (0, [])
        assert Image.open(f"out/{flags[0]}.png").size[0] > 500

    calls = shown_by(monkeypatch, "draw_targets")
    visualize.main(visualize.parse_args(["targets", str(checkpoint)]))
    ((logits, center, *temperatures, path),) = calls
    saved, backbone = load_checkpoint(checkpoint), load_backbone(checkpoint).backbone
    assert torch.equal(center, saved["center"]) and path == Path("targets.png")
    assert temperatures == [0.1, 0.02]
    images, count = Shapes("val"), explain.BATCH
    network = Network(backbone, DINOHead(96, 64, 32, 16))
    network.load_state_dict(saved["teacher"])
    crops = [center_crop(images[i * 1000 // count], 16) for i in range(count)]
    expected = network(normalize(torch.stack(crops).float() / 255)[None])
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["schedules", "--arch", "vit_mini"], "give --epochs"),
        (["crops", "none.png"], "none.png"),
        (["crops", "none.png", "--patch", "0"], "--patch_size/--patch: 0 must be above 0"),
        (["targets", "none.pth"], "no checkpoint at 'none.pth'"),
        (["targets"], "checkpoint"),
        (["crops", "--seed", "3", "none.png"], "none.png"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = command_here("visualize.py", *flags, "--output", "out")
    assert status and len(lines) == 1 and message in lines[0]
    assert not Path("out").exists()


def test_targets_of_a_run_without_centre_are_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = load_checkpoint(checkpoint)
    assert saved["args"]["centering"] == "mean"
    saved["args"]["centering"] = "sinkhorn"
    torch.save(saved, "last.pth")
    status, lines = command_here("visualize.py", "targets", "last.pth")
    assert status == 1 and "did without" in lines[0]


def test_help_lists_the_flags_that_are_taken():
    out = io.StringIO()
    assert command_here("visualize.py", "crops", "--help", out=out)[0] == 0
    out = out.getvalue()
    assert "--local_crops_number" in out and "usage: visualize.py crops" in out
