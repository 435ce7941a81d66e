"""The coverage tool finds every operator in mmdet's configs and in those of a project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
import mmcv.ops
import mmdet
from torch import nn

from mmdeform import coverage
from mmdeform.coverage import Entry, Use
from mmdeform.coverage.__main__ import main
from mmdeform.coverage.operators import count_uses, operators_in_source

CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"


def inspect(*files: str) -> list[Entry]:
    return coverage.inspect_all([CONFIGS / file for file in files], CONFIGS, 2, lambda entry: None)


def test_mmdet() -> None:
    attention, convolution, pooling = "ms_deform_attn", "deform_conv2d", "deform_roi_pool"
    attention_class = "MultiScaleDeformableAttention"
    expected = [
        Entry(
            "cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py",
            "RPN",
            "in parts",
            "TypeError: CascadeRPNHead.__init__() missing 1 required positional argument: "
            "'num_classes'",
            (Use(convolution, "StageCascadeRPNHead", 2),),
        ),
        Entry("common/ms_3x_coco.py", status="no model"),
        Entry(
            "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py",
            "FasterRCNN",
            uses=(Use(pooling, "DeformRoIPoolPack", 4, by_type=4),),
        ),
        Entry(
            "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
            "MaskRCNN",
            uses=(Use(convolution, "ModulatedDeformConv2dPack", 13, by_type=13),),
            roi_align=8,
        ),
        Entry(
            "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
            "DeformableDETR",
            uses=(Use(attention, attention_class, 12, by_type=12),),
        ),
        Entry(
            "detectors/cascade-rcnn_r50-sac_1x_coco.py",
            "CascadeRCNN",
            uses=(Use(convolution, "SAConv2d", 13),),
            roi_align=12,
        ),
        Entry(
            "dino/dino-4scale_r50_8xb2-12e_coco.py",
            "DINO",
            uses=(Use(attention, attention_class, 12),),
        ),
        Entry(
            "glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py",
            "GLIP",
            uses=(Use(convolution, "ModulatedDeformConv2d", 18),),
        ),
        Entry(
            "grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py",
            "GroundingDINO",
            uses=(Use(attention, attention_class, 12),),
        ),
        Entry("retinanet/retinanet_r50_fpn_1x_coco.py", "RetinaNet"),
        Entry(
            "timm_example/retinanet_timm-tv-resnet50_fpn_1x_coco.py",
            "RetinaNet",
            "in parts",
            "ModuleNotFoundError: No module named 'mmpretrain'",
        ),
        Entry(
            "tood/tood_r101-dconv-c3-c5_fpn_ms-2x_coco.py",
            "TOOD",
            uses=(
                Use(convolution, "ModulatedDeformConv2dPack", 32, by_type=30),
                Use(convolution, "TOODHead", 1),
            ),
        ),
    ]
    assert inspect(*(entry.file for entry in expected)) == expected


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The configs of a project, some of which are broken in their own way."""
    configs = tmp_path / "configs"
    (configs / "_base_").mkdir(parents=True)
    (configs / "mine").mkdir()
    (tmp_path / "my_head.py").write_text(
        "from mmcv import ops\n"
        "from mmengine.registry import MODELS\n"
        "from torch import nn\n"
        "@MODELS.register_module()\n"
        "class MyHead(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return [ops.modulated_deform_conv2d(f) for f in x]\n"
    )
    (tmp_path / "my_crash.py").write_text("import os\nos.abort()\n")
    head = "custom_imports = dict(imports=['my_head'])\n"
    for name, text in {
        "_base_/never.py": "raise SystemExit('not a config of its own')",
        "mine/broken.py": "model = dict(type='MyHead'",
        "mine/dies.py": "custom_imports = dict(imports=['my_crash'])\nmodel = dict(type='A')\n",
        "mine/exits.py": "raise SystemExit(3)\n",
        "mine/lacks.py": "custom_imports = dict(imports=['no_such_package'])\n"
        "model = dict(type='RetinaNet', backbone=dict(type='no_such_package.Net'),\n"
        "    neck=dict(type='FPN', in_channels=[8], out_channels=8, num_outs=1,\n"
        "        conv_cfg=dict(type='DCNv2')))\n",
        "mine/head.py": head + "model = dict(type='mmengine.MyHead')\n",
        "ours.py": "custom_imports = dict(imports=['mmdeform'])\n"
        "model = dict(type='mmdeform.DCNv4', in_channels=16, out_channels=16, kernel_size=3)\n",
    }.items():
        (configs / name).write_text(text)
    return configs


