"""What KubeRay 1.7 and Kueue 0.19 refuse, or take and then don't do, although their schemas allow it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.parts import cluster_of, job_of
from tests.k8s.render import Document

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
GATED = {"tlsOptions": "RayClusterMTLS", "networkPolicy": "RayClusterNetworkPolicy"}
QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
KUEUE_GROUPS = 17


def problems(document: Document, gates: frozenset[str] = frozenset()) -> Iterator[str]:
    """A sentence for each thing that an operator refuses. gates: alpha features that are switched on."""
    kind, meta = document["kind"], document["metadata"]
    if kind == "ClusterQueue":
        yield from _queue(document)
    if kind not in LONGEST:
        return
    where = f"{kind}/{meta['name']}"
    if len(meta["name"]) > LONGEST[kind]:
        yield f"{where}: the name has {len(meta['name'])} characters, {LONGEST[kind]} at most"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", meta["name"]):
        yield f"{where}: the name is no DNS-1035 label"
    if kind == "RayCronJob":
        yield from _cron(document, gates)
    found = [*_job(document), *_cluster(document, gates)]
    yield from (f"{where}: {problem}" for problem in found)


def _cron(document: Document, gates: frozenset[str]) -> Iterator[str]:
    if "RayCronJob" not in gates:
        yield "RayCronJob: needs the operator's gate RayCronJob"
    schedule = document["spec"]["schedule"]
    if "TZ" in schedule or len(schedule.split()) != 5:
        yield "RayCronJob: the schedule is no five fields, its zone stands in timeZone"


def _job(document: Document) -> Iterator[str]:
    job = job_of(document)
    if job is None:
        return
    shutdown, queued = job.get("shutdownAfterJobFinishes"), QUEUE in document["metadata"].get("labels", {})
    for field in ("suspend", "ttlSecondsAfterFinished"):
        if job.get(field) and not shutdown:
            yield f"{field} needs shutdownAfterJobFinishes"
    if (job.get("deletionStrategy") or {}).get("deletionRules") and shutdown:
        yield "deletionStrategy excludes shutdownAfterJobFinishes"
    if job.get("backoffLimit", 0) and job.get("submissionMode") == "InteractiveMode":
        yield "InteractiveMode has no backoffLimit"
    if job.get("submissionMode") == "SidecarMode":
        yield "SidecarMode: its container has no securityContext, which the namespace refuses"
    if job.get("submissionMode", "K8sJobMode") == "K8sJobMode" and "submitterPodTemplate" not in job:
        yield "K8sJobMode: the submitter has no securityContext without a submitterPodTemplate"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in job and job[field] <= 0:
            yield f"{field} must be positive"
    if queued:
        yield from _queued(document, job)


def _queued(document: Document, job: dict[str, Any]) -> Iterator[str]:
    if not job.get("shutdownAfterJobFinishes"):
        yield "Kueue wants shutdownAfterJobFinishes"
    if not job.get("suspend"):
        yield "Kueue wants suspend: true"
    if "clusterSelector" in job:
        yield "Kueue can't queue a job for a cluster that is there"
    cluster = job["rayClusterSpec"]
    if len(cluster["workerGroupSpecs"]) > KUEUE_GROUPS:
        yield f"Kueue takes at most {KUEUE_GROUPS} worker groups"
    elastic = document["metadata"].get("annotations", {}).get(ELASTIC)
    if cluster.get("enableInTreeAutoscaling") and elastic != "true":
        yield f"Kueue takes autoscaling only with the annotation {ELASTIC}"


def _cluster(document: Document, gates: frozenset[str]) -> Iterator[str]:
    cluster = cluster_of(document)
    assert cluster is not None
    for field, gate in GATED.items():
        if field in cluster and gate not in gates:
            yield f"{field} needs the operator's gate {gate}"
    auth = cluster.get("authOptions")
    if auth is not None and "mode" not in auth:
        yield "authOptions without a mode: authentication stays off"
    if (auth or {}).get("enableK8sTokenAuth") and document["kind"] != "RayCluster":
        yield "enableK8sTokenAuth is only for a RayCluster"
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len(set(names)) < len(names):
        yield "two worker groups have one name"
    scaling = cluster.get("enableInTreeAutoscaling", False)
    second = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    if scaling and not second:
        yield "autoscalerOptions.version: v2 must be written out"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield from _group(group, scaling, second)


def _group(group: dict[str, Any], scaling: bool, second: bool) -> Iterator[str]:
    name = group.get("groupName", "head")
    if "labels" in group["rayStartParams"]:
        yield f"{name}: rayStartParams.labels is refused; use the group's labels"
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
        group["rayStartParams"]
    ):
        yield f"{name}: resources stand in rayStartParams already"
    if scaling and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield f"{name}: the autoscaler wants restartPolicy Never"
    if group.get("idleTimeoutSeconds") and not (scaling and second):
        yield f"{name}: idleTimeoutSeconds needs the autoscaler v2"
    if name == "head":
        return
    least, now, most = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
    if not least <= now <= most:
        yield f"{name}: replicas {now} is not between {least} and {most}"


def _queue(document: Document) -> Iterator[str]:
    """Every flavor of a group lists the covered resources, all and in their order."""
    for group in document["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            names = [resource["name"] for resource in flavor["resources"]]
            if names != group["coveredResources"]:
                yield f"ClusterQueue: {flavor['name']} lists {names}, covered are {group['coveredResources']}"
