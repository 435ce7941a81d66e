"""A saliency region is as small as it can be where that is known, and bad input is told."""

import pytest
import torch
from torch import Tensor, nn

from mmdeform.analysis.support import (
    effective_receptive_field,
    effective_sampling,
    feature_node,
    saliency_region,
)
from mmdeform.analysis.support.nodes import Node


class Window(nn.Module):
    """Reads the pixels of a rectangle and nothing else."""

    def __init__(self, rows: slice, columns: slice) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.layer = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        assert len(inputs)  # detectors refuse empty batches
        return self.layer(inputs[:, :, self.rows, self.columns].flatten(1))


def window_node(model: Window) -> Node:
    return Node("window", model, model.forward, (0, 0))


def test_the_region_is_the_rectangle_that_is_read() -> None:
    model = Window(slice(8, 20), slice(12, 28)).eval()
    images = torch.randn(1, 3, 32, 40).abs() + 0.1
    region = saliency_region(window_node(model), images, bound=1e-6, cell=4)
    expected = torch.zeros(32, 40, dtype=torch.bool)
    expected[8:20, 12:28] = True
    assert torch.equal(region.mask, expected)
    assert region.share == 12 * 16 / (32 * 40) and region.complete
    assert region.error == pytest.approx(0, abs=1e-6) and region.cell == 4
    # Cells that stand on its edges are kept whole.
    region = saliency_region(window_node(model), images, bound=1e-6, cell=8)
    expected[8:24, 8:32] = True
    assert torch.equal(region.mask, expected)


def test_the_region_is_the_smallest_within_the_error() -> None:
    """Of n equal cells k are enough if 1 - sqrt(k / n) <= bound."""
    model = Window(slice(0, 24), slice(8, 40)).eval()
    images = torch.ones(1, 3, 32, 48)
    steps: list[tuple[int, int]] = []
    region = saliency_region(
        window_node(model), images, cell=4, progress=lambda *step: steps.append(step)
    )
    cells = 6 * 8
    kept = next(k for k in range(cells + 1) if 1 - (k / cells) ** 0.5 <= 0.1)
    assert int(region.mask.sum()) == 16 * kept and kept < cells
    assert (
        region.error == pytest.approx(1 - (kept / cells) ** 0.5, abs=1e-6) and region.bound == 0.1
    )
    assert not region.mask[:, :8].any() and not region.mask[24:].any()
    assert steps[-1] == (region.passes, region.passes) and steps[0] == (1, 1000)
    assert steps[-2] == (region.passes, 1000)
    again = saliency_region(window_node(model), images, cell=4)
    assert torch.equal(region.mask, again.mask) and region.passes == again.passes


def test_what_changes_the_length_alone_is_not_needed() -> None:
    """By its gradient it is what matters most: only trying it shows that it can go."""

    def respond(images: Tensor) -> Tensor:
        return model(images) * (15 * images[:, :, :4, :4].mean((1, 2, 3)) - 15).exp()[:, None]

    model = Window(slice(16, 28), slice(12, 20)).eval()
    images = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(3)) + 0.5
    region = saliency_region(Node("scaled", model, respond, (0, 0)), images, bound=1e-6, cell=4)
    expected = torch.zeros(32, 40, dtype=torch.bool)
    expected[16:28, 12:20] = True
    assert torch.equal(region.mask, expected) and region.complete


def test_gradients_save_passes() -> None:
    """Most of an image that a node does not read is masked at once."""
    model = Window(slice(60, 68), slice(60, 68)).eval()
    images = torch.rand(1, 3, 128, 128) + 0.1
    region = saliency_region(window_node(model), images, bound=1e-6, cell=4)
    assert region.share == 4 / 32**2 and region.passes < 100  # trying each cell: more than 1024


def test_regions_where_the_cells_do_not_fit() -> None:
    """Padding is no part of the region, and the last cells are cut off."""
    model = Window(slice(0, 22), slice(30, 35)).eval()
    images = torch.rand(1, 3, 32, 40) + 0.1
    region = saliency_region(window_node(model), images, size=(22, 35), bound=1e-6, cell=8)
    expected = torch.zeros(32, 40, dtype=torch.bool)
    expected[:22, 24:35] = True
    assert torch.equal(region.mask, expected)
    assert region.share == pytest.approx(11 / 35)


def test_passes_are_limited() -> None:
    model = Window(slice(0, 32), slice(0, 40)).eval()
    images = torch.randn(1, 3, 32, 40)
    region = saliency_region(window_node(model), images, cell=2, passes=20)
    assert not region.complete and region.passes <= 20
    assert region.error <= region.bound
    kept = torch.where(region.mask, images, 0)
    cosine = torch.cosine_similarity(model(kept), model(images)).item()
    assert 1 - cosine == pytest.approx(region.error, abs=1e-6)


def test_what_cannot_be_answered() -> None:
    model = Window(slice(0, 4), slice(0, 4)).eval()
    images = torch.ones(1, 3, 16, 16)
    node = window_node(model)
    number = Node("number", model, lambda images: images.sum((1, 2, 3))[:, None], (0, 0))
    constant = Node("constant", model, lambda images: torch.ones(len(images), 4), (0, 0))
    for match, call in (
        (r"no output 3", lambda: feature_node(model, images, "layer", 0, 0, index=3)),
        (r"map of shape \(N, K, h, w\), got", lambda: feature_node(model, images, "layer", 0, 0)),
        (r"no module 'neck' as in 'neck.x'; it has layer",
         lambda: feature_node(model, images, "neck.x", 0, 0)),
        (r"16 pixels wide and 16 high, got \(20, 3\)",
         lambda: feature_node(model, images, "layer", 20, 3)),
        ("one number", lambda: saliency_region(number, images)),
        ("all numbers are zero", lambda: saliency_region(node, images * 0)),
        ("bound must be at least 0", lambda: saliency_region(node, images, bound=1.5)),
        ("cell must be at least 1, got 0", lambda: saliency_region(node, images, cell=0)),
        ("passes must be at least 2, got 1", lambda: saliency_region(node, images, passes=1)),
        ("expected one image", lambda: saliency_region(node, images.expand(2, -1, -1, -1))),
        ("expected one image",
         lambda: effective_receptive_field(node, images.expand(2, -1, -1, -1))),
        ("does not depend on the image", lambda: effective_receptive_field(constant, images)),
        ("projections must be at least 1, got 0",
         lambda: effective_receptive_field(node, images, projections=0)),
        ("Window has no deformable layer", lambda: effective_sampling(node, images)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    model.train()
    for call in (effective_receptive_field, saliency_region):
        with pytest.raises(ValueError, match="Window must be in evaluation mode"):
            call(node, images)
