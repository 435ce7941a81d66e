"""The command line of ``python -m mmdeform.coverage``."""

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import __doc__ as DESCRIPTION
from .inspection import Entry, inspect_all
from .report import to_json, to_markdown


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m mmdeform.coverage",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configs", type=Path, metavar="DIR", help="default: mmdet's configs")
    parser.add_argument("--family", metavar="GLOB", help="folders of configs, e.g. 'd*'")
    parser.add_argument("--filter", default="", metavar="TEXT", help="file names contain TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    if args.configs is None:
        spec = importlib.util.find_spec("mmdet")
        if spec is None or spec.origin is None:
            parser.error("--configs: mmdet is not installed, so a folder is needed")
        args.configs = Path(spec.origin).parent / ".mim/configs"
    if not args.configs.is_dir():
        parser.error(f"--configs: expected a folder, got {args.configs}")
    args.configs = args.configs.resolve()
    args.paths = select(args.configs, args.family, args.filter)
    if not args.paths:
        parser.error(f"no config in {args.configs} fits --family and --filter")
    return args


def select(root: Path, family: str | None, text: str) -> list[Path]:
    """The configs below ``root``, without ``_base_`` folders."""
    paths = []
    for path in sorted(root.rglob("*.py")):
        folder = path.relative_to(root).parent
        if "_base_" in folder.parts or text not in path.name:
            continue
        if family is None or fnmatch.fnmatch(folder.as_posix(), family):
            paths.append(path)
    return paths


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Entry], None]]:
    """A progress bar on stderr where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda entry: None
        return
    # No thread that refreshes it: processes are forked meanwhile.
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("configs", total=total)
        yield lambda entry: progress.update(task, advance=1, refresh=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects configs and prints or writes the tables; returns the exit status."""
    args = parse_args(argv)
    with _progress(len(args.paths)) as report:
        entries = inspect_all(args.paths, args.configs, args.jobs, report)
    words = sys.argv[1:] if argv is None else argv
    markdown = to_markdown(entries, " ".join(["python -m mmdeform.coverage", *words]))
    if args.json is not None:
        args.json.write_text(json.dumps(to_json(entries), indent=1) + "\n")
    if args.markdown is not None:
        args.markdown.write_text(markdown)
    else:
        print(markdown, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
