"""What a search tells: a table that grows while it runs; then best.yaml, trials.parquet, search.html."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tune.analysis import best, to_table
from tune.campaign import START, Campaign
from tune.config import SearchConfig
from tune.objectives import OBJECTIVES
from tune.page import search_page
from tune.records import REPEATED, SEARCHED, Trial
from tune.space import value_of
from tune.verdict import ROLES, holds, judge
from unimrg.config import RunConfig, redacted
from unimrg.errors import UnimrgError
from unimrg.storage import Store

PAGE_SECONDS = 20.0
SHORT = {
    "weights.pixel": "pixel", "weights.depth": "depth", "weights.segmentation": "segm.",
    "train.learning_rate": "rate", "family.grad_scale": "scale",
}  # fmt: skip
NOT_KEPT = (
    "name",
    "seed",
    "storage_path",
    "s3",
    "labels",
    "report",
    "search",
    "log_every",
    "cluster",
    "metrics",
)
"""Keys of a search that say nothing about the run it found."""


class Outcome:
    """Everything that is shown and left of one search.

    given: its config before anything was filled in, and that of a run without any word.
    """

    def __init__(
        self,
        config: SearchConfig,
        given: tuple[SearchConfig, RunConfig],
        campaign: Campaign,
        folder: Path,
        logs: str,
    ) -> None:
        self.config, self.campaign = config, campaign
        self.given, self.usual = given
        self.folder, self.logs = folder, logs
        self.written = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    # -- while it runs ---------------------------------------------------------------------------------------

    def begin(self, at_once: int) -> None:
        """The head of the table, and what was finished before. at_once: trials that have room."""
        options = self.config.search
        print(
            f"search {self.config.name}: {', '.join(options.strategies)}, {options.trials} trainings of "
            f"{self.config.train.steps} steps each, {at_once} at once; {self.folder}; "
            f"Ray's logs: {self.logs}",
            flush=True,
        )
        finished = len(self.campaign.finished)
        if finished:
            print(f"resumed: {finished} trials are finished already", flush=True)
        names = [OBJECTIVES[name].title for name in options.objectives]
        print(self._row("trial", list(SHORT.values()), "state", "steps", "time", names), flush=True)

    def finished(self, trial: Trial) -> None:
        """A row of the table; now and then the page."""
        values = [self._changed(trial, key) for key in SHORT]
        measured = [_short(trial.values.get(name)) for name in self.config.search.objectives]
        row = self._row(trial.id, values, trial.state, str(trial.steps), f"{trial.seconds:.0f} s", measured)
        print(row + (f"  {trial.error}" if trial.error else ""), flush=True)
        if time.monotonic() - self.written > PAGE_SECONDS:
            self._write_page(running=True)

    def _row(
        self, name: str, changes: list[str], state: str, steps: str, seconds: str, values: list[str]
    ) -> str:
        cells = "".join(f"{change:>9}" for change in changes)
        return f"{name:<16}{cells}  {state:<8}{steps:>6}{seconds:>8}" + "".join(f"  {v:>10}" for v in values)

    def _changed(self, trial: Trial, key: str) -> str:
        return _short(trial.changes.get(key, value_of(self.config, key)))

    # -- at its end ------------------------------------------------------------------------------------------

    def end(self, store: Store, seconds: float) -> None:
        """Write what the search leaves, and say what it found. Raises UnimrgError when it found nothing."""
        found = best(self.campaign.trials(SEARCHED), self.config.search.objectives[0])
        if found is None:
            raise UnimrgError(f"no trial was finished; {self.folder / 'search.html'} says why")
        held = holds(self.campaign.trials(REPEATED), self.campaign.same, self.config.search.objectives[0])
        handed_out = found if held else self.campaign.finished[START]
        (self.folder / "best.yaml").write_text(self._best_yaml(handed_out))
        table = to_table(self.campaign.trials())
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        (self.folder / "trials.parquet").write_bytes(buffer.getvalue())
        self._write_page(running=False)
        if not store.is_local:
            for name in ("best.yaml", "trials.parquet", "search.html"):
                store.write_bytes(name, (self.folder / name).read_bytes())
        print("\n".join(self._closing()), flush=True)
        print(f"done in {seconds:.0f} s: {self.folder}/search.html, best.yaml, trials.parquet", flush=True)

    def _closing(self) -> list[str]:
        """The closing table, and the honest comparison."""
        options = self.config.search
        objective = options.objectives[0]
        lines = ["", f"best {OBJECTIVES[objective].title.lower()} on the validation pictures by strategy:"]
        for strategy in options.strategies:
            mine = [t for t in self.campaign.trials(SEARCHED) if t.strategy in (strategy, START)]
            top = best(mine, objective)
            steps = sum(trial.steps for trial in mine)
            value = _short(top.values[objective]) if top else "none"
            lines.append(
                f"  {strategy:<12}{value:>8}  {len(mine):>4} trials {steps:>7} steps  {self._what(top)}"
            )
        repeats = self.campaign.trials(REPEATED)
        roles = [role for role in ROLES if role == "default" or "equal" in options.strategies]
        return lines + [judge(repeats, self.campaign.same, role, objective) for role in roles]

    def _what(self, trial: Trial | None) -> str:
        if trial is None:
            return ""
        return " ".join(f"{SHORT.get(key, key)}={_short(value)}" for key, value in trial.changes.items())

    def _best_yaml(self, found: Trial) -> str:
        """The keys in which the best run differs from `python -m unimrg.train` without any word."""
        plain, usual = redacted(self.given), redacted(self.usual)
        kept: dict[str, Any] = {}
        for section, values in plain.items():
            if section in NOT_KEPT or section not in usual:
                continue
            differing = _differing(values, usual[section])
            if differing:
                kept[section] = differing
        for key, value in found.changes.items():
            section, name = key.rsplit(".", 1)
            kept.setdefault(section, {})[name] = value
        objective = self.config.search.objectives[0]
        head = (
            f"# {found.id} of the search {self.config.name}: {OBJECTIVES[objective].title.lower()} "
            f"{_short(found.values.get(objective)) or 'nothing'} on its validation pictures\n"
            "# python -m unimrg.train experiment=best.yaml\n"
        )
        return head + yaml.safe_dump(kept, sort_keys=False)

    def _write_page(self, running: bool) -> None:
        self.written = time.monotonic()
        page = search_page(
            title=self.config.name,
            config=redacted(self.config),
            objectives=list(self.config.search.objectives),
            trials=self.campaign.trials(),
            running=running,
            same=self.campaign.same,
            command=f"python -m unimrg.train experiment={self.folder / 'best.yaml'}",
        )
        (self.folder / "search.html").write_text(page, "utf-8")


def _differing(values: Any, usual: Any) -> dict[str, Any]:
    """Keys of nested sections whose values differ."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if inner := _differing(value, usual[key]):
                found[key] = inner
        elif value != usual[key]:
            found[key] = value
    return found


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
