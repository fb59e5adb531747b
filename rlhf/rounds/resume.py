"""Which keys of its config a run may change between two starts, and which would make it another run."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.config.judge import RUNNING

OF_A_JUDGE = RUNNING | {"base_url"}
"""Keys of a judge, or of a member of an ensemble, that change no verdict; an endpoint may move."""

MAY_CHANGE = {
    "output_dir": "a run directory may be moved",
    "rounds.count": "more rounds, or fewer, but not fewer than have begun; with a constant schedule and no warm-up "
    "only, because the learning rate goes by the share of rounds that are done",
    "evaluation": "measures, and trains nothing",
    "eval_judge": "measures, and trains nothing",
    "monitor": "shows, and trains nothing",
    "checkpoint": "how often, and how many",
    "cluster": "machines, deadlines, restarts",
    "sync": "how weights travel; each version is proved whichever way it came",
    "generator.replicas": "seeds go by prompt, so it does not matter which engine samples",
    "generator.tensor_parallel": "how vLLM runs",
    "generator.engine": "how vLLM runs; sealed rounds stay, later ones are sampled by the new engine",
    "generator.cpus": "how vLLM runs",
    "judge.*.{running}": "how a judge runs and where it is reached, a member of an ensemble too",
    "learner.world_size": "same steps up to rounding; masters, moments and averages are moved bit for bit",
    "learner.zero_stage": "as `learner.world_size`",
    "learner.offload": "as `learner.world_size`",
    "learner.micro_batch_size": "same steps up to rounding",
    "learner.pack_tokens": "same steps up to rounding",
    "learner.prefix_sharing": "same steps up to rounding",
    "learner.attention": "same steps up to rounding",
    "learner.activation_checkpointing": "same steps up to rounding",
    "learner.compile": "same steps up to rounding",
    "learner.reference.offload": "where the reference lies",
    "learner.cpus": "threads",
    "learner.max_skipped_steps": "when the run gives up",
}
"""Keys, or sections of keys, that touch nothing that has been planned, sealed or trained, and why."""

MUST_STAY = {
    "name": "names the folder: another name is another run",
    "seed": "order, sampling and pairing are drawn from it",
    "policy": "the model that is trained",
    "prompts": "what has been planned, and what is held out",
    "preferences": "what has been planned, and what is held out",
    "data": "what has been planned, and what is held out",
    "orders": "what the rows are",
    "epochs": "what has been planned",
    "checkpoint_steps": "where the data are cut into segments",
    "warmup_steps": "the learning rate of the steps that were taken",
    "rounds": "what has been planned; how stale pairs may be",
    "generator": "K and the distribution that the responses are drawn from",
    "judge": "what the verdicts mean",
    "pairing": "which pairs are sealed",
    "learner": "batches, optimizer, loss, reference and parametrisation: the steps that were taken",
    "buffer": "which pairs are replayed",
    "anchor": "which pairs are trained beside a round's own",
}
"""All other keys, by section."""

_RUNNING = re.compile(rf"judge\.(members\.\d+\.judge\.)?({'|'.join(sorted(OF_A_JUDGE))})(\.|$)")


def may_change(key: str) -> bool:
    """May the value of a dotted key be another one when a run goes on?"""
    return bool(_RUNNING.match(key)) or any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; the items of a list of sections have their place as a key."""
    if isinstance(node, list) and node and all(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in leaves(child, f"{prefix}.{name}".lstrip(".")).items()
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Old and new value of each dotted key that differs, null where a config does not have it.

    A `type` comes first: its siblings differ only because it does.
    """
    old, new = leaves(before), leaves(now)
    keys = sorted(old.keys() | new.keys(), key=lambda key: (not key.endswith(".type"), key))
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def table() -> str:
    """Both tables in Markdown, as docs/operations.md has them."""
    return "\n".join(_rows("may change", MAY_CHANGE)) + "\n\n" + "\n".join(_rows("must stay", MUST_STAY)) + "\n"


def _rows(title: str, reasons: Mapping[str, str]) -> Iterator[str]:
    yield f"| {title} | why |"
    yield "| --- | --- |"
    for key, reason in reasons.items():
        shown = key
        if "{running}" in key:
            shown = "`, `".join(f"judge.{name}" for name in sorted(OF_A_JUDGE))
        yield f"| `{shown}` | {reason} |"
