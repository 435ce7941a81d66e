"""A project of somebody's own on mmdet: a data set, a neck and a hook."""

from .datasets import OrchardDataset
from .hooks import KernelReportHook, PowerCutHook
from .necks import AttentiveFPN

__all__ = ["AttentiveFPN", "KernelReportHook", "OrchardDataset", "PowerCutHook"]
