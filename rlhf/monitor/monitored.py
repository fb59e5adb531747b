"""Configs that have a run directory and a monitor."""

from rlhf.config import OfflineTraining, RunConfig

Monitored = RunConfig | OfflineTraining
