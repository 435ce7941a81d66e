"""Detections and the places that are looked at."""

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmdeform.analysis.detections import (
    Detection,
    Place,
    annotated_places,
    background_place,
    detections_of,
    innermost,
    largest_objects,
    nearest_box,
    place_of_query,
)


def result(masks: bool = False) -> DetDataSample:
    instances = InstanceData(
        scores=torch.tensor([0.2, 0.9, 0.5, 0.8]),
        labels=torch.tensor([0, 1, 5, 1]),
        bboxes=torch.tensor([[1.0, 2, 5, 6], [4, 1, 8, 3], [0, 0, 20, 10], [3, 3, 3.2, 9]]),
    )
    if masks:
        instances.masks = torch.zeros(4, 10, 20, dtype=torch.bool)
        instances.masks[1, 2, 4] = True
        instances.masks[0, 4:7, 1:4] = True
    return DetDataSample(metainfo=dict(ori_shape=(10, 20)), pred_instances=instances)


def test_detections_best_first_without_empty_ones() -> None:
    found = detections_of(result(), ("disc", "ring"), 0.5)
    assert [(d.name, d.label) for d in found] == [("ring", 1), ("class 5", 5)]
    assert found[0].score == pytest.approx(0.9) and found[0].box.tolist() == [4, 1, 8, 3]
    mask = np.zeros((10, 20), bool)
    mask[1:3, 4:8] = True
    assert np.array_equal(found[0].mask, mask) and not found[0].has_mask
    masked = detections_of(result(masks=True), ("disc", "ring"), 0.0)
    assert [d.name for d in masked] == ["ring", "disc"] and masked[0].has_mask
    assert masked[0].mask.sum() == 1
    assert Place.of(masked[1]).position == (2, 5) and Place.of(masked[1]).name == "disc 0.20"
    assert detections_of(DetDataSample(), (), 0.0) == []


def test_innermost() -> None:
    mask = np.zeros((20, 30), bool)
    mask[3:14, 5:16] = True  # 11 x 11
    mask[0:5, 20:30] = True
    assert innermost(mask) == (10, 8)
    mask[9:19, 17:30] = True  # 13 x 10, at the border of the image
    mask[8, 10] = False
    assert innermost(mask)[0] > 17
    with pytest.raises(ValueError, match="mask must have at least one pixel"):
        innermost(np.zeros((3, 3), bool))


def detection(score: float, *box: float) -> Detection:
    mask = np.zeros((40, 40), bool)
    mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    return Detection("x", 0, score, np.array(box, float), mask, False)


def test_largest_objects_that_are_not_the_same() -> None:
    small, large = detection(0.9, 0, 0, 4, 4), detection(0.6, 10, 10, 30, 30)
    same = detection(0.5, 10, 11, 31, 31)  # as large objects, overlapping by 0.86
    half = detection(0.4, 10, 10, 30, 20)  # just 0.5
    assert largest_objects([small, large, same], 3) == [large, small]
    assert largest_objects([small, large, half], 3) == [large, half, small]
    assert largest_objects([small, large, half], 1) == [large]


def test_background() -> None:
    place = background_place((40, 40), [detection(0.9, 0, 0, 20, 40)])
    assert place.name == "background" and 28 <= place.position[0] <= 31
    place = background_place((40, 40), [detection(0.9, 0, 0, 20, 40)], [[20, 0, 40, 20]])
    assert 28 <= place.position[0] <= 31 and 28 <= place.position[1] <= 31
    assert background_place((40, 40), [], [[0, 0, 40, 40]]) is None


def test_annotated_places() -> None:
    info = dict(
        instances=[
            dict(bbox=[0, 0, 4, 2], bbox_label=1, ignore_flag=0),
            dict(bbox=[0, 0, 40, 40], bbox_label=0, ignore_flag=1),
            dict(bbox=[2, 4, 12, 10], bbox_label=3),
        ]
    )
    large, small = annotated_places(info, ("disc", "ring"))
    assert (large.name, large.label, large.position) == ("class 3", 3, (6.5, 6.5))
    assert (small.name, small.label, small.position) == ("ring", 1, (1.5, 0.5))
    assert small.box.tolist() == [0, 0, 4, 2]


def test_nearest_box_and_places_of_queries() -> None:
    boxes = np.array([[0, 0, 4, 4], [2, 2, 8, 8], [1.0, 1, 5, 6]])
    assert nearest_box(boxes, [1, 1, 5, 5]) == 2
    assert nearest_box(boxes, [2, 2, 9, 9]) == 1
    with pytest.raises(ValueError, match="boxes must hold at least one box"):
        nearest_box(np.zeros((0, 4)), [0, 0, 1, 1])
    place = place_of_query(boxes, 2)
    assert place.position == (2.5, 3.0) and place.query == 2 and place.box.tolist() == [1, 1, 5, 6]
    for query in (-1, 3):
        with pytest.raises(ValueError, match=f"query must be between 0 and 2, but got {query}"):
            place_of_query(boxes, query)
    with pytest.raises(ValueError, match="the detector has no object queries"):
        place_of_query(None, 0)
