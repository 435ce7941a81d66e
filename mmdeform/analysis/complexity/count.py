"""FLOPs and parameters of a model: in all, by operator, by part, of each deformable layer."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdeform.layers.sampling import is_deformable

from .counter import FlopCounter
from .mmcv_calls import watch_mmcv
from .run import evaluation

__all__ = ["KINDS", "Complexity", "Part", "complexity", "kind_of"]

KINDS = ("convolution", "matrix product", "attention", "deformable", "RoIAlign")
"""Kinds of operators: see :func:`kind_of`."""

_ELEMENTARY = ("aten.", "prims.", "prim.")
# Operators of torch that do work as convolutions do and have no formula.
_HEAVY = frozenset(
    f"aten.{name}"
    for name in (
        "addbmm _addmm_activation grid_sampler_2d grid_sampler_3d _fft_r2c "
        "_fft_c2c _fft_c2r mkldnn_rnn_layer lstm gru rnn_tanh rnn_relu _sparse_mm "
        "_native_multi_head_attention _transformer_encoder_layer_fwd"
    ).split()
)


def kind_of(operator: str) -> str:
    """The kind of a counted operator.

    Args:
        operator: Its name, with a namespace: ``aten.addmm``, ``mmdeform.dcnv3``.

    Returns:
        One of :data:`KINDS`: ``attention`` is torch's fused attention; ``deformable`` are the
        operators of mmdeform and mmcv, of which DAT's attention is one.
    """
    if operator == "mmcv.roi_align":
        return "RoIAlign"
    namespace, name = operator.split(".", 1)
    if namespace in ("mmdeform", "mmcv"):
        return "deformable"
    if "attention" in name:
        return "attention"
    return "convolution" if "conv" in name else "matrix product"


@dataclass(frozen=True)
class Part:
    """What one module costs, with everything in it.

    Attributes:
        name: Of the module in the model; ``""`` is the model itself.
        type: Name of its class.
        parameters: Number of its parameters; what several modules share belongs to the first.
        by_operator: FLOPs by operator.
    """

    name: str
    type: str
    parameters: int
    by_operator: dict[str, int]

    @property
    def flops(self) -> int:
        """Floating-point operations; a multiply-add is two."""
        return sum(self.by_operator.values())

    @property
    def macs(self) -> int:
        """Multiply-adds, half of the FLOPs: what papers and mmengine mostly call FLOPs."""
        return self.flops // 2

    @property
    def depth(self) -> int:
        """How deep in the model: 0 is the model itself, 1 what it calls backbone or neck."""
        return self.name.count(".") + 1 if self.name else 0

    def by_kind(self) -> dict[str, int]:
        """FLOPs by kind of operator, of all :data:`KINDS`."""
        kinds = dict.fromkeys(KINDS, 0)
        for operator, flops in self.by_operator.items():
            kinds[kind_of(operator)] += flops
        return kinds


@dataclass(frozen=True)
class Complexity:
    """What a forward pass of a model computes.

    Attributes:
        total: The model itself.
        trainable_parameters: Those that require gradients.
        modules: All modules with parameters or FLOPs, in the order of the model, itself first.
        deformable: Names of the deformable layers, ours and mmcv's.
        not_counted: Calls of operators without a formula, by operator.
    """

    total: Part
    trainable_parameters: int
    modules: tuple[Part, ...]
    deformable: tuple[str, ...]
    not_counted: dict[str, int]

    def parts(self, depth: int) -> list[Part]:
        """The modules down to a depth; 1 for those that the model itself names."""
        return [part for part in self.modules if 1 <= part.depth <= depth]

    def disjoint_parts(self, depth: int) -> list[Part]:
        """Parts that do not overlap and make up the total: the modules down to a depth.

        A module with modules of this depth in it is what they leave of it.
        """
        shown = [part for part in self.modules if part.depth <= depth]
        own = []
        for part in shown:
            inner = [p for p in shown if p.depth == part.depth + 1 and _is_in(p.name, part.name)]
            flops = Counter(part.by_operator)
            for child in inner:
                flops.subtract(child.by_operator)
            parameters = part.parameters - sum(child.parameters for child in inner)
            if parameters or any(flops.values()):
                flops += Counter()  # without zeros
                own.append(Part(part.name, part.type, parameters, dict(flops)))
        return own

    def deformable_layers(self) -> list[Part]:
        """The deformable layers, each with the branch that predicts its offsets."""
        return [part for part in self.modules if part.name in self.deformable]

    def missing(self) -> dict[str, int]:
        """What of ``not_counted`` a user should know about.

        That is what is neither torch's own nor mmdeform's, such as mmcv's NMS, and those of torch's
        operators that do the work of products, such as ``grid_sampler_2d``. Norms, activations,
        softmax, sums and other elementary work is left out, as it is in most counts of FLOPs.
        """
        return {
            name: calls
            for name, calls in self.not_counted.items()
            if name in _HEAVY or not name.startswith(_ELEMENTARY)
        }


def complexity(model: nn.Module, *args: Any, **kwargs: Any) -> Complexity:
    """Counts what one forward pass of a model computes, by running it.

    Counted are products, convolutions, fused attention, deformable operators, mmdeform's and
    mmcv's, and mmcv's RoIAlign, by the formulas of ``torch.utils.flop_counter``. The model runs in
    evaluation mode without gradients and is left as it was.

    Args:
        model: Any model. On the ``meta`` device only shapes are computed: that takes no time, but
            works only for models that never look at values, and not with mmcv's operators.
        args: What to call it with.
        kwargs: What to call it with.

    Returns:
        FLOPs and parameters.
    """
    counter = FlopCounter(model)
    # Fused, a layer of torch's transformers would be one operator without a formula.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation(model), watch_mmcv(counter), counter:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    modules = _modules(model, counter.flops)
    return Complexity(
        total=modules[0],
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        modules=tuple(part for part in modules if part.parameters or part.flops or not part.name),
        deformable=tuple(name for name, m in model.named_modules() if is_deformable(m)),
        not_counted=dict(counter.not_counted),
    )


def _modules(model: nn.Module, flops: Mapping[tuple[str, str], int]) -> list[Part]:
    by_operator: dict[str, Counter[str]] = {name: Counter() for name, _ in model.named_modules()}
    parameters: Counter[str] = Counter()
    for (module, operator), count in flops.items():
        for name in _ancestry(module):
            by_operator[name][operator] += count
    for parameter_name, parameter in model.named_parameters():
        for name in _ancestry(parameter_name.rpartition(".")[0]):
            parameters[name] += parameter.numel()
    return [
        Part(name, type(module).__name__, parameters[name], dict(by_operator[name]))
        for name, module in model.named_modules()
    ]


def _is_in(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _ancestry(name: str) -> Iterable[str]:
    """A module's name, those of the modules around it, and that of the model."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
