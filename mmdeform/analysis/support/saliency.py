"""The smallest part of an image that a node needs for nearly the response that it has.

The error-bounded saliency region of "Deformable ConvNets v2" is the smallest region whose image
alone, everything else masked, gives a response within an error of that to the whole image. The
paper finds it by progressive masking and does not publish how. The solver here is this project's
own:

- The image is divided into cells, and a masked cell has the mean colour, zero after normalisation.
- Cells are ordered by how much of the response hangs on them, to first order: the squares of the
  gradient of each pixel times what masking would change there. The largest number of cells from the
  start of this order which is found to be masked within the error is masked, with several numbers
  tried in one batch.
- That is repeated with the order at the new image until nothing more can be masked, first for
  blocks of cells, then for cells.
- Then each cell is tried by itself. Those that can be masked are put in the order of their errors
  and masked as before; what is left of them is tried again, and in the end once more all cells,
  until no single one of those left can be masked.

So no cell of the result can be left out, but there may be smaller regions: the problem is one of
choosing the best of all sets of cells. Everything is deterministic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .gradients import Progress, response_gradients
from .nodes import Node, check_image

__all__ = ["SaliencyRegion", "saliency_region"]

# Backward passes for an order of cells, which has to be right only roughly.
IMPORTANCE_PROJECTIONS = 4


@dataclass(frozen=True)
class SaliencyRegion:
    """What is left of an image.

    Attributes:
        mask: Pixels that are kept, bool, shape (H, W).
        error: 1 - cosine between the response to what is left and to the image.
        bound: The error that was allowed.
        share: Share of the image that is kept.
        cell: Size of a cell, pixels.
        passes: Images that went through the network.
        complete: Whether no cell can be left out any more; False where the limit of passes came
            first.
    """

    mask: Tensor
    error: float
    bound: float
    share: float
    cell: int
    passes: int
    complete: bool


class _OutOfPasses(Exception):
    pass


class _Masking:
    """An image of which cells are masked, and the error that this makes."""

    def __init__(
        self, node: Node, images: Tensor, size: tuple[int, int], cell: int,
        limit: int, batch: int, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.node, self.images, self.size = node, images, size
        self.cell, self.limit, self.batch, self.progress = cell, limit, batch, progress
        rows, columns = (-(-side // cell) for side in size)
        self.kept = torch.ones(rows, columns, dtype=torch.bool, device=images.device)
        self.passes = 0
        self.response = self._respond(images)[0]
        self.error = 0.0
        if len(self.response) < 2:
            raise ValueError(
                f"{node.name} responds with one number, whose direction cannot change: a saliency "
                "region needs a vector"
            )
        if not self.response.norm() > 0:
            raise ValueError(f"{node.name} does not respond to the image: all numbers are zero")

    def pixels(self, kept: Tensor) -> Tensor:
        """Cells (..., rows, columns) as pixels (..., H, W) of the images; padding is masked."""
        pixels = kept.repeat_interleave(self.cell, -2).repeat_interleave(self.cell, -1)
        pixels = pixels[..., : self.size[0], : self.size[1]]
        height, width = self.images.shape[2:]
        return functional.pad(pixels, (0, width - self.size[1], 0, height - self.size[0]))

    @torch.no_grad()
    def _respond(self, images: Tensor) -> Tensor:
        if self.passes + len(images) > self.limit:
            raise _OutOfPasses
        self.passes += len(images)
        if self.progress:
            self.progress(self.passes, self.limit)
        return self.node.respond(images)

    def errors(self, kept: Tensor) -> list[float]:
        """Errors of several maskings, bool, shape (B, rows, columns)."""
        errors: list[float] = []
        for chunk in kept.split(self.batch):
            masks = self.pixels(chunk)[:, None]
            responses = self._respond(torch.where(masks, self.images, 0))
            cosine = functional.cosine_similarity(responses.double(), self.response[None].double())
            errors += (1 - cosine).clamp(min=0).tolist()
        return errors

    def importance(self) -> Tensor:
        """How much the response hangs on each cell, to first order, shape (rows, columns)."""
        if self.passes + 1 > self.limit:
            raise _OutOfPasses
        self.passes += 1
        images = torch.where(self.pixels(self.kept), self.images, 0)
        total = torch.zeros_like(self.kept, dtype=images.dtype)
        for gradients in response_gradients(self.node, images, IMPORTANCE_PROJECTIONS):
            change = (gradients[0] * images).sum(1).square()  # (1, H, W)
            change = change[:, : self.size[0], : self.size[1]]
            over = [-side % self.cell for side in self.size]
            change = functional.pad(change, (0, over[1], 0, over[0]))
            total += functional.avg_pool2d(change, self.cell)[0]
        return total


def saliency_region(
    node: Node,
    images: Tensor,
    size: tuple[int, int] | None = None,
    bound: float = 0.1,
    cell: int = 8,
    passes: int = 1000,
    batch: int = 8,
    progress: Progress | None = None,
) -> SaliencyRegion:
    """Finds an error-bounded saliency region; see the top of this file.

    Args:
        node: See :class:`Node`; its response must have two entries or more.
        images: One image as the network gets it, normalised so that zero is the mean colour, shape
            (1, C, H, W).
        size: (height, width) of the image without the padding right and below. Default: all of it.
        bound: Largest 1 - cosine between the response to the region and to the image. Default: 0.1.
        cell: Size of the cells that are masked, pixels. Default: 8.
        passes: How many images may go through the network. When they are used up, the region is
            what is left by then. Default: 1000.
        batch: How many at a time. Default: 8.
        progress: Called with the passes done and those allowed, in the end those done twice.
            Default: None.

    Raises:
        ValueError: ``bound``, ``cell``, ``passes`` or ``batch`` is out of range; the response is
            zero or a single number; the network is in training mode; there are several images.

    Source: Zhu et al., "Deformable ConvNets v2" (2018), for what is looked for; the solver is our
    own.
    """
    check_image(images)
    if not 0 <= bound < 1:
        raise ValueError(f"bound must be at least 0 and less than 1, got {bound}")
    for name, value, least in (("cell", cell, 1), ("passes", passes, 2), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if node.model.training:
        raise ValueError(f"{type(node.model).__name__} must be in evaluation mode: call eval()")
    size = size or (images.shape[2], images.shape[3])
    masking = _Masking(node, images, size, cell, passes, batch, progress)
    try:
        for block in (4, 2, 1):
            while _mask_in_order(masking, bound, block, _blocks(masking, block)):
                pass
        while _mask_single_cells(masking, bound):
            pass
        complete = True
    except _OutOfPasses:
        complete = False
    if progress:
        progress(masking.passes, masking.passes)  # which may be fewer than allowed
    mask = masking.pixels(masking.kept)
    return SaliencyRegion(
        mask=mask,
        error=masking.error,
        bound=bound,
        share=float(mask.sum()) / (size[0] * size[1]),
        cell=cell,
        passes=masking.passes,
        complete=complete,
    )


def _blocks(masking: _Masking, block: int) -> Tensor:
    """Blocks with cells that are kept, (row, column), the least important first, shape (n, 2)."""
    importance = masking.importance() * masking.kept
    rows, columns = masking.kept.shape
    pad = (0, -columns % block, 0, -rows % block)
    total, kept = (
        functional.avg_pool2d(functional.pad(map.to(importance), pad)[None, None], block)[0, 0]
        for map in (importance, masking.kept)
    )
    places = kept.nonzero()
    return places[total[kept > 0].argsort(stable=True)]


def _mask_single_cells(masking: _Masking, bound: float) -> bool:
    """Masks cells that can be masked by themselves, until none of these can; whether any could."""
    places = _by_errors(masking, bound, masking.kept.nonzero())
    found = len(places) > 0
    while len(places):
        if not _mask_in_order(masking, bound, 1, places):
            return False  # an error at the bound, which rounding moved across it
        places = _by_errors(masking, bound, places[masking.kept[places[:, 0], places[:, 1]]])
    return found


def _by_errors(masking: _Masking, bound: float, places: Tensor) -> Tensor:
    """Those of some cells that can be masked by themselves, the least error first, shape (n, 2)."""
    if not len(places) or masking.kept.sum() < 2:
        return places[:0]
    errors = torch.tensor(masking.errors(_without(masking.kept, places[:, None], 1)))
    possible = (errors <= bound).nonzero()[:, 0]
    return places[possible[errors[possible].argsort(stable=True)].to(places.device)]


def _without(kept: Tensor, places: Tensor, block: int) -> Tensor:
    """Cells that are left without some blocks, for each of several choices (choices, n, 2)."""
    cells = kept.expand(len(places), *kept.shape).clone()
    for choice, blocks in zip(cells, places, strict=True):
        for row, column in (blocks * block).tolist():
            choice[row : row + block, column : column + block] = False
    return cells


def _mask_in_order(masking: _Masking, bound: float, block: int, places: Tensor) -> bool:
    """Masks as many blocks from the start of an order as the error allows; whether any."""
    possible, impossible = 0, len(places) + 1
    best, error = masking.kept, masking.error
    while impossible - possible > 1:
        steps = min(masking.batch, impossible - possible - 1)
        counts = [
            possible + (impossible - possible) * step // (steps + 1) for step in range(1, steps + 1)
        ]
        choices = torch.cat(
            [_without(masking.kept, places[None, :count], block) for count in counts]
        )
        errors = masking.errors(choices)
        fitting = [
            step
            for step, its_error in enumerate(errors)
            if its_error <= bound and choices[step].any()
        ]
        # More may be masked where less may not: edges between both mislead a network as well.
        last = fitting[-1] if fitting else -1
        if fitting:
            possible, best, error = counts[last], choices[last], errors[last]
        if last + 1 < steps:
            impossible = counts[last + 1]
    masking.kept, masking.error = best, error
    return possible > 0
