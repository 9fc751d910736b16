"""What the documents refer to exists, and the numbers that a script makes are that script's."""

from __future__ import annotations

import re

import pytest

from tests.bench.sizing import hours, table, training
from tests.test_architecture import ROOT
from unimrg.hardware import PEAKS

DOCUMENTS = [
    "SECURITY.md",
    "k8s/README.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        path = ((ROOT / name).parent / target).resolve()
        assert path.exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_and_tests_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for path, test in re.findall(r"`((?:tests|cluster|k8s|unimrg)/[\w/.-]+?)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8"), test


def test_broken_settings_that_are_named_are_broken() -> None:
    """The words in brackets behind a file of mutations are its cases."""
    from tests.k8s.test_mutations import INSTALL, JOB

    text = (ROOT / "SECURITY.md").read_text("utf-8")
    found = re.findall(r"test_mutations\.py` \(([^)]*)\)", text)
    assert len(found) > 8
    for case in re.findall(r'"([^"]+)"', " ".join(found)):
        assert case in JOB or case in INSTALL, case


def test_the_sizing_table_is_that_of_the_script() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    stored = text.partition("<!-- sizing -->\n")[2].partition("<!-- /sizing -->")[0]
    assert stored.splitlines() == table(1e6, 0.35)
    spent = hours(training()["harmon_1_5b"], dict(PEAKS)["H100"], 0.35, 1e6)
    assert f"/ 3600 = {spent:.1f}" in text and f"take {spent:.1f} / 16 = {spent / 16:.1f} hours" in text
