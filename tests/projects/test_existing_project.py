"""Somebody's own project on mmdet (tests/projects/orchard) takes up mmdeform by its configs alone.

The project is copied out of this repository and run as its owner would: by mmdet's own tools, by
mim, and by `DetInferencer`.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
import cv2
import mmdet
import numpy as np

from ..conftest import has_kernels
from .conftest import ROOT

MMDET_TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"
STOCK = "configs/faster-rcnn_dcn_orchard.py"
ACCELERATED = "configs/faster-rcnn_dcn_accelerated_orchard.py"
INHERITED = "configs/mask-rcnn_mdconv_orchard.py"
INHERITED_ANYWHERE = "configs/mask-rcnn_mdconv_accelerated_orchard.py"
pytestmark = pytest.mark.slow


def make_data(folder: Path) -> None:
    """Six images of discs on grass, in COCO format: four to train on, two to validate on."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    angles = np.arange(16) * math.pi / 8
    categories = [dict(id=1, name="apple"), dict(id=2, name="plum")]
    for name, count in (("train", 4), ("val", 2)):
        images, annotations = [], []
        for index in range(count):
            picture = np.full((128, 128, 3), (40, 120, 60), np.uint8)
            file_name = f"{name}_{index}.png"
            images.append(dict(id=index, file_name=file_name, width=128, height=128))
            for kind in (1, 2):
                x, y = random.uniform(30, 98, 2)
                radius = random.uniform(10, 25)
                color = (30, 30, 200) if kind == 1 else (160, 40, 90)
                cv2.circle(picture, (round(x), round(y)), round(radius), color, -1)
                outline = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
                annotations.append(
                    dict(
                        id=len(annotations) + 1, image_id=index, category_id=kind, iscrowd=0,
                        bbox=[x - radius, y - radius, 2 * radius, 2 * radius],
                        area=math.pi * radius**2, segmentation=[outline.ravel().tolist()],
                    )
                )  # fmt: skip
            cv2.imwrite(str(folder / "images" / file_name), picture)
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / f"{name}.json").write_text(json.dumps(content))


