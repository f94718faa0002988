"""What is compared: both versions of each part run, and the whole steps are the same step."""

import io

import pytest
import torch
from PIL import Image

import bench
import train
from conftest import TINY

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    args = train.parse_args([*TINY, "--lr", "0.1"])
    monkeypatch.setattr(bench, "paper_args", lambda arch, batch: args)
    return args


def test_every_row_is_printed(tiny, monkeypatch, tmp_path, capsys):
    for i, content in enumerate(bench.draw_jpegs(3, 100, 80)):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    bench.compare_workers(CPU, str(tmp_path), 1, quick=True)
    draw = bench.draw_jpegs
    monkeypatch.setattr(bench, "draw_jpegs", lambda count, w, h: draw(2, w // 10, h // 10))
    bench.compare_workers(CPU, None, 1, quick=False)
    bench.compare_steps(CPU, 2, 1, True, 1e9)
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" not in line]
    assert len(lines) == 10
    for line in lines:
        ours, plain, ratio = map(float, line[48:].split()[:3])
        assert ratio == pytest.approx(ours / plain, rel=0.05, abs=0.01), line


def test_drawn_jpegs_vary_and_a_folders_are_its_own(tmp_path):
    sizes = {Image.open(io.BytesIO(content)).size for content in bench.draw_jpegs(5, 200, 100)}
    assert len(sizes) == 5 and all(100 < w < 300 and 50 < h < 160 for w, h in sizes)
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(bytes([i]))
    assert bench.jpegs_of(str(tmp_path), 4) == [b"\0", b"\1", b"\3", b"\4"]
    for i in range(6):
        (tmp_path / f"{i}.jpg").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no JPEGs"):
        bench.jpegs_of(str(tmp_path), 2)


def test_the_textbooks_step_is_ours(tiny):
    """From the same weights and views both give the same student, teacher and centre."""
    ours, plain = (bench.build_state(version, CPU, tiny) for version in (False, True))
    schedule = bench.schedules(5, tiny, 1, tiny.batch)
    views = bench.draw_views(CPU, tiny)
    names = [name for name, _ in plain.student.backbone.named_parameters()]
    plain.student.backbone.load_state_dict(ours.student.backbone.state_dict())
    plain.teacher.backbone.load_state_dict(ours.student.backbone.state_dict())
    for network in (plain.student, plain.teacher):
        network.head.mlp.load_state_dict(ours.student.head.mlp.state_dict())
        norm = network.head.last_layer.parametrizations.weight
        norm.original1.data.copy_(ours.student.head.last_layer.weight_v)
        norm.original0.data.fill_(1)
    # AdamW's first step is the gradient's sign, so that rounding would show: SGD in its place
    step = torch.optim.SGD
    states = []
    for state in (ours, plain):
        optimizer = step(bench.parameter_groups(state.student), lr=0.1)
        states.append(state._replace(optimizer=optimizer))
    precision = bench.autocast(CPU, None)
    for take_step, state in zip((train.train_step, bench.textbook_step), states):
        bench.set_rates(state.optimizer, schedule.lr, 0.0)
        take_step(state, state.student, iter([views]), schedule, tiny, precision)
    torch.testing.assert_close(ours.center, plain.center)
    for network in ("student", "teacher"):
        here = dict(getattr(ours, network).backbone.named_parameters())
        there = dict(getattr(plain, network).backbone.named_parameters())
        for name in names:
            torch.testing.assert_close(here[name], there[name], atol=2e-6, rtol=1e-4)
