"""Chat templates: the ids are the rendered text's, BOS comes once, and a model without a template still works."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.data.chat import encode_prompt, load_tokenizer
from rlhf.errors import InputError
from rlhf.records import Message

REAL = Path(__file__).parents[2] / "models/smollm2-135m-instruct"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hello  there, é!"),
    Message(role="assistant", content="Hi."),
    Message(role="user", content="Why?\n"),
)


def _tiny(template: str | None, adds_bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes, BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
def test_template_with_bos_writes_it_once(adds_bos: bool) -> None:
    text, ids = encode_prompt(_tiny(TEMPLATE, adds_bos), TALK)
    assert text == ("<s><system>Be brief.</s><user>Hello  there, é!</s><assistant>Hi.</s><user>Why?\n</s><assistant>")
    # Independent: one id a byte, special tokens as their own ids.
    vocabulary = _tiny(None, False).get_vocab()
    letters = {byte: vocabulary[letter] for byte, letter in _bytes_to_letters().items()}
    expected = [0]
    for part in text.removeprefix("<s>").split("</s>"):
        expected += [letters[byte] for byte in part.encode()] + [1]
    assert list(ids) == expected[:-1]
    assert ids.count(0) == 1


def _bytes_to_letters() -> dict[int, str]:
    """The byte-level alphabet: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize(("adds_bos", "begin"), [(False, ""), (True, "<s>")])
def test_model_without_a_template(adds_bos: bool, begin: str) -> None:
    tokenizer = _tiny(None, adds_bos)
    text, ids = encode_prompt(tokenizer, TALK)
    assert text == f"{begin}Be brief.\n\nHuman: Hello  there, é!\n\nAssistant: Hi.\n\nHuman: Why?\n\n\nAssistant:"
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(0) == (1 if begin else 0)
    # The same ids as plain tokenization with special tokens would give: one BOS where the model expects one.
    assert list(ids) == tokenizer(text.removeprefix("<s>"))["input_ids"]


def test_template_that_refuses_a_system_message() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system\nrole') }}{% endif %}x"
    with pytest.raises(InputError) as caught:
        encode_prompt(_tiny(refusing, False), TALK)
    message = str(caught.value)
    assert (
        "refuses a conversation of system, user, assistant, user: No system role; leave out prompts.system" in message
    )
    assert "\n" not in message


@pytest.mark.skipif(not REAL.is_dir(), reason="the small model is not fetched")
def test_real_tokenizer() -> None:
    tokenizer = load_tokenizer(str(REAL))
    text, ids = encode_prompt(tokenizer, TALK[1:2])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello  there, é!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    backend = Tokenizer.from_file(str(REAL / "tokenizer.json"))
    assert list(ids) == backend.encode(text, add_special_tokens=False).ids
    chat: Any = [dict(message) for message in TALK]
    assert (
        list(encode_prompt(tokenizer, TALK)[1])
        == (tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    )


def test_saved_tokenizer_loads(tmp_path: Path) -> None:
    _tiny(TEMPLATE, False).save_pretrained(tmp_path)
    assert encode_prompt(load_tokenizer(str(tmp_path)), TALK) == encode_prompt(_tiny(TEMPLATE, False), TALK)


def test_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    def message(path: Path | str) -> str:
        with pytest.raises(InputError) as caught:
            load_tokenizer(str(path), key="judge.path")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = tmp_path / "missing"
    assert message(missing) == (
        f"judge.path = {missing}: no such folder; give a model folder that exists or a Hugging Face id"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert message(tmp_path) == (
        f"judge.path = {tmp_path}: the folder has no tokenizer; save the model's tokenizer into it"
    )
    (tmp_path / "tokenizer.json").write_text("not JSON")
    assert message(tmp_path).startswith(f"judge.path = {tmp_path}: cannot load its tokenizer: ")
