"""Writes `report/index.html` of a run."""

from controller.report.gather import gather
from controller.report.page import render_page
from rlaifv.config import RunConfig
from rlaifv.store import Store

REPORT = "report/index.html"


def write_report(run: Store, config: RunConfig) -> None:
    """Renders what is stored into one self-contained page."""
    page = render_page(gather(run, config))
    run.write_bytes(REPORT, page.encode("utf-8", "replace"))
