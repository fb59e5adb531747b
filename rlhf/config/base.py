"""The strict base model, and the types the sections share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

DType = Literal["bfloat16", "float32"]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse(value: Any) -> None:
    if value is not None:
        raise ValueError("this key is reserved and has no implementation yet; leave it out")


Reserved = Annotated[None, BeforeValidator(_refuse)]
"""A key whose name is taken for a later feature: only null is accepted."""
