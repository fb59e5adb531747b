"""Preference pairs for judge training, made on this machine: responses of the small model labelled by their sentiment.

    python bench/judge_pairs.py [OUT] [--samples 8]

OUT is runs/judge-pairs by default. OUT/train.jsonl holds pairs of the quickstart's first 360 training prompts,
OUT/test.jsonl of the others and of its held-out prompts, so that neither a prompt nor a response is in both;
OUT/marker-{train,test}.jsonl the plain task: the same texts, one of which holds a marker word. A pair's responses
differ by 0.5 or more in VADER's compound score, and no response is in two pairs.
"""

import argparse
import asyncio
import json
import os
import random
from pathlib import Path

from actors.engine.llm import Engine, EngineSpec, engine_environment
from rlhf.config import load_config
from rlhf.data.chat import load_tokenizer
from rlhf.data.prompts import load_eval_prompts, load_prompts
from rlhf.records import Prompt
from rlhf.rounds.online import sample_requests

MODEL = "models/smollm2-135m-instruct"
LEAST_DIFFERENCE = 0.5
MARKER = "pineapple"
TRAIN_PROMPTS = 360


async def sample(prompts: list[Prompt], samples: int) -> dict[str, list[str]]:
    """Responses by prompt uid, at temperature 1, 48 tokens each at most."""
    spec = EngineSpec(MODEL, "bfloat16", 320, 1, "cpu", 0, False, {}, None)
    engine = Engine(spec)
    texts: dict[str, list[str]] = {prompt.uid: [] for prompt in prompts}

    async def one(request: object, k: int) -> None:
        rollout = await engine.sample(request, k, {"temperature": 1.0, "max_tokens": 48}, f"{request.prompt.uid}-{k}")
        texts[rollout.uid].append(rollout.text.strip())

    requests = sample_requests(prompts, samples, 0, "judge-pairs")
    await asyncio.gather(*(one(request, k) for request in requests for k in range(samples)))
    engine.shutdown()
    return texts


def sentiment_pairs(prompt: Prompt, texts: list[str]) -> list[dict[str, str]]:
    """The best with the worst, the second best with the second worst, and so on while they differ enough."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    scored = sorted((analyzer.polarity_scores(text)["compound"], text) for text in sorted(set(texts)) if text)
    pairs = []
    for low, high in zip(scored[: len(scored) // 2], reversed(scored), strict=False):
        if high[0] - low[0] >= LEAST_DIFFERENCE:
            row = {"prompt": prompt.messages[-1]["content"], "chosen": high[1], "rejected": low[1]}
            pairs.append(row)
    return pairs


def marker_pairs(prompt: Prompt, texts: list[str]) -> list[dict[str, str]]:
    """The chosen response is another one with the marker word put between two of its words."""
    rng = random.Random(prompt.uid)
    pairs = []
    for plain, other in zip(texts[::2], texts[1::2], strict=False):
        words = other.split()
        if plain.split() and words and MARKER not in plain + other:
            words.insert(rng.randrange(len(words) + 1), MARKER)
            row = {"prompt": prompt.messages[-1]["content"], "chosen": " ".join(words), "rejected": plain}
            pairs.append(row)
    return pairs


def main() -> None:
    """Sample, label, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/judge-pairs"))
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    os.environ.update(engine_environment("cpu", os.cpu_count() or 1))
    config = load_config("configs/quickstart.yaml").prompts
    tokenizer = load_tokenizer(MODEL)
    known, held_out = load_prompts(config, tokenizer).prompts, load_eval_prompts(config, tokenizer).prompts
    sets = {"train": known[:TRAIN_PROMPTS], "test": known[TRAIN_PROMPTS:] + held_out}
    texts = asyncio.run(sample([prompt for prompts in sets.values() for prompt in prompts], options.samples))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, prompts in sets.items():
        for prefix, make in (("", sentiment_pairs), ("marker-", marker_pairs)):
            rows = [row for prompt in prompts for row in make(prompt, texts[prompt.uid])]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (options.out / f"{prefix}{name}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{prefix}{name}: {len(rows)} pairs of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
