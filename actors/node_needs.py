"""What each command's actors need of a node; see `actors.node_checks`."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from actors.cluster import ClusterInfo
from actors.judge_launch import JudgeLauncher
from actors.learner_launch import learner_role
from actors.node_checks import VLLM, Folder, Need, NodeChecks
from actors.preflight import Role
from rlhf.config import JudgeRun, RunConfig
from rlhf.config.judge import EngineJudge, Judge, single_judges, with_path
from rlhf.config.offline import OfflineTraining
from rlhf.modelfiles import local_folder

Tell = Callable[[str], None]


def run_checks(config: RunConfig, cluster: ClusterInfo, model: Path, run_dir: Path, tell: Tell) -> NodeChecks:
    """The checks of an online run, whose policy lies at `model`."""
    policy = Folder("policy.path", config.policy.path, model.resolve())
    options = config.generator
    gpus = options.tensor_parallel if cluster.device == "cuda" else 0
    engine = Role("generator", 1, cluster.reserved(cluster.threads(options.cpus)), gpus, "PACK")
    needs = [
        Need(engine.placed(config.cluster.placement.generator), [policy], packages=VLLM),
        _ranks(config, cluster, policy),
    ]
    judges = {"judge": config.judge} | ({"eval_judge": config.eval_judge} if config.eval_judge else {})
    launcher = JudgeLauncher(cluster, config.cluster, config.seed, None, tell)
    needs += _judges({key: with_path(judge, str(policy.path)) for key, judge in judges.items()}, launcher)
    return NodeChecks(needs, _output(config, run_dir), tell, config.cluster.deadlines.start, config.cluster.grows)


def training_checks(
    config: OfflineTraining, cluster: ClusterInfo, model: Path, run_dir: Path, tell: Tell
) -> NodeChecks:
    """The checks of a training on a set, whose model lies at `model`."""
    needs = [_ranks(config, cluster, Folder("policy.path", config.policy.path, model.resolve()))]
    return NodeChecks(needs, _output(config, run_dir), tell, config.cluster.deadlines.start, config.cluster.grows)


def judge_checks(config: JudgeRun, launcher: JudgeLauncher, tell: Tell) -> NodeChecks:
    """The checks of a judge on its own."""
    needs = list(_judges({"judge": config.judge}, launcher))
    return NodeChecks(needs, None, tell, config.cluster.deadlines.start, config.cluster.grows)


def _ranks(config: RunConfig | OfflineTraining, cluster: ClusterInfo, policy: Folder) -> Need:
    role = learner_role(config.learner, cluster, config.cluster.placement.learner)
    return Need(role, [policy], writes=True)


def _judges(judges: Mapping[str, Judge], launcher: JudgeLauncher) -> Iterator[Need]:
    for top, judge in judges.items():
        for role, (key, single) in zip(launcher.roles(judge, top), single_judges(judge, top), strict=True):
            if not isinstance(single, EngineJudge):
                yield Need(role)
                continue
            assert single.path is not None
            folder = local_folder(single.path, f"{key}.path").resolve()
            packages = {} if single.backend == "transformers" else VLLM
            yield Need(role, [Folder(f"{key}.path", single.path, folder)], packages=packages)


def _output(config: RunConfig | OfflineTraining, run_dir: Path) -> Folder:
    return Folder("output_dir", config.output_dir, run_dir)
