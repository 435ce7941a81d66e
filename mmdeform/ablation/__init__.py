"""Ablations: from a table of config overrides to trained rows.

spec = load_spec("kernels.yml")
store = Store.create("work_dirs/kernels", spec, plan_rows(spec))
for results in train_runs(store, ["python", "tools/train.py"]):
    ...
"""

from .data import use_coco_data
from .overrides import apply_overrides, config_hash
from .plan import Cost, PlannedRow, measure, plan_rows, with_costs
from .results import STATUSES, RowResult
from .runner import train_runs
from .spec import Axis, Resources, Spec, load_spec
from .store import Store, known_costs

__all__ = [
    "STATUSES",
    "Axis",
    "Cost",
    "PlannedRow",
    "Resources",
    "RowResult",
    "Spec",
    "Store",
    "apply_overrides",
    "config_hash",
    "known_costs",
    "load_spec",
    "measure",
    "plan_rows",
    "train_runs",
    "use_coco_data",
    "with_costs",
]
