"""The config of a run. Importing this package loads neither torch, ray, vllm nor deepspeed."""

from rlhf.config.judging import JudgeRun, JudgeTraining
from rlhf.config.load import load_config, load_judge_config, load_judge_training, load_run
from rlhf.config.offline import OfflineConfig, OfflineTraining
from rlhf.config.run import RunConfig

__all__ = [
    "JudgeRun",
    "JudgeTraining",
    "OfflineConfig",
    "OfflineTraining",
    "RunConfig",
    "load_config",
    "load_judge_config",
    "load_judge_training",
    "load_run",
]
