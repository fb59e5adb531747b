"""The preference loss: which losses there are, what each takes, and which combinations make sense."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Section

LossName = Literal[
    "sigmoid",
    "robust",
    "ipo",
    "hinge",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "simpo",
    "orpo",
    "cpo",
    "sft",
    "choice",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True, slots=True)
class LossFacts:
    """What one loss is made of; the config refuses what does not fit, the losses themselves read it as well."""

    options: frozenset[str] = frozenset()
    """Options of its own."""
    reference: bool = True
    """Has the reference policy a part in it?"""
    divergence: bool = False
    """Does it see the difference of the two scores only? The normaliser of an f-divergence cancels nowhere else."""
    nll: float | None = 0.0
    """Default weight of the chosen response's NLL; None where the term cannot be added."""
    weights: bool = True
    """Is it a sum of terms of one pair each, which can be weighted?"""


def _facts(*options: str, **changes: Any) -> LossFacts:
    return LossFacts(options=frozenset(options), **changes)


LOSS_FACTS: dict[str, LossFacts] = {
    "sigmoid": _facts("label_smoothing", "length_normalised", divergence=True),
    "robust": _facts("label_smoothing", divergence=True),
    "ipo": _facts("length_normalised", divergence=True),
    "hinge": _facts(divergence=True),
    "exo_pair": _facts("label_smoothing", divergence=True),
    "nca_pair": _facts(),
    "bco_pair": _facts("reward_shift"),
    "sppo_hard": _facts(),
    "aot": _facts("label_smoothing", weights=False),
    "aot_unpaired": _facts("label_smoothing", weights=False),
    "apo_zero": _facts(),
    "apo_down": _facts(),
    "discopop": _facts("tau", divergence=True),
    "simpo": _facts("gamma", "label_smoothing", reference=False),
    "orpo": _facts(reference=False, nll=1.0),
    "cpo": _facts("label_smoothing", reference=False, nll=1.0),
    "sft": _facts(reference=False, nll=None),
    "choice": _facts(reference=False, nll=None),
}


