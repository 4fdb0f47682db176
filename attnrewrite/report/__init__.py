"""What was found, what was done and why not: as a value, on a terminal, as JSON and as a page."""

from attnrewrite.report.document import Report

__all__ = ["Report"]
