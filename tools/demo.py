"""From nothing to a trained deformable detector and a picture of what it looks at, on the CPU.

    python tools/demo.py

generates ``data/shapes``, trains Mask R-CNN with DCNv2 on it, evaluates it and draws
``work_dirs/demo/sampling.png``. Each step is a command of its own, which is printed. A demo that
was interrupted goes on where it stopped; ``--restart`` begins the training anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes.py")
WORK_DIR = Path("work_dirs/demo")
DATA = Path("data/shapes")  # where the config looks for it
EXPECTED_AP50 = 0.5
console = Console()


def run(title: str, *command: str | Path) -> float:
    """Runs one of the tools and returns the seconds it took; ends the demo if it fails."""
    words = [str(word) for word in command]
    console.rule(title)
    console.print(f"$ python {' '.join(words)}", style="bold", highlight=False, soft_wrap=True)
    # OpenMP threads that wait for each other must not spin: where other programs share the cores,
    # spinning keeps the threads they wait for from running and slows the training down many times.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *words], cwd=ROOT, env=env).returncode
    if code:
        sys.exit(f"demo: the step '{title}' failed; run the command above to look into it")
    return time.perf_counter() - start


def read_metrics() -> dict[str, float]:
    """The metrics that the latest run of tools/test.py left behind."""
    reports = sorted((ROOT / WORK_DIR / "test").glob("*/*.json"))
    if not reports:
        sys.exit(f"demo: tools/test.py left no report in {WORK_DIR / 'test'}")
    return json.loads(reports[-1].read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--restart", action="store_true", help="forget an earlier training")
    args = parser.parse_args()
    if args.restart:
        shutil.rmtree(ROOT / WORK_DIR, ignore_errors=True)

    run("data", "tools/make_shapes.py", DATA)
    seconds = run("training", "tools/train.py", CONFIG, "--work-dir", WORK_DIR, "--resume")
    checkpoint = WORK_DIR / Path((ROOT / WORK_DIR / "last_checkpoint").read_text().strip()).name
    test_dir = WORK_DIR / "test"
    run("evaluation", "tools/test.py", CONFIG, checkpoint, "--work-dir", test_dir)
    picture = WORK_DIR / "sampling.png"
    run("picture", "tools/visualize_sampling.py", CONFIG, checkpoint, "--out", picture)

    metrics = read_metrics()
    console.rule("result")
    table = Table("COCO metric", "AP", "AP50", "AP75")
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        values = (metrics[f"coco/{kind}_mAP{suffix}"] for suffix in ("", "_50", "_75"))
        table.add_row(name, *(f"{value:.3f}" for value in values))
    console.print(table)
    console.print(f"training: {seconds:.0f} s    picture: {picture}")
    if metrics["coco/bbox_mAP_50"] < EXPECTED_AP50:
        sys.exit(f"demo: box AP50 is below {EXPECTED_AP50}; something is wrong with this build")


if __name__ == "__main__":
    main()
