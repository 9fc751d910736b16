"""Finding one's way in documents: clusters, groups, pods, quantities."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s.render import Document

UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", 1)}


def quantity(text: str | int) -> float:
    """`1500m`, `16Gi`, 4 as a number."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match and match[2] in UNITS, f"not a quantity: {text!r}"
    return float(match[1]) * UNITS[match[2]]


@dataclass(frozen=True)
class Pod:
    """A pod template. group: `head`, a worker group, or empty for what isn't Ray; count: how many of it."""

    where: str
    group: str
    template: dict[str, Any]
    params: dict[str, Any]
    count: int = 1
    owner: dict[str, Any] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def env(self) -> dict[str, str | None]:
        return {entry["name"]: entry.get("value") for entry in self.spec["containers"][0].get("env", [])}

    def asks(self, resource: str) -> float:
        """Of all its containers."""
        return sum(quantity(c["resources"]["requests"].get(resource, 0)) for c in self.spec["containers"])


def job_of(document: Document) -> dict[str, Any] | None:
    """The specification of a RayJob, in whatever it lies."""
    if document["kind"] == "RayCronJob":
        return document["spec"]["jobTemplate"]
    return document["spec"] if document["kind"] == "RayJob" else None


def cluster_of(document: Document) -> dict[str, Any] | None:
    """The specification of a RayCluster, in whatever it lies."""
    if document["kind"] == "RayCluster":
        return document["spec"]
    job = job_of(document)
    return job["rayClusterSpec"] if job else None


def pods(document: Document) -> Iterator[Pod]:
    """Every pod that a document leads to."""
    name = f"{document['kind']}/{document['metadata']['name']}"
    cluster = cluster_of(document)
    if cluster is None:
        if "template" in document.get("spec", {}):
            yield Pod(name, "", document["spec"]["template"], {})
        return
    head = cluster["headGroupSpec"]
    yield Pod(f"{name}: head", "head", head["template"], head.get("rayStartParams", {}))
    for group in cluster["workerGroupSpecs"]:
        most = max(group.get("replicas", 0), group.get("maxReplicas", 0))
        label = group["groupName"]
        yield Pod(f"{name}: {label}", label, group["template"], group.get("rayStartParams", {}), most, group)
