"""The LLM judge on a real vLLM server, against a plain forward pass of the same prompts."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.config.judge import LLMJudge as Config
from rlhf.errors import RLHFError
from rlhf.judging.llm import LLMJudge
from rlhf.judging.llm.prompt import Conversation, JudgePrompt, cut_conversations
from rlhf.records import Comparison, Message, Verdict, VerdictState

pytestmark = pytest.mark.slow

CONTEXT = 1024  # tokens that the server takes, the answer included
PAIRS = [
    ("What is rain?", "Water that falls from clouds.", "A kind of bread."),
    ("Name a colour.", "Blue", "Seven, or perhaps eight. It depends on the day."),
    ("Count to three.", "1 2 3", "1 2 3 4 5 6"),
]
CRITERIA = [
    {"name": "clear", "description": "It is easy to understand.", "weight": 3.0},
    {"name": "true", "description": "What it says is true.", "weight": 1.0},
]


def comparison(question: str, a: str, b: str) -> Comparison:
    return Comparison("uid", (Message(role="user", content=question),), a, b)


COMPARISONS = [comparison(*pair) for pair in PAIRS]
TURNS = [("user", "old " * 400), ("assistant", "older answer " * 150), ("user", "What is rain?")]
LONG = Comparison("uid", tuple(Message(role=role, content=text) for role, text in TURNS), "Water.", "Bread.")


@dataclass
class Server:
    url: str
    model: Any
    tokenizer: PreTrainedTokenizerBase

    def config(self, **fields: Any) -> Config:
        return Config.model_validate(
            {"type": "llm", "base_url": self.url, "model": "judge", "timeout_s": 30, "retries": 0, **fields}
        )

    async def compare(self, *comparisons: Comparison, **fields: Any) -> list[Verdict]:
        return await LLMJudge(self.config(**fields)).compare(comparisons)

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def fits(self, messages: list[dict[str, str]]) -> bool:
        return len(self.encode(messages)) < CONTEXT

    @torch.no_grad()
    def hidden(self, messages: list[dict[str, str]]) -> torch.Tensor:
        ids = torch.tensor([self.encode(messages)])
        return self.model.model(ids).last_hidden_state[0, -1]

    def first_wins(self, messages: list[dict[str, str]]) -> float:
        """p(A) over the twenty likeliest tokens that read A or B, from a forward pass."""
        probabilities = torch.softmax(self.model.lm_head(self.hidden(messages)).double(), -1)
        mass = {"A": 0.0, "B": 0.0}
        for value, token in zip(*(found.tolist() for found in probabilities.topk(20)), strict=True):
            letter = self.tokenizer.decode([token]).strip()
            if letter in mass:
                mass[letter] += value
        assert min(mass.values()) > 0
        return mass["A"] / (mass["A"] + mass["B"])


def leaning_to_letters(path: Path, out: Path) -> Server:
    """The tiny model with a head of its own in which A and B are likely after the prompts of the tests."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    server = Server("", model, AutoTokenizer.from_pretrained(path))
    prompts = [messages for item in COMPARISONS for messages in letter_prompts(item)]
    prompts += letter_prompts(COMPARISONS[0], criteria=CRITERIA)
    for conversation in cut_conversations(LONG):
        prompts += letter_prompts(LONG, conversation)
    states = torch.stack([server.hidden(messages) for messages in prompts])
    direction = torch.linalg.pinv(states) @ torch.ones(len(prompts))  # 1 along the state of each prompt
    for letter in "AB":
        [token] = server.tokenizer.encode(letter, add_special_tokens=False)
        model.lm_head.weight.data[token] += 14.0 * direction
    model.save_pretrained(out)
    server.tokenizer.save_pretrained(out)
    return server


