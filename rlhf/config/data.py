"""Where the policy starts from and which prompts it sees."""

from typing import Literal

from pydantic import Field

from rlhf.config.base import DType, Section

PromptFormat = Literal["auto", "text", "messages", "hh_rlhf"]


class Policy(Section):
    """The model that is trained."""

    path: str = Field(description="Hugging Face id or local folder of the policy the run starts from.")
    dtype: DType = Field(
        "bfloat16", description="Parameter dtype of the learner and the generators; the optimizer keeps fp32 masters."
    )
    trust_remote_code: bool = Field(False, description="Allow model code from the checkpoint's folder to run.")


class EvalPrompts(Section):
    """Held-out prompts: the training never sees them."""

    path: str = Field(
        description="File or dataset of the held-out prompts; may be the training file, whose first `count` prompts "
        "are then held out."
    )
    count: int = Field(32, ge=1, description="How many prompts an evaluation samples.")
    split: str | None = Field(None, description="Dataset split; null takes that of `prompts`.")
    column: str | None = Field(
        None, description="Column of the prompt; null: as `prompts` for the same path, else `prompt`."
    )
    format: PromptFormat | None = Field(
        None, description="Format of the rows; null: as `prompts` for the same path, else auto."
    )
    reference: str | None = Field(
        None, description="Column of the reference answer; null: as `prompts` for the same path, else none."
    )


class Prompts(Section):
    """The prompts the rounds draw from."""

    path: str = Field(description="JSONL, Parquet or CSV file (optionally .gz), or a Hugging Face dataset id.")
    name: str | None = Field(None, description="Configuration name of a Hugging Face dataset.")
    split: str = Field("train", description="Dataset split (Hugging Face datasets only).")
    column: str = Field("prompt", description="Column that holds the prompt, a string or a list of chat messages.")
    format: PromptFormat = Field(
        "auto",
        description="How a row becomes a prompt; auto decides by the column's type, hh_rlhf takes the dialogue up to "
        "the last assistant turn.",
    )
    reference: str | None = Field(
        None, description="Column of the answer that a verifier compares responses with; null: the prompts have none."
    )
    max_tokens: int = Field(
        256, ge=1, description="Prompts longer than this after the chat template are dropped and counted."
    )
    system: str | None = Field(None, description="System message put before every prompt that has none.")
    eval: EvalPrompts | None = Field(
        None, description="Held-out prompts for the evaluation; null turns the evaluation off."
    )
