"""What Prometheus is shown of a search: its trials by state, and the best of them (`unimrg.figures`)."""

from __future__ import annotations

from collections import Counter

from cluster.monitor import Show
from tune.analysis import best
from tune.campaign import Campaign
from tune.records import SEARCHED
from unimrg.figures import BY_NAME, Figures


def tell(show: Show, campaign: Campaign, running: int) -> None:
    """How a search stands, with so many trials running; made anew from all finished trials each time."""
    figures = Figures(show.name)
    states = Counter(trial.state for trial in campaign.finished.values())
    states["running"] = running
    for state in BY_NAME["unimrg_trials"].values:
        figures.set("unimrg_trials", states[state], state)
    for trial in campaign.finished.values():
        figures.observe("unimrg_trial_seconds", trial.seconds)
    objective = campaign.config.search.objectives[0]
    found = best(campaign.trials(SEARCHED), objective)
    if found is not None:
        figures.set("unimrg_best_objective", found.values[objective])
    show.outlet.show(show.name, figures.collect())
