"""The weights that layers are said to have are those with which they compute."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet")
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.ops import MultiScaleDeformableAttention as MmcvMSDA
from mmdet.models.backbones.pvt import SpatialReductionAttention
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.layers.transformer.utils import ConditionalAttention

from mmdeform.analysis.attention import (
    Attention,
    attended,
    attention_layers,
    attention_of,
    place_of,
    record_attention,
    watch_attention,
)
from mmdeform.layers import (
    DCNv3,
    DCNv4,
    DeformableAttention2d,
    MultiScaleDeformableAttention,
    SingleLevelDeformableAttention,
)

N, LQ, NK, C, M = 2, 5, 7, 8, 2
PADDING = torch.arange(NK) >= torch.tensor([[5], [6]])  # (N, NK)
APART = (torch.arange(LQ)[:, None] + torch.arange(NK)) % 3 == 0  # (LQ, NK)
EACH_ITS_OWN = torch.stack([APART.roll(head, 1) for head in range(N * M)])  # (N * M, LQ, NK)
FAR = torch.zeros(N, NK).masked_fill(PADDING, -torch.inf)


def all_weights(attention: Attention) -> Tensor:
    return attention.weights(torch.arange(attention.queries))


def admitted(attention: Attention) -> Tensor:
    shape = (attention.batch, attention.heads, attention.queries, attention.keys)
    return attention.admit(torch.arange(attention.queries)).expand(shape)


def record_one(model: nn.Module, *args: Any, **kwargs: Any) -> Attention:
    """Attention of the one layer of a model."""
    with record_attention(attention_layers(model)) as record:
        model(*args, **kwargs)
    (attention,) = record.values()
    return attention


class Spy:
    """Keeps what a module is called with, and what it returns."""

    def __init__(self, module: nn.Module) -> None:
        module.register_forward_hook(self.see, with_kwargs=True)

    def see(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        (dict(), dict()),
        (dict(batch_first=True), dict(key_padding_mask=PADDING)),
        (dict(kdim=6, vdim=3), dict(attn_mask=APART)),
        (dict(bias=False), dict(attn_mask=torch.linspace(-1, 1, LQ * NK).view(LQ, NK))),
        (dict(add_bias_kv=True, add_zero_attn=True), dict(key_padding_mask=PADDING)),
        (dict(add_zero_attn=True), dict(attn_mask=EACH_ITS_OWN)),
        (dict(dropout=0.5), dict(key_padding_mask=FAR)),
        (dict(), dict(key_padding_mask=PADDING, attn_mask=APART)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_attention(settings: dict, inputs: dict, dtype: torch.dtype) -> None:
    layer = nn.MultiheadAttention(C, M, **settings, dtype=dtype).eval()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
    query = torch.randn(N, LQ, C, dtype=dtype)
    key = torch.randn(N, NK, layer.kdim, dtype=dtype)
    value = torch.randn(N, NK, layer.vdim, dtype=dtype)
    if not layer.batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    inputs = {
        name: mask.to(dtype) if mask.is_floating_point() else mask for name, mask in inputs.items()
    }
    _, expected = layer(query, key, value, **inputs, average_attn_weights=False)
    found = attended(layer.train(), (query, key, value), inputs)
    assert (found.kind, found.self_attention, found.padding) == ("dense", False, None)
    assert (found.batch, found.heads, found.queries) == (N, M, LQ)
    assert found.keys == expected.shape[3]
    assert all_weights(found).dtype == dtype
    torch.testing.assert_close(all_weights(found), expected)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(found.weights(some), expected[:, :, some])
    if inputs:
        assert torch.equal(admitted(found), expected > 0)
        some_admitted = found.admit(some).expand_as(expected[:, :, some])
        assert torch.equal(some_admitted, expected[:, :, some] > 0)
    else:
        assert found.admit is None


def test_one_image_without_a_dimension_for_it() -> None:
    layer = nn.MultiheadAttention(C, M)
    query, key, value = torch.randn(LQ, C), torch.randn(NK, C), torch.randn(NK, C)
    masks = dict(key_padding_mask=PADDING[0], attn_mask=APART)
    _, expected = layer(query, key, value, **masks, average_attn_weights=False)
    torch.testing.assert_close(
        all_weights(attended(layer, (query, key, value), masks)), expected[None]
    )


def test_half_precision_is_weighed_in_single() -> None:
    layer = nn.MultiheadAttention(C, M, dtype=torch.bfloat16)
    x = torch.randn(LQ, N, C, dtype=torch.bfloat16)
    weights = all_weights(attended(layer, (x, x, x)))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, M, LQ))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("call", ["self", "self in padding", "cross", "cross with positions"])
def test_mmcvs_attention(batch_first: bool, call: str) -> None:
    layer = MultiheadAttention(C, M, batch_first=batch_first).eval()
    inner = Spy(layer.attn)
    query, key = (torch.randn(N, length, C) for length in (NK, NK if "self" in call else LQ))
    query_pos, key_pos = torch.randn_like(query), torch.randn_like(key)
    if not batch_first:
        query, key, query_pos, key_pos = (
            tensor.transpose(0, 1) for tensor in (query, key, query_pos, key_pos)
        )
    inputs = {
        "self": dict(query_pos=query_pos),  # of the keys, too
        "self in padding": dict(key=query, key_pos=key_pos, key_padding_mask=PADDING.long()),
        "cross": dict(key=key, value=key, query_pos=query_pos),
        "cross with positions": dict(
            key=key, query_pos=query_pos, key_pos=key_pos, attn_mask=APART.T
        ),
    }[call]
    if call == "self in padding":  # torch itself takes no integers any more
        layer.attn.forward = lambda *args, **kwargs: (kwargs["query"], None)
    found = record_one(layer, query, **inputs)
    inner.kwargs["key_padding_mask"] = PADDING if "padding" in call else None
    _, expected = nn.MultiheadAttention.forward(
        layer.attn, **inner.kwargs, average_attn_weights=False
    )
    torch.testing.assert_close(all_weights(found), expected)
    assert found.self_attention == ("self" in call)
    if call == "self in padding":
        assert torch.equal(found.padding, PADDING)
    else:
        assert found.padding is None


@pytest.mark.parametrize("form", ["self", "cross", "first cross", "cross with query positions"])
def test_conditional_attention(form: str) -> None:
    cross = "cross" in form
    layer = ConditionalAttention(
        C, M, cross_attn=cross, keep_query_pos=form.endswith("positions")
    ).eval()
    weights = Spy(layer.attn_drop)
    query, query_pos, sine = (torch.randn(N, NK if not cross else LQ, C) for _ in range(3))
    key, key_pos = torch.randn(N, NK, C), torch.randn(N, NK, C)
    inputs: dict[str, Any] = dict(query_pos=query_pos, key_padding_mask=PADDING)
    if cross:
        inputs |= dict(ref_sine_embed=sine, key_pos=key_pos, attn_mask=APART)
        inputs["is_first"] = form.startswith("first")
    found = record_one(layer, query, key if cross else query, **inputs)
    expected = weights.output.view(N, M, -1, NK)
    torch.testing.assert_close(all_weights(found), expected)
    assert torch.equal(admitted(found), expected > 0)
    assert found.self_attention != cross
    assert (found.padding is None) == cross


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_swin(shift: int) -> None:
    layer = ShiftWindowMSA(C, M, window_size=3, shift_size=shift).eval()
    nn.init.normal_(layer.w_msa.relative_position_bias_table)
    nn.init.normal_(layer.w_msa.qkv.weight)
    weights = Spy(layer.w_msa.attn_drop)
    found = record_one(layer, torch.randn(N, 30, C), (5, 6))
    assert (found.batch, found.queries, found.keys) == (N * 4, 9, 9)
    torch.testing.assert_close(all_weights(found), weights.output)
    assert (found.admit is None) == (shift == 0)
    if shift:
        # e^-100 is no attention, to what comes from the other side of the map.
        assert torch.equal(admitted(found), weights.output > 1e-30)
        assert (admitted(found).sum(-1) < 9).any() and found.padding is None


def test_layers_of_pvt_are_asked_inside() -> None:
    layer = SpatialReductionAttention(C, M, sr_ratio=2).eval()
    assert list(attention_layers(layer)) == ["attn"]
    found = record_one(layer, torch.randn(N, 16, C), (4, 4))
    assert (found.queries, found.keys) == (16, 4)


@pytest.mark.parametrize("version", ["v1", "pp"])
def test_attention_of_dat(version: str) -> None:
    layer = DeformableAttention2d(C, M, num_groups=2, stride=2, version=version, feat_size=6)
    x = torch.randn(N, C, 6, 4)
    expected = layer.attention(x, torch.arange(24))
    found = record_one(layer, x)
    assert (found.queries, found.keys, found.self_attention) == (24, expected.shape[3], True)
    assert torch.equal(all_weights(found), expected)
    assert found.sampling.locations.shape[:2] == (N, 2)


SHAPES = torch.tensor([[4, 3], [2, 2]])
TOKENS = 16


@pytest.mark.parametrize(
    ("owner", "role"),
    [
        ("ours", "encoder"),
        ("ours", "decoder"),
        ("mmcv's", "encoder"),
        ("mmcv's", "decoder"),
        ("single level", "encoder"),
    ],
)
def test_deformable_attention(owner: str, role: str) -> None:
    classes = {"ours": MultiScaleDeformableAttention, "mmcv's": MmcvMSDA}
    single = owner == "single level"
    cls, levels = (SingleLevelDeformableAttention, 1) if single else (classes[owner], 2)
    layer = cls(embed_dims=C, num_heads=M, num_levels=levels, num_points=3, batch_first=True)
    nn.init.normal_(layer.attention_weights.weight)
    tokens = torch.randn(N, TOKENS, C)
    query = tokens if role == "encoder" else torch.randn(N, LQ, C)
    query_pos = torch.randn_like(query)
    mask = torch.arange(TOKENS) >= torch.tensor([[15], [16]])
    found = record_one(
        layer,
        query,
        value=tokens,
        query_pos=query_pos,
        key_padding_mask=mask,
        reference_points=torch.rand(N, query.shape[1], 2, 2),
        spatial_shapes=SHAPES,
        level_start_index=torch.tensor([0, 12]),
    )
    logits = layer.attention_weights(query + query_pos).unflatten(-1, (M, -1)).transpose(1, 2)
    torch.testing.assert_close(all_weights(found), logits.softmax(-1))
    assert (found.kind, found.queries, found.keys) == (
        "deformable",
        query.shape[1],
        levels * 3,
    )
    assert found.self_attention == (role == "encoder")
    assert found.admit is None
    if role == "encoder":
        assert torch.equal(found.padding, mask)
    else:
        assert found.padding is None
    assert found.sampling.locations.shape == (N, query.shape[1], M, levels, 3, 2)


def test_taps_of_dcnv3() -> None:
    layer = DCNv3(C, C, 3, padding=1, group=M)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(N, C, 4, 5)
    mask = layer.predict_offset(x)[1]  # (N, H, W, G * K)
    found = record_one(layer, x)
    assert (found.kind, found.heads, found.queries, found.keys) == ("taps", M, 20, 9)
    expected = mask.unflatten(-1, (M, 9)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    torch.testing.assert_close(all_weights(found), expected)
    assert found.sampling is not None


class Detector(nn.Module):
    """Layers of several kinds, under names as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([DCNv3(C, C, 3, padding=1, group=M), DCNv4(C, C, 3)])
        self.encoder = nn.ModuleList([MultiheadAttention(C, M, attn_drop=0.5) for _ in range(2)])
        self.decoder = nn.ModuleDict(
            {"self_attn": nn.MultiheadAttention(C, M), "cross_attn": nn.MultiheadAttention(C, M)}
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone[0](x).flatten(2).permute(2, 0, 1)
        for layer in self.encoder:
            tokens = layer(tokens)
        query = tokens[:3]
        query = self.decoder["self_attn"](query, query, query)[0]
        return self.decoder["cross_attn"](query, tokens, tokens)[0]


NAMES = ["backbone.0", "encoder.0", "encoder.1", "decoder.self_attn", "decoder.cross_attn"]


def test_layers_are_found_by_name() -> None:
    model = Detector()
    assert list(attention_layers(model)) == NAMES  # DCNv4's weights are no attention
    assert list(attention_layers(model, "encoder.**")) == NAMES[1:3]
    assert list(attention_layers(model, ["**.cross_attn", "encoder.[1]"])) == [NAMES[2], NAMES[4]]
    with pytest.raises(ValueError, match=r"'neck\.\*\*' matches no .* of Detector; .* encoder\.1"):
        attention_layers(model, ["encoder.*", "neck.**"])
    with pytest.raises(ValueError, match="Linear has no attention layer: expected dense"):
        attention_layers(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="must be an attention layer, got DCNv4"):
        attended(model.backbone[1], (torch.zeros(1, C, 3, 3),))
    with pytest.raises(TypeError, match="must be an attention layer, got Linear"):
        attention_of(nn.Linear(1, 1))


def test_places_in_a_detector() -> None:
    model = Detector()
    with record_attention(attention_layers(model)) as record:
        model(torch.randn(N, C, 4, 4))
    assert list(record) == NAMES
    assert [place_of(name, attention) for name, attention in record.items()] == [
        "backbone",
        "encoder self",
        "encoder self",
        "decoder self",
        "decoder cross",
    ]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes_while_attention_is_watched(training: bool) -> None:
    model = Detector().train(training)
    x = torch.randn(N, C, 4, 4)

    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        layers = attention_layers(model) if watched else {}
        with watch_attention(layers, lambda name, attention: all_weights(attention)):
            output = model(x)
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [output, torch.get_rng_state(), *(g for g in gradients if g is not None)]

    plain, watched = run(False), run(True)
    assert len(plain) == len(watched) > 20
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error() -> None:
    model = Detector()
    with (
        pytest.raises(RuntimeError, match="no more"),
        watch_attention(attention_layers(model), lambda *_: None),
    ):
        raise RuntimeError("no more")
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_call_is_recorded() -> None:
    layer = nn.MultiheadAttention(C, M)
    first, last = torch.randn(LQ, N, C), torch.randn(3, N, C)
    with record_attention({"layer": layer}) as record:
        layer(first, first, first)
        layer(last, last, last)
    assert record["layer"].queries == 3
    with pytest.raises(IndexError, match=r"queries must be between 0 and 2, but got 1 to 3"):
        record["layer"].weights(torch.tensor([1, 3]))
    assert record["layer"].weights(torch.arange(0)).shape == (N, M, 0, 3)
