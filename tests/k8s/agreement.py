"""Settings that lie in different places and must agree, or that Ray needs to hold together."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.k8s.operators import QUEUE
from tests.k8s.parts import Pod, cluster_of, job_of, pods, quantity
from tests.k8s.render import ROOT, Document
from unimrg import __version__

GPU = "nvidia.com/gpu"
STAY = ("karpenter.sh/do-not-disrupt", "true"), ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false")
SPOT = ("spot", "cloud.google.com/gke-spot", "karpenter.sh/capacity-type")
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
STOP_WAIT, STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 60
PORTS = {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227, "dashboard": 8265}
RUN_METRICS = "9464"  # what the network policy and the PodMonitor know
POOL = re.compile(r"(\S+)\.node_labels=\['pool=(\w+)'\]")


@cache
def ray_version() -> str:
    """That of constraints.txt, from which the image is built."""
    match = re.search(r"^ray==(\S+)$", Path(ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert match
    return match[1]


def of_workload(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        cluster = cluster_of(document)
        if cluster is None:
            continue
        found = [*_job(document), *_cluster(cluster), *_entrypoint(document)]
        for pod in pods(document):
            found += [f"{pod.group}: {problem}" for problem in [*_pod(pod), *_memory(pod), *_places(pod)]]
        yield from (f"{document['kind']}/{document['metadata']['name']}: {problem}" for problem in found)


def _job(document: Document) -> Iterator[str]:
    job = job_of(document)
    if job is None:
        return
    if job.get("submissionMode") != "HTTPMode":
        yield "a job that is followed by its log dies with the log: submissionMode isn't HTTPMode"
    for field in (
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "backoffLimit",
        "activeDeadlineSeconds",
    ):
        if not job.get(field):
            yield f"{field} isn't set"
    queued = QUEUE in document["metadata"].get("labels", {})
    if queued and "preRunningDeadlineSeconds" in job:
        yield "waiting in the queue would count as failing to start"
    if not queued and "preRunningDeadlineSeconds" not in job:
        yield "a pod that never starts is waited for without end"
    if not queued and job.get("suspend"):
        yield "is suspended, and nobody lifts that"


def _cluster(cluster: dict[str, Any]) -> Iterator[str]:
    if cluster.get("rayVersion") != ray_version():
        yield f"rayVersion is {cluster.get('rayVersion')}, that of the image {ray_version()}"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "head: takes tasks"
    environment = {e["name"]: e.get("value") for e in _first(cluster["headGroupSpec"]["template"])["env"]}
    if int(environment.get(STOP_WAIT) or 3) < STOP_SECONDS:
        yield "head: a job that is stopped is killed before it has saved"
    declared = {p["name"]: p["containerPort"] for p in _first(cluster["headGroupSpec"]["template"])["ports"]}
    if missing := [name for name, port in PORTS.items() if declared.get(name) != port]:
        yield f"head: doesn't declare the port {missing[0]}"
    for group in cluster["workerGroupSpecs"]:
        sizes = {group.get(key) for key in ("replicas", "minReplicas", "maxReplicas")}
        if group["groupName"] != "decode" and len(sizes) > 1:
            yield f"{group['groupName']}: is not of a fixed size"
        if group.get("labels") != {"pool": group["groupName"]}:
            yield f"{group['groupName']}: its label isn't pool={group['groupName']}"


def _first(template: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = template["spec"]["containers"][0]
    return found


def _entrypoint(document: Document) -> Iterator[str]:
    """The words of the command that speak of the cluster."""
    job, cluster = job_of(document), cluster_of(document)
    if job is None or cluster is None:
        return
    words = shlex.split(job["entrypoint"])
    if words[:2] != ["python", "-m"]:
        yield f"the entrypoint is no command of ours: {job['entrypoint'][:40]}"
    groups = {pod.group: pod for pod in pods(document)}
    for word in words:
        if (match := POOL.fullmatch(word)) and match[2] not in groups:
            yield f"{match[1]} waits for nodes of the pool {match[2]}, which isn't there"
    values = dict(word.split("=", 1) for word in words[2:] if "=" in word)
    if words[2] != "unimrg.label" and values.get("cluster.node_labels") != "['pool=trainer']":
        yield "training may take the teachers' nodes: cluster.node_labels isn't ['pool=trainer']"
    if (values.get("metrics.port"), values.get("metrics.address")) != (RUN_METRICS, "0.0.0.0"):
        yield f"Prometheus can't read the run: metrics.port={RUN_METRICS} metrics.address=0.0.0.0 is missing"
    if words[2] == "unimrg.train" and "trainer" in groups:
        trainer = groups["trainer"]
        room = int(trainer.count * (trainer.asks(GPU) or 1))
        if int(values.get("cluster.workers", 0)) != room:
            yield f"cluster.workers is {values.get('cluster.workers')}, the trainers have room for {room}"
    uses_teachers = values.get("labels.mode") not in ("cached", "off")
    if uses_teachers != ("teacher" in groups):
        yield "teachers are paid for and not used" if not uses_teachers else "nobody labels"


def _pod(pod: Pod) -> Iterator[str]:
    grace, drain = pod.spec.get("terminationGracePeriodSeconds", 30), float(pod.env().get(DRAIN) or 30)
    if grace <= drain:
        yield f"is killed after {grace} s, while Ray drains it for {drain:g} s"
    image = _first(pod.template)["image"]
    if "@sha256:" not in image and f":{__version__}-ray{ray_version()}-" not in image:
        yield f"the image {image} isn't of unimrg {__version__} with Ray {ray_version()}"
    flavour = "cuda" if pod.asks(GPU) else None
    if flavour and not ("@sha256:" in image or image.endswith("-cuda")):
        yield f"has a GPU and the image {image}"


def _memory(pod: Pod) -> Iterator[str]:
    resources = _first(pod.template)["resources"]
    asked, limits = resources["requests"], resources["limits"]
    if asked["memory"] != limits.get("memory"):
        yield "memory: request and limit differ"
    if "cpu" in limits:
        yield "CPUs are limited: that only throttles"
    for name in set(asked) - {"cpu", "memory"} | set(limits) - {"cpu", "memory"}:
        if asked.get(name) != limits.get(name):
            yield f"{name}: request and limit differ"
    volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.spec["volumes"]}
    memory, shm = quantity(limits["memory"]), quantity(volumes.get("shm", {}).get("sizeLimit", 0))
    if volumes.get("shm", {}).get("medium") != "Memory":
        yield "/dev/shm isn't declared: the operator makes one as large as all memory"
    store = float(pod.params.get("object-store-memory", "inf"))
    if not store <= shm <= memory / 2:
        yield f"object store {store:g} <= /dev/shm {shm:g} <= half of the memory {memory:g} doesn't hold"
    disk = sum(quantity(v.get("sizeLimit", 0)) for v in volumes.values() if v.get("medium") != "Memory")
    if disk >= quantity(asked["ephemeral-storage"]):
        yield "its folders may grow beyond the disk it asks for"
    mounts = {mount["mountPath"]: mount["name"] for mount in _first(pod.template)["volumeMounts"]}
    for path in ("/tmp", "/home/unimrg", "/dev/shm"):
        if mounts.get(path) not in volumes:
            yield f"{path} is read-only"


def _places(pod: Pod) -> Iterator[str]:
    """Where it may be put, and whether it may be taken away."""
    annotations = pod.template["metadata"].get("annotations", {})
    lasting = pod.group in ("head", "trainer")
    if lasting and not all(annotations.get(key) == value for key, value in STAY):
        yield "may be moved by an upgrade of its node"
    text = str([pod.spec.get("nodeSelector"), pod.spec.get("tolerations")])
    if lasting and any(f"'{word}'" in text for word in SPOT):
        yield "is on spot nodes"
    if pod.spec.get("priorityClassName") != ("unimrg-train" if lasting else "unimrg-feed"):
        yield f"has the priority {pod.spec.get('priorityClassName')}"
    pool = pod.spec.get("nodeSelector", {}).get("unimrg-pool")
    if pool and pool != (pod.group if pod.group in ("trainer", "teacher") else "cpu"):
        yield f"is on the nodes of the pool {pool}"


def of_both(install: list[Document], workload: list[Document]) -> Iterator[str]:
    """Does what is installed have what a workload names, and room for it?"""
    have = {(d["kind"], d["metadata"]["name"]) for d in install}
    hard = next(d for d in install if d["kind"] == "ResourceQuota")["spec"]["hard"]
    for document in workload:
        cluster = cluster_of(document)
        if cluster is None:
            continue
        where = f"{document['kind']}/{document['metadata']['name']}"
        queue = document["metadata"].get("labels", {}).get(QUEUE)
        wanted = {("LocalQueue", queue)} if queue else set()
        if cluster.get("enableInTreeAutoscaling"):
            wanted.add(("NetworkPolicy", "autoscaler"))
        total: dict[str, float] = {}
        for pod in pods(document):
            wanted |= set(_names(pod))
            for resource in ("cpu", "memory", GPU):
                total[resource] = total.get(resource, 0) + pod.count * pod.asks(resource)
        yield from (f"{where}: {kind} {name} isn't installed" for kind, name in sorted(wanted - have))
        for resource, amount in total.items():
            most = hard[f"requests.{resource}"]
            if amount > quantity(most):
                yield f"{where}: asks for {amount:g} of {resource}, the quota is {most}"
        if queue:
            yield from (f"{where}: {problem}" for problem in _fits_queue(install, document))


def _names(pod: Pod) -> Iterator[tuple[str, str]]:
    """What a pod refers to."""
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default")
    yield "PriorityClass", pod.spec["priorityClassName"]
    for volume in pod.spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]


def _fits_queue(install: list[Document], document: Document) -> Iterator[str]:
    """A job that is larger than the quota of a flavor waits for ever."""
    flavors = {d["metadata"]["name"]: d["spec"] for d in install if d["kind"] == "ResourceFlavor"}
    queue = next(d for d in install if d["kind"] == "ClusterQueue")["spec"]["resourceGroups"][0]
    quotas = {
        f["name"]: {r["name"]: quantity(r["nominalQuota"]) for r in f["resources"]} for f in queue["flavors"]
    }
    asked: dict[str, dict[str, float]] = {}
    for pod in pods(document):
        selector = pod.spec["nodeSelector"]
        fits = [n for n, s in flavors.items() if s["nodeLabels"]["unimrg-pool"] == selector["unimrg-pool"]]
        if not fits:
            yield f"{pod.group}: no flavor has nodes of {selector}"
            continue
        sums = asked.setdefault(fits[0], {})
        for resource in queue["coveredResources"]:
            sums[resource] = sums.get(resource, 0) + pod.count * pod.asks(resource)
    for flavor, sums in asked.items():
        for resource, amount in sums.items():
            if amount > (most := quotas[flavor].get(resource, 0)):
                yield f"{flavor} gives {most:g} of {resource}, the job asks for {amount:g}"
