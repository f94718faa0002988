"""Pictures: what is in them, not only that they are there."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from PIL import Image, ImageSequence

import train
import visualize
from augment import normalize
from conftest import TINY, backbone_of, errors
from evaluation import explain
from evaluation.features import keep_mass
from util import plot
from util.checkpoint import Loaded, resnet50
from util.data import load
from util.images import to_tensor
from util.run import read_log
from util.shapes import Shapes
from visualize import few_images
from vit import ViT

pytestmark = pytest.mark.usefixtures("several_blocks")


def bright(patch=8):
    """A network of one block and two heads whose class token attends to bright patches.

    The first head does so strongly, the second not at all.
    """
    backbone = ViT(patch, embed_dim=4, depth=1, num_heads=2, img_size=4 * patch)
    backbone.eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.zero_()
    backbone.patch_embed.proj.weight[0] = 1 / (3 * patch**2)  # a patch's brightness
    backbone.cls_token[..., 2] = 1
    block = backbone.blocks[0]
    block.norm1 = torch.nn.Identity()
    block.attn.qkv.weight[0, 2] = 8.0  # the class token's query, in the first head
    block.attn.qkv.weight[4, 0] = 1.0  # a patch's key
    return backbone


def square(height, width, top, left, side):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, top : top + side, left : left + side] = 255
    return image


def save(image, path):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def drawn(argv):
    visualize.main(visualize.parse_args([*map(str, argv), "--device", "cpu"]))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Pictures go to the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bright_loaded(monkeypatch):
    """The bright network in the place of any checkpoint."""
    monkeypatch.setattr(visualize, "load_backbone", lambda *args: Loaded(bright(), {}, "bright"))


@pytest.fixture
def rows(monkeypatch):
    """What draw_panels is given, rather than its picture."""
    calls = []
    monkeypatch.setattr(visualize, "draw_panels", lambda rows, path, note: calls.append(rows))
    return calls


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(backbone_of("vit_micro", 8, 16).state_dict(), tmp_path / "c.pth")
    return tmp_path / "c.pth"


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("top, left", [(48, 8), (472, 288), (0, 280)])
def test_a_bright_square_is_found_where_it_is(smooth, top, left):
    """The patch does not divide the image's sides."""
    image = square(517, 333, top, left, 40)
    part, maps = visualize.attend(bright(), image, 333)
    assert maps.shape == (2, 64, 41) and torch.equal(part, image[:, :512, :328])
    image = part
    heat = plot.upsample(maps, 512, 328, smooth)
    y, x = divmod(heat[0].argmax().item(), 328)
    inside = torch.zeros(512, 328, dtype=torch.bool)
    inside[top : top + 40, left : left + 40] = True
    assert inside[y, x] and heat[0][inside].mean() > 5 * heat[0][~inside].mean()
    assert heat[1].std() < 1e-6  # the second head does not look
    panels = visualize.panels(image, maps[:1], 0.999, smooth)
    assert list(panels) == ["image", "head 1", "mean of heads", "mask"]
    assert all(panel.shape == (3, 512, 328) for panel in panels.values())
    assert torch.equal(panels["image"], image)
    kept = plot.upsample(keep_mass(maps[:1], 0.999), 512, 328, smooth)[0] > 0.5
    assert torch.equal(panels["mask"], plot.outlined(torch.where(kept, image, image // 4), kept))
    assert kept[top + 10 : top + 30, left + 10 : left + 30].all() and not kept[200:203, :5].any()
    light = panels["head 1"].float().mean(0)
    assert light[inside].mean() > 3 * light[~inside].mean()


def test_blocks_are_the_map_itself_and_smooth_lies_between():
    maps = torch.rand(3, 4, 6)
    blocks = maps.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(plot.upsample(maps, 32, 48), blocks)
    smooth = plot.upsample(maps, 4 * 9, 6 * 9, True)
    torch.testing.assert_close(smooth[:, 4::9, 4::9], maps)
    torch.testing.assert_close(smooth[:, 4, 5:40:9], (8 * maps[:, 0, :4] + maps[:, 0, 1:5]) / 9)


def test_the_network_sees_the_whole_patches_of_an_image_undistorted(monkeypatch):
    seen = []

    def attention_maps(backbone, images):
        seen.append(images)
        return torch.ones(1, 2, 5, 5)

    monkeypatch.setattr(visualize, "attention_maps", attention_maps)
    image = torch.randint(256, (3, 30, 21), dtype=torch.uint8)
    part = image[:, :24, :16]
    assert torch.equal(visualize.attend(bright(), image, 21)[0], part)
    torch.testing.assert_close(seen[0], normalize(part[None].float() / 255))
    assert visualize.attend(bright(), image, 42)[0].shape == (3, 28, 20)
    assert seen[1].shape == (1, 3, 56, 40)


def test_a_figure_has_a_panel_for_each_head_and_a_row_for_each_size(checkpoint, tmp_path, rows):
    save(Shapes()[0], tmp_path / "a.png")
    drawn([checkpoint, tmp_path / "a.png", "--size", 16, 40])
    rest = ["head 1", "head 2", "head 3", "head 4", "mean of heads", "mask"]
    firsts = [f"image\nseen at {n} pixels" for n in (16, 40)]
    assert [list(row) for row in rows[0]] == [[first, *rest] for first in firsts]
    assert not torch.equal(rows[0][0]["head 1"], rows[0][1]["head 1"])


def test_two_images_of_one_name_get_two_pictures(checkpoint, tmp_path, capsys):
    Image.effect_noise((333, 517), 90).convert("RGB").save(tmp_path / "a.png")
    Image.effect_noise((333, 517), 90).save(tmp_path / "a.jpg")
    images = [tmp_path / "a.png", tmp_path / "a.jpg"]
    drawn([checkpoint, *images, "--output", tmp_path / "out", "--size", 60])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a_attention.png", "a_attention_.png"}
    assert f"a.png -> {tmp_path / 'out' / 'a_attention.png'}" in capsys.readouterr().out


def test_a_folders_pictures_lie_in_the_current_folder(checkpoint, tmp_path, rows, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("10.png", "2.png", "sub/3.png"):
        save(Shapes()[0], tmp_path / "in" / name)
    (tmp_path / "in" / "bad.jpg").write_text("no image")
    drawn([checkpoint, tmp_path / "in"])
    out, err = capsys.readouterr()
    names = [line.split(" -> ")[1] for line in out.splitlines()[1:]]
    assert names == ["2_attention.png", "10_attention.png", "sub_3_attention.png"]
    assert len(rows) == 3
    (line,) = errors(err.splitlines())
    assert line.startswith(f"cannot read '{tmp_path / 'in' / 'bad.jpg'}': ")
    assert line.endswith("; left out")


@pytest.mark.parametrize("kind", ["gif", "webp", "folder"])
def test_a_film_keeps_its_length_its_times_and_what_moves(tmp_path, bright_loaded, kind):
    """A bright square moves to the right; so do the map and the mask."""
    squares = [square(32, 64, 8, 8 * i, 8) for i in range(8)]
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in squares]
    source, durations = tmp_path / f"film.{kind}", [40 + 20 * i for i in range(8)]
    if kind == "folder":
        source, durations = tmp_path / "film", [200] * 8
        source.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(source / f"{i + 5}.png")  # 10.png comes after 9.png
    else:
        more = dict(append_images=pictures[1:], duration=durations, lossless=True)
        pictures[0].save(source, save_all=True, **more)
    drawn(["any", source, "--size", 32, "--mass", 0.5, "--fps", 5])
    with Image.open(tmp_path / "film_attention.gif") as gif:
        assert gif.n_frames == 8 and gif.size == (3 * 64, 32) and gif.info["loop"] == 0
        for i, frame in enumerate(ImageSequence.Iterator(gif)):
            assert frame.info["duration"] == durations[i]
            image, mean, mask = to_tensor(frame.copy()).float().mean(0).split(64, 1)
            for part in (image, mask):
                assert part[8:16, 8 * i : 8 * i + 8].min() > 240
            assert mask[7, 8 * i : 8 * i + 8].min() > 240 > 50 > image[7].max()  # its outline
            light = mean.unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))
            assert divmod(light.argmax().item(), 8) == (1, i)


def test_a_film_of_the_working_folder_has_its_name(tmp_path, monkeypatch, bright_loaded):
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 32)).save(frames / f"{i}.png")
    monkeypatch.chdir(frames)
    drawn(["any", ".", "--size", 32, "--fps", 5])
    names = sorted(p.name for p in frames.iterdir())
    assert names == ["0.png", "1.png", "frames_attention.gif"]


