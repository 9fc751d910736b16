"""The checker itself: break one setting at a time, and it must say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.parts import cluster_of
from tests.k8s.render import K8S, Document, build
from tests.k8s.test_manifests import problems

Change = Callable[[dict[str, Any]], object]
"""Breaks a document in place."""


def job(change: Change) -> Change:
    return lambda d: change(d["spec"])


def cluster(change: Change) -> Change:
    return lambda d: change(cluster_of(d) or {})


def group(index: int, change: Change) -> Change:
    return cluster(lambda c: change(c["workerGroupSpecs"][index]))


def pod(change: Change, index: int = 0) -> Change:
    return group(index, lambda g: change(g["template"]["spec"]))


def head(change: Change) -> Change:
    return cluster(lambda c: change(c["headGroupSpec"]["template"]["spec"]))


def container(change: Change, index: int = 0) -> Change:
    return pod(lambda p: change(p["containers"][0]), index)


def env(name: str, value: str) -> Change:
    return container(lambda c: c["env"].append({"name": name, "value": value}))


def words(old: str, new: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        assert old in spec["entrypoint"]
        spec["entrypoint"] = spec["entrypoint"].replace(old, new)

    return job(change)


def security(**changes: Any) -> Change:
    return container(lambda c: c["securityContext"].update(changes))


# what is broken in overlays/eks/train (workload "train") -> what must be said
JOB: dict[str, tuple[Change, str]] = {
    "misspelt field": (pod(lambda p: p.update(serviceAccount_Name="x")), "Additional properties"),
    "field in the wrong place": (job(lambda s: s.update(rayVersion="2.60.0")), "Additional properties"),
    "number as text": (group(0, lambda g: g.update(replicas="2")), "not of type 'integer'"),
    "text as number": (cluster(lambda c: c.update(rayVersion=2.6)), "not of type 'string'"),
    "empty key": (pod(lambda p: p.update(tolerations=None)), "null"),
    "unknown value": (cluster(lambda c: c["authOptions"].update(mode="tokens")), "not one of"),
    "variable twice": (container(lambda c: c["env"].append(dict(c["env"][0]))), "twice"),
    "no name": (lambda d: d["metadata"].pop("name"), "has no name"),
    "no namespace": (lambda d: d["metadata"].pop("namespace"), "metadata.namespace: is missing"),
    "kind that isn't": (lambda d: d.update(apiVersion="ray.io/v1beta1"), "no such kind"),
    "name too long": (lambda d: d["metadata"].update(name="t" * 48), "48 characters, 47 at most"),
    "name of two words": (lambda d: d["metadata"].update(name="1-train"), "DNS-1035"),
    "not suspended": (job(lambda s: s.update(suspend=False)), "Kueue wants suspend"),
    "no shutdown": (
        job(lambda s: s.update(shutdownAfterJobFinishes=False)),
        "needs shutdownAfterJobFinishes",
    ),
    "sidecar": (job(lambda s: s.update(submissionMode="SidecarMode")), "no securityContext"),
    "default mode": (job(lambda s: s.pop("submissionMode")), "submissionMode isn't HTTPMode"),
    "no deadline": (job(lambda s: s.pop("activeDeadlineSeconds")), "activeDeadlineSeconds isn't set"),
    "deadline in the queue": (job(lambda s: s.update(preRunningDeadlineSeconds=60)), "waiting in the queue"),
    "auth without a mode": (cluster(lambda c: c.update(authOptions={})), "stays off"),
    "auth off": (cluster(lambda c: c["authOptions"].update(mode="disabled")), "takes jobs from anyone"),
    "no auth": (cluster(lambda c: c.pop("authOptions")), "takes jobs from anyone"),
    "other Ray": (cluster(lambda c: c.update(rayVersion="2.59.0")), "rayVersion is 2.59.0"),
    "labels of ray start": (
        group(0, lambda g: g["rayStartParams"].update(labels="a=b")),
        "labels is refused",
    ),
    "two groups of a name": (group(1, lambda g: g.update(groupName="trainer")), "have one name"),
    "autoscaler v1": (cluster(lambda c: c.update(enableInTreeAutoscaling=True)), "v2 must be written out"),
    "idle without autoscaler": (
        group(2, lambda g: g.update(idleTimeoutSeconds=60)),
        "needs the autoscaler v2",
    ),
    "replicas above the most": (group(1, lambda g: g.update(replicas=9)), "is not between"),
    "elastic trainers": (group(0, lambda g: g.update(maxReplicas=4)), "not of a fixed size"),
    "alpha field": (cluster(lambda c: c.update(tlsOptions={"enabled": True})), "gate RayClusterMTLS"),
    "tasks on the head": (
        cluster(lambda c: c["headGroupSpec"]["rayStartParams"].pop("num-cpus")),
        "takes tasks",
    ),
    "quick stop": (
        head(
            lambda p: p["containers"][0]["env"].remove({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"})
        ),
        "before it has saved",
    ),
    "port of the autoscaler": (
        head(lambda p: p["containers"][0]["ports"].pop(5)),
        "declare the port as-metrics",
    ),
    "root": (pod(lambda p: p["securityContext"].update(runAsUser=0)), "runs as root"),
    "root maybe": (pod(lambda p: p["securityContext"].pop("runAsNonRoot")), "runs as root"),
    "no seccomp": (pod(lambda p: p["securityContext"].pop("seccompProfile")), "no seccomp profile"),
    "host network": (pod(lambda p: p.update(hostNetwork=True)), "shares with the node"),
    "host path": (
        pod(lambda p: p["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
        "kind hostPath",
    ),
    "privileged": (security(privileged=True), "may become more"),
    "escalation": (security(allowPrivilegeEscalation=True), "may become more"),
    "capability": (security(capabilities={"drop": ["ALL"], "add": ["IPC_LOCK"]}), "adds capabilities"),
    "writable image": (security(readOnlyRootFilesystem=False), "may write to its image"),
    "host port": (container(lambda c: c["ports"][0].update(hostPort=8080)), "opens port 8080 of the node"),
    "API token": (pod(lambda p: p.update(automountServiceAccountToken=True)), "token of the API server"),
    "default account": (pod(lambda p: p.pop("serviceAccountName")), "account `default`"),
    "account of the head": (pod(lambda p: p.update(serviceAccountName="unimrg-head")), "the head's alone"),
    "secret written out": (env("HF_TOKEN", "x"), "HF_TOKEN is written out"),
    "key written out": (env("NAME", "AKIAABCDEFGHIJKLMNOP"), "looks like a credential"),
    "figures nowhere": (words("metrics.port=9464 ", ""), "Prometheus can't read the run"),
    "figures at another port": (words("metrics.port=9464", "metrics.port=9465"), "can't read the run"),
    "key in the command": (words("train.batch", "s3.secret_key=x train.batch"), "the entrypoint holds"),
    "password in a URL": (words("s3://example-bucket/runs", "s3://a:b@example/runs"), "the entrypoint holds"),
    "latest": (container(lambda c: c.update(image="unimrg:latest")), "another one tomorrow"),
    "image of another Ray": (
        container(lambda c: c.update(image="unimrg:0.1.0-ray2.9.0-cuda")),
        "isn't of unimrg",
    ),
    "GPU without CUDA": (
        container(lambda c: c.update(image=c["image"].replace("cuda", "cpu"))),
        "has a GPU and the image",
    ),
    "memory overcommitted": (
        container(lambda c: c["resources"]["requests"].update(memory="1Gi")),
        "request and limit differ",
    ),
    "GPU not limited": (container(lambda c: c["resources"]["limits"].pop("nvidia.com/gpu")), "differ"),
    "CPU limit": (container(lambda c: c["resources"]["limits"].update(cpu="8")), "only throttles"),
    "no /dev/shm": (pod(lambda p: p["volumes"].pop(2)), "/dev/shm isn't declared"),
    "large object store": (
        group(0, lambda g: g["rayStartParams"].update({"object-store-memory": str(2**40)})),
        "doesn't hold",
    ),
    "unbounded folder": (pod(lambda p: p["volumes"][0]["emptyDir"].clear()), "may fill the node"),
    "folders above the disk": (
        pod(lambda p: p["volumes"][0]["emptyDir"].update(sizeLimit="9Ti")),
        "beyond the disk",
    ),
    "home read-only": (container(lambda c: c["volumeMounts"].pop(1)), "/home/unimrg is read-only"),
    "short grace": (pod(lambda p: p.pop("terminationGracePeriodSeconds")), "while Ray drains it"),
    "trainer movable": (group(0, lambda g: g["template"]["metadata"]["annotations"].clear()), "may be moved"),
    "trainer on spot": (
        pod(lambda p: p["nodeSelector"].update({"karpenter.sh/capacity-type": "spot"})),
        "is on spot nodes",
    ),
    "trainer among teachers": (
        pod(lambda p: p["nodeSelector"].update({"unimrg-pool": "teacher"})),
        "of the pool",
    ),
    "priority": (pod(lambda p: p.update(priorityClassName="unimrg-train"), 2), "has the priority"),
    "group without its label": (group(1, lambda g: g["labels"].update(pool="x")), "its label isn't"),
    "workers": (words("cluster.workers=16", "cluster.workers=8"), "have room for 16"),
    "training anywhere": (words("cluster.node_labels", "cluster.environment"), "take the teachers' nodes"),
    "pool that isn't": (
        words("teachers.depth.node_labels=['pool=teacher']", "teachers.depth.node_labels=['pool=gpu']"),
        "pool gpu",
    ),
    "teachers unused": (
        words("cluster.workers", "labels.mode=cached cluster.workers"),
        "paid for and not used",
    ),
    "nobody labels": (cluster(lambda c: c["workerGroupSpecs"].pop(1)), "nobody labels"),
    "beyond the quota": (group(2, lambda g: g.update(replicas=40, maxReplicas=40)), "the quota is"),
    "beyond the queue": (
        group(0, lambda g: g.update(replicas=3, minReplicas=3, maxReplicas=3)),
        "unimrg-trainer gives",
    ),
    "queue that isn't": (
        lambda d: d["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "x"}),
        "LocalQueue x isn't installed",
    ),
    "account that isn't": (
        pod(lambda p: p.update(serviceAccountName="x")),
        "ServiceAccount x isn't installed",
    ),
    "volume that isn't": (
        pod(lambda p: p["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "x"}})),
        "PersistentVolumeClaim x isn't installed",
    ),
}


def of(kind: str, name: str, change: Change) -> Callable[[list[Document]], object]:
    def broken(documents: list[Document]) -> object:
        found = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
        assert len(found) == 1
        return change(found[0])

    return broken


def without(kind: str, name: str) -> Callable[[list[Document]], object]:
    return lambda documents: documents.remove(
        next(d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))
    )


def policy(name: str, change: Change) -> Callable[[list[Document]], object]:
    return of("NetworkPolicy", name, lambda d: change(d["spec"]))


SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x", "namespace": "unimrg"}}

# what is broken in overlays/eks -> what must be said
INSTALL: dict[str, tuple[Callable[[list[Document]], object], str]] = {
    "baseline": (
        of(
            "Namespace",
            "unimrg",
            lambda d: d["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "baseline"}),
        ),
        "enforce isn't restricted",
    ),
    "version not pinned": (
        of(
            "Namespace",
            "unimrg",
            lambda d: d["metadata"]["labels"].update(
                {"pod-security.kubernetes.io/enforce-version": "latest"}
            ),
        ),
        "isn't pinned",
    ),
    "open by default": (without("NetworkPolicy", "default-deny"), "no NetworkPolicy denies"),
    "ingress left open": (policy("default-deny", lambda s: s["policyTypes"].remove("Ingress")), "denies"),
    "dashboard for all": (policy("operator", lambda s: s["ingress"][0].pop("from")), "lets pass"),
    "metrics for all": (
        policy("monitoring", lambda s: s["ingress"][0]["from"].append({"namespaceSelector": {}})),
        "lets pass",
    ),
    "metadata service": (
        policy("storage", lambda s: s["egress"][0]["to"][0]["ipBlock"].pop("except")),
        "lets pass",
    ),
    "any port out": (policy("storage", lambda s: s["egress"][0].pop("ports")), "lets pass"),
    "all verbs": (
        of("Role", "unimrg-submitter", lambda d: d["rules"][0].update(verbs=["*"])),
        "everything of something",
    ),
    "all secrets": (
        of("Role", "unimrg-submitter", lambda d: d["rules"][3].pop("resourceNames")),
        "more secrets",
    ),
    "exec": (
        of("Role", "unimrg-submitter", lambda d: d["rules"][2]["resources"].append("pods/exec")),
        "pods beside the operator's",
    ),
    "token mounted": (
        of("ServiceAccount", "unimrg-worker", lambda d: d.pop("automountServiceAccountToken")),
        "mounted by default",
    ),
    "budget in percent": (
        of("PodDisruptionBudget", "heads", lambda d: d["spec"].update(minAvailable="50%")),
        "only a whole minAvailable",
    ),
    "budget on workers": (
        of("PodDisruptionBudget", "heads", lambda d: d["spec"].update(selector={})),
        "blocks the nodes' upgrades",
    ),
    "no quota for pods": (without("LimitRange", "unimrg"), "there is no LimitRange"),
    "limits above the operator's": (
        of("LimitRange", "unimrg", lambda d: d["spec"]["limits"][0].update(min={"memory": "1Gi"})),
        "init container",
    ),
    "secret in the files": (lambda documents: documents.append(SECRET), "don't belong"),
    "flavor without a resource": (
        of(
            "ClusterQueue",
            "unimrg",
            lambda d: d["spec"]["resourceGroups"][0]["flavors"][0]["resources"].pop(),
        ),
        "covered are",
    ),
    "namespace of a queue": (
        of("ClusterQueue", "unimrg", lambda d: d["metadata"].update(namespace="unimrg")),
        "whole cluster",
    ),
    "priority class gone": (without("PriorityClass", "unimrg-feed"), "unimrg-feed isn't installed"),
    "misspelt kind of port": (
        policy("names", lambda s: s["egress"][0]["ports"][0].update(prot="UDP")),
        "Additional",
    ),
    "image of the prefetch": (
        of(
            "DaemonSet",
            "image-prepull",
            lambda d: d["spec"]["template"]["spec"]["containers"][0].update(image="pause"),
        ),
        "another one tomorrow",
    ),
}

EKS = K8S / "overlays" / "eks"


@pytest.mark.parametrize("name", JOB)
def test_a_broken_job_is_told(name: str) -> None:
    change, said = JOB[name]
    documents = build(EKS / "train")
    change(documents[0])
    found = list(problems(build(EKS), documents))
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize("name", INSTALL)
def test_a_broken_namespace_is_told(name: str) -> None:
    change, said = INSTALL[name]
    documents = build(EKS)
    change(documents)
    found = list(problems(documents, build(EKS / "train")))
    assert any(said in problem for problem in found), found


def test_unbroken_nothing_is_told() -> None:
    assert list(problems(build(EKS), build(EKS / "train"))) == []


AUTOSCALED: dict[str, tuple[Change, str]] = {
    "head without a token": (
        head(lambda p: p.update(automountServiceAccountToken=False)),
        "the autoscaler needs its token",
    ),
    "autoscaler as root": (
        cluster(lambda c: c["autoscalerOptions"]["securityContext"].update(runAsUser=0)),
        "autoscaler: runs as root",
    ),
    "restarts": (pod(lambda p: p.update(restartPolicy="Always")), "wants restartPolicy Never"),
    "queued and not elastic": (
        lambda d: (
            d["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "unimrg"}),
            d["metadata"].pop("annotations"),
        ),
        "only with the annotation",
    ),
}


@pytest.mark.parametrize("name", AUTOSCALED)
def test_a_broken_autoscaler_is_told(name: str) -> None:
    change, said = AUTOSCALED[name]
    overlay = K8S / "overlays" / "gpu-multinode"
    documents = build(overlay / "train")
    change(documents[0])
    install = build(EKS) if "queued" in name else build(overlay)
    found = list(problems(install, documents))
    assert any(said in problem for problem in found), found
