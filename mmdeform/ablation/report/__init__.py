"""The report of an ablation: Markdown, CSV, and one HTML page that needs no network."""

from .writer import write_report

__all__ = ["write_report"]
