"""mmdet's own tools/train.py: ``python tools/train.py CONFIG [--work-dir DIR] [--resume]``."""

from mmdet_tool import run_mmdet_tool

if __name__ == "__main__":
    run_mmdet_tool("train.py")
