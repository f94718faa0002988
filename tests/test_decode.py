"""One image file, whatever is in it beside the pixels."""

import struct
import zlib
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from augment import MultiCrop, random_box, resize
from data import Folder, are_constant, reduced
from decode import divisor, read_image, suffixes
from features import Crops, center_crop


def picture():
    return Image.effect_noise((30, 20), 80).convert("RGB")


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_png_with_huge_text_or_a_large_profile_is_its_pixels(tmp_path):
    image = picture()
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    image.save(tmp_path / "text.png", pnginfo=text)
    image.save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(70_000_000)))
    (tmp_path / "profile.png").write_bytes(plain[:33] + profile + plain[33:])
    odd = chunk(b"tEXt", b"no end") + chunk(b"pHYs", b"x") + chunk(b"gAMA", b"")
    (tmp_path / "odd.png").write_bytes(plain[:33] + odd + plain[33:])
    for name in ("text", "profile", "odd"):
        assert torch.equal(read_image(tmp_path / f"{name}.png"), pixels(image)), name


def test_a_jpeg_with_odd_exif_is_its_pixels_and_is_turned(tmp_path):
    image = picture()
    image.save(tmp_path / "plain.jpg")
    # two fields: the orientation, 6, and a resolution that points beyond the end
    fields = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 5, 1, 9999)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + fields + struct.pack("<I", 0)
    image.save(tmp_path / "odd.jpg", exif=exif)
    image.save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff rubbish")
    expected = read_image(tmp_path / "plain.jpg")
    assert torch.equal(read_image(tmp_path / "broken.jpg"), expected)
    assert torch.equal(read_image(tmp_path / "odd.jpg"), expected.rot90(-1, (1, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_puts_the_image_upright(tmp_path, orientation):
    corners = torch.zeros(3, 16, 24, dtype=torch.uint8)
    corners[0, :8, :12], corners[1, :8, 12:], corners[2, 8:, :12] = 255, 255, 255
    stored = {
        1: corners,
        2: corners.flip(2),
        3: corners.flip((1, 2)),
        4: corners.flip(1),
        5: corners.transpose(1, 2),
        6: corners.rot90(1, (1, 2)),
        7: corners.transpose(1, 2).flip((1, 2)),
        8: corners.rot90(-1, (1, 2)),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored.permute(1, 2, 0).numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png"), corners)


def gray(path, values):
    Image.fromarray(values).save(path)
    return read_image(path)[0].numpy().astype(int)


def test_deep_images_are_scaled_by_the_rule(tmp_path):
    ramp = np.linspace(0, 0.9, 600, dtype=np.float32).reshape(20, 30)
    got = gray(tmp_path / "unit.tif", ramp)
    assert abs(got - 255 * ramp).max() <= 1
    got = gray(tmp_path / "float.tif", 50 + 10 * ramp)
    assert got.min() == 0 and got.max() == 255 and len(np.unique(got)) > 200
    twelve_bits = np.arange(600, dtype=np.uint16).reshape(20, 30) * 6
    got = gray(tmp_path / "twelve.tif", twelve_bits)
    assert got.min() == 0 and got.max() == 255 and len(np.unique(got)) > 200
    got = gray(tmp_path / "sixteen.png", twelve_bits)
    assert abs(got - twelve_bits / 257).max() <= 1
    got = gray(tmp_path / "int.tif", twelve_bits.astype(np.int32) - 900)
    assert got.min() == 0 and got.max() == 255
    ramp[3, 4] = np.nan
    assert gray(tmp_path / "nan.tif", ramp)[3, 4] == 0


def test_all_that_this_pillow_decodes_is_read(tmp_path):
    assert {".jpg", ".jfif", ".jpe", ".tga", ".png", ".webp", ".tiff"} <= suffixes()
    assert not {".pdf", ".mpg", ".h5", ".txt", ".mp4"} & suffixes()
    names = ["a.jfif", "b.jpe", "c.tga", "D.PNG"]
    names += ["e.avif"] if features.check("avif") else []
    names += ["f.jp2"] if features.check("jpg_2000") else []
    for name in names:
        picture().save(tmp_path / name)
    images = Folder(tmp_path)
    assert sorted(images.paths) == sorted(names) and images.note is None
    assert all(images[i].shape == (3, 20, 30) for i in range(len(images)))


def test_images_of_one_colour_throughout_are_noticed(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert are_constant(Folder(tmp_path))
    picture().save(tmp_path / "3.png")
    assert not are_constant(Folder(tmp_path))


def smooth_jpeg(path, height, width, **how):
    """Write a JPEG of soft random colours."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 40, width // 40, 3))
    image = Image.fromarray(noise.astype(np.uint8))
    image.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95, **how)


def test_a_jpeg_is_decoded_smaller_but_never_below_what_is_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    smooth_jpeg(tmp_path / "a.jpg", 400, 600, exif=exif)
    full = read_image(tmp_path / "a.jpg")
    assert full.shape == (3, 600, 400)
    root = 240_000**0.5
    for least, part in [((400, root), 1), ((200.5, 1), 1), ((200, 1), 2), ((100, 100), 4),
                        ((1, root / 8), 8), ((1, root / 3.9), 2), ((50, 1), 8)]:  # fmt: skip
        image = read_image(tmp_path / "a.jpg", least)
        assert image.shape == (3, 600 // part, 400 // part), least
        means = torch.nn.functional.avg_pool2d(full.float(), part)
        assert (image - means).abs().mean() < 1.5, least
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (1, 1)).shape == (3, 400, 600)


def test_crops_of_a_jpeg_decoded_smaller_are_those_of_the_whole(tmp_path):
    smooth_jpeg(tmp_path / "a.jpg", 1500, 2000)
    crop = MultiCrop()
    whole, small = read_image(tmp_path / "a.jpg"), read_image(tmp_path / "a.jpg", crop.least)
    assert small.shape == (3, 750, 1000)
    for top, left, height, width in [(0, 0, 1500, 2000), (400, 1000, 600, 500), (900, 2, 388, 388)]:
        full = resize(whole[:, top : top + height, left : left + width], 96, 96)
        top, left, height, width = (side // 2 for side in (top, left, height, width))
        half = resize(small[:, top : top + height, left : left + width], 96, 96)
        assert (full.float() - half).abs().mean() < 1.5


SIZES = {(375, 500): 1, (3000, 4000): 4, (300, 4000): 1, (900, 6000): 4, (8000, 9000): 8}


@pytest.mark.parametrize("sides, by", SIZES.items())
def test_no_crop_is_enlarged_for_it(sides, by):
    crop, rng = MultiCrop(), Random(0)
    assert divisor(*sides, crop.least) == by
    height, width = (-(-side // by) for side in sides)
    for view in crop.views:
        for _ in range(500):
            _, _, h, w = random_box(height, width, view.scale, rng)
            if by > 1:
                assert min(h, w) >= view.size


def test_a_folder_decodes_smaller_for_those_who_ask_alone(tmp_path):
    smooth_jpeg(tmp_path / "a.jpg", 800, 1000)
    images = Folder(tmp_path)
    assert reduced(images, (100, 100))[0].shape == (3, 100, 125)
    assert images[0].shape == (3, 800, 1000)
    crops = Crops(images, [0], 80)  # 800 is more than 4 x 2 x 91
    assert crops.images[0].shape == (3, 200, 250)
    _, crop = crops[0, 0]
    assert (crop.float() - center_crop(images[0], 80)).abs().mean() < 1.5


def test_random_crops_for_the_probe_are_reduced_too_and_twice_as_large(tmp_path):
    smooth_jpeg(tmp_path / "a.jpg", 800, 1000)
    crops = Crops(Folder(tmp_path), [0], 20, seed=0)
    assert crops.images[0].shape == (3, 200, 250)  # 894 is more than 4 x 2 x 20 / 0.245
