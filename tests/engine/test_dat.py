"""The hooks and the optimizer constructor for offsets know DAT's attention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmcv.ops")
from mmdeform.layers import DeformableAttention2d
from mmdeform.layers.sampling import sampled

from .training import IMAGES, Call, Network, make_runner, stats_hook

WARMUP = dict(type="mmdeform.OffsetWarmupHook", iters=2)
SLOW_OFFSETS = dict(
    constructor="mmdeform.OffsetLrConstructor",
    optimizer=dict(type="SGD", lr=0.1),
    paramwise_cfg=dict(offset=dict(conv=dict(lr_mult=0.0))),
)


def test_training(tmp_path: Path) -> None:
    layer = DeformableAttention2d(2, 2, stride=2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    moved: list[Tensor] = []

    def look(runner: object) -> None:
        moved.append(sampled(layer, (IMAGES[0][None],)).offset.abs().amax())

    runner = make_runner(
        Network(dat=layer), IMAGES, [stats_hook(), WARMUP, Call(look)], tmp_path, 4,
        optim_wrapper=SLOW_OFFSETS,
    )  # fmt: skip
    runner.train()
    assert moved[0] == 0 and 0 < moved[1] < moved[2]
    table = next(tmp_path.rglob("*.log")).read_text().split("Offsets at iteration")
    header, row = table[1].splitlines()[1:3]
    assert header.split() == ["layer", "p50", "p95", "p99", "max", "outside"]
    # The last row and the last column of 3 x 3 keys start beyond the border, at 6.25 of 6 pixels.
    assert row.split() == ["layers.dat", "0", "0", "0", "0", "55.56%"]
    assert float(table[4].splitlines()[2].split()[4]) > 0
    for name, value in layer.state_dict().items():
        if name.startswith("conv_offset."):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(layer.proj_v.weight, before["proj_v.weight"])


def test_offsets_that_are_not_finite(tmp_path: Path) -> None:
    layer = DeformableAttention2d(2, 2)
    layer.conv_offset[3].weight.data.fill_(torch.nan)
    runner = make_runner(Network(dat=layer), IMAGES, [stats_hook()], tmp_path)
    with pytest.raises(
        RuntimeError, match=r"'layers.dat' .*: weights conv_offset.3.weight, offset"
    ):
        runner.train()
