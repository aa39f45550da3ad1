"""The manifests for Kubernetes: valid by its schemas, and true to the image, the command line and the exit codes."""

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_kubernetes import (
    FILES,
    FOLDER,
    IN_IMAGE,
    JOBS,
    Document,
    action,
    container_of,
    expanded,
    here,
    manifests,
    option,
    pod_of,
    read,
    validate,
)

from organseg.cli import _parser
from organseg.data.shards import Shard
from organseg.errors import (
    InputError,
    IntegrityError,
    Interrupted,
    NumericsError,
    OrgansegError,
    StorageError,
    UsageError,
    WorkerError,
)

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "fake_kubernetes.py"
HOPELESS = {UsageError, InputError, IntegrityError, NumericsError}
AGAIN = {OrgansegError, StorageError, WorkerError}
each_job = pytest.mark.parametrize("name", JOBS)


# Schemas


@pytest.mark.parametrize("name", [file.name for file in FILES])
def test_each_manifest_is_valid(name: str) -> None:
    validate(read(name))


def misspell(document: Document, *path: str | int) -> Document:
    """A copy in which the last key of the path has one letter more."""
    changed = copy.deepcopy(document)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[f"{path[-1]}s"] = inner.pop(path[-1])
    return changed


POD = ("spec", "template", "spec")
NODE = (*POD, "replicatedJobs", 0, "template", "spec")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("claim.yaml", ("spec", "accessModes")),
        *[(name, ("spec", "podFailurePolicy")) for name in JOBS if name != "train_job.yaml"],
        *[(name, (*POD, "containers", 0, "volumeMounts")) for name in JOBS if name != "train_job.yaml"],
        ("fit.yaml", (*POD, "containers", 0, "env", 1, "valueFrom", "secretKeyRef", "optional")),
        ("train_job.yaml", ("spec", "trainer", "numNodes")),
        ("train_job.yaml", ("spec", "trainer", "resourcesPerNode", "limits")),
        ("training_runtime.yaml", (*POD, "failurePolicy", "rules", 0, "onJobFailureReasons")),
        ("training_runtime.yaml", (*NODE, "podFailurePolicy", "rules", 0, "onExitCodes")),
        ("training_runtime.yaml", (*NODE, *POD[1:], "containers", 0, "securityContext", "readOnlyRootFilesystem")),
    ],
)
def test_a_misspelled_field_is_found(name: str, path: tuple[str | int, ...]) -> None:
    with pytest.raises(ValueError):
        validate(misspell(read(name), *path))


@pytest.mark.parametrize(("name", "key"), [("fit.yaml", "backoffLimit"), ("train_job.yaml", "runtimeRef")])
def test_a_value_of_another_type_is_found(name: str, key: str) -> None:
    document = read(name)
    document["spec"][key] = "three"
    with pytest.raises(ValueError):
        validate(document)


