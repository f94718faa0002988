"""Multi-crop against torchvision, operation by operation; its distributions are the paper's."""

import colorsys
from itertools import compress, permutations, product
from random import Random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import augment
from augment import MultiCrop, View, draw_photometry, photometry, random_box, resize
from evaluation.features import center_crop

TOLERANCE = 2 / 255


def images(b=6, h=40, w=36):
    """Blurry noise, with saturated, gray and black parts."""
    x = torch.rand(b, 3, 5, 5) * 1.6 - 0.3
    x = torch.nn.functional.interpolate(x, (h, w), mode="bicubic").clamp(0, 1)
    x[0, :, 9:18], x[-1, :, :9] = x[0, :, 9:18].mean(0), 0
    return (x * 255).round() / 255


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(32, 32), (13, 57), (96, 96)])
def test_resize_is_torchvisions(shape):
    image = (images(1)[0] * 255).byte()
    expected = tv.resize(image, shape, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    close(resize(image, *shape) / 255, expected / 255)


def test_resize_to_the_same_size_is_the_identity():
    image = torch.randint(256, (3, 37, 53), dtype=torch.uint8)
    assert torch.equal(resize(image, 37, 53), image)


@pytest.mark.parametrize(
    "position, name", list(enumerate(["brightness", "contrast", "saturation", "hue"]))
)
def test_each_jitter_is_torchvisions(position, name):
    x = images()
    values = [0.6, 0.8, 1.0, 1.1, 1.3, 1.4]
    if name == "hue":
        values = [-0.1, -0.05, 0, 0.02, 0.07, 0.1]
    factors = [np.ones(6), np.ones(6), np.ones(6), np.zeros(6)]
    factors[position] = np.array(values)
    theirs = getattr(tv, f"adjust_{name}")
    expected = torch.stack([theirs(one, value) for one, value in zip(x, values)])
    close(augment.color_jitter(x, *factors, np.zeros(6)), expected)


def test_hue_turns_as_in_the_standard_librarys_hsv():
    """Grays, pure colors and ties among them, up to a sixth of a turn either way."""
    levels = [0, 0.25, 0.3, 0.75, 1]
    colors = torch.tensor(list(product(levels, repeat=3)))
    for shift in (-1 / 6, -0.1, 0.03, 1 / 6):
        hsv = [colorsys.rgb_to_hsv(*color) for color in colors.tolist()]
        expected = torch.tensor([colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv])
        got = augment.adjust_hue(colors.T[None, :, None], np.array([shift]))[0, :, 0].T
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_without_jitter_not_a_bit_changes():
    drawn = draws(lambda rng: draw_photometry(View(8, (0.4, 1.0), 0.5, 0.0), 2.0, rng)[1:6], 50)
    *factors, order = np.array(drawn).T
    plain, x = torch.from_numpy(order < 0), images(50)
    jittered = augment.color_jitter(x.clone(), *factors, order)
    assert 0 < plain.sum() < 25 and set(order[plain]) == {-1}
    assert (jittered[plain] == x[plain]).all()
    assert (jittered[~plain] != x[~plain]).flatten(1).any(1).all()


def test_jitter_follows_each_samples_order():
    x = images(24)
    bounds = (0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)
    factors = [torch.empty(24).uniform_(*pair).numpy() for pair in bounds]
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    expected, orders = [], set()
    for i, one in enumerate(x):
        *order, hue_turn = augment.ORDERS[i].tolist()
        order.insert(hue_turn, 3)
        orders.add(tuple(order))
        for operation in order:
            one = functions[operation](one, factors[operation][i].item())
        expected.append(one)
    assert orders == set(permutations(range(4)))
    close(augment.color_jitter(x, *factors, np.arange(24.0)), torch.stack(expected))


def test_blur_is_torchvisions():
    x, sigma = images(), torch.tensor([0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
    expected = torch.stack(
        [tv.gaussian_blur(one, [13, 13], [s, s]) for one, s in zip(x, sigma.tolist())]
    )
    close(augment.gaussian_blur(x, sigma.numpy()), expected)


def test_gray_solarize_flip_and_normalisation_are_torchvisions():
    crops = (images(4) * 255).byte()
    drawn = np.array([[0, 0.7, 1.4, 1.2, 0.1, -1, 0, 0, 0]] * 4)
    drawn[0, 6] = drawn[1, 8] = drawn[2, 0] = 1
    expected = [tv.rgb_to_grayscale(crops[0], 3), tv.solarize(crops[1], 128)]
    expected = torch.stack([*expected, tv.horizontal_flip(crops[2]), crops[3]]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    views = augment.apply_drawn(crops, *drawn.T)
    close(views * std[:, None, None] + mean[:, None, None], expected)


def test_photometry_treats_each_view_of_each_image_by_itself():
    """Also where a CPU takes them in parts."""
    crops = (images(8, 224, 224) * 255).byte().unflatten(0, (4, 2))
    views = View(224, (0.4, 1.0), blur=1.0, solarize=0.0), View(224, (0.4, 1.0), 0.1, 0.5)
    drawn = draws(lambda rng: [draw_photometry(view, 2.0, rng) for view in views], 4)
    drawn = torch.tensor(drawn)
    got = photometry(crops, drawn)
    assert got.shape == (2, 4, 3, 224, 224) and got.dtype == torch.float32
    for b, v in product(range(4), range(2)):
        expected = augment.apply_drawn(crops[b, v][None], *drawn[b, v, :, None].numpy())[0]
        torch.testing.assert_close(got[v, b], expected, rtol=0, atol=1e-5)


def test_the_recipe_is_the_papers():
    """Section 3.2 names BYOL's; the strengths are the reference code's."""
    common = dict(flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    large = common | dict(gray=0.2, size=224, scale=(0.4, 1.0))
    small = common | dict(gray=0.2, size=96, scale=(0.05, 0.4))
    first, second = large | dict(blur=1.0, solarize=0.0), large | dict(blur=0.1, solarize=0.2)
    crop = MultiCrop()
    expected = [first, second] + [small | dict(blur=0.5, solarize=0.0)] * 8
    assert [view._asdict() for view in crop.views] == expected and crop.blur_sigma == 2.0


def draws(function, n=2000):
    return [function(Random(i)) for i in range(n)]


def uniform(values, low, high):
    """Kolmogorov-Smirnov: the largest distance to the uniform distribution, at about p = 0.001."""
    values = sorted((value - low) / (high - low) for value in values)
    n = len(values)
    return (
        max(max((i + 1) / n - value, value - i / n) for i, value in enumerate(values))
        < 1.95 / n**0.5
    )


def rate(values, p):
    return abs(sum(values) / len(values) - p) <= 3.3 * (p * (1 - p) / len(values)) ** 0.5


def test_boxes_follow_torchvisions_distribution():
    for scale in ((0.05, 0.4), (0.4, 1.0)):
        boxes = draws(lambda rng: random_box(300, 400, scale, rng))
        assert all(0 <= top <= 300 - h and 0 <= left <= 400 - w for top, left, h, w in boxes)
        crop = v2.RandomResizedCrop(8, scale=scale)
        theirs = [crop.make_params([torch.empty(3, 300, 400)]) for _ in boxes]
        for ours, other in (
            ([h * w for _, _, h, w in boxes], [p["height"] * p["width"] for p in theirs]),
            ([w / h for _, _, h, w in boxes], [p["width"] / p["height"] for p in theirs]),
            ([top for top, *_ in boxes], [p["top"] for p in theirs]),
            ([left for _, left, *_ in boxes], [p["left"] for p in theirs]),
        ):
            both = torch.tensor(sorted(ours)), torch.tensor(sorted(other))
            grid = torch.cat(both).sort().values
            below = [torch.searchsorted(values, grid, right=True) / len(values) for values in both]
            assert (below[0] - below[1]).abs().max() < 1.95 * (2 / len(boxes)) ** 0.5
    assert uniform(
        [
            h * w / 120_000
            for _, _, h, w in draws(lambda rng: random_box(300, 400, (0.05, 0.4), rng))
        ],
        0.05,
        0.4,
    )


def test_a_view_has_its_own_scale_range():
    """Where red is the column and green is the row, a crop tells where it was cut."""
    ramp = torch.arange(256, dtype=torch.uint8)
    image = torch.stack(
        [
            ramp.expand(256, 256),
            ramp[:, None].expand(256, 256),
            torch.zeros(256, 256, dtype=torch.uint8),
        ]
    )
    crop, area = MultiCrop(64, 64), {"global": [], "local": []}
    for i in range(100):
        (big, drawn), (small, drawn_small) = crop(image, Random(i))
        assert big.shape == (2, 3, 64, 64) and small.shape == (8, 3, 64, 64)
        assert big.dtype == small.dtype == torch.uint8
        assert drawn.shape == (2, 9) and drawn_small.shape == (8, 9)
        assert drawn.dtype == drawn_small.dtype == torch.float32
        for name, views in (("global", big), ("local", small)):
            for view in views.float():
                row, column = view[1, :, 0], view[0, 0]
                area[name].append(
                    (row[-1] - row[0]).abs().item()
                    * (column[-1] - column[0]).abs().item()
                    * (64 / 63 / 256) ** 2
                )
    assert 0.35 < min(area["global"]) < 0.47 and 0.9 < max(area["global"]) < 1.04
    assert 0.04 < min(area["local"]) < 0.07 and 0.36 < max(area["local"]) < 0.42
    assert uniform(area["local"], 0.05, 0.4)


def test_photometry_is_drawn_as_in_the_paper():
    view = View(224, (0.4, 1.0), blur=0.5, solarize=0.2)
    flip, *factors, order, gray, sigma, solarize = zip(
        *draws(lambda rng: draw_photometry(view, 2.0, rng))
    )
    assert rate(flip, 0.5)
    jittered = [number >= 0 for number in order]
    assert rate(jittered, 0.8)
    for values, bounds in zip(factors, [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert uniform(list(compress(values, jittered)), *bounds)
    assert set(order) == set(range(-1, 24))
    assert rate(gray, 0.2) and rate([value > 0 for value in sigma], 0.5) and rate(solarize, 0.2)
    assert uniform([value for value in sigma if value], 0.1, 2.0)


def drawn_for(crop, image, rng):
    """What was drawn for all views of an image, [v, 9]."""
    return torch.cat([drawn for _, drawn in crop(image, rng)])


def test_each_view_has_its_own_rates():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    crop = MultiCrop(8, 8, 2)
    drawn = torch.stack(draws(lambda rng: drawn_for(crop, image, rng), 1000))
    blurred, solarized = drawn[..., 7] > 0, drawn[..., 8] > 0
    for view, (blur, solarize) in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)]):
        assert rate(blurred[:, view].tolist(), blur) and rate(solarized[:, view].tolist(), solarize)


def test_views_are_independent_and_follow_from_the_generator():
    image = (images(1)[0] * 255).byte()
    first, again, other = (sum(MultiCrop(16, 16, 2)(image, Random(i)), ()) for i in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again)) and not (first[0] == other[0]).all()
    crop = MultiCrop(8, 8, 2)
    gray = torch.stack(draws(lambda rng: drawn_for(crop, image, rng)[:, 6]))
    correlation = torch.corrcoef(gray.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.09


def test_without_local_crops_there_are_global_ones_alone():
    (crops, drawn), *rest = MultiCrop(16, 8, 0)(torch.zeros(3, 20, 20).byte(), Random(0))
    assert crops.shape == (2, 3, 16, 16) and drawn.shape == (2, 9) and not rest


def test_center_crop_is_resize_256_crop_224():
    for w in (400, 411, 477):
        image = (images(1, 300, w)[0] * 255).byte()
        expected = v2.CenterCrop(224)(
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)(image)
        )
        close(center_crop(image, 224) / 255, expected / 255)
    assert center_crop(image[:, :1, :1], 32).shape == (3, 32, 32)
