"""The backbone against figures of the public code, stage by stage.

`data/dat_statistics.json` holds what the public models compute in fp64 (LeapLabTHU/DAT: v1 is the
tag CVPR2022, pp the main branch, its neighbourhood attention by a loop over the windows) with the
parameters of `fill_parameters` and the images `uniform("image", (B, 3, H, W))`. Figures of a stage
are those of its whole output: mean, mean magnitude, and the mean of its product with
`uniform("probe", shape)`, which sees where a number stands. In public v1 runs at its native size
alone; pp is here at another size as well.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmdeform.models import DAT

from .deterministic import fill_parameters, statistics, uniform

CASES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "dat_statistics.json").read_text()
)
TOLERANCE = 1e-11  # of figures of order 1, in fp64


@torch.no_grad()
def figures(model: nn.Module, stages: list[nn.Module], shape: list[int]) -> dict[str, Any]:
    """Statistics of the outputs of ``stages``, and the logits, of a model, which is filled."""
    fill_parameters(model)
    outputs: list[Tensor] = []
    hooks = [
        stage.register_forward_hook(
            lambda _module, _args, result: outputs.append(
                result[0] if isinstance(result, tuple) else result
            )
        )
        for stage in stages
    ]
    result = model.eval()(uniform("image", shape).to(next(model.parameters())))
    for hook in hooks:
        hook.remove()
    logits = result[0] if isinstance(result, tuple) else result
    return {
        "stages": [statistics(output) for output in outputs],
        "logits": logits.flatten().tolist(),
    }


@pytest.mark.parametrize("name", CASES)
def test_stages_compute_what_the_public_code_computes(name: str) -> None:
    case = CASES[name]
    model = DAT(**case["options"], num_classes=5).double()
    found = figures(model, list(model.stages), case["shape"])
    for index, (stage, expected) in enumerate(zip(found["stages"], case["stages"], strict=True)):
        assert stage == pytest.approx(expected, rel=0, abs=TOLERANCE), f"stage {index}"
    assert found["logits"] == pytest.approx(case["logits"], rel=0, abs=TOLERANCE)
