import os
from collections import Counter

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner


@HOOKS.register_module()
class KernelReportHook(Hook):
    """Writes to the log which operators of mmdeform the first training step ran, and how often."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if batch_idx == 0:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        if batch_idx == 0:
            self.profiler.stop()
            names = (event.name for event in self.profiler.events())
            counts = Counter(name for name in names if name.startswith("mmdeform::"))
            runner.logger.info(f"operators of mmdeform: {dict(sorted(counts.items()))}")


@HOOKS.register_module()
class PowerCutHook(Hook):
    """Ends the process without a word in the second epoch, where POWER_CUT is set."""

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 1 and "POWER_CUT" in os.environ:
            os._exit(9)
