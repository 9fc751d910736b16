"""Files of the project that are made from the tables and the rules: `python -m cluster.monitoring --write`.

docs/metrics.md (the tables in it), k8s/monitoring/rules.yaml, k8s/monitoring/dashboards/*.json.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from cluster.monitoring import RULES
from cluster.monitoring.dashboards import all_dashboards
from unimrg.figures import COUNTER, FIGURES, Figure

METRICS_PAGE = "docs/metrics.md"
BEGIN, END = "<!-- made by `python -m cluster.monitoring --write` -->", "<!-- end -->"

RULES_HEAD = """\
# Made from cluster/monitoring/rules.yaml by `python -m cluster.monitoring --write`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: unimrg
  labels:
    app.kubernetes.io/part-of: unimrg
    release: kube-prometheus-stack
spec:
"""


def documents(root: Path) -> dict[Path, str]:
    """Every file that is made, and what should be in it. root: of the project."""
    page = root / METRICS_PAGE
    found = {page: _between(page.read_text("utf-8"), "\n".join(_tables()))}
    found[root / "k8s/monitoring/rules.yaml"] = RULES_HEAD + textwrap.indent(_rules(), "  ")
    for board in all_dashboards():
        found[root / f"k8s/monitoring/dashboards/{board['uid']}.json"] = json.dumps(board, indent=1) + "\n"
    return found


def _rules() -> str:
    """The rules without the comment that says what is made from them."""
    text = RULES.read_text("utf-8")
    return text[text.index("groups:") :]


def _between(page: str, text: str) -> str:
    """A page with new text between its marks. Raises ValueError when a mark is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{METRICS_PAGE} needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _tables() -> Iterator[str]:
    group = ""
    for figure in FIGURES:
        if figure.group != group:
            if group:
                yield ""
            group = figure.group
            yield from (f"### {group}", "", "| name | kind | label | what it is |", "|---|---|---|---|")
        yield f"| `{figure.name}` | {figure.kind} | {_label(figure)} | {figure.help} |"


def _label(figure: Figure) -> str:
    if not figure.label:
        return ""
    values = ", ".join(f"`{value}`" for value in figure.values)
    return f"`{figure.label}`: {values}" + (", all from 0" if figure.kind == COUNTER else "")
