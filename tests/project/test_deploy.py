"""What is said to clouds is checked before a cloud is paid: offline, without credentials, without starting Ray."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.config import parse_config
from core.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLUSTERS = ("cluster.yaml", "deploy/gcp.yaml")
FILES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "cluster.yaml", *(ROOT / "deploy").rglob("*")) if path.is_file()
)

Plain = dict[str, Any]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)$", text("constraints.txt"), re.MULTILINE)
    assert match is not None, f"constraints.txt does not pin {package}"
    return match[1]


def rayjob_documents() -> dict[str, Plain]:
    return {document["kind"]: document for document in yaml.safe_load_all(text("deploy/kuberay/rayjob.yaml"))}


# Clusters that `ray up` makes


def cluster_complaints(config: Plain) -> list[str]:
    """What Ray's own validation accepts and is wrong all the same."""
    complaints = []
    types, head = config["available_node_types"], config["head_node_type"]
    workers = {name: node for name, node in types.items() if name != head}
    for name, node in types.items():
        low, high = node["min_workers"], node["max_workers"]
        if not 0 <= low <= high:
            complaints.append(f"{name}: min_workers {low}, max_workers {high}")
    if sum(node["max_workers"] for node in workers.values()) != config["max_workers"]:
        complaints.append(f"max_workers {config['max_workers']} is not the sum of the workers'")
    if types[head]["max_workers"] or types[head]["resources"].get("CPU") != 0:
        complaints.append("the head takes work")
    if is_spot(types[head]["node_config"]):
        complaints.append("the head is on spot")
    complaints += [f"{name} is not on spot" for name, node in workers.items() if not is_spot(node["node_config"])]
    complaints += [f"{name} has no GPU" for name, node in workers.items() if not node["resources"].get("GPU")]
    if config["upscaling_speed"] <= 0 or config["idle_timeout_minutes"] <= 0:
        complaints.append("upscaling_speed and idle_timeout_minutes must be positive")
    return complaints


