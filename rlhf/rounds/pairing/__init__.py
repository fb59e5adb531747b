"""Which of a prompt's responses are compared, and which pairs come out."""

from rlhf.rounds.pairing.make import DRAWING, STRATEGIES, Group, PairingResult, make_pairs
from rlhf.rounds.pairing.strategy import Candidate, Steps, Strategy

__all__ = ["DRAWING", "STRATEGIES", "Candidate", "Group", "PairingResult", "Steps", "Strategy", "make_pairs"]
