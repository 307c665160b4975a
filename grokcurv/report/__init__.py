"""The report of a run or of a sweep of them: one self-contained HTML page, and the figures as PNG files."""

from grokcurv.report.page import write_report

__all__ = ["write_report"]
