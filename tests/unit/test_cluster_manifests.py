"""cluster/: manifests against the operator's fields, what they promise, and the scripts and Dockerfiles beside them."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from rlhf.config import load_config

CLUSTER = Path("cluster")
SCHEMA = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())
CHECKED = {"raycluster.yaml", "rayjob.yaml", "storage.yaml", "networkpolicy.yaml", "slurm.sh", "Dockerfile.cpu",
           "Dockerfile.gpu", "Dockerfile.cpu.dockerignore", "Dockerfile.gpu.dockerignore"}  # fmt: skip
"""Every file here is looked at by a test below: a new one has to be added together with its test."""
FLAVOURS = ("cpu", "gpu")
RAY = ("raycluster.yaml", "rayjob.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


def ray_spec(name: str) -> dict[str, Any]:
    document = next(document for document in documents(name) if document["apiVersion"] == "ray.io/v1")
    return document["spec"].get("rayClusterSpec", document["spec"])


def ray_pods(name: str) -> Iterator[dict[str, Any]]:
    spec = ray_spec(name)
    yield spec["headGroupSpec"]["template"]
    yield from (group["template"] for group in spec["workerGroupSpecs"])


def all_pods(name: str) -> list[dict[str, Any]]:
    job = [document["spec"]["submitterPodTemplate"] for document in documents(name) if document["kind"] == "RayJob"]
    return [*ray_pods(name), *job]


def errors(document: dict[str, Any]) -> list[str]:
    # Against the branch of its own kind: `oneOf` would only say that neither fits.
    (branch,) = [one for one in SCHEMA["oneOf"] if one["properties"]["kind"]["const"] == document["kind"]]
    validator = jsonschema.Draft202012Validator({**branch, "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def test_every_file_is_checked_here() -> None:
    assert {path.name for path in CLUSTER.iterdir()} == CHECKED


@pytest.mark.parametrize("name", RAY)
def test_ray_manifests_have_the_operators_fields(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = [document for document in documents(name) if document["apiVersion"] == "ray.io/v1"]
    assert len(found) == 1
    assert errors(found[0]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "ray.io/v1alpha1"),
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "livenessProb"), {}),
    ],
)
def test_the_schema_sees_mistakes(path: tuple[str | int, ...], value: Any) -> None:
    document = copy.deepcopy(of_kind("raycluster.yaml", "RayCluster"))
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert len(errors(document)) == 1


@pytest.mark.parametrize("name", RAY)
def test_token_authentication_is_on_and_no_secret_is_written(name: str) -> None:
    assert ray_spec(name)["authOptions"] == {"mode": "token", "secretName": "rlhf-ray-token"}
    for pod in all_pods(name):
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", ()):
                if re.search("KEY|TOKEN|SECRET", variable["name"]):
                    assert variable.keys() == {"name", "valueFrom"}
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "rlhf-secrets"


@pytest.mark.parametrize("name", RAY)
def test_pods_are_unprivileged_labelled_and_bounded(name: str) -> None:
    for pod in all_pods(name):
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rlhf"
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["restartPolicy"] == "Never"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"]
            assert resources["limits"].get("nvidia.com/gpu") == resources["requests"].get("nvidia.com/gpu")


@pytest.mark.parametrize("name", RAY)
def test_ray_nodes_have_health_shared_storage_and_one_image(name: str) -> None:
    images = set()
    for pod in ray_pods(name):
        (container,) = pod["spec"]["containers"]
        images.add(container["image"])
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert (mounts["shared"], mounts["shm"]) == ("/shared", "/dev/shm")
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert mounts.keys() == volumes.keys()
        claim = of_kind("storage.yaml", "PersistentVolumeClaim")["metadata"]["name"]
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert images == {"rlhf:gpu"}


@pytest.mark.parametrize("name", RAY)
def test_the_head_holds_no_actors_and_is_not_exposed(name: str) -> None:
    head = ray_spec(name)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", RAY)
def test_manifests_name_the_ray_that_is_pinned(name: str) -> None:
    assert f"ray=={ray_spec(name)['rayVersion']}" in Path("requirements/gpu.txt").read_text().splitlines()


def test_the_cluster_scales_pools_of_gpus_and_cpus() -> None:
    spec = ray_spec("raycluster.yaml")
    assert spec["enableInTreeAutoscaling"] is True
    gpus = {
        group["groupName"]: int(
            group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        )
        for group in spec["workerGroupSpecs"]
    }
    assert gpus == {"gpu": 8, "cpu": 0}
    assert all(group["minReplicas"] < group["maxReplicas"] for group in spec["workerGroupSpecs"])


def test_the_run_of_the_rayjob_is_a_valid_config_that_fits_its_cluster(tmp_path: Path) -> None:
    job, text = of_kind("rayjob.yaml", "RayJob")["spec"], of_kind("rayjob.yaml", "ConfigMap")["data"]["run.yaml"]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    config = load_config(file)
    assert (config.cluster.address, config.output_dir) == ("auto", "/shared/runs")
    assert job["entrypoint"] == "rlhf train /etc/rlhf/run.yaml"
    (pod, *_) = ray_pods("rayjob.yaml")
    (container,) = pod["spec"]["containers"]
    assert {"name": "run", "mountPath": "/etc/rlhf", "readOnly": True} in container["volumeMounts"]
    # What the config says that nodes have, the pods have.
    assert set(config.cluster.env) <= {variable["name"] for variable in container["env"]}
    assert set(config.cluster.shared) <= {mount["mountPath"] for mount in container["volumeMounts"]}
    judge: Any = config.judge
    gpus = config.generator.replicas.max * config.generator.tensor_parallel
    gpus += judge.replicas * judge.tensor_parallel + config.learner.world_size
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    has = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == has * group["maxReplicas"]
    # A stopped run has the time that its save may take.
    stop = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(stop) == config.cluster.deadlines.checkpoint


def test_the_network_policy_lets_in_nodes_and_the_operator_only() -> None:
    policy = of_kind("networkpolicy.yaml", "NetworkPolicy")
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    spec = policy["spec"]
    ours = {"matchLabels": {"app.kubernetes.io/part-of": "rlhf"}}
    assert spec["podSelector"] == ours
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    nodes, operator = spec["ingress"]
    assert nodes == {"from": [{"podSelector": ours}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    outside = [rule for rule in spec["egress"] if "ipBlock" in rule["to"][0]]
    assert [rule["to"][0]["ipBlock"]["except"] for rule in outside] == [["169.254.0.0/16"]]
    assert all(rule.keys() == {"to", "ports"} for rule in outside)


def test_the_storage_claim_can_be_mounted_by_many_nodes() -> None:
    claim = of_kind("storage.yaml", "PersistentVolumeClaim")
    assert claim["apiVersion"] == "v1"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"].keys() <= {"accessModes", "resources", "storageClassName"}


def test_the_slurm_script_passes_shellcheck() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(checker), str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_turns_tokens_on_and_writes_none_on_a_command_line() -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    assert "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token" in text
    assert "umask 077" in text
    uses = [line for line in text.splitlines() if "RAY_AUTH_TOKEN" in line]
    assert len(uses) == 2, uses  # set and exported, and nothing else
    assert "ray stop" not in text  # it would end the Ray of others on the node


def instructions(flavour: str) -> list[tuple[str, str]]:
    text = (CLUSTER / f"Dockerfile.{flavour}").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for line in joined.splitlines() if line for name, _, rest in [line.partition(" ")]]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_dockerfiles_install_the_pinned_packages_and_end_without_privileges(flavour: str) -> None:
    found = instructions(flavour)
    names = [name for name, _ in found]
    assert set(names) <= {"FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "CMD"}
    (image,) = [rest for name, rest in found if name == "FROM"]
    assert re.fullmatch(r"[a-z/]+:[\w.-]+", image)
    assert not image.endswith(":latest")
    assert [rest for name, rest in found if name == "USER"] == ["1000:1000"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    runs = " ".join(rest for name, rest in found if name == "RUN")
    assert f"-r requirements/{flavour}.txt" in runs
    assert "sudo" not in runs
    for command in re.findall(r"pip install[^&]*", runs):
        assert "--no-cache-dir" in command
    for command in re.findall(r"apt-get install[^&]*", runs):
        assert {"--yes", "--no-install-recommends"} <= set(command.split())
    assert runs.count("apt-get update") == runs.count("rm -rf /var/lib/apt/lists/*") == 1
    assert "RAY_AUTH_MODE=token" in dict(found)["ENV"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_a_dockerfile_copies_exists_and_is_in_its_context(flavour: str) -> None:
    lines = (CLUSTER / f"Dockerfile.{flavour}.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert all(Path(name).exists() for name in kept)
    # What the build of the project needs.
    assert {"rlhf", "actors", "requirements", "pyproject.toml", "README.md"} <= kept
    for name, rest in instructions(flavour):
        if name == "COPY" and rest != ". .":
            assert Path(rest.split()[0]).is_file()
            assert rest.split()[0].split("/")[0] in kept


def test_the_images_packages_are_pinned_requirements() -> None:
    for flavour in FLAVOURS:
        lines = Path(f"requirements/{flavour}.txt").read_text().splitlines()
        names = {Requirement(line).name.lower() for line in lines if line and not line.startswith("#")}
        assert {"ray", "torch", "setuptools"} <= names  # setuptools: --no-build-isolation
