"""Secrets never reach a file."""

from typing import Any

import pytest

from rlhf.monitor.redact import REDACTED, find_secret, names_secret, redact


def test_strings_under_secret_names_and_values_from_the_environment_are_hidden() -> None:
    config = {
        "judge": {
            "api_key": "abc",
            "hf_token": "hf_x",
            "headers": {"Authorization": "Bearer x"},
            "api_key_env": "MY_KEY",
        },
        "prompts": {"max_tokens": 256, "path": "s3://user:pass@host/p"},
        "engine": ["--flag=topsecretvalue", {"x": "topsecretvalue!"}],
        "seed": 0,
    }
    environ = {"SERVICE_TOKEN": "topsecretvalue", "SHORT_KEY": "s3", "HOME": "MY_KEY"}
    assert redact(config, environ) == {
        "judge": {
            "api_key": REDACTED,
            "hf_token": REDACTED,
            "headers": {"Authorization": REDACTED},
            "api_key_env": "MY_KEY",
        },
        "prompts": {"max_tokens": 256, "path": f"s3://{REDACTED}@host/p"},
        "engine": [f"--flag={REDACTED}", {"x": f"{REDACTED}!"}],
        "seed": 0,
    }


def test_the_value_given_is_left_as_it_is() -> None:
    config = {"token": "abc"}
    redact(config, {})
    assert config == {"token": "abc"}


@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("api_key", "x", True),
        ("X-Api-Key", "x", True),
        ("apiKey", "x", True),
        ("hfToken", "x", True),
        ("openai_apikey", "x", True),
        ("SECRET_ACCESS_KEY", "x", True),
        ("client.secret", "x", True),
        ("dbpassword", 12345678, True),
        ("tokens", ["x"], True),
        ("credentials", {"user": "x"}, True),
        ("Authorization", "Bearer x", True),
        ("api_key", "", False),
        ("api_key", None, False),
        ("hf_token", True, False),
        ("credentials", {}, False),
        ("max_tokens", "256", False),
        ("max_num_batched_tokens", 256, False),
        ("prompt_tokens", 256, False),
        ("classifier_from_token", ["no", "yes"], False),
        ("pad_token", "<pad>", False),
        ("api_key_env", "MY_KEY", False),
        ("monkey", "x", False),
        ("keywords", ["x"], False),
        ("tokenizer", "x", False),
        ("token_ids", [1], False),
    ],
)
def test_names_of_secrets(key: str, value: Any, secret: bool) -> None:
    assert names_secret(key, value) is secret
    assert (redact({key: value}, {})[key] == REDACTED) is secret
    assert find_secret({"a": [0, {key: value}]}) == (f"a.1.{key}" if secret else None)


def test_logins_are_found_at_any_depth() -> None:
    assert find_secret({"a": {"b": ["x", "see https://u:p@h/x"]}}) == "a.b.1"
    assert find_secret({"a": "https://h/x@y", "b": ("c", 1)}) is None


def test_a_secret_that_contains_another_is_hidden_whole() -> None:
    assert redact("x-abcdefgh-123", {"A_KEY": "abcdefgh", "B_KEY": "abcdefgh-123"}) == f"x-{REDACTED}"
