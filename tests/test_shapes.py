"""The built-in images: what they are, and that nothing simple tells their class."""

import torch

from util.data import Folder
from util.shapes import LENGTHS, Shapes, main, parse_args


def test_shapes_are_deterministic_labelled_and_masked():
    train, val = Shapes("train"), Shapes("val")
    assert len(train) == 10_000 and len(val) == 1_000 and train.classes == val.classes
    assert (train[7] == Shapes("train")[7]).all() and not (train[7] == val[7]).all()
    for i in range(20):
        image, mask = train[i], train.mask(i)
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and mask.shape == (64, 64)
        assert mask.unique().tolist() == [0, 1] and 0.1 < mask.float().mean() < 0.3


def test_they_can_be_written_as_files(tmp_path, monkeypatch):
    monkeypatch.setitem(LENGTHS, "val", 20)
    main(parse_args([str(tmp_path / "out")]))
    images, shapes = Folder(tmp_path / "out"), Shapes("val")
    assert len(images) == 20 and len(images.classes) == 10
    number = images.paths.index("core 108 degrees from rim/13.png")
    assert torch.equal(images[number], shapes[13])


def simple_features(shapes):
    """Position, size and mean color of the object in each image, standardised; and the labels."""
    rows = []
    for i in range(len(shapes)):
        mask = shapes.mask(i)
        inside = mask.nonzero().float()
        size = torch.tensor([len(inside) ** 0.5])
        color = shapes[i][:, mask == 1].float().mean(1) / 4
        rows.append(torch.cat([inside.mean(0), inside.std(0), size, color]))
    rows = torch.stack(rows)
    return (rows - rows.mean(0)) / rows.std(0), torch.tensor(shapes.labels)


def test_position_size_and_mean_color_do_not_tell_the_class():
    x, y = simple_features(Shapes("train", 2000))
    held_out, truth = simple_features(Shapes("val", 500))
    probe = torch.nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(probe(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (probe(held_out).argmax(1) == truth).float().mean() < 0.25


def hue(image, where):
    """The mean hue of an image's pixels, as an angle."""
    turn = torch.exp(2j * torch.pi * torch.arange(3) / 3)
    return (turn @ image[:, where].mean(1).cfloat()).angle()


def test_the_step_in_hue_tells_the_class():
    shapes, right = Shapes("val", 100), 0
    pixels = torch.cartesian_prod(torch.arange(64.0), torch.arange(64.0))
    for i in range(100):
        image, mask = shapes[i].float(), shapes.mask(i).float()
        inside = mask.nonzero().float()
        radius = (len(inside) / torch.pi) ** 0.5
        far = torch.cdist(pixels, inside.mean(0, keepdim=True)).view(64, 64) / radius
        inner = torch.nn.functional.avg_pool2d(mask[None], 3, 1, 1)[0] == 1
        step = hue(image, far < 0.45) - hue(image, inner & (far > 0.8))
        right += round((step / (2 * torch.pi) * 10).item()) % 10 == shapes.labels[i]
    assert right > 80
