import json
import os
import subprocess
import sys
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate
from augment import center_crop, normalize
from data import Batches, Folder, Shapes, load
from evaluate import attention_masks, fit_heads, jaccard, knn, knn_of, nearest, open_splits, score, some
from features import Crops, features, represent
from train import Network
from vit import ARCHITECTURES, ViT, build_backbone, resnet50
from visualize import attention_maps, keep_mass

pytestmark = pytest.mark.usefixtures("several_blocks")

CPU = torch.device("cpu")


def loop(bank, bank_labels, queries, labels, k, leave_one_out=False):
    """Weighted k-NN, one query at a time, in float64."""
    right = 0
    for i, (query, label) in enumerate(zip(queries.double(), labels.tolist())):
        similar = [(torch.dot(query, b) / query.norm() / b.norm()).item() for b in bank.double()]
        order = sorted((j for j in range(len(bank)) if not (leave_one_out and i == j)), key=lambda j: -similar[j])[:k]
        votes = {}
        for j in order:
            votes[bank_labels[j].item()] = votes.get(bank_labels[j].item(), 0) + torch.tensor(similar[j] / 0.07).double().exp().item()
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
    alone = knn(bank, bank_labels, bank, bank_labels, (5,), leave_one_out=True)
    assert alone[5] == pytest.approx(loop(bank, bank_labels, bank, bank_labels, 5, leave_one_out=True))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 17, 60])
def test_ties_go_to_the_lower_index_and_the_lower_class(k):
    """Features of 16 equal entries but for signs: all similarities are exact, most are equal, and who is left out decides."""
    bank, queries = (torch.randint(2, (count, 16)).float()[:, :3].repeat(1, 6)[:, :16] * 2 - 1 for count in (60, 40))
    bank_labels, labels = torch.randint(4, (60,)), torch.randint(4, (40,))
    assert knn(bank, bank_labels, queries, labels, (k,))[k] == pytest.approx(loop(bank, bank_labels, queries, labels, k))
    assert knn(bank, bank_labels, bank, bank_labels, (k,), leave_one_out=True)[k] == pytest.approx(loop(bank, bank_labels, bank, bank_labels, k, True))


@pytest.mark.parametrize("n, k", [(1, 1), (10, 10), (10, 3), (1000, 7), (1003, 200), (997, 1)])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_the_nearest_are_those_of_a_whole_sort(n, k, levels):
    similarity = torch.randint(levels, (5, n)).float()
    value, index = nearest(similarity, k)
    whole = similarity.sort(dim=1, descending=True, stable=True)
    assert torch.equal(value, whole.values[:, :k]) and torch.equal(index, whole.indices[:, :k])


def test_knn_in_many_chunks_and_with_few_images(monkeypatch):
    bank, labels = torch.randn(2100, 4), torch.randint(3, (2100,))
    at_once = knn(bank, labels, bank, labels, (5,), leave_one_out=True)
    similarity = (F.normalize(bank) @ F.normalize(bank).T).fill_diagonal_(-2)
    weight, near = similarity.topk(5)
    votes = torch.zeros(2100, 3).scatter_add_(1, labels[near], (weight / 0.07).exp())
    assert at_once[5] == pytest.approx(100 * (votes.argmax(1) == labels).float().mean().item())
    assert knn(bank[:1], labels[:1], bank[:3], labels[:1].repeat(3), (5,)) == {5: 100.0}
    with pytest.raises(ValueError, match="one image has no neighbours"):
        knn(bank[:1], labels[:1], bank[:1], labels[:1], leave_one_out=True)


class Torn(Shapes):
    def __getitem__(self, i):
        if i == 3:
            raise OSError("torn")
        return super().__getitem__(i)


