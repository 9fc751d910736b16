"""Every overlay and its jobs, as kubectl would send them: valid, taken by the operators, safe."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s import agreement, operators, schema, security
from tests.k8s.parts import cluster_of, job_of, pods
from tests.k8s.render import (
    K8S,
    Document,
    build,
    installs,
    kubectl,
    kustomize,
    name_of,
    read,
    workloads,
)
from tests.k8s.vendor import KUBERNETES
from tune.config import SearchConfig
from unimrg.compose import compose
from unimrg.config import LabelConfig, RunConfig

COMMANDS = {
    "unimrg.train": ("train", RunConfig),
    "unimrg.label": ("label", LabelConfig),
    "tune.search": ("search", SearchConfig),
}
GATES = frozenset({"RayCronJob"})  # k8s/operator/kuberay.yaml switches it on
EXTRA = ("rdma", "mtls")
"""Components that no overlay has: they are tried on top of one."""


def problems(
    install: list[Document], workload: list[Document], gates: frozenset[str] = GATES
) -> Iterator[str]:
    """All that can be said against an overlay and one of its jobs; of what isn't valid, only that."""
    every = [*install, *workload]
    invalid = [problem for d in every for version in KUBERNETES for problem in schema.problems(d, version)]
    if invalid:
        yield from invalid
        return
    for document in every:
        yield from operators.problems(document, gates)
    yield from security.of_install(install)
    for documents in (install, workload):
        yield from security.of_pods(documents)
        yield from security.of_documents(documents)
    yield from agreement.of_workload(workload)
    yield from agreement.of_both(install, workload)


@pytest.mark.parametrize("folder", workloads(), ids=name_of)
def test_an_overlay_and_its_job_hold(folder: Path) -> None:
    assert list(problems(build(folder.parent), build(folder))) == []


def test_the_overlays_are_those_that_are_documented() -> None:
    assert [path.name for path in installs()] == ["eks", "gke", "gpu-multinode", "gpu-single", "kind-cpu"]
    for install in installs():
        assert {"train", "label", "search", "interactive"} <= {path.name for path in workloads(install)}


@pytest.mark.parametrize("folder", workloads(), ids=name_of)
def test_a_workload_is_one_object(folder: Path) -> None:
    """What is created anew for every run must not hold what is there already."""
    kinds = [document["kind"] for document in build(folder)]
    expected = {"interactive": "RayCluster", "nightly": "RayCronJob"}.get(folder.name, "RayJob")
    assert kinds == [expected]


@pytest.mark.parametrize("folder", [f for f in workloads() if f.name != "interactive"], ids=name_of)
def test_an_entrypoint_is_a_command_line_that_composes(folder: Path) -> None:
    """Misspelt keys and values stop here and not on a cluster of paid GPUs."""
    job = job_of(build(folder)[0])
    assert job is not None
    python, minus_m, command, *words = shlex.split(job["entrypoint"])
    assert (python, minus_m) == ("python", "-m")
    name, kind = COMMANDS[command]
    compose(name, words, kind)


@pytest.mark.parametrize("install", installs(), ids=name_of)
def test_training_finds_the_labels_that_labelling_wrote(install: Path) -> None:
    """The same storage, data and teachers: or the store of the one isn't that of the other."""
    configs = {}
    for name, command in (("train", "train"), ("label", "label")):
        job = job_of(build(install / name)[0])
        assert job is not None
        words = shlex.split(job["entrypoint"])[3:]
        config = compose(command, words, COMMANDS[f"unimrg.{command}"][1])
        teachers = config.teachers
        configs[name] = (
            config.storage_path,
            config.data,
            [(t.name, t.checkpoint, t.dtype) for t in (teachers.depth, teachers.segmentation)],
        )
    assert configs["train"] == configs["label"]


