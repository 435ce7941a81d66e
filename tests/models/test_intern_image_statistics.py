"""The backbones against figures of the public code.

`data/intern_image_statistics.json` holds, of OpenGVLab/InternImage and OpenGVLab/DCNv4: for each
published size the parameters of backbone and classifier, and CRC-32 of the names and shapes in
their state dicts; and what short models of these sizes compute in fp64, with the parameters of
`fill_parameters` and the images `uniform("image", (N, 3, H, W))`: `statistics` of each map and the
logits of 5 classes. The public DCNv3 was its own composition of `grid_sample`, with reference
points in fp64, and so was DCNv4, whose kernel runs on GPUs alone: offsets and weights taken apart
as the public InternImage puts them together for it.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmdeform.registry import MODELS

from .backbones import count
from .deterministic import fill_parameters, statistics, uniform

PUBLIC: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "intern_image_statistics.json").read_text()
)
TOLERANCE = 1e-11  # of figures of order 1, in fp64


def build(kind: str, **options: Any) -> nn.Module:
    return MODELS.build(dict(type=f"mmdeform.{kind}", **options))


def layout(state: dict[str, Tensor]) -> int:
    """CRC-32 of the names and shapes."""
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    return zlib.crc32("\n".join(lines).encode())


@pytest.mark.parametrize("name", PUBLIC["sizes"])
def test_published_sizes(name: str) -> None:
    kind, arch = name.split()
    expected = PUBLIC["sizes"][name]
    for role, options in (("backbone", {}), ("classifier", dict(num_classes=1000))):
        with torch.device("meta"):
            model = build(kind, arch=arch, **options)
        assert count(model) == expected[role]
        assert layout(model.state_dict()) == expected[f"{role}_layout"]


@pytest.mark.parametrize("name", PUBLIC["figures"])
def test_short_models_compute_what_the_public_code_computes(name: str) -> None:
    case = PUBLIC["figures"][name]
    options = {**case["options"], "type": f"mmdeform.{case['type']}"}
    image = uniform("image", case["shape"])
    backbone = MODELS.build(dict(options)).double().eval()
    fill_parameters(backbone)
    classifier = MODELS.build(dict(options, num_classes=5)).double().eval()
    fill_parameters(classifier)
    with torch.no_grad():
        maps, logits = backbone(image), classifier(image)
    for index, (found, expected) in enumerate(zip(maps, case["stages"], strict=True)):
        assert statistics(found) == pytest.approx(expected, rel=0, abs=TOLERANCE), f"stage {index}"
    assert logits.flatten().tolist() == pytest.approx(case["logits"], rel=0, abs=TOLERANCE)
