"""Prompt sets: what is dropped and counted, what is held out; and the endless order over them."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.config.data import EvalPrompts, Prompts
from rlhf.data.prompts import PromptOrder, content_hash, load_eval_prompts, load_prompts
from rlhf.errors import InputError
from rlhf.records import Message, Prompt

ROOT = Path(__file__).parents[2]
HH_FILE = ROOT / "../shared/data/hh-rlhf/harmless-base-a.jsonl.gz"
NOTHING_DROPPED = {"too_long": 0, "blank": 0, "duplicate": 0, "malformed": 0, "held_out": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the template adds `role :` before a turn and `assistant :` at the end."""
    backend = Tokenizer(models.WordLevel({"?": 0, "assistant": 1, "user": 2, "system": 3, ":": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    return made


def _file(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values))
    return str(path)


def _contents(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


def test_every_row_is_used_or_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = ["one two", "  \n\t", "", "three", "one two", " three ", None, 7, "a b c d e f g", "a b c d e f"]
    config = Prompts(path=_file(tmp_path / "p.jsonl", rows), max_tokens=10)
    found = load_prompts(config, tokenizer)
    assert _contents(found.prompts) == ["one two", "three", "a b c d e f"]  # 6 words and 4 of the template are 10
    assert found.dropped == {"too_long": 1, "blank": 2, "duplicate": 2, "malformed": 2, "held_out": 0}
    first = found.prompts[0]
    assert first.text == "user : one two assistant :"
    assert tuple(first.token_ids) == (2, 4, 0, 0, 1, 4)
    assert first.messages == (Message(role="user", content="one two"),)


def test_uid_is_a_hash_of_the_messages() -> None:
    # Pinned: run directories hold these ids, so they must not change from release to release.
    assert content_hash([Message(role="user", content="Hello")]) == "1d9f4feaa9db000b"
    assert content_hash([Message(role="user", content=" Hello\n")]) == "1d9f4feaa9db000b"
    others = [
        [Message(role="user", content="hello")],
        [Message(role="system", content="Hello")],
        [Message(role="user", content="Hel"), Message(role="assistant", content="lo")],
        [Message(role="user", content="Hell"), Message(role="assistant", content="o")],
    ]
    assert len({content_hash(messages) for messages in others} | {"1d9f4feaa9db000b"}) == 5


def test_system_message_goes_first_where_there_is_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b"}]
    rows = [[{"role": "user", "content": "a"}], own]
    config = Prompts(path=_file(tmp_path / "p.jsonl", rows), system="Be kind")
    first, second = load_prompts(config, tokenizer).prompts
    assert first.messages == (Message(role="system", content="Be kind"), Message(role="user", content="a"))
    assert first.text == "system : Be kind user : a assistant :"
    assert first.uid == content_hash(first.messages)
    assert second.messages[0]["content"] == "mine"


def test_eval_prompts_are_the_first_usable_ones_and_held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = ["a", " ", "a", "b", None, "c", "d", "b"]
    path = _file(tmp_path / "p.jsonl", rows)
    config = Prompts(path=path, eval=EvalPrompts(path=path, count=3))
    held_out = load_eval_prompts(config, tokenizer)
    assert _contents(held_out.prompts) == ["a", "b", "c"]
    assert held_out.dropped == NOTHING_DROPPED | {"blank": 1, "duplicate": 1, "malformed": 1}
    training = load_prompts(config, tokenizer)
    assert _contents(training.prompts) == ["d"]
    assert training.dropped == NOTHING_DROPPED | {"blank": 1, "malformed": 1, "held_out": 5}


def test_eval_of_another_file_and_column(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "e.csv").write_text("question\nb\nx\ny\n")
    held_out = EvalPrompts(path=str(tmp_path / "e.csv"), column="question", count=2)
    config = Prompts(path=_file(tmp_path / "p.jsonl", ["a", "b", "y"]), eval=held_out)
    assert _contents(load_eval_prompts(config, tokenizer).prompts) == ["b", "x"]
    assert _contents(load_prompts(config, tokenizer).prompts) == ["a", "y"]
    more = config.model_copy(update={"eval": held_out.model_copy(update={"count": 9})})
    assert len(load_eval_prompts(more, tokenizer).prompts) == 3


def test_no_eval(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load_eval_prompts(Prompts(path=_file(tmp_path / "p.jsonl", ["a"])), tokenizer)
    assert (found.prompts, found.dropped) == ((), NOTHING_DROPPED)


def test_nothing_usable_says_the_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = _file(tmp_path / "p.jsonl", [" ", "\n", None, "far too many words here"])
    with pytest.raises(InputError) as caught:
        load_prompts(Prompts(path=path, max_tokens=5), tokenizer)
    message = str(caught.value)
    assert message.startswith(f"prompts.path = {path}: no usable prompt in 4 rows (1 too_long, 2 blank, 1 malformed);")
    assert "\n" not in message
    everything = _file(tmp_path / "all.jsonl", ["a", "b"])
    with pytest.raises(InputError, match=r"prompts\.path = .*: no usable prompt in 2 rows \(2 held_out\)"):
        load_prompts(Prompts(path=everything, eval=EvalPrompts(path=everything)), tokenizer)
    with pytest.raises(InputError, match=r"prompts\.eval\.path = .*: no usable prompt in 4 rows"):
        load_eval_prompts(Prompts(path=everything, max_tokens=5, eval=EvalPrompts(path=path)), tokenizer)


def test_errors_of_the_eval_data_name_its_keys(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    good = _file(tmp_path / "p.jsonl", ["a"])
    with pytest.raises(InputError, match=r"^prompts\.eval\.path = no\.jsonl: no such file"):
        load_prompts(Prompts(path=good, eval=EvalPrompts(path="no.jsonl")), tokenizer)
    with pytest.raises(InputError, match=r"^prompts\.eval\.column = q: .* has no column 'q'; its columns: prompt$"):
        load_prompts(Prompts(path=good, eval=EvalPrompts(path=good, column="q")), tokenizer)


@pytest.mark.skipif(not HH_FILE.is_file(), reason="the hh-rlhf sample is not here")
def test_real_dialogues(tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(HH_FILE)
    config = Prompts(path=path, format="hh_rlhf", eval=EvalPrompts(path=path, count=32))
    training, held_out = load_prompts(config, tokenizer), load_eval_prompts(config, tokenizer)
    assert len(held_out.prompts) == 32
    assert len(training.prompts) + sum(training.dropped.values()) == 1156
    assert training.dropped["malformed"] == 4
    assert not {prompt.uid for prompt in training.prompts} & {prompt.uid for prompt in held_out.prompts}
    assert max(len(prompt.token_ids) for prompt in training.prompts) <= 256


def test_shipped_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    folder = ROOT / "configs/prompts"
    texts = {}
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        texts[name] = [row["prompt"] for row in rows if list(row) == ["prompt"]]
        assert len(texts[name]) == len(rows)
    assert len(texts["train"]) >= 420
    assert len(texts["eval"]) == 40
    every = texts["train"] + texts["eval"]
    plain = [" ".join("".join(c for c in text.lower() if c.isalnum() or c == " ").split()) for text in every]
    assert [text for text, times in Counter(plain).items() if times > 1] == []
    assert [text for text in every if not 4 <= len(text.split()) <= 20] == []
    # Real variety: no three opening words begin more than one prompt in fifteen.
    assert max(Counter(" ".join(text.split()[:3]) for text in plain).values()) <= len(every) / 15
    config = Prompts(path=str(folder / "train.jsonl"), eval=EvalPrompts(path=str(folder / "eval.jsonl"), count=40))
    training = load_prompts(config, tokenizer)
    assert (len(training.prompts), training.dropped) == (len(texts["train"]), NOTHING_DROPPED)


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(uid=f"{index:016x}", messages=(), text="", token_ids=()) for index in range(count)]


SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)


@given(SIZES, SEEDS, st.integers(0, 5))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    prompts = _prompts(size)
    drawn = PromptOrder(prompts, seed).slice(epoch * size, size)
    assert sorted(prompt.uid for prompt in drawn) == [f"{prompt.uid}-{epoch}" for prompt in prompts]


@given(SIZES, SEEDS, st.integers(0, 100), st.lists(st.integers(0, 50), max_size=6))
def test_slices_concatenate_and_uids_are_unique(size: int, seed: int, start: int, counts: list[int]) -> None:
    prompts = _prompts(size)
    whole = PromptOrder(prompts, seed).slice(start, sum(counts))
    assert len({prompt.uid for prompt in whole}) == len(whole) == sum(counts)
    order = PromptOrder(prompts, seed)
    starts = [start + sum(counts[:index]) for index in range(len(counts))]
    # Asked for backwards: the order keeps no cursor.
    pieces = [order.slice(at, count) for at, count in reversed(list(zip(starts, counts, strict=True)))]
    assert [prompt for piece in reversed(pieces) for prompt in piece] == whole


def test_order_differs_between_seeds_and_epochs() -> None:
    def hashes(seed: int, epoch: int) -> tuple[str, ...]:
        return tuple(prompt.uid.partition("-")[0] for prompt in PromptOrder(_prompts(30), seed).slice(30 * epoch, 30))

    assert len({hashes(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_order_is_pinned_and_comes_from_the_raw_stream() -> None:
    # A resumed run must see the order it was planned with, whatever numpy it resumes under.
    indices = [int(prompt.uid.partition("-")[0], 16) for prompt in PromptOrder(_prompts(8), 5).slice(0, 16)]
    assert indices == [7, 4, 3, 5, 6, 2, 0, 1, 7, 6, 1, 5, 4, 2, 0, 3]
    raw = np.random.PCG64(np.random.SeedSequence([5, 1])).random_raw(8)
    assert indices[8:] == sorted(range(8), key=lambda index: int(raw[index]))


def test_bad_slices() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptOrder([], 0)
    with pytest.raises(ValueError, match="must not be negative"):
        PromptOrder(_prompts(2), 0).slice(-1, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        PromptOrder(_prompts(2), 0).slice(0, -1)


def test_slices_of_a_large_set_do_no_work_over_the_whole_set() -> None:
    one = Prompt(uid="0" * 16, messages=(), text="", token_ids=())
    order = PromptOrder([one] * 1_000_000, 0)
    order.slice(999_990, 20)  # builds the permutations of both epochs
    begin = time.process_time()
    for start in range(0, 64_000, 64):
        order.slice(start, 64)
    # 1000 slices: about 0.1 s; a pass over a million prompts for each would take minutes.
    assert time.process_time() - begin < 10