def test_features_skip_what_cannot_be_read(capsys):
    backbone = build_backbone("vit_micro", 8, 16).eval()
    tokens, read = features(backbone, Torn("val"), [1, 3, 5], CPU)
    whole, _ = features(backbone, Shapes("val"), [5, 1], CPU)
    assert read == [1, 5] and tokens.shape == (2, backbone.dim)
    torch.testing.assert_close(tokens, whole.flip(0))
    assert "1 images cannot be read and are left out, the first 'core 108 degrees from rim, 3'" in capsys.readouterr().err


def test_features_are_the_papers_tokens():
    images, backbone = Shapes("val"), build_backbone("vit_micro", 8, 16).eval()
    crop = normalize(center_crop(images[7], 16)[None] / 255)
    tokens = backbone.tokens(crop, 3)
    got, _ = features(backbone, images, [7], CPU, last=3, mean_patches=True)
    torch.testing.assert_close(got, torch.cat([tokens[0, :, 0], tokens[1, :, 0], tokens[2, :, 0], tokens[2, :, 1:].mean(1)], 1))
    torch.testing.assert_close(features(backbone, images, [7], CPU)[0], backbone(crop))
    bf16, _ = features(backbone, images, [7], CPU, dtype=torch.bfloat16)
    assert bf16.dtype == torch.float32 and 0 < (bf16 - backbone(crop)).abs().max() < 0.1
    convnet = resnet50(32).eval()
    torch.testing.assert_close(represent(convnet, images[7][None], CPU), convnet(normalize(images[7][None] / 255)))


def test_kept_features_are_read_only_for_the_same_question(tmp_path, monkeypatch):
    images, backbone = Shapes("val"), build_backbone("vit_micro", 8, 16).eval()
    extract = partial(features, device=CPU, cache=tmp_path)
    first, read = extract(backbone, images, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr("features.represent", None)  # nothing is computed
        again, read_again = extract(backbone, images, [1, 2])
    assert torch.equal(first, again) and read == read_again and len(list(tmp_path.iterdir())) == 1
    extract(backbone, images, [1, 3])
    extract(backbone, Shapes("train"), [1, 2])
    extract(backbone, images, [1, 2], last=2)
    with torch.no_grad():
        backbone.norm.bias += 1
    moved, _ = extract(backbone, images, [1, 2])
    torch.testing.assert_close(moved, first + 1)
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable checkpoint: cut short"):
        extract(backbone, images, [1, 2])


def test_a_part_of_the_images_has_every_class():
    labels = [i % 10 for i in range(10_000)]
    chosen = some(labels, 1000)
    assert len(set(chosen)) == 1000 and chosen == some(labels, 1000)
    assert min([labels[i] for i in chosen].count(c) for c in range(10)) > 70
    assert some([0, -1, 1], 5) == [0, 2]
    with pytest.raises(ValueError, match="no labelled images"):
        some([-1, -1])


def clusters(count, classes=6, dim=10):
    """Features that a line separates by construction."""
    labels = torch.arange(count) % classes
    return 3 * torch.eye(dim)[labels] + 0.2 * torch.randn(count, dim), labels


def steps(x, labels, batch=32, count=400):
    return ((x[n], labels[n]) for n in (torch.tensor([i for _, i in keys]) for keys in Batches(len(x), batch, last=count)))


def test_linear_separates_what_is_separable_and_learns_nothing_from_shuffled_labels():
    (x, labels), (held_out, truth) = clusters(300), clusters(600)
    rates = [0.01, 0.1, 0.5]
    top1, top5, loss = score(fit_heads(steps(x, labels), 400, rates, 6, 10, CPU), held_out, truth)
    assert top1.tolist() == top5.tolist() == [100, 100, 100] and loss.max() < 0.5 and loss[2] < loss[0]
    shuffled = labels[torch.randperm(300)]
    top1, top5, loss = score(fit_heads(steps(torch.randn(300, 10), shuffled), 400, rates, 6, 10, CPU), torch.randn(6000, 10), torch.arange(6000) % 6)
    assert (top1 - 100 / 6).abs().max() < 3 and (top5 - 500 / 6).abs().max() < 3


def test_each_head_is_the_one_trained_alone():
    x, labels = clusters(300)
    x, labels = x + torch.randn_like(x), labels.where(torch.rand(300) > 0.1, -1)  # hard, and some without a label
    rates = [0.003, 0.1, 0.7]
    together = fit_heads(steps(x, labels), 400, rates, 6, 10, CPU)
    for head, rate in zip(together, rates):
        weight = (0.01 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))).requires_grad_()
        bias = torch.zeros(6, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for batch, target in steps(x, labels):
            optimizer.zero_grad()
            (F.cross_entropy(batch @ weight.T + bias, target, ignore_index=-1, reduction="sum") / len(batch)).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(head, torch.cat([weight, bias[:, None]], 1).detach(), rtol=1e-5, atol=1e-5)


def test_scores_by_hand():
    heads = torch.zeros(2, 7, 8)
    heads[0, :, :7] = torch.eye(7)
    heads[1] = torch.nan
    x, labels = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]).repeat(4, 1), torch.tensor([0, 4, 5, 9])  # first, fifth, sixth, and a class without an output
    top1, top5, loss = score(heads, x, labels)
    assert top1.tolist()[0] == 25 and top5.tolist()[0] == 50
    assert loss[0].item() == pytest.approx(F.cross_entropy(x[:3], labels[:3]).item()) and loss[1].isnan() and top5[1] < 100


