"""What happens in training, drawn: the pictures show what the code does."""

import re
from random import Random

import pytest
import torch
from PIL import Image

import explain
from augment import MultiCrop
from conftest import TINY, command_here
from loss import teacher_probabilities


def shown_by(monkeypatch, name):
    """Take the place of a drawing function; returns what it is called with."""
    calls = []
    monkeypatch.setattr(explain, name, lambda *drawn: calls.append(drawn))
    return calls


def test_the_views_drawn_are_the_crops_and_what_is_seen_of_them(monkeypatch, tmp_path):
    calls = shown_by(monkeypatch, "draw_panels")
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    crop = MultiCrop(32, 16, 3)
    explain.draw_crops(image, crop, Random(0), tmp_path / "a.png")
    (above, below), _, _ = calls[0]
    names = ["global 1, 32 px", "global 2, 32 px"] + [f"local {n}, 16 px" for n in (1, 2, 3)]
    assert list(above) == list(below) == ["the image", *names]
    globals_, locals_, parameters = crop(image, Random(0))
    for name, view, drawn in zip(names, [*globals_, *locals_], parameters):
        assert torch.equal(above[name], view.permute(1, 2, 0))
        changed = drawn[4] >= 0 or drawn[5:].any()
        difference = (below[name].float() - above[name].float()).abs().max()
        assert (difference > 5) == bool(changed), name
    assert any(drawn[4] < 0 and not drawn[5:].any() for drawn in parameters)  # one is as it was


def test_the_schedules_drawn_are_the_recipes(monkeypatch, tmp_path):
    calls = shown_by(monkeypatch, "draw_curve")
    args = explain.parse_args(["schedules", "--epochs", "50", "--teacher_temp", "0.07"]).recipe
    explain.draw_schedules(args, tmp_path / "a.png")
    lines = calls[0][1]
    assert lines[200]["epoch"] == 10 and lines[200]["lr"] == pytest.approx(5e-4)
    assert lines[0]["lr"] == 0 and lines[-1]["lr"] == pytest.approx(1e-6)
    assert (lines[0]["momentum"], lines[-1]["momentum"]) == (0.996, 1)
    assert lines[300]["teacher_temp"] == pytest.approx(0.055) and args.epochs == 50


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


def test_targets_are_those_of_the_runs_teacher_and_pictures_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_here("train.py", *TINY, "--steps", "2", "--output", "run")[0] == 0
    Image.effect_noise((40, 30), 90).save("a.png")
    for flags in (["targets", "run/last.pth"], ["schedules"], ["crops", "a.png"]):
        assert command_here("visualize.py", *flags, "--output", "out") == (0, [])
        assert Image.open(f"out/{flags[0]}.png").size[0] > 500

    logits, checkpoint = explain.teacher_logits("run/last.pth", None, 10)
    assert logits.shape == (1, 10, 64)
    v = checkpoint["teacher"]["head.last_layer.weight_v"]
    assert logits.abs().max() <= 1 and v.shape == (64, 16)  # cosines
    checkpoint["teacher"]["head.last_layer.weight_v"] = -v
    torch.save(checkpoint, "turned.pth")
    turned, _ = explain.teacher_logits("turned.pth", None, 10)
    torch.testing.assert_close(turned, -logits)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["schedules", "--arch", "vit_mini"], "give --epochs"),
        (["crops", "none.png"], "none.png"),
        (["crops", "none.png", "--patch", "0"], "--patch 0 must be at least 1"),
        (["targets", "none.pth"], "no checkpoint at 'none.pth'"),
        (["targets"], "checkpoint"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = command_here("visualize.py", *flags)
    assert status and len(lines) == 1 and message in lines[0]
