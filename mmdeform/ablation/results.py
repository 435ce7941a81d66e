"""What is known of one run of an ablation: the row that a report is made of."""

from dataclasses import dataclass, field

STATUSES = ("planned", "running", "interrupted", "failed", "finished")


@dataclass(frozen=True)
class RowResult:
    """One row of the table, trained with one seed.

    Attributes:
        row (str): Name of the row, unique in the table; the same for all seeds.
        labels (dict[str, str]): Name of the row's value on each axis, in the order of the axes;
            ``"-"`` where an axis does not apply.
        is_base (bool): Whether the others are compared with this row.
        seed (int): Of the run.
        status (str): ``"planned"``, ``"running"``, ``"interrupted"``, ``"failed"`` or
            ``"finished"``.
        metrics (dict[str, float]): Of the last validation, ``{"coco/bbox_mAP": 0.41}``.
        curves (dict[str, list[tuple[int, float]]]): Epoch, from 1, and value of each metric, and of
            each loss the mean over the epoch.
        parameters (int, optional): Of the model.
        macs (int, optional): Multiply-adds for one image.
        latency_ms (float, optional): Median time for one image, milliseconds.
        peak_memory_bytes (int, optional): Of that image's computation, beyond the weights.
        error (str, optional): Last lines of a failure.
    """

    row: str
    labels: dict[str, str]
    is_base: bool
    seed: int
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    parameters: int | None = None
    macs: int | None = None
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None
    error: str | None = None
