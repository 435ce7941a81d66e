"""All of the spatial support of one node: panels of a picture, numbers and arrays."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from mmdeform.layers.sampling import is_deformable

from ..detectors import Picture
from . import drawing
from .choosing import Choice
from .gradients import Progress
from .panels import ANALYSES, NothingSampled, Options, SupportReport, box_in_image

__all__ = ["KINDS", "Options", "SupportReport", "analyze"]

KINDS = tuple(ANALYSES)


def analyze(
    picture: Picture,
    choice: Choice,
    kinds: Sequence[str] | None,
    options: Options,
    progress: Callable[[str], Progress],
) -> SupportReport:
    """Runs analyses of a node.

    Args:
        picture: The image.
        choice: The node.
        kinds: Some of :data:`KINDS`, in the order of the panels. None: all that the node has,
            'sampling' only where deformable layers run before it, 'detr' of queries.
        options: Settings.
        progress: Given the kind of an analysis, what to call with its steps done and all of them.

    Raises:
        ValueError: 'detr' of a node that is no query, 'sampling' without deformable layers before
            the node, an unknown kind, or settings out of range.
    """
    report = SupportReport(picture)
    node = choice.node
    where = picture.from_inputs(node.position).tolist()
    box = None if node.box is None else box_in_image(picture, node.box)
    report.numbers["node"] = dict(
        name=node.name, position=where, box=box, query=choice.query, detection=choice.detection
    )

    def marked(draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
        def panel(axis: Axes) -> None:
            draw(axis)
            drawing.draw_node(axis, where, box)

        return panel

    title = node.name
    if choice.detection:
        title = f"{choice.detection['class']} {choice.detection['score']:.2f}: {title}"
    report.panels.append((title, marked(lambda axis: drawing.draw_image(axis, picture))))
    for kind in KINDS if kinds is None else kinds:
        if kind not in ANALYSES:
            raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {kind!r}")
        if kinds is None and not _has(choice, kind):
            continue
        try:
            ANALYSES[kind](report, choice, options, progress(kind), marked)
        except NothingSampled:
            if kinds is not None:
                raise
    return report


def _has(choice: Choice, kind: str) -> bool:
    if kind == "detr":
        return choice.query is not None
    modules = choice.node.model.modules()
    return kind != "sampling" or any(is_deformable(module) for module in modules)
