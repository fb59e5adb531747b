"""Secrets never reach a file."""

from rlhf.monitor.redact import REDACTED, redact


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


def test_a_secret_that_contains_another_is_hidden_whole() -> None:
    assert redact("x-abcdefgh-123", {"A_KEY": "abcdefgh", "B_KEY": "abcdefgh-123"}) == f"x-{REDACTED}"
