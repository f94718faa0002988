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
from augment import normalize
from conftest import backbone_of
from evaluate import knn, score, train_classifiers
from evaluation import davis, features
from evaluation.features import (
    Crops,
    Extraction,
    center_crop,
    choose_labelled,
    extract_features,
    features_of,
)
from evaluation.masks import fit_to_patches
from train import Network
from util.checkpoint import resnet50
from util.data import BatchSampler, Folder, load_labelled
from util.shapes import LENGTHS, Shapes
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


def by_hand(train, val, k):
    """k-NN of central crops of 32 x 32 pixels, as they are and less their mean over train."""
    rows, columns = [], {}
    for images in (train, val):
        crops = [normalize(center_crop(image, 32)[None] / 255)[0] for image in images_of(images)]
        rows.append(torch.stack(crops).flatten(1).double())
    for name, mean in (("pixels", 0), ("less mean", rows[0].mean(0))):
        bank, queries = (F.normalize(x - mean, dim=-1) for x in rows)
        right = 0
        for i, (query, label) in enumerate(zip(queries, val.labels)):
            similar = bank @ query
            if val is train:
                similar[i] = -2  # none votes for itself
            votes = torch.zeros(10).double()
            for cosine, j in zip(*similar.topk(k)):
                votes[train.labels[j]] += (cosine / 0.07).exp()
            right += votes.argmax().item() == label
        columns[name] = {str(k): pytest.approx(100 * right / len(val))}
    return columns


def test_knn_of_pixels_is_that_of_small_crops_as_they_are_and_centred(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(LENGTHS, "train", 60)
    monkeypatch.setitem(LENGTHS, "val", 30)
    train, val = Shapes("train"), Shapes("val")
    flags = "--pixels", "--no-untrained", "--output", tmp_path
    run(capsys, "knn", checkpoint, "--data", "shapes", "--k", 5, *flags)
    for i in range(30):
        place = tmp_path / "d" / str(val.labels[i])
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(val[i]).save(place / f"{i}.png")
    run(capsys, "knn", checkpoint, "--data", tmp_path / "d", "--k", 1, *flags)
    text = (tmp_path / "evaluate.jsonl").read_text()
    both, alone = (json.loads(line) for line in text.splitlines())
    assert "untrained" not in both and both["trained"].keys() == {"5"}
    assert {name: both[name] for name in ("pixels", "less mean")} == by_hand(train, val, 5)
    assert {name: alone[name] for name in ("pixels", "less mean")} == by_hand(val, val, 1)
    assert alone["pixels"]["1"] < 50  # none votes for itself


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
    backbone = backbone_of("vit_micro", 8, 16).eval()
    tokens, read = extract_features(backbone, Torn("val"), PLAIN, [1, 3, 5])
    whole, _ = extract_features(backbone, Shapes("val"), PLAIN, [5, 1])
    assert read == [1, 5] and tokens.shape == (2, backbone.embed_dim)
    torch.testing.assert_close(tokens, whole.flip(0))
    said = "1 of 3 images cannot be read, the first 'core 108 degrees from rim, 3'"
    assert f"{said}; they are left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^1 of 1 images cannot be read, the first .*3': torn$"):
        extract_features(backbone, Torn("val"), PLAIN, [3])


def test_features_are_the_papers_tokens():
    images, backbone = Shapes("val"), backbone_of("vit_micro", 8, 16).eval()
    crop = normalize(center_crop(images[7], 16)[None] / 255)
    tokens = backbone.get_intermediate_layers(crop, 3)
    several = replace(PLAIN, n_last_blocks=3, avgpool_patchtokens=True)
    got, _ = extract_features(backbone, images, several, [7])
    expected = [tokens[0, :, 0], tokens[1, :, 0], tokens[2, :, 0], tokens[2, :, 1:].mean(1)]
    torch.testing.assert_close(got, torch.cat(expected, 1))
    got, read = extract_features(backbone, images, PLAIN, [7])
    torch.testing.assert_close(got, backbone(crop))
    assert read == [7]
    in_bf16 = replace(PLAIN, dtype=torch.bfloat16)
    bf16, _ = extract_features(backbone, images, in_bf16, [7])
    assert bf16.dtype == torch.float32 and 0 < (bf16 - backbone(crop)).abs().max() < 0.1
    convnet, image = resnet50(32).eval(), images[7][None]
    expected = convnet(normalize(image / 255))
    torch.testing.assert_close(features_of(convnet, image, PLAIN), expected)


