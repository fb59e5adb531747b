"""Checkpoints that another number of ranks, or another ZeRO stage, goes on from.

The file is also the script of one rank. Two ranks save; one rank loads what they saved, goes on, and saves what it
loaded; two ranks load that and go on.
"""

import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.integration.ranks import make_config, make_round, run_ranks, same, save_tiny_model

LORA = {"lora": {"rank": 4, "alpha": 12, "target_modules": ["q_proj", "v_proj"]}}
SUBSET = {"trainable": {"include": ["*mlp*", "*norm*"]}}
BF16 = {"dtype": "bfloat16"}
SAVED = {
    **{f"full{stage}": {"zero_stage": stage} for stage in range(4)},
    "half2": {"zero_stage": 2, **BF16},
    "half3": {"zero_stage": 3, **BF16},
    "lora2": {"zero_stage": 2, **LORA},
    "lora3": {"zero_stage": 3, **LORA},
    "subset1": {"zero_stage": 1, **SUBSET},
}
LOADED = {
    "full0": {"zero_stage": 3},
    "full1": {"zero_stage": 2},
    "full2": {"zero_stage": 0},
    "full3": {"zero_stage": 1, "offload": {"optimizer": True}},
    "half2": {"zero_stage": 3, **BF16},
    "half3": {"zero_stage": 1, **BF16},
    "lora2": {"zero_stage": 3, **LORA},
    "lora3": {"zero_stage": 0, **LORA},
    "subset1": {"zero_stage": 3, **SUBSET},
}
"""By the checkpoint that one rank loads."""
MORE = {"full2": ["1", "3"], "full3": ["0", "2"]}
"""Other stages under which one rank loads a checkpoint, and two ranks their own."""
PHASES = (("save", 2), ("load", 1), ("back", 2))
KEYS = ("exp_avg", "exp_avg_sq")


class Counting:
    """A made-up beta controller whose beta goes up with the pairs that it has seen."""

    def __init__(self):
        self.seen = 0.0

    def beta(self, pairs=()):
        return 0.1 + 0.001 * self.seen

    def observe(self, statistics):
        self.seen += statistics["count"]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def run_phase(folder, phase, rank, world_size, port):
    import rlhf.learning.rank as ranks
    from rlhf.errors import RLHFError

    ranks.build_beta = lambda loss: Counting()

    def build(settings):
        moving = {"reference": {"policy": "ema", "ema_decay": 0.5}, "micro_batch_size": 2}
        config = make_config(folder / "model", world_size=world_size, **moving, **settings)
        learner = ranks.RankLearner(config, rank, world_size, "cpu")
        learner.start("127.0.0.1", port, 60)
        return learner

    def go_on(learner):
        steps = [report.metrics for report in learner.train(make_round(2, 5))]
        return steps, dict(learner.export_tensors())

    def loaded(settings, path, then=None):
        learner = build(settings)
        learner.load(path)
        found = state(learner)
        if then is not None:
            learner.save(then)
        return found | {"after": go_on(learner)}

    def refused(call, path):
        with pytest.raises(RLHFError) as error:
            call(path)
        return str(error.value)

    for name, settings in SAVED.items():
        result = {}
        if phase == "save":
            learner = build(settings)
            result["initial"] = dict(learner.export_tensors())
            learner.train(make_round(1, 9))
            learner._steps.skipped, learner._steps.skipped_in_a_row = 5, 2  # as after two steps that were not taken
            learner.save(folder / name)
            result |= state(learner) | {"after": go_on(learner)}
        elif phase == "load":
            result["main"] = loaded(LOADED[name], folder / name, then=folder / f"{name}-one")
            if name == "lora2":
                result["refused"] = refused(build({}).load, folder / name)
            if (folder / "disk").is_mount():
                result["full"] = refused(build(settings).save, folder / "disk" / "checkpoint")

            for stage in MORE.get(name, ()):
                result[stage] = loaded({**settings, "zero_stage": int(stage)}, folder / name)
        else:
            result["main"] = loaded(settings, folder / f"{name}-one")
            for stage in MORE.get(name, ()):
                result[stage] = loaded({**settings, "zero_stage": int(stage)}, folder / name)
        torch.save(result, folder / f"result-{phase}-{name}-{rank}.pt")


