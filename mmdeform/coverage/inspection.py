"""Builds the detector of each config, in a process of its own."""

import collections
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import logging
import multiprocessing
import os
import time
import types
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn
from torch.overrides import TorchFunctionMode

from mmdeform.registry import MODELS

from .operators import count_uses, is_served_roi_align, operators_in_source

__all__ = ["Entry", "Use", "inspect_all", "inspect_config"]

# What neither uses these operators nor is needed to build: weights, preprocessing, trackers, and
# activation checkpointing (num_cp). Some need packages or downloads.
LEFT_OUT = (
    "init_cfg",
    "pretrained",
    "checkpoint",
    "teacher_ckpt",
    "data_preprocessor",
    "tracker",
    "num_cp",
)
SECONDS = 300  # that one config may take


@dataclasses.dataclass(frozen=True)
class Use:
    """Modules of one class that use an operator.

    Attributes:
        operator: Name in ``mmdeform.ops``.
        module: Name of the class.
        count: Number of modules.
        by_type: How many of them become mmdeform's when the config names mmdeform's types. The
            rest is fixed in the source and needs ``mmdeform.accelerate``.
    """

    operator: str
    module: str
    count: int
    by_type: int = 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of one config.

    Attributes:
        file: Path relative to the folder of configs.
        model: Type of the detector, or an empty string.
        status: ``builds``; ``in parts`` if only its parts build; ``fails``; ``no model`` if there
            is nothing to build.
        cause: Why it does not build, or an empty string.
        uses: Users of deformable operators, sorted.
        roi_align: Number of RoIAlign modules that ``mmdeform.accelerate`` serves.
    """

    file: str
    model: str = ""
    status: str = "builds"
    cause: str = ""
    uses: tuple[Use, ...] = ()
    roi_align: int = 0

    @property
    def family(self) -> str:
        """The folder of the config."""
        return str(Path(self.file).parent)

    @property
    def operators(self) -> list[str]:
        """Names of the operators."""
        return sorted({use.operator for use in self.uses})


class LanguageModelStub(nn.Module):
    """Stands for a language model, whose weights and tokenizer would be downloaded."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.language_backbone = nn.Module()
        self.language_backbone.body = nn.Module()
        self.language_backbone.body.language_dim = 768  # BERT-base


def inspect_config(path: Path, root: Path) -> Entry:
    """Builds the detector of a config and looks for deformable operators.

    Changes the working directory and the default scope: see :func:`inspect_all`.

    Args:
        path: The config file.
        root: The folder of configs.

    Returns:
        The result; whatever goes wrong is its ``cause``.
    """
    file = path.relative_to(root).as_posix()
    # Configs name each other relative to the repository, the parent of their folder.
    os.chdir(root.parent)
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
    except (Exception, SystemExit) as error:
        return Entry(file, status="fails", cause=f"cannot be read: {_shorten(error, root)}")
    model = cfg.get("model")
    if not isinstance(model, dict) or "type" not in model:
        return Entry(file, status="no model")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    model_cfg = _reduced(model)
    built = _Parts()
    try:
        if "custom_imports" in cfg:
            import_modules_from_strings(**cfg["custom_imports"])
        built.modules.append(_build(model_cfg))
        status, cause = "builds", ""
    except (Exception, SystemExit) as error:
        built.add(model_cfg)
        status, cause = "in parts" if built.modules else "fails", _shorten(error, root)
    counts = count_uses(built.modules)
    by_type = count_uses(_rebuilt_with_plugins(model_cfg), "mmdeform.") if counts else {}
    uses = [Use(*use, count, by_type.get(use, 0)) for use, count in counts.items()]
    for cls, count in built.failed.items():
        uses += [Use(name, cls.__name__, count) for name in operators_in_source(cls)]
    return Entry(
        file,
        model=_type_name(model["type"]),
        status=status,
        cause=cause,
        uses=tuple(sorted(uses, key=dataclasses.astuple)),
        roi_align=sum(is_served_roi_align(m) for part in built.modules for m in part.modules()),
    )


@dataclasses.dataclass
class _Parts:
    """The largest parts of a config that build, and the classes of those that do not."""

    modules: list[nn.Module] = dataclasses.field(default_factory=list)
    failed: collections.Counter[type] = dataclasses.field(default_factory=collections.Counter)

    def add(self, cfg: Any) -> None:
        if isinstance(cfg, dict) and "type" in cfg:
            try:
                self.modules.append(_build(cfg))
                return
            except (Exception, SystemExit):
                cls = _class(cfg["type"])
                if cls is not None:
                    self.failed[cls] += 1
        if isinstance(cfg, (dict, list, tuple)):
            for child in cfg.values() if isinstance(cfg, dict) else cfg:
                self.add(child)


