"""Search, near-duplicates, copy detection, features for other tools; what is kept of features."""

import io
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import index
import retrieve
from augment import normalize
from backbone import build_backbone
from copydays import Copies, blur, crop, grey, jpeg, open_copydays, whitening
from data import Folder
from features import (
    Extraction,
    center_crop,
    extract,
    gem,
    made_by,
    represent,
    shrink,
    square,
)
from index import index_folder
from retrieve import near_duplicates
from shapes import Shapes

CPU = torch.device("cpu")


@pytest.fixture
def album(tmp_path):
    """Nine photographs, the last a copy of the first, one file that is no image; a checkpoint."""
    (tmp_path / "album" / "holiday").mkdir(parents=True)
    for i in range(8):
        place = tmp_path / "album" / ("holiday" if i % 2 else ".") / f"{i}.png"
        Image.fromarray(Shapes("val")[i].permute(1, 2, 0).numpy()).save(place)
    Image.open(tmp_path / "album" / "0.png").save(tmp_path / "album" / "z copy.png")
    (tmp_path / "album" / "torn.png").write_bytes(b"no image")
    torch.save(build_backbone("vit_micro", 8, 32).state_dict(), tmp_path / "bare.pth")
    return tmp_path


def run(place, capsys, protocol, *flags):
    """(the lines that retrieve.py prints, those on stderr)."""
    flags = [str(flag) for flag in flags]
    same = ["--data", str(place / "album"), "--output", str(place / "out")]
    given = [protocol, str(place / "bare.pth"), *flags, *same, "--workers", "0", "--device", "cpu"]
    retrieve.main(retrieve.parse_args(given))
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if not line.startswith("features ")]
    return said.out.splitlines(), errors


# ---- the commands ----


def test_search_finds_the_nearest_but_not_the_query_itself(album, capsys):
    queries = album / "album" / "0.png", album / "album" / "holiday"
    lines, errors = run(album, capsys, "search", *queries, "--top", 3)
    assert lines[1] == str(queries[0]) and lines[2].split(maxsplit=1)[0] == "1.000"
    assert lines[2].endswith("z copy.png") and len(lines) == 1 + 5 * 4 + 1
    assert len(errors) == 1 and "1 of 10 images cannot be read, the first" in errors[0]
    assert "torn.png'" in errors[0]
    assert Image.open(album / "out" / "search.png").width > 400

    backbone = build_backbone("vit_micro", 8, 32).eval()
    backbone.load_state_dict(torch.load(album / "bare.pth"))
    files = [path for path in (album / "album").rglob("*.png") if path.name != "torn.png"]
    query, by_hand = None, []
    for path in files:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        token = backbone(normalize(center_crop(pixels, 32)[None] / 255))[0].detach().double()
        if path == queries[0]:
            query = token
        by_hand.append((token, str(path)))
    cosines = {path: F.cosine_similarity(token, query, 0).item() for token, path in by_hand}
    del cosines[str(queries[0])]
    best = sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert [line.split(maxsplit=1)[1] for line in lines[2:5]] == best


def test_copies_are_grouped(album, capsys):
    lines, _ = run(album, capsys, "copies", "--threshold", "0.99999")
    assert "2 of 9 images are in 1 groups" in lines[1] and lines[2] == "group 1, 2 images"
    assert lines[3].endswith("0.png") and lines[4].endswith("z copy.png")
    assert (album / "out" / "copies.png").exists()


def test_without_a_threshold_copies_made_here_say_how_near_copies_are(album, capsys):
    lines, _ = run(album, capsys, "copies")
    line = json.loads((album / "out" / "evaluate.jsonl").read_text())
    backbone = build_backbone("vit_micro", 8, 32).eval()
    backbone.load_state_dict(torch.load(album / "bare.pth"))
    images, cosines = Folder(album / "album"), []
    for i in range(10):
        if "torn" in images.paths[i]:
            continue
        image = images[i]
        pair = torch.stack([image, Copies([image], jpeg)[0]])
        views = torch.stack([center_crop(one, 32) for one in pair])
        cosines.append(F.cosine_similarity(*backbone(normalize(views / 255)), 0).item())
    assert line["threshold"] == pytest.approx(np.quantile(cosines, 0.1), abs=1e-5)
    assert f"have a cosine of {line['threshold']:.3f} or more; so have" in lines[1]


