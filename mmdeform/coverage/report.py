"""The tables, as Markdown and as JSON."""

import collections
import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch

from mmdeform.ops import _library

from .inspection import Entry, Use

__all__ = ["to_json", "to_markdown"]

DEVICES = ("cpu", "cuda")
LEGEND = """\
How: *type* where a config reaches a module by `type='mmdeform...'`; *accelerate* where mmdet's
source fixes the class, so that `custom_imports=['mmdeform.accelerate']` is the way (it serves the
former too; `mmdeform.typed_attention` gives attention a `type` everywhere). Kernels: *compiled*,
the *reference* in PyTorch, or *not built*. RoIAlign: modules that average with `aligned=True`,
which `mmdeform.accelerate` can serve on the CPU.

Models were built without weights, preprocessing, trackers, activation checkpointing, process group
and BERT. Of a model that does not build the parts were built that can be, and the source of the
other classes was searched."""


def kernel(operator: str, device_type: str) -> str:
    """What computes an operator here: ``compiled``, ``reference``, or ``not built``."""
    key = device_type.upper()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mmdeform::{operator}", key):
        return "compiled"
    if device_type == "cuda" and torch.version.cuda is None:
        # This torch does not load the library; another would.
        return "compiled" if _library.status()[device_type].path.exists() else "not built"
    return "reference"


def to_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """All that was found, for ``--json``."""
    operators = sorted({name for entry in entries for name in entry.operators})
    return {
        "format": 1,
        "kernels": {name: {d: kernel(name, d) for d in DEVICES} for name in operators},
        "configs": [dataclasses.asdict(entry) for entry in entries],
    }


def to_markdown(entries: Sequence[Entry], command: str) -> str:
    """The tables of docs/coverage.md.

    Args:
        entries: The results.
        command: The command line that is named at the top.
    """
    touching = [entry for entry in entries if entry.uses]
    failing = [entry for entry in entries if entry.cause]
    models = [entry for entry in entries if entry.status != "no model"]
    sections = [
        f"# Which configs use deformable operators\n\nWritten by `{command}`, with {_versions()}.",
        f"- {len(entries)} configs; {len(entries) - len(models)} of them have no model.\n"
        f"- {len(models) - len(failing)} models build, {len(failing)} do not: causes at the end.\n"
        f"- **{len(touching)} touch a deformable operator.**\n"
        f"- {sum(entry.roi_align > 0 for entry in entries)} use a RoIAlign.",
        LEGEND,
        _section("Operators", ("operator", "configs", *DEVICES), _operator_rows(touching)),
        _section(
            "Families",
            ("family", "configs", "touch", "do not build", "operators", "how"),
            _family_rows(entries),
        ),
        _section(
            "Configs that touch a deformable operator",
            ("config", "model", "builds", "modules", "how", *DEVICES, "RoIAlign"),
            [_config_row(entry) for entry in touching],
        ),
        _section(
            "Configs that do not build",
            ("config", "model", "touches", "cause"),
            [(entry.file, entry.model, _found(entry), entry.cause) for entry in failing],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _versions() -> str:
    installed = []
    for name in ("mmdet", "mmcv", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(installed)


def _found(entry: Entry) -> str:
    if entry.status == "fails":
        return "unknown"
    return ", ".join(entry.operators) or "nothing found"


def _operator_rows(entries: Sequence[Entry]) -> list[tuple]:
    counts = collections.Counter(name for entry in entries for name in entry.operators)
    return [(n, counts[n], *(kernel(n, device) for device in DEVICES)) for n in sorted(counts)]


def _family_rows(entries: Sequence[Entry]) -> list[tuple]:
    families: dict[str, list[Entry]] = {}
    for entry in entries:
        families.setdefault(entry.family, []).append(entry)
    rows = []
    for family, members in sorted(families.items()):
        uses = [use for entry in members for use in entry.uses]
        if uses:
            rows.append(
                (
                    family,
                    len(members),
                    sum(bool(entry.uses) for entry in members),
                    sum(bool(entry.cause) for entry in members),
                    ", ".join(sorted({use.operator for use in uses})),
                    _how(uses),
                )
            )
    return rows


def _config_row(entry: Entry) -> tuple:
    return (
        entry.file,
        entry.model,
        "yes" if entry.status == "builds" else entry.status,
        ", ".join(f"{use.count} {use.module}" for use in entry.uses),
        _how(entry.uses),
        *(
            ", ".join(sorted({kernel(name, device) for name in entry.operators}))
            for device in DEVICES
        ),
        entry.roi_align or "",
    )


def _how(uses: Sequence[Use]) -> str:
    by_type = any(use.by_type for use in uses)
    fixed = any(use.by_type < use.count for use in uses)
    return ", ".join(["type"] * by_type + ["accelerate"] * fixed)


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells]]
    return f"## {title}\n\n" + ("\n".join(lines) if rows else "None.")
