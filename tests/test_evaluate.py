"""Features, k-NN and the linear probe, against plain rewritings; the commands' tables."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import evaluate
import features
import retrieve
import segment
from augment import normalize
from backbone import architecture, build_backbone, resnet50
from data import Order, load_labelled
from evaluate import fit_heads, knn, knn_of, knn_of_pixels, score
from features import (
    Crops,
    Extraction,
    center_crop,
    choose_labelled,
    extract,
    fit_to_patches,
    represent,
)
from shapes import Shapes
from train import Network
from vit import ViT

pytestmark = pytest.mark.usefixtures("several_blocks")

CPU = torch.device("cpu")
PLAIN = Extraction(CPU)


# ---- k-NN ----


def loop(bank, bank_labels, queries, labels, k, alone=False):
    """Weighted k-NN, one query at a time, in float64."""
    right = 0
    for i, (query, label) in enumerate(zip(queries.double(), labels.tolist())):
        similar = [(torch.dot(query, b) / query.norm() / b.norm()).item() for b in bank.double()]
        candidates = [j for j in range(len(bank)) if not (alone and i == j)]
        votes = {}
        for j in sorted(candidates, key=lambda j: -similar[j])[:k]:
            weight = torch.tensor(similar[j] / 0.07).double().exp().item()
            votes[bank_labels[j].item()] = votes.get(bank_labels[j].item(), 0) + weight
        right += max(votes, key=lambda c: (votes[c], -c)) == label
    return 100 * right / len(queries)


@pytest.mark.parametrize("n, m, classes", [(50, 1, 3), (50, 37, 3), (7, 37, 3), (230, 60, 12)])
def test_knn_is_the_loop(n, m, classes):
    bank_labels, labels = torch.randint(classes, (n,)), torch.randint(classes, (m,))
    centers = torch.randn(classes, 8)
    bank, queries = centers[bank_labels] + torch.randn(n, 8), centers[labels] + torch.randn(m, 8)
    bank[1] = queries[0] = bank[0]  # a duplicated image
    got = knn(bank, bank_labels, queries, labels)
    assert list(got) == [10, 20, 100, 200]
    for k, top1 in got.items():
        assert top1 == pytest.approx(loop(bank, bank_labels, queries, labels, k))
    got = knn(bank, bank_labels, bank, bank_labels, (5,), alone=True)
    assert got[5] == pytest.approx(loop(bank, bank_labels, bank, bank_labels, 5, alone=True))


def signs(count):
    """Features of 16 equal entries but for signs: similarities are exact, and most are equal."""
    return torch.randint(2, (count, 16)).float()[:, :3].repeat(1, 6)[:, :16] * 2 - 1


@pytest.mark.parametrize("classes", [4, 40])
def test_of_classes_with_as_many_votes_the_lower_is_taken(classes):
    """All candidates vote, so that no choice among equals decides who does."""
    bank, queries = signs(60), signs(40)
    bank_labels, labels = torch.randint(classes, (60,)), torch.randint(classes, (40,))
    got = knn(bank, bank_labels, queries, labels, (60,))
    assert got[60] == pytest.approx(loop(bank, bank_labels, queries, labels, 60))
    got = knn(bank, bank_labels, bank, bank_labels, (60,), alone=True)
    assert got[60] == pytest.approx(loop(bank, bank_labels, bank, bank_labels, 60, True))


def test_knn_of_pixels_is_that_of_small_crops_as_they_are_and_centred():
    train, val = Shapes("train", 60), Shapes("val", 30)
    columns = knn_of_pixels(train, val, PLAIN, (5,))
    rows = []
    for images in (train, val):
        crops = [normalize(center_crop(image, 32)[None] / 255)[0] for image in images_of(images)]
        rows.append(torch.stack(crops).flatten(1).double())
    for name, mean in (("pixels", 0), ("less mean", rows[0].mean(0))):
        bank, queries = (F.normalize(x - mean, dim=-1) for x in rows)
        right = 0
        for query, label in zip(queries, val.labels):
            value, nearest = (bank @ query).topk(5)
            votes = torch.zeros(10).double()
            for cosine, i in zip(value, nearest):
                votes[train.labels[i]] += (cosine / 0.07).exp()
            right += votes.argmax().item() == label
        assert columns[name][5] == pytest.approx(100 * right / 30)
    alone = knn_of_pixels(train, None, PLAIN, (1,))
    assert alone["pixels"][1] < 50  # none votes for itself


def images_of(images):
    return [images[i] for i in range(len(images))]


def test_knn_in_many_chunks_and_with_few_images():
    bank, labels = torch.randn(2100, 4), torch.randint(3, (2100,))
    at_once = knn(bank, labels, bank, labels, (5,), alone=True)
    similarity = (F.normalize(bank) @ F.normalize(bank).T).fill_diagonal_(-2)
    weight, near = similarity.topk(5)
    votes = torch.zeros(2100, 3).scatter_add_(1, labels[near], (weight / 0.07).exp())
    assert at_once[5] == pytest.approx(100 * (votes.argmax(1) == labels).float().mean().item())
    assert knn(bank[:1], labels[:1], bank[:3], labels[:1].repeat(3), (5,)) == {5: 100.0}
    with pytest.raises(ValueError, match="one image has no neighbours"):
        knn(bank[:1], labels[:1], bank[:1], labels[:1], alone=True)


# ---- features ----


class Torn(Shapes):
    def __getitem__(self, i):
        if i == 3:
            raise OSError("torn")
        return super().__getitem__(i)


def test_features_skip_what_cannot_be_read(capsys):
    backbone = build_backbone("vit_micro", 8, 16).eval()
    tokens, read = extract(backbone, Torn("val"), [1, 3, 5], PLAIN)
    whole, _ = extract(backbone, Shapes("val"), [5, 1], PLAIN)
    assert read == [1, 5] and tokens.shape == (2, backbone.dim)
    torch.testing.assert_close(tokens, whole.flip(0))
    said = "1 images cannot be read and are left out, the first 'core 108 degrees from rim, 3'"
    assert said in capsys.readouterr().err


def test_features_are_the_papers_tokens():
    images, backbone = Shapes("val"), build_backbone("vit_micro", 8, 16).eval()
    crop = normalize(center_crop(images[7], 16)[None] / 255)
    tokens = backbone.tokens(crop, 3)
    got, _ = extract(backbone, images, [7], replace(PLAIN, last=3, mean_patches=True))
    expected = [tokens[0, :, 0], tokens[1, :, 0], tokens[2, :, 0], tokens[2, :, 1:].mean(1)]
    torch.testing.assert_close(got, torch.cat(expected, 1))
    torch.testing.assert_close(extract(backbone, images, [7], PLAIN)[0], backbone(crop))
    bf16, _ = extract(backbone, images, [7], replace(PLAIN, dtype=torch.bfloat16))
    assert bf16.dtype == torch.float32 and 0 < (bf16 - backbone(crop)).abs().max() < 0.1
    convnet, image = resnet50(32).eval(), images[7][None]
    expected = convnet(normalize(image / 255))
    torch.testing.assert_close(represent(convnet, image, PLAIN), expected)


def test_kept_features_are_read_only_for_the_same_question(tmp_path, monkeypatch):
    images, backbone = Shapes("val"), build_backbone("vit_micro", 8, 16).eval()
    how = replace(PLAIN, cache=tmp_path)
    first, read = extract(backbone, images, [1, 2], how)
    with monkeypatch.context() as patch:
        patch.setattr(features, "represent", None)  # nothing is computed
        again, read_again = extract(backbone, images, [1, 2], how)
    assert torch.equal(first, again) and read == read_again and len(list(tmp_path.iterdir())) == 1
    extract(backbone, images, [1, 3], how)
    extract(backbone, Shapes("train"), [1, 2], how)
    extract(backbone, images, [1, 2], replace(how, last=2))
    with torch.no_grad():
        backbone.norm.bias += 1
    moved, _ = extract(backbone, images, [1, 2], how)
    torch.testing.assert_close(moved, first + 1)
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable checkpoint: cut short"):
        extract(backbone, images, [1, 2], how)


def test_a_part_of_the_images_has_every_class():
    labels = [i % 10 for i in range(10_000)]
    chosen = choose_labelled(labels, 1000)
    assert len(set(chosen)) == 1000 and chosen == choose_labelled(labels, 1000)
    assert min([labels[i] for i in chosen].count(c) for c in range(10)) > 70
    assert choose_labelled([0, -1, 1], 5) == [0, 2]
    with pytest.raises(ValueError, match="no labelled images"):
        choose_labelled([-1, -1])


def test_random_crops_follow_from_seed_epoch_and_image():
    images, both = Shapes(), [4, 9]
    crops = Crops(images, both, 16, seed=1)
    n, crop = crops[0, 1]
    assert n == 1 and crop.shape == (3, 16, 16)
    assert torch.equal(crop, Crops(images, [9], 16, seed=1)[0, 0][1])
    others = [crops[1, 1], crops[0, 0]]  # another epoch, another image
    others.append(Crops(images, both, 16, seed=2)[0, 1])
    others.append(Crops(images, both, 16)[0, 1])
    assert not any(torch.equal(crop, other[1]) for other in others)
    assert torch.equal(Crops(images, both, 16)[5, 1][1], center_crop(images[9], 16))
    assert Crops(Torn(), [3], 16, seed=1)[0, 0][0] == -1


@pytest.mark.parametrize("shape", [(30, 400), (400, 30), (17, 150)])
def test_the_middle_of_a_strip_is_that_of_the_whole_resized(shape):
    image = torch.rand(1, 3, 5, 5)
    image = (255 * F.interpolate(image, shape, mode="bicubic").clamp(0, 1))[0].byte()
    h, w = (side * 36 // min(shape) for side in shape)
    whole = pil_to_tensor(to_pil_image(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = round((h - 32) / 2), round((w - 32) / 2)
    middle = whole[:, top : top + 32, left : left + 32].int()
    assert (center_crop(image, 32).int() - middle).abs().max() <= 2


def test_a_strip_takes_no_more_memory_than_its_middle_needs(monkeypatch):
    """Resized whole, this one would have 3.8 million columns."""
    strip = torch.randint(256, (3, 2, 30_000), dtype=torch.uint8)
    resized = []
    monkeypatch.setattr(features, "resize", lambda *args: resized.append(args))
    assert center_crop(strip, 224).shape == (3, 224, 224) and not resized
    with pytest.raises(ValueError, match="more than 65536 patches"):
        fit_to_patches(strip, 68, 4)


# ---- the linear probe ----


def clusters(count, classes=6, dim=10):
    """Features that a line separates by construction."""
    labels = torch.arange(count) % classes
    return 3 * torch.eye(dim)[labels] + 0.2 * torch.randn(count, dim), labels


def steps(x, labels, batch=32, count=400):
    for keys in Order(len(x), batch).batches(0, count):
        n = torch.tensor([i for _, i in keys])
        yield x[n], labels[n]


def test_linear_separates_what_is_separable_and_learns_nothing_from_shuffled_labels():
    (x, labels), (held_out, truth) = clusters(300), clusters(600)
    rates = [0.01, 0.1, 0.5]
    heads = fit_heads(steps(x, labels), 400, rates, 6, 10, CPU)
    top1, top5, loss = score(heads, held_out, truth)
    assert top1.tolist() == top5.tolist() == [100, 100, 100]
    assert loss.max() < 0.5 and loss[2] < loss[0]
    shuffled = labels[torch.randperm(300)]
    heads = fit_heads(steps(torch.randn(300, 10), shuffled), 400, rates, 6, 10, CPU)
    top1, top5, loss = score(heads, torch.randn(6000, 10), torch.arange(6000) % 6)
    assert (top1 - 100 / 6).abs().max() < 3 and (top5 - 500 / 6).abs().max() < 3


def test_each_head_is_the_one_trained_alone():
    x, labels = clusters(300)
    x = x + torch.randn_like(x)  # hard
    labels = labels.where(torch.rand(300) > 0.1, -1)  # some without a label
    rates = [0.003, 0.1, 0.7]
    together = fit_heads(steps(x, labels), 400, rates, 6, 10, CPU)
    for head, rate in zip(together, rates):
        weight = 0.01 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
        weight.requires_grad_()
        bias = torch.zeros(6, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for batch, target in steps(x, labels):
            optimizer.zero_grad()
            logits = batch @ weight.T + bias
            loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
            (loss / len(batch)).backward()
            optimizer.step()
            schedule.step()
        alone = torch.cat([weight, bias[:, None]], 1).detach()
        torch.testing.assert_close(head, alone, rtol=1e-5, atol=1e-5)


def test_scores_by_hand():
    heads = torch.zeros(2, 7, 8)
    heads[0, :, :7] = torch.eye(7)
    heads[1] = torch.nan
    x = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]).repeat(4, 1)
    labels = torch.tensor([0, 4, 5, 9])  # first, fifth, sixth, and a class without an output
    top1, top5, loss = score(heads, x, labels)
    assert top1.tolist()[0] == 25 and top5.tolist()[0] == 50
    assert loss[0].item() == pytest.approx(F.cross_entropy(x[:3], labels[:3]).item())
    assert loss[1].isnan() and top5[1] < 100


# ---- the commands ----


def test_classes_are_matched_by_name_and_unseen_ones_noted(folder, capsys):
    (folder / "val" / "größe").rename(folder / "val" / "a new one")
    train_images, val = load_labelled(str(folder))
    assert train_images.classes == ["cats and dogs", "größe"]
    assert "note: the training split lacks 'a new one'" in capsys.readouterr().out
    folders = [name.split("/")[-2] for name in map(val.name, range(12))]
    assert folders == ["a new one"] * 6 + ["cats and dogs"] * 6
    assert val.labels == [2] * 6 + [0] * 6
    backbone = build_backbone("vit_micro", 8, 16).eval()
    top1, sizes = knn_of(backbone, train_images, val, PLAIN, (1,))
    assert top1[1] <= 50 and sizes == (12, 12)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    torch.manual_seed(1)
    backbone = build_backbone("vit_micro", 8, 16)
    teacher = Network(backbone, torch.nn.Identity()).state_dict()
    saved = {"teacher": teacher, "architecture": architecture(backbone), "args": {}}
    torch.save(saved, tmp_path / "run" / "last.pth")
    return tmp_path / "run" / "last.pth"


def run(capsys, protocol, *flags):
    """The lines that evaluate.py or segment.py prints."""
    if protocol == "masks":
        segment.main(segment.parse_args(["masks", *map(str, flags), "--device", "cpu"]))
    else:
        given = [protocol, *map(str, flags), "--device", "cpu", "--workers", "0"]
        evaluate.main(evaluate.parse_args(given))
    return capsys.readouterr().out.splitlines()


def test_each_protocol_prints_a_table_and_adds_a_line(folder, checkpoint, capsys):
    table = run(capsys, "knn", checkpoint, "--data", folder / "train", "--k", 3, 50, "--cache")
    assert "12 queries against 12 images" in table[1] and table[-1].endswith("(all 12 images)")
    assert len(list(checkpoint.parent.glob("features-*"))) == 4
    some = "--data", folder, "--epochs", 2
    table = run(capsys, "linear", checkpoint, *some, "--lr", 0.1, 0.01, "--batch", 5)
    assert "random crops" in table[1]
    assert [line.split()[0] for line in table[3:5]] == ["0.1", "0.01"]
    assert len(table[3].split()) == 4
    cached = "--cached", "--last", 1, "--mean_patches"
    table = run(capsys, "linear", checkpoint, *some, "--lr", 0.1, *cached)
    assert "not the paper's protocol" in table[1] and "mean patch token" in table[1]
    assert len(table[3].split()) == 5
    saved = torch.load(checkpoint.parent / "linear.pth", weights_only=True)
    assert saved["weight"].shape == (2, 128) and saved["bias"].shape == (2,)
    assert saved["classes"] == ["cats and dogs", "größe"]
    table = run(capsys, "masks", checkpoint, "--data", "shapes", "--size", 16, "--no-untrained")
    assert table[-1].split()[0] == "trained" and len(table[-1].split()) == 6

    text = (checkpoint.parent / "evaluate.jsonl").read_text()
    knn_line, linear, cached, masks = lines = [json.loads(line) for line in text.splitlines()]
    assert [line["protocol"] for line in lines] == ["knn", "linear", "linear", "masks"]
    assert all(line["checkpoint"] == str(checkpoint) for line in lines)
    assert all(line["seconds"] >= 0 for line in lines)
    assert knn_line["top1"].keys() == {"3", "50"} and len(linear["top5"]) == 2
    assert cached["cached"] and masks["best_head"] > 0


def test_without_a_held_out_split_each_image_meets_the_others(folder, checkpoint, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    flags = "--data", folder / "val", "--k", 11, 12, "--output", elsewhere
    table = run(capsys, "knn", checkpoint, *flags, "--pixels")
    assert table[2].endswith("     pixels %  less mean %")
    assert "12 queries against 11 images" in table[1]
    assert table[-1].endswith("(all 11 images)") and not table[-2].endswith(")")
    assert (elsewhere / "evaluate.jsonl").exists()
    assert not (checkpoint.parent / "evaluate.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot write to .*: choose another --output"):
        run(capsys, "knn", checkpoint, "--data", "shapes")


def test_what_is_not_a_number_is_null_in_the_line(folder, checkpoint, capsys, monkeypatch):
    def diverge(batches, steps, rates, classes, dim, *rest):
        return torch.full((len(rates), classes, dim + 1), torch.nan)

    monkeypatch.setattr(evaluate, "fit_heads", diverge)
    flags = "--epochs", 4, "--lr", 1, "--cached", "--no-untrained"
    run(capsys, "linear", checkpoint, "--data", folder, *flags)
    text = (checkpoint.parent / "evaluate.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == [None]


def test_an_image_that_cannot_be_read_has_no_label_in_training(
    folder, checkpoint, capsys, monkeypatch
):
    (folder / "train" / "größe" / "torn.png").write_bytes(b"no image")
    seen = []

    def record(batches, *rest):
        seen.extend(chain.from_iterable(labels.tolist() for _, labels in batches))
        return fit_heads([], *rest)

    monkeypatch.setattr(evaluate, "fit_heads", record)
    run(capsys, "linear", checkpoint, "--data", folder, "--epochs", 2, "--batch", 13)
    assert sorted(seen) == [-1] * 2 + [0] * 12 + [1] * 12


@pytest.mark.parametrize(
    "dim, depth, expected",
    [
        (24, 3, "1 block, mean patch token;"),
        (24, 5, "4 blocks;"),
        (768, 4, "1 block, mean patch token;"),
    ],
)
def test_the_probes_features_are_the_papers_for_vit_s_or_vit_b(
    folder, tmp_path, capsys, dim, depth, expected
):
    torch.save(ViT(8, dim, depth, max(1, dim // 64), 16).state_dict(), tmp_path / "bare.pth")
    flags = "--epochs 1 --lr 0.1 --cached --no-untrained --batch 4".split()
    table = run(capsys, "linear", tmp_path / "bare.pth", "--data", folder, *flags)
    assert f"class tokens of the last {expected}" in table[1]


SEVERAL = """
import functools, json, sys, contextlib, evaluate, protocol, retrieve, segment
MODULES = {"masks": segment, "davis": segment, "search": retrieve, "copies": retrieve}
with protocol.processes("cpu") as joined:
    protocol.processes = lambda name: contextlib.nullcontext(joined)
    for flags in json.loads(sys.argv[1]):
        command = MODULES.get(flags[0], evaluate)
        command.main(command.parse_args(flags))