def test_features_in_both_formats(album, capsys):
    run(album, capsys, "features")
    saved = torch.load(album / "out" / "features.pth", weights_only=True)
    names = ["0.png", "2.png", "4.png", "6.png", "z copy.png"]
    names += [f"holiday/{i}.png" for i in (1, 3, 5, 7)]
    assert saved["names"] == names and saved["features"].shape == (9, 96)
    assert saved["checkpoint"] == str(album / "bare.pth") and saved["size"] == 32
    run(album, capsys, "features", "--file", album / "f.npy")
    assert np.array_equal(np.load(album / "f.npy"), saved["features"].numpy())
    assert (album / "f.txt").read_text().splitlines() == names
    assert json.loads((album / "f.json").read_text())["kind"] == saved["kind"]


def test_near_duplicates_are_the_connected_pairs(monkeypatch):
    monkeypatch.setattr(retrieve, "BLOCK", (1024, 700))
    x = F.normalize(torch.randn(2500, 8), dim=-1)
    x[[3, 2400, 1200]] = x[7] + 0.001 * torch.randn(3, 8)
    x[1500] = x[20]
    x = F.normalize(x, dim=-1)
    near = (x @ x.T >= 0.97).tolist()
    unseen, groups = set(range(2500)), []
    while unseen:
        group, edge = set(), [min(unseen)]
        while edge:
            i = edge.pop()
            if i in unseen:
                unseen.discard(i)
                group.add(i)
                edge += [j for j, is_near in enumerate(near[i]) if is_near]
        if len(group) > 1:
            groups.append(sorted(group))
    got = near_duplicates(x, 0.97)
    assert sorted(got) == sorted(groups) and len(groups) > 2
    assert [len(group) for group in got] == sorted(map(len, groups), reverse=True)
    assert near_duplicates(x[:5].abs(), 1.1) == []


# ---- what is kept ----


def count_computed(monkeypatch):
    computed = []
    real = index.compute

    def spy(backbone, images, indices, *rest):
        computed.append([images.paths[i] for i in indices])
        return real(backbone, images, indices, *rest)

    monkeypatch.setattr(index, "compute", spy)
    return computed


def test_only_new_and_changed_files_are_computed_again(album, monkeypatch):
    computed = count_computed(monkeypatch)
    backbone = build_backbone("vit_micro", 8, 32).eval()
    how = Extraction(CPU, cache=album)
    (album / "album" / "torn.png").unlink()
    first = index_folder(backbone, album / "album", how)
    again = index_folder(backbone, album / "album", how)
    assert len(computed) == 1 and len(computed[0]) == 9
    assert again.names == first.names and torch.equal(again.features, first.features)

    (album / "album" / "2.png").unlink()  # gone, new, and changed
    Image.new("RGB", (9, 9), "red").save(album / "album" / "new.png")
    Image.new("RGB", (9, 9), "blue").save(album / "album" / "4.png")
    after = index_folder(backbone, album / "album", how)
    assert sorted(computed[1]) == ["4.png", "new.png"] and "2.png" not in after.names
    (tidied,) = album.glob("index-*.pth")
    assert sorted(torch.load(tidied)["names"]) == sorted(after.names)
    fresh = index_folder(backbone, album / "album", Extraction(CPU))
    assert fresh.names == after.names
    assert torch.allclose(fresh.features, after.features, atol=1e-6)
    index_folder(build_backbone("vit_micro", 8, 32).eval(), album / "album", how)
    assert len(computed) == 4 and len(computed[3]) == 9  # other weights
    index_folder(backbone, album / "album", Extraction(CPU, cache=album, fit=square))
    assert len(computed) == 5


