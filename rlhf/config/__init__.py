"""The config of a run. Importing this package loads neither torch, ray, vllm nor deepspeed."""

from rlhf.config.load import load_config
from rlhf.config.run import RunConfig

__all__ = ["RunConfig", "load_config"]
