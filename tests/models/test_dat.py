"""DAT and DAT++: published sizes, any image, training, options, errors."""

import pytest
import torch

pytest.importorskip("mmcv.ops")
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.models import DAT
from mmdeform.registry import MODELS

# (version, arch): parameters of the classifier, and products and convolutions at 224, in GMACs.
PUBLISHED = {
    ("v1", "tiny"): (28_319_138, 4.5635),
    ("v1", "small"): (49_700_402, 8.9587),
    ("v1", "base"): (87_881_632, 15.7214),
    ("pp", "tiny"): (23_962_876, 4.2590),
    ("pp", "small"): (53_127_366, 9.3825),
    ("pp", "base"): (93_690_640, 16.5020),
}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class TestPublished:
    """On the meta device, which computes shapes and no numbers."""

    @pytest.mark.parametrize(("version", "arch"), PUBLISHED)
    def test_classifier(self, version: str, arch: str) -> None:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = DAT(arch, version, num_classes=1000, backend="reference").eval()
            logits = model(torch.randn(1, 3, 224, 224))
        count, gmacs = PUBLISHED[version, arch]
        assert logits.shape == (1, 1000)
        assert parameters(model) == count
        assert round(counter.get_total_flops() / 2e9, 4) == gmacs

    @pytest.mark.parametrize(("version", "count"), [("v1", 27_551_482), ("pp", 23_450_772)])
    def test_backbone(self, version: str, count: int) -> None:
        with torch.device("meta"):
            model = MODELS.build(dict(type="mmdeform.DAT", version=version))
            maps = model(torch.randn(2, 3, 224, 224))
        assert parameters(model) == count
        dims = (96, 192, 384, 768) if version == "v1" else (64, 128, 256, 512)
        sizes = (56, 28, 14, 7)
        assert [tuple(y.shape) for y in maps] == [
            (2, d, s, s) for d, s in zip(dims, sizes, strict=True)
        ]
