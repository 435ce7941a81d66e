"""attention_sparsity.py and visualize_attention.py, on checkpoints of small trained detectors."""

import copy
import importlib.util
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmengine import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import mmdeform  # noqa: F401
from mmdeform.analysis.attention import attention_layers, record_sparsity
from mmdeform.analysis.attention.checkpoints import load_weights
from mmdeform.analysis.attention.drawing import draw_sparsity
from mmdeform.analysis.attention.panels import Panel, Row, draw_rows, make_panels
from mmdeform.analysis.attention.views import view_image
from mmdeform.analysis.detectors import build_dataset, build_detector, load_detector, load_picture

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "dense": "configs/detr/detr-dc5_r50_shapes.py",
    "deformable": "configs/deformable_detr/deformable-detr-refine_r50_shapes.py",
}
SIDE = 64  # what images are resized to: maps of 8, 4 and 2 pixels, or one of 4 dilated ones


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sparsity() -> ModuleType:
    return load("attention_sparsity")


@pytest.fixture(scope="module")
def visualize() -> ModuleType:
    return load("visualize_attention")


def small_config(kind: str, data: Path) -> Config:
    """A shipped config with a smaller backbone, images and number of queries."""
    cfg = Config.fromfile(ROOT / CONFIGS[kind])
    cfg.model.backbone.depth = 18
    cfg.model.neck.in_channels = [channels // 4 for channels in cfg.model.neck.in_channels]
    cfg.model.num_queries = 10
    for part in (cfg.model.encoder, cfg.model.decoder):
        part.num_layers = 2
    for name in ("train", "val", "test"):
        dataset = cfg[f"{name}_dataloader"].dataset
        dataset.data_root = f"{data}/"
        (resize,) = (step for step in dataset.pipeline if step.type == "Resize")
        resize.scale = (SIDE, SIDE)
    return cfg


def train(kind: str, folder: Path, data: Path) -> SimpleNamespace:
    """Two epochs of one iteration each."""
    cfg = small_config(kind, data)
    config = folder / f"{kind}.py"
    cfg.dump(config)
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(folder / kind)
    cfg.experiment_name = f"attention-{kind}-{folder.name}"
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    with patch("mmengine.runner.runner.collect_env", return_value={}):  # it takes a second
        Runner.from_cfg(cfg).train()
    return SimpleNamespace(config=config, run=folder / kind, last=folder / kind / "epoch_2.pth")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SimpleNamespace]]:
    """Config and run of a DETR and of a Deformable DETR."""
    folder = tmp_path_factory.mktemp("attention")
    load("make_shapes").make_shapes(folder / "shapes", 2, 3, size=80, seed=0, overwrite=False)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with patch.object(MessageHub, "_instance_dict", OrderedDict()):
        yield {kind: train(kind, folder, folder / "shapes") for kind in CONFIGS}
    torch.set_num_threads(threads), torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def scope() -> None:
    init_default_scope("mmdet")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 x 50 pixels, which a test pipeline makes 64 x 40 and pads to 64 x 64."""
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.full((50, 80, 3), 60, np.uint8)
    cv2.circle(pixels, (55, 20), 12, (200, 180, 90), -1)
    cv2.imwrite(str(path), pixels)
    return path


def run(tool: ModuleType, *arguments: Any) -> None:
    with patch("sys.argv", ["tool.py", *map(str, arguments)]):
        tool.main()


def refused(tool: ModuleType, capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """The message with which a tool refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(tool, *arguments)
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