def test_too_long_a_strip_in_a_folder_is_left_out(tmp_path, bright_loaded, capsys):
    for name, size in (("long", (30_000, 10)), ("image", (64, 32))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    drawn(["any", tmp_path, "--size", 256, "--output", tmp_path / "out"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["image_attention.png"]
    assert "long.png: an image of 30000 x 10" in capsys.readouterr().out


def test_a_film_that_is_cut_short_ends_where_it_is_cut(checkpoint, tmp_path, capsys):
    pictures = [Image.effect_noise((60, 40), 90) for _ in range(6)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:], duration=40)
    content = (tmp_path / "film.gif").read_bytes()
    (tmp_path / "film.gif").write_bytes(content[: len(content) * 2 // 3])
    drawn([checkpoint, tmp_path / "film.gif", "--size", 16])
    assert 2 <= Image.open(tmp_path / "film_attention.gif").n_frames <= 5


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are drawn."""
    made, real = [], plot.new_figure

    def record(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(plot, "new_figure", record)
    monkeypatch.setattr(explain, "new_figure", record)
    return made


def overlaps(figure):
    """The pairs of texts in a figure that overlap, and the texts that leave the figure."""
    figure.draw_without_rendering()
    hidden = set()  # the labels of ticks that are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            beyond = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
            for tick in beyond if axes.axison else axis.get_major_ticks():
                hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text not in hidden]
    assert len(boxes) > 5
    found = [one for one, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1
             or box.y1 > figure.bbox.y1]  # fmt: skip
    for i, (one, box) in enumerate(boxes):
        found += [(one, other) for other, other_box in boxes[:i] if box.overlaps(other_box)]
    return found


def write_log(folder, names, epochs):
    """A run's log with the values of these names at some epochs, and what else its curves need."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"out_dim": 64}')
    lines = [{"epoch": epoch, **{name: epoch % 3 for name in names}} for epoch in epochs]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_curves_show_what_the_log_says(tmp_path, figures):
    names = "loss entropy mean_entropy kl lr weight_decay momentum teacher_temp".split()
    lines = []
    for i in range(1, 31):
        values = {name: i + 10 * j for j, name in enumerate(names)}
        lines.append({"step": i, "epoch": i / 5} | values)
    lines[10:10] = [{"step": 10, "epoch": 2, "knn": 40.0, "knn_student": 35.0}]
    lines.insert(0, {"step": 0, "epoch": 0, "knn": 30.0})  # from before the student's was logged
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 31, "ep')
    (tmp_path / "config.json").write_text('{"out_dim": 64}')
    drawn([tmp_path, "--output", tmp_path / "out"])
    assert Image.open(tmp_path / "out" / "curves.png").width == 1200
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert len(axes) == 8
    assert all(axis.get_xlim() == (0, 6) for title, axis in axes.items() if "k-NN" not in title)
    data = {}
    for title, axis in axes.items():
        curves = axis.get_lines()
        data[title] = [(c.get_label(), list(c.get_xdata()), list(c.get_ydata())) for c in curves]
    titles = {
        "loss": 0,
        "KL(teacher, student), nats": 3,
        "learning rate": 4,
        "weight decay": 5,
        "momentum of the teacher": 6,
        "temperature of the teacher": 7,
    }
    for title, curve in titles.items():
        _, epochs, values = data[title][0]
        assert epochs == [i / 5 for i in range(1, 31)]
        assert values == [i + 10 * curve for i in range(1, 31)]
    each, mean, uniform, zero = (values for _, _, values in data["entropy of the teacher, nats"])
    assert each[0] == 11 and mean[0] == 21
    assert uniform == [math.log(64)] * 2 and zero == [0, 0]
    assert data["k-NN top-1, %"] == [("teacher", [0, 2], [30.0, 40.0]), ("student", [2], [35.0])]


@pytest.mark.parametrize("names, title", [
    (["loss", "kl", "knn", "knn_student"], "k-NN top-1, %"),
    (["loss", "kl"], None),
])  # fmt: skip
def test_curves_have_no_empty_panel_and_begin_where_the_log_does(tmp_path, figures, names, title):
    write_log(tmp_path / "run", names, [2.5 + i / 10 for i in range(30)])
    drawn([tmp_path / "run"])
    wanted = ["loss", "KL(teacher, student), nats", title]
    assert [axis.get_title() for axis in figures[0].axes] == [one for one in wanted if one]
    assert all(axis.get_xlim() == (2, 5.4) for axis in figures[0].axes)
    if title:
        curves = figures[0].axes[2].get_lines()
        assert [curve.get_label() for curve in curves] == ["teacher", "student"]


def test_no_label_of_the_curves_overlaps_another(tmp_path, figures):
    names = "loss entropy mean_entropy kl knn knn_student lr weight_decay"
    for epochs in ([0], [0, 0.01], range(300)):
        write_log(tmp_path / "run", [*names.split(), "momentum", "teacher_temp"], epochs)
        drawn([tmp_path / "run"])
        assert len(figures[-1].axes) == 8 and not overlaps(figures[-1])
        for axis in figures[-1].axes:
            highest = max(curve.get_window_extent().y1 for curve in axis.get_lines())
            legend = axis.get_legend()
            assert legend is None or legend.get_window_extent().y0 > highest


def test_training_keeps_attention_at_log_spaced_steps_through_a_resume_and_draws_it(tmp_path, rows):
    def go(name, *steps):
        for last in steps:
            flags = f"--data {tmp_path / 'in'} --steps {last} --epochs 3 --out_dim 16 --knn_every 1"
            flags = [*TINY, *flags.split(), "--output", str(tmp_path / name)]
            train.main(train.parse_args(flags))
        return torch.load(tmp_path / name / "last.pth", weights_only=True)["attention"]

    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "b").mkdir()
    for i in range(20):
        save(Shapes()[i], tmp_path / "in" / "ab"[i % 2] / f"{i}.png")
    whole, resumed = go("whole", 11), go("resumed", 5, 11)
    assert list(whole) == list(resumed) == [0, 1, 2, 4, 8]
    for step in whole:
        for maps, others in zip(whole[step], resumed[step], strict=True):
            assert torch.equal(maps, others) and maps.shape == (4, 4, 4)
    assert not torch.equal(whole[0][0], whole[8][0])
    strip = rows[1]  # after attention.png of the first run
    steps = [f"step {i}" for i in (1, 2, 4, 8, 11)]
    assert len(strip) == 4 and list(strip[0]) == ["image", "before training", *steps]
    image = plot.shown(few_images(load(str(tmp_path / "in")))[2])
    heat = plot.upsample(whole[8][2].mean(0, keepdim=True), *image.shape[1:])[0]
    assert torch.equal(strip[2]["step 8"], plot.overlay(image, heat))
    tests = [line for line in read_log(tmp_path / "whole" / "log.jsonl") if "knn" in line]
    assert [line["step"] for line in tests] == [0, 5, 10]
    assert tests[0]["knn"] == tests[0]["knn_student"]
    assert all("knn_student" in line for line in tests)
    assert (tmp_path / "whole" / "curves.png").exists()


@pytest.fixture
def written(monkeypatch):
    """What is written into pictures of panels: [(text, its box in pixels)]."""
    texts, real = [], plot.ImageDraw.ImageDraw.text

    def record(draw, xy, text, fill, anchor, **more):
        texts.append((text, draw.textbbox(xy, text, anchor=anchor, **more)))
        real(draw, xy, text, fill, anchor=anchor, **more)

    monkeypatch.setattr(plot.ImageDraw.ImageDraw, "text", record)
    return texts


def test_texts_stand_apart_and_inside_the_margins(tmp_path, written):
    """Titles once, though the rows' lengths differ; what stands below a panel fits its width."""
    shapes = (3, 30, 20), (3, 20, 400), (3, 400, 20)
    images = [torch.full(shape, 100, dtype=torch.uint8) for shape in shapes]
    long = "W" * 60 + ".png", "a$b$ gr\u00f6\u00dfe.png", "\u65e5\u672c" * 20, "caf\udce9.png"
    rows = [{f"{n}\n{name}\n0.{n}": image for n, (name, image) in enumerate(zip(long, images))}]
    rows.append({f"{n}\n{name}": image for n, (name, image) in enumerate(zip(long[2:], images))})
    plot.draw_panels(rows, "a.png", "a note of many words " * 9)
    texts = [text for text, _ in written]
    assert texts.count("0") == texts.count("1") == texts.count("2") == 1
    assert long[1] in texts and long[3] in texts and "0.2" in texts
    shortened = [text for text in texts if "\u2026" in text]
    assert len(shortened) == 3 and shortened[0].endswith("WW.png")
    picture = Image.open("a.png")
    for i, (_, (left, top, right, bottom)) in enumerate(written):
        assert plot.GAP <= left and right <= picture.width - plot.GAP
        assert 0 <= top and bottom <= picture.height
        for _, (left_2, top_2, right_2, bottom_2) in written[:i]:
            apart = left >= right_2 or right <= left_2 or top >= bottom_2 or bottom <= top_2
            assert apart


def test_panels_are_large_and_have_one_row_of_titles(written):
    tiny = torch.randint(256, (3, 2, 2), dtype=torch.uint8)
    blocks = tiny.repeat_interleave(112, 1).repeat_interleave(112, 2)
    assert torch.equal(plot.shown(tiny), blocks) and torch.equal(plot.shown(blocks), blocks)
    images = [torch.full((3, h, w), 90, dtype=torch.uint8) for h, w in ((30, 40), (900, 600))]
    plot.draw_panels([{"image": image} for image in images], "a.png", "a note")
    gray = (to_tensor(Image.open("a.png")) == 90).all(0)
    assert gray.any(0).sum() == 224 >= 220 and gray.any(1).sum() == 224 * 3 // 4 + 224 * 3 // 2
    written.clear()
    visualize.draw_attention(backbone_of("vit_micro", 8, 32).eval(), images, "a.png")
    heads = [f"head {n}" for n in range(1, 13)]
    titles = ["image", *heads[:4], "mean of heads", "mask"]
    assert [text for text, _ in written[:-1]] == titles
    assert Image.open("a.png").width == 7 * (224 + 8) + 8
    written.clear()
    backbone = ViT(16, embed_dim=48, depth=1, num_heads=12, img_size=32)
    visualize.draw_attention(backbone, images, "a.png")  # two lines a row, each with its titles
    titles = ["image", *heads, "mean of heads", "mask"]
    assert [text for text, _ in written[:-1]] == 2 * titles
    assert Image.open("a.png").width == 8 * (224 + 8) + 8


def test_pictures_of_noise_are_small_and_take_a_path_as_text(tmp_path):
    images = [Shapes()[i] for i in range(6)]
    images[3:] = images[3][:, :20], images[4][:, :, :1], images[5][:, :1]
    backbone = backbone_of("vit_micro", 8, 32).eval()
    visualize.draw_attention(backbone, images, "new/a.png")
    kept = {0: [visualize.attend(backbone, images[0])[1]]}
    visualize.draw_emergence(images[:1], kept, "new/b.png")
    visualize.draw_log([{"epoch": 0, "loss": 1.0}], "new/c.png", 64)
    assert all(Path(f"new/{name}.png").stat().st_size < 500_000 for name in "abc")


def test_a_map_is_what_one_sees_not_the_image():
    image, flat = torch.randint(256, (3, 30, 40), dtype=torch.uint8), torch.full((30, 40), 0.2)
    seen = plot.overlay(image, flat).float()
    assert seen.amax((1, 2)).sub(seen.amin((1, 2))).max() <= 0.15 * 256
    flat[:, :20] = 0.1
    seen = plot.overlay(image, flat).float().mean((0, 1))
    assert seen[20:].min() > seen[:20].max() + 50


@pytest.mark.parametrize("brightness", [0, 90, 255])
def test_an_outline_shows_on_anything(brightness):
    image = torch.full((3, 240, 360), brightness, dtype=torch.uint8)
    mask = torch.zeros(120, 180, dtype=torch.uint8)  # at half the size
    mask[40:60, 50:80], mask[60:80, 50:80], mask[0, 0] = 1, 2, 255
    outlined = plot.outlined(image, mask)
    across = [[brightness] * 4 + [0, 0, 255, 255] + [brightness] * 4] * 3
    assert outlined[:, 90, 92:104].tolist() == across == outlined[:, 140, 92:104].tolist()
    down = [[brightness] * 4 + [0, 0, 255, 255] + [brightness] * 10] * 3
    assert outlined[:, 72:90, 130].tolist() == down
    assert (outlined[:, :70] == brightness).all()  # what is left open has no outline
    tinted = plot.outlined(image, mask, [0, 0, 0, 200, 0, 0, 0, 200, 0])
    assert torch.equal(tinted[:, :, :100], outlined[:, :, :100])
    for top, color in ((82, [200, 0, 0]), (122, [0, 200, 0])):
        wanted = [int(0.7 * brightness + 0.3 * value) for value in color]
        got = tinted[:, top + 10, 120].tolist()
        assert all(abs(a - b) <= 1 for a, b in zip(got, wanted))


def test_a_film_strip_of_many_steps_keeps_the_first_and_the_last(tmp_path, rows):
    steps = [0, *(2**i for i in range(10)), 1000]
    kept = {step: [torch.rand(2, 4, 4)] for step in steps}
    visualize.draw_emergence([Shapes()[0]], kept, tmp_path / "a.png")
    last_seven = [f"step {i}" for i in (16, 32, 64, 128, 256, 512, 1000)]
    assert list(rows[0][0]) == ["image", "before training", *last_seven]


def test_a_strip_among_the_watched_images_does_not_end_a_training():
    strips = [torch.zeros(3, *size, dtype=torch.uint8) for size in ((1, 90_000), (500, 2))]
    few = few_images([*strips, Shapes()[0]])
    assert [tuple(image.shape[1:]) for image in few] == [(1, 3), (6, 2), (64, 64)]


def test_a_convnet_has_no_attention(monkeypatch):
    monkeypatch.setattr(visualize, "load_backbone", lambda *args: Loaded(resnet50(), {}, "convnet"))
    with pytest.raises(ValueError, match="convnet has no attention"):
        drawn(["any", "a.png"])


def test_drawing_needs_no_display():
    assert "matplotlib.pyplot" not in sys.modules