def test_kept_features_are_read_only_for_the_same_question(folder, tmp_path, monkeypatch):
    images, backbone = Folder(folder / "train"), backbone_of("vit_micro", 8, 16).eval()
    kept = tmp_path / "kept"
    kept.mkdir()
    how = replace(PLAIN, cache=kept)
    first, read = extract_features(backbone, images, how, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(features, "features_of", None)  # nothing is computed
        again, read_again = extract_features(backbone, images, how, [1, 2])
        assert torch.equal(first, again) and read == read_again == [1, 2]
        other_way, _ = extract_features(backbone, images, how, [2, 1])
        assert torch.equal(other_way, first.flip(0))
    more, _ = extract_features(backbone, images, how, [1, 3])
    assert torch.equal(more[0], first[0]) and len(list(kept.iterdir())) == 1
    fresh, _ = extract_features(backbone, images, PLAIN, [3])
    torch.testing.assert_close(more[1], fresh[0])
    extract_features(backbone, Folder(folder / "val"), how, [1, 2])
    extract_features(backbone, images, replace(how, n_last_blocks=2), [1, 2])
    with torch.no_grad():
        backbone.norm.bias += 1
    moved, _ = extract_features(backbone, images, how, [1, 2])
    torch.testing.assert_close(moved, first + 1)
    assert len(list(kept.iterdir())) == 3
    extract_features(backbone, Shapes("val"), how, [1, 2])  # these are no files
    assert len(list(kept.iterdir())) == 3
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable checkpoint: cut short"):
        extract_features(backbone, images, how, [1, 2])


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


def test_too_long_a_strip_is_refused():
    with pytest.raises(ValueError, match="more than 65536 patches"):
        fit_to_patches(torch.zeros(3, 2, 30_000, dtype=torch.uint8), 68, 4)


# ---- the linear probe ----


def clusters(count, classes=6, dim=10):
    """Features that a line separates by construction."""
    labels = torch.arange(count) % classes
    return 3 * torch.eye(dim)[labels] + 0.2 * torch.randn(count, dim), labels


EPOCHS, STEPS = 44, 9  # of 300 images in batches of 32


def batches_of(x, labels):
    for keys in BatchSampler(300, 32).batches(0, EPOCHS * STEPS):
        n = torch.tensor([i for _, i in keys])
        yield x[n], labels[n]


def train_on(x, labels, rates):
    return train_classifiers(batches_of(x, labels), STEPS, EPOCHS, rates, 6, 10, CPU)


def scores(heads, x, labels):
    """Top-1, top-5 and loss, each of all heads."""
    return torch.tensor([score(head, x, labels) for head in heads]).T


def test_linear_separates_what_is_separable_and_learns_nothing_from_shuffled_labels():
    (x, labels), (held_out, truth) = clusters(300), clusters(600)
    rates = [0.01, 0.1, 0.5]
    heads = train_on(x, labels, rates)
    top1, top5, loss = scores(heads, held_out, truth)
    assert top1.tolist() == top5.tolist() == [100, 100, 100]
    assert loss.max() < 0.5 and loss[2] < loss[0]
    shuffled = labels[torch.randperm(300)]
    heads = train_on(torch.randn(300, 10), shuffled, rates)
    top1, top5, loss = scores(heads, torch.randn(6000, 10), torch.arange(6000) % 6)
    assert (top1 - 100 / 6).abs().max() < 3 and (top5 - 500 / 6).abs().max() < 3


def test_each_head_is_the_one_trained_alone():
    x, labels = clusters(300)
    x = x + torch.randn_like(x)  # hard
    labels = labels.where(torch.rand(300) > 0.1, -1)  # some without a label
    rates = [0.003, 0.1, 0.7]
    together = train_on(x, labels, rates)
    for head, rate in zip(together, rates, strict=True):
        weight = 0.01 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
        weight.requires_grad_()
        bias = torch.zeros(6, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        for step, (batch, target) in enumerate(batches_of(x, labels)):
            optimizer.zero_grad()
            logits = batch @ weight.T + bias
            loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
            (loss / len(batch)).backward()
            optimizer.step()
            if step % STEPS == STEPS - 1:
                schedule.step()
        torch.testing.assert_close(head.weight, weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(head.bias, bias, rtol=1e-5, atol=1e-5)


def test_scores_by_hand():
    heads = torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)
    for head, weight in zip(heads, (torch.eye(7), torch.full((7, 7), torch.nan))):
        head.weight.data.copy_(weight)
        head.bias.data.zero_()
    x, labels = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]).repeat(7, 1), torch.arange(7)
    top1, top5, loss = scores(heads, x, labels)
    assert top1[0].item() == pytest.approx(100 / 7) and top5[0].item() == pytest.approx(500 / 7)
    assert loss[0].item() == pytest.approx(F.cross_entropy(x, labels).item())
    assert loss[1].isnan() and top5[1] < 100


# ---- the commands ----


