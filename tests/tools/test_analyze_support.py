"""The tool draws what a node depends on and tells the numbers, from three files."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("mmdet")
import cv2

from mmdeform.analysis.detectors import load_detector, load_picture
from mmdeform.analysis.support import output_gradients, query_outputs
from mmdeform.analysis.support.choosing import choose_query

from ..analysis.support_detectors import write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "analyze_support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def faster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("faster"), "faster")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("transformer"), "transformer")


def run(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], *arguments
) -> None:
    command = ["analyze_support.py", *files.values(), *arguments]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
    tool.main()


def test_a_detection(
    tool: ModuleType,
    faster: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out, npz = tmp_path / "new" / "support.png", tmp_path / "arrays" / "support.npz"
    run(
        tool, monkeypatch, faster, "--out", out, "--npz", npz, "--projections", 2, "--cell", 8,
        "--steps", 60, "--samples", 50,
    )  # fmt: skip
    printed = capsys.readouterr()
    assert "node: shared features of the box" in printed.out
    assert f"written: {out}, {out.with_suffix('.json')}, {npz}" in printed.out
    assert all(kind in printed.err for kind in ("erf", "sampling", "saliency"))
    pixels = cv2.imread(str(out))
    assert pixels.shape[1] > 2000 and pixels.std() > 20  # panels one beside the other

    numbers = json.loads(out.with_suffix(".json").read_text())
    assert [numbers[name] for name in ("config", "checkpoint", "image")] == [
        str(path) for path in faster.values()
    ]
    assert set(numbers) >= {"unit", "node", "erf", "sampling", "saliency"}
    assert "detr" not in numbers
    node = numbers["node"]
    x1, y1, x2, y2 = node["box"]
    assert node["box"] == pytest.approx(node["detection"]["box"], abs=1e-3)
    assert node["position"] == pytest.approx([(x1 + x2) / 2 - 0.5, (y1 + y2) / 2 - 0.5], abs=0.01)
    assert node["detection"]["index"] == 0

    arrays = np.load(npz)
    assert arrays["erf"].shape == (60, 90) == arrays["saliency"].shape  # without padding
    erf = arrays["erf"].astype(float)
    assert numbers["erf"]["sum"] == pytest.approx(erf.sum())
    # In pixels of the image, which is smaller by 1.2.
    x = float((erf.sum(0) * np.arange(90)).sum() / erf.sum())
    assert numbers["erf"]["center"][0] == pytest.approx((x + 0.5) / 1.2 - 0.5)
    held = np.sort(erf.ravel())[::-1].cumsum()
    side = ((held < 0.5 * erf.sum()).sum() + 1) ** 0.5 / 1.2
    assert numbers["erf"]["side_of_half"] == pytest.approx(side)
    columns, rows = np.arange(90) + 0.5, np.arange(60) + 0.5
    inside = (columns > x1 * 1.2) & (columns < x2 * 1.2)
    inside = inside & ((rows > y1 * 1.2) & (rows < y2 * 1.2))[:, None]
    assert numbers["erf"]["share_in_box"] == pytest.approx(erf[inside].sum() / erf.sum(), abs=1e-4)
    assert numbers["saliency"]["share_of_image"] == pytest.approx(arrays["saliency"].mean())
    assert numbers["saliency"]["error"] <= numbers["saliency"]["bound"] == 0.1
    assert numbers["saliency"]["images_through_the_network"] <= 60

    sampling = numbers["sampling"]
    names = [layer["layer"] for layer in sampling["layers"]]
    assert names[-1].startswith("roi_head.bbox_roi_extractor.roi_layers.")
    assert names[0] == "backbone.layer3.0.conv2"
    for kind, chosen in (("samples", sampling["layers"][:-1]), ("bins", sampling["layers"][-1:])):
        assert sampling[kind]["drawn"] == len(arrays[f"{kind}_points"])
        assert sampling[kind]["drawn"] == (49 if kind == "bins" else 50)
        strongest = sampling[kind]["strongest"]
        assert len(strongest) == 10
        assert strongest[0]["gradient"] == max(layer["max"] for layer in chosen)
        point = arrays[f"{kind}_points"][0]
        assert strongest[0]["position"] == pytest.approx((point + 0.5) / 1.2 - 0.5)


def test_a_query(
    tool: ModuleType,
    transformer: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "support.png"
    run(tool, monkeypatch, transformer, "--query", 3, "--what", "detr", "sampling", "--layers",
        "decoder.**", "--projections", 1, "--out", out)  # fmt: skip
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert list(numbers["detr"]) == ["x", "y", "w", "h", "c"]
    model = load_detector(transformer["config"], transformer["checkpoint"])
    choice = choose_query(model, load_picture(model, transformer["image"]), 3)
    maps = output_gradients(query_outputs(model, choice.sample, choice.images, 3), choice.images)
    sums = [numbers["detr"][name]["sum"] for name in "xywhc"]
    assert sums == pytest.approx(maps[:, :60, :90].sum((1, 2)).tolist(), rel=1e-4)
    assert min(sums) > 0
    assert numbers["node"]["query"] == 3 and numbers["node"]["detection"] is None
    names = [layer["layer"] for layer in numbers["sampling"]["layers"]]
    assert names == [f"decoder.layers.{index}.cross_attn" for index in (0, 1)]
    assert "erf" not in numbers
    tall = cv2.imread(str(out)).shape
    assert tall[1] > 3000 and tall[0] > 900  # two rows, five panels in the second


def test_a_pixel(
    tool: ModuleType, faster: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "support.png"
    run(tool, monkeypatch, faster, "--at", 40, 25, "--node", "neck", "--output", 1, "--what", "erf",
        "--projections", 1, "--out", out)  # fmt: skip
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["node"]["position"] == pytest.approx([40, 25], abs=4)
    assert numbers["node"]["box"] is None and "share_in_box" not in numbers["erf"]


def test_where_nothing_is_sampled(
    tool: ModuleType, faster: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a node does not have is left out, unless it is asked for."""
    out = tmp_path / "support.png"
    run(tool, monkeypatch, faster, "--at", 40, 25, "--node", "backbone.layer1", "--steps", 20,
        "--projections", 1, "--out", out)  # fmt: skip
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert {"erf", "saliency"} == set(numbers) & {"erf", "sampling", "saliency", "detr"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detection", "99"], "detection must be from 0 to"),
        (["--at", "80", "20"], "75 pixels wide and 50 high, got (80, 20)"),
        (["--at", "8", "20", "--node", "nek"], "FasterRCNN has no module 'nek'"),
        (["--what", "detr"], "detr needs a query of a detection transformer"),
        (["--what", "nothing"], "invalid choice: 'nothing'"),
        (["--what", "sampling", "--layers", "nek.*"], "'nek.*' matches no deformable layer"),
        (["--at", "8", "8", "--node", "backbone.layer1", "--what", "sampling"],
         "no deformable layer that ** selects runs before the node"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--at", "8", "8", "--query", "1"], "not allowed with argument --at"),
    ],
)  # fmt: skip
def test_bad_input_is_told(
    tool: ModuleType,
    faster: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(tool, monkeypatch, faster, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_there(
    tool: ModuleType,
    faster: dict[str, Path],
    transformer: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for files, message in (
        (dict(faster, image=Path("nowhere.png")), "nowhere.png does not exist"),
        (dict(faster, checkpoint=transformer["checkpoint"]), "does not fit FasterRCNN"),
        (dict(faster, image=faster["config"]), "no image that OpenCV can read"),
    ):
        with pytest.raises(SystemExit) as exit:
            run(tool, monkeypatch, files)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