def is_spot(node: Plain) -> bool:
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    scheduling = node.get("scheduling", {})
    return market == "spot" or scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_passes_rays_validation_and_ours(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text(name)))
    validate_config(config)
    assert cluster_complaints(config) == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("available_node_types", "gpu", "min_workers"), -1, "gpu: min_workers -1"),
        (("available_node_types", "gpu", "min_workers"), 17, "gpu: min_workers 17"),
        (("max_workers",), 8, "not the sum"),
        (("available_node_types", "head", "resources"), {"CPU": 4}, "the head takes work"),
        (("available_node_types", "gpu", "resources"), {"CPU": 4}, "no GPU"),
        (("available_node_types", "gpu", "node_config"), {}, "gpu is not on spot"),
        (("available_node_types", "head", "node_config"), {"scheduling": {"preemptible": True}}, "the head is on spot"),
        (("upscaling_speed",), 0, "positive"),
    ],
)
def test_cluster_complaints_planted_error_is_found(path: tuple[str, ...], value: object, complaint: str) -> None:
    config = yaml.safe_load(text("cluster.yaml"))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(complaint in line for line in cluster_complaints(config)), cluster_complaints(config)


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_mounts_what_pip_needs_and_nothing_big(name: str) -> None:
    config = yaml.safe_load(text(name))
    mounts = {local: remote for remote, local in config["file_mounts"].items()}
    assert mounts.pop("~/.ray/auth_token") == "/home/ray/.ray/auth_token"
    project = tomllib.loads(text("pyproject.toml"))
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {
        project["project"]["readme"],
        *project["project"]["license-files"],
        "pyproject.toml",
        "setup.py",
        "constraints.txt",
    }
    assert set(mounts) == packages | files  # Ray hashes every byte below a mount: never the checkout itself
    for local in mounts:
        assert (ROOT / local).exists()
    install = " ".join(config["setup_commands"])
    assert "pip install --no-cache-dir -c /tmp/dual-rs/constraints.txt /tmp/dual-rs" in install


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_asks_for_the_token_and_hides_the_dashboard(name: str) -> None:
    config = yaml.safe_load(text(name))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    (start,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--head" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start  # without it nothing scales


def test_clusters_differ_only_where_the_clouds_do() -> None:
    aws, gcp = (yaml.safe_load(text(name)) for name in CLUSTERS)
    for key in set(aws) - {"provider", "available_node_types", "head_setup_commands", "auth"}:
        assert aws[key] == gcp[key], key
    assert set(aws) == set(gcp)


def test_gcp_disks_and_network_are_in_the_clusters_zone() -> None:
    config = yaml.safe_load(text("deploy/gcp.yaml"))
    zone, region = config["provider"]["availability_zone"], config["provider"]["region"]
    assert zone.startswith(region)
    for node in config["available_node_types"].values():
        (disk,) = node["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"].split("/")[:2] == ["zones", zone]
        assert node["node_config"]["networkInterfaces"][0]["subnetwork"].split("/")[:2] == ["regions", region]


def test_aws_policies_are_least_privilege() -> None:
    bucket = json.loads(text("deploy/aws-bucket-policy.json"))
    actions = {action for statement in bucket["Statement"] for action in listed(statement["Action"])}
    objects = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert actions == {"s3:ListBucket", *objects}
    head = json.loads(text("deploy/aws-head-policy.json"))
    for statement in [*bucket["Statement"], *head["Statement"]]:
        assert statement["Effect"] == "Allow"
        reads = all(":Describe" in action for action in listed(statement["Action"]))
        assert reads or "*" not in listed(statement["Resource"]), statement["Sid"]
        assert not any(action.endswith("*") for action in listed(statement["Action"])), statement["Sid"]
    config = yaml.safe_load(text("cluster.yaml"))
    (launch,) = (statement for statement in head["Statement"] if statement["Sid"] == "LaunchWorkersOfTheseTypes")
    conditions = launch["Condition"]["StringEquals"]
    types = {node["node_config"]["InstanceType"] for node in config["available_node_types"].values()}
    head_type = config["available_node_types"]["head"]["node_config"]["InstanceType"]
    assert set(conditions["ec2:InstanceType"]) == types - {head_type}
    named = set(re.findall(r"\b[a-z]\d\w*\.\w*xlarge\b", text("cluster.yaml")))
    assert named == types | {"g6.xlarge"}  # of which the comment says
    assert "(g6.xlarge) is sound where capacity matters more than equal reruns: add its type" in text("cluster.yaml")
    assert conditions["aws:RequestTag/ray-cluster-name"] == config["cluster_name"]
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


# Kubernetes


def schema_errors(document: Plain) -> list[str]:
    jsonschema = importlib.import_module("jsonschema")  # comes with Ray, without types
    schema = json.loads(text("tests/data/rayjob.schema.json"))
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def test_rayjob_follows_the_schema() -> None:
    assert schema_errors(rayjob_documents()["RayJob"]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "submissionMode"), "JobMode"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), -1),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "rayStartParams"), {"num-cpus": 0}),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "tolerations"), [{"key": 1}]),
    ],
)
def test_rayjob_schema_planted_error_is_found(path: tuple[str | int, ...], value: object) -> None:
    place: Any = (document := rayjob_documents()["RayJob"])
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert schema_errors(document)


def test_rayjob_is_resumable_private_and_given_back() -> None:
    documents = rayjob_documents()
    spec = documents["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert 0 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"] == 16
    templates = {"submitter": spec["submitterPodTemplate"], "head": head["template"], "workers": workers["template"]}
    labels = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for name, template in templates.items():
        assert template["metadata"]["labels"] == labels, f"the network policy misses the {name}"
        (container,) = template["spec"]["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert template["spec"].get("serviceAccountName") in (None, documents["ServiceAccount"]["metadata"]["name"])
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1


def test_rayjob_head_is_on_demand_and_workers_on_spot() -> None:
    cluster = rayjob_documents()["RayJob"]["spec"]["rayClusterSpec"]

    def terms(group: Plain) -> list[list[Plain]]:
        affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
        required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        return [term["matchExpressions"] for term in required]

    (head,) = terms(cluster["headGroupSpec"])  # expressions of one term hold together, terms are alternatives
    workers = terms(cluster["workerGroupSpecs"][0])
    assert {expression["key"] for expression in head} == {key["key"] for (key,) in workers}
    assert all(expression["operator"] in ("NotIn", "DoesNotExist") for expression in head)
    assert all(expression["operator"] == "In" for (expression,) in workers)


# Versions, commands and secrets, in all files


def test_images_have_the_pinned_ray_and_python() -> None:
    images = {image for name in FILES for image in re.findall(r"rayproject/ray:(\S+)", text(name))}
    minor = re.search(r"python_version = \"3\.(\d+)\"", text("pyproject.toml"))
    assert minor is not None
    tag = f"{pinned('ray')}-py3{minor[1]}"
    assert images == {tag, f"{tag}-gpu"}
    assert rayjob_documents()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")
    assert f"ray.__version__ == '{pinned('ray')}'" in text("deploy/Dockerfile")


def commands(name: str) -> list[str]:
    """Lines of a file with their continuations, and the texts of a YAML file, each on one line."""
    lines = re.sub(r"\s*\\\n#?\s*", " ", text(name)).splitlines()
    if name.endswith(".yaml"):
        waiting = list(yaml.safe_load_all(text(name)))
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str):
                lines.append(" ".join(value.split()))
    return lines


