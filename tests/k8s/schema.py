"""Is a document one that the API server takes? By the stored schemas, strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema

from tests.k8s.render import Document
from tests.k8s.vendor import KUBERNETES, SCHEMAS

CLUSTER_WIDE = {"Namespace", "PriorityClass"}
PROTOCOL = {"protocol": "TCP"}  # what the API server fills into ports, before it compares them


@cache
def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text("utf-8"))
    return loaded


@cache
def schema_of(kind: str, kubernetes: str) -> dict[str, Any] | None:
    """The schema of `apiVersion/Kind`, with all that it refers to; None where there is none."""
    for source in (load("custom"), load(f"kubernetes-{kubernetes}")):
        if kind in source["kinds"]:
            return source["kinds"][kind] | {"$defs": source["$defs"]}
    return None


def problems(document: Document, kubernetes: str = KUBERNETES[-1]) -> Iterator[str]:
    """What is wrong with a document, a sentence each."""
    kind = f"{document.get('apiVersion')}/{document.get('kind')}"
    schema = schema_of(kind, kubernetes)
    if schema is None:
        yield f"{kind}: no such kind in Kubernetes {kubernetes} or the operators"
        return
    meta = document.get("metadata") or {}
    where = f"{document['kind']}/{meta.get('name')}"
    if not meta.get("name"):
        yield f"{where}: metadata: has no name"
    wide = document["kind"] in CLUSTER_WIDE or kind in load("custom")["wide"]
    if wide == ("namespace" in meta):
        yield f"{where}: metadata.namespace: is {'of the whole cluster' if wide else 'missing'}"
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{where}: {error.json_path[2:]}: {error.message[:300]}"
    for path, message in [*nulls(document), *doubles(schema, document, schema["$defs"])]:
        yield f"{where}: {path}: {message}"


def nulls(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys without a value: usually a forgotten indentation."""
    if value is None:
        yield path, "is null"
    for key, below in _items(value):
        yield from nulls(below, f"{path}.{key}")


def doubles(schema: Any, value: Any, defs: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Entries that occur twice in lists which the API server treats as maps or sets."""
    schema = schema or {}
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        as_map, as_set = (
            keys and schema["x-kubernetes-list-type"] == "map",
            schema.get("x-kubernetes-list-type"),
        )
        seen = set()
        for item in value if as_map or as_set == "set" else ():
            identity = [item.get(key, PROTOCOL.get(key)) for key in keys] if as_map else item
            if (text := json.dumps(identity, sort_keys=True)) in seen:
                yield path, f"{text} twice"
            seen.add(text)
    for key, below in _items(value):
        inside = schema.get("items") if isinstance(value, list) else schema.get("properties", {}).get(key)
        if inside is None and isinstance(schema.get("additionalProperties"), dict):
            inside = schema["additionalProperties"]
        yield from doubles(inside, below, defs, f"{path}.{key}")


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []
