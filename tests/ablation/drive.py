"""A runner in a process of its own: ``python drive.py STORE COMMAND...``."""

import sys

from mmdeform.ablation import Store, train_runs

if __name__ == "__main__":
    for _ in train_runs(Store(sys.argv[1]), sys.argv[2:], poll=0.05):
        pass