class _ParametersOnMeta(TorchFunctionMode):
    """Parameters and buffers get no memory; numbers computed while building stay real.

    ``torch.device('meta')`` would take the numbers too, such as Swin's rates of stochastic depth.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty or function is torch.Tensor.__new__:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _build(cfg: dict) -> nn.Module:
    with _ParametersOnMeta():
        return ROOT_MODELS.build(copy.deepcopy(cfg))


def _edit(cfg: Any, change: Callable[[dict], dict]) -> Any:
    """A copy of a config in which every dict went through ``change``."""
    if isinstance(cfg, dict):
        edited = change({key: _edit(value, change) for key, value in cfg.items()})
        return type(cfg)(edited)
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_edit(value, change) for value in cfg)
    return cfg


def _reduced(cfg: Any) -> Any:
    """The config without what is left out, for one process, and without language models."""

    def change(node: dict) -> dict:
        if _type_name(node.get("type")) == "BertModel":
            return dict(type=LanguageModelStub)
        if node.get("type") == "MMSyncBN":  # needs a process group already when it is built
            node["type"] = "BN"
        return {key: value for key, value in node.items() if key not in LEFT_OUT}

    return _edit(cfg, change)


def _rebuilt_with_plugins(cfg: dict) -> list[nn.Module]:
    """The modules of a config in which mmdeform's types stand wherever there is one."""

    def change(node: dict) -> dict:
        name = _type_name(node.get("type"))
        return dict(node, type=f"mmdeform.{name}") if name in MODELS.module_dict else node

    MODELS.import_from_location()
    parts = _Parts()
    parts.add(_edit(cfg, change))
    return parts.modules


def _type_name(kind: Any) -> str:
    """``DCN`` of a ``type=`` that is a string, with or without scope, or a class."""
    return getattr(kind, "__name__", str(kind)).rpartition(".")[2]


def _class(kind: Any) -> type | None:
    """The class that a ``type=`` names, or None."""
    if isinstance(kind, type):
        return kind
    with ROOT_MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)


def _shorten(error: BaseException, root: Path) -> str:
    while isinstance(error, ImportError) and isinstance(error.__context__, ImportError):
        error = error.__context__  # mmengine's says which imports it tried, this one what lacks
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace(f"{root}/", "")
    return text if len(text) <= 160 else f"{text[:157]}..."


def inspect_all(
    paths: Sequence[Path], root: Path, jobs: int, report: Callable[[Entry], None]
) -> list[Entry]:
    """Inspects configs, each in a process of its own.

    Args:
        paths: The config files.
        root: The folder of configs.
        jobs: Number of processes at a time.
        report: Called with each result as it arrives.

    Returns:
        The results, sorted by file.
    """
    _warm_up()
    context = multiprocessing.get_context("fork")
    waiting, running, entries = collections.deque(paths), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            path = waiting.popleft()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_entry, args=(sender, path, root), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (path, process, time.monotonic())
        for receiver in wait(list(running), timeout=1):
            path, process, _ = running.pop(receiver)
            entries.append(_receive_entry(receiver, path, root, process))
            report(entries[-1])
        for _, process, start in running.values():
            if time.monotonic() - start > SECONDS:
                process.kill()
    return sorted(entries, key=lambda entry: entry.file)


def _warm_up() -> None:
    """Does here, once, what every process would do for itself."""
    if importlib.util.find_spec("mmdet") is not None:
        importlib.import_module("mmdet.models")
    # Operations on meta tensors import half of torch when the first of them runs.
    with torch.device("meta"):
        nn.Conv2d(1, 1, 1).weight.data.normal_()


def _stub_language_layers() -> None:
    """GLIP's head holds layers of transformers, whose settings would be downloaded."""
    head = importlib.import_module("mmdet.models.dense_heads.atss_vlfusion_head")
    settings = types.SimpleNamespace(hidden_size=768)
    head.BertConfig = types.SimpleNamespace(from_pretrained=lambda name: settings)
    head.BertEncoderLayer = nn.Identity


def _send_entry(sender: Connection, path: Path, root: Path) -> None:
    gc.freeze()  # a collection would copy all that is shared with the other processes
    torch.set_num_threads(1)  # threads of the process that was forked are not here
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        if importlib.util.find_spec("mmdet") is not None:
            _stub_language_layers()
        sender.send(inspect_config(path, root))


def _receive_entry(receiver: Connection, path: Path, root: Path, process: Any) -> Entry:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        cause = f"its process ended with exit status {process.exitcode}"
        return Entry(path.relative_to(root).as_posix(), status="fails", cause=cause)
    finally:
        process.join()
