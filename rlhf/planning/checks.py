"""What `rlhf validate` checks of the files that a config names, without starting anything."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.config import OfflineConfig, RunConfig
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
    from rlhf.data.training_sets import TrainingSet

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LONGEST = 64
"""So many pairs in a row that fit, the one with more characters first: shorter ones will fit as well."""


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


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is known of the lengths of preference examples."""

    row: Row
    """The longest pair that is trained."""
    total: int
    long: int
    """Pairs that were found to be longer than `learner.max_length`."""
    encoded: int
    """Pairs that were encoded to know, those with the most characters."""

    def check(self, learner: Learner, data: str, what: str, needed: bool = True) -> tuple[str, ...]:
        """A note where pairs are left out; raises `InputError` where all that are `needed` are.

        `data` is the key that names them, with its value.
        """
        if not self.long:
            return ()
        limit = f"longer than learner.max_length = {learner.max_length} tokens"
        if needed and self.long == self.total:
            raise InputError(f"{data}: all {self.total} {what} are {limit}; raise it, or bring shorter pairs")
        least = "" if self.encoded == self.total else "at least "
        return (f"{data}: {least}{self.long} of {self.total} {what} are {limit} and left out",)


def measure_examples(
    learner: Learner, examples: "Sequence[PreferenceExample]", tokenizer: "PreTrainedTokenizerBase"
) -> Lengths:
    """The longest pair that is trained and how many are too long, those with the most characters first.

    Encoding ends once `LONGEST` in a row fit. Raises `InputError` for a tokenizer without an end token.
    """
    from rlhf.data.preference_pairs import Encoder

    def characters(example: "PreferenceExample") -> int:
        return sum(len(turn["content"]) for turn in example.messages) + len(example.chosen) + len(example.rejected)

    lengths: list[tuple[int, int, int]] = []
    long, in_a_row, encoder = 0, 0, Encoder(examples, tokenizer)
    for index in sorted(range(len(examples)), key=lambda index: -characters(examples[index])):
        (pair,) = encoder.pairs([(0, 0, index)], 0)
        prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        lengths.append((prompt, chosen, rejected))
        fits = prompt + max(chosen, rejected) <= learner.max_length
        in_a_row = in_a_row + 1 if fits else 0
        long += not fits
        if in_a_row == LONGEST:
            break
    return Lengths(longest_row(learner, lengths), len(examples), long, len(lengths))


def measure_offline(
    config: OfflineConfig,
    data: "TrainingSet",
    anchor: "Sequence[PreferenceExample]",
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[Row, tuple[str, ...]]:
    """The longest pair of a training on a preference set, and notes on pairs that are too long for it.

    Raises `InputError` where none is left to train on.
    """
    key = f"preferences.path = {config.preferences.path!r}"
    train = measure_examples(config.learner, data.train, tokenizer)
    notes = train.check(config.learner, key, "pairs to train on")
    row = train.row
    if config.anchor is not None:
        beside = measure_examples(config.learner, anchor, tokenizer)
        notes += beside.check(config.learner, f"anchor.path = {config.anchor.path!r}", "pairs")
        row = Row(max(row.tokens, beside.row.tokens), max(row.responses, beside.row.responses))
    held_out, other = measure_examples(config.learner, data.held_out, tokenizer), config.preferences.held_out
    where = f"preferences.held_out.path = {other.path!r}" if other else key
    return row, notes + held_out.check(config.learner, where, "held-out pairs", needed=False)


def _check_rows(path: str, split: str, name: str | None, column: str, format: PromptFormat, key: str) -> None:
    rows = load_rows(path, split=split, name=name, key=key)
    resolve_format(rows, column=column, format=format, key=key, path=path)
