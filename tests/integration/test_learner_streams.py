"""What the learner's ports are for: second streams, replayed pairs, masked gradients, betas of their own, exploration.

The file is also the script of one rank: `python test_learner_streams.py FOLDER RANK WORLD_SIZE PORT`.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.integration.plain import margin, plain_steps
from tests.integration.ranks import SPLIT, make_config, make_round, run_ranks, save_tiny_model, token_logprobs

WEIGHT, ALPHA = 0.6, 0.5
LAYOUTS = {
    1: {
        "whole": {"micro_batch_size": 16},
        "accumulated": {"micro_batch_size": 1, "prefix_sharing": False},
        "packed": {"pack_tokens": 60},
        "zero0": {"zero_stage": 0},
    },
    2: {"zero2": {"micro_batch_size": 2}, "zero3": {**SPLIT, "micro_batch_size": 1}},
}
EVERY = [name for layouts in LAYOUTS.values() for name in layouts]
FULL = ["whole", "accumulated", "zero2", "zero3"]
OTHERS = FULL[1:]
EXPLORING = {"loss": {"exploration": {"type": "xpo", "alpha": ALPHA}}, "reference": {"policy": "round_start"}}
BUFFER = {"size": 7, "share": 0.5, "weight": 0.8}


def streams():
    """A second stream of five pairs, one of which is too long, and a third that counts for nothing."""
    second = replace(make_round(11, 4), round=1, weight=WEIGHT)
    return {"second": second, "nothing": replace(make_round(12, 3), round=1, weight=0.0)}


def kept(sealed):
    return [pair for pair in sealed.pairs if pair.uid != "long"]


def own_beta(pair):
    return 0.05 + 0.02 * len(pair.chosen_ids)


class OwnBeta:
    """A made-up controller: each pair has its own beta, and what it is fed is written down."""

    def __init__(self):
        self.seen = []

    def beta(self, pairs):
        return [own_beta(pair) for pair in pairs]

    def observe(self, statistics):
        self.seen.append(dict(statistics))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def masked_rows(parameter):
    """Every other row of the matrices is frozen."""
    return torch.arange(parameter.shape[0]) % 2 == 0 if parameter.dim() == 2 else torch.zeros(1, dtype=torch.bool)


def make_halved():
    from rlhf.learning.parametrisation import Full

    class Halved(Full):
        """A made-up parametrisation that freezes every other row of each matrix."""

        def mask_gradients(self, model):
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    keep = (~masked_rows(parameter)).float().unsqueeze(1)
                    yield parameter, lambda gradient, keep=keep: gradient * keep

    return Halved


def run_layout(folder, name, settings, rank, world_size, port):
    import rlhf.learning.rank as ranks

    def build(**changes):
        config = make_config(folder / "model", world_size=world_size, **settings, **changes)
        learner = ranks.RankLearner(config, rank, world_size, "cpu")
        learner.start("127.0.0.1", port, 60)
        return learner

    def trained(learner, *rounds):
        metrics = [report.metrics for sealed, others in rounds for report in learner.train(sealed, others)]
        return {"steps": metrics, "statistics": learner.statistics(), "weights": dict(learner.export_tensors())}

    first, second = make_round(1, 9), streams()
    result = {"initial": dict(build().export_tensors())}
    result["two"] = trained(build(), (first, second))
    full, ranks.Full = ranks.Full, make_halved()
    result["halved"] = trained(build(), (first, {}))
    ranks.Full = full
    if name in FULL:
        result["sorted"] = trained(build(loss={"type": "aot"}), (first, second))
        result["explored"] = trained(build(**EXPLORING), (first, second))
        result["betas"] = own_betas(ranks, build, trained, (first, second))
    if name == "whole":
        result["one"] = trained(build(), (first, {}))
        result["nothing"] = trained(build(), (first, {"nothing": second["nothing"]}))
        result["no steps"] = trained(build(), (make_round(1, 0), second))
    if name in ("whole", "zero3"):
        result |= replayed(folder, build, trained)
    torch.save(result, folder / f"result-{name}-{rank}.pt")


def own_betas(ranks, build, trained, rounds):
    controller, build_beta = OwnBeta(), ranks.build_beta
    ranks.build_beta = lambda loss: controller
    result = trained(build(), rounds) | {"seen": controller.seen}
    ranks.build_beta = build_beta
    return result


def replayed(folder, build, trained):
    """Three rounds with a replay buffer, at once and with another process's learner and buffer for the last."""
    from rlhf.config.buffer import Buffer
    from rlhf.rounds.buffer import ReplayBuffer
    from rlhf.rounds.ledger import Ledger
    from rlhf.rounds.sealing import read_sealed

    ledger = Ledger(folder)

    def rounds(*numbers):
        buffer = ReplayBuffer(Buffer(**BUFFER), ledger, 0)
        for number in numbers:
            digest = ledger.manifest(number)["pairs"]["sha256"]
            sealed = read_sealed(ledger.folder(number) / "pairs.parquet", number, digest)
            yield sealed, {"replay": buffer.pairs(sealed)}

    settings = {"reference": {"policy": "round_start"}}
    whole = build(**settings)
    before = trained(whole, *rounds(1, 2))
    whole.save(folder / "checkpoint")
    after = trained(whole, *rounds(3))
    again = build(**settings)
    again.load(folder / "checkpoint")
    return {"replay": before, "uninterrupted": after, "resumed": trained(again, *rounds(3))}


