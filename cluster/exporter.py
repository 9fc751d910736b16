"""Where Prometheus reads the figures of the runs of one command: `http://<head>:<metrics.port>/metrics`.

One small actor per command, on the head of the cluster, whose pods or address Prometheus knows. Monitors send
it what they count (`unimrg.figures`), so figures stay there between two scrapes, when workers die, and when a
monitor ends: a search has one exporter, and a monitor for every trial. It leaves with its command, but not
before how that ended was read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import ray
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from unimrg.config import MetricsConfig
from unimrg.errors import ConfigError
from unimrg.figures import BY_NAME, ENDED, RUN, STATES

STATE = BY_NAME["unimrg_run_state"]
KEEP_SECONDS = 300.0
"""How long the figures of a run that has ended stay: trials of a search would pile up."""

PORT_SECONDS = 10.0
"""How long a port may be taken before that is told: by the exporter of a command that was just ended."""

SCRAPE_SECONDS = 20.0
"""How long the exporter waits for a last scrape, if there ever was one."""


class Exporter(Collector):
    """The actor. Every run is shown under its name, in the label `run`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, list[Family]] = {}
        self._states: dict[str, str] = {}
        self._ended: dict[str, float] = {}
        self._scraped = threading.Event()
        self._ever_scraped = False

    def serve(self, port: int, address: str) -> str:
        """Listen; returns why that can't be, or ""."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        deadline = time.monotonic() + PORT_SECONDS
        while True:
            try:
                self._server = start_http_server(port, address, registry)[0]
                return ""
            except OSError as error:
                if time.monotonic() > deadline:
                    return str(error.strerror or error)
                time.sleep(0.5)

    def enter(self, run: str, state: str) -> None:
        """A run is in that state now, one of STATES."""
        with self._lock:
            self._states[run] = state
            self._ended.pop(run, None)
            if state in ENDED:
                self._ended[run] = time.monotonic()
            self._scraped.clear()

    def show(self, run: str, families: list[Family]) -> None:
        """The figures of a run, in the place of those before."""
        with self._lock:
            self._families[run] = families

    def collect(self) -> Iterator[Family]:
        """Called for every scrape."""
        with self._lock:
            self._forget()
            yield _state_family(self._states)
            yield from _joined(self._families.values())
            self._ever_scraped = True
            self._scraped.set()

    def leave(self) -> None:
        """Return when Prometheus has read the last states, soon if it never reads any."""
        if self._ever_scraped:
            self._scraped.wait(SCRAPE_SECONDS)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _forget(self) -> None:
        for run, when in list(self._ended.items()):
            if time.monotonic() - when > KEEP_SECONDS:
                del self._ended[run], self._states[run]
                self._families.pop(run, None)


def _state_family(states: dict[str, str]) -> Family:
    family = GaugeMetricFamily(STATE.name, STATE.help, labels=[RUN, STATE.label])
    for run, now in states.items():
        for state in STATES:
            family.add_metric([run, state], float(state == now))
    return family


def _joined(runs: Iterable[list[Family]]) -> Iterator[Family]:
    """Families of several runs, each once with the samples of all."""
    joined: dict[str, Family] = {}
    for families in runs:
        for family in families:
            if family.name not in joined:
                joined[family.name] = Family(family.name, family.documentation, family.type)
            joined[family.name].samples.extend(family.samples)
    yield from joined.values()


class Outlet:
    """A command's way to its exporter, for the driver and for monitors; to nowhere where there is none."""

    def __init__(self, actor: Any = None) -> None:
        self._actor = actor

    def enter(self, run: str, state: str) -> None:
        """See `Exporter.enter`."""
        if self._actor is not None:
            self._actor.enter.remote(run, state)

    def show(self, run: str, families: Iterable[Family]) -> None:
        """See `Exporter.show`; doesn't wait."""
        if self._actor is not None:
            self._actor.show.remote(run, list(families))


@contextlib.contextmanager
def exporting(config: MetricsConfig, run: str, state: str = "starting") -> Iterator[Outlet]:
    """The exporter of a command for `run`, which begins in `state`.

    It has failed if an error comes through, and is paused if somebody ends it. Whoever ends it well says how:
    `outlet.enter(run, "done")`. Raises ConfigError when the port is taken.
    """
    if not config.port:
        yield Outlet()
        return
    # The head is where a scrape can be told to look; only it has this resource.
    actor = ray.remote(Exporter).options(num_cpus=0, resources={"node:__internal_head__": 0.001}).remote()
    failure = ray.get(actor.serve.remote(config.port, config.address))
    if failure:
        raise ConfigError(
            f"metrics.port: can't listen at {config.address}:{config.port} ({failure}); is another run "
            "there? give another port, or 0 to show nothing"
        )
    outlet = Outlet(actor)
    outlet.enter(run, state)
    try:
        yield outlet
    except Exception:
        outlet.enter(run, "failed")
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        outlet.enter(run, "paused")
        raise
    finally:
        ray.get(actor.leave.remote())
        ray.kill(actor)
