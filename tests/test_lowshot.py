"""Logistic regression with few labels, and what a saved classifier predicts."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import backbone_of
from evaluation.features import center_crop
from evaluation.lowshot import TOLERANCE, accuracy, draw, logistic_regression
from util.shapes import LENGTHS


def plain_gradient(w, x, labels, penalty):
    """The gradient of the summed cross-entropy plus the penalty, image by image."""
    w, x = w.numpy(), np.pad(x.numpy(), ((0, 0), (0, 1)), constant_values=1)
    gradient = np.zeros_like(w)
    for image, label in zip(x, labels.tolist()):
        p = np.exp(w @ image - (w @ image).max())
        p /= p.sum()
        p[label] -= 1
        gradient += np.outer(p, image)
    gradient[:, :-1] += penalty * w[:, :-1]
    return np.linalg.norm(gradient)


def test_the_optimum_has_no_gradient():
    x, labels = torch.randn(60, 8).double(), torch.randint(4, (60,))
    for penalty in (60.0, 1.0, 1e-2):
        w = logistic_regression(x, labels, 5, penalty)
        start = plain_gradient(torch.zeros(5, 9).double(), x, labels, penalty)
        assert w.shape == (5, 9) and plain_gradient(w, x, labels, penalty) < 2 * TOLERANCE * start


def test_separable_features_are_told_and_shuffled_labels_are_chance():
    centers = 10 * torch.eye(5)
    labels, truth = torch.arange(5).repeat(40), torch.arange(5).repeat(200)
    x, held_out = centers[labels] + torch.randn(200, 5), centers[truth] + torch.randn(1000, 5)
    weights = logistic_regression(x, labels, 5, 1.0)
    assert accuracy(weights, held_out, truth) == 100
    shuffled = logistic_regression(torch.randn(200, 5), labels, 5, 1.0)
    assert 10 < accuracy(shuffled, torch.randn(1000, 5), truth) < 30
    one_each = logistic_regression(centers, torch.arange(5), 5, 1.0)
    assert accuracy(one_each, held_out, truth) > 99


def test_features_that_say_nothing_end_without_a_traceback():
    w = logistic_regression(torch.zeros(8, 3), torch.arange(4).repeat(2), 4, 1.0)
    assert w.abs().max() < 1e-9
    with pytest.raises(ValueError, match="features are not finite"):
        logistic_regression(torch.full((4, 3), torch.nan), torch.arange(4), 4, 1.0)


def test_a_share_of_each_class_is_drawn():
    labels = [0] * 40 + [1] * 20 + [2] * 4
    drawn = draw(labels, 0.1, seed=0)
    assert [sum(labels[i] == label for i in drawn) for label in range(3)] == [4, 2, 0]
    assert drawn == draw(labels, 0.1, seed=0) != draw(labels, 0.1, seed=1)
    assert draw(labels, 1.0, seed=0) == list(range(64))


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    torch.save(backbone_of("vit_micro", 8, 16).state_dict(), tmp_path / "run" / "c.pth")
    return tmp_path / "run" / "c.pth"


def run(capsys, *flags):
    flags = [str(flag) for flag in flags]
    evaluate.main(evaluate.parse_args([*flags, "--device", "cpu"]))
    return capsys.readouterr().out.splitlines()


def test_the_table_names_classes_without_an_image(folder, checkpoint, capsys):
    """Six images of one class and two of the other: a quarter is two and none."""
    for i in (2, 3, 4, 5):
        next((folder / "train" / "größe").glob(f"{i}.*")).unlink()
    flags = "--data", folder, "--draws", 3, "--workers", 0, "--fraction"
    said, *table = run(capsys, "logistic", checkpoint, *flags, 0.25, 1)
    assert "ViT of width" in said
    assert "12 images to test on, 2 classes" in table[0] and "mean and standard dev" in table[0]
    assert table[2].split()[:3] == ["25", "%", "2"] and table[2].endswith("(1 classes have none)")
    assert table[3].split()[:3] == ["100", "%", "8"] and "+-" in table[3]
    with pytest.raises(ValueError, match="--fraction 0.01 of the labels is no image of any class"):
        run(capsys, "logistic", checkpoint, *flags, 0.01, 1)
    line = json.loads((checkpoint.parent / "evaluate.jsonl").read_text())
    assert len(line["trained"]["0.25"]) == 3 and line["untrained"].keys() == {"0.25", "1.0"}


def test_predict_says_what_the_linear_classifier_says(folder, checkpoint, capsys, monkeypatch):
    flags = "--data", folder, "--cached", "--epochs", 30, "--workers", 0
    run(capsys, "linear", checkpoint, *flags)
    head = torch.load(checkpoint.parent / "linear.pth")
    image = folder / "val" / "größe" / "0.png"
    lines = run(capsys, "predict", checkpoint, checkpoint.parent / "linear.pth", image, folder)
    assert len(lines) == 2 + 24 and lines[1].startswith(f"{image}: ")
    said = dict(part.split(" % ")[::-1] for part in lines[1].split(": ")[1].split(", "))

    with Image.open(image) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    backbone = backbone_of("vit_micro", 8, 16).eval()
    backbone.load_state_dict(torch.load(checkpoint))
    view = center_crop(pixels, 16)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    view = (view - mean[:, None, None]) / std[:, None, None]
    tokens = backbone.get_intermediate_layers(view)[0, 0]
    feature = torch.cat([tokens[0], tokens[1:].mean(0)])
    wanted = (head["head"]["weight"] @ feature + head["head"]["bias"]).softmax(0)
    for name, share in zip(head["classes"], wanted.tolist()):
        assert float(said[name]) == pytest.approx(100 * share, abs=0.06)

    monkeypatch.setattr(os, "access", lambda path, mode: False)  # it writes nothing
    head = checkpoint.parent / "linear.pth"
    assert run(capsys, "predict", checkpoint, head, image, "--top", 1)[1].count(" % ") == 1
    monkeypatch.undo()
    other = checkpoint.parent / "other.pth"
    torch.save(backbone_of("vit_micro", 8, 16).state_dict(), other)
    with pytest.raises(ValueError, match="belongs to another network than .*other.pth"):
        run(capsys, "predict", other, head, image)


def test_on_shapes(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(LENGTHS, "train", 200)
    monkeypatch.setitem(LENGTHS, "val", 50)
    flags = "--data", "shapes", "--fraction", 0.1, "--no-untrained", "--workers", 0
    table = run(capsys, "logistic", checkpoint, *flags)
    assert table[-1].split()[:3] == ["10", "%", "20"] and "untrained" not in table[2]
