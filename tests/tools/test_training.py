"""mmdet's train.py, test.py and DetInferencer on a plugin config, from the data to the picture."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes.py"
OPTIONS = [
    "train_dataloader.batch_size=2",
    "train_cfg.val_interval=1",
    "default_hooks.logger.interval=1",
    # The parts of the detector that cost time and are not what is tested.
    "model.train_cfg.rpn_proposal.nms_pre=50",
    "model.test_cfg.rpn.nms_pre=50",
]
pytestmark = pytest.mark.slow


def run(folder: Path, *command: str | Path, ok: bool = True, **env: str) -> str:
    """Runs a command in ``folder`` and returns what it printed."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=dict(os.environ, OMP_NUM_THREADS="1", **env),
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) is ok, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def train(folder: Path, epochs: int, *arguments: str) -> str:
    options = [*OPTIONS, f"train_cfg.max_epochs={epochs}"]
    command = [sys.executable, ROOT / "tools/train.py", CONFIG, "--work-dir", "work"]
    return run(folder, *command, *arguments, "--cfg-options", *options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with ``data/shapes`` (4 + 2 images) and one trained epoch in ``work``."""
    folder = tmp_path_factory.mktemp("training")
    tool = ROOT / "tools/make_shapes.py"
    run(folder, sys.executable, tool, "data/shapes", "--train", "4", "--val", "2")
    train(folder, 1)
    return folder


def test_training_evaluates_and_saves(folder: Path) -> None:
    log = next((folder / "work").glob("*/vis_data/scalars.json")).read_text()
    records = [json.loads(line) for line in log.splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    metrics = next(record for record in records if "coco/bbox_mAP" in record)
    assert {"coco/bbox_mAP_50", "coco/segm_mAP", "coco/segm_mAP_50"} <= set(metrics)
    assert (folder / "work" / "epoch_1.pth").is_file()


def test_checkpoint_is_readable_and_ours(folder: Path) -> None:
    import mmdeform  # noqa: F401  (allows the types that mmengine stores)

    checkpoint = torch.load(folder / "work" / "epoch_1.pth", weights_only=True)
    assert "train/loss" in checkpoint["message_hub"]["log_scalars"]
    offsets = [name for name in checkpoint["state_dict"] if name.endswith("conv_offset.weight")]
    assert len(offsets) == 13


def test_resume_goes_on_at_the_second_epoch(folder: Path) -> None:
    output = train(folder, 2, "--resume")
    assert "resumed epoch: 1, iter: 2" in output
    assert "Epoch(train) [2][2/2]" in output and "Epoch(train) [1]" not in output
    checkpoint = torch.load(folder / "work" / "epoch_2.pth", weights_only=True)
    assert checkpoint["meta"]["epoch"] == 2


def test_test_tool_prints_coco_metrics(folder: Path) -> None:
    checkpoint = (folder / "work" / "last_checkpoint").read_text()
    command = [sys.executable, ROOT / "tools/test.py", CONFIG, checkpoint, "--work-dir", "tested"]
    output = run(folder, *command)
    assert "coco/bbox_mAP_50" in output and "coco/segm_mAP_50" in output
    report = json.loads(next((folder / "tested").glob("*/*.json")).read_text())
    assert 0 <= report["coco/bbox_mAP_50"] <= 1


def test_inferencer_loads_config_and_checkpoint(folder: Path) -> None:
    # A process of its own, which does not import mmdeform before the config does.
    checkpoint = (folder / "work" / "last_checkpoint").read_text()
    code = (
        "import sys; from mmdet.apis import DetInferencer;"
        "detector = DetInferencer(sys.argv[1], sys.argv[2], device='cpu', show_progress=False);"
        "result = detector(sys.argv[3], pred_score_thr=0.0);"
        "print('boxes', len(result['predictions'][0]['bboxes']))"
    )
    image = next((folder / "data/shapes/val").glob("*.jpg"))
    output = run(folder, sys.executable, "-c", code, CONFIG, checkpoint, image)
    assert int(output.split("boxes ")[1].split()[0]) >= 0


def test_picture_of_the_sampling_points(folder: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    checkpoint = (folder / "work" / "last_checkpoint").read_text()
    command = [sys.executable, ROOT / "tools/visualize_sampling.py", CONFIG, checkpoint]
    output = run(folder, *command, "--out", "a/sampling.png", "--score", "0", "--images", "2")
    assert "written: a/sampling.png (convolution: backbone.layer2.1.conv2, " in output
    picture = cv2.imread(str(folder / "a" / "sampling.png"))
    assert picture.shape[1] > 4 * 160 and picture.std() > 10
    crosses = (picture[..., 1] > 180) & (picture[..., 0] < 80) & (picture[..., 2] < 80)
    assert crosses.sum() > 6 * 20  # a green cross in each of the 2 x 3 panels with points

    output = run(folder, *command, "--score", "1.1", ok=False)
    assert "detects two objects with a score of 1.1 in no image" in output
    output = run(folder, *command, "--score", "0", "--layers", "neck", ok=False)
    assert "'neck' matches no deformable layer of MaskRCNN" in output


def test_two_processes_train_on_the_cpu(folder: Path) -> None:
    with_port = dict(PORT="29541", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = [*OPTIONS, "train_cfg.max_epochs=1", "train_dataloader.batch_size=1"]
    command = ["bash", ROOT / "tools/dist_train.sh", CONFIG, "2", "--work-dir", "distributed"]
    if torch.cuda.is_available():
        with_port["CUDA_VISIBLE_DEVICES"] = ""
    output = run(folder, *command, "--cfg-options", *options, **with_port)
    assert "uses the backend 'gloo' instead of 'nccl'" in output
    assert "GPU number: 2" in output and "Epoch(train) [1][2/2]" in output
    checkpoint = torch.load(folder / "distributed" / "epoch_1.pth", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_missing_mmdet_is_explained(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['mmdet'] = None;"
        "sys.argv = [sys.argv[1]]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    output = run(tmp_path, sys.executable, "-c", code, ROOT / "tools/train.py", ok=False)
    assert "train.py: mmdet is not installed; install it with: pip install mmdet==3.3.0" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh"])
def test_shell_scripts_explain_their_arguments(tmp_path: Path, script: str) -> None:
    output = run(tmp_path, "bash", ROOT / "tools" / script, ok=False)
    assert f"{script} CONFIG" in output


def test_found_tool_is_mmdets_own() -> None:
    spec = importlib.util.spec_from_file_location("mmdet_tool", ROOT / "tools/mmdet_tool.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "Runner.from_cfg(cfg)" in module.find_mmdet_tool("train.py").read_text()
    with pytest.raises(FileNotFoundError, match=r"has no tool 'no\.py': looked for"):
        module.find_mmdet_tool("no.py")