def state(learner):
    """All that a checkpoint brings back; masters and moments as DeepSpeed's own functions gather them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = learner._engine
    optimizer = engine._engine.optimizer
    if engine.stage in (1, 2):
        # DeepSpeed looks for the moments once, after the first group's first step, when the second group has none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    masters = {}
    for name, parameter in engine._parameters:
        if engine.stage:
            own = [safe_get_full_fp32_param(parameter)]
            own += [safe_get_full_optimizer_state(parameter, key) for key in KEYS]
        else:
            own = [parameter.detach(), *(optimizer.state[parameter][key] for key in KEYS)]
        masters[name] = [tensor.cpu().flatten().clone() for tensor in own]
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "masters": masters,
        "adam_steps": sorted({float(own["step"]) for own in inner.state.values() if own}),
        "weights": dict(learner.export_tensors()),
        "average": {name: value.flatten().clone() for name, value in learner.reference.state_dict()["average"].items()},
        "numbers": (learner.rounds_done, learner._step, learner._beta.seen),
        "skipped": (learner._steps.skipped, learner._steps.skipped_in_a_row),
        "scores": learner.reference.score(make_round(2, 5).pairs),
        "drawn": torch.rand(3),
    }


def main():
    folder, rank, world_size, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    run_phase(folder, (folder / "phase").read_text(), rank, world_size, port)


# ---- the tests ----


@contextmanager
def small_disk(path):
    """A file system of 8 KiB, where one may be mounted."""
    path.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", path], capture_output=True)
    try:
        yield
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    save_tiny_model(folder / "model")
    found = {}
    for phase, world_size in PHASES:
        (folder / "phase").write_text(phase)
        with small_disk(folder / "disk"):
            run_ranks(__file__, folder, world_size)
        for name in SAVED:
            files = [folder / f"result-{phase}-{name}-{rank}.pt" for rank in range(world_size)]
            found.setdefault(phase, {})[name] = [torch.load(file, weights_only=False) for file in files]
    return found


def average(ranks, masters):
    """The moving average whole: partitions of all ranks end to end, or what every rank has."""
    whole = {}
    for name, (master, *_) in masters.items():
        parts = [rank["average"][name] for rank in ranks]
        whole[name] = (torch.cat(parts) if parts[0].numel() < master.numel() else parts[0])[: master.numel()]
    return whole


def check_equal(found, saved, half):
    """Both are lists of what the ranks have; `half` says that the weights are in bf16."""
    ours, theirs = found[0], saved[0]
    for key in ("masters", "weights", "adam_steps", "numbers", "skipped"):
        assert same(ours[key], theirs[key]), key
    assert same(average(found, ours["masters"]), average(saved, theirs["masters"]))
    # The ranks share the pairs out in other micro-batches, whose sums differ in their last bits.
    rtol, atol = (2e-3, 0.1) if half else (2e-6, 2e-5)
    torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=rtol, atol=atol)


# What one rank loads, and what two ranks load of it; then the same two ranks under other stages.
CASES = [(phase, name, "main") for phase in ("load", "back") for name in SAVED]
CASES += [(phase, name, stage) for phase in ("load", "back") for name, stages in MORE.items() for stage in stages]


def variant_of(results, case):
    phase, name, variant = case
    return [rank[variant] for rank in results[phase][name]]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(results, case):
    check_equal(variant_of(results, case), results["save"][case[1]], case[1].startswith("half"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_next_round_is_that_of_the_ranks_that_saved(results, case):
    found, saved = variant_of(results, case)[0], results["save"][case[1]][0]
    (steps, weights), (expected, undisturbed) = found["after"], saved["after"]
    half = case[1].startswith("half")
    for number, (ours, theirs) in enumerate(zip(steps, expected, strict=True)):
        assert ours["loss/beta"] == theirs["loss/beta"] > 0.1
        assert ours["train/lr"] == theirs["train/lr"]
        # The first step has the weights that were loaded; the next is as far off as what that one made of them.
        exact = 1e-6 if number == 0 else 4e-6
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-2 if half else exact)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=5e-2 if half else 1e-5)
    whole_off = whole_change = 0.0
    for key, value in undisturbed.items():
        change = (value - saved["weights"][key]).float()
        whole_change += change.square().sum().item()
        whole_off += (weights[key] - value).float().square().sum().item()
    assert whole_change > 0, "weights that stand still would prove nothing"
    # A layout adds up in an order of its own: 2e-6 between any two of them, whatever was loaded.
    assert math.sqrt(whole_off / whole_change) <= (0.1 if half else 4e-6)


@pytest.mark.parametrize("name", SAVED)
def test_there_and_back_again_goes_on_bit_for_bit(results, name):
    """Two ranks that load what one rank saved of theirs, under their own stage, never notice that it was away."""
    for rank in (0, 1):
        found, saved = results["back"][name][rank]["main"], results["save"][name][rank]
        assert same(found["after"], saved["after"])


@pytest.mark.parametrize("name", SAVED)
def test_random_generators_go_on_for_as_many_ranks_and_are_seeded_for_others(results, name):
    from rlhf.seeds import derive_seed

    def seeded(rank):
        return torch.rand(3, generator=torch.Generator().manual_seed(derive_seed(0, "rank", rank, 1) % 2**32))

    assert torch.equal(results["load"][name][0]["main"]["drawn"], seeded(0))
    for rank in (0, 1):
        assert torch.equal(results["back"][name][rank]["main"]["drawn"], seeded(rank))
        for stage in MORE.get(name, ()):
            # The same number of ranks under another stage.
            own = results["back"][name][rank][stage]["drawn"]
            assert torch.equal(own, results["save"][name][rank]["drawn"])
            assert not torch.equal(own, seeded(rank))


@pytest.mark.parametrize("name", SAVED)
def test_a_save_that_finds_no_room_names_the_folder(results, name):
    found = results["load"][name][0]
    if "full" not in found:
        pytest.skip("no file system may be mounted here")
    assert "/disk/checkpoint: cannot be written (" in found["full"]
    assert "\n" not in found["full"]


def test_a_checkpoint_of_another_model_is_refused(results):
    assert results["load"]["lora2"][0]["refused"].startswith("the checkpoint holds 0 of ")


if __name__ == "__main__":
    main()
