"""Write the report of a comparison: an HTML page, Markdown, CSV and pictures. `frontier` computes every number."""

from pathlib import Path
from typing import Any

from ..files import write_text
from .html import html_report
from .markdown import markdown_report, write_csv
from .pictures import draw


def write_report(folder: Path, comparison: dict[str, Any]) -> None:
    """Write report.html, report.md, runs.csv, curves.png and .svg, and frontier.png and .svg if drift was measured.

    Args:
        comparison: the runs and their results (JSON):
            {"name", "command", "recipe": settings, "machine", "versions": {package: version}, "commit" or None,
             "methods": {method: {"title", "source"}} in display order,
             "base": {"learn": {data: {"loss", ...}}, "keep": ..., "text": ..., "choices": ...},
             "runs": [{"method", "learning_rate", "seed", "status", "why", "results": as base, with "drift" and
                       "agreement" in keep and text, "curve": [[step, seconds, held-out task loss], ...], "steps",
                       "seconds", "prepare_seconds", "peak_bytes" or None, "parameters": {"adapter", "trainable"}}]}
            Statuses are "done", "diverged", "failed", "does not fit" and "not run". Only runs that are done have the
            keys after "why". Losses and drift are in nats per token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", html_report(comparison))
    write_text(folder / "report.md", markdown_report(comparison))
    write_csv(folder / "runs.csv", comparison)
    draw(folder, comparison)
