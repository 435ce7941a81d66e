"""What holds for all backbones."""

import subprocess
import sys

import pytest

pytest.importorskip("mmcv.ops")


def test_work_without_mmdet() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mmdet' else find(name, *a)\n"
        "import torch; from mmengine.registry import MODELS\n"
        "for kind, channels in ('DAT', 96), ('InternImage', 64), ('FlashInternImage', 64):\n"
        "    model = MODELS.build(dict(type=f'mmdeform.{kind}', arch='tiny', out_indices=(0,)))\n"
        "    assert model(torch.zeros(1, 3, 32, 32))[0].shape == (1, channels, 8, 8)\n"
        "assert not any(name.startswith('mmdet.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
