"""Attention as masks against numbers by hand and a plain rewriting; what masks in files mean."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from augment import normalize
from conftest import backbone_of
from evaluation import masks
from evaluation.features import attention_maps, keep_mass
from evaluation.masks import (
    attention_masks,
    fit_objects,
    jaccard,
    load_with_masks,
    read_mask,
    resize_mask,
    voc_palette,
    write_mask,
)
from util.data import Folder, load
from util.shapes import Shapes

pytestmark = pytest.mark.usefixtures("several_blocks")

CPU = torch.device("cpu")
NUMBERS = torch.tensor([[0, 1, 1, 7], [0, 0, 255, 7]], dtype=torch.uint8)


# ---- attention ----


def test_maps_are_the_class_tokens_softmax_in_float64():
    backbone, images = backbone_of("vit_micro", 8, 32).eval(), torch.randn(2, 3, 24, 40)
    got = attention_maps(backbone, images)
    backbone.double()
    x = backbone.prepare_tokens(images.double())
    for block in backbone.blocks[:-1]:
        x = block(x)
    last = backbone.blocks[-1]
    q, k, _ = last.attn.qkv(last.norm1(x)).chunk(3, -1)
    for b in range(2):
        for head in range(4):
            part = slice(16 * head, 16 * head + 16)
            weights = (k[b, :, part] @ q[b, 0, part] / 16**0.5).softmax(0)
            expected = weights[1:].view(3, 5)
            assert (got[b, head] - expected).abs().max() < 1e-5 * weights.max()


def test_the_mask_keeps_the_fewest_patches_with_the_mass():
    maps = torch.tensor([[0.05, 0.4, 0.05], [0.1, 0.3, 0.1]])
    assert keep_mass(maps, 0.6).tolist() == [[False, True, False], [False, True, False]]
    assert keep_mass(maps, 0.75).sum() == 3
    assert keep_mass(torch.stack([maps, maps.flip(0)]), 1.0).all()
    assert keep_mass(torch.full((2, 5), 0.1), 0.6).sum() == 6  # ties
    assert keep_mass(torch.tensor([[0.5, 0.25, 0.25, 0.0]]), 0.5).sum() == 1  # to the digit
    maps = torch.rand(50, 6, 7)
    kept, wanted = keep_mass(maps), 0.6 * maps.sum((1, 2))
    inside = (maps * kept).sum((1, 2))
    smallest = maps.where(kept, 2.0).amin((1, 2))
    assert (inside >= wanted).all() and (inside - smallest < wanted).all()


def test_jaccard_by_hand():
    """60 % of each map's mass.

    Of the even map that is three of four patches, the first three of those equal; of the other the
    two largest.
    """
    maps = torch.tensor([[[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.3], [0.1, 0.2]]])
    kept = keep_mass(maps, 0.6)
    assert kept.tolist() == [[[True, True], [True, False]], [[False, True], [False, True]]]
    numbers = torch.tensor([[1, 2], [1, 2]])
    objects = torch.stack([numbers == 1, numbers == 2, numbers == 3])
    none = torch.zeros(2, 2, dtype=torch.bool)
    close = torch.testing.assert_close
    close(jaccard(kept, objects, none), torch.tensor([[2 / 3, 0], [1 / 4, 1]]))
    corner = torch.tensor([[False, False], [False, True]])
    close(jaccard(kept, objects, corner), torch.tensor([[2 / 3, 0], [1 / 3, 1]]))
    # the second object has no pixel left
    close(jaccard(kept, objects, numbers == 2), torch.tensor([[1.0, 0]]))


class Fixed(torch.nn.Module):
    """A network whose two heads attend to given patches of 4 x 4."""

    patch_size, num_heads = 4, 2

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def get_last_selfattention(self, images, queries=None):
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

    def name(self, i):
        return str(i)

    def mask(self, i):
        if i != 0:
            return None
        objects = torch.zeros(8, 8, dtype=torch.uint8)
        objects[:, :4], objects[:4, 4:], objects[0, 0] = 1, 2, 255
        return objects.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1)


@pytest.mark.parametrize("scale", [1, 3])
def test_masks_by_hand(scale):
    """The first head keeps 47 pixels, one is void: object 1 has 31 of them, object 2 has 16.

    The second keeps 32, with none and 16.
    """
    maps = torch.tensor([[[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.3], [0.1, 0.2]]])
    networks = [Fixed(maps), Fixed(maps.flip(0))]
    sums, counts = attention_masks(networks, Two(scale), CPU, 8)
    first, second = [31 / 47, 16 / 47], [0, 16 / 32]
    best = first[0] + second[1]
    expected = [[best, sum(first), sum(second)], [best, sum(second), sum(first)]]
    tolerance = 0.02 if scale > 1 else 2e-6  # resizing blurs the one void pixel
    close = torch.testing.assert_close
    close(sums[0].float(), torch.tensor(expected), rtol=0, atol=tolerance)
    assert counts.tolist() == [2, 0, 0] and not sums[1:].any()


class Odd(Shapes):
    """Images whose sides the patch does not divide."""

    def __getitem__(self, i):
        return super().__getitem__(i)[:, :51, :37]

    def mask(self, i):
        return super().mask(i)[:51, :37]


def test_masks_of_a_real_network_on_images_that_the_patch_does_not_divide():
    backbone = backbone_of("vit_micro", 8, 16).eval()
    sums, counts = attention_masks([backbone], Odd("val", 6), CPU, 37)
    means = 100 * sums.sum(0) / counts.sum()
    assert means.shape == (1, 5) and 0 < means[0, 1:].max() <= means[0, 0] < 100
    assert (counts > 0).sum() == 6 and counts.sum() == 6
    one = Shapes("val", 1)
    image, kept = normalize(one[0][None] / 255), []
    for head in attention_maps(backbone, image)[0]:
        kept.append(np.kron(keep_mass(head).numpy(), np.ones((8, 8))) > 0)
    truth, best = one.mask(0).numpy(), []
    for number in range(1, truth.max() + 1):
        found = truth == number
        best.append(max((k & found).sum() / (k | found).sum() for k in kept))
    sums, counts = attention_masks([backbone], one, CPU, 64)
    assert (sums[0, 0, 0] / counts[0]).item() == pytest.approx(np.mean(best), rel=1e-5)


# ---- mask files ----


def test_a_palette_png_keeps_its_numbers_and_its_palette(tmp_path):
    palette = [0, 0, 0, 9, 8, 7]
    write_mask(tmp_path / "a.png", NUMBERS, palette + voc_palette()[6:])
    mask, colors = read_mask(tmp_path / "a.png")
    assert torch.equal(mask, NUMBERS) and colors[:6] == palette
    first = [voc_palette()[3 * i : 3 * i + 3] for i in (0, 1, 2, 3, 20, 255)]
    known = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128], [224, 224, 192]]
    assert first == known


@pytest.mark.parametrize("mode, values, expected", [
    ("L", [0, 1, 3, 1], [0, 1, 3, 1]),
    ("L", [0, 50, 200, 50], [0, 50, 200, 50]),
    ("L", [0, 1, 255, 1], [0, 1, 255, 1]),  # 255 beside others is void
    ("L", [0, 255, 255, 0], [0, 1, 1, 0]),  # but alone it is the object
    ("1", [0, 255, 255, 0], [0, 1, 1, 0]),
    ("P", [0, 255, 0, 0], [0, 255, 0, 0]),  # in a palette image 255 is void
    ("L", [0, 0, 0, 0], [0, 0, 0, 0]),
])  # fmt: skip
def test_what_gray_values_mean(tmp_path, mode, values, expected):
    image = Image.fromarray(np.array([values], np.uint8))
    if mode == "P":
        image.putpalette(voc_palette())
    image.convert(mode).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png")[0].tolist() == [expected]


def test_what_is_no_mask_is_said(tmp_path):
    ramp, soft = range(0, 256, 5), [0, 64, 191, 255]
    for name, values in (("ramp.png", ramp), ("soft.png", soft), ("lossy.jpg", [0, 255] * 8)):
        row = np.array([values], np.uint8)
        Image.fromarray(row.repeat(9, 0).repeat(3, 1)).save(tmp_path / name, quality=50)
        with pytest.raises(ValueError, match="its gray values may be brightness"):
            read_mask(tmp_path / name)
    white_first = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    white_first.save(tmp_path / "white.png")
    for mode in ("RGB", "RGBA", "LA", "I;16"):  # the object may be in alpha
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
        with pytest.raises(ValueError, match="neither a palette image nor a gray one"):
            read_mask(tmp_path / f"{mode}.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    for name, message in (("white", "color 0 of its palette"), ("c", "cannot read the mask")):
        with pytest.raises(ValueError, match=message):
            read_mask(tmp_path / f"{name}.png")


def test_a_mask_is_resized_as_pillow_does_it():
    mask = torch.randint(256, (13, 17), dtype=torch.uint8)
    for size in ((7, 5), (40, 31), (13, 34)):
        wanted = Image.fromarray(mask.numpy()).resize(size[::-1], Image.NEAREST)
        assert torch.equal(resize_mask(mask, *size), torch.from_numpy(np.array(wanted)))


# ---- the images that masks belong to ----


def test_alpha_channels_say_where_objects_are(folder, tmp_path):
    pixels = np.zeros((6, 4, 4), np.uint8)
    pixels[:2, :, 3], pixels[2, :, 3] = 255, 127
    (tmp_path / "alpha").mkdir()
    Image.fromarray(pixels, "RGBA").save(tmp_path / "alpha" / "object.png")
    opaque = np.full((6, 4, 4), 255, np.uint8)
    Image.fromarray(opaque, "RGBA").save(tmp_path / "alpha" / "opaque.png")
    alpha = Folder(tmp_path / "alpha")
    assert alpha.paths == ["object.png", "opaque.png"]
    assert alpha.mask(0).tolist() == [[1] * 4] * 2 + [[0] * 4] * 4 and alpha.mask(1) is None
    whole = Folder(folder / "train")
    assert all(whole.mask(i) is None for i in range(len(whole)))


def test_vocs_objects_are_read_with_their_numbers(tmp_path, monkeypatch):
    voc = tmp_path / "hub" / ".." / "datasets" / "VOCdevkit" / "VOC2012"
    folders = ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationObject")
    for name in folders:
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


def voc(root, objects=True):
    """Two photographs with masks and one without, in Pascal VOC's layout."""
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / name).mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.effect_noise((40, 32), 90).convert("RGB").save(root / "JPEGImages" / f"{name}.jpg")
    mask = torch.zeros(32, 40, dtype=torch.uint8)
    mask[4:20, 5:15], mask[4:20, 20:30], mask[4:20, 30:32] = 1, 2, 255
    for name in ("a", "b"):
        write_mask(root / "SegmentationClass" / f"{name}.png", (mask > 0).byte(), voc_palette())
        if objects:
            write_mask(root / "SegmentationObject" / f"{name}.png", mask, voc_palette())
    if not objects:
        (root / "SegmentationObject").rmdir()
    return mask


