"""Repairs that let mmengine 0.10 run on current torch versions and find this package's configs.

``import mmdeform`` applies them; a config needs nothing but its ``custom_imports``. Each repair
names the failure it removes, changes nothing else, can be applied any number of times, and does
nothing where mmengine is not installed.
"""

import atexit
import functools
import importlib.util
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "allow_mmengine_checkpoints",
    "enable_cpu_distributed_training",
    "enable_own_configs_as_base",
]

CONFIGS = Path(__file__).resolve().parent / ".mim" / "configs"


def _apply() -> None:
    """Applies every repair of this module.

    Without mmengine there is nothing to repair and nothing happens. An mmengine that cannot be
    imported (for example because OpenCV lacks a system library) is reported as a warning, because
    the operators of this package do not need it.
    """
    if importlib.util.find_spec("mmengine") is None:
        return
    try:
        allow_mmengine_checkpoints()
        enable_cpu_distributed_training()
        enable_own_configs_as_base()
    except ImportError as error:
        warnings.warn(
            f"mmengine is installed but cannot be imported ({error}); mmdeform's operators work, "
            "its detectors will not",
            stacklevel=2,
        )


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read the checkpoints that mmengine writes.

    Failure: since torch 2.6 ``torch.load`` refuses every type it does not know, and mmengine's
    checkpoints hold ``HistoryBuffer`` objects, so that resume, ``load_from``, ``tools/test.py`` and
    ``DetInferencer`` stop with ``Weights only load failed``. The check stays on: only what a
    ``HistoryBuffer`` consists of is allowed, and of ``getattr``, which its pickle calls to find the
    statistics methods, only a version that knows nothing but those methods.
    """
    import numpy as np  # torch alone does not need it
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint

    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray  # numpy 2 renamed it
    allowed: list[Any] = [HistoryBuffer, (_history_buffer_getattr, "builtins.getattr")]
    allowed += [np.ndarray, np.dtype, bytes]  # bytes: what an empty array is made of
    for package in ("numpy._core", "numpy.core"):  # a checkpoint may come from either numpy
        allowed.append((multiarray._reconstruct, f"{package}.multiarray._reconstruct"))
        allowed.append((multiarray.scalar, f"{package}.multiarray.scalar"))
    # Numbers and booleans: never objects, whose arrays can hold anything.
    allowed += sorted({type(np.dtype(code)) for code in "?bhilqBHILQefdFD"}, key=str)
    torch.serialization.add_safe_globals(allowed)
    if hasattr(checkpoint, "get_torch_safe_globals"):
        # onedl-mmengine allows its own list during a load, and then takes it away, though it was
        # allowed before. The list lacks getattr, without which it loads with the check off.
        checkpoint.get_torch_safe_globals = list


def _history_buffer_getattr(owner: Any, name: str) -> Any:
    """``getattr`` for checkpoints: statistics methods of mmengine's ``HistoryBuffer`` only."""
    from mmengine.logging import HistoryBuffer

    # Not HistoryBuffer._statistics_methods: a checkpoint can add to that table.
    allowed = ("current", "max", "mean", "min")
    if owner is not HistoryBuffer or name not in allowed:
        raise pickle.UnpicklingError(
            f"a checkpoint may read {allowed} of HistoryBuffer, but this one reads {name!r} of "
            f"{owner!r}; do not load files from a source you do not trust"
        )
    return getattr(HistoryBuffer, name)


def enable_cpu_distributed_training() -> None:
    """Let mmengine train in several processes on the CPU.

    Failures, all of them on machines without CUDA:

    - ``init_dist`` selects a CUDA device before it creates the process group (``module 'torch._C'
      has no attribute '_cuda_setDevice'``), and mmdet's default backend is nccl. The group is made
      with gloo instead, with a warning where the config asked for another backend.
    - the model wrapper passes ``device_ids``, which ``DistributedDataParallel`` refuses for a model
      whose parameters are on the CPU. They are left out for such models.
    """
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    if not hasattr(utils._init_dist_pytorch, "__wrapped__"):
        utils._init_dist_pytorch = _gloo_without_accelerator(utils._init_dist_pytorch)
    if not hasattr(MMDistributedDataParallel.__init__, "__wrapped__"):
        MMDistributedDataParallel.__init__ = _no_device_ids_on_cpu(
            MMDistributedDataParallel.__init__
        )


def _gloo_without_accelerator(init_dist_pytorch: Any) -> Any:
    @functools.wraps(init_dist_pytorch)
    def wrapper(backend: str, *args: Any, **kwargs: Any) -> None:
        from mmengine.device import get_device

        if get_device() != "cpu":
            init_dist_pytorch(backend, *args, **kwargs)
            return
        if backend != "gloo":
            warnings.warn(
                f"there is no accelerator here: training in several processes uses the backend "
                f"'gloo' instead of '{backend}'",
                stacklevel=2,
            )
        kwargs.pop("init_backend", None)
        torch.distributed.init_process_group(backend="gloo", **kwargs)
        # Nobody else ends the group, and a process that exits while threads of gloo still run may
        # abort ("terminate called without an active exception") although its training succeeded.
        atexit.register(_end_process_group)

    return wrapper


def _end_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _no_device_ids_on_cpu(init: Any) -> Any:
    @functools.wraps(init)
    def wrapper(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs["device_ids"] = None
        init(self, module, *args, **kwargs)

    return wrapper


def enable_own_configs_as_base() -> None:
    """Let configs inherit with ``_base_ = 'mmdeform::<family>/<config>.py'``.

    Failure: mmengine knows the projects whose configs can be inherited by name, and this is none of
    them (``mmengine does not support to load mmdeform config``). It also looks them up where pip
    put the distribution, which for an editable installation is not where the package is.

    The configs behave as mmdet's: their types are found in the scope ``mmdet`` unless they say
    otherwise, whatever the ``default_scope``.
    """
    from mmengine.config import Config

    if not hasattr(Config._get_cfg_path, "__wrapped__"):
        Config._get_cfg_path = staticmethod(_knowing_own_configs(Config._get_cfg_path))


def _knowing_own_configs(get_cfg_path: Any) -> Any:
    @functools.wraps(get_cfg_path)
    def wrapper(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition("::")
        if not separator or package != "mmdeform":
            return get_cfg_path(cfg_path, filename)
        path = CONFIGS / name
        if not path.is_file():
            family = name.partition("/")[0]
            there = sorted(f"{file.parent.name}/{file.name}" for file in CONFIGS.glob("[!_]*/*.py"))
            of_family = [config for config in there if config.startswith(f"{family}/")]
            raise FileNotFoundError(
                f"_base_ = '{cfg_path}' in {filename}: expected a config of mmdeform, one of "
                f"{of_family or there}, but got '{name}'"
            )
        return str(path), "mmdet"

    return wrapper


_apply()
