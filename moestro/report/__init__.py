"""Reports: one self-contained HTML page of a trace, a run and a receipt; figures for studies."""

from moestro.report.page import write


__all__ = ["write"]
