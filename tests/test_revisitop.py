"""Average precision, precision at k, and the revisited benchmarks."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import backbone_of
from evaluation import features, revisitop
from evaluation.ranking import (
    average_precision,
    mean_average_precision,
    precision_at,
    rankings,
    ranks_of,
)
from evaluation.revisitop import measure, read_ground_truth
from tests import textbook


def test_average_precision_by_hand():
    assert average_precision([0]) == 1 and average_precision([0, 1, 2]) == 1
    assert average_precision([1]) == 0.25  # (0 / 1 + 1 / 2) / 2
    assert average_precision([0, 3]) == pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 2)
    assert precision_at([0, 3], 1) == 1 and precision_at([0, 3], 5) == 0.5  # up to the fourth
    assert precision_at([1, 9], 5) == 0.2


def test_junk_is_taken_out_wherever_it_stands():
    order = torch.tensor([4, 0, 3, 1, 2])
    assert ranks_of(order, [0, 2]) == [1, 4]
    assert ranks_of(order, [0, 2], [4]) == [0, 3]  # before
    assert ranks_of(order, [0, 2], [3, 1]) == [1, 2]  # among
    assert ranks_of(order, [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]  # all positive


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_the_plain_rewritings(seed):
    rng = random.Random(seed)
    n = rng.choice((3, 8, 60))
    order = rng.sample(range(n), n)
    kinds = ["easy", "hard", *rng.choices(("easy", "hard", "junk", "none"), k=n - 2)]
    query = {kind: [i for i in range(n) if kinds[i] == kind] for kind in ("easy", "hard", "junk")}
    got = measure([torch.tensor(order)], {"gnd": [query]})
    wanted = {
        "medium": (query["easy"] + query["hard"], query["junk"]),
        "hard": (query["hard"], query["junk"] + query["easy"]),
    }
    for name, (positives, junk) in wanted.items():
        figures = [textbook.average_precision(order, positives, junk)]
        figures += [textbook.precision_at(order, positives, junk, k) for k in (1, 5, 10)]
        assert got[name] == pytest.approx([100 * figure for figure in figures], abs=1e-9)


def test_a_query_without_a_positive_is_left_out():
    order = torch.tensor([0, 1, 2])
    one = {"easy": [0], "hard": [1], "junk": []}
    none = {"easy": [2], "hard": [], "junk": []}
    figures = measure([order, order], {"gnd": [one, none]})
    assert figures["medium"][0] == pytest.approx(100 * (1 + (0 + 1 / 3) / 2) / 2)
    assert figures["hard"][0] == 100  # easy ones are taken out
    with pytest.raises(ValueError, match="no query of the ground truth has a positive"):
        measure([order], {"gnd": [none]})


def test_of_equally_near_images_the_lower_index_comes_first(monkeypatch):
    monkeypatch.setattr("evaluation.ranking.QUERIES", 2)
    database = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]])
    queries = torch.tensor([[5.0, 0], [0, 1], [1, 0]])
    orders = [order.tolist() for order in rankings(queries, database)]
    assert orders == [[0, 2, 1, 3], [1, 3, 0, 2], [0, 2, 1, 3]]
    got = mean_average_precision(queries, database, [[2], [1], []])
    assert got == pytest.approx(100 * (0.25 + 1) / 2)


# ---- the revisited benchmarks ----


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_ground_truth_is_read_without_running_code(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = {"bbx": np.array([0.0, 1, 2, 3]), "easy": [0], "hard": np.array([1]), "junk": []}
    truth = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [query], "n": np.float64(2)}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth, protocol))
    read = read_ground_truth("gnd.pkl")
    assert read["imlist"] == ["a", "b"] and read["gnd"][0]["hard"] == [1]
    for harm in (Harmful(), print, Image.new("L", (1, 1))):
        (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth | {"x": harm}, protocol))
        with pytest.raises(ValueError, match="cannot read the ground truth .* never loaded"):
            read_ground_truth("gnd.pkl")
    assert not (tmp_path / "harmed").exists()
    for wrong in ({}, [], truth | {"gnd": []}, truth | {"imlist": ["a"]}):
        (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(ValueError, match="cannot read the ground truth"):
            read_ground_truth("gnd.pkl")
    (tmp_path / "gnd.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="cannot read the ground truth"):
        read_ground_truth("gnd.pkl")


@pytest.fixture
def oxford(tmp_path):
    """Six images and two queries that are two of them, in the benchmark's layout."""
    jpg = tmp_path / "data" / "roxford5k" / "jpg"
    jpg.mkdir(parents=True)
    names = [f"image_{i}" for i in range(6)]
    for i, name in enumerate([*names, "query_0", "query_1"]):
        size = (60, 40) if i % 2 else (30, 50)
        image = Image.effect_noise(size, 90).convert("RGB")
        if name.startswith("query"):
            image = Image.open(jpg / f"image_{i - 6}.jpg")
        image.save(jpg / f"{name}.jpg", quality=95)
    answers = [{"bbx": [0, 0, 9, 9], "easy": [i], "hard": [i + 2], "junk": [5]} for i in (0, 1)]
    truth = {"imlist": names, "qimlist": ["query_0", "query_1"], "gnd": answers}
    (jpg.parent / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    torch.save(backbone_of("vit_micro", 8, 16).state_dict(), tmp_path / "bare.pth")
    return tmp_path


def run(tmp_path, capsys, *flags):
    flags = [str(flag) for flag in flags]
    given = ["oxford", str(tmp_path / "bare.pth"), *flags, "--workers", "0", "--device", "cpu"]
    evaluate.main(evaluate.parse_args(given))
    return capsys.readouterr().out.splitlines()


def test_a_query_that_is_in_the_data_is_found_first(oxford, capsys):
    for flags in ((), ("--multiscale",), ("--size", 26, "--amp", "off")):
        table = run(oxford, capsys, "--data", oxford / "data", *flags)
        assert "2 queries, 6 images" in table[1]
        assert table[-2].split()[0] == "medium" and table[-2].split()[2] == "100.0"
    assert run(oxford, capsys, "--data", oxford / "data" / "roxford5k")[1:]


def test_missing_images_are_counted_and_named(oxford, capsys):
    for name in ("image_1", "image_4", "query_0"):
        (oxford / "data" / "roxford5k" / "jpg" / f"{name}.jpg").unlink()
    with pytest.raises(ValueError, match="3 images of the ground truth are not in .*image_1.jpg"):
        run(oxford, capsys, "--data", oxford / "data")


def test_an_image_is_shrunk_to_its_long_side_and_seen_in_whole_patches(oxford, monkeypatch, capsys):
    seen = []
    real = revisitop.extract_features

    def spy(backbone, images, how):
        seen.append(how)
        forward = backbone.forward
        backbone.forward = lambda x: (seen.append(tuple(x.shape)), forward(x))[1]
        return real(backbone, images, how)

    monkeypatch.setattr(revisitop, "extract_features", spy)
    run(oxford, capsys, "--data", oxford / "data", "--size", 48, "--multiscale")
    shapes = {shape for shape in seen if isinstance(shape, tuple)}
    # 30 x 50 -> 29 x 48, 60 x 40 -> 48 x 32, each at 1, 1 / sqrt 2 and 1 / 2, in patches of 8
    assert shapes == {
        (1, 3, 48, 24), (1, 3, 32, 16), (1, 3, 24, 8),
        (1, 3, 32, 48), (1, 3, 16, 32), (1, 3, 16, 24),
    }  # fmt: skip


def test_kept_features_are_all_read_the_next_time(oxford, monkeypatch, capsys):
    """Queries and database lie in one folder, and neither takes the other's place."""
    flags = "--data", oxford / "data", "--cache"
    first = run(oxford, capsys, *flags)
    monkeypatch.setattr(features, "features_of", None)  # nothing is computed
    assert run(oxford, capsys, *flags) == first
