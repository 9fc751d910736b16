"""Write the report of a run and print where it lies: `python -m unimrg.report outputs/first`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unimrg.errors import UnimrgError
from unimrg.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m unimrg.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the run, e.g. outputs/first")
    try:
        print(write_report(parser.parse_args().folder))
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
