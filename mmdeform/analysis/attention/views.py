"""What a DETR attends to in one image, query by query.

    layers = attention_layers(model, ["encoder.**", "decoder.**"])
    view = view_image(model, picture, layers)
    best = view.best_predictions(3)
    view.attention_map("decoder.layers.5.cross_attn", best[0].query).weights

Positions are in pixels of the network's input, which begins with the resized image and may end in
padding; pixel i reaches from i to i + 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Picture
from ..queries import box_corners, predictions_of
from .core import Attention, place_of, record_attention
from .maps import AttentionMap, Samples, cell_size, dense_map, samples_of, splat

__all__ = ["ImageView", "Prediction", "view_image"]

DUPLICATE = 0.7  # intersection over union from which two predictions are of one object


@dataclass(frozen=True)
class Prediction:
    """What a decoder query predicts.

    Attributes:
        query: Index of the query.
        label: Index of its best class.
        score: Score of that class.
        box: (left, top, right, bottom).
    """

    query: int
    label: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageView:
    """One forward pass of a DETR, for one image.

    Attributes:
        size: (width, height) of the network's input.
        map_sizes: The same of the maps to which the transformer attends.
        attentions: Attention of its layers by their names.
        scores: Of each decoder query and class, shape (Lq, classes).
        boxes: Of each decoder query, (left, top, right, bottom), shape (Lq, 4).
    """

    size: tuple[int, int]
    map_sizes: tuple[tuple[int, int], ...]
    attentions: Mapping[str, Attention]
    scores: Tensor
    boxes: Tensor

    def last_layer(self, place: str) -> str:
        """Name of the last layer that attends in a place, such as 'decoder cross'.

        Raises:
            ValueError: There is none.
        """
        places = {place_of(name, attention): name for name, attention in self.attentions.items()}
        if place not in places:
            raise ValueError(f"expected a layer for '{place}' attention, got {', '.join(places)}")
        return places[place]

    def prediction(self, query: int) -> Prediction:
        """What one query predicts."""
        score, label = self.scores[query].max(0)
        return Prediction(query, int(label), float(score), tuple(self.boxes[query].tolist()))

    def best_predictions(self, count: int) -> list[Prediction]:
        """The queries with the highest scores, best first, one for each object."""
        chosen: list[int] = []
        for query in self.scores.amax(1).argsort(descending=True).tolist():
            overlaps = _overlaps(self.boxes[query], self.boxes[chosen])
            if len(chosen) < count and not (overlaps > DUPLICATE).any():
                chosen.append(query)
        return [self.prediction(query) for query in chosen]

    def prediction_at(self, box: Sequence[float], label: int) -> Prediction:
        """The query that best predicts an object: by its score times the overlap with its box.

        Args:
            box: (left, top, right, bottom).
            label: Its class.
        """
        overlaps = _overlaps(self.boxes.new_tensor(box), self.boxes)
        return self.prediction(int((overlaps * self.scores[:, label]).argmax()))

    def pixel_query(self, x: float, y: float, level: int = 0) -> int:
        """Index of the encoder query whose pixel of a map covers a position.

        Args:
            x, y: Position.
            level: Which map, from the first, which is the finest. Default: 0.

        Raises:
            ValueError: There is no such map, or the position is outside the input.
        """
        if not 0 <= level < len(self.map_sizes):
            raise ValueError(f"level must be below {len(self.map_sizes)}, but got {level}")
        if not (0 <= x < self.size[0] and 0 <= y < self.size[1]):
            raise ValueError(f"({x}, {y}) is not in the {self.size[0]} x {self.size[1]} input")
        width, height = self.map_sizes[level]
        cell = cell_size(self.size, (width, height))
        column, row = min(int(x / cell[0]), width - 1), min(int(y / cell[1]), height - 1)
        return sum(w * h for w, h in self.map_sizes[:level]) + row * width + column

    def attention_map(self, name: str, query: int) -> AttentionMap:
        """Attention of one query as a map of weights for each head.

        Of dense attention these are the weights of the keys. Samples of deformable attention are
        spread over the pixels that they read, as bilinear interpolation weighs them, and these over
        the grid of the finest map.

        Args:
            name: Of the layer.
            query: Index of the query.

        Raises:
            ValueError: The layer does not attend to the pixels of maps.
        """
        attention = self.attentions[name]
        if attention.sampling is not None:
            return splat(samples_of(attention, query), self.size, self.map_sizes)
        return dense_map(attention, query, self.size, self.map_sizes)

    def samples(self, name: str, query: int) -> Samples:
        """Where one query of deformable attention samples; see :func:`samples_of`."""
        return samples_of(self.attentions[name], query)


def view_image(model: nn.Module, picture: Picture, layers: Mapping[str, nn.Module]) -> ImageView:
    """Detects objects in an image and tells what each query attended to.

    Args:
        model: DETR of mmdet, in evaluation mode.
        picture: The image; see :func:`mmdeform.analysis.detectors.load_picture`.
        layers: Attention layers of the encoder and the decoder; see :func:`attention_layers`.

    Raises:
        ValueError: ``model`` is no DETR.
    """
    if not all(hasattr(model, part) for part in ("encoder", "decoder", "bbox_head")):
        raise ValueError(
            f"{type(model).__name__} is no DETR: expected an encoder, a decoder and a bbox_head"
        )
    seen: dict[str, Any] = {}
    maps = model.neck if getattr(model, "with_neck", False) else model.backbone
    hooks = [
        model.backbone.register_forward_pre_hook(lambda module, args: seen.update(input=args[0])),
        maps.register_forward_hook(lambda module, args, output: seen.update(maps=output)),
        model.bbox_head.register_forward_hook(
            lambda module, args, output: seen.update(outputs=output)
        ),
    ]
    try:
        with record_attention(layers) as attentions:
            (result,) = model.test_step(picture.batch)
    finally:
        for hook in hooks:
            hook.remove()
    scores, boxes = predictions_of(model.bbox_head, seen["outputs"])
    return ImageView(
        size=tuple(seen["input"].shape[:1:-1]),
        map_sizes=tuple(tuple(map.shape[:1:-1]) for map in seen["maps"]),
        attentions=attentions,
        scores=scores[0].detach(),
        boxes=box_corners(boxes[0].detach(), result),
    )


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box with others, shape (B,)."""
    corner = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])
    common = corner.clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (box[2:] - box[:2]).prod()
    return common / (areas - common).clamp(min=1e-9)