"""
MODULES = {"masks": segment, "davis": segment, "search": retrieve, "copies": retrieve}


def test_two_processes_print_what_one_prints(folder, checkpoint, tmp_path, capsys):
    """13 images to vote or to train on, one of which cannot be read, and 11 to test.

    Two processes divide neither.
    """
    (folder / "val" / "größe" / "0.png").unlink()
    (folder / "train" / "größe" / "torn.png").write_bytes(b"no image")
    for path in folder.rglob("1.png"):
        with Image.open(path) as image:
            image = image.convert("RGBA")
            image.paste((0, 0, 0, 0), (0, 0, 12, 9))
            image.save(path)
    out = tmp_path / "out"
    same = [str(checkpoint), "--data", str(folder), "--device", "cpu", "--output", str(out)]
    reading = ["--workers", "0", "--batch"]
    train = ["--data", str(folder / "train"), "--cache"]  # none of these is among the queries
    commands = [
        ["knn", *same, "--k", "3", "30", "--cache", *reading, "6"],
        ["knn", *same, "--k", "4", "--data", str(folder / "val"), "--cache", *reading, "6"],
        ["masks", *same, "--size", "16"],
        ["davis", *same, "--data", "shapes", "--size", "32", "--context", "1"],
        ["search", same[0], str(folder / "val" / "größe"), *same[1:], *train, *reading, "6"],
        ["copies", *same, "--threshold", "0.99", *reading, "6"],
        ["linear", *same, "--epochs", "3", *reading, "6"],
        ["linear", *same, "--cached", "--epochs", "3", *reading, "6"],
    ]
    for flags in commands:
        command = MODULES.get(flags[0], evaluate)
        command.main(command.parse_args(flags))
    alone = capsys.readouterr().out
    for path in [*out.glob("features-*"), *out.glob("index-*")]:
        path.unlink()

    (tmp_path / "several.py").write_text(SEVERAL)
    halved = [[*flags[:-1], "3"] if flags[-1] == "6" else flags for flags in commands]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += [str(tmp_path / "several.py"), json.dumps(halved)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout == alone and "left out" in alone
    assert "11 queries against 12 images" in alone and "11 queries against 10 images" in alone
    lines = [json.loads(line) for line in (out / "evaluate.jsonl").read_text().splitlines()]
    for one, two in zip(lines[:8], lines[8:], strict=True):
        assert one.pop("seconds") >= 0 and two.pop("seconds") >= 0
        assert one.pop("loss", []) == pytest.approx(two.pop("loss", []), rel=1e-5)
        assert one == two
