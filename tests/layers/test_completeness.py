"""A layer that is registered is known wherever layers are listed by class."""

import inspect

import pytest

pytest.importorskip("mmcv.ops")
from torch import nn

from mmdeform import layers
from mmdeform.coverage.operators import CLASSES
from mmdeform.layers.offset_limit import OffsetLimit
from mmdeform.layers.predictors import predictors
from mmdeform.layers.sampling import sampling_of

PARTS = (layers.LN2d, layers.OffsetConv2d, layers.OffsetLinear)  # of layers: they sample nothing
LAYERS = [cls for name in layers.__all__ if not issubclass(cls := getattr(layers, name), PARTS)]
PREDICTS = ("predict_offset", "predict_sampling", "predict_positions")
PREDICTING = [cls for cls in LAYERS if any(hasattr(cls, name) for name in PREDICTS)]
# DAT limits its offsets itself: a range factor is part of the published layer.
OWN_LIMIT = {layers.DeformableAttention2d: "offset_range_factor"}


def test_layers_are_found() -> None:
    assert layers.DeformRoIPool in LAYERS and layers.DeformRoIPool not in PREDICTING
    assert {layers.DCNv4, layers.DeformableAttention2d} < set(PREDICTING)


@pytest.mark.parametrize("cls", LAYERS)
def test_layer_tells_where_it_samples(cls: type[nn.Module]) -> None:
    assert sampling_of.dispatch(cls) is not sampling_of.dispatch(object)


@pytest.mark.parametrize("cls", LAYERS)
def test_layer_is_counted(cls: type[nn.Module]) -> None:
    assert issubclass(cls, tuple(CLASSES))


@pytest.mark.parametrize("cls", PREDICTING)
class TestPredicting:
    def test_names_what_predicts(self, cls: type[nn.Module]) -> None:
        assert predictors.dispatch(cls) is not predictors.dispatch(object)

    def test_limits_its_offsets(self, cls: type[nn.Module]) -> None:
        if cls in OWN_LIMIT:
            assert OWN_LIMIT[cls] in inspect.signature(cls).parameters
        else:
            assert issubclass(cls, OffsetLimit)
