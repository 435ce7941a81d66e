"""Negative entropy of attention whose entropy is known."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv")
from mmdeform.analysis.attention import (
    Attention,
    LayerSparsity,
    attention_layers,
    core,
    negative_entropy,
    record_sparsity,
)
from mmdeform.analysis.attention.checkpoints import Checkpoint
from mmdeform.analysis.attention.run import measure_run, summary
from mmdeform.layers import DCNv3, MultiScaleDeformableAttention

C, M = 8, 2


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1 / 7] * 7, -math.log(7)),
        ([0.0, 0.0, 1.0, 0.0], 0.0),
        ([0.5, 0.0, 0.5], -math.log(2)),
        ([0.25, 0.75], 0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
        ([1.0], 0.0),
    ],
)
def test_negative_entropy(weights: list[float], expected: float) -> None:
    found = negative_entropy(torch.tensor([[weights, weights]], dtype=torch.float64))
    assert found.shape == (1, 2)
    torch.testing.assert_close(found, torch.full((1, 2), expected, dtype=torch.float64))


def uniform_attention(**settings) -> nn.MultiheadAttention:
    """All logits are zero."""
    layer = nn.MultiheadAttention(C, M, batch_first=True, **settings)
    nn.init.zeros_(layer.in_proj_weight)
    return layer


def sharp_attention() -> nn.MultiheadAttention:
    """A query that is a unit vector attends to the key that is the same; only in the first head."""
    layer = uniform_attention()
    layer.in_proj_weight.data[: C // 2] = 1000 * torch.eye(C // 2, C)
    layer.in_proj_weight.data[C : C + C // 2] = torch.eye(C // 2, C)
    return layer


def measure(layer: nn.Module, *calls: tuple) -> LayerSparsity:
    with record_sparsity(attention_layers(layer)) as record:
        for args in calls:
            layer(*args)
    (found,) = record.values()
    return found


def values(sparsity) -> tuple[float, float]:
    return sparsity.negative_entropy, sparsity.normalised_entropy


def test_uniform_and_sharp_attention() -> None:
    x = torch.eye(4, C)[None].repeat(3, 1, 1)
    uniform = measure(uniform_attention(), (x, x, x))
    for found in (*uniform.heads, uniform.mean):
        assert values(found) == pytest.approx((-math.log(4), 1))
    assert (uniform.queries, uniform.fewest_keys, uniform.most_keys) == (12, 4, 4)
    assert len(uniform.heads) == M

    sharp = measure(sharp_attention(), (x, x, x))
    assert values(sharp.heads[0]) == (0, 0)
    assert values(sharp.heads[1]) == pytest.approx((-math.log(4), 1))
    assert values(sharp.mean) == pytest.approx((-math.log(4) / 2, 0.5))
    assert (sharp.kind, sharp.place) == ("dense", "")


def test_queries_of_all_calls_count_alike() -> None:
    few, many = torch.zeros(1, 2, C), torch.zeros(2, 5, C)
    found = measure(uniform_attention(), (few, few, few), (many, many, many))
    expected = -(2 * math.log(2) + 10 * math.log(5)) / 12
    assert values(found.mean) == pytest.approx((expected, 1))
    assert (found.queries, found.fewest_keys, found.most_keys) == (12, 2, 5)


def test_masked_keys_and_padding_do_not_count() -> None:
    x = torch.zeros(2, 6, C)
    padding = torch.arange(6) >= torch.tensor([[4], [6]])
    found = measure(uniform_attention(), (x, x, x, padding))  # self-attention
    assert found.queries == 10
    assert values(found.mean) == pytest.approx((-(4 * math.log(4) + 6 * math.log(6)) / 10, 1))
    found = measure(uniform_attention(), (x, x.clone(), x, padding))  # cross attention
    assert found.queries == 12
    assert values(found.mean) == pytest.approx((-(math.log(4) + math.log(6)) / 2, 1))
    assert (found.fewest_keys, found.most_keys) == (4, 6)


def test_queries_with_one_key_or_none() -> None:
    x = torch.zeros(1, 3, C)
    # The first query may attend to all keys, the second to one, the third to none.
    mask = torch.tensor([[False] * 3, [False, True, True], [True] * 3])
    found = measure(uniform_attention(), (x, x, x, None, True, mask))
    assert found.queries == 2
    assert values(found.mean) == pytest.approx((-math.log(3) / 2, 1))
    assert (found.fewest_keys, found.most_keys) == (1, 3)
    one = measure(uniform_attention(), (x[:, :1], x[:, :1], x[:, :1]))
    assert one.mean.negative_entropy == 0 and math.isnan(one.mean.normalised_entropy)
    none = measure(uniform_attention(), (x[:, :1], x, x, torch.ones(1, 3, dtype=torch.bool)))
    assert none.queries == 0 and math.isnan(none.mean.negative_entropy)
    assert none.fewest_keys is None


def test_masks_may_differ_between_heads() -> None:
    x = torch.zeros(1, 4, C)
    mask = torch.zeros(M, 4, 4, dtype=torch.bool)
    mask[1, :, 2:] = True
    mask[1, 0] = True
    found = measure(uniform_attention(), (x, x, x, None, True, mask))
    assert values(found.heads[0]) == pytest.approx((-math.log(4), 1))
    assert values(found.heads[1]) == pytest.approx((-math.log(2), 1))
    expected = -(4 * math.log(4) + 3 * math.log(2)) / 7
    assert values(found.mean) == pytest.approx((expected, 1))


def test_many_queries_are_weighed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.MultiheadAttention(C, M, batch_first=True)
    query, key = torch.randn(2, 7, C), torch.randn(2, 5, C)
    mask = torch.arange(5) >= torch.tensor([[3], [5]])
    whole = measure(layer, (query, key, key, mask))
    asked: list[int] = []
    weights = Attention.weights

    def see(self: Attention, queries: Tensor) -> Tensor:
        asked.append(len(queries))
        return weights(self, queries)

    monkeypatch.setattr(Attention, "weights", see)
    monkeypatch.setattr(core, "MAX_WEIGHTS", 2 * M * 5 * 3 + 1)
    parts = measure(layer, (query, key, key, mask))
    assert asked == [3, 3, 1]
    assert values(parts.mean) == pytest.approx(values(whole.mean))
    assert whole.mean.negative_entropy < -0.5
    monkeypatch.setattr(core, "MAX_WEIGHTS", 1)
    assert measure(layer, (query, key, key, mask)).queries == 14


def test_deformable_attention_and_taps_start_uniform() -> None:
    attention = MultiScaleDeformableAttention(C, M, num_levels=1, num_points=4, batch_first=True)
    attention.init_weights()
    with record_sparsity({"decoder.cross_attn": attention}) as record:
        attention(
            torch.randn(2, 5, C),
            value=torch.randn(2, 6, C),
            reference_points=torch.rand(2, 5, 1, 2),
            spatial_shapes=torch.tensor([[2, 3]]),
            level_start_index=torch.tensor([0]),
        )
    found = record["decoder.cross_attn"]
    assert (found.kind, found.place, found.queries) == ("deformable", "decoder cross", 10)
    assert values(found.mean) == pytest.approx((-math.log(4), 1))

    taps = measure(DCNv3(C, C, 3, padding=1, group=M), (torch.randn(2, C, 4, 5),))
    assert (taps.kind, taps.queries, len(taps.heads)) == ("taps", 40, M)
    assert values(taps.mean) == pytest.approx((-math.log(9), 1))


class Predictor(nn.Module):
    """Predicts with one of its two attention layers, to a single key."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = uniform_attention(), uniform_attention()

    def test_step(self, batch: Tensor) -> None:
        for x in batch:
            self.used(x, x, x)


def test_runs_are_summarised(tmp_path: Path) -> None:
    model = Predictor()
    torch.save(model.state_dict(), tmp_path / "epoch_1.pth")
    checkpoints = [Checkpoint(tmp_path / "epoch_1.pth", 1)]
    samples = [torch.zeros(1, 1, C)]
    (one,) = summary(measure_run(model, checkpoints, samples))
    assert list(one["layers"]) == ["used"]
    # JSON has no NaN.
    assert one["layers"]["used"]["heads"] == [
        dict(negative_entropy=0.0, normalised_entropy=None) for _ in range(M)
    ]
    with pytest.raises(ValueError, match="none of the layers runs in a prediction: unused"):
        measure_run(model, checkpoints, samples, "unused")