def letter_prompts(
    item: Comparison, conversation: Conversation | None = None, **fields: Any
) -> list[list[dict[str, str]]]:
    """A first and B first, for each question."""
    prompt = JudgePrompt(Config(type="llm", base_url="http://localhost/v1", model="judge", **fields))
    orders = ((item.a, item.b), (item.b, item.a))
    shown = conversation or Conversation(item.messages)
    return [prompt.letter(shown, *order, question) for order in orders for question in prompt.questions]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("judge-server")
    found = leaning_to_letters(tiny_model, folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"""{sys.executable} -m vllm.entrypoints.openai.api_server --model {folder / "model"}
        --served-model-name judge --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager
        --max-model-len {CONTEXT} --no-enable-chunked-prefill --max-num-batched-tokens 8192 --max-num-seqs 16
        --kv-cache-memory-bytes {64 << 20} --disable-log-stats"""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "2",
    }
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command.split(), stdout=out, stderr=out, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        found.url = f"http://127.0.0.1:{port}/v1"
        yield found
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


async def test_p_equals_a_forward_pass_in_both_orders(server: Server) -> None:
    verdicts = await server.compare(*COMPARISONS, answer="logprobs")
    for item, verdict in zip(COMPARISONS, verdicts, strict=True):
        a_first, b_first = (server.first_wins(messages) for messages in letter_prompts(item))
        assert verdict.p_ab == pytest.approx(a_first, abs=1e-4)
        assert verdict.p_ba == pytest.approx(1 - b_first, abs=1e-4)
        assert abs(a_first - b_first) > 1e-3  # what is compared depends on the order


async def test_swapped_comparison_is_the_mirror(server: Server) -> None:
    swapped = [comparison(question, b, a) for question, a, b in PAIRS]
    there, back = await server.compare(*COMPARISONS), await server.compare(*swapped)
    assert [verdict.p_ab for verdict in back] == pytest.approx([1 - verdict.p_ba for verdict in there], abs=1e-4)
    assert all(VerdictState.INVALID is not verdict.state for verdict in there)


async def test_criteria_equal_forward_passes(server: Server) -> None:
    [verdict] = await server.compare(COMPARISONS[0], criteria=CRITERIA)
    passes = [server.first_wins(messages) for messages in letter_prompts(COMPARISONS[0], criteria=CRITERIA)]
    assert verdict.p_ab == pytest.approx((3 * passes[0] + passes[1]) / 4, abs=1e-4)
    assert verdict.p_ba == pytest.approx(1 - (3 * passes[2] + passes[3]) / 4, abs=1e-4)


async def test_structured_answers_are_read_or_invalid(server: Server) -> None:
    verdicts = await server.compare(*COMPARISONS, answer="json", max_completion_tokens=24)
    for verdict in verdicts:
        if verdict.state is VerdictState.INVALID:
            assert "the answer is not JSON (cut at judge.max_completion_tokens)" in verdict.reason
        else:
            assert {verdict.p_ab, verdict.p_ba} <= {0.0, 0.5, 1.0}


async def test_conversation_longer_than_the_servers_context_is_cut(server: Server) -> None:
    [verdict] = await server.compare(LONG)
    prompts = [letter_prompts(LONG, Conversation(LONG.messages[drop:], cut=drop > 0)) for drop in range(3)]
    drop = [server.fits(a_first) for a_first, _ in prompts].index(True)
    a_first, b_first = (server.first_wins(messages) for messages in prompts[drop])
    assert drop == 1
    assert verdict.truncated
    assert verdict.p_ab == pytest.approx(a_first, abs=1e-4)
    assert verdict.p_ba == pytest.approx(1 - b_first, abs=1e-4)
    [hopeless] = await server.compare(comparison("Hi", "long " * 1200, "short"))
    assert hopeless.reason == "the responses alone do not fit the context of judge.model"


async def test_unknown_model_stops_the_run(server: Server) -> None:
    with pytest.raises(RLHFError, match=r"judge\.model 'other': HTTP 404"):
        await server.compare(COMPARISONS[0], model="other")
