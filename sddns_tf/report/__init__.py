"""An evaluation as one page that needs no network."""

from sddns_tf.report.page import html, write

__all__ = ["html", "write"]