def test_random_crops_follow_from_seed_epoch_and_image():
    images = Shapes()
    crops, others = Crops(images, [4, 9], 16, seed=1), Crops(images, [9], 16, seed=1)
    n, crop = crops[0, 1]
    assert n == 1 and crop.shape == (3, 16, 16) and torch.equal(crop, others[0, 0][1])
    for other in (crops[1, 1], crops[0, 0], Crops(images, [4, 9], 16, seed=2)[0, 1], Crops(images, [4, 9], 16)[0, 1]):
        assert not torch.equal(crop, other[1])
    assert torch.equal(Crops(images, [4, 9], 16)[5, 1][1], center_crop(images[9], 16))
    assert Crops(Torn(), [3], 16, seed=1)[0, 0][0] == -1


def test_jaccard_by_hand():
    """60 % of each map's mass: of the even one three of four patches, the first three of those equal; of the other the two largest."""
    maps = torch.tensor([[[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.3], [0.1, 0.2]]])
    kept = keep_mass(maps, 0.6)
    assert kept.tolist() == [[[True, True], [True, False]], [[False, True], [False, True]]]
    numbers = torch.tensor([[1, 2], [1, 2]])
    objects = torch.stack([numbers == 1, numbers == 2, numbers == 3])
    none = torch.zeros(2, 2, dtype=torch.bool)
    torch.testing.assert_close(jaccard(kept, objects, none), torch.tensor([[2 / 3, 0], [1 / 4, 1]]))
    corner = torch.tensor([[False, False], [False, True]])
    torch.testing.assert_close(jaccard(kept, objects, corner), torch.tensor([[2 / 3, 0], [1 / 3, 1]]))
    torch.testing.assert_close(jaccard(kept, objects, numbers == 2), torch.tensor([[1.0, 0]]))  # the second object has no pixel left


class Fixed(torch.nn.Module):
    """A network whose two heads attend to given patches of 4 x 4."""

    patch = 4

    def __init__(self, maps):
        super().__init__()
        self.maps, self.blocks = maps, [torch.nn.Module()]
        self.blocks[0].attn = torch.nn.Module()
        self.blocks[0].attn.heads = 2

    def attention(self, images, rows=None):
        assert images.shape == (1, 3, 8, 8)
        rows = torch.cat([torch.zeros(2, 1), self.maps.flatten(1)], 1)
        return rows[None, :, None].expand(1, 2, 5, 5)