def test_a_folder_like_vocs(tmp_path):
    mask = voc(tmp_path / "VOC2007")
    images = load_with_masks(tmp_path / "VOC2007")
    assert images.paths == ["a.jpg", "b.jpg"] and torch.equal(images.mask(1), mask)
    assert len(load(str(tmp_path / "VOC2007"))) == 3  # to train on: photographs, no masks
    listed = tmp_path / "VOC2007" / "ImageSets" / "Segmentation"
    listed.mkdir(parents=True)
    (listed / "val.txt").write_text("b\nc\n")
    assert load_with_masks(tmp_path / "VOC2007").paths == ["b.jpg"]
    voc(tmp_path / "part", objects=False)
    assert load_with_masks(tmp_path / "part").mask(0).unique().tolist() == [0, 1]


def test_masks_of_the_same_names_in_another_folder_of_another_size(tmp_path):
    for name, size in (("x/1.jpg", (40, 30)), ("x/2.png", (40, 30)), ("3.png", (40, 30))):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "images" / name)
    (tmp_path / "masks" / "x").mkdir(parents=True)
    box = Image.new("1", (20, 15))
    box.paste(1, (5, 5, 10, 10))
    box.save(tmp_path / "masks" / "x" / "1.png")
    images = load_with_masks(tmp_path / "images", tmp_path / "masks")
    assert images.paths == ["x/1.jpg"]
    _, objects, _ = fit_objects(images[0], images.mask(0), 30, 5)
    wanted = torch.zeros(1, 30, 40, dtype=torch.bool)
    wanted[0, 10:20, 10:20] = True
    assert torch.equal(objects, wanted)
    (tmp_path / "others").mkdir()
    box.save(tmp_path / "others" / "1.png")
    with pytest.raises(ValueError, match="no image below .*images' has a mask in .*others'"):
        load_with_masks(tmp_path / "images", tmp_path / "others")


