"""vLLM's pooling runner behind the one call that reward models need."""

import asyncio
import itertools
from collections.abc import Sequence

import numpy as np

from actors.engine.llm import EngineSpec, engine_arguments, naming_death, start_engine
from actors.engine.sleeping import Sleeper
from rlhf.judging.reward_model import check_reward_model


class PoolingEngine:
    """One vLLM engine with a sequence classifier of one label."""

    def __init__(self, spec: EngineSpec):
        """Raises `InputError` if the model is no reward model."""
        check_reward_model(spec.model, spec.trust_remote_code)
        self._engine = start_engine({"runner": "pooling"} | engine_arguments(spec))
        self._sleeper = Sleeper(self._engine, spec.device == "cuda")
        self._names = itertools.count()
        self._padding = self._skipped_padding()

    def shutdown(self) -> None:
        """Stop the engine's processes."""
        self._engine.shutdown()

    async def sleep(self, level: int) -> None:
        """Give the device's memory back; see `actors.engine.sleeping`."""
        with naming_death():
            await self._sleeper.sleep(level)

    async def wake(self) -> None:
        """Take the device's memory again."""
        with naming_death():
            await self._sleeper.wake()

    async def rewards(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The model's one logit for each tokenized conversation, before any activation: float64 [len(prompts)]."""
        return np.array(await asyncio.gather(*(self._reward(prompt) for prompt in prompts)), dtype=np.float64)

    async def _reward(self, prompt: Sequence[int]) -> float:
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        ids = list(prompt)
        while len(ids) > 1 and ids[-1] == self._padding:
            ids.pop()
        # The activation is a sigmoid: Bradley-Terry needs the number before it.
        params = PoolingParams(task="classify", use_activation=False)
        name = f"reward-{next(self._names)}"
        with naming_death():
            async for output in self._engine.encode(TokensPrompt(prompt_token_ids=ids), params, request_id=name):
                [reward] = output.outputs.data.flatten().tolist()
                return float(reward)
        raise RuntimeError(f"vLLM ended request {name} without an output")

    def _skipped_padding(self) -> int | None:
        """The token that a decoder's reward is never read at.

        Decoders in transformers, which reward models are trained with, read the reward at the last token that is not
        the padding token; vLLM reads it at the last token. They differ where a template ends with that token.
        """
        config = self._engine.vllm_config.model_config
        pooler = config.pooler_config
        if pooler is None or pooler.seq_pooling_type != "LAST":
            return None
        padding: int | None = config.hf_text_config.pad_token_id
        return padding
