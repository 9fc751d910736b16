"""Watch a run on this machine: Prometheus, and Grafana with the dashboards where it is installed.

python -m cluster.monitoring                     a run started with metrics.port=9464, and Ray's own metrics
python -m cluster.monitoring --run head:9464     one elsewhere; --run may be given several times
python -m cluster.monitoring --write             the files of the project that are made from the tables
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from cluster.monitoring import PORT
from cluster.monitoring.documents import documents
from cluster.monitoring.server import HOST, RAY_DISCOVERY, Setup, grafana, prometheus
from unimrg.errors import UnimrgError


def main(argv: list[str] | None = None) -> int:
    """Runs until it is interrupted; 0, or 2 when something can be mended by the user."""
    args = _parser().parse_args(argv)
    if args.write:
        return write(Path.cwd())
    runs = args.run or [f"{HOST}:{PORT}"]
    setup = Setup(runs, str(Path(args.ray).absolute()), args.folder, args.port, args.grafana_port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        watch(setup)
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def write(root: Path) -> int:
    """Write the files that aren't current, and say which."""
    for path, text in documents(root).items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            print(path.relative_to(root))
    return 0


def watch(setup: Setup) -> None:
    """Both programs, until one of them ends. Raises UnimrgError."""
    with prometheus(setup) as first, grafana(setup) as second:
        print(f"Prometheus: http://{HOST}:{setup.port}/alerts")
        print(f"it reads {', '.join(setup.runs)}, and what {setup.ray} names")
        if second is None:
            print(f"no grafana on PATH; its dashboards are in {setup.folder / 'grafana' / 'dashboards'}")
        else:
            print(f"Grafana: http://{HOST}:{setup.grafana_port}/dashboards")
        print("Ctrl-C ends both; what was recorded stays in", setup.folder, flush=True)
        while first.poll() is None and (second is None or second.poll() is None):
            time.sleep(0.5)
        name = "grafana" if first.poll() is None else "prometheus"
    raise UnimrgError(f"{name} has ended by itself; {setup.folder / f'{name}.log'} says why")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--run", action="append", metavar="HOST:PORT", help=f"default {HOST}:{PORT}")
    add("--ray", default=RAY_DISCOVERY, help="a Ray cluster's discovery file; default %(default)s")
    add("--port", type=int, default=9090, help="of Prometheus; default %(default)s")
    add("--grafana-port", type=int, default=3000, help="of Grafana; default %(default)s")
    folder = Path("outputs/monitoring")
    add("--folder", type=Path, default=folder, help="for settings and data; default %(default)s")
    add("--write", action="store_true", help="write docs/metrics.md and the files of k8s/monitoring/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
