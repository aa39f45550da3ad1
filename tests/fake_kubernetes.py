"""Kubernetes for tests: what its parts make of the repository's manifests.

Called as a program it is `kubectl`, with the subcommands that users are shown and no others: manifests are held against
their schemas, and it exits with 1 for one that a server refuses, with 2 for words it does not know.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = "1.37"
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tools" / "cluster" / "kubernetes"
IN_IMAGE = "/opt/organseg/share/configs"
FILES = sorted(FOLDER.glob("*.yaml"))

Document = dict[str, Any]


def read(name: str) -> Document:
    """One of the repository's manifests."""
    document: Document = yaml.safe_load((FOLDER / name).read_text())
    return document


def validate(document: Document) -> None:
    """Hold a manifest against its schema, in which an unknown field is an error.

    Raises:
        ValueError: If it breaks it.
    """
    if document["apiVersion"].startswith("trainer.kubeflow.org/"):
        from kubeflow_trainer_api import models  # a second or more

        model = getattr(models, f"TrainerV1alpha1{document['kind']}")
        if model.from_dict(document).to_dict() != document:  # what the model does not know is left out
            raise ValueError(f"fields that a {document['kind']} does not have")
        for job in replicated_jobs(document):
            validate(job)
        return
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{'.'.join(map(str, error.path))}: {error.message}") from error


def replicated_jobs(document: Document) -> list[Document]:
    """The Jobs that a TrainingRuntime makes; of other manifests, none."""
    parts = document["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", [])
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, "spec": part["template"]["spec"]} for part in parts
    ]


def manifests() -> Iterator[tuple[str, Document]]:
    for file in FILES:
        yield file.name, read(file.name)


def jobs() -> dict[str, Document]:
    """File -> the Job in it, whoever makes it, with what a TrainJob adds to its runtime."""
    found = {name: document for name, document in manifests() if document["kind"] == "Job"}
    (runtime,), trainer = replicated_jobs(read("training_runtime.yaml")), read("train_job.yaml")["spec"]["trainer"]
    container = runtime["spec"]["template"]["spec"]["containers"][0]
    container |= {"args": trainer["args"], "image": trainer["image"], "resources": trainer["resourcesPerNode"]}
    return {**found, "train_job.yaml": runtime}


JOBS = jobs()


def pod_of(name: str) -> Document:
    pod: Document = JOBS[name]["spec"]["template"]["spec"]
    return pod


def container_of(name: str) -> Document:
    (container,) = pod_of(name)["containers"]
    return dict(container)


def expanded(words: list[str], name: str, node: int = 0) -> list[str]:
    """What the kubelet makes of `$(VARIABLE)` in a command or in args: the container's variables, others stay."""
    container, spec = container_of(name), JOBS[name]["spec"]
    cores = str(container["resources"]["requests"]["cpu"])
    known = {v["name"]: cores for v in container.get("env", []) if "resourceFieldRef" in v["valueFrom"]}
    if spec.get("completionMode") == "Indexed":
        known["JOB_COMPLETION_INDEX"] = str(node)
    if name == "train_job.yaml":  # plugins/torch of Kubeflow Trainer
        nodes = str(read(name)["spec"]["trainer"]["numNodes"])
        known |= {"PET_NNODES": nodes, "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": str(node)}
        known |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29400"}
    return [re.sub(r"\$\((\w+)\)", lambda found: known.get(found[1], found[0]), word) for word in words]


def here(words: list[str]) -> list[str]:
    """The image's configs are the repository's."""
    return [word.replace(IN_IMAGE, str(ROOT / "configs")) for word in words]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def action(name: str, code: int) -> str:
    """What the Job does with a pod that ends with this code."""
    for rule in JOBS[name]["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            return str(rule["action"])
    return "Count"


def secrets() -> set[str]:
    """Names of the secrets that the repository's manifests refer to."""
    return {name for file in FILES for name in re.findall(r"secretKeyRef: \{name: ([\w-]+)", file.read_text())}


def parse(words: list[str]) -> argparse.Namespace:
    """The words of a command; ends the process with 2 if `kubectl`, or caution, forbids them."""
    parser = argparse.ArgumentParser(prog="kubectl", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("apply").add_argument("-f", dest="files", action="append", required=True)
    replace = commands.add_parser("replace")
    replace.add_argument("--force", action="store_true", required=True)  # a Job's template cannot be changed
    replace.add_argument("-f", dest="files", action="append", required=True)
    create = commands.add_parser("create").add_subparsers(required=True).add_parser("secret")
    generic = create.add_subparsers(required=True).add_parser("generic")
    generic.add_argument("name", choices=sorted(secrets()))
    generic.add_argument("--from-env-file", required=True)  # not the value itself, which would stay in the history
    logs = commands.add_parser("logs")
    logs.add_argument("-f", dest="follow", action="store_true")
    names = [document["metadata"]["name"] for _, document in manifests() if document["kind"] == "Job"]
    logs.add_argument("object", choices=[f"job/{name}" for name in names])
    commands.add_parser("get").add_argument("kinds", choices=["jobs,pods", "jobs,trainjobs,pods"])
    return parser.parse_args(words)


def main() -> int:
    """Run one command; returns the exit code."""
    for file in getattr(parse(sys.argv[1:]), "files", []):
        for document in yaml.safe_load_all(Path(file).read_text()):
            try:
                validate(document)
            except ValueError as error:
                print(f"error: {file}: {error}", file=sys.stderr)
                return 1
            print(f"{document['kind'].lower()}/{document['metadata']['name']} configured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
