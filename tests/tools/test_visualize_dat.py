"""Pictures show keys where they are in the image, as large as the attention that they get."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet")
import cv2
from matplotlib import pyplot as plt
from mmengine import Config
from mmengine.registry import init_default_scope

from mmdeform.analysis.dat import LayerKeys

ROOT = Path(__file__).parents[2]
BACKBONE = dict(
    type="mmdeform.DAT",
    img_size=64,
    stem_dims=8,
    dims=(8, 8, 16, 16),
    num_heads=(1, 1, 4, 4),
    num_groups=(1, 1, 2, 2),
    stage_specs=("L", "L", "DD", "D"),
)
DETECTOR = dict(
    default_scope="mmdet",
    model=dict(
        type="RetinaNet",
        backbone=BACKBONE,
        data_preprocessor=dict(
            type="DetDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3, pad_size_divisor=32
        ),
    ),
    test_dataloader=dict(
        dataset=dict(
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="Resize", scale=(200, 120), keep_ratio=True),
                dict(type="PackDetInputs", meta_keys=("ori_shape", "img_shape", "scale_factor")),
            ]
        )
    ),
)
SIZE = (75, 50)  # width, height; the detector makes 180 x 120 of it, padded to 192 x 128


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "visualize_dat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A bright spot at (50, 20), dark elsewhere."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    spot = 200 * np.exp(-((x - 50) ** 2 + (y - 20) ** 2) / 18)
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.repeat(spot[..., None], 3, 2).astype(np.uint8))
    return path


def write(folder: Path, **settings) -> Path:
    path = folder / "config.py"
    Config(settings).dump(path)
    return path


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["visualize_dat.py", *map(str, arguments)])
    tool.main()


@pytest.mark.parametrize("config", ["detector", "size", "own size"])
def test_points_of_the_image_and_of_the_inputs(tool: ModuleType, image: Path, config: str) -> None:
    init_default_scope("mmdet")
    cfg = Config(DETECTOR if config == "detector" else dict(model=BACKBONE))
    picture = tool.load_picture(cfg, image, (150, 200) if config == "size" else None)
    sizes = {"detector": (128, 192), "size": (200, 150), "own size": (50, 75)}
    scales = {"detector": (2.4, 2.4), "size": (2, 4), "own size": (1, 1)}
    assert picture.pixels.shape == (50, 75, 3)
    assert picture.inputs.shape == (1, 3, *sizes[config])
    assert picture.scale == pytest.approx(scales[config])
    # The spot is where it is said to be.
    spot = picture.inputs[0].double().mean(0)
    spot = (spot - spot[0, 0]).clamp(0)
    rows, columns = (torch.arange(length).double() for length in spot.shape)
    centre = np.array([spot.sum(0) @ columns, spot.sum(1) @ rows]) / float(spot.sum())
    assert centre == pytest.approx(picture.to_inputs((50, 20)), abs=0.05)
    assert picture.from_inputs(centre) == pytest.approx((50, 20), abs=0.05)


def test_backbones_get_normalised_rgb(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), np.full((4, 6, 3), (10, 20, 200), np.uint8))  # BGR
    picture = tool.load_picture(Config(dict(model=BACKBONE)), path, None)
    assert picture.pixels[2, 3].tolist() == [200, 20, 10]
    red, green, blue = (200 - 123.675) / 58.395, (20 - 116.28) / 57.12, (10 - 103.53) / 57.375
    torch.testing.assert_close(picture.inputs[0, :, 2, 3], torch.tensor([red, green, blue]))


class Layer:
    """Four heads in two groups; the first query attends to the first key, the second to all."""

    num_heads = 4

    def attention(self, x: Tensor, queries: Tensor) -> Tensor:
        first = torch.tensor([[1.0, 0, 0], [0.6, 0.2, 0.2], [0, 0.5, 0.5], [0, 0.25, 0.75]])
        return torch.stack([torch.full((4, 3), 1 / 3) if q else first for q in queries], 1)[None]


POINTS = torch.tensor([[[8.0, 8], [24, 8], [40, 56]], [[10.0, 12], [30, 14], [50, 18]]])[None]


@pytest.fixture
def keys() -> LayerKeys:
    shape = torch.zeros(1, 16, 4, 6)
    return LayerKeys("layer", Layer(), shape, POINTS, POINTS[:, :1] - 2, (16, 16), (7.5, 7.5))


@pytest.mark.parametrize(
    ("head", "group", "groups", "weights"),
    [
        (None, None, [0, 1], [[0.8, 0.1, 0.1], [0, 0.375, 0.625]]),
        (None, 1, [1], [[0, 0.375, 0.625]]),
        (1, None, [0], [[0.6, 0.2, 0.2]]),
        (2, None, [1], [[0, 0.5, 0.5]]),
    ],
)
def test_weights_of_heads_and_groups(
    tool: ModuleType, keys: LayerKeys, head, group, groups: list[int], weights: list
) -> None:
    chosen, found = tool.weights_of_keys(keys, [0], head, group)
    assert chosen == groups
    torch.testing.assert_close(found, torch.tensor(weights))


@pytest.mark.parametrize(("name", "count"), [("head", 4), ("group", 2)])
@pytest.mark.parametrize("beyond", [-1, 0])
def test_heads_and_groups_that_do_not_exist_are_refused(
    tool: ModuleType, keys: LayerKeys, name: str, count: int, beyond: int
) -> None:
    index = count if beyond == 0 else -1
    message = f"--{name} must be between 0 and {count - 1} in layer, but got {index}"
    with pytest.raises(ValueError, match=message):
        tool.weights_of_keys(keys, [0], **{"head": None, "group": None, name: index})


@pytest.fixture
def picture(tool: ModuleType):
    return tool.Picture(np.zeros((30, 60, 3), np.uint8), torch.zeros(1, 3, 64, 96), (1.5, 2.0))


PIXELS = (POINTS.view(-1, 2).numpy() + 0.5) / (1.5, 2.0) - 0.5  # the points in the picture
SHARES = np.array([0.8, 0.1, 0.1, 0, 0.375, 0.625]) / 0.8


def test_what_a_panel_shows(tool: ModuleType, keys: LayerKeys, picture) -> None:
    panel = tool.make_panel(picture, keys, 3, (5.9, 0.2))  # the first query reaches to 10.2, 7.2
    assert panel.title == "stage 3, query (5.9, 0.2), largest = 2.4 x mean"
    np.testing.assert_allclose(panel.points, PIXELS)
    references = (POINTS[0, 0].numpy() - 2 + 0.5) / (1.5, 2.0) - 0.5  # those of both groups
    np.testing.assert_allclose(panel.references, [*references, *references])
    np.testing.assert_allclose(panel.shares, SHARES, rtol=1e-6)
    np.testing.assert_allclose(panel.query, (8 / 1.5 - 0.5, 8 / 2 - 0.5))
    next_one = tool.make_panel(picture, keys, 3, (12, 0.2))  # at 18.25, 0.9 of the inputs
    np.testing.assert_allclose(next_one.query, (24 / 1.5 - 0.5, 8 / 2 - 0.5))
    assert next_one.title.endswith("largest = 1 x mean")
    one = tool.make_panel(picture, keys, 3, (5.9, 0.2), group=1)
    np.testing.assert_allclose(one.points, PIXELS[3:])
    np.testing.assert_allclose(one.shares, [0, 0.6, 1])


@pytest.mark.parametrize(("padding", "queries"), [(0, 24), (24, 16)])
def test_all_queries_of_the_image_are_averaged(
    tool: ModuleType, keys: LayerKeys, padding: int, queries: int
) -> None:
    pixels = np.zeros((32, 64 - padding * 2 // 3, 3), np.uint8)
    picture = tool.Picture(pixels, torch.zeros(1, 3, 64, 96), (96 / 64, 2.0))
    panel = tool.make_panel(picture, keys, 3, None)
    # One query attends as in `Layer`, all others to a third of everything.
    mean = (0.8 + (queries - 1) / 3) / queries
    assert panel.title == f"stage 3, mean of all queries, largest = {3 * mean:.3g} x mean"
    assert panel.query is None
    assert panel.shares[1] == pytest.approx((0.1 + (queries - 1) / 3) / queries / mean)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("query", [None, np.array([5.0, 7.0])])
def test_what_is_drawn(tool: ModuleType, picture, offsets: bool, query) -> None:
    axis = plt.figure().add_subplot()
    panel = tool.Panel("title", PIXELS, PIXELS - 1, SHARES, query)
    tool.draw_panel(axis, picture, panel, 80, offsets)
    drawn = list(axis.collections)
    if offsets:
        starts, ends = np.stack(drawn.pop(0).get_segments(), 1)
        np.testing.assert_allclose(starts, PIXELS - 1)
        np.testing.assert_allclose(ends, PIXELS)
    if query is not None:
        np.testing.assert_allclose(drawn.pop().get_offsets(), [query])
    dots, circles = drawn
    np.testing.assert_allclose(dots.get_offsets(), PIXELS)
    order = [0, 5, 4, 1, 2, 3]  # small ones on top
    np.testing.assert_allclose(circles.get_offsets(), PIXELS[order])
    np.testing.assert_allclose(circles.get_sizes(), 80 * SHARES[order])
    np.testing.assert_allclose(circles.get_array(), SHARES[order])
    assert circles.get_clim() == (0, 1)
    assert axis.get_xlim() == (-0.5, 59.5) and axis.get_ylim() == (29.5, -0.5)
    assert axis.get_title() == "title"


@pytest.mark.parametrize("count", [1, 10, 10000])
def test_circles_leave_room(tool: ModuleType, picture, count: int) -> None:
    few = tool.Panel("few", PIXELS[:1], PIXELS[:1], np.ones(1), None)
    many = tool.Panel("many", np.ones((count, 2)), np.ones((count, 2)), np.ones(count), None)
    figure = tool.draw(picture, [[few], [many]], False)
    areas = [axis.collections[1].get_sizes()[0] for axis in figure.axes]
    assert areas[0] == areas[1]  # sizes of one picture can be compared
    room = tool.COVERED * (tool.PANEL * 72) ** 2 / 2  # panels are twice as wide as high
    assert areas[0] == pytest.approx(min(tool.LARGEST, room / count))
    assert (areas[0] == tool.LARGEST) == (count < 100)
    plt.close(figure)


def size_of(path: Path) -> tuple[int, int]:
    height, width = cv2.imread(str(path)).shape[:2]
    return width, height


def test_picture_of_a_backbone(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config, out = write(tmp_path, model=BACKBONE), tmp_path / "new" / "keys.png"
    arguments = ("--stage", 3, 4, "--out", out, "--offsets", "--size", 64, 96)
    run(tool, monkeypatch, config, image, *arguments)
    panel = tool.PANEL * tool.DPI
    assert size_of(out) == pytest.approx((2 * panel, panel * 50 / 75 + 0.55 * tool.DPI), abs=1)
    output = capsys.readouterr().out
    assert "no checkpoint: weights are as they are before training" in output
    assert "stages.2.attns.1: 2 groups of 24 keys, 4 heads" in output
    assert "stages.3.attns.0: 2 groups of 6 keys, 4 heads" in output
    assert f"drawn to {out}" in output


def test_picture_of_a_detector(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    init_default_scope("mmdet")
    trained = tool.build_backbone(Config(DETECTOR), None)
    weights = {f"backbone.{name}": tensor for name, tensor in trained.state_dict().items()}
    checkpoint = tmp_path / "epoch_1.pth"
    torch.save(dict(state_dict=weights), checkpoint)
    loaded = tool.build_backbone(Config(DETECTOR), checkpoint)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    del weights["backbone.stages.2.attns.1.proj_q.bias"], weights["backbone.norms.0.norm.bias"]
    torch.save(dict(state_dict=weights), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"lacks 1 weights of the backbone, stages\.2\.attns\.1"):
        tool.build_backbone(Config(DETECTOR), tmp_path / "part.pth")

    config, out = write(tmp_path, **DETECTOR), tmp_path / "keys.jpg"
    queries = ("--query", 50, 20, "--query", 3, 49)
    run(tool, monkeypatch, config, "--stage", 3, 4, *queries, "--out", out, checkpoint, image)
    panel = tool.PANEL * tool.DPI
    height = 2 * (panel * 50 / 75 + 0.25 * tool.DPI) + 0.3 * tool.DPI
    assert size_of(out) == pytest.approx((2 * panel, height), abs=1)
    output = capsys.readouterr().out
    assert "no checkpoint" not in output
    assert "stages.2.attns.1: 2 groups of 96 keys, 4 heads" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", 2), "stage 2 has no deformable block; there are 2 in stage 3, 1 in stage 4"),
        (("--block", 2), "block must be between -2 and 1 in stage 3, but got 2"),
        (("--query", 75, 0), "75 pixels wide and 50 high, but got 75 0"),
        (("--query", 2, -0.6), "75 pixels wide and 50 high, but got 2 -0.6"),
        (("--head", 1, "--group", 0), "give one of --head and --group"),
    ],
)
def test_wrong_options_are_refused(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch, capsys, arguments, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, write(tmp_path, model=BACKBONE), image, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(model=dict(type="mmdet.ResNet", depth=18)), "ResNet has no block with deformable"),
        (dict(total_epochs=3), "has no model"),
    ],
)
def test_configs_without_dat_are_refused(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch, capsys, settings, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, write(tmp_path, **settings), image)
    assert message in capsys.readouterr().err


def test_files_that_are_missing_or_no_images_are_refused(
    tool: ModuleType, image: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = write(tmp_path, model=BACKBONE)
    for arguments, message in (
        ((config, tmp_path / "missing.png"), "missing.png does not exist"),
        ((config, tmp_path / "missing.pth", image), "missing.pth does not exist"),
        ((config, config), "config.py is no image that OpenCV can read"),
        ((config, image, image), "image.png: expected a checkpoint"),
    ):
        with pytest.raises(SystemExit):
            run(tool, monkeypatch, *arguments)
        assert message in capsys.readouterr().err


def test_a_detector_has_its_own_size(tool: ModuleType, image: Path) -> None:
    with pytest.raises(ValueError, match="--size is for backbones alone"):
        tool.load_picture(Config(DETECTOR), image, (64, 64))
