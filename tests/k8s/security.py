"""What every pod, policy and role of ours must keep to: SECURITY.md says against what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.parts import Pod, cluster_of, pods, quantity
from tests.k8s.render import Document

METADATA_SERVICE = "169.254.169.254/32"
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""What the Pod Security Standard `restricted` lets pods mount."""

SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY")
SECRET_VALUES = re.compile(
    r"AKIA[0-9A-Z]{12}|-----BEGIN|hf_[A-Za-z0-9]{20}|gh[pos]_[A-Za-z0-9]{20}|:[^/\s:@]+@"
)
RAY = ("ray.io/is-ray-node", "yes")
HOLES = {
    ("out", "namespace kube-system", "53"),
    ("in", "ray", "*"),
    ("out", "ray", "*"),
    ("in", "namespace kuberay-system", "8265"),
    ("in", "namespace monitoring", "8080,9464,44217,44227"),
    ("out", "namespace monitoring", "9090,3000"),
    ("out", "0.0.0.0/0 but the metadata service", "443"),
    ("out", "0.0.0.0/0 but the metadata service", "6443"),  # the API server, for an autoscaling head
    ("out", "169.254.170.23/32", "80"),  # EKS Pod Identity
    ("out", "169.254.169.252/32", "988"),  # GKE's own metadata server, which hides the node's
    ("out", "169.254.169.254/32", "80"),  # the same one, where Dataplane V2 enforces the policies
}
"""(direction, with whom, ports): all that may pass."""


def of_pods(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        scaling = (cluster_of(document) or {}).get("enableInTreeAutoscaling", False)
        for pod in pods(document):
            found = [*_pod(pod, scaling), *_secrets(pod)]
            for container in pod.containers:
                found += _container(container)
            yield from (f"{pod.where}: {problem}" for problem in found)
        options = (cluster_of(document) or {}).get("autoscalerOptions")
        if options is not None:
            yield from _container({"name": "autoscaler"} | options)


def _pod(pod: Pod, scaling: bool) -> Iterator[str]:
    context, spec = pod.spec.get("securityContext", {}), pod.spec
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "runs as root"
    if context.get("fsGroup") != context.get("runAsGroup"):
        yield "fsGroup is another group than that it runs as"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "hostUsers"):
        if spec.get(field):
            yield f"shares with the node: {field}"
    for volume in spec.get("volumes", []):
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"mounts a volume of kind {kinds.pop()}"
        if "sizeLimit" not in volume.get("emptyDir", {"sizeLimit": ""}):
            yield f"emptyDir {volume['name']} may fill the node"
    mounts_token = spec.get("automountServiceAccountToken") is not False
    if mounts_token != (scaling and pod.group == "head"):
        yield "mounts a token of the API server" if mounts_token else "the autoscaler needs its token"
    if pod.group and spec.get("serviceAccountName") in (None, "default"):
        yield "runs as the account `default`"
    if pod.group and (pod.group == "head") != (spec.get("serviceAccountName") == "unimrg-head"):
        yield "the head's account is the head's alone"


def _container(container: dict[str, Any]) -> Iterator[str]:
    name, context = container["name"], container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{name}: may become more than it is"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: keeps or adds capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: may write to its image"
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        yield f"{name}: runs as root"
    for port in container.get("ports", []):
        if "hostPort" in port:
            yield f"{name}: opens port {port['hostPort']} of the node"
    image = container.get("image", "none:0")
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"{name}: image {image} may be another one tomorrow"


