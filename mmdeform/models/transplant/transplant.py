"""The detector of a config with some of its modules replaced."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from mmdeform.registry import MODELS

from .arguments import take_arguments
from .graft import Graft, InitWeights
from .select import select

__all__ = ["Transplant"]


@MODELS.register_module()
def Transplant(
    model: str | type | dict[str, Any] | nn.Module | None = None,
    *,
    rules: Sequence[dict[str, Any]],
    data_preprocessor: dict[str, Any] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Builds a detector and replaces modules of it by modules from the registry.

    The result is the plain detector, of its own class. A rule replaces every module that its
    ``select`` finds::

        model = dict(
            type="mmdeform.Transplant",
            model="FasterRCNN",  # the type that `_base_` has
            rules=[
                dict(select="backbone.layer[34].*.conv2", type="mmdeform.DCNv2", deform_groups=1)
            ],
        )

    The new module is given the arguments of the rule, and for all others that its constructor has
    what the old module knows under that name (kernel_size, stride, embed_dims, num_heads, ...).
    Parameters of the same name and shape are carried over, so that checkpoints of the plain
    detector fill them, before and after; ``init_weights`` gives them what the plain detector would
    have, and leaves the new ones to the new module. Frozen parameters stay so.

    Args:
        model: The detector: its type, with its other arguments beside it; or its whole config,
            such as ``{{_base_.model}}``, with ``_delete_=True`` beside it; or the detector itself.
        rules: One dict per kind of replacement: ``select``, a pattern of module names or a list
            of them (``*``, ``?``, ``[34]`` within a part of a name, ``**`` for any number of
            parts); ``type``, anything that a config may name; and arguments for it. A module with
            several names is replaced under all of them, by the same new one.
        data_preprocessor: Config, for a detector that has none; mmengine's runner adds it.
        **arguments: Arguments of the detector where ``model`` is its type.

    Returns:
        The detector.

    Raises:
        KeyError: There is no such type.
        TypeError: An argument is of the wrong kind.
        ValueError: A rule selects nothing, or what another one replaces, or does not fit.
    """
    detector = _build(model, data_preprocessor, arguments)
    modules = dict(detector.named_modules(remove_duplicate=False))
    plan = _plan(detector, _check_rules(rules), modules)
    # All of them before the first is placed: an error leaves the detector as it was.
    new = [_make(modules[names[0]], names[0], rule, label) for names, rule, label in plan]
    grafts = []
    for (names, _, _), module in zip(plan, new, strict=True):
        places = {}
        for parent, _, leaf in (name.rpartition(".") for name in names):
            places[id(modules[parent]), leaf] = (modules[parent], leaf)
        grafts.append(Graft(modules[names[0]], module, list(places.values())))
    if grafts:
        if hasattr(detector, "init_weights"):
            detector.init_weights = InitWeights(detector, grafts)
        print_log(_table([names for names, _, _ in plan], grafts), logger="current")
    return detector


def _plan(
    detector: nn.Module, rules: Sequence[dict[str, Any]], modules: dict[str, nn.Module]
) -> list[tuple[list[str], dict[str, Any], str]]:
    """All names of each module that is replaced, with its rule and how to call that in errors."""
    own_names: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        own_names[id(module)].append(name)
    plan = []
    chosen: dict[str, str] = {}
    for index, rule in enumerate(rules):
        label = f"rules[{index}]"
        try:
            selected = select(detector, rule["select"])
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        for key in dict.fromkeys(id(modules[name]) for name in selected):
            for name in own_names[key]:
                if name in chosen:
                    raise ValueError(f"{label} and {chosen[name]} both select {name!r}")
                chosen[name] = label
            plan.append((own_names[key], rule, label))
    _check_nesting(chosen)
    return plan


def _build(model: Any, data_preprocessor: Any, arguments: dict[str, Any]) -> nn.Module:
    if isinstance(model, (str, type)):
        if data_preprocessor is not None:
            arguments = dict(arguments, data_preprocessor=data_preprocessor)
        return MODELS.build(dict(arguments, type=model))
    if not isinstance(model, (dict, nn.Module)):
        raise TypeError(
            "Transplant: expected the type of the detector, model='FasterRCNN', or its config, "
            f"model={{{{_base_.model}}}}, got model={model!r}"
        )
    if arguments:
        raise TypeError(
            f"Transplant: model is a whole detector, but there are other arguments for one: "
            f"{', '.join(arguments)}. If they come from _base_, either put _delete_=True beside "
            "type, or name only the type, model='FasterRCNN'"
        )
    if isinstance(model, nn.Module):
        return model
    model = model.copy()
    if data_preprocessor is not None:
        model.setdefault("data_preprocessor", data_preprocessor)
    return MODELS.build(model)


def _check_rules(rules: Any) -> Sequence[dict[str, Any]]:
    if not isinstance(rules, (list, tuple)):
        raise TypeError(f"Transplant: rules must be a list of dicts, got {rules!r}")
    for index, rule in enumerate(rules):
        if not isinstance(rule, dict) or not {"select", "type"} <= set(rule):
            raise TypeError(
                f"Transplant: rules[{index}] must be dict(select=..., type=..., arguments), "
                f"got {rule!r}"
            )
    return rules


def _resolve(kind: Any, scope: str | None, label: str) -> Callable[..., nn.Module]:
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(scope) as registry:
        resolved = registry.get(kind)
    if resolved is None:
        raise KeyError(f"{label}: type {kind!r} is in no registry of models; is it imported?")
    return resolved


def _check_nesting(chosen: dict[str, str]) -> None:
    for name, label in chosen.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            outer = ".".join(parts[:length])
            if outer in chosen:
                raise ValueError(
                    f"{label} selects {name!r}, which is part of {outer!r}, selected by "
                    f"{chosen[outer]}"
                )


def _make(old: nn.Module, name: str, rule: dict[str, Any], label: str) -> nn.Module:
    settings = {key: value for key, value in rule.items() if key != "select"}
    kind = _resolve(settings.pop("type"), settings.pop("_scope_", None), label)
    title = f"{label}, {name} ({type(old).__name__})"
    if old._forward_pre_hooks or old._forward_hooks or is_parametrized(old):
        raise ValueError(f"{title} has hooks, such as spectral_norm, which cannot be kept")
    try:
        # Copies: constructors take dicts apart, and one rule serves many modules.
        arguments = copy.deepcopy(take_arguments(old, kind, settings))
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from None
    try:
        new = kind(**arguments)
    except Exception as error:
        raise ValueError(
            f"{title}: {getattr(kind, '__name__', kind)}({_format(arguments)}) fails with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(new, nn.Module):
        raise TypeError(f"{title}: type must make a torch.nn.Module, got {new!r}")
    if getattr(old, "transposed", False) != getattr(new, "transposed", False):
        raise ValueError(
            f"{title}: only one of {type(old).__name__} and {type(new).__name__} is a transposed "
            "convolution"
        )
    return new


def _format(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _table(names_of: Sequence[list[str]], grafts: Sequence[Graft]) -> str:
    rows = [("module", "was", "is", "carried over", "new")]
    for names, graft in zip(names_of, grafts, strict=True):
        new = [name for name, _ in graft.new.named_parameters() if name not in graft.carried]
        rows.append(
            (
                names[0] + (f" (and {len(names) - 1} more names)" if len(names) > 1 else ""),
                type(graft.old).__name__,
                type(graft.new).__name__,
                ", ".join(graft.carried) or "-",
                ", ".join(new) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return f"Transplant replaced {len(grafts)} modules:\n" + "\n".join(lines)
