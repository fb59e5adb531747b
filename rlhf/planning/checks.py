"""What `rlhf validate` checks of the files that a config names, without starting anything."""

from typing import TYPE_CHECKING

from rlhf.config import RunConfig
from rlhf.config.data import PromptFormat, Prompts
from rlhf.config.judge import EngineJudge
from rlhf.config.learner import Learner
from rlhf.data.formats import resolve_format
from rlhf.data.rows import load_rows
from rlhf.errors import InputError
from rlhf.modelfiles import find_model
from rlhf.planning.learner import Row
from rlhf.planning.plan import longest_row, pools

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from rlhf.data.preferences import PreferenceExample

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LONGEST = 64
"""Pairs with the most characters that are encoded to know the most tokens."""


def check_inputs(config: RunConfig) -> list[str]:
    """Check that models, tokenizer and prompts exist; returns notes on what could not be checked.

    Raises `InputError` for the first thing that is missing. The names that `learner.lora` gives are looked up by
    `make_plan`, which counts their layers.
    """
    notes = []
    models = {"policy.path": config.policy.path}
    for name, judge in pools(config).items():
        if isinstance(judge, EngineJudge) and judge.path:
            models[f"{name}.path"] = judge.path
    for key, path in models.items():
        folder = find_model(path, key)
        if folder is None:
            notes.append(f"{key} = {path!r} is not on this machine: its weights and tokenizer are fetched at the start")
        elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(f"{key} = {path!r}: the folder has no tokenizer; save the model's tokenizer into it")
    prompts = config.prompts
    _check_rows(prompts.path, prompts.split, prompts.name, prompts.column, prompts.format, "prompts")
    if prompts.eval is not None:
        held_out = prompts.eval
        # The rule of load_eval_prompts: what describes the training data describes the same data only.
        source = prompts if held_out.path == prompts.path else Prompts(path=held_out.path)
        column, format = held_out.column or source.column, held_out.format or source.format
        _check_rows(held_out.path, held_out.split or prompts.split, source.name, column, format, "prompts.eval")
    return notes


def longest_example(
    learner: Learner, examples: "Sequence[PreferenceExample]", tokenizer: "PreTrainedTokenizerBase"
) -> Row:
    """The longest pair that is trained, of the examples with the most characters among those that fit.

    Raises `InputError` for a tokenizer without an end token.
    """
    from rlhf.data.preference_pairs import Encoder

    def characters(example: "PreferenceExample") -> int:
        return sum(len(turn["content"]) for turn in example.messages) + len(example.chosen) + len(example.rejected)

    lengths: list[tuple[int, int, int]] = []
    fitting, encoder = 0, Encoder(examples, tokenizer)
    for index in sorted(range(len(examples)), key=lambda index: -characters(examples[index])):
        (pair,) = encoder.pairs([(0, 0, index)], 0)
        prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        lengths.append((prompt, chosen, rejected))
        fitting += prompt + max(chosen, rejected) <= learner.max_length
        if fitting == LONGEST:
            break
    return longest_row(learner, lengths)


def _check_rows(path: str, split: str, name: str | None, column: str, format: PromptFormat, key: str) -> None:
    rows = load_rows(path, split=split, name=name, key=key)
    resolve_format(rows, column=column, format=format, key=key, path=path)
