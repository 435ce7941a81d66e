"""A new module in the place of an old one: weights, state and initialisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdeform.layers import OffsetConv2d, OffsetLinear
from mmdeform.layers.predictors import predictors

__all__ = ["Graft", "InitWeights"]


class Graft:
    """Puts ``new`` in every place of ``old``.

    Parameters and buffers of the same name and shape are carried over. Parameters are shared as
    objects, so that whatever fills those of the old module, in place, fills the new one's; the old
    module keeps no memory but for what the new one does not have. What predicts offsets is the
    exception: the new module starts from its own.

    New parameters are frozen where all of the old ones are. The new module is on the old one's
    device and in its mode (training or evaluation).

    Args:
        old: Module to be replaced.
        new: Module that replaces it.
        places: Parents of the old module, with its name there.

    Attributes:
        carried: Names of the parameters that are shared.
        predictors: Names of those that could be, but predict offsets.
        buffers: Names of the buffers that are carried over.
    """

    def __init__(
        self, old: nn.Module, new: nn.Module, places: Sequence[tuple[nn.Module, str]]
    ) -> None:
        self.old, self.new, self.places = old, new, places
        parameters = list(old.parameters())
        if parameters:
            new.to(parameters[0].device, parameters[0].dtype)
        new.train(old.training)
        same = _same(dict(old.named_parameters()), dict(new.named_parameters()))
        new_parameters, offsets = dict(new.named_parameters()), _offset_parameters(new)
        self.predictors = [name for name in same if new_parameters[name] in offsets]
        self.carried = [name for name in same if name not in self.predictors]
        self.buffers = _same(dict(old.named_buffers()), dict(new.named_buffers()))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            new.requires_grad_(False)
        _share(self.carried, old, new)
        self._copy_buffers()
        for parent, name in places:
            # Not as below: registering a module may bring hooks.
            setattr(parent, name, new)

    def put_back(self, info: dict | None) -> None:
        """Gives the old module its places again, to be initialised.

        Args:
            info: mmengine's record of how parameters were initialised, where a parent of the
                detector keeps one.
        """
        # A move to another device may have made new parameters.
        _share(self.carried, self.new, self.old)
        self._place(self.old)
        self._loaded: set[str] = set()
        for owner in {name.rpartition(".")[0] for name in self.predictors}:
            self.old.get_submodule(owner).register_load_state_dict_pre_hook(self._note_loaded)
        if info is not None:
            for module in self.old.modules():
                module._params_init_info = info
            for parameter in self.old.parameters():
                info[parameter].setdefault("init_info", "replaced")
                info[parameter].setdefault("tmp_mean_value", parameter.data.mean().cpu())

    def take_place(self) -> None:
        """Puts the new module where the old one was initialised."""
        self._place(self.new)

    def init_new(self) -> None:
        """Initialises what the new module has of its own."""
        shared = dict(self.new.named_parameters())
        values = {name: shared[name].detach().clone() for name in self.carried}
        if hasattr(self.new, "init_weights") and not getattr(self.new, "is_init", False):
            self.new.init_weights()
        old = dict(self.old.named_parameters())
        values.update({name: old[name] for name in self.predictors if name in self._loaded})
        with torch.no_grad():
            for name, value in values.items():
                shared[name].copy_(value)
        self._copy_buffers()

    def _place(self, module: nn.Module) -> None:
        for parent, name in self.places:
            parent._modules[name] = module

    def _copy_buffers(self) -> None:
        old, new = dict(self.old.named_buffers()), dict(self.new.named_buffers())
        for name in self.buffers:
            new[name].copy_(old[name])

    def _note_loaded(self, module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
        for name in self.predictors:
            owner, _, leaf = name.rpartition(".")
            if self.old.get_submodule(owner) is module and prefix + leaf in state_dict:
                self._loaded.add(name)


class InitWeights:
    """``init_weights`` of a detector with replaced modules, for the first call.

    mmengine chooses initial values by the classes and names of layers, and checkpoints of an
    ``init_cfg`` by the module that they were made of. So the detector is initialised as it was,
    with the old modules; the new ones keep the values of the parameters that they share and
    initialise the others themselves.

    Stands in the detector's instance dict. It can be copied and pickled with it.
    """

    def __init__(self, detector: nn.Module, grafts: Sequence[Graft]) -> None:
        self.detector, self.grafts = detector, grafts
        self.previous = vars(detector).get("init_weights")  # of a Transplant inside this one

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Initialises the detector and gives it its own ``init_weights`` back."""
        del self.detector.init_weights
        if self.previous is not None:
            self.detector.init_weights = self.previous
        info = getattr(self.detector, "_params_init_info", None)
        for graft in self.grafts:
            graft.put_back(info)
        try:
            self.detector.init_weights(*args, **kwargs)
        finally:
            for graft in self.grafts:
                graft.take_place()
        for graft in self.grafts:
            graft.init_new()


def _same(old: dict[str, Tensor], new: dict[str, Tensor]) -> list[str]:
    return [name for name in new if name in old and old[name].shape == new[name].shape]


def _share(names: Sequence[str], source: nn.Module, target: nn.Module) -> None:
    parameters = dict(source.named_parameters())
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, parameters[name])


def _offset_parameters(module: nn.Module) -> set[Tensor]:
    """The parameters of what predicts offsets."""
    layers = []
    with torch.device("cpu"):  # a detector may be built on "meta", where nothing can be read
        for layer in module.modules():
            layers += [p.module for p in predictors(layer) if p.is_offset.any()]
            layers += [layer] if isinstance(layer, (OffsetConv2d, OffsetLinear)) else []
    return {parameter for layer in layers for parameter in layer.parameters()}
