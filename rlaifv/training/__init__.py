"""DPO training: `train` makes checkpoints of pairs; `merge.merge_adapter` a model of an adapter."""

from rlaifv.training.curves import StepMetrics
from rlaifv.training.state import TrainedCheckpoint
from rlaifv.training.trainer import Sink, TrainRequest, train

__all__ = ["Sink", "StepMetrics", "TrainRequest", "TrainedCheckpoint", "train"]
