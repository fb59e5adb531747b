"""Tokens a second of the pair-model judge against the engine's bare prefill of the same texts, alternating.

    python bench/judge.py [PAIRS.jsonl] [--count 64] [--repeats 3] [--model DIR] [--dtype bfloat16]

PAIRS is any preference set (`rlhf judge bench` has the layouts), runs/judge-pairs/test.jsonl by default
(bench/judge_pairs.py makes it). Bare: the token ids are ready, the engine gets all prompts at once and returns one
token each. Judge: comparisons go through the pool to the Ray actor, are rendered, encoded and judged in both orders.
Prefix caching is off for both, so that repeats do equal work. Tokens are those of both orders of every comparison.
"""

import argparse
import asyncio
import statistics
import time

import ray

from actors.cluster import connect
from actors.engine.llm import engine_environment
from actors.judge import ActorEngines, JudgeActor, JudgePool
from rlhf.config.judge import PairModelJudge
from rlhf.config.system import Cluster
from rlhf.data.preferences import load_preferences
from rlhf.judging.build import judge_tokenizer
from rlhf.judging.pair_model import PairModelJudge as Judge
from rlhf.judging.training import comparison, encode_examples
from rlhf.records import Comparison


class MeasuredActor(JudgeActor):
    """A judge actor that can also run the engine alone."""

    def __init__(self, config: PairModelJudge, device: str) -> None:
        self.engine = ActorEngines(device, 0).scorer(config)
        self._judge = Judge(config, self.engine, judge_tokenizer(config))

    async def bare(self, prompts: list[list[int]]) -> float:
        """Seconds for one token after each prompt."""
        from vllm import SamplingParams

        started = time.perf_counter()
        parameters = SamplingParams(max_tokens=1, temperature=1.0)
        name = f"bare-{started}"
        await asyncio.gather(
            *(self.engine._run(prompt, parameters, f"{name}-{i}") for i, prompt in enumerate(prompts))  # type: ignore[attr-defined]
        )
        return time.perf_counter() - started


async def measure(actor: ray.actor.ActorHandle, comparisons: list[Comparison], prompts: list[list[int]], repeats: int):
    """Seconds of each repeat, bare and through the pool."""
    pool = JudgePool([actor], batch_size=64, deadline=600)
    await actor.bare.remote(prompts[:8])
    bare, judged = [], []
    for _ in range(repeats):
        bare.append(await actor.bare.remote(prompts))
        started = time.perf_counter()
        await asyncio.gather(*(pool.compare([item]) for item in comparisons))
        judged.append(time.perf_counter() - started)
    return bare, judged


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="?", default="runs/judge-pairs/test.jsonl")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    config = PairModelJudge(
        type="pair_model",
        path=options.model,
        dtype=options.dtype,
        max_length=2048,
        engine={"enable_prefix_caching": False},
    )
    prompt = Judge(config, None, judge_tokenizer(config)).prompt  # type: ignore[arg-type]
    examples = load_preferences(options.pairs).examples[: options.count]
    prompts = [ids for orders in encode_examples(examples, prompt) for ids in orders or ()]
    tokens = sum(map(len, prompts))
    with connect("bench-judge", Cluster(), 256 << 20) as cluster:
        environment = {"env_vars": engine_environment(cluster.device, cluster.threads(None))}
        gpus = int(cluster.device == "cuda")
        actor = (
            ray.remote(MeasuredActor)
            .options(runtime_env=environment, num_gpus=gpus, max_concurrency=1000)
            .remote(config, cluster.device)
        )
        bare, judged = asyncio.run(measure(actor, [comparison(e) for e in examples], prompts, options.repeats))
    rates = [tokens / statistics.median(seconds) for seconds in (bare, judged)]
    print(f"{len(examples)} comparisons, {tokens} tokens in both orders, {options.repeats} repeats")
    print(f"bare prefill {rates[0]:8.0f} tokens/s   ({', '.join(f'{s:.2f}' for s in bare)} s)")
    print(f"judge        {rates[1]:8.0f} tokens/s   ({', '.join(f'{s:.2f}' for s in judged)} s)")
    print(f"ratio        {rates[1] / rates[0]:8.2f}")


if __name__ == "__main__":
    main()
