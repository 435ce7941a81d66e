"""Independent implementations: onnxruntime, mmcv, torchvision, torch's grid_sample.

Each is skipped, visibly, where its package is missing.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from . import dcn, test_dcnv3, test_dcnv4, test_deform_conv2d, test_ms_deform_attn
from .contracts.operator import TYPES, Arguments, assert_near

CONV, ATTENTION = test_deform_conv2d.TestContract(), test_ms_deform_attn.TestContract()
DCNV3, DCNV4 = test_dcnv3.TestContract(), test_dcnv4.TestContract()
# onnxruntime and mmcv have no empty batches.
CONV_CASES = [key for key in CONV.cases if key != "no-image"]
DCN_CASES = [key for key in test_dcnv3.TestContract.cases if key != "no-image"]
FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def onnx_deform_conv(arguments: Arguments, opset: int) -> Tensor:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime", minversion="1.25")
    feeds = {"X": arguments["input"], "W": arguments["weight"], "offset": arguments["offset"],
             "B": arguments["bias"], "mask": arguments["mask"]}  # fmt: skip
    names = [key if feeds[key] is not None else "" for key in feeds]
    feeds = {key: value.numpy() for key, value in feeds.items() if value is not None}
    element = onnx.helper.np_dtype_to_tensor_dtype(feeds["X"].dtype)
    *_, groups, deform_groups = CONV.schema_arguments(arguments)
    while names[-1] == "":
        names.pop()
    node = onnx.helper.make_node(
        "DeformConv",
        names,
        ["Y"],
        kernel_shape=list(arguments["weight"].shape[2:]),
        strides=list(arguments["stride"]),
        pads=list(arguments["padding"]) * 2,
        dilations=list(arguments["dilation"]),
        group=groups,
        offset_group=deform_groups,
    )
    graph = onnx.helper.make_graph(
        [node],
        "deform_conv2d",
        [onnx.helper.make_tensor_value_info(k, element, v.shape) for k, v in feeds.items()],
        [onnx.helper.make_tensor_value_info("Y", element, None)],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, feeds)[0])


@FLOATS
@pytest.mark.parametrize("opset", [19, 22])
@pytest.mark.parametrize("key", CONV_CASES)
def test_deform_conv2d_equals_onnxruntime(key: str, opset: int, dtype: torch.dtype) -> None:
    arguments = CONV.place(CONV.cases[key].make(), (dtype, dtype), requires_grad=False)
    expected = onnx_deform_conv(arguments, opset)
    assert_near({"output": CONV.call(arguments)}, {"output": expected}, dtype)


def test_deform_conv2d_border_equals_onnxruntime() -> None:
    """Samples all around the border, v1 and v2, at integer positions and between."""
    arguments = CONV.place(CONV.cases["plain-3x3"].make(), TYPES["fp64"], requires_grad=False)
    offset = arguments["offset"]
    offset.copy_(torch.randint(-20, 21, offset.shape) / 4)
    for mask in (arguments["mask"], None):
        case = {**arguments, "mask": mask}
        expected = onnx_deform_conv(case, 19)
        assert_near({"output": CONV.call(case)}, {"output": expected}, torch.float64)


def mmcv_deform_conv(arguments: Arguments) -> Tensor:
    mmcv_ops = pytest.importorskip("mmcv.ops", exc_type=ImportError)
    input, offset, mask, weight, bias, *geometry = CONV.schema_arguments(arguments)
    if mask is not None:
        return mmcv_ops.modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry)
    output = mmcv_ops.deform_conv2d(input, offset, weight, *geometry, False, 1)
    return output if bias is None else output + bias[:, None, None]


@pytest.mark.parametrize("key", CONV_CASES)
def test_deform_conv2d_equals_mmcv(key: str) -> None:
    arguments = CONV.place(CONV.cases[key].make(), TYPES["fp64"])
    grad_output = CONV.grad_output(arguments)
    expected = CONV.run(mmcv_deform_conv, arguments, grad_output)
    assert_near(CONV.run(CONV.call, arguments, grad_output), expected, torch.float64)


@pytest.mark.parametrize("key", CONV_CASES)
def test_deform_conv2d_equals_torchvision(key: str) -> None:
    torchvision_ops = pytest.importorskip("torchvision.ops", exc_type=ImportError)
    arguments = CONV.place(CONV.cases[key].make(), TYPES["fp64"])
    grad_output = CONV.grad_output(arguments)
    expected = CONV.run(lambda a: torchvision_ops.deform_conv2d(**a), arguments, grad_output)
    assert_near(CONV.run(CONV.call, arguments, grad_output), expected, torch.float64)


def grid_sample_attention(arguments: Arguments) -> Tensor:
    value, spatial_shapes, starts, locations, weights = arguments.values()
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = locations.shape
    output: Any = 0
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        pixels = value[:, starts[level] : starts[level] + height * width].permute(0, 2, 3, 1)
        samples = F.grid_sample(
            pixels.reshape(batch * heads, channels, height, width),
            2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (N*M, Dh, Lq, P)
        level_weights = weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, queries, points)
        output = output + (samples * level_weights).sum(3)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


@FLOATS
@pytest.mark.parametrize(
    "key", [k for k in ATTENTION.cases if k not in ("no-image", "no-query", "empty-level")]
)
def test_ms_deform_attn_equals_grid_sample(key: str, dtype: torch.dtype) -> None:
    arguments = ATTENTION.place(ATTENTION.cases[key].make(), (dtype, dtype))
    grad_output = ATTENTION.grad_output(arguments)
    expected = ATTENTION.run(
        grid_sample_attention, ATTENTION.place(arguments, TYPES["fp64"]), grad_output.double()
    )
    assert_near(ATTENTION.run(ATTENTION.call, arguments, grad_output), expected, dtype)


@pytest.mark.parametrize("key", ["asymmetric", "5-levels", "33-channels"])
def test_ms_deform_attn_equals_mmcv(key: str) -> None:
    mmcv_ops = pytest.importorskip("mmcv.ops.multi_scale_deform_attn", exc_type=ImportError)
    arguments = ATTENTION.place(ATTENTION.cases[key].make(), TYPES["fp64"])
    grad_output = ATTENTION.grad_output(arguments)

    def mmcv(arguments: Arguments) -> Tensor:
        tensors = {k: v for k, v in arguments.items() if k != "level_start_index"}
        tensors["value_spatial_shapes"] = tensors.pop("spatial_shapes")
        return mmcv_ops.multi_scale_deformable_attn_pytorch(**tensors)

    expected = ATTENTION.run(mmcv, arguments, grad_output)
    assert_near(ATTENTION.run(ATTENTION.call, arguments, grad_output), expected, torch.float64)


def dcn_as_deform_conv2d(arguments: Arguments) -> Arguments:
    """dcnv3 in terms of a depthwise convolution: channels first, row-major taps, (y, x), no scale.

    A middle tap that dcnv3 leaves out is there with a mask of zero.
    """
    input, offset, mask = (arguments[key] for key in dcn.TENSORS)
    (kernel_h, kernel_w), groups = arguments["kernel_size"], arguments["groups"]
    scale, removed = arguments["offset_scale"], arguments["remove_center"]
    grid, indices = dcn.tap_grid((kernel_h, kernel_w), arguments["dilation"], removed)
    size = mask.shape[:3]
    offset = offset.view(*size, groups, -1, 2)
    # The convolution puts its taps where a scale of one would.
    moved = scale * offset + (scale - 1) * grid.to(offset.dtype)
    offsets = offset.new_zeros(*size, groups, kernel_h, kernel_w, 2)
    masks = mask.new_zeros(*size, groups, kernel_h, kernel_w)
    ix, iy = indices.T
    offsets[:, :, :, :, iy, ix] = moved.flip(-1)
    masks[:, :, :, :, iy, ix] = mask.view(*size, groups, -1)
    return {
        "input": input.permute(0, 3, 1, 2).contiguous(),
        "offset": offsets.flatten(3).permute(0, 3, 1, 2).contiguous(),
        "weight": input.new_ones(input.shape[3], 1, kernel_h, kernel_w),
        "bias": None,
        "mask": masks.flatten(3).permute(0, 3, 1, 2).contiguous(),
        **{key: arguments[key] for key in ("stride", "padding", "dilation")},
    }


@FLOATS
@pytest.mark.parametrize("key", DCN_CASES)
def test_dcn_equals_onnxruntime(key: str, dtype: torch.dtype) -> None:
    geometry = (dcn.GEOMETRIES | dcn.LARGE)[key]
    arguments = DCNV3.place(dcn.make(**geometry), (dtype, dtype), requires_grad=False)
    expected = onnx_deform_conv(dcn_as_deform_conv2d(arguments), 19).permute(0, 2, 3, 1)
    for output in (DCNV3.call(arguments), DCNV4.call(dcn.merged(arguments))):
        assert_near({"output": output}, {"output": expected}, dtype)


def test_dcn_border_equals_onnxruntime() -> None:
    """Samples all around the border, at integer positions and between."""
    geometry = dcn.GEOMETRIES["plain-3x3"]
    arguments = DCNV3.place(dcn.make(**geometry), TYPES["fp64"], requires_grad=False)
    offset = arguments["offset"]
    offset.copy_(torch.randint(-36, 37, offset.shape) / 4)
    expected = onnx_deform_conv(dcn_as_deform_conv2d(arguments), 19).permute(0, 2, 3, 1)
    for output in (DCNV3.call(arguments), DCNV4.call(dcn.merged(arguments))):
        assert_near({"output": output}, {"output": expected}, torch.float64)


def grid_sample_dcn(arguments: Arguments) -> Tensor:
    input, offset, mask = (arguments[key] for key in dcn.TENSORS)
    batch, height, width, channels = input.shape
    groups, size = arguments["groups"], mask.shape[1:3]
    grid, _ = dcn.tap_grid(
        arguments["kernel_size"], arguments["dilation"], arguments["remove_center"]
    )
    position = arguments["offset_scale"] * (grid + offset.unflatten(3, (groups, -1, 2)))
    for axis, shape in ((0, (-1, 1, 1)), (1, (-1, 1, 1, 1))):  # x, then y
        other = 1 - axis
        center = arguments["dilation"][other] * (arguments["kernel_size"][other] - 1) // 2
        start = center - arguments["padding"][other]
        places = torch.arange(size[other]) * arguments["stride"][other] + start
        position = position + F.one_hot(torch.tensor(axis), 2) * places.view(*shape, 1)
    normalised = (2 * position + 1) / torch.tensor([width, height]) - 1
    samples = F.grid_sample(
        input.unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1),
        normalised.permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1),
        align_corners=False,
    )  # (N*G, C/G, Ho*Wo, K)
    weights = mask.unflatten(3, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    output = (samples * weights[:, None]).sum(3)
    return output.view(batch, channels, *size).permute(0, 2, 3, 1)


@pytest.mark.parametrize("key", DCN_CASES)
def test_dcn_equals_grid_sample(key: str) -> None:
    """Gradients too; those of dcnv4 through the tensor that holds offsets and weights."""
    geometry = (dcn.GEOMETRIES | dcn.LARGE)[key]
    arguments = DCNV3.place(dcn.make(**geometry), TYPES["fp64"])
    grad_output = DCNV3.grad_output(arguments)
    expected = DCNV3.run(grid_sample_dcn, arguments, grad_output)
    for call in (DCNV3.call, lambda a: DCNV4.call(dcn.merged(a))):
        assert_near(DCNV3.run(call, arguments, grad_output), expected, torch.float64)
