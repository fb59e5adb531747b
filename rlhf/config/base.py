"""The strict base model, and the types the sections share."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

DType = Literal["bfloat16", "float32"]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True,
                              hide_input_in_errors=True)  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _no_bool_as_number(cls, data: Any) -> Any:
        """`count: yes` would be 1. As text, such a value is refused by its own field, which names it best."""
        if not isinstance(data, dict):
            return data
        numeric = {name for name, field in cls.model_fields.items() if _is_number(field.annotation)}
        return {
            key: str(value).lower() if key in numeric and isinstance(value, bool) else value
            for key, value in data.items()
        }


def _is_number(annotation: Any) -> bool:
    options = get_args(annotation) or (annotation,)
    if bool in options or any(isinstance(option, bool) for option in options):
        return False
    return any(option in (int, float) or isinstance(option, int) for option in options)


def _refuse(value: Any) -> None:
    if value is not None:
        raise ValueError("this key is reserved and has no implementation yet; leave it out")


Reserved = Annotated[None, BeforeValidator(_refuse)]
"""A key whose name is taken for a later feature: only null is accepted."""
