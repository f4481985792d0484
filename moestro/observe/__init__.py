"""Looking at running models: streaming statistics and runs of one layer at a time. The only place with hooks."""

from moestro.observe.coverage import Coverage, coverage
from moestro.observe.identity import model_hash
from moestro.observe.layerwise import Layerwise, Step, layerwise
from moestro.observe.moments import GroupMoments, Moments, SecondMoments
from moestro.observe.statistics import LayerStats, ModelStats, collect, statistics


__all__ = [
    "Coverage",
    "GroupMoments",
    "LayerStats",
    "Layerwise",
    "ModelStats",
    "Moments",
    "SecondMoments",
    "Step",
    "collect",
    "coverage",
    "layerwise",
    "model_hash",
    "statistics",
]
