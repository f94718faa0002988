"""docs/tour.md: its commands run, its Python prints what it says, what it names is there."""

import ast
import contextlib
import importlib
import io
import re
import shlex

import pytest
import torch
from PIL import Image

import visualize
from conftest import ROOT, command_here
from util import shapes

TOUR = (ROOT / "docs" / "tour.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TOUR, re.S)  # (language, content), ...
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("python ")
]
PROSE = re.sub(r"```.*?```", "", TOUR, flags=re.S)
TRIED = [" ".join(found.split()) for found in re.findall(r"`(python [^`]+)`", PROSE)]
TRIED = [found for found in TRIED if "CKPT" not in found and found != "python evaluate.py search"]
NUMBER = r"-?\d+\.?\d*"
PRINTED = {  # the last command of a block: what stands below it
    block.splitlines()[-1]: after
    for (_, block), (language, after) in zip(BLOCKS, BLOCKS[1:])
    if language == "text"
}
STOPS = re.split(r"^## (?=\d)", TOUR, flags=re.M)[1:]


def without_numbers(text):
    """What is printed, but for its numbers and how far they stand apart."""
    return re.sub(r" +", " ", re.sub(NUMBER, "#", text))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands name; of the built-in images there are few."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "LENGTHS", {"train": 200, "val": 100})
    Image.effect_noise((40, 30), 90).save("img.jpg")


def test_every_command_runs(place, monkeypatch):
    monkeypatch.setattr(visualize, "draw_run", lambda run: None)  # as at each run's end
    assert len(COMMANDS) > 12 and len(TRIED) >= 4
    for command in COMMANDS + TRIED:
        file, *flags = shlex.split(command.removeprefix("python ").removeprefix("-m "))
        if file == "train.py":  # the first step alone
            flags += ["--steps", "1", "--knn_every", "0"]
        out = io.StringIO()
        status, lines = command_here(file, *flags, out=out)
        assert status == 0, (command, lines)
        if file != "train.py" and command in PRINTED:  # of a training the first step is no measure
            said = [without_numbers(line) for line in out.getvalue().splitlines()]
            for line in PRINTED[command].splitlines():
                assert without_numbers(line) in said, (command, line)


def python_blocks():
    """(code, what it prints) of each block of Python."""
    for (language, code), (after, printed) in zip(BLOCKS, BLOCKS[1:]):
        if language == "python":
            assert after == "text", code
            yield code, printed


@pytest.mark.parametrize("code, printed", list(python_blocks()))
def test_python_prints_what_the_tour_says(code, printed):
    with contextlib.redirect_stdout(io.StringIO()) as out, torch.random.fork_rng():
        exec(code, {})
    got = out.getvalue()
    assert without_numbers(got) == without_numbers(printed)
    got, expected = ([float(n) for n in re.findall(NUMBER, text)] for text in (got, printed))
    assert got == pytest.approx(expected, abs=0.021)


def test_what_the_tour_names_is_there():
    names = re.findall(r"`([\w/]+)\.py:([\w.]+)`", TOUR)
    assert len(names) > 15
    for module, name in names:
        found = importlib.import_module(module.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)
    for link in re.findall(r"\]\((?!http)([^)#]+)", TOUR):
        assert (ROOT / "docs" / link).exists(), link


def test_each_stop_is_named_by_a_file_that_it_opens():
    assert [int(stop.split(".")[0]) for stop in STOPS] == list(range(1, 13))
    for number, stop in enumerate(STOPS, 1):
        named = set()
        for module in re.findall(r"`([\w/]+)\.py[:`]", stop):
            text = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text()))
            for numbers in re.findall(r"stops? ([\d, and]+)", text):
                named.update(re.findall(r"\d+", numbers))
        assert str(number) in named, stop[:40]


def test_a_training_loop_of_ones_own_runs():
    """docs/library.md: at most twenty lines but for imports, and the teacher moves a little."""
    page = (ROOT / "docs" / "library.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    lines = [line for line in code.splitlines() if line and "import " not in line]
    names = {}
    exec(code, names)
    assert len(lines) <= 20 and 0 < names["loss"] < 6 and names["center"].any()
    student, teacher = (names[name].state_dict() for name in ("student", "teacher"))
    moved = [(student[name] - teacher[name]).abs().max() for name in student]
    assert 0 < max(moved) < 0.1