KEYS = {  # of each layer: kind, queries of two images, keys
    "dense": {
        "encoder.layers.{}.self_attn": ("dense", 32, 16),
        "decoder.layers.{}.self_attn": ("dense", 20, 10),
        "decoder.layers.{}.cross_attn": ("dense", 20, 16),
    },
    "deformable": {
        "encoder.layers.{}.self_attn": ("deformable", 168, 12),
        "decoder.layers.{}.self_attn": ("dense", 20, 10),
        "decoder.layers.{}.cross_attn": ("deformable", 20, 12),
    },
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_sparsity_of_a_run(
    sparsity: ModuleType,
    trained: dict[str, SimpleNamespace],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    this, out = trained[kind], tmp_path / "new" / "sparsity.png"
    run(sparsity, this.config, this.run, "--images", 2, "--out", out)
    assert cv2.imread(str(out)).shape[:2] == (1200, 2240)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["data"] == "val" and report["config"] == str(this.config)
    assert [Path(name).name for name in report["images"]] == ["000000.jpg", "000001.jpg"]
    saved = [(one["epoch"], one["iteration"]) for one in report["checkpoints"]]
    assert saved == [(1, 1), (2, 2)]

    model = build_detector(this.config)
    dataset = build_dataset(model.cfg)
    samples = [dataset[index] for index in range(2)]
    for one in report["checkpoints"]:
        load_weights(model, Path(one["checkpoint"]))
        with record_sparsity(attention_layers(model)) as record:
            for sample in samples:
                model.test_step({key: [value] for key, value in sample.items()})
        assert list(one["layers"]) == list(record)
        for name, layer in one["layers"].items():
            expected = KEYS[kind][name.replace("0", "{}").replace("1", "{}")]
            keys = (layer["fewest_keys"], layer["most_keys"])
            assert (layer["kind"], layer["queries"], *keys) == (*expected, expected[2])
            assert layer["negative_entropy"] == record[name].mean.negative_entropy
            heads = [head["normalised_entropy"] for head in layer["heads"]]
            assert heads == [head.normalised_entropy for head in record[name].heads]
            assert len(heads) == 8 and all(0 < head <= 1 + 1e-6 for head in heads)
            assert -math.log(expected[2]) - 1e-5 <= layer["negative_entropy"] < 0
    first, second = (one["layers"] for one in report["checkpoints"])
    name = "encoder.layers.0.self_attn"
    assert first[name]["negative_entropy"] != second[name]["negative_entropy"]

    captured = capsys.readouterr()
    assert "attention with epoch_2.pth" in captured.out and "measure" in captured.err
    value = f"{second[name]['negative_entropy']:.3f}"
    assert value in captured.out
    assert f"2 checkpoints: {out} and {out.with_suffix('.json')} written" in captured.out


def test_one_checkpoint_and_some_layers(
    sparsity: ModuleType, trained: dict[str, SimpleNamespace], tmp_path: Path
) -> None:
    this, out = trained["dense"], tmp_path / "one.png"
    layers = ("--layers", "decoder.**", "encoder.layers.1.*")
    options = ("--data", "test", "--cfg-options", "model.test_cfg.max_per_img=3")
    run(sparsity, this.config, this.last, "--images", 1, "--out", out, *layers, *options)
    report = json.loads(out.with_suffix(".json").read_text())
    (one,) = report["checkpoints"]
    assert one["epoch"] == 2 and report["data"] == "test"
    assert next(iter(one["layers"])) == "encoder.layers.1.self_attn" and len(one["layers"]) == 5


def test_wrong_input_of_sparsity_is_refused(
    sparsity: ModuleType,
    trained: dict[str, SimpleNamespace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    this, other = trained["dense"], trained["deformable"]
    damaged, plain = tmp_path / "epoch_3.pth", tmp_path / "plain.py"
    damaged.write_bytes(this.last.read_bytes()[:1000])
    plain.write_text("model = dict(type='mmdet.ResNet', depth=18)")
    (tmp_path / "nothing.py").write_text("total_epochs = 3")
    for arguments, message in (
        ((tmp_path / "no.py", this.run), "no.py does not exist"),
        ((this.config, tmp_path / "no.pth"), "no.pth does not exist"),
        ((this.config, tmp_path), "epoch_3.pth: expected a checkpoint, got a file that torch"),
        ((this.config, other.run), "does not fit the DETR of the config: it lacks"),
        ((this.config, this.run, "--images", 0), "must be between 1 and 3, all that the val set"),
        ((this.config, this.run, "--images", 4), "and 3, all that the val set has, but got 4"),
        ((this.config, this.run, "--layers", "neck.**"), "'neck.**' matches no attention layer"),
        ((plain, this.run), "ResNet has no attention layer"),
        ((tmp_path / "nothing.py", this.run), "nothing.py has no model"),
        (
            (this.config, this.run, "--images", 1, "--cfg-options", "val_dataloader=None"),
            "has no val_dataloader",
        ),
        (
            (this.config, this.run, "--cfg-options", "val_dataloader.dataset.data_root=no/"),
            "no/val.json",
        ),
    ):
        assert message in refused(sparsity, capsys, *arguments)


def test_curves(trained: dict[str, SimpleNamespace]) -> None:
    def layer(name: str, place: str, *heads: tuple[float, float], keys: int = 4) -> SimpleNamespace:
        means = [
            SimpleNamespace(negative_entropy=a, normalised_entropy=b)
            for a, b in (np.mean(heads, 0).tolist(), *heads)
        ]
        return SimpleNamespace(
            name=name,
            place=place,
            kind="dense",
            fewest_keys=keys,
            most_keys=keys,
            mean=means[0],
            heads=means[1:],
        )

    def one(epoch: int, shift: float) -> SimpleNamespace:
        names = {
            "encoder.layers.0.self_attn": "encoder self",
            "encoder.layers.1.self_attn": "encoder self",
            "decoder.layers.0.cross_attn": "decoder cross",
        }
        layers = {
            name: layer(name, place, (-1 - shift - i, 0.5), (-0.5 - i, 0.25))
            for i, (name, place) in enumerate(names.items())
        }
        return SimpleNamespace(
            checkpoint=SimpleNamespace(epoch=epoch, iteration=10 * epoch), layers=layers
        )

    figure = draw_sparsity([one(1, 0.0), one(4, 0.25)])
    axes = np.array(figure.axes).reshape(2, 2)
    assert [axis.get_title() for axis in axes[0]] == [
        "encoder self\ndense, 4 keys",
        "decoder cross\ndense, 4 keys",
    ]
    means = [line for line in axes[0, 0].lines if line.get_zorder() == 3]
    assert [line.get_xdata().tolist() for line in means] == [[1, 4], [1, 4]]
    np.testing.assert_allclose(means[0].get_ydata(), [-0.75, -0.875])
    np.testing.assert_allclose(means[1].get_ydata(), [-1.75, -1.875])
    heads = [line.get_ydata() for line in axes[0, 0].lines if line.get_lw() == 0.6]
    np.testing.assert_allclose(heads[:2], [[-1, -1.25], [-0.5, -0.5]])
    (limit,) = (line for line in axes[0, 1].lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(limit.get_ydata(), -math.log(4))
    legend = axes[1, 0].get_legend()
    assert legend.get_title().get_text() == "encoder.layers"
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1"]
    names = [text.get_text() for text in axes[1, 1].get_legend().get_texts()]
    assert names == ["decoder.layers.0.cross_attn"]
    assert axes[1, 0].get_xlabel() == "epoch"
    same = [one(2, 0), one(2, 0)]  # iterations tell them apart
    same[1].checkpoint.iteration = 25
    assert draw_sparsity(same).axes[-1].get_xlabel() == "iteration"


class Outputs:
    """What test_step returns and leaves behind, with and without being watched."""

    def __init__(self, model: nn.Module, result: Any) -> None:
        instances = result.pred_instances
        self.tensors = [instances.scores, instances.bboxes, instances.labels]
        self.tensors += [torch.get_rng_state(), *model.state_dict().values()]

    def same(self, other: "Outputs") -> bool:
        return all(map(torch.equal, self.tensors, other.tensors))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_detections_are_the_same_and_those_of_the_queries(
    trained: dict[str, SimpleNamespace], kind: str, image: Path
) -> None:
    model = load_detector(trained[kind].config, trained[kind].last)
    picture = load_picture(model, image)

    def detect() -> Any:
        torch.manual_seed(3)
        (result,) = model.test_step(copy.deepcopy(picture.batch))
        return result

    plain = detect()
    expected = Outputs(model, plain)
    layers = attention_layers(model)
    with record_sparsity(layers):
        assert Outputs(model, detect()).same(expected)
    torch.manual_seed(3)
    view = view_image(model, load_picture(model, image), layers)
    assert Outputs(model, plain).same(expected)
    assert Outputs(model, detect()).same(expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())

    assert view.size == (64, 64)
    sizes = {"dense": ((4, 4),), "deformable": ((8, 8), (4, 4), (2, 2))}
    assert view.map_sizes == sizes[kind]
    best = view.best_predictions(1)[0]
    assert best.score == pytest.approx(float(plain.pred_instances.scores[0]))
    assert best.label == int(plain.pred_instances.labels[0])
    box = torch.tensor(best.box) / 0.8
    limits = torch.tensor([80, 50, 80, 50])
    torch.testing.assert_close(
        box.clamp(min=0).minimum(limits), plain.pred_instances.bboxes[0], atol=1e-3, rtol=1e-4
    )


def test_padding_takes_no_part(trained: dict[str, SimpleNamespace], image: Path) -> None:
    """The image is 40 pixels high, the input 64: mmdet masks the last row of 16 pixels."""
    model = build_detector(trained["dense"].config)
    with record_sparsity(attention_layers(model)) as record:
        model.test_step(load_picture(model, image).batch)
    encoder, cross = record["encoder.layers.0.self_attn"], record["decoder.layers.1.cross_attn"]
    assert (encoder.queries, encoder.most_keys) == (12, 12)
    assert (cross.queries, cross.fewest_keys) == (10, 12)


def test_pictures_of_detections(
    visualize: ModuleType,
    trained: dict[str, SimpleNamespace],
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    dense, deformable = trained["dense"], trained["deformable"]
    out = tmp_path / "new" / "attention.png"
    compare = ("--compare", dense.config, dense.last, "--detections", 2)
    run(visualize, deformable.config, deformable.last, image, "--out", out, *compare)
    assert f"2 queries drawn to {out}" in capsys.readouterr().out
    picture = cv2.imread(str(out))
    assert picture.shape[1] == 4 * 520 and picture.std() > 20
    report = json.loads(out.with_suffix(".json").read_text())
    assert [one["name"] for one in report["detectors"]] == ["DeformableDETR", "DETR"]
    assert len(report["rows"]) == 2
    for row in report["rows"]:
        first, second = row["queries"]
        assert first["box"] == row["box"] and first["class"] == row["object"]
        assert (first["kind"], first["keys"]) == ("deformable", 12)
        assert (second["kind"], second["keys"]) == ("dense", 16)
        assert "samples_of_heads" not in second
        points = np.array(first["samples_of_heads"]["x_y"])
        weights = np.array(first["samples_of_heads"]["weights"])
        assert points.shape == (8, 12, 2) and weights.shape == (8, 12)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
        assert np.array(first["map"]["mean_of_heads"]).shape == (8, 8)
        assert first["map"]["cell_width_height"] == [10, 10]  # 8 pixels of the resized image
        dense_map = np.array(second["map"]["mean_of_heads"])
        assert dense_map.shape == (4, 4) and dense_map.sum() == pytest.approx(1, abs=1e-4)
        assert dense_map[3].max() == 0 < dense_map[2].min()
        for entropies in (first, second):
            assert len(entropies["negative_entropy_of_heads"]) == 8


def test_pictures_of_positions(
    visualize: ModuleType,
    trained: dict[str, SimpleNamespace],
    image: Path,
    tmp_path: Path,
) -> None:
    this, out = trained["dense"], tmp_path / "positions.png"
    queries = ("--query", 79, 0, "--query", 21, 45, "--head", 0, 7)
    run(visualize, this.config, this.last, image, "--out", out, *queries)
    report = json.loads(out.with_suffix(".json").read_text())
    # Pixels of the map cover 20 pixels of the image.
    assert [row["queries"][0]["query"] for row in report["rows"]] == [3, 9]
    assert [row["position"] for row in report["rows"]] == [[79, 0], [21, 45]]
    assert [one["name"] for one in report["detectors"]] == ["DETR"]
    assert report["rows"][0]["queries"][0]["layer"] == "encoder.layers.1.self_attn"
    assert cv2.imread(str(out)).shape[1] == 3 * 520
    compare = ("--query", 21, 45, "--compare", this.config, this.run / "epoch_1.pth")
    run(visualize, this.config, this.last, image, "--out", out, *compare)
    report = json.loads(out.with_suffix(".json").read_text())
    assert [one["name"] for one in report["detectors"]] == ["DETR 1", "DETR 2"]
    first, second = report["rows"][0]["queries"]
    assert first["map"] != second["map"]

    other = trained["deformable"]
    compare = ("--query", 21, 45, "--level", 1, "--compare", this.config, this.last)
    run(visualize, other.config, other.last, image, "--out", out, *compare)
    (row,) = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(one["query"], one["level"]) for one in row["queries"]] == [(64 + 9, 1), (9, 0)]


def test_wrong_input_of_pictures_is_refused(
    visualize: ModuleType,
    trained: dict[str, SimpleNamespace],
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    this, other = trained["dense"], trained["deformable"]
    start = (this.config, this.last)
    plain = tmp_path / "plain.py"
    plain.write_text("model = dict(type='mmdet.ResNet', depth=18)")
    torch.save(build_detector(plain).state_dict(), tmp_path / "plain.pth")
    fewer = tmp_path / "fewer.py"
    fewer.write_text(
        other.config.read_text().replace("'disc',", "'circle',").replace('"disc",', '"circle",')
    )
    bare = tmp_path / "bare.pth"  # says nothing of classes, so that the config does
    torch.save(torch.load(other.last, weights_only=False)["state_dict"], bare)
    for arguments, message in (
        ((this.config, tmp_path / "no.pth", image), "no.pth does not exist"),
        ((*start, tmp_path / "no.png"), "no.png does not exist"),
        ((*start, this.config), "is no image that OpenCV can read"),
        ((this.config, other.last, image), "does not fit DETR"),
        ((plain, tmp_path / "plain.pth", image), "ResNet has no attention layer"),
        ((*start, image, "--cfg-options", "test_dataloader=None"), "has no test_dataloader"),
        ((*start, image, "--detections", 0), "--detections must be at least 1, but got 0"),
        ((*start, image, "--query", 80, 3), "80 pixels wide and 50 high, but got 80 3"),
        ((*start, image, "--query", 3, -1), "80 pixels wide and 50 high, but got 3 -1"),
        ((*start, image, "--query", 3, 3, "--level", 1), "level must be below 1, but got 1"),
        ((*start, image, "--head", 8), "head must be between 0 and 7 in decoder.layers.1.cross"),
        ((*start, image, "--compare", fewer, bare), "must have the same classes, got disc"),
        ((*start, image, "--compare", fewer, tmp_path / "no"), "no does not exist"),
    ):
        assert message in refused(visualize, capsys, *arguments)


class View:
    """Two heads; a 2 x 3 map of 10 x 8 pixels, and two samples for each head."""

    size = (30, 16)
    weights = torch.tensor([[[0.1, 0.2, 0.1], [0.3, 0.2, 0.1]], [[0.5, 0.1, 0.1], [0.1, 0.1, 0.1]]])

    def __init__(self, deformable: bool) -> None:
        self.attentions = {"layer": SimpleNamespace(sampling=deformable or None)}

    def attention_map(self, layer: str, query: int) -> SimpleNamespace:
        assert (layer, query) == ("layer", 5)
        return SimpleNamespace(weights=self.weights, cell=(10, 8))

    def samples(self, layer: str, query: int) -> SimpleNamespace:
        points = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])
        return SimpleNamespace(
            in_input=lambda size: points, weights=torch.tensor([[0.25, 0.75], [1.0, 0.0]])
        )


def test_what_panels_show() -> None:
    samples, mean = make_panels(View(True), "layer", 5, (2.0, 4.0), title="it: ", box=(1, 2, 3, 4))
    assert samples.title == "it: samples" and samples.box == mean.box == (1, 2, 3, 4)
    np.testing.assert_allclose(samples.points, [[0.5, 0.5], [1.5, 1], [2.5, 1.5], [3.5, 2]])
    np.testing.assert_allclose(samples.weights, [0.25, 0.75, 1, 0])
    np.testing.assert_allclose(mean.weights, [[0.3, 0.15, 0.1], [0.2, 0.15, 0.1]])
    assert mean.cell == (5, 2) and mean.points is None
    assert mean.title == "it: attention, mean of heads\nlargest = 1.8 x mean"
    samples, head = make_panels(View(True), "layer", 5, (1, 1), heads=[1])
    assert samples.title == "samples of head 1" and samples.points.tolist() == [[5, 6], [7, 8]]
    np.testing.assert_allclose(head.weights, View.weights[1])
    panels = make_panels(View(False), "layer", 5, (1, 1), heads=[1, 0])
    assert [panel.title.split("\n")[0] for panel in panels] == [
        "attention, head 1",
        "attention, head 0",
    ]


def test_what_is_drawn() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    weights = np.array([[0.0, 0.2, 0.4]])
    map = Panel("map", weights, cell=(16.0, 24.0), box=(1, 2, 11, 7))
    samples = Panel("samples", np.array([0.1, 0.4]), points=np.array([[3.0, 4], [5, 6]]))
    rows = [Row("object", [map, samples], box=(0, 2, 12, 8)), Row("p", [map, map], point=(3, 9))]
    axes = np.array(draw_rows(image, rows).axes).reshape(2, 3)
    assert [axis.get_title() for axis in axes[0]] == ["object", "map", "samples"]
    for axis in axes.flat:
        assert axis.get_xlim() == (0, 40) and axis.get_ylim() == (20, 0)
        assert axis.images[0].get_extent() == [0, 40, 20, 0]
    assert axes[0, 1].images[1].get_extent() == [0, 48, 24, 0]  # reaches into the padding
    np.testing.assert_allclose(axes[0, 1].images[1].get_array(), [[0, 0.5, 1]])
    (box,), (own,) = axes[0, 0].patches, axes[0, 1].patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((0, 2), 12, 6)
    assert (own.get_xy(), own.get_width(), own.get_height()) == ((1, 2), 10, 5)
    (circles,) = axes[0, 2].collections
    np.testing.assert_allclose(circles.get_offsets(), [[5, 6], [3, 4]])  # small ones on top
    np.testing.assert_allclose(circles.get_array(), [1, 0.25])
    np.testing.assert_allclose(circles.get_sizes()[1] / circles.get_sizes()[0], 0.25)
    (star,) = axes[1, 0].collections
    np.testing.assert_allclose(star.get_offsets(), [[3, 9]])