@each_job
def test_what_the_server_also_checks(name: str) -> None:
    spec, pod = JOBS[name]["spec"], pod_of(name)
    assert pod["restartPolicy"] == "Never" and spec["podReplacementPolicy"] == "Failed"
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("Ignore", "FailJob", "FailIndex")
        codes = rule.get("onExitCodes")
        assert rule["action"] != "FailIndex" or "backoffLimitPerIndex" in spec
        if codes:
            assert codes["containerName"] == container_of(name)["name"] and codes["operator"] == "In"
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
    assert {mount["name"] for mount in container_of(name)["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    if "backoffLimitPerIndex" in spec:
        assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]


# The image and the command line


@pytest.fixture(scope="session")
def configs() -> dict[str, Any]:
    """File -> the config that its `fit` or `test` would have, from the real parser."""
    called = {name: here(expanded(container_of(name)["args"], name)) for name in JOBS}
    trained = option(called["fit.yaml"], "--config")  # of the run that test.yaml tests
    called["test.yaml"][called["test.yaml"].index("--config") + 1] = trained
    called = {name: [*args, "--print_config"] for name, args in called.items() if args[0] in ("fit", "test")}
    script = """
import contextlib, io, json, sys
from organseg.cli.training import run_lightning
printed = {}
for name, args in json.loads(sys.argv[1]).items():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run_lightning(args)
    printed[name] = text.getvalue()
print(json.dumps(printed))
"""
    words = [sys.executable, "-c", script, json.dumps(called)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: yaml.safe_load(text) for name, text in json.loads(done.stdout).items()}


def test_configs_are_where_the_image_has_them() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "\nCOPY configs " in dockerfile and f" {Path(IN_IMAGE).parent}/" in dockerfile
    named = [word for name in JOBS for word in container_of(name)["args"] if word.startswith("/")]
    assert len(named) == 3
    assert all(Path(word).is_file() for word in here(named))


@each_job
def test_args_are_accepted(name: str, configs: dict[str, Any]) -> None:
    args = container_of(name)["args"]
    for index in range(JOBS[name]["spec"].get("completions", 1)):
        words = expanded(args, name, index)
        assert not any("$" in word for word in words), words
        if args[0] == "fit":
            assert configs[name]["out"] == option(expanded(args, name), "--out")
            continue
        shard = option(words, "--shard") if name in configs else _parser().parse_args(words).shard
        assert Shard.parse(shard) == Shard(index, JOBS[name]["spec"]["completions"])


def test_each_fold_is_trained_once_in_a_folder_of_its_own(configs: dict[str, Any]) -> None:
    args, spec = container_of("crossval.yaml")["args"], JOBS["crossval.yaml"]["spec"]
    words = [expanded(args, "crossval.yaml", index) for index in range(spec["completions"])]
    assert [option(word, "--data.init_args.fold") for word in words] == [str(n) for n in range(5)]
    assert len({option(word, "--out") for word in words}) == configs["crossval.yaml"]["data"]["init_args"]["folds"] == 5


def test_what_one_job_writes_the_next_one_reads(configs: dict[str, Any]) -> None:
    cache = option(container_of("prepare.yaml")["args"], "--out")
    for config in configs.values():
        assert config["data"]["init_args"]["cache"] == cache
    run = option(container_of("fit.yaml")["args"], "--out")
    for name in ("predict.yaml", "test.yaml"):
        assert option(container_of(name)["args"], "--ckpt_path") == f"{run}/checkpoints/last.ckpt"
    assert option(container_of("test.yaml")["args"], "--config") == f"{run}/config.yaml"


def test_ranks_of_all_nodes_share_the_batch(configs: dict[str, Any]) -> None:
    trainer, config = read("train_job.yaml")["spec"]["trainer"], configs["train_job.yaml"]
    ranks = trainer["numNodes"] * trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert (config["trainer"]["num_nodes"], config["trainer"]["devices"]) == (trainer["numNodes"], "auto")
    assert config["trainer"]["strategy"] == "ddp" and config["data"]["init_args"]["batch_size"] % ranks == 0


def test_the_launch_command_is_the_entry_point_with_variables_between() -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    *init, program = json.loads(entry)
    command = expanded(container_of("train_job.yaml")["command"], "train_job.yaml", node=1)
    between = ["env", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29400", "NODE_RANK=1"]
    assert command == [*init, *between, program]
    assert all("command" not in container_of(name) for name in JOBS if name != "train_job.yaml")


@each_job
def test_the_root_is_read_only_and_all_that_is_written_to_is_mounted(name: str) -> None:
    text = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    environment = text[text.index("\nENV") :].partition("\nWORKDIR")[0]
    folders = {*re.findall(r"=(/\S+)", environment), *re.findall(r"^WORKDIR (\S+)", text, flags=re.MULTILINE)}
    folders = {folder for folder in folders if not folder.startswith("/opt/organseg/bin")}  # PATH
    assert {"/work", "/scratch"} <= folders
    container = container_of(name)
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert "/dev/shm" in mounts
    for folder in folders:
        assert any(Path(folder).is_relative_to(mount) for mount in mounts), folder


@each_job
def test_pods_differ_only_in_what_they_do(name: str) -> None:
    pod, first = pod_of(name), pod_of("fit.yaml")
    for key in ("automountServiceAccountToken", "enableServiceLinks", "securityContext", "volumes"):
        assert pod[key] == first[key], key
    for key in ("image", "securityContext", "volumeMounts"):
        assert container_of(name)[key] == container_of("fit.yaml")[key], key
    gpu = "nvidia.com/gpu" in container_of(name)["resources"]["limits"]
    assert gpu == (name != "prepare.yaml") == ("tolerations" in pod)
    assert (container_of(name)["args"][0] == "fit") == (pod.get("terminationGracePeriodSeconds") == 300)
    assert first["volumes"][0]["persistentVolumeClaim"]["claimName"] == read("claim.yaml")["metadata"]["name"]


def test_all_that_starts_pods_waits_in_one_queue_and_is_not_suspended_by_hand() -> None:
    starts = [document for _, document in manifests() if document["kind"] in ("Job", "TrainJob")]
    assert len(starts) == 6
    assert {document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for document in starts} == {"user-queue"}
    assert all("suspend" not in document["spec"] for document in starts)


def test_no_manifest_has_a_secret() -> None:
    assert all(document["kind"] != "Secret" for _, document in manifests())
    for name in JOBS:
        for variable in container_of(name).get("env", []):
            assert "value" not in variable, variable  # none has a literal value at all
            reference = variable["valueFrom"].get("secretKeyRef")
            assert not reference or reference["optional"] is True


# Exit codes


@each_job
def test_the_policy_knows_the_exit_codes(name: str) -> None:
    codes = [error.exit_code for error in (*HOPELESS, *AGAIN, Interrupted)]
    classes = [error for error in OrgansegError.__subclasses__() if error.__module__ == OrgansegError.__module__]
    assert len(set(codes)) == len(codes) == 1 + len(classes)
    assert action(name, Interrupted.exit_code) == action(name, 128 + signal.SIGTERM) == "Ignore"
    indexed = "backoffLimitPerIndex" in JOBS[name]["spec"]
    for error in HOPELESS:
        assert action(name, error.exit_code) == ("FailIndex" if indexed and error is not UsageError else "FailJob")
    for code in (*[error.exit_code for error in AGAIN], 128 + signal.SIGKILL):
        assert action(name, code) == "Count"


@each_job
def test_a_disruption_costs_no_try(name: str) -> None:
    *others, last = JOBS[name]["spec"]["podFailurePolicy"]["rules"]
    assert all("onExitCodes" in rule for rule in others)  # they come first: they know more
    assert last["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert last["action"] == ("FailJob" if name == "train_job.yaml" else "Ignore")


@pytest.mark.parametrize(
    ("reason", "message", "wanted"),
    [
        ("PodFailurePolicy", "Pod a/b has condition DisruptionTarget matching FailJob rule at index 2", "disrupted"),
        ("PodFailurePolicy", "Container node for pod a/b failed with exit code 4 matching FailJob rule at index 1",
         "hopeless"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", None),
    ],
)  # fmt: skip
def test_a_job_set_starts_all_ranks_again_unless_it_is_hopeless(reason: str, message: str, wanted: str | None) -> None:
    """Messages as the Job controller writes them; without a rule that fits, a restart that counts."""
    policy = read("training_runtime.yaml")["spec"]["template"]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    actions = {"disrupted": "RestartJobSetAndIgnoreMaxRestarts", "hopeless": "FailJobSet"}
    assert {rule["name"]: rule["action"] for rule in policy["rules"]} == actions
    fits = [rule["name"] for rule in policy["rules"] if fits_rule(rule, reason, message)]
    assert fits[:1] == ([wanted] if wanted else [])


def fits_rule(rule: Mapping[str, Any], reason: str, message: str) -> bool:
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    return reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns)


def test_a_train_job_uses_the_runtime_that_is_here() -> None:
    runtime, job = read("training_runtime.yaml"), read("train_job.yaml")
    group = runtime["apiVersion"].split("/")[0]
    assert job["apiVersion"] == runtime["apiVersion"]
    reference = {"apiGroup": group, "kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert job["spec"]["runtimeRef"] == reference


# Commands that are shown


def shown() -> list[str]:
    """Each line of a comment or of the README that calls kubectl."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    texts = [*blocks, *[file.read_text() for file in FILES]]
    return sorted({line for text in texts for line in re.findall(r"^(?:# +)?(kubectl .*)$", text, flags=re.MULTILINE)})


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a line of shell in the repository, with the stand-in on PATH."""
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    (tmp_path / "kubectl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def line(text: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-c", text]
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)

    return line


def test_all_commands_that_are_shown_work(run: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    lines = shown()
    applied = {word for line in lines for word in shlex.split(line, comments=True) if word.endswith(".yaml")}
    assert applied == {str(file.relative_to(ROOT)) for file in FILES}
    done = run(" && ".join(line.partition(" #")[0] for line in lines))
    assert done.returncode == 0, done.stderr
    assert "trainjob/organseg-ddp configured" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "kubectl apply tools/cluster/kubernetes/fit.yaml",
        "kubectl replace -f tools/cluster/kubernetes/fit.yaml",
        "kubectl create secret generic organseg-wandb --from-literal=WANDB_API_KEY=0123",
        "kubectl logs -f job/organseg-fitt",
    ],
)
def test_the_stand_in_refuses_what_kubectl_or_caution_would(
    line: str, run: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    assert run(line).returncode == 2


def test_the_stand_in_refuses_a_broken_manifest(
    tmp_path: Path, run: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "fit.yaml").write_text((FOLDER / "fit.yaml").read_text().replace("backoffLimit:", "backofLimit:"))
    done = run(f"kubectl apply -f {tmp_path / 'fit.yaml'}")
    assert done.returncode == 1 and "backofLimit" in done.stderr