def run(project: Path, *command: str | Path, status: int = 0, home: Path = ROOT, **env: str) -> str:
    """Runs a command in the project's folder with mmdeform from ``home``; returns its output."""
    if has_kernels("cpu"):
        env["MMDEFORM_REQUIRE_EXT"] = "1"  # an error where a kernel is missing
    result = subprocess.run(
        [str(word) for word in command],
        cwd=project,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{project}{os.pathsep}{home}",
            **env,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def train(project: Path, config: str, *arguments: str, **options) -> str:
    return run(project, sys.executable, MMDET_TOOLS / "train.py", config, *arguments, **options)


def work_dir(project: Path, config: str) -> Path:
    return project / "work_dirs" / Path(config).stem


def records(project: Path, config: str) -> list[dict]:
    """All that the runs of a config logged, oldest first."""
    logs = sorted(work_dir(project, config).glob("*/vis_data/scalars.json"))
    assert logs
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def first_loss(project: Path, config: str) -> float:
    return next(record["loss"] for record in records(project, config) if "loss" in record)


def operators(output: str) -> dict[str, int]:
    """What the project's KernelReportHook wrote."""
    line = next(line for line in output.splitlines() if "operators of mmdeform: " in line)
    return json.loads(line.partition("operators of mmdeform: ")[2].replace("'", '"'))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somewhere") / "orchard"
    shutil.copytree(Path(__file__).parent / "orchard", folder)
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def stock(project: Path) -> str:
    """Output of an epoch without mmdeform."""
    return train(project, STOCK, "--cfg-options", "train_cfg.max_epochs=1")


@pytest.fixture(scope="module")
def accelerated(project: Path) -> tuple[str, str]:
    """Output of two epochs with mmdeform: until the power cut, and from the resume to the end."""
    before = train(project, ACCELERATED, status=9, POWER_CUT="1")
    assert not (work_dir(project, ACCELERATED) / "epoch_2.pth").exists()
    return before, train(project, ACCELERATED, "--resume")


@pytest.fixture(scope="module")
def checkpoint(project: Path, accelerated: tuple[str, str]) -> Path:
    return work_dir(project, ACCELERATED) / "epoch_2.pth"


def test_one_line_changes_the_kernels_and_not_the_loss(
    project: Path, stock: str, accelerated: tuple[str, str]
) -> None:
    assert operators(stock) == {}
    found = operators(accelerated[0])
    assert found["mmdeform::deform_conv2d"] == 13  # the 3x3 convolutions of the last three stages
    assert found["mmdeform::deform_conv2d_backward"] == 13
    loss = first_loss(project, STOCK)
    assert 0 < loss < 100
    assert abs(first_loss(project, ACCELERATED) - loss) < 1e-4


def test_training_goes_on_after_a_power_cut(
    project: Path, accelerated: tuple[str, str], checkpoint: Path
) -> None:
    before, after = accelerated
    assert "Epoch(train) [1][2/2]" in before and "Epoch(train) [2]" not in before
    assert "resumed epoch: 1, iter: 2" in after
    assert "Epoch(train) [2][2/2]" in after and "Epoch(train) [1]" not in after
    steps = [record["step"] for record in records(project, ACCELERATED) if "loss" in record]
    assert steps == [1, 2, 3, 4]
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    assert state["meta"]["epoch"] == 2 and state["meta"]["dataset_meta"]["classes"][0] == "apple"
    assert "neck.scale.weight" in state["state_dict"]
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_both_validate(project: Path, stock: str, accelerated: tuple[str, str]) -> None:
    for config, epochs in ((STOCK, 1), (ACCELERATED, 2)):
        metrics = [record for record in records(project, config) if "coco/bbox_mAP" in record]
        assert len(metrics) == epochs
        assert all(0 <= record["coco/bbox_mAP_50"] <= 1 for record in metrics)


def test_test_tool_writes_metrics(project: Path, checkpoint: Path) -> None:
    tool = MMDET_TOOLS / "test.py"
    run(project, sys.executable, tool, ACCELERATED, checkpoint, "--work-dir", "tested")
    report = json.loads(next((project / "tested").glob("*/*.json")).read_text())
    validated = [record for record in records(project, ACCELERATED) if "coco/bbox_mAP" in record]
    for key in ("coco/bbox_mAP", "coco/bbox_mAP_50"):
        assert 0 <= report[key] <= 1
        assert abs(report[key] - validated[-1][key]) <= 1e-3


def test_inferencer_draws_on_what_training_saved(project: Path, checkpoint: Path) -> None:
    code = (
        "import sys; from mmdet.apis import DetInferencer;"
        "detect = DetInferencer(sys.argv[1], sys.argv[2], device='cpu', show_progress=False);"
        "result = detect('data/images/val_0.png', pred_score_thr=0.0)['predictions'][0];"
        "print('boxes', len(result['bboxes']), detect.visualizer.dataset_meta['classes'])"
    )
    saved = work_dir(project, ACCELERATED) / Path(ACCELERATED).name  # as training wrote it
    output = run(project, sys.executable, "-c", code, saved, checkpoint)
    assert "boxes " in output and "('apple', 'plum')" in output


@pytest.fixture(scope="module")
def inherited(project: Path, request: pytest.FixtureRequest) -> str:
    """Output of an epoch of a config with ``_base_ = 'mmdeform::...'``; by mim, if present."""
    if importlib.util.find_spec("mim") is None:
        return run(project, sys.executable, ROOT / "tools/train.py", INHERITED)
    mim = [sys.executable, "-m", "mim", "train", "mmdeform"]
    output = run(project, *mim, INHERITED, home=request.getfixturevalue("site"))
    assert "Training finished successfully" in output
    return output


def test_configs_of_mmdeform_can_be_inherited(project: Path, inherited: str) -> None:
    found = operators(inherited)
    assert found["mmdeform::deform_conv2d"] == 13
    metrics = [record for record in records(project, INHERITED) if "coco/segm_mAP" in record]
    assert len(metrics) == 1
    state = torch.load(work_dir(project, INHERITED) / "epoch_1.pth", weights_only=True)
    assert state["meta"]["epoch"] == 1


def test_by_a_script_that_does_not_know_mmdeform(project: Path, inherited: str) -> None:
    output = train(project, INHERITED_ANYWHERE, "--cfg-options", "train_cfg.val_interval=2")
    assert operators(output)["mmdeform::deform_conv2d"] == 13
    loss = first_loss(project, INHERITED)
    assert 0 < loss < 100
    assert abs(first_loss(project, INHERITED_ANYWHERE) - loss) < 1e-4
