"""The tool that tells what the model of a config costs."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("mmdet")
import cv2
from matplotlib import pyplot as plt
from mmengine import Config
from torch import nn

from mmdeform.analysis.complexity import complexity

from ..analysis.small_mask_rcnn import MASK_RCNN, PER_BOX

ROOT = Path(__file__).parents[2]
BACKBONE = dict(type="mmdet.ResNet", depth=18, base_channels=8, stem_channels=8)
PIPELINE = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(90, 50), keep_ratio=True)]
DETECTOR = dict(
    default_scope="mmdet",
    model=MASK_RCNN,
    test_dataloader=dict(dataset=dict(pipeline=PIPELINE)),
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_flops", ROOT / "tools" / "get_flops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without a folder are written to one of the test."""
    monkeypatch.chdir(tmp_path)


def write(folder: Path, **settings) -> Path:
    path = folder / "config.py"
    Config(settings).dump(path)
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("detector"), **DETECTOR)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("backbone"), model=BACKBONE)


def run(tool: ModuleType, *arguments) -> None:
    tool.main([str(argument) for argument in arguments])


def test_a_detector(tool: ModuleType, detector: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "cost.json"
    _, model = tool.build_model(detector, None, None)
    checkpoint = tmp_path / "epoch_1.pth"
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    run(tool, detector, checkpoint, "--out", out, "--proposals", 7, "--latency", 2, "--depth", 1)
    report = json.loads(out.read_text())
    assert report["config"] == str(detector) and report["checkpoint"] == str(checkpoint)
    assert (report["model"], report["mode"], report["device"]) == ("MaskRCNN", "tensor", "cpu")
    assert (report["image_shape"], report["network_input_shape"]) == ([50, 90], [64, 96])
    assert report["proposals"] == 7
    assert set(report["rois"].values()) == {7}
    modules = {module["name"]: module for module in report["modules"]}
    head = modules["roi_head.bbox_head"]
    assert (head["type"], head["macs"]) == ("Shared2FCBBoxHead", 7 * PER_BOX)
    assert head["by_operator"] == {"aten.addmm": dict(flops=14 * PER_BOX, macs=7 * PER_BOX)}
    parts = ("backbone", "neck", "rpn_head", "roi_head")
    assert report["flops"] == sum(modules[name]["flops"] for name in parts) > 0
    assert report["macs"] == report["flops"] // 2
    for split in ("by_operator", "by_kind"):
        assert sum(entry["flops"] for entry in report[split].values()) == report["flops"]
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["trainable_parameters"] == trainable < report["parameters"]  # a frozen stem
    layers = [layer["name"] for layer in report["deformable_layers"]]
    assert layers == [f"backbone.layer2.{block}.conv2" for block in range(4)]
    times = report["latency_ms"]
    assert len(times["runs"]) == 2
    assert times["first_quartile"] <= times["median"] <= times["third_quartile"]
    assert report["weight_bytes"] > 4 * report["parameters"]
    assert "peak_bytes_beyond_weights" in report
    assert report["environment"]["torch"] == torch.__version__
    assert cv2.imread(str(out.with_suffix(".png"))).shape[1] == 8 * tool.DPI

    output = " ".join(capsys.readouterr().out.split())
    gmacs = f"{report['macs'] / 1e9:.2f} GMACs = {report['flops'] / 1e9:.2f} GFLOPs"
    assert f"MaskRCNN, image of 50 x 90 (padded to 64 x 96): {gmacs}" in output
    assert f"roi_head StandardRoIHead {modules['roi_head']['macs'] / 1e9:.4f}" in output
    assert "boxes given to the RoI heads: 7 " in output
    assert "features pooled for RoIs: 7 in roi_head.bbox_roi_extractor, 7 in roi" in output
    assert "bbox_head" not in output.partition("operator")[0]  # --depth 1
    assert "latency (cpu, threads: " in output and "2 runs" in output
    assert f"written to {out} and {out.with_suffix('.png')}" in output
    assert "not counted, no formula" not in output
    assert "no checkpoint" not in output


def test_bars(tool: ModuleType) -> None:
    branch = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(30, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), branch)
    result = complexity(model, torch.zeros(1, 3, 2, 3))
    macs = dict(first=6 * 12, conv=6 * 20, linear=60)
    figure = tool.make_figure(result, "title", depth=1)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
    bars = {
        container.get_label(): [bar.get_x() * 1e9 for bar in container]
        + [bar.get_width() * 1e9 for bar in container]
        for container in axis.containers
    }
    assert bars["convolution"] == pytest.approx([0, 0, macs["first"], macs["conv"]])
    assert bars["matrix product"] == pytest.approx([72, 120, 0, macs["linear"]])
    assert set(bars) == {"convolution", "matrix product"}
    shares = [text.get_text() for text in axis.texts]
    assert shares == [f"{72 / 252:.1%}", f"{180 / 252:.1%}"]
    assert axis.get_xlim() == pytest.approx((0, 1.12 * 180e-9))
    assert figure.get_suptitle() == "title"
    plt.close(figure)
    figure = tool.make_figure(result, "title", depth=2)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "1.0", "1.2"]
    plt.close(figure)


