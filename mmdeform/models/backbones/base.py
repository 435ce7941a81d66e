"""What the backbones here have in common: four stages, and a loader of their own."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import nn

from .loading import LoadReport, PublishedFormat, load_backbone

__all__ = ["STAGES", "Backbone", "rising_rates"]

STAGES = 4


class Backbone(BaseModule):
    """A backbone or classifier of four stages.

    Args:
        num_classes: Makes a classifier with so many classes; 0: a backbone.
        out_indices: Stages whose maps are returned.
        frozen_stages: Freezes the stem and so many stages; -1: nothing.
        init_cfg: Of mmengine; 'Pretrained' weights are loaded by :meth:`load_checkpoint`.

    Raises:
        ValueError: An argument is out of range.
    """

    published: PublishedFormat

    def __init__(
        self,
        num_classes: int,
        out_indices: Sequence[int],
        frozen_stages: int,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None,
    ) -> None:
        super().__init__(init_cfg)
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 (a backbone) or more, got {num_classes}")
        if not out_indices or not set(out_indices) <= set(range(STAGES)):
            raise ValueError(
                f"out_indices: expected indices of stages, 0 to {STAGES - 1}, got {out_indices}"
            )
        if not -1 <= frozen_stages <= STAGES:
            raise ValueError(
                f"frozen_stages: expected -1 (nothing) to {STAGES} (all stages), "
                f"got {frozen_stages}"
            )
        self.num_classes = num_classes
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages

    @property
    def built_stages(self) -> int:
        """How many stages are needed."""
        return STAGES if self.num_classes else max(self.out_indices) + 1

    def load_checkpoint(
        self,
        checkpoint: str | os.PathLike | Mapping[str, Any],
        prefix: str | None = None,
        map_location: str | torch.device = "cpu",
        logger: Any = "current",
    ) -> LoadReport:
        """Loads weights in place and logs what fitted: see :func:`load_backbone`."""
        return load_backbone(self, checkpoint, self.published, prefix, map_location, logger)

    def init_weights(self) -> None:
        """Initialises as ``init_cfg`` says; pretrained weights come last, by the own loader."""
        if self.is_init:
            super().init_weights()  # warns
            return
        init_cfg = self.init_cfg
        configs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        pretrained = [cfg for cfg in configs if cfg["type"] in ("Pretrained", PretrainedInit)]
        self.init_cfg = [cfg for cfg in configs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = init_cfg
        for cfg in pretrained:
            self.load_checkpoint(**{key: cfg[key] for key in cfg if key != "type"})

    def train(self, mode: bool = True) -> "Backbone":
        """Sets training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            for module in self._frozen_modules(self.frozen_stages):
                module.eval().requires_grad_(False)

    def _frozen_modules(self, stages: int) -> Iterable[nn.Module]:
        """The stem and ``stages`` stages, with their norms and what lies between them."""
        raise NotImplementedError


def rising_rates(last: float, count: int) -> list[float]:
    """Drop path rates that rise from 0 to ``last``; of a single block 0."""
    return [last * index / max(1, count - 1) for index in range(count)]
