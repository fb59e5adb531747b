"""Losses by name. What they take besides log-probs stands in `rlhf.config.loss`, which loads no torch."""

from collections.abc import Callable

import torch

from rlhf.config.loss import LOSS_FACTS
from rlhf.learning.losses.aot import aot, aot_matched, aot_unpaired, aot_unpaired_matched
from rlhf.learning.losses.base import LossFunction
from rlhf.learning.losses.choice import choice
from rlhf.learning.losses.cpo import cpo
from rlhf.learning.losses.discopop import discopop
from rlhf.learning.losses.exo import exo_pair
from rlhf.learning.losses.hinge import hinge
from rlhf.learning.losses.ipo import ipo
from rlhf.learning.losses.orpo import orpo
from rlhf.learning.losses.pointwise import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from rlhf.learning.losses.sft import sft
from rlhf.learning.losses.sigmoid import robust, sigmoid
from rlhf.learning.losses.simpo import simpo

LOSSES: dict[str, LossFunction] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "sft": sft,
    "choice": choice,
}

REFERENCE_FREE = {name for name, facts in LOSS_FACTS.items() if not facts.reference}
"""Losses that no reference policy has a part in: none is loaded for them, its log-probs count as 0."""

MATCHINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "aot": aot_matched,
    "aot_unpaired": aot_unpaired_matched,
}
"""Losses that compare a pair with others of the step: from log-probs [n, 2] of the whole step to their `matched`."""