def test_what_is_done_when_it_is_stopped_is_kept(album, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 4)
    monkeypatch.setattr(index, "KEEP_EVERY", 0)
    backbone, how = build_backbone("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    computed, real = [], index.compute

    def stopped(backbone, images, indices, *rest):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(indices)
        return real(backbone, images, indices, *rest)

    monkeypatch.setattr(index, "compute", stopped)
    with pytest.raises(KeyboardInterrupt):
        index_folder(backbone, album / "album", how)
    monkeypatch.setattr(index, "compute", real)
    again = count_computed(monkeypatch)
    index_folder(backbone, album / "album", how)
    assert sum(map(len, again)) == 6 and not list(album.glob("*.tmp"))


def test_a_cache_of_nothing_is_nothing(album):
    """No image can be read; later one can."""
    backbone, how = build_backbone("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    (album / "new").mkdir()
    (album / "new" / "a.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
            index_folder(backbone, album / "new", how)
    Image.new("RGB", (9, 9)).save(album / "new" / "a.png")
    assert index_folder(backbone, album / "new", how).names == ["a.png"]


def test_an_image_that_is_mended_is_seen(album):
    """Features of images of which one could not be read are not kept under their names."""
    backbone, how = build_backbone("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    images = Folder(album / "album")
    assert len(extract(backbone, images, list(range(10)), how)[1]) == 9
    Image.new("RGB", (9, 9)).save(album / "album" / "torn.png")
    for _ in range(2):
        assert len(extract(backbone, images, list(range(10)), how)[1]) == 10
    other = build_backbone("vit_micro", 8, 32).eval()
    other.load_state_dict(backbone.state_dict())
    other.heads = 3  # the same weights, another network
    assert made_by(other, how) != made_by(backbone, how)


def test_our_own_pictures_are_no_images_of_the_folder(album, capsys):
    flags = "search {0}/bare.pth {0}/album/0.png --data {0}/album --output {0}/album --top 20"
    for _ in range(2):
        retrieve.main(retrieve.parse_args(flags.format(album).split()))
    found = capsys.readouterr().out.split("bare.pth: ")[-1].splitlines()
    assert (album / "album" / "search.png").exists()
    assert not any("search.png" in line for line in found[:-1])


# ---- bad input ----


@pytest.mark.parametrize("flags, message", [
    ("search nowhere.png", "cannot read 'nowhere.png'"),
    ("search torn", "none of the queries can be read"),
    ("features --file nowhere/a.npy", "there is no such folder"),
    ("copydays --size 9 --data shapes", "--size 9 must be divisible by the patch, 8"),
    ("copydays --data twice", "begin with the same four characters"),
    ("copydays --data copies --whitening one", "needs images whose features differ"),
    ("search album/torn.png", "cannot read 'album/torn.png'"),
    ("search empty", "no images below 'empty'"),
    ("search album/0.png --top 0", "--top 0 must be positive"),
    ("search album/0.png --data shapes", "--data shapes is no folder of images"),
    ("copies --data empty", "no images below 'empty'"),
    ("copies --data torn", "1 of 1 images cannot be read, the first 'torn/a.png'"),
    ("copies --threshold 1.5", "--threshold 1.5 must lie in"),
    ("features --file a.csv", "--file a.csv: its name must end in .pth or .npy"),
    ("features --workers -1", "--workers -1 must not be negative"),
    ("oxford", "cannot read the ground truth"),
    ("copydays --distractors empty", "no images below 'empty'"),
    ("copydays --data copies", "'copies/strong/0009.png' is a copy of no image in original/"),
    ("copydays --data only", "'only' holds originals, but no copies"),
])  # fmt: skip
def test_bad_input_is_one_line(album, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(album)
    for name in "empty torn one copies/original copies/strong only/original twice/original".split():
        (album / name).mkdir(parents=True)
    (album / "torn" / "a.png").write_bytes(b"no image")
    copies = "copies/original/0001 copies/strong/0009 " if "--whitening" not in flags else ""
    whole = "copies/original/0001 copies/strong/0001x " if "--whitening" in flags else ""
    others = "only/original/0001 twice/original/0001 twice/original/0001b one/a"
    for name in (copies + whole + others).split():
        Image.new("RGB", (9, 9)).save(album / f"{name}.png")
    protocol, *others = flags.split()
    given = [protocol, "bare.pth", "--data", "album", "--workers", "0", "--device", "cpu", *others]
    if protocol == "search":
        given = [protocol, "bare.pth", others[0], "--data", "album", "--workers", "0", *others[1:]]
    with pytest.raises(ValueError) as error:
        retrieve.main(retrieve.parse_args(given))
    assert message in str(error.value)
    assert not list(album.glob("*.jsonl"))


def test_a_folder_of_one_image(album, capsys):
    (album / "album").rename(album / "old")
    (album / "album").mkdir()
    (album / "old" / "0.png").rename(album / "album" / "0.png")
    lines, _ = run(album, capsys, "search", album / "album" / "0.png")
    assert lines[1:] == [str(album / "album" / "0.png"), f"-> {album / 'out' / 'search.png'}"]
    lines, _ = run(album, capsys, "copies")
    assert "0 of 1 images are in 0 groups" in lines[2]


# ---- copy detection ----


def test_gem_is_the_fourth_root_of_the_mean_fourth_power():
    tokens = torch.randn(2, 5, 3, dtype=torch.double)
    for b in range(2):
        for d in range(3):
            values = [max(value, 1e-6) ** 4 for value in tokens[b, :, d].tolist()]
            assert gem(tokens)[b, d].item() == pytest.approx((sum(values) / 5) ** 0.25, abs=1e-12)
    backbone = build_backbone("vit_micro", 8, 16).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    got = represent(backbone, images, Extraction(CPU, gem=True))
    tokens = backbone.tokens(normalize(images / 255))[0]
    assert torch.allclose(got, torch.cat([tokens[:, 0], gem(tokens[:, 1:])], 1), atol=1e-6)


def test_whitened_features_have_the_identity_as_covariance():
    x = torch.randn(2000, 6, dtype=torch.double) @ torch.randn(6, 6, dtype=torch.double) + 3
    white = whitening(x)(x).double()
    covariance = torch.cov(white.T, correction=0)
    assert (covariance - torch.eye(6)).abs().max() < 1e-3 and white.mean(0).abs().max() < 1e-4
    value, vector = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    wanted = (x.numpy() - x.numpy().mean(0)) @ vector / np.sqrt(value)
    assert np.abs(np.abs(white.numpy()) - np.abs(wanted)).max() < 1e-4  # up to signs
    few = whitening(x[:3])(x)
    assert few.isfinite().all()  # eigenvalues of 0 are floored


def test_fits_and_scales():
    image = torch.randint(256, (3, 30, 50), dtype=torch.uint8)
    assert square(image, 16).shape == (3, 16, 16)
    assert shrink(image, 25).shape == (3, 15, 25) and torch.equal(shrink(image, 99), image)
    backbone = build_backbone("vit_micro", 8, 16).eval()
    how = Extraction(CPU, scales=(1.0, 0.5))
    one = normalize(image[None] / 255)
    half = F.interpolate(one, scale_factor=0.5, mode="bilinear")
    wanted = (backbone(one[:, :, :24, :48]) + backbone(half[:, :, :8, :24])) / 2
    assert torch.allclose(represent(backbone, image[None], how), wanted, atol=1e-6)
    strip = torch.randint(256, (1, 3, 1, 50), dtype=torch.uint8)  # below a patch
    assert represent(backbone, strip, how).isfinite().all()


def test_copies_made_here_are_copies():
    shapes = Shapes("val", 3)
    for change in (crop, jpeg, blur, grey):
        copies = Copies(shapes, change)
        assert len(copies) == 3 and copies[1].dtype == torch.uint8
        assert torch.equal(copies[1], copies[1]) and change.__name__ in copies.name(1)
    side = Copies(shapes, crop)[0].shape[1]
    assert 0.45 < side**2 / 64**2 < 0.55
    assert torch.equal(*Copies(shapes, grey)[0][:2])
    file = io.BytesIO()
    Image.fromarray(shapes[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10)
    assert (Copies(shapes, jpeg)[0].float() - shapes[0].float()).abs().mean() > 5


def test_copydays_is_read_by_its_names(album, capsys, tmp_path):
    root = tmp_path / "copydays"
    for name in ("original/200000", "original/200100"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 90).convert("RGB").save(root / f"{name}.jpg")
    copies = "strong/200001 strong/200101 strong/200002 crops/50/200101 jpegqual/3/200001".split()
    for name in copies:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        original = f"{name.split('/')[-1][:4]}00"
        Image.open(root / "original" / f"{original}.jpg").save(root / f"{name}.jpg")
    _, blocks = open_copydays(root)
    assert {name: block.originals for name, block in blocks.items()} == {
        "crops/50": [1], "jpegqual/3": [0], "strong": [0, 0, 1]
    }  # fmt: skip
    flags = "--distractors", album / "album", "--whitening", album / "album", "--data", root
    same = ["--output", str(album / "out"), "--workers", "0", "--device", "cpu"]
    line = ["copydays", str(album / "bare.pth"), *map(str, flags), *same]
    retrieve.main(retrieve.parse_args(line))
    said = capsys.readouterr().out
    assert "2 originals among 10 distractors" in said and "learned from 10 images" in said
    assert [row.split() for row in said.splitlines()[-3:]] == [
        ["crops/50", "1", "100.0"], ["jpegqual/3", "1", "100.0"], ["strong", "3", "100.0"]
    ]  # fmt: skip


def test_copies_of_shapes_beside_untrained_and_raw_pixels(album, capsys, monkeypatch):
    monkeypatch.setattr("copydays.MADE", 40)
    run(album, capsys, "copydays", "--data", "shapes")
    line = json.loads((album / "out" / "evaluate.jsonl").read_text())
    assert line["raw pixels"].keys() == {"crop", "jpeg", "blur", "grey"}
    assert line["raw pixels"]["jpeg"] > 90 and 0 < line["untrained"]["crop"] <= 100


def test_a_file_name_that_is_not_utf8_is_kept(album):
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (9, 9)).save(album / "album" / name)
    backbone, how = build_backbone("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    for _ in range(2):
        assert name in index_folder(backbone, album / "album", how).names
    assert name in Folder(album / "album").paths
