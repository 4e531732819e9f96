"""An evaluation as one self-contained HTML page."""

from sddns_tf.report.page import html, write

__all__ = ["html", "write"]
