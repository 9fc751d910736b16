"""Makes schemas/*.json: python -m tests.k8s.vendor CRDS KUBERNETES

CRDS: a folder with the CRDs of KubeRay, Kueue and the Prometheus operator. KUBERNETES: the folder
kubernetes-json-schema of the package kubernetes-validate. `schemas/README.md` says which releases. What comes
out is strict JSON Schema: no field that isn't declared. Descriptions and status go; what occurs often (a pod)
is stored once, under `$defs`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = ("1.33", "1.37")
"""The oldest and the newest version that the manifests must be valid for."""

KINDS = [
    "configmap-v1",
    "daemonset-apps-v1",
    "limitrange-v1",
    "namespace-v1",
    "networkpolicy-networking-v1",
    "persistentvolumeclaim-v1",
    "poddisruptionbudget-policy-v1",
    "priorityclass-scheduling-v1",
    "resourcequota-v1",
    "role-rbac-v1",
    "rolebinding-rbac-v1",
    "secret-v1",
    "service-v1",
    "serviceaccount-v1",
]
WORTH = 200
"""Characters from which on a part that occurs twice is stored once."""


def bare(node: Any, names: bool = False) -> Any:
    """Without descriptions. names: the keys of `node` are fields of the API, not words of the schema."""
    if isinstance(node, list):
        return [bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = () if names else ("description", "example", "x-kubernetes-group-version-kind", "$schema")
    return {
        key: bare(value, names=key in ("properties", "$defs") and not names)
        for key, value in node.items()
        if key not in dropped
    }


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas with what occurs more than once under `$defs`."""
    counts: Counter[str] = Counter()
    for schema in schemas.values():
        _count(schema, counts)
    numbers: dict[str, str] = {}
    defs: dict[str, Any] = {}

    def place(node: Any) -> Any:
        if isinstance(node, list):
            return [place(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if "type" not in node or len(text) < WORTH or counts[text] < 2:
            return {key: place(value) for key, value in node.items()}
        if text not in numbers:
            numbers[text] = str(len(numbers))
            defs[numbers[text]] = {key: place(value) for key, value in node.items()}
        return {"$ref": f"#/$defs/{numbers[text]}"}

    return {"kinds": {name: place(schema) for name, schema in schemas.items()}, "$defs": defs}


def _count(node: Any, counts: Counter[str]) -> None:
    """How often each part occurs; parts of what was seen before don't count again."""
    if isinstance(node, list):
        for item in node:
            _count(item, counts)
    elif isinstance(node, dict):
        text = json.dumps(node, sort_keys=True)
        counts[text] += 1
        if counts[text] == 1:
            for value in node.values():
                _count(value, counts)


METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 253, "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {
            "type": "object",
            "additionalProperties": {
                "type": "string",
                "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$",
            },
        },
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
"""CRDs leave it open, the API server doesn't."""

KEPT = [
    "type",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "multipleOf",
    "uniqueItems",
    "required",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
]


def strict(node: dict[str, Any], declares: bool = True) -> dict[str, Any]:
    """A CRD's schema as JSON Schema that refuses what the API server would refuse, or drop in silence.

    declares: false inside allOf, anyOf, oneOf and not, where fields are narrowed and none are declared.
    """
    made = {key: node[key] for key in KEPT if key in node}
    if node.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif node.get("format") in ("int32", "int64") and node.get("type") == "integer":
        bits = int(node["format"][3:]) - 1
        made = {"minimum": -(2**bits), "maximum": 2**bits - 1} | made
    if "properties" in node:
        made["properties"] = {key: strict(value, declares) for key, value in node["properties"].items()}
    if "required" in made:  # the API server fills in defaults before it looks
        defaults = {key for key, value in node.get("properties", {}).items() if "default" in value}
        made["required"] = [key for key in made["required"] if key not in defaults]
    if "additionalProperties" in node:
        more = node["additionalProperties"]
        made["additionalProperties"] = strict(more, declares) if isinstance(more, dict) else more
    elif declares and node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if "items" in node:
        made["items"] = strict(node["items"], declares)
    for key in ("allOf", "anyOf", "oneOf"):
        if key in node:
            made[key] = [strict(part, declares=False) for part in node[key]]
    if "not" in node:
        made["not"] = strict(node["not"], declares=False)
    return made


def custom(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """`group/version/Kind` -> schema of the stored version of every CRD; which are of the whole cluster."""
    found, wide = {}, []
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)["spec"]
        version = next(version for version in spec["versions"] if version["storage"])
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"].pop("status", None)
        schema["properties"]["metadata"] = METADATA
        name = f"{spec['group']}/{version['name']}/{spec['names']['kind']}"
        found[name] = schema
        wide += [name] if spec["scope"] == "Cluster" else []
    return found, wide


def built_in(folder: Path, version: str) -> dict[str, Any]:
    """The kinds of KINDS, with the definitions that they reach."""
    folder = folder / f"v{version}.0-local-strict"
    every = bare(json.loads((folder / "_definitions.json").read_text("utf-8")))["$defs"]
    kinds, defs = {}, {}
    for kind in KINDS:
        schema = bare(json.loads((folder / f"{kind}.json").read_text("utf-8")))
        words = schema["properties"]
        name = f"{words['apiVersion']['enum'][0]}/{words['kind']['enum'][0]}"
        kinds[name] = _local(schema, every, defs)
    return {"kinds": kinds, "$defs": defs}


def _local(node: Any, every: dict[str, Any], defs: dict[str, Any]) -> Any:
    """References into `every` as references into `defs`, which grows by what they name."""
    if isinstance(node, list):
        return [_local(item, every, defs) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if name not in defs:
            defs[name] = None  # types may hold themselves
            defs[name] = _local(every[name], every, defs)
        return {"$ref": f"#/$defs/{name}"}
    return {key: _local(value, every, defs) for key, value in node.items()}


def main(crds: str, kubernetes: str) -> None:
    SCHEMAS.mkdir(exist_ok=True)
    made = {f"kubernetes-{version}": built_in(Path(kubernetes), version) for version in KUBERNETES}
    kinds, wide = custom(Path(crds))
    made["custom"] = shared(kinds) | {"wide": wide}
    for name, schemas in made.items():
        text = json.dumps(schemas, separators=(",", ":"), sort_keys=True)
        (SCHEMAS / f"{name}.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