class LossOptions(Section):
    """Options that belong to single losses; null is the loss's own default."""

    label_smoothing: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="sigmoid (cDPO), robust, exo_pair, aot, aot_unpaired, simpo, cpo: assumed probability that a label "
        "is flipped. null is 0, with exo_pair 0.001; robust needs one.",
    )
    length_normalised: bool | None = Field(
        None, description="ipo, sigmoid: divide each score by the response's tokens. null is true for ipo only."
    )
    gamma: float | None = Field(
        None, ge=0, description="simpo: target margin, in units of the reward (beta included); null is 0.5."
    )
    tau: float | None = Field(
        None, gt=0, le=1, description="discopop: temperature of the blend of its two parts; null is 0.05."
    )
    reward_shift: bool | None = Field(
        None,
        description="bco_pair: subtract the running mean of all rewards, as the paper does; null is false, as in TRL.",
    )
    rpo_alpha: float | None = Field(
        None,
        ge=0,
        description="Weight of the chosen response's negative log-likelihood per token, added to the loss (RPO). null "
        "is 1 for cpo and orpo, otherwise 0.",
    )

    def options(self) -> dict[str, Any]:
        """The options that are set."""
        values = {name: getattr(self, name) for name in LossOptions.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class LossTerm(LossOptions):
    """One loss of a weighted sum."""

    type: LossName = Field(description="The loss.")
    weight: float = Field(1.0, gt=0, description="Its weight.")


class Exploration(Section):
    """An optimism term beside the preference loss, over responses that the reference policy wrote."""

    type: Literal["selm", "xpo"] = Field(
        description="selm adds alpha beta log (pi / pi_ref)(y), xpo adds alpha log pi(y): both lower the likelihood of "
        "what the reference already says, so that the policy looks elsewhere."
    )
    alpha: float = Field(gt=0, description="Weight of the term; the papers take 1e-6 to 1e-3.")


class Loss(LossOptions):
    """The preference loss."""

    type: Literal[LossName, "mix"] = Field(
        "sigmoid",
        description="sigmoid is DPO; mix is the weighted sum of `terms`. simpo, orpo, cpo, sft and choice have no "
        "reference policy. aot and aot_unpaired sort all pairs of a step, which costs a forward pass more where a step "
        "has several micro-batches.",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="Inverse temperature of the implicit reward; with ipo and sppo_hard the regularisation, with orpo "
        "the weight of the odds ratio.",
    )
    terms: tuple[LossTerm, ...] = Field((), description="mix: the losses that are added up.")
    f_divergence: Divergence = Field(
        "reverse_kl",
        description="Divergence that holds the policy to the reference; others than reverse_kl with sigmoid, robust, "
        "ipo, hinge, exo_pair and discopop.",
    )
    f_alpha: float | None = Field(
        None, description="Order of the alpha divergence, not 1 (that is reverse_kl); null is 0.5."
    )
    ld_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Length desensitising: weight of the tokens past the length of the pair's shorter response. 1 "
        "changes nothing, 0 drops them.",
    )
    use_weighting: bool = Field(
        False, description="WPO: weight each pair by the policy's probability of its two responses."
    )

    exploration: Exploration | None = Field(
        None,
        description="Optimism of SELM or XPO, with type sigmoid in online runs of reference policy round_start and "
        "lookahead 0: the round's own responses are the reference's there. A pair's term is the mean over those of its "
        "two responses that the reference's version wrote alone; null adds none.",
    )

    @property
    def parts(self) -> tuple[LossOptions, ...]:
        """The losses that are added up: the terms of a mix, otherwise the loss itself."""
        return self.terms if self.type == "mix" else (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses that are added up."""
        return tuple(term.type for term in self.terms) if self.type == "mix" else (self.type,)

    @property
    def needs_reference(self) -> bool:
        """Has a reference policy any part in the loss?"""
        return any(LOSS_FACTS[name].reference for name in self.names)

    def averages(self, fraction: float) -> bool:
        """Does the loss take the mean log-probs of a group when `fraction` of the training is done?"""
        return False

    @model_validator(mode="after")
    def _terms(self) -> "Loss":
        if self.type == "mix":
            if not self.terms:
                raise ValueError("learner.loss.terms = []: type mix adds up terms; list at least one, such as sigmoid")
            for key, value in self.options().items():
                raise ValueError(f"learner.loss.{key} = {value} with type mix: set it in the term that it is meant for")
        elif self.terms:
            raise ValueError(
                f"learner.loss.terms with type {self.type}: terms belong to type mix; set it or remove them"
            )
        return self

    @model_validator(mode="after")
    def _options(self) -> "Loss":
        for index, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            where = f"learner.loss.terms.{index}" if self.type == "mix" else "learner.loss"
            facts, options = LOSS_FACTS[name], part.options()
            for key, value in options.items():
                if key not in facts.options and not (key == "rpo_alpha" and facts.nll is not None):
                    raise ValueError(f"{where}.{key} = {value} means nothing to type {name}; remove it")
            if name == "robust" and not options.get("label_smoothing"):
                raise ValueError(f"{where}.label_smoothing: type robust without it is sigmoid; set it, or use sigmoid")
            if name == "exo_pair" and options.get("label_smoothing") == 0:
                raise ValueError(f"{where}.label_smoothing = 0 with type exo_pair: its log is taken; use 0.001, say")
        return self

    @model_validator(mode="after")
    def _divergence(self) -> "Loss":
        if self.f_alpha is not None and self.f_divergence != "alpha":
            raise ValueError(
                f"learner.loss.f_alpha = {self.f_alpha:g} with f_divergence {self.f_divergence}: remove it"
            )
        if self.f_alpha is not None and abs(self.f_alpha - 1) < 1e-6:
            raise ValueError("learner.loss.f_alpha = 1 is the reverse KL divergence; use f_divergence reverse_kl")
        if self.f_divergence != "reverse_kl":
            # Beside others, sft is only a likelihood term, which no divergence touches.
            fits = [LOSS_FACTS[name].divergence or (name == "sft" and self.type == "mix") for name in self.names]
            for name, fit in zip(self.names, fits, strict=True):
                if not fit or not self.needs_reference:
                    reason = "sees more than the difference of scores" if LOSS_FACTS[name].reference else "no reference"
                    raise ValueError(
                        f"learner.loss.f_divergence = {self.f_divergence} with type {name} ({reason}): use reverse_kl"
                    )
        return self

    @model_validator(mode="after")
    def _tokens(self) -> "Loss":
        for name, part in zip(self.names, self.parts, strict=True):
            facts = LOSS_FACTS[name]
            if self.ld_alpha is not None and not facts.reference:
                raise ValueError(
                    f"learner.loss.ld_alpha = {self.ld_alpha:g} with type {name}: it is for losses with a reference; "
                    "remove it"
                )
            if self.ld_alpha is not None and part.rpo_alpha:
                raise ValueError(
                    f"learner.loss.ld_alpha = {self.ld_alpha:g} with rpo_alpha {part.rpo_alpha:g}: the likelihood of "
                    "all tokens is lost there; remove one of the two"
                )
            if self.use_weighting and not facts.weights:
                raise ValueError(
                    f"learner.loss.use_weighting = true with type {name}: it compares sorted responses, not pairs; "
                    "remove it"
                )
        if self.use_weighting and not self.needs_reference:
            raise ValueError(
                f"learner.loss.use_weighting = true with type {self.names[0]}: it is for losses with a reference; "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _exploration(self) -> "Loss":
        if self.exploration is None:
            return self
        where = f"learner.loss.exploration.type = {self.exploration.type}"
        if self.type != "sigmoid":
            raise ValueError(f"{where} with learner.loss.type {self.type}: the term belongs to type sigmoid; remove it")
        changes = {
            "f_divergence": self.f_divergence != "reverse_kl",
            "length_normalised": bool(self.length_normalised),
            "ld_alpha": self.ld_alpha is not None,
            "use_weighting": self.use_weighting,
        }
        for key, changed in changes.items():
            if changed:
                raise ValueError(
                    f"{where} with learner.loss.{key}: the term is in log-probs of whole responses under the reverse "
                    "KL divergence, each pair counted once; remove one of the two"
                )
        return self