def main():
    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    for name, settings in LAYOUTS[world_size].items():
        run_layout(folder, name, settings, rank, world_size, port)


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from rlhf.rounds.ledger import Ledger, RoundState
    from rlhf.rounds.sealing import seal_pairs

    folder = tmp_path_factory.mktemp("streams")
    save_tiny_model(folder / "model")
    ledger = Ledger(folder)
    for number in (1, 2, 3):
        pairs = [structs.replace(pair, uid=f"{number}-{pair.uid}") for pair in kept(make_round(number, 5))]
        ledger.commit(number, RoundState.PLANNED, {"uids": [], "cursor": 0})
        digest = seal_pairs(ledger.folder(number) / "pairs.parquet", pairs)
        ledger.commit(number, RoundState.SEALED, {"pairs": {"sha256": digest, "count": len(pairs)}})
    for world_size in LAYOUTS:
        run_ranks(__file__, folder, world_size)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return {name: torch.load(folder / f"result-{name}-0.pt", weights_only=False) for name in EVERY}


@pytest.fixture(scope="module")
def plan():
    """The pairs of each step of round 1, of both streams: 4, 4 and 1 of nine beside 2, 1 and 1 of four."""
    from rlhf.learning.plan import step_batches
    from rlhf.seeds import derive_seed

    main, other = kept(make_round(1, 9)), kept(streams()["second"])
    assert (len(main), len(other)) == (9, 4)
    order = np.random.default_rng(derive_seed(0, "stream", 1, "second", 0)).permutation(4)
    shares = [order[0:1], order[1:3], order[3:4]]
    batches = step_batches(9, 4, 1, 0, 1)
    return [([main[i] for i in batch], [other[i] for i in share]) for batch, share in zip(batches, shares, strict=True)]


@pytest.fixture(scope="module")
def plain(folder, plan):
    """Both streams in a plain loop, with the config's beta and with each pair's own."""
    steps = [[(1.0, main), (WEIGHT, other)] for main, other in plan]
    return {"two": plain_steps(folder / "model", steps), "betas": plain_steps(folder / "model", steps, beta=own_beta)}


def check_weights(found, initial, expected):
    for key, value in expected.items():
        change = value - initial[key]
        assert change.abs().max() > 1e-3
        assert (found[key] - initial[key] - change).norm() <= 1e-3 * change.norm(), key


