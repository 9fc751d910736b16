"""Stored numbers and pictures of a run as one HTML page: `python -m unimrg.report outputs/first`."""

from unimrg.report.page import write_report

__all__ = ["write_report"]
