"""How verdicts become pairs."""

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class Pairing(Section):
    """Which comparisons a prompt's K responses go through and which pairs come out."""

    strategy: Literal["best_vs_worst", "round_robin", "knockout", "random", "all_pairs"] = Field(
        "best_vs_worst",
        description="best_vs_worst: by scores where the judge gives them, else by a round robin; round_robin: every "
        "two responses, ranked by mean win probability; knockout: a linear number of comparisons; random: two "
        "responses drawn from the seed; all_pairs: every decisive comparison.",
    )
    min_margin: float = Field(0.1, ge=0, lt=1, description="Pairs with |2p - 1| below this are ties and dropped.")