def _secrets(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        for entry in container.get("env", []):
            if "value" in entry and SECRET_NAMES.search(entry["name"].upper()):
                yield f"{entry['name']} is written out; take it from a Secret"
            if SECRET_VALUES.search(str(entry.get("value", ""))):
                yield f"{entry['name']} looks like a credential"


def of_documents(documents: list[Document]) -> Iterator[str]:
    """Secrets, authentication, policies, roles, accounts."""
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        if kind == "Secret":
            yield f"Secret/{name}: secrets don't belong in these files"
        cluster = cluster_of(document)
        if cluster is not None and cluster.get("authOptions", {}).get("mode") != "token":
            yield f"{kind}/{name}: Ray takes jobs from anyone: authOptions.mode isn't token"
        if kind == "ServiceAccount" and document.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{name}: its token is mounted by default"
        if kind in ("Role", "ClusterRole"):
            yield from (f"{kind}/{name}: {problem}" for problem in _role(document))
        if kind in ("ClusterRole", "ClusterRoleBinding"):
            yield f"{kind}/{name}: reaches beyond the namespace"
        entrypoint = str(document.get("spec", {}).get("entrypoint", ""))
        if SECRET_VALUES.search(entrypoint) or re.search(r"s3\.(secret|access)_key=", entrypoint):
            yield f"{kind}/{name}: the entrypoint holds a credential"


def _role(document: Document) -> Iterator[str]:
    for rule in document["rules"]:
        verbs, resources = set(rule["verbs"]), set(rule.get("resources", []))
        if "*" in verbs | resources | set(rule.get("apiGroups", [])):
            yield "allows everything of something"
        if verbs & {"escalate", "bind", "impersonate"}:
            yield "may give itself more"
        if "secrets" in resources and (verbs != {"get"} or not rule.get("resourceNames")):
            yield "reads more secrets than the one it needs"
        if resources & {"pods", "pods/exec"} and verbs & {"create", "patch", "update"}:
            yield "may run pods beside the operator's"


def of_install(documents: list[Document]) -> Iterator[str]:
    """What is installed once: a strict namespace, closed but for the known holes, with a quota."""
    of_kind = {kind: [d for d in documents if d["kind"] == kind] for kind in {d["kind"] for d in documents}}
    for namespace in of_kind.get("Namespace", []):
        labels = namespace["metadata"].get("labels", {})
        for mode in ("enforce", "audit", "warn"):
            key = f"pod-security.kubernetes.io/{mode}"
            if labels.get(key) != "restricted":
                yield f"Namespace: {key} isn't restricted"
            if not re.fullmatch(r"v1\.\d+", labels.get(f"{key}-version", "")):
                yield f"Namespace: the version of {mode} isn't pinned"
    for kind in ("Namespace", "ResourceQuota", "LimitRange", "PodDisruptionBudget"):
        if not of_kind.get(kind):
            yield f"there is no {kind}"
    policies = of_kind.get("NetworkPolicy", [])
    if not any(_denies_all(policy["spec"]) for policy in policies):
        yield "no NetworkPolicy denies what isn't allowed"
    for policy in policies:
        for hole in _holes(policy["spec"]):
            if hole not in HOLES:
                yield f"NetworkPolicy/{policy['metadata']['name']}: lets pass {hole}"
    for budget in of_kind.get("PodDisruptionBudget", []):
        if not isinstance(budget["spec"].get("minAvailable"), int):
            yield "PodDisruptionBudget: only a whole minAvailable works for Ray's pods"
        if budget["spec"]["selector"].get("matchLabels") != {"ray.io/node-type": "head"}:
            yield "PodDisruptionBudget: on workers it blocks the nodes' upgrades"
    for limits in of_kind.get("LimitRange", []):
        for limit in limits["spec"]["limits"]:
            if quantity(limit.get("min", {}).get("memory", 0)) > quantity("256Mi"):
                yield "LimitRange: refuses the operator's init container"


def _denies_all(spec: dict[str, Any]) -> bool:
    open_ends = spec.get("ingress") or spec.get("egress")
    return spec["podSelector"] == {} and set(spec["policyTypes"]) == {"Ingress", "Egress"} and not open_ends


def _holes(spec: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for direction, peers, rules in (("in", "from", "ingress"), ("out", "to", "egress")):
        for rule in spec.get(rules, []):
            ports = (
                ",".join(dict.fromkeys(str(port.get("port", "*")) for port in rule.get("ports", []))) or "*"
            )
            for peer in rule.get(peers, [{}]):
                yield direction, _peer(peer), ports


def _peer(peer: dict[str, Any]) -> str:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        kept = " but the metadata service" if block.get("except") == [METADATA_SERVICE] else ""
        return f"{block['cidr']}{kept}"
    if "namespaceSelector" in peer:
        labels = peer["namespaceSelector"].get("matchLabels", {})
        return f"namespace {labels.get('kubernetes.io/metadata.name', '*')}"
    labels = peer.get("podSelector", {}).get("matchLabels", {})
    return "ray" if labels == dict([RAY]) else "anyone"