def test_a_mask_of_another_shape_is_an_error_and_one_turned_like_its_image_is_none(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 32), 90).convert("RGB").save(tmp_path / "images/a.jpg", exif=exif)
    mask = Image.new("L", (40, 32))
    mask.paste(1, (0, 0, 20, 10))
    mask.save(tmp_path / "masks" / "a.png")
    images = load_with_masks(tmp_path / "images", tmp_path / "masks")
    wanted = torch.zeros(40, 32, dtype=torch.uint8)
    wanted[:20, 22:] = 1
    assert images[0].shape[1:] == wanted.shape and torch.equal(images.mask(0), wanted)
    mask.crop((0, 0, 32, 32)).save(tmp_path / "masks" / "a.png")
    backbone = backbone_of("vit_micro", 8, 16)
    with pytest.raises(ValueError, match="a.jpg': it is of 32 x 40 pixels, its mask of 32 x 32"):
        masks.attention_masks([backbone], images, CPU, 32)


# ---- the command ----


def test_a_folder_like_vocs_is_measured(tmp_path, capsys):
    voc(tmp_path / "VOC2007")
    torch.save(backbone_of("vit_micro", 8, 16).state_dict(), tmp_path / "bare.pth")
    flags = "--data", tmp_path / "VOC2007", "--output", tmp_path / "out", "--device", "cpu"
    evaluate.main(evaluate.parse_args(["masks", *map(str, [tmp_path / "bare.pth", *flags])]))
    assert "4 objects in 2 images" in capsys.readouterr().out
    line = json.loads((tmp_path / "out" / "evaluate.jsonl").read_text())
    assert (line["command"], line["objects"], line["images"]) == ("masks", 4, 2)
    assert len(line["trained"]) == len(line["untrained"]) == 5  # the best head, then each