def test_classes_are_matched_by_name(folder):
    (folder / "val" / "cats and dogs").rename(folder / "val" / "passed on")
    with pytest.raises(ValueError, match="lacks classes of the held-out: 'passed on'"):
        load_labelled(str(folder))
    (folder / "val" / "passed on").rename(folder / "passed on")
    (folder / "train" / "a third").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train" / "a third" / "0.png")
    (folder / "passed on").rename(folder / "val" / "a third")
    train_images, val = load_labelled(str(folder))
    assert train_images.classes == ["a third", "cats and dogs", "größe"]
    assert val.labels == [0] * 6 + [2] * 6


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    torch.manual_seed(1)
    backbone = backbone_of("vit_micro", 8, 16)
    teacher = Network(backbone, torch.nn.Identity()).state_dict()
    saved = {"teacher": teacher, "num_heads": backbone.num_heads, "args": {}}
    torch.save(saved, tmp_path / "run" / "last.pth")
    return tmp_path / "run" / "last.pth"


def run(capsys, command, *flags):
    """The lines that evaluate.py prints."""
    workers = () if command == "masks" else ("--workers", 0)
    given = [str(flag) for flag in (command, *flags, "--device", "cpu", *workers)]
    evaluate.main(evaluate.parse_args(given))
    return capsys.readouterr().out.splitlines()