_JOB = r"(?:python -m jobs\.|^dual-rs )(\w+)"


def test_commands_name_jobs_configurations_and_keys_that_exist() -> None:
    found = [(name, line) for name in FILES for line in commands(name) if re.search(_JOB, line)]
    assert {*CLUSTERS, "deploy/kuberay/rayjob.yaml", "deploy/slurm.sh"} <= {name for name, _ in found}
    for name, command in found:
        for module in re.findall(_JOB, command):
            assert (ROOT / "jobs" / f"{module}.py").is_file(), f"{name}: {command}"
        for config in re.findall(r"configs/[\w-]+\.yaml", command):
            assert (ROOT / config).is_file(), f"{name}: {command}"
        for override in re.findall(r"compute\.\w+=\w+", command):
            try:
                parse_config({"sigmas": [0.25], "report": {"radii": [0]}}, [override])
            except ConfigError as error:
                pytest.fail(f"{name}: {override}: {error}")


def test_ray_commands_have_only_flags_that_the_installed_ray_knows() -> None:
    import click
    from ray.scripts.scripts import cli

    seen = set()
    for name in FILES:
        lines = [line.partition("-- python")[0] for line in commands(name)]  # what follows is the job's, not Ray's
        for match in re.finditer(
            r"(?<![\w/-])ray ((?:job )?[a-z][a-z-]*)((?:(?! ray |[\n;|`'#&]).)*)", "\n".join(lines)
        ):
            command: click.Command | None = cli
            for word in match[1].split():
                command = command.commands.get(word) if isinstance(command, click.Group) else None
            if command is None:
                continue  # prose
            flags = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", match[2]))
            known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
            assert flags <= known, f"{name}: ray {match[1]}: {sorted(flags - known)}"
            seen.add(match[1])
    assert {"up", "down", "dashboard", "exec", "start", "job submit", "job logs", "job stop"} <= seen


@pytest.mark.parametrize("name", FILES)
def test_file_holds_no_secret_and_opens_no_dashboard(name: str) -> None:
    content = text(name)
    for secret in (r"AKIA[0-9A-Z]{16}", r"PRIVATE KEY", r"\b[0-9a-fA-F]{32,}\b", r"(?i)\bpassword\s*[:=]"):
        assert not re.search(secret, content), secret
    assert not re.search(r"dashboard-host[=\s:\"']*(0\.0\.0\.0|::)", content)


# The job's environment and the panels


def test_runtime_env_parses_and_lists_the_projects_dependencies() -> None:
    from ray.runtime_env import RuntimeEnv

    plain = yaml.safe_load(text("deploy/runtime_env.yaml"))
    environment = RuntimeEnv(**plain)
    assert environment.env_vars()["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    constraints, *packages = environment.pip_config()["packages"]
    assert constraints == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    project = tomllib.loads(text("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["report"]]
    names = {re.split(r"[\[<>=~ ]", requirement)[0] for requirement in wanted}
    assert set(packages) == names - {"ray"}, "pip's list in deploy/runtime_env.yaml and pyproject.toml differ"
    assert {"/.git", "/.venv", "/runs"} <= set(plain["excludes"])


def test_runtime_env_needs_no_download_where_the_constraints_are_installed(tmp_path: Path) -> None:
    def plain(package: str) -> str:
        return re.sub(r"[-_.]+", "-", package).lower()

    pins = {plain(name): pin for name, pin in re.findall(r"^([^#=\s]+)==(\S+)$", text("constraints.txt"), re.MULTILINE)}
    installed = {plain(found.name): found.version for found in importlib.metadata.distributions()}
    if others := pins.items() - installed.items():
        pytest.skip(f"not the environment of constraints.txt, which has {sorted(others)}")
    packages = yaml.safe_load(text("deploy/runtime_env.yaml"))["pip"]["packages"]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(packages))
    environment = {**os.environ, "RAY_RUNTIME_ENV_CREATE_WORKING_DIR": str(ROOT)}  # as Ray sets it on a node
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check", "-r"]
    result = subprocess.run([*pip, str(requirements)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "Would install" not in result.stdout
