"""Pictures of scores, images, anomaly maps, attention and training.

Every function returns a `matplotlib.figure.Figure` that belongs to no `pyplot` window, so it
works on a server and leaves no global state behind. Colors are those of Okabe and Ito, which
remain distinct under every common form of color blindness.
"""

from sddns_tf.plots.images import attention_overlay, contact_sheet, most_and_least_anomalous
from sddns_tf.plots.maps import anomaly_map, overlay
from sddns_tf.plots.scores import SCORE_LABEL, roc_curves, score_histograms
from sddns_tf.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    LINE_COLORS,
    LINE_STYLES,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    figure_of,
    save,
)
from sddns_tf.plots.training import training_curves

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "LINE_COLORS",
    "LINE_STYLES",
    "ORANGE",
    "PURPLE",
    "SCORE_LABEL",
    "SKY",
    "VERMILION",
    "anomaly_map",
    "attention_overlay",
    "contact_sheet",
    "figure_of",
    "most_and_least_anomalous",
    "overlay",
    "roc_curves",
    "save",
    "score_histograms",
    "training_curves",
]
