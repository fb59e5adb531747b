"""A tokenizer with one token a byte, for exact counts in tests of judge prompts."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTROL = ["<pad>", "<bos>", "<turn>", "<end>", "<unk>"]
BODY = "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<end>' }}{% endfor %}"
CHAT = BODY + "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Adds `<bos>` by itself when it is not told otherwise."""
    vocab = {token: i for i, token in enumerate(CONTROL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=CONTROL[2:4],
        name_or_path="byte-judge",
    )
    fast.chat_template = template
    return fast
