"""The policy's tokenizer, and prompts through its chat template."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf import packed
from rlhf.data.rows import one_line
from rlhf.errors import InputError
from rlhf.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK_ROLE = {"user": "Human", "assistant": "Assistant"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, key: str = "policy.path"
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or Hugging Face id.

    Raises `InputError`, blaming the config key `key`, where there is no such model or it has no tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()):
        raise InputError(f"{key} = {path}: no such folder; give a model folder that exists or a Hugging Face id")
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # Without its files the library may build an empty tokenizer from the model's type.
        raise InputError(f"{key} = {path}: the folder has no tokenizer; save the model's tokenizer into it")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else path, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{key} = {path}: cannot load its tokenizer: {one_line(error)}; check the folder or id and the connection"
        ) from error


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> tuple[str, "array[int]"]:
    """The rendered prompt, ready for the assistant's answer, and its token ids.

    The ids are the text tokenized without adding special tokens: a BOS is there once, where the template writes it.
    See `render_prompt` for models without a template and for errors.
    """
    text = render_prompt(tokenizer, messages)
    return text, packed.token_ids(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """The conversation through the chat template, with the generation prompt.

    A model without a chat template gets plain turns, a blank line between them, that end with a bare `Assistant:`
    (the system message first, unlabelled, and BOS in front where the tokenizer would add it):
    `Human: ...\\n\\nAssistant: ...\\n\\nHuman: ...\\n\\nAssistant:`.

    Raises `InputError` where the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return _begin(tokenizer) + _plain_turns(messages)
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"policy.path = {tokenizer.name_or_path}: its chat template refuses a conversation of {roles}: "
            f"{one_line(error)}; leave out prompts.system and the rows' system messages, or repair the template"
        ) from error
    return str(text)


def _plain_turns(messages: Sequence[Message]) -> str:
    turns = [
        f"{_FALLBACK_ROLE[message['role']]}: {message['content']}"
        if message["role"] in _FALLBACK_ROLE
        else message["content"]
        for message in messages
    ]
    return "\n\n".join([*turns, "Assistant:"])


def _begin(tokenizer: "PreTrainedTokenizerBase") -> str:
    """BOS as text where the tokenizer puts one before plain text."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""