class Two:
    """An image with two objects, one without any, one that cannot be read."""

    def __init__(self, scale=1):
        self.scale = scale

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == 2:
            raise OSError
        return torch.zeros(3, 8 * self.scale, 8 * self.scale, dtype=torch.uint8)

    def mask(self, i):
        objects = torch.zeros(8, 8, dtype=torch.uint8)
        objects[:, :4], objects[:4, 4:], objects[0, 0] = 1, 2, 255
        return objects.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1) if i == 0 else None


@pytest.mark.parametrize("scale", [1, 3])
def test_masks_by_hand(scale):
    maps = torch.tensor([[[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.3], [0.1, 0.2]]])
    means, objects, images = attention_masks([Fixed(maps), Fixed(maps.flip(0))], Two(scale), CPU, 8)
    # the first head keeps 47 pixels, one is void: object 1 has 31 of them, object 2 has 16; the second keeps 32, with none and 16
    first, second = [31 / 47, 16 / 47], [0, 16 / 32]
    expected = torch.tensor([[first[0] + second[1], sum(first), sum(second)], [first[0] + second[1], sum(second), sum(first)]]) * 50
    torch.testing.assert_close(means.float(), expected, rtol=0, atol=1 if scale > 1 else 1e-4)  # resizing blurs the one void pixel
    assert (objects, images) == (2, 1)


def test_masks_of_a_real_network_on_images_that_the_patch_does_not_divide():
    class Odd(Shapes):
        def __getitem__(self, i):
            return super().__getitem__(i)[:, :51, :37]

        def mask(self, i):
            return super().mask(i)[:51, :37]

    backbone = build_backbone("vit_micro", 8, 16).eval()
    means, objects, images = attention_masks([backbone], Odd("val", 6), CPU, 37)
    assert means.shape == (1, 5) and 0 < means[0, 1:].max() <= means[0, 0] < 100 and images == 6 and objects == 6
    one = Shapes("val", 1)
    image, kept = normalize(one[0][None] / 255), []
    for head in attention_maps(backbone, image)[0]:
        kept.append(np.kron(keep_mass(head).numpy(), np.ones((8, 8))) > 0)
    truth, best = one.mask(0).numpy(), []
    for number in range(1, truth.max() + 1):
        best.append(max((k & (truth == number)).sum() / (k | (truth == number)).sum() for k in kept))
    assert attention_masks([backbone], one, CPU, 64)[0][0, 0].item() == pytest.approx(100 * np.mean(best), rel=1e-5)


def test_where_objects_are(folder, tmp_path, monkeypatch):
    pixels = np.zeros((6, 4, 4), np.uint8)
    pixels[:2, :, 3], pixels[2, :, 3] = 255, 127
    Image.fromarray(pixels, "RGBA").save(tmp_path / "object.png")
    Image.fromarray(np.full((6, 4, 4), 255, np.uint8), "RGBA").save(tmp_path / "opaque.png")
    alpha = Folder(tmp_path)
    masks = {alpha.name(i).split("/")[-1]: alpha.mask(i) for i in range(len(alpha)) if "images" not in alpha.name(i)}
    assert masks["opaque.png"] is None and masks["object.png"].tolist() == [[1] * 4] * 2 + [[0] * 4] * 4
    whole = Folder(folder / "train")
    assert all(whole.mask(i) is None for i in range(len(whole)))

    voc = tmp_path / "hub" / ".." / "datasets" / "VOCdevkit" / "VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationObject"):
        (voc / name).mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("a\n")
    (voc / "ImageSets/Segmentation/train.txt").write_text("")
    Image.new("RGB", (8, 6)).save(voc / "JPEGImages/a.jpg")
    numbers = Image.new("P", (8, 6))
    numbers.putpalette([i % 256 for i in range(768)])
    numbers.paste(2, (0, 0, 4, 6))
    numbers.paste(255, (4, 0, 5, 6))
    numbers.save(voc / "SegmentationObject/a.png")
    numbers.point(lambda number: 7 * (number > 0)).save(voc / "SegmentationClass/a.png")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    images = load("voc2012", "val")
    assert images.labels is None and images.classes is None and images[0].shape == (3, 6, 8)
    assert images.mask(0)[0].tolist() == [2, 2, 2, 2, 255, 0, 0, 0]


