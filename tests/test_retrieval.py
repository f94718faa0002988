"""Search, near-duplicates, copy detection, features for other tools; what is kept of features."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from augment import normalize
from conftest import backbone_of, errors
from evaluation import features, retrieval
from evaluation.copydays import open_copydays, whitening
from evaluation.features import (
    Crops,
    Extraction,
    center_crop,
    extract_features,
    features_of,
    gem,
    made_by,
    shrink,
    square,
)
from evaluation.retrieval import near_duplicates
from util.data import Files, Folder
from util.images import read_image
from util.plot import shown
from util.shapes import Shapes

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
    torch.save(backbone_of("vit_micro", 8, 32).state_dict(), tmp_path / "bare.pth")
    return tmp_path


def run(place, capsys, command, *flags):
    """(the lines that evaluate.py prints, those on stderr but for the progress)."""
    given = [command, place / "bare.pth", *flags, "--output", place / "out"]
    if "--data" not in flags:
        given += ["--data", place / "album"]
    given += ["--workers", 0, "--device", "cpu"]
    evaluate.main(evaluate.parse_args([str(flag) for flag in given]))
    said = capsys.readouterr()
    return said.out.splitlines(), errors(said.err.splitlines())


# ---- the commands ----


def test_search_finds_the_nearest_but_not_the_query_itself(album, capsys):
    queries = album / "album" / "0.png", album / "album" / "holiday"
    lines, errors = run(album, capsys, "search", *queries, "--top", 3)
    assert lines[1] == str(queries[0]) and lines[2].split(maxsplit=1)[0] == "1.000"
    assert lines[2].endswith("z copy.png") and len(lines) == 1 + 5 * 4 + 1
    assert len(errors) == 1 and "1 of 10 images cannot be read, the first" in errors[0]
    assert "torn.png'" in errors[0]
    assert Image.open(album / "out" / "search.png").width > 400

    backbone = backbone_of("vit_micro", 8, 32).eval()
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


@pytest.fixture
def rows(monkeypatch):
    """What draw_panels is given, rather than its picture."""
    calls = []
    monkeypatch.setattr(retrieval, "draw_panels", lambda *drawn: calls.append(drawn))
    return calls


def test_what_is_found_has_its_name_and_a_frame_that_says_whether_its_folder_is_the_querys(
    album, capsys, rows
):
    """The query's folder is called as one in --data, wherever it lies; else there are no frames."""
    (album / "album" / "torn.png").unlink()
    (album / "elsewhere" / "holiday").mkdir(parents=True)
    query = album / "elsewhere" / "holiday" / "9.png"
    Image.open(album / "album" / "holiday" / "1.png").save(query)
    lines, _ = run(album, capsys, "search", query, album / "album" / "0.png", "--top", 8)
    (first, second), _, note = rows[0]
    assert "blue: in a folder named like the query's, orange: in another" in note
    assert [*first][:2] == ["query\n9.png", "1\n1.png\n1.000"] and "query\n0.png" in second
    found = [line.split(maxsplit=1) for line in lines[2:10]]
    blue, orange = [0, 0x72, 0xB2], [0xD5, 0x5E, 0]
    colors = []
    for n, (cosine, path) in enumerate(found, 1):
        panel = first[f"{n}\n{Path(path).name}\n{cosine}"]
        colors.append(panel[:, 0, 0].tolist())
        assert colors[-1] == (blue if "holiday" in path else orange)
        for edge in (panel[:, :6], panel[:, -6:], panel[:, :, :6], panel[:, :, -6:]):
            assert (edge.flatten(1).T == torch.tensor(colors[-1])).all()
        inside = shown(read_image(path))[:, 6:-6, 6:-6]
        assert torch.equal(panel[:, 6:-6, 6:-6], inside)
    assert blue in colors and orange in colors
    for title, panel in second.items():  # a query from no such folder
        assert panel[:, 0, 0].tolist() not in (blue, orange), title

    run(album, capsys, "search", album / "album" / "0.png")
    assert rows[1][2] == "the nearest images, by cosine"


def test_copies_are_drawn_with_their_names(album, capsys, rows):
    run(album, capsys, "copies", "--threshold", "0.99999")
    assert [*rows[0][0][0]] == ["1\n0.png", "2\nz copy.png"]


