"""``python -m mmdeform.coverage``: which configs touch deformable operators, and what serves them.

Every config below a folder (mmdet's own, or a project's) is read and its detector is built without
memory, weights and downloads. The modules of the detector then tell which operators it uses, which
kernels would run, and how a config reaches them: by writing a plugin's ``type=``, or, where mmdet's
source fixes the class, by ``mmdeform.accelerate``.

    python -m mmdeform.coverage --markdown docs/coverage.md    # all of mmdet
    python -m mmdeform.coverage --configs my_project/configs   # prints the tables

Each config has a process of its own, so that nothing it does touches the others.
"""

from .inspection import Entry, Use, inspect_all, inspect_config
from .report import to_json, to_markdown

__all__ = ["Entry", "Use", "inspect_all", "inspect_config", "to_json", "to_markdown"]