def test_the_table_has_the_means_over_the_objects(monkeypatch, capsys):
    """Not over the images, and of each network a row."""
    sums = torch.tensor([[[1.5, 1.0, 0.5]], [[0.0] * 3], [[0.6, 0.2, 0.6]]], dtype=torch.double)
    counts = torch.tensor([3, 0, 1])
    monkeypatch.setattr(masks, "attention_masks", lambda *args: (sums, counts))
    monkeypatch.setattr(masks, "load_with_masks", lambda data, masks: Shapes("val", 3))
    backbone = backbone_of("vit_micro", 8, 16)
    backbone.num_heads = 2
    subject = SimpleNamespace(backbone=backbone, data="shapes", device=CPU, rank=0, world=1,
                              networks=lambda beside: {"trained": backbone})  # fmt: skip
    args = SimpleNamespace(masks=None, size=64, mass=0.6, untrained=False, output_dir=None)
    figures = masks.evaluate(args, subject)
    assert figures["trained"] == pytest.approx([52.5, 30, 27.5])
    assert (figures["objects"], figures["images"]) == (4, 2)
    first, second, header, row = capsys.readouterr().out.splitlines()
    assert first.startswith("1 of 3 images show no object") and "4 objects in 2 images" in second
    assert header.split() == ["best", "head", "head", "1", "head", "2"]
    assert row.split() == ["trained", "52.5", "30.0", "27.5"]
