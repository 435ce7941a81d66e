"""The rules that hold the code together: who imports whom, and what makes up an operator."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import flop_registry

import mmdeform.ops
from mmdeform.ops import _library

from .conftest import has_kernels
from .ops.contracts import OperatorContract

ROOT = Path(__file__).resolve().parent.parent

# A part may import parts of lower rank, and itself.
RANKS = {
    "mmdeform.version": 0,
    "mmdeform.compat": 0,
    "mmdeform.ops": 1,
    "mmdeform.registry": 1,
    "mmdeform.layers": 2,
    "mmdeform.accelerate": 3,
    "mmdeform.models": 3,
    "mmdeform.analysis": 3,
    "mmdeform.typed_attention": 3,
    "mmdeform.engine": 4,  # hooks draw what analysis finds
    "mmdeform.doctor": 4,
    "mmdeform.coverage": 4,
    "mmdeform.ablation": 5,
    "mmdeform": 6,  # the package's own __init__.py
    "configs": 7,
    "tools": 7,
}
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("mmdeform", "configs", "tools")
    for path in (ROOT / folder).rglob("*.py")
)
OPERATORS = sorted(
    name.removeprefix("mmdeform::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("mmdeform::") and not name.endswith("_backward")
)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """The entry of RANKS to which a module belongs."""
    first, *rest = module.split(".")
    if first in ("configs", "tools") or not rest:
        return first
    return f"{first}.{rest[0]}"


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of all modules, or names in modules, that a source imports, also lazily."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What ``module`` must not import by the rank of its part."""
    own = part(module)
    wrong = []
    for name in imports(source, module, is_package):
        if name.split(".")[0] not in ("mmdeform", "configs", "tools"):
            continue
        # `from mmdeform import __version__` takes a name of the package itself.
        target = part(name) if part(name) in RANKS or is_part(name) else part(name.split(".")[0])
        if target != own and RANKS[target] >= RANKS[own]:
            wrong.append(name)
    return wrong


def is_part(name: str) -> bool:
    path = ROOT.joinpath(*part(name).split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    assert part(module) in RANKS, f"give {part(module)} a rank"
    source = (ROOT / path).read_text()
    assert not wrong_imports(source, module, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("mmdeform.ops.x", "from ..layers import DeformConv2d", True),
        ("mmdeform.ops.x", "from .. import layers", True),
        ("mmdeform.ops.x", "def f():\n    import mmdeform.models.detectors", True),
        ("mmdeform.layers.x", "from mmdeform import models", True),
        ("mmdeform.layers.x", "import mmdeform", True),
        ("mmdeform.models.x", "import tools.train", True),
        ("mmdeform.analysis.x", "from ..engine.y import z", True),
        ("mmdeform.layers.x", "from ..ops import deform_conv2d\nfrom . import y", False),
        ("mmdeform.analysis.x.y", "from ...layers import z", False),
        ("tools.x", "from mmdeform.analysis import y", False),
    ],
)
def test_the_import_rule_can_fail(module: str, source: str, wrong: bool) -> None:
    assert bool(wrong_imports(source, module)) == wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[1] == "ops"], ids=str)
def test_operators_need_torch_alone(path: Path) -> None:
    is_package = path.name == "__init__.py"
    names = list(imports((ROOT / path).read_text(), module_name(path), is_package))
    assert names
    allowed = {"torch", "mmdeform", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in names} <= allowed


def test_there_are_operators() -> None:
    assert {"deform_conv2d", "ms_deform_attn"} <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
class TestOperator:
    """A schema without one of its parts is half an operator."""

    def has_kernel(self, name: str, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"mmdeform::{name}", key)

    def test_has_its_files(self, operator: str) -> None:
        for path in (
            f"mmdeform/ops/{operator}.py",
            f"mmdeform/layers/{operator}.py",
            f"csrc/cpu/{operator}.cpp",
            f"csrc/cuda/{operator}.cu",
            f"tests/ops/test_{operator}.py",
            f"tests/layers/test_{operator}.py",
        ):
            assert (ROOT / path).is_file(), path

    def test_is_public_with_its_reference(self, operator: str) -> None:
        for name in (operator, f"{operator}_reference"):
            assert name in mmdeform.ops.__all__
            assert callable(getattr(mmdeform.ops, name))

    def test_is_documented(self, operator: str) -> None:
        function = getattr(mmdeform.ops, operator)
        text = inspect.getdoc(function) or ""
        for section in ("Args:", "Returns:", "Raises:", "Source:"):
            assert section in text
        signature = inspect.signature(function)
        for name, parameter in signature.parameters.items():
            assert re.search(rf"^ +{name}: ", text, re.M), name
            assert parameter.annotation is not parameter.empty, name
        assert signature.return_annotation is not signature.empty

    def test_reference_has_the_arguments_of_the_schema(self, operator: str) -> None:
        schema = getattr(torch.ops.mmdeform, operator).default._schema
        reference = getattr(mmdeform.ops, f"{operator}_reference")
        arguments = [argument.name for argument in schema.arguments]
        assert list(inspect.signature(reference).parameters) == arguments

    def test_is_registered(self, operator: str) -> None:
        assert f"mmdeform::{operator}_backward" in torch._C._dispatch_get_all_op_names()
        for name in (operator, f"{operator}_backward"):
            assert self.has_kernel(name, "CompositeExplicitAutograd"), f"{name}: no reference"
            assert self.has_kernel(name, "Meta"), f"{name}: no fake"
            assert self.has_kernel(name, "Autograd"), f"{name}: no gradient, or its refusal"
            assert getattr(torch.ops.mmdeform, name) in flop_registry, f"{name}: no FLOP formula"
        for key in _library.AUTOCAST_KEYS.values():
            assert self.has_kernel(operator, key), f"no {key}"

    def test_sources_register_kernels(self, operator: str) -> None:
        for folder, suffix in (("cpu", "cpp"), ("cuda", "cu")):
            text = (ROOT / f"csrc/{folder}/{operator}.{suffix}").read_text()
            closing = text[text.rindex("STABLE_TORCH_LIBRARY_IMPL(mmdeform") :]
            for name in (operator, f"{operator}_backward"):
                assert f'm.impl("{name}", TORCH_BOX(&{name}_{folder}))' in closing

    @pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
    def test_has_kernels(self, operator: str, device_type: str) -> None:
        if not has_kernels(device_type):
            pytest.skip(f"the {device_type} library is not loaded")
        for name in (operator, f"{operator}_backward"):
            assert self.has_kernel(name, device_type.upper()), name

    def test_is_tested_by_the_contract(self, operator: str) -> None:
        module = importlib.import_module(f".ops.test_{operator}", __package__)
        contracts = [
            value
            for key, value in vars(module).items()
            if key.startswith("Test") and issubclass(value, OperatorContract)
        ]
        assert [contract.name for contract in contracts] == [operator]
        schema = getattr(torch.ops.mmdeform, operator).default._schema
        tensors = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
        described = {*contracts[0].data, *contracts[0].coordinates, *contracts[0].boxes}
        indices = {a for a in tensors if re.search("shapes|index", a)}
        assert described == tensors - indices
