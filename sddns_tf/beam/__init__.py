"""Scoring, banks and evaluation on Apache Beam: one machine, Flink, Spark or Dataflow.

Needs `pip install "sddns_tf[beam]"`. It is imported only on request.
"""

try:
    import apache_beam  # noqa: F401
except ImportError as error:
    raise ImportError('sddns_tf.beam needs Apache Beam: pip install "sddns_tf[beam]"') from error

from sddns_tf.beam.banks import Bank, BankSketch, CompressFeatures, ExtractFeatures
from sddns_tf.beam.evaluation import (
    CheckDrift,
    Drift,
    ScoreSketch,
    SketchScores,
    Thresholds,
    sketched_metrics,
)
from sddns_tf.beam.job import ScoringJob, Totals, WorkerLostError
from sddns_tf.beam.reading import ReadFiles, Unreadable
from sddns_tf.beam.scoring import Answer, SavedModelHandler, Score

__all__ = [
    "Answer",
    "Bank",
    "BankSketch",
    "CheckDrift",
    "CompressFeatures",
    "Drift",
    "ExtractFeatures",
    "ReadFiles",
    "SavedModelHandler",
    "Score",
    "ScoreSketch",
    "ScoringJob",
    "SketchScores",
    "Thresholds",
    "Totals",
    "Unreadable",
    "WorkerLostError",
    "sketched_metrics",
]
