"""Configs that have a run directory and a monitor."""

from rlhf.config import JudgeTraining, RunConfig

Monitored = RunConfig | JudgeTraining
