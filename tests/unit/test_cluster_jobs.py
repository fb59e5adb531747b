"""The client of Ray's job API without a cluster: addresses, tokens, exit codes, a log that is read twice."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from actors import submit
from rlhf.cli import main
from rlhf.errors import InputError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("head.example:8265/", "http://head.example:8265"),
        ("https://ray.example/team/", "https://ray.example/team"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert submit._url(address) == url


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001", "http://head:port", "", "http://", "head"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InputError, match=r"--address .*expected the URL of Ray's dashboard"):
        submit._url(address)


def test_a_login_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(InputError) as error:
        submit._url("http://me:f00dface@head:8265")
    assert "f00dface" not in str(error.value)


def text_of(token: submit.Token | None) -> str | None:
    assert token is None or token.text not in repr(token)
    return token.text if token else None


def test_tokens_come_from_variable_file_and_home_in_this_order(monkeypatch: Any, tmp_path: Path) -> None:
    assert submit.read_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("f00d1\n")
    assert text_of(submit.read_token()) == "f00d1"
    (tmp_path / "named").write_text("f00d2\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert text_of(submit.read_token()) == "f00d2"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f00d3")
    assert text_of(submit.read_token()) == "f00d3"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit.read_token() is None


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_token_file_that_was_named_has_to_hold_one(monkeypatch: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / name))
    with pytest.raises(InputError, match=f"RAY_AUTH_TOKEN_PATH = .*{name}"):
        submit.read_token()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, 0, 1),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_exit_codes(status: JobStatus, code: int | None, expected: int) -> None:
    assert submit.exit_code(SimpleNamespace(status=status, driver_exit_code=code)) == expected


@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=4), st.data())
def test_a_log_read_again_is_printed_once(log: str, breaks: list[int], data: st.DataObject) -> None:
    out: list[str] = []
    printer = submit._Printer(out.append)
    for end in [*breaks, len(log)]:
        printer.restart()
        rest = log[:end]
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            printer.add(rest[:size])
            rest = rest[size:]
    assert "".join(out) == log


def exits(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code = stopped.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "--address", "http://127.0.0.1:1"],
        ["submit", "config.yaml", "--status", "x", "--address", "http://127.0.0.1:1"],
        ["submit", "--logs", "x", "--stop", "x", "--address", "http://127.0.0.1:1"],
    ],
)
def test_one_thing_at_a_time(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(arguments) == 2
    assert "give one of CONFIG" in capsys.readouterr().err


def test_the_address_has_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(["submit", "configs/quickstart.yaml"]) == 2
    assert capsys.readouterr().err.startswith("rlhf: --address: give the URL")


def test_a_bad_config_is_told_before_the_cluster_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("name: x\n")
    assert exits(["submit", str(file), "--address", "http://127.0.0.1:1"]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_head_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(["submit", "--status", "x", "--address", "http://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "http://127.0.0.1:1: no Ray dashboard answers there" in error


class Page(BaseHTTPRequestHandler):
    """Some other service: answers every path with the server's status, type and text."""

    def do_GET(self) -> None:
        status, kind, text = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing is written to the test's output."""


@pytest.mark.parametrize(
    "answer",
    [
        (200, "text/html", b"<html>Welcome</html>"),
        (200, "application/json", b'{"name": "search"}'),
        (200, "application/json", b"[1, 2]"),
        (200, "application/json", b'{"ray_version": "no version"}'),
        (200, "application/json", b'{"ray_version": null}'),
        (302, "text/html", b""),
        (404, "text/html", b"not found"),
        (500, "text/html", b"ill"),
    ],
    ids=["page", "other json", "list", "no version", "null", "redirect", "404", "500"],
)
def test_a_port_of_another_service_is_one_line(answer: tuple[int, str, bytes], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # The client sets it; the test takes it back.
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.answer = answer  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(SystemExit) as ended:
            main(["submit", "--status", "rlhf-x", "--address", url])
    finally:
        server.shutdown()
        server.server_close()
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1), told.err
    words = "not a Ray dashboard" if answer[0] == 500 else "something else than Ray's dashboard answers there"
    assert told.err.startswith(f"rlhf: --address {url}: {words}")