@pytest.mark.parametrize("name", EVERY)
def test_two_streams_equal_a_plain_loop(results, plan, plain, name):
    found, (steps, weights) = results[name], plain["two"]
    for ours, ((loss, second), norm), (main, other) in zip(found["two"]["steps"], steps, plan, strict=True):
        assert ours["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert ours["second/loss"] == pytest.approx(second, rel=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert (ours["train/pairs"], ours["second/pairs"]) == (len(main), len(other))
        assert 0 <= ours["second/rewards/accuracies"] <= 1
        assert not any(key.startswith("nothing") for key in ours)
    check_weights(found["two"]["weights"], found["initial"], weights)
    assert found["two"]["statistics"]["pairs/dropped_long"] == 2.0


@pytest.mark.parametrize("kind", ["two", "sorted", "explored", "betas"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_gives_one_answer(results, kind, name):
    ours, base, initial = results[name][kind], results["whole"][kind], results["whole"]["initial"]
    for number, (one, other) in enumerate(zip(ours["steps"], base["steps"], strict=True)):
        # Before the first update every reward is 0 up to rounding, and its sign is noise.
        keys = [key for key in other if number or not key.endswith("accuracies")]
        assert {k: one[k] for k in keys} == pytest.approx({k: other[k] for k in keys}, rel=2e-5, abs=2e-5)
    check_weights(ours["weights"], initial, base["weights"])


def test_a_stream_of_weight_0_is_no_stream(results):
    one, nothing = results["whole"]["one"], results["whole"]["nothing"]
    assert one["steps"] == nothing["steps"]
    assert all(torch.equal(nothing["weights"][key], value) for key, value in one["weights"].items())
    assert one["statistics"]["pairs/dropped_long"] == nothing["statistics"]["pairs/dropped_long"] == 1.0
    assert any(not torch.equal(results["whole"]["two"]["weights"][key], value) for key, value in one["weights"].items())


def test_a_round_without_pairs_trains_no_stream(results):
    assert results["whole"]["no steps"]["steps"] == []
    assert all(
        torch.equal(results["whole"]["no steps"]["weights"][k], v) for k, v in results["whole"]["initial"].items()
    )


@pytest.mark.parametrize("name", ["whole", "zero3"])
def test_a_replayed_run_that_was_interrupted_ends_with_the_same_weights(results, name):
    found = results[name]
    # Half of five pairs a round: 2 of none, then 3 of five, then 2 of the newest seven.
    assert sum(step.get("replay/pairs", 0) for step in found["replay"]["steps"]) == 3
    assert sum(step.get("replay/pairs", 0) for step in found["uninterrupted"]["steps"]) == 2
    assert found["resumed"]["steps"] == found["uninterrupted"]["steps"]
    for key, value in found["uninterrupted"]["weights"].items():
        assert torch.equal(found["resumed"]["weights"][key], value)
    # Replayed pairs are scored under the reference of the round that replays them: in its first step it is the policy.
    assert found["uninterrupted"]["steps"][0]["replay/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["replay"]["steps"][2]["replay/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["replay"]["steps"][3]["replay/loss"] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_masked_gradients_move_nothing_at_any_stage(results, name):
    found = results[name]
    for key, value in found["halved"]["weights"].items():
        start, frozen = found["initial"][key], masked_rows(value)
        if value.dim() == 2:
            assert torch.equal(value[frozen], start[frozen]), key
            assert (value[~frozen] - start[~frozen]).abs().max() > 1e-3
    base, initial = results["whole"]["halved"], results["whole"]["initial"]
    for one, other in zip(found["halved"]["steps"], base["steps"], strict=True):
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=2e-5)
    check_weights(found["halved"]["weights"], initial, base["weights"])


def test_the_norm_is_of_what_is_left_of_the_gradient(results):
    halved, full = results["whole"]["halved"]["steps"][0], results["whole"]["one"]["steps"][0]
    assert halved["train/loss"] == full["train/loss"]
    assert 0.3 * full["train/grad_norm"] < halved["train/grad_norm"] < 0.95 * full["train/grad_norm"]


@pytest.mark.parametrize("name", FULL)
def test_a_controller_gives_each_pair_its_beta_and_is_fed_once_a_step(results, plan, plain, name):
    found, (steps, weights) = results[name]["betas"], plain["betas"]
    assert len(found["seen"]) == len(steps) == 3
    for ours, ((loss, second), norm), (main, _), seen in zip(found["steps"], steps, plan, found["seen"], strict=True):
        assert ours["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert ours["second/loss"] == pytest.approx(second, rel=1e-5, abs=1e-6)
        assert ours["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert ours["loss/beta"] == pytest.approx(sum(map(own_beta, main)) / len(main), rel=1e-6)
        assert seen["count"] == len(main)
    check_weights(found["weights"], results[name]["initial"], weights)


def test_what_a_controller_is_fed_is_reduced_over_ranks(folder, results, plan):
    from transformers import AutoModelForCausalLM

    for name in OTHERS:
        for one, other in zip(results[name]["betas"]["seen"], results["whole"]["betas"]["seen"], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    # The second step's sum, by the weights after the first step of a plain loop.
    reference, model = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    steps = [[(1.0, main), (WEIGHT, other)] for main, other in plan]
    model.load_state_dict(plain_steps(folder / "model", steps, beta=own_beta, stop=1)[1], strict=False)
    with torch.no_grad():
        expected = sum(margin(model, reference, pair).item() for pair in plan[1][0])
    assert results["zero2"]["betas"]["seen"][1]["h_sum"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", FULL)
def test_exploration_lowers_what_the_reference_wrote(folder, results, plan, name):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    # Before the first update the preference loss is log 2. The chosen responses are of the round's version, 0, the
    # rejected ones claim another; the second stream's do not count, whatever they claim.
    written = chosen_logps(model, plan)
    first = results[name]["explored"]["steps"][0]
    assert first["train/loss"] == pytest.approx(math.log(2) + ALPHA * sum(written) / len(written), rel=1e-5)
    assert first["second/loss"] == pytest.approx(math.log(2), rel=1e-5)
    # What was trained with the term is less likely afterwards than without, by far.
    model.load_state_dict(results[name]["explored"]["weights"], strict=False)
    explored = sum(chosen_logps(model, plan))
    model.load_state_dict(results[name]["two"]["weights"], strict=False)
    assert explored < sum(chosen_logps(model, plan)) - 1.0


def chosen_logps(model, plan):
    """Log-probs of the chosen responses of the first step."""
    with torch.no_grad():
        return [token_logprobs(model, pair.prompt_ids, pair.chosen_ids).sum().item() for pair in plan[0][0]]


if __name__ == "__main__":
    main()
