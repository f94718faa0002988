"""docs/tour.md and docs/python.md: what they have to run runs, and what they name is there."""

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import visualize
from conftest import ROOT, backbone_of, command_here
from util import shapes

PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("tour.md", "python.md")}
TOUR = PAGES["tour.md"]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TOUR, re.S)  # (language, content), ...
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("python ")
]
PROSE = re.sub(r"```.*?```", "", "".join(PAGES.values()), flags=re.S)
TRIED = [" ".join(found.split()) for found in re.findall(r"`(python [^`]+)`", PROSE)]
NUMBER = r"-?\d+\.?\d*"
PRINTED = {  # the last command of a block: what stands below it
    block.splitlines()[-1]: after
    for (_, block), (language, after) in zip(BLOCKS, BLOCKS[1:])
    if language == "text"
}
BODY, ANSWERS = TOUR.split("## Answers")
STOPS = re.split(r"^## (?=\d)", BODY, flags=re.M)[1:]


def without_numbers(text):
    """What is printed, but for its numbers and how far they stand apart."""
    return re.sub(r" +", " ", re.sub(NUMBER, "#", text))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands name; of the built-in images there are few."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "LENGTHS", {"train": 200, "val": 100})
    Path("photos").mkdir()
    for name in ("img.jpg", "photos/a.jpg"):
        Image.effect_noise((40, 30), 90).save(name)


def test_every_command_runs(place, monkeypatch):
    monkeypatch.setattr(visualize, "draw_run", lambda run: None)  # as at each run's end
    assert len(COMMANDS) > 12 and len(TRIED) > 12
    for command in dict.fromkeys(COMMANDS + TRIED):
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
    for file in re.findall(r"`(runs/[\w./]+)`", PROSE):
        assert Path(file).is_file(), file


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


def anchors(text):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = PAGES[page]
    names = re.findall(r"`([\w/]+)\.py:([\w.]+)`", text)
    assert len(names) > 5
    for module, name in names:
        found = importlib.import_module(module.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).exists(), file
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = ROOT / "docs" / (link or page)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), anchor


def test_each_stop_is_named_by_a_file_that_it_opens():
    assert [int(stop.split(".")[0]) for stop in STOPS] == list(range(1, 13))
    assert [int(number) for number in re.findall(r"^(\d+)\. ", ANSWERS, re.M)] == list(range(1, 13))
    for number, stop in enumerate(STOPS, 1):
        named = set()
        for module in re.findall(r"`([\w/]+)\.py[:`]", stop):
            text = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text()))
            for numbers in re.findall(r"stops? ([\d, and]+)", text):
                named.update(re.findall(r"\d+", numbers))
        assert str(number) in named, stop[:40]


def test_each_block_of_python_runs(place):
    """docs/python.md: the shapes are those in its comments, and its loop has twenty lines."""
    Path("runs/laptop").mkdir(parents=True)
    torch.save(backbone_of("vit_micro", 4, 32).state_dict(), "runs/laptop/last.pth")
    blocks = re.findall(r"```python\n(.*?)```", PAGES["python.md"], re.S)
    names, shapes_said = {}, 0
    for code in blocks:
        exec(code, names)
        for name, shape in re.findall(r"(\w+) = .*# (\[[\d, ]+\])", code):
            assert list(names[name].shape) == ast.literal_eval(shape), name
            shapes_said += 1
    assert len(blocks) == 4 and shapes_said == 5 and len(names["maps"]) == 2
    assert Path("img_attention.png").is_file()

    lines = [line for line in blocks[2].splitlines() if line and "import " not in line]
    assert len(lines) <= 20 and 0 < names["loss"] < 6 and names["center"].any()
    student, teacher = (names[name].state_dict() for name in ("student", "teacher"))
    moved = [(student[name] - teacher[name]).abs().max() for name in student]
    assert 0 < max(moved) < 0.1
    saved = names["backbone"].state_dict()
    assert all(saved[name].equal(teacher[f"0.{name}"]) for name in saved)
