"""Search the weights of the tasks: for a model and its data, what should each drawing count?

python tune/search.py                                         # the tiny model on procedural scenes
python tune/search.py search.strategies=[tpe,equal] search.trials=32 data=llava data.manifest=s3://bucket/mix.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, Python looks for modules beside it, and not in its project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tune.config import SearchConfig
from unimrg.compose import compose, run_command
from unimrg.config import RunConfig


def main(config: SearchConfig) -> int:
    """Hand the search to Ray."""
    from tune.driver import run

    return run(config, compose("train", [], RunConfig))


if __name__ == "__main__":
    sys.exit(
        run_command(
            main,
            "search",
            SearchConfig,
            "Search the weights of the tasks, and judge what was found against tuned equal weights.",
            [
                "python tune/search.py",
                "python tune/search.py search.trials=16 search.space.learning_rate=[3e-4,3e-3]",
                "python tune/search.py search.objectives=[accuracy,samples_per_second] "
                "search.strategies=[nsga2,random]",
            ],
        )
    )
