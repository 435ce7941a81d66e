"""Finds the command line tools that the installed mmdet brings along, and runs them unchanged."""

import importlib
import importlib.util
import runpy
import sys
from pathlib import Path


def find_mmdet_tool(name: str) -> Path:
    """The path of one of mmdet's tools.

    Args:
        name (str): File name, for example ``"train.py"``.

    Returns:
        Path: In an installed mmdet ``mmdet/.mim/tools/<name>``; in a clone ``tools/<name>``.

    Raises:
        FileNotFoundError: If mmdet is not installed or has no such tool.
    """
    spec = importlib.util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("mmdet is not installed; install it with: pip install mmdet==3.3.0")
    package = Path(spec.origin).parent
    places = (package / ".mim" / "tools" / name, package.parent / "tools" / name)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"mmdet at {package} has no tool {name!r}: looked for {' and '.join(map(str, places))}"
    )


def run_mmdet_tool(name: str) -> None:
    """Run one of mmdet's Python tools in this process with the arguments of this process.

    Args:
        name (str): File name, for example ``"train.py"``.
    """
    try:
        tool = find_mmdet_tool(name)
    except FileNotFoundError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    if importlib.util.find_spec("mmdeform") is None:
        sys.exit(f"{Path(sys.argv[0]).name}: mmdeform is not installed; run: pip install -e .")
    # Before the config is read: its `_base_` may be one of mmdeform's configs.
    importlib.import_module("mmdeform")
    runpy.run_path(str(tool), run_name="__main__")