def test_links_to_the_query_are_the_query_and_take_no_ones_place(album, capsys):
    query = album / "album" / "0.png"
    (album / "album" / "symbolic.png").symlink_to("0.png")
    (album / "album" / "hard.png").hardlink_to(query)
    lines, _ = run(album, capsys, "search", query, "--top", 3)
    assert len(lines) == 1 + 4 + 1 and lines[2].endswith("z copy.png")
    assert not any(name in line for line in lines for name in ("symbolic.png", "hard.png"))


def test_copies_are_grouped(album, capsys):
    lines, _ = run(album, capsys, "copies", "--threshold", "0.99999")
    assert "2 of 9 images are in 1 groups linked by cosines of 1.000 or more" in lines[1]
    assert lines[2] == "group 1, 2 images, the least cosine of two of them 1.000"
    assert lines[3].endswith("0.png") and lines[4].endswith("z copy.png")
    lines, _ = run(album, capsys, "copies", "--threshold", "0.3")
    run(album, capsys, "features")
    saved = np.load(album / "out" / "features.npz")
    names = saved["names"].tolist()
    group = [names.index(Path(line.strip()).relative_to(album / "album").as_posix())
             for line in lines[3 : 3 + int(lines[2].split()[2])]]  # fmt: skip
    x = saved["features"][group]
    assert len(group) > 2 and lines[2].endswith(f"of two of them {(x @ x.T).min():.3f}")
    assert (album / "out" / "copies.png").exists()


def test_without_a_threshold_copies_made_here_say_how_near_copies_are(album, capsys):
    lines, _ = run(album, capsys, "copies")
    line = json.loads((album / "out" / "evaluate.jsonl").read_text())
    backbone = backbone_of("vit_micro", 8, 32).eval()
    backbone.load_state_dict(torch.load(album / "bare.pth"))
    images, cosines = Folder(album / "album"), []
    for i in range(10):
        if "torn" in images.paths[i]:
            continue
        image, file = images[i], io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10)
        copy = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        pair = torch.stack([image, copy])
        views = torch.stack([center_crop(one, 32) for one in pair])
        cosines.append(F.cosine_similarity(*backbone(normalize(views / 255)), 0).item())
    assert line["threshold"] == pytest.approx(np.quantile(cosines, 0.1), abs=1e-5)
    assert f"--threshold {line['threshold']:.3f}: so near are nine in ten copies" in lines[1]


def test_features_are_written_with_their_names(album, capsys):
    run(album, capsys, "features")
    saved = np.load(album / "out" / "features.npz")
    names = ["0.png", "2.png", "4.png", "6.png", "z copy.png"]
    names += [f"holiday/{i}.png" for i in (1, 3, 5, 7)]
    assert saved["names"].tolist() == names and saved["features"].shape == (9, 96)
    backbone = backbone_of("vit_micro", 8, 32).eval()
    backbone.load_state_dict(torch.load(album / "bare.pth"))
    crop = center_crop(Folder(album / "album")[0], 32)
    wanted = F.normalize(backbone(normalize(crop[None] / 255)), dim=-1)[0]
    torch.testing.assert_close(torch.from_numpy(saved["features"][0]), wanted)
    run(album, capsys, "features", "--file", album / "f")
    assert np.array_equal(np.load(album / "f")["features"], saved["features"])


