"""mmdet's own tools/test.py: ``python tools/test.py CONFIG CHECKPOINT [--work-dir DIR]``."""

from mmdet_tool import run_mmdet_tool

if __name__ == "__main__":
    run_mmdet_tool("test.py")