def test_classes_are_matched_by_name_and_unseen_ones_noted(folder, capsys):
    (folder / "val" / "größe").rename(folder / "val" / "a new one")
    train_images, val = open_splits(str(folder))
    assert train_images.classes == ["cats and dogs", "größe"] and "note: the training split lacks 'a new one'" in capsys.readouterr().out
    assert [name.split("/")[-2] for name in map(val.name, range(12))] == ["a new one"] * 6 + ["cats and dogs"] * 6 and val.labels == [2] * 6 + [0] * 6
    backbone = build_backbone("vit_micro", 8, 16).eval()
    top1, sizes = knn_of(backbone, train_images, val, partial(features, device=CPU), (1,))
    assert top1[1] <= 50 and sizes == (12, 12)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    torch.manual_seed(1)
    backbone = build_backbone("vit_micro", 8, 16)
    torch.save({"teacher": Network(backbone, torch.nn.Identity()).state_dict(), "args": {}}, tmp_path / "run" / "last.pth")
    return tmp_path / "run" / "last.pth"


def run(capsys, *flags):
    evaluate.main(evaluate.parse_args([*map(str, flags), "--device", "cpu", "--workers", "0"]))
    return capsys.readouterr().out.splitlines()


def test_each_protocol_prints_a_table_and_adds_a_line(folder, checkpoint, capsys):
    table = run(capsys, "knn", checkpoint, "--data", folder / "train", "--k", 3, 50, "--cache")
    assert "12 queries against 12 images" in table[1] and table[-1].endswith("(all 12 images)") and len(list(checkpoint.parent.glob("features-*"))) == 4
    table = run(capsys, "linear", checkpoint, "--data", folder, "--epochs", 2, "--lr", 0.1, 0.01, "--batch", 5)
    assert "random crops" in table[1] and [line.split()[0] for line in table[3:5]] == ["0.1", "0.01"] and len(table[3].split()) == 4
    table = run(capsys, "linear", checkpoint, "--data", folder, "--epochs", 2, "--lr", 0.1, "--cached", "--last", 1, "--mean_patches")
    assert "not the paper's protocol" in table[1] and "mean patch token" in table[1] and len(table[3].split()) == 5
    saved = torch.load(checkpoint.parent / "linear.pth", weights_only=True)
    assert saved["weight"].shape == (2, 128) and saved["bias"].shape == (2,) and saved["classes"] == ["cats and dogs", "größe"]
    table = run(capsys, "masks", checkpoint, "--data", "shapes", "--size", 16, "--no-untrained")
    assert table[-1].split()[0] == "trained" and len(table[-1].split()) == 6
    lines = [json.loads(line) for line in (checkpoint.parent / "evaluate.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines] == ["knn", "linear", "linear", "masks"]
    assert all(line["checkpoint"] == str(checkpoint) and line["seconds"] >= 0 for line in lines)
    assert lines[0]["top1"].keys() == {"3", "50"} and len(lines[1]["top5"]) == 2 and lines[2]["cached"] and lines[3]["best_head"] > 0


def test_without_a_held_out_split_each_image_meets_the_others(folder, checkpoint, tmp_path, capsys):
    table = run(capsys, "knn", checkpoint, "--data", folder / "val", "--k", 11, 12, "--output", tmp_path / "elsewhere")
    assert "12 queries against 11 images" in table[1] and table[-1].endswith("(all 11 images)") and not table[-2].endswith(")")
    assert (tmp_path / "elsewhere" / "evaluate.jsonl").exists() and not (checkpoint.parent / "evaluate.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot write to .*: choose another --output"):
        run(capsys, "knn", checkpoint, "--data", "shapes")


def test_an_image_that_cannot_be_read_has_no_label_in_training(folder, checkpoint, capsys, monkeypatch):
    (folder / "train" / "größe" / "torn.png").write_bytes(b"no image")
    seen = []
    monkeypatch.setattr(evaluate, "fit_heads", lambda batches, *rest: seen.extend(chain.from_iterable(labels.tolist() for _, labels in batches)) or fit_heads([], *rest))
    run(capsys, "linear", checkpoint, "--data", folder, "--epochs", 2, "--batch", 13)
    assert sorted(seen) == [-1] * 2 + [0] * 12 + [1] * 12


@pytest.mark.parametrize("dim, depth, expected", [(24, 3, "1 block, mean patch token;"), (24, 5, "4 blocks;"), (768, 4, "1 block, mean patch token;")])
def test_the_probes_features_are_the_papers_for_vit_s_or_vit_b(folder, tmp_path, capsys, dim, depth, expected):
    torch.save(ViT(8, dim, depth, max(1, dim // 64), 16).state_dict(), tmp_path / "bare.pth")
    table = run(capsys, "linear", tmp_path / "bare.pth", "--data", folder, "--epochs", 1, "--lr", 0.1, "--cached", "--no-untrained", "--batch", 4)
    assert f"class tokens of the last {expected}" in table[1]


SEVERAL = """
import functools, json, sys, evaluate, vit
vit.ARCHITECTURES.update(json.loads(sys.argv[2]))
evaluate.join, destroy, evaluate.dist.destroy_process_group = functools.cache(evaluate.join), evaluate.dist.destroy_process_group, lambda: None
for flags in json.loads(sys.argv[1]):
    evaluate.main(evaluate.parse_args(flags))
destroy()
"""


def test_two_processes_print_what_one_prints(folder, checkpoint, tmp_path, capsys):
    """13 images to vote or to train on, one of which cannot be read, and 11 to test: two processes divide neither."""
    (folder / "val" / "größe" / "0.png").unlink()
    (folder / "train" / "größe" / "torn.png").write_bytes(b"no image")
    for path in folder.rglob("1.png"):
        with Image.open(path) as image:
            image = image.convert("RGBA")
            image.paste((0, 0, 0, 0), (0, 0, 12, 9))
            image.save(path)
    same = ["--data", str(folder), "--device", "cpu", "--workers", "0", "--output", str(tmp_path / "out")]
    commands = (["knn", "--k", "3", "30", "--cache"], ["knn", "--k", "4", "--data", str(folder / "val"), "--cache"], ["masks", "--size", "16"],
                ["linear", "--epochs", "3"], ["linear", "--cached", "--epochs", "3"])  # fmt: skip
    commands = [[first, str(checkpoint), *same, *flags, "--batch", "6"] for first, *flags in commands]
    for flags in commands:
        evaluate.main(evaluate.parse_args(flags))
    alone = capsys.readouterr().out
    for path in (tmp_path / "out").glob("features-*"):
        path.unlink()
    (tmp_path / "several.py").write_text(SEVERAL)
    commands = [[*flags[:-1], "3"] for flags in commands]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "several.py"), json.dumps(commands), json.dumps(ARCHITECTURES)]
    result = subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout == alone and "left out" in alone and "11 queries against 12 images" in alone and "11 queries against 10 images" in alone
    lines = [json.loads(line) for line in (tmp_path / "out" / "evaluate.jsonl").read_text().splitlines()]
    for one, two in zip(lines[:5], lines[5:], strict=True):
        assert one.pop("seconds") >= 0 and two.pop("seconds") >= 0
        assert one.pop("loss", []) == pytest.approx(two.pop("loss", []), rel=1e-5)
        assert one == two