def test_each_command_prints_a_table_and_adds_a_line(folder, checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(LENGTHS, "val", 30)
    table = run(capsys, "knn", checkpoint, "--data", folder / "train", "--k", 3, 50, "--cache")
    assert "12 queries against 12 images" in table[1] and table[-1].endswith("(all 12 images)")
    assert len(list(checkpoint.parent.glob("features-*"))) == 2
    some = "--data", folder, "--epochs", 2
    table = run(capsys, "linear", checkpoint, *some, "--lr", 0.1, 0.01, "--batch", 5)
    assert "random crops" in table[1]
    assert [line.split()[0] for line in table[3:5]] == ["0.1", "0.01"]
    assert len(table[3].split()) == 4
    cached = "--cached", "--n_last_blocks", 1, "--avgpool_patchtokens", "true"
    table = run(capsys, "linear", checkpoint, *some, "--lr", 0.1, *cached)
    assert "not the paper's protocol" in table[1] and "mean patch token" in table[1]
    assert len(table[3].split()) == 5
    saved = torch.load(checkpoint.parent / "linear.pth", weights_only=True)
    head = saved["head"]
    assert head["weight"].shape == (2, 128) and head["bias"].shape == (2,)
    assert saved["classes"] == ["cats and dogs", "größe"]
    table = run(capsys, "masks", checkpoint, "--data", "shapes", "--size", 16, "--no-untrained")
    assert table[-1].split()[0] == "trained" and len(table[-1].split()) == 6
    assert "shapes: 30 objects in 30 images" in table[1]

    text = (checkpoint.parent / "evaluate.jsonl").read_text()
    knn_line, linear, cached, masks = lines = [json.loads(line) for line in text.splitlines()]
    assert [line["command"] for line in lines] == ["knn", "linear", "linear", "masks"]
    assert all(line["checkpoint"] == str(checkpoint) for line in lines)
    assert all(line["seconds"] >= 0 for line in lines)
    assert knn_line["trained"].keys() == {"3", "50"} == knn_line["untrained"].keys()
    assert len(linear["top5"]) == 2 and cached["cached"] and masks["trained"][0] > 0


@pytest.mark.parametrize("times", [(10**9, 10**9 + 1), (10**9, 10**9)])
def test_labels_follow_folders_that_exchange_their_names(checkpoint, tmp_path, capsys, times):
    """No figure comes from features that are another image's by now.

    Files out of an archive may all have one time, and these all have one size.
    """
    for split in ("train", "val"):
        for name, shade, time in zip("ab", (30, 220), times):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(3):
                path = tmp_path / "d" / split / name / f"{i}.bmp"
                Image.new("RGB", (16, 16), (shade + i, 0, 255 - shade)).save(path)
                os.utime(path, (time, time))
    flags = checkpoint, "--data", tmp_path / "d", "--k", 3, "--no-untrained"

    def figures():
        """Top-1 with and without the cache."""
        for cache in (["--cache"], []):
            run(capsys, "knn", *flags, *cache)
        lines = (checkpoint.parent / "evaluate.jsonl").read_text().splitlines()
        return [json.loads(line)["trained"]["3"] for line in lines[-2:]]

    assert figures() == figures() == [100, 100]
    a, b = (tmp_path / "d" / "train" / name for name in "ab")
    a.rename(tmp_path / "aside")
    b.rename(a)
    (tmp_path / "aside").rename(b)
    assert figures() == figures() == [0, 0]
    assert len(list(checkpoint.parent.glob("features-*"))) == 1


def test_without_a_held_out_split_each_image_meets_the_others(folder, checkpoint, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    flags = "--data", folder / "val", "--k", 11, 12, "--output", elsewhere
    table = run(capsys, "knn", checkpoint, *flags, "--pixels")
    assert table[2].endswith("     pixels  less mean") and "chance 50.0 %" in table[1]
    assert "12 queries against 11 images" in table[1]
    assert table[-1].endswith("(all 11 images)") and not table[-2].endswith(")")
    assert (elsewhere / "evaluate.jsonl").exists()
    assert not (checkpoint.parent / "evaluate.jsonl").exists()


COMMANDS = "knn linear logistic copies features oxford copydays davis masks".split()


@pytest.mark.parametrize("command", [*COMMANDS, "search a.png"])
def test_without_data_the_checkpoint_must_say_what_it_was_trained_on(checkpoint, command):
    command, *query = command.split()
    with pytest.raises(ValueError, match="does not say what it was trained on: give --data"):
        evaluate.main(evaluate.parse_args([command, str(checkpoint), *query, "--device", "cpu"]))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot write to .*: choose another --output"):
        run(capsys, "knn", checkpoint, "--data", "shapes")


def test_an_image_that_cannot_be_read_has_no_label_in_training(
    folder, checkpoint, capsys, monkeypatch
):
    (folder / "train" / "größe" / "torn.png").write_bytes(b"no image")
    seen = []

    def record(batches, *rest):
        seen.extend(chain.from_iterable(labels.tolist() for _, labels in batches))
        return train_classifiers([], *rest)

    monkeypatch.setattr(evaluate, "train_classifiers", record)
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
import contextlib, json, sys, evaluate
from evaluation import davis
from util.distributed import processes
davis.SHAPES_FILMS = 3
with processes("cpu") as joined:
    evaluate.processes = lambda name: contextlib.nullcontext(joined)
    for flags in json.loads(sys.argv[1]):
        evaluate.main(evaluate.parse_args(flags))
"""


def all_commands(checkpoint, folder, out, batch):
    """Every kind of work that processes share; search finds the features that knn has kept."""
    same = [checkpoint, "--data", folder, "--device", "cpu", "--output", out]
    reading = ["--workers", 0, "--batch", batch]
    train = ["--data", folder / "train", "--cache"]  # none of these is among the queries
    commands = [
        ["knn", *same, "--k", 3, 30, "--cache", *reading],
        ["knn", *same, "--k", 4, "--data", folder / "val", "--cache", *reading],
        ["masks", *same, "--size", 16],
        ["davis", *same, "--data", "shapes", "--size", 32, "--n_last_frames", 1],
        ["search", same[0], folder / "val" / "größe", *same[1:], *train, *reading],
        ["copies", *same, "--threshold", 0.99, *reading],
        ["linear", *same, "--epochs", 3, *reading],
        ["linear", *same, "--cached", "--epochs", 3, *reading],
    ]
    return [[str(flag) for flag in flags] for flags in commands]


def test_two_processes_print_what_one_prints(folder, checkpoint, tmp_path, capsys, monkeypatch):
    """13 images to vote or to train on, one of which cannot be read, and 11 to test.

    Two processes divide neither, nor three films.
    """
    monkeypatch.setattr(davis, "SHAPES_FILMS", 3)
    (folder / "val" / "größe" / "0.png").unlink()
    (folder / "train" / "größe" / "torn.png").write_bytes(b"no image")
    for path in folder.rglob("1.png"):
        with Image.open(path) as image:
            image = image.convert("RGBA")
            image.paste((0, 0, 0, 0), (0, 0, 12, 9))
            image.save(path)
    (tmp_path / "several.py").write_text(SEVERAL)
    commands = all_commands(checkpoint, folder, tmp_path / "two", batch=3)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += [str(tmp_path / "several.py"), json.dumps(commands)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(launch, env=environment, **pipes) as started:
        for flags in all_commands(checkpoint, folder, tmp_path / "one", batch=6):
            evaluate.main(evaluate.parse_args(flags))
        printed, complaints = started.communicate(timeout=600)
    assert started.returncode == 0, complaints
    alone = capsys.readouterr().out
    assert printed.replace(str(tmp_path / "two"), str(tmp_path / "one")) == alone
    assert "11 queries against 12 images" in alone and "11 queries against 10 images" in alone
    assert "left out" in alone
    texts = [(tmp_path / name / "evaluate.jsonl").read_text() for name in ("one", "two")]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for one, two in zip(*lines, strict=True):
        assert one.pop("seconds") >= 0 and two.pop("seconds") >= 0
        assert one.pop("loss", []) == pytest.approx(two.pop("loss", []), rel=1e-5)
        assert one == two
    assert len(lines[0]) == 8
