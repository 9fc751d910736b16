"""Test the paper's claim on a small model: equal questions and steps, with and without drawings.

python -m unimrg.reproduce size=laptop
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

from unimrg.reproduce.config import ReproduceConfig

DESCRIPTION = """Does drawing an image, its depth and its boundaries help a model to answer questions about it
(UniMRG, arXiv 2601.21406)? One small model that answers and draws is post-trained in several ways on the same
questions; controls draw other pictures, or answer for longer. Prints a table; whatever comes out is reported.
Finished trials are kept: the same command goes on where it was stopped."""
EXAMPLES = (
    "python -m unimrg.reproduce size=laptop",
    "python -m unimrg.reproduce size=laptop name=scarce pictures=300 extra_pictures=4000",
    "python -m unimrg.reproduce size=laptop name=weak pixel=0.1 depth=0.1 segmentation=0.1",
)


def main(config: ReproduceConfig) -> int:
    """Run what is missing, then print and write the results."""
    from unimrg.reproduce.analysis import looking, outcome, table, text
    from unimrg.reproduce.page import write_page
    from unimrg.reproduce.runs import results

    found = results(config)
    folder = Path(config.storage_path) / config.name
    command = shlex.join(["python", "-m", "unimrg.reproduce", *sys.argv[1:]])
    rows = table(found, config.arms)
    said = [outcome(found), looking(found)]
    facts = {"command": command, "outcome": said, "table": rows, "settings": asdict(config), "trials": found}
    (folder / "results.json").write_text(json.dumps(facts | _about(config)))
    write_page(folder / "report.html", config, found, command)
    print("\n".join([text(rows), *filter(None, said), str(folder / "report.html")]))
    return 0


def _about(config: ReproduceConfig) -> dict[str, str]:
    import torch

    from unimrg.hardware import device_name

    return {
        "torch": torch.__version__,
        "device": device_name(config.device),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    from unimrg.compose import run_command

    sys.exit(run_command(main, "reproduce", ReproduceConfig, DESCRIPTION, EXAMPLES))