def test_near_duplicates_are_the_connected_pairs(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", (1024, 700))
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


@pytest.fixture
def read_files(monkeypatch):
    """The names of the files that have been read for their features since the list was cleared."""
    read, real = [], Crops.__getitem__

    def spy(crops, key):
        read.append(crops.images.paths[crops.indices[key[1]]])
        return real(crops, key)

    monkeypatch.setattr(Crops, "__getitem__", spy)
    return read


def index(backbone, folder, how):
    """(the names of the images of a folder that can be read, their features)."""
    images = Folder(folder)
    x, read = extract_features(backbone, images, how)
    return [images.paths[i] for i in read], x


def test_only_new_and_changed_files_are_computed_again(album, read_files):
    backbone = backbone_of("vit_micro", 8, 32).eval()
    how = Extraction(CPU, cache=album)
    (album / "album" / "torn.png").unlink()
    names, first = index(backbone, album / "album", how)
    assert sorted(read_files) == sorted(names) and len(names) == 9
    read_files.clear()
    names_again, again = index(backbone, album / "album", how)
    assert not read_files and names_again == names and torch.equal(again, first)

    (album / "album" / "2.png").unlink()  # gone, new, and changed
    Image.new("RGB", (9, 9), "red").save(album / "album" / "new.png")
    Image.new("RGB", (9, 9), "blue").save(album / "album" / "4.png")
    os.utime(album / "album" / "6.png", (1, 1))
    names, after = index(backbone, album / "album", how)
    assert sorted(read_files) == ["4.png", "6.png", "new.png"] and "2.png" not in names
    (tidied,) = album.glob("features-*.pth")
    kept = [name for name, *_ in torch.load(tidied, weights_only=True)["files"]]
    assert sorted(kept) == sorted(str((album / "album" / name).resolve()) for name in names)
    fresh_names, fresh = index(backbone, album / "album", Extraction(CPU))
    assert fresh_names == names
    assert torch.allclose(fresh, after, atol=1e-6)
    others = backbone_of("vit_micro", 8, 32).eval(), backbone  # other weights, other settings
    for other, fit in zip(others, (center_crop, square)):
        read_files.clear()
        index(other, album / "album", Extraction(CPU, cache=album, fit=fit))
        assert sorted(read_files) == sorted(names)
    assert len(list(album.glob("features-*.pth"))) == 3


def test_the_commands_share_what_is_kept(album, read_files, capsys):
    """What the first command has computed, the others read."""
    run(album, capsys, "features", "--cache")
    read_files.clear()
    run(album, capsys, "search", album / "album" / "0.png", "--cache")
    lines, said = run(album, capsys, "copies", "--threshold", "0.99999", "--cache")
    assert set(read_files) == {"torn.png"} and "2 of 9 images are in 1 groups" in lines[1]
    assert "1 of 10 images cannot be read" in said[0]
    run(album, capsys, "search", album / "album" / "0.png")
    assert len(read_files) == 2 + 10  # without --cache nothing is kept or taken


def test_parts_of_a_folder_are_kept_side_by_side(album, read_files):
    """As a benchmark's queries and its database are, or its blocks of copies."""
    backbone, how = backbone_of("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    names = ["0.png", "2.png", "4.png"]
    for part in (names[:2], names[2:], names):
        extract_features(backbone, Files(album / "album", part), how)
    assert read_files == names


def test_what_is_done_when_it_is_stopped_is_kept(album, read_files, monkeypatch):
    monkeypatch.setattr(features, "KEEP_EVERY", 0)
    backbone = backbone_of("vit_micro", 8, 32).eval()
    how = Extraction(CPU, batch_size=4, cache=album)

    def stopped(*given):
        if len(read_files) > 4:
            raise KeyboardInterrupt
        return features_of(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "features_of", stopped)
        index(backbone, album / "album", how)
    first = read_files[:4]
    read_files.clear()
    names, x = index(backbone, album / "album", how)
    assert len(read_files) == 6 and not set(first) & set(read_files)
    assert not list(album.glob("*.tmp"))
    fresh_names, fresh = index(backbone, album / "album", Extraction(CPU))
    assert names == fresh_names and torch.allclose(x, fresh, atol=1e-6)


def test_a_cache_of_nothing_is_nothing(album):
    """No image can be read; later one can."""
    backbone, how = backbone_of("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    (album / "new").mkdir()
    (album / "new" / "a.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
            index(backbone, album / "new", how)
    assert not list(album.glob("features-*"))
    Image.new("RGB", (9, 9)).save(album / "new" / "a.png")
    assert index(backbone, album / "new", how)[0] == ["a.png"]


def test_an_image_that_is_mended_is_seen(album):
    """Of an image that could not be read nothing is kept under its name."""
    backbone, how = backbone_of("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    images = Folder(album / "album")
    assert len(extract_features(backbone, images, how)[1]) == 9
    Image.new("RGB", (9, 9)).save(album / "album" / "torn.png")
    for _ in range(2):
        assert len(extract_features(backbone, images, how)[1]) == 10
    other = backbone_of("vit_micro", 8, 32).eval()
    other.load_state_dict(backbone.state_dict())
    other.num_heads = 3  # the same weights, another network
    assert made_by(other, how) != made_by(backbone, how)


def test_our_own_pictures_are_no_images_of_the_folder(album, capsys):
    flags = "search {0}/bare.pth {0}/album/0.png --data {0}/album --output {0}/album --top 20"
    for _ in range(2):
        evaluate.main(evaluate.parse_args(flags.format(album).split()))
    found = capsys.readouterr().out.split("bare.pth: ")[-1].splitlines()
    assert (album / "album" / "search.png").exists()
    assert not any("search.png" in line for line in found[:-1])


# ---- bad input ----


@pytest.mark.parametrize("flags, message", [
    ("search nowhere.png", "there is no 'nowhere.png'"),
    ("search torn", "no image below 'torn' can be read"),
    ("features --file nowhere/a.npz", "--file nowhere/a.npz is there already, or its folder is"),
    ("features --file album/0.png", "--file album/0.png is there already"),
    ("copydays --size 9 --data shapes", "--size 9 must be divisible by the patch, 8"),
    ("copydays --data twice", "begin with the same four characters"),
    ("copydays --data copies --whitening one", "needs images whose features differ"),
    ("search album/torn.png", "cannot read 'album/torn.png'"),
    ("search empty", "no image below 'empty' can be read"),
    ("search album/0.png --data shapes", "'shapes' is no folder of images"),
    ("copies --data empty", "no images below 'empty'"),
    ("copies --data torn", "1 of 1 images cannot be read, the first 'torn/a.png'"),
    ("copies --data ours --output ours", "passed over 1 pictures of ours"),
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
    (album / "ours").mkdir()
    copies = "copies/original/0001 copies/strong/0009 " if "--whitening" not in flags else ""
    whole = "copies/original/0001 copies/strong/0001x " if "--whitening" in flags else ""
    others = "only/original/0001 twice/original/0001 twice/original/0001b one/a ours/copies"
    for name in (copies + whole + others).split():
        Image.new("RGB", (9, 9)).save(album / f"{name}.png")
    command, *others = flags.split()
    given = [command, "bare.pth", "--data", "album", "--workers", "0", "--device", "cpu", *others]
    if command == "search":
        given = [command, "bare.pth", others[0], "--data", "album", "--workers", "0", *others[1:]]
    with pytest.raises(ValueError) as error:
        evaluate.main(evaluate.parse_args(given))
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
    backbone = backbone_of("vit_micro", 8, 16).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    got = features_of(backbone, images, Extraction(CPU, gem=True))
    tokens = backbone.get_intermediate_layers(normalize(images / 255))[0]
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
    backbone = backbone_of("vit_micro", 8, 16).eval()
    how = Extraction(CPU, scales=(1.0, 0.5))
    one = normalize(image[None] / 255)
    half = F.interpolate(one, scale_factor=0.5, mode="bilinear")
    wanted = (backbone(one[:, :, :24, :48]) + backbone(half[:, :, :8, :24])) / 2
    assert torch.allclose(features_of(backbone, image[None], how), wanted, atol=1e-6)


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
    assert {name: numbers for name, (_, numbers) in blocks.items()} == {
        "crops/50": [1], "jpegqual/3": [0], "strong": [0, 0, 1]
    }  # fmt: skip
    flags = "--distractors", album / "album", "--whitening", album / "album", "--data", root
    lines, _ = run(album, capsys, "copydays", *flags)
    said = "\n".join(lines)
    assert "2 originals among 10 distractors" in said and "learned from 10 images" in said
    assert [row.split() for row in lines[-3:]] == [
        ["crops/50", "1", "100.0"], ["jpegqual/3", "1", "100.0"], ["strong", "3", "100.0"]
    ]  # fmt: skip
    (root / "strong").rename(root / "originals changed")
    assert open_copydays(root)[1]["originals changed"][1] == [0, 0, 1]


def test_a_file_name_that_is_not_utf8_is_kept(album, read_files):
    name = os.fsdecode(b"caf\xe9")
    (album / name).mkdir()
    Image.new("RGB", (9, 9)).save(album / name / f"{name}.png")
    backbone, how = backbone_of("vit_micro", 8, 32).eval(), Extraction(CPU, cache=album)
    for _ in range(2):
        assert index(backbone, album / name, how)[0] == [f"{name}.png"]
    assert read_files == [f"{name}.png"] == Folder(album / name).paths