@pytest.mark.parametrize("component", EXTRA)
def test_components_that_no_overlay_has(component: str, tmp_path: Path) -> None:
    relative = Path(os.path.relpath(K8S, tmp_path.resolve()))  # kustomize refuses absolute paths
    kustomization = {
        "resources": [str(relative / "job")],
        "components": [
            str(relative / "overlays/gpu-multinode/machines"),
            str(relative / "components" / component),
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    documents = build(tmp_path)
    entrypoint = build(K8S / "overlays/gpu-multinode/train")[0]["spec"]["entrypoint"]
    documents[0]["spec"]["entrypoint"] = entrypoint
    gates = GATES | ({"RayClusterMTLS"} if component == "mtls" else set())
    assert list(problems(build(K8S / "overlays/gpu-multinode"), documents, gates)) == []
    if component == "mtls":
        assert any("RayClusterMTLS" in problem for problem in operators.problems(documents[0]))


def test_every_component_is_tried() -> None:
    used = set(EXTRA)
    for path in (K8S / "overlays").rglob("kustomization.yaml"):
        used |= set(re.findall(r"components/([-\w]+)", path.read_text("utf-8")))
    assert used == {path.name for path in (K8S / "components").iterdir()} - {"monitoring"}


def test_what_must_be_replaced_says_example() -> None:
    """Names of buckets, registries and projects that can't be ours: the README says which to change."""
    readme = (K8S / "README.md").read_text("utf-8")
    for install in installs():
        for folder in (install, *workloads(install)):
            for word in re.findall(r"[\w./:@-]*example[\w.-]*", kustomize(folder)):
                name = re.search(r"[\w.-]*example[\w-]*(\.com)?", word)
                assert name and name[0] in readme, f"{name_of(folder)}: {word}"


@pytest.mark.parametrize("install", [i for i in installs() if i.name != "kind-cpu"], ids=name_of)
def test_jobs_of_an_overlay_have_one_image(install: Path) -> None:
    images = set()
    for folder in (install, *workloads(install)):
        images |= {c["image"] for d in build(folder) for pod in pods(d) for c in pod.containers}
    assert len(images - {"registry.k8s.io/pause:3.10"}) == 1


def test_patches_by_number_name_their_group() -> None:
    """A patch of `workerGroupSpecs/0` is only safe behind a test of the group's name in the same patch."""
    for path in K8S.rglob("kustomization.yaml"):
        for patch in yaml.safe_load(path.read_text("utf-8")).get("patches", []):
            operations = yaml.safe_load(patch["patch"])
            if not isinstance(operations, list):
                assert "workerGroupSpecs" not in patch["patch"], (
                    f"{path}: a merge replaces the list of groups"
                )
                continue
            tested = {
                o["path"].split("/")[4] for o in operations if o["op"] == "test" and "groupName" in o["path"]
            }
            for operation in operations:
                steps = operation["path"].split("/")
                if "workerGroupSpecs" in steps:
                    assert steps[4] in tested, f"{path}: {operation['path']} without a test of groupName"


def test_a_changed_order_of_groups_stops_the_build(tmp_path: Path) -> None:
    """The tests inside the patches do what they are there for."""
    copy = tmp_path / "k8s"
    subprocess.run(["cp", "-r", str(K8S), str(copy)], check=True)
    job = copy / "job" / "rayjob.yaml"
    job.write_text(job.read_text("utf-8").replace("groupName: trainer", "groupName: trainers"))
    done = subprocess.run(
        [kubectl(), "kustomize", str(copy / "overlays/eks/train")], capture_output=True, text=True
    )
    assert done.returncode != 0 and "groupName" in done.stderr


def test_the_interactive_cluster_is_that_of_the_jobs() -> None:
    for install in installs():
        alone = cluster_of(build(install / "interactive")[0])
        assert alone is not None and alone["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        role = next(d for d in build(install) if d["kind"] == "Role")
        assert any(rule.get("resourceNames") == ["ray-token"] for rule in role["rules"])


def test_yaml_is_read_strictly() -> None:
    with pytest.raises(ValueError, match="replicas is set twice"):
        read("spec:\n  replicas: 1\n  replicas: 2\n")