def test_a_prediction_names_what_is_not_counted(
    tool: ModuleType, detector: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "cost.json"
    run(tool, detector, "--shape", 64, 96, "--mode", "predict", "--out", out)
    report = json.loads(out.read_text())
    assert report["proposals"] is None
    assert report["image_shape"] == report["network_input_shape"] == [64, 96]
    calls = report["calls_not_counted"]["mmcv.nms"]
    output = capsys.readouterr().out
    assert f"mmcv.nms ({calls} calls)" in output
    boxes = report["rois"]["roi_head.bbox_roi_extractor"]
    assert f"features pooled for RoIs: {boxes} in roi_head.bbox_roi_extractor" in output
    assert "boxes given" not in output
    assert "latency" not in output and "latency_ms" not in report


def test_a_backbone_without_computing_anything(
    tool: ModuleType, backbone: Path, tmp_path: Path
) -> None:
    reports = []
    for device in ("cpu", "meta"):
        out = tmp_path / f"{device}.json"
        run(tool, backbone, "--shape", 64, 32, "--device", device, "--out", out)
        report = json.loads(out.read_text())
        assert report.pop("device") == device
        reports.append(report | dict(environment=None))
    elementary = "calls_of_elementary_operators_not_counted"
    for report in reports:
        assert report.pop(elementary)  # norms have another name there
    assert reports[0] == reports[1]
    modules = {module["name"]: module for module in reports[0]["modules"]}
    assert modules["conv1"]["macs"] == 32 * 16 * 8 * 3 * 49
    assert (reports[0]["model"], reports[0]["proposals"]) == ("ResNet", None)


def test_options_change_the_model(tool: ModuleType, backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    options = ("--cfg-options", "model.stem_channels=16")
    run(tool, backbone, "--shape", 64, 32, "--device", "meta", "--out", out, *options)
    (conv1,) = (m for m in json.loads(out.read_text())["modules"] if m["name"] == "conv1")
    assert conv1["macs"] == 32 * 16 * 16 * 3 * 49


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "steps of its test pipeline: none); give one"),
        (("--shape", 64, 0), "--shape: expected a positive number, got 0"),
        (("--latency", 0), "--latency: expected a positive number, got 0"),
        (("--depth", -1), "--depth: expected a positive number, got -1"),
        (("--proposals", 0), "--proposals: expected a positive number, got 0"),
        (("--shape", 64, 32, "--proposals", 5), "ResNet has no RPN"),
        (("--shape", 64, 32, "--mode", "predict"), "ResNet is a plain module"),
        (("--mode", "predict", "--proposals", 5), "the RPN decides"),
        (("--device", "toaster"), "--device: expected cpu, cuda, cuda:N or meta, got toaster"),
        (("--device", "meta", "--latency", 5), "nothing is computed on the device meta"),
        (("--out", "cost.txt"), "--out: expected a name that ends in .json, got cost.txt"),
        (("--cfg-options", "model.type=Nonsense"), "its model cannot be built: KeyError"),
        (("--shape", 64, 32, "--cfg-options", "model.stem_channels=-1"), "cannot be built"),
    ],
)
def test_wrong_options_are_refused(
    tool: ModuleType, backbone: Path, capsys, arguments, message: str
) -> None:
    if not {"--shape", "--cfg-options"} & set(arguments) and "predict" in arguments:
        arguments = ("--shape", 64, 32, *arguments)
    assert_refused(tool, capsys, message, backbone, *arguments)


def assert_refused(tool: ModuleType, capsys, message: str, *arguments) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tool, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tool: ModuleType, backbone: Path, capsys) -> None:
    assert_refused(tool, capsys, "--device cuda: no GPU", backbone, "--device", "cuda")


def test_models_that_do_not_run_are_refused(
    tool: ModuleType, detector: Path, backbone: Path, capsys
) -> None:
    message = "MaskRCNN does not run on meta in mode tensor with an image of 50 x 90"
    assert_refused(tool, capsys, message, detector, "--device", "meta")
    options = ("--shape", 64, 32, "--cfg-options", "model.in_channels=4")
    message = "ResNet does not run on cpu in mode tensor with an image of 64 x 32: RuntimeError"
    assert_refused(tool, capsys, message, backbone, *options)


def test_files_that_do_not_fit_are_refused(
    tool: ModuleType, backbone: Path, tmp_path: Path, capsys
) -> None:
    missing = tmp_path / "missing.py"
    assert_refused(tool, capsys, "missing.py does not exist", missing)
    assert_refused(tool, capsys, "missing.py does not exist", backbone, missing)
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(")
    assert_refused(tool, capsys, "broken.py cannot be read: SyntaxError", broken)
    assert_refused(tool, capsys, "is no checkpoint of the model", backbone, broken)
    broken.write_text("custom_imports = dict(imports=['nonsense'])\nmodel = dict()")
    assert_refused(tool, capsys, "cannot be read: ImportError", broken)
    empty = tmp_path / "empty.py"
    empty.write_text("lr = 1")
    assert_refused(tool, capsys, "empty.py has no model", empty)
    _, model = tool.build_model(backbone, None, None)
    state = model.state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "part.pth")
    message = "lacks 1 weights of the model, layer2.0.conv1.weight first"
    assert_refused(tool, capsys, message, backbone, tmp_path / "part.pth", "--shape", 64, 32)
