"""Reference log-probs of held-out pairs, which every evaluation asks for again."""

import hashlib
from collections.abc import Sequence

import torch

from rlhf.config.learner import Learner
from rlhf.learning.reference import ReferencePolicy
from rlhf.packed import IDS, join
from rlhf.records import Pair


class HeldOutScores:
    """What a reference gives to the pairs of evaluations: scored once where it stays, each time where it moves.

    `initial` stays for the whole run, as a second model or with the adapters off. `round_start` and `ema` move with
    the policy. Every rank gets the same calls, so either all of them score or none does.
    """

    def __init__(self, reference: ReferencePolicy, learner: Learner) -> None:
        self._reference = reference
        self._stays = learner.reference.policy == "initial"
        self._known: tuple[bytes, torch.Tensor] | None = None

    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Summed log-probs, float32 [n, 2] on the learner's device, chosen then rejected; not to be written to."""
        if not self._stays:
            return self._reference.score(pairs)
        # By their tokens: nothing else of a pair has a part in its log-probs.
        tokens = join(IDS, [ids for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
        key = hashlib.blake2b(bytes(tokens.values) + tokens.ends.tobytes()).digest()
        if self._known is None or self._known[0] != key:
            self._known = key, self._reference.score(pairs)
        return self._known[1]
