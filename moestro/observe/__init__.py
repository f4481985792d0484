"""Looking at running models: streaming statistics and runs of one layer at a time. The only place with hooks."""

from moestro.observe.calibrate import Calibration, calibrate
from moestro.observe.coverage import Coverage, coverage
from moestro.observe.identity import model_hash
from moestro.observe.layerwise import Layerwise, Step, layerwise
from moestro.observe.moments import GroupMoments, JointMoments, Moments, RankRatios, SecondMoments
from moestro.observe.policy import POLICIES, Policy
from moestro.observe.sample import BlockSample
from moestro.observe.statistics import LayerStats, ModelStats, collect, statistics


__all__ = [
    "POLICIES",
    "BlockSample",
    "Calibration",
    "Coverage",
    "GroupMoments",
    "JointMoments",
    "LayerStats",
    "Layerwise",
    "ModelStats",
    "Moments",
    "Policy",
    "RankRatios",
    "SecondMoments",
    "Step",
    "calibrate",
    "collect",
    "coverage",
    "layerwise",
    "model_hash",
    "statistics",
]
