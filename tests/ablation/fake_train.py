"""Trains nothing, as mmdet's train.py does: epochs, checkpoints, scalars, resuming, and time."""

import argparse
import json
import os
import runpy
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("config")
parser.add_argument("--work-dir", type=Path)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
cfg = runpy.run_path(args.config)
model, seed, epochs = cfg["model"], cfg["randomness"]["seed"], cfg["train_cfg"]["max_epochs"]
pause = float(os.environ.get("FAKE_PAUSE", "0"))
pointer, first, state = args.work_dir / "last_checkpoint", 1, float(seed)
if args.resume and pointer.exists():
    stored = json.loads(Path(pointer.read_text()).read_text())
    first, state = stored["epoch"] + 1, stored["state"]
with open(args.work_dir.parent / "starts.txt", "a") as file:
    file.write(f"start {first}\n")
print(f"threads {os.environ['OMP_NUM_THREADS']}, GPUs {os.environ['CUDA_VISIBLE_DEVICES']!r}")
if model["fails"] and not Path("repaired").exists():
    raise SystemExit("the loss is not finite")

logs = args.work_dir / f"{time.time_ns()}" / "vis_data"
logs.mkdir(parents=True)
with open(logs / "scalars.json", "w", buffering=1) as scalars:
    for epoch in range(first, epochs + 1):
        for i in (1, 2):
            state = (state * 3.7 + 0.13 * model["depth"] + 0.1 * i) % 1.0 + seed
            step = 2 * (epoch - 1) + i
            record = dict(lr=0.1, loss=state, epoch=epoch, iter=step, step=step)
            scalars.write(json.dumps(record) + "\n")
            time.sleep(pause)
        path = args.work_dir / f"epoch_{epoch}.pth"
        path.write_text(json.dumps(dict(epoch=epoch, state=state)))
        pointer.write_text(str(path))
        time.sleep(pause)  # the validation
        metrics = {"coco/bbox_mAP": state, "coco/bbox_mAP_50": 2 * state}
        scalars.write(json.dumps({**metrics, "time": 0.1, "data_time": 0.0, "step": epoch}) + "\n")
