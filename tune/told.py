"""What Prometheus is shown of a search: its trials by state, and the best of them (`unimrg.figures`)."""

from __future__ import annotations

from collections import Counter

from cluster.monitor import Show
from tune.analysis import best
from tune.campaign import Campaign
from tune.records import SEARCHED, Trial
from unimrg.figures import BY_NAME, Figures


class Told:
    """The figures of one search."""

    def __init__(self, show: Show) -> None:
        self.shown, self.figures = show, Figures(show.name)

    def finished(self, trial: Trial) -> None:
        """A trial has ended."""
        self.figures.observe("unimrg_trial_seconds", trial.seconds)

    def now(self, campaign: Campaign, running: int) -> None:
        """How the search stands, with so many trials running."""
        states = Counter(trial.state for trial in campaign.finished.values()) + Counter(running=running)
        for state in BY_NAME["unimrg_trials"].values:
            self.figures.set("unimrg_trials", states[state], state)
        objective = campaign.config.search.objectives[0]
        found = best(campaign.trials(SEARCHED), objective)
        if found is not None:
            self.figures.set("unimrg_best_objective", found.values[objective])
        self.shown.outlet.show(self.shown.name, self.figures.collect())