def test_project(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    command = ["-m", "mmdeform.coverage", "--configs", str(project), "--jobs", "1"]
    result = subprocess.run(
        [sys.executable, *command, "--json", str(output)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # where the project's own packages lie
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    found = {entry["file"]: entry for entry in report["configs"]}
    assert list(found) == sorted(found)
    assert {file: entry["status"] for file, entry in found.items()} == {
        "mine/broken.py": "fails",
        "mine/dies.py": "fails",
        "mine/exits.py": "fails",
        "mine/head.py": "builds",
        "mine/lacks.py": "in parts",
        "ours.py": "builds",
    }
    for file, cause in {
        "mine/broken.py": "cannot be read: SyntaxError",
        "mine/dies.py": "its process ended with exit status -6",
        "mine/exits.py": "cannot be read: SystemExit: 3",
        "mine/lacks.py": "ModuleNotFoundError: No module named 'no_such_package'",
    }.items():
        assert found[file]["cause"].startswith(cause)
    uses = {file: entry["uses"] for file, entry in found.items() if entry["uses"]}
    assert uses == {
        "mine/head.py": [dict(operator="deform_conv2d", module="MyHead", count=1, by_type=0)],
        "mine/lacks.py": [
            dict(operator="deform_conv2d", module="ModulatedDeformConv2dPack", count=2, by_type=2)
        ],
        "ours.py": [dict(operator="dcnv4", module="DCNv4", count=1, by_type=1)],
    }
    assert set(report["kernels"]) == {"deform_conv2d", "dcnv4"}
    # The tables go to stdout.
    assert "- **3 touch a deformable operator.**" in result.stdout
    assert "| mine/head.py | MyHead | yes | 1 MyHead | accelerate |" in result.stdout
    assert "| ours.py | DCNv4 | yes | 1 DCNv4 | type |" in result.stdout
    assert str(tmp_path) not in result.stdout.partition("\n\n## ")[2]


def test_functions_are_found_however_they_are_called() -> None:
    class Calls(nn.Module):
        def forward(self, x):
            return [mmcv.ops.deform_conv2d(y, y, y) for y in x]

    class Inherits(Calls):
        pass

    class Innocent(nn.Module):
        def forward(self, x):
            return mmcv.ops.nms(x)

    assert count_uses([Inherits(), Innocent(), nn.Conv2d(1, 1, 1)]) == {
        ("deform_conv2d", "Inherits"): 1
    }


def test_source_of_what_does_not_build() -> None:
    from mmdet.models import dense_heads, necks

    assert operators_in_source(necks.DyHead) == {"deform_conv2d"}
    assert operators_in_source(dense_heads.TOODHead) == {"deform_conv2d"}
    assert operators_in_source(necks.FPN) == set()


def test_switchable_convolution_without_offsets() -> None:
    layers = [mmcv.ops.SAConv2d(4, 4, 3, use_deform=use) for use in (True, False)]
    assert count_uses(layers) == {("deform_conv2d", "SAConv2d"): 1}


def test_kernels(monkeypatch) -> None:
    from mmdeform.coverage import report

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert report.kernel("dcnv3", "cpu") == "reference"
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    assert report.kernel("dcnv3", "cpu") == "compiled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--jobs", "many"], "invalid int value"),
        (["--configs", "no/such/folder"], "expected a folder, got no/such/folder"),
        (["--filter", "no-such-config"], "no config in"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 1
    assert message in capsys.readouterr().err
