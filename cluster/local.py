"""Command: a Ray cluster of several nodes on this machine, to try what a real one does.

    python -m cluster.local --nodes 3      prints where it is and how to submit; Ctrl-C takes it down
    python -m cluster.local --stop         the same from another terminal

Jobs need its token, as on a real cluster, since Ray's ports listen on all addresses of the machine. The head
runs none of a job's tasks, only its driver; every other node has the Ray label `node=1`, `node=2`, ….
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from unimrg.errors import UnimrgError, first_line

STATE, TOKEN = "cluster.json", "token"
OBJECT_STORE_BYTES = 256 << 20
STOP_SECONDS = "60"
"""What `ray job stop` waits for a run to save; Ray's own 3 s are the time of a step and a checkpoint."""


@dataclass(frozen=True)
class Process:
    """A process that isn't mistaken for a later one of the same number. started: seconds since 1970."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """It, if it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@dataclass(frozen=True)
class State:
    """What is known of a cluster.

    address: of its dashboard, for `ray job submit`; gcs: for `ray.init`; nodes: the processes of each, the
    head first.
    """

    address: str
    gcs: str
    token_file: str
    owner: Process
    nodes: list[list[Process]]

    def write(self, folder: Path) -> None:
        fresh = folder / f"{STATE}.new"
        fresh.write_text(json.dumps(asdict(self)))
        os.replace(fresh, folder / STATE)

    @classmethod
    def read(cls, folder: Path) -> State | None:
        try:
            stored = json.loads((folder / STATE).read_text())
        except FileNotFoundError:
            return None
        nodes = [[Process(**process) for process in node] for node in stored["nodes"]]
        return cls(**stored | {"owner": Process(**stored["owner"]), "nodes": nodes})

    def running(self) -> list[psutil.Process]:
        """What is left of it, its owner first."""
        every = [self.owner, *(process for node in self.nodes for process in node)]
        return [found for process in every if (found := process.find())]


def default_folder() -> Path:
    """Short, since sockets lie below it, and of this user alone."""
    return Path(tempfile.gettempdir()) / f"unimrg-{os.getuid()}"


def make_token(folder: Path) -> Path:
    """A file with a fresh token, for its owner's eyes only; Ray's processes and jobs read it."""
    path = folder / TOKEN
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def local_cluster(folder: Path, nodes: int, cpus: int) -> Iterator[State]:
    """A cluster with a token of its own. nodes: with the head; cpus: logical ones of each but the head.

    Raises UnimrgError when one is running in this folder already.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = State.read(folder)
    if before is not None and before.running():
        raise UnimrgError(f"a cluster runs in {folder} already; end it first: python -m cluster.local --stop")
    token = make_token(folder)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go before the file
    os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", STOP_SECONDS)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # `python` in a job is this one, also where its environment isn't activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    from ray.cluster_utils import Cluster  # Ray looks at the token when it is loaded

    cluster = Cluster(initialize_head=False)
    started: list[Any] = []
    dashboard = {"include_dashboard": True, "dashboard_port": _free_port(), "temp_dir": str(folder / "ray")}
    try:
        for number in range(nodes):
            more = {"labels": {"node": str(number)}} if number else dashboard
            # Nodes unpack a job's files over what is there; in one folder, under the feet of the others.
            own = f"runtime_resources_{number}"
            started.append(_add(cluster, cpus if number else 0, runtime_env_dir_name=own, **more))
            state = _state(started, str(token))
            state.write(folder)  # each time: so that --stop finds all that is there, whatever happens here
        yield state
    finally:
        cluster.shutdown()
        for name in (STATE, TOKEN):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "ray", ignore_errors=True)


def _add(cluster: Any, cpus: int, **more: Any) -> Any:
    try:
        return cluster.add_node(
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            dashboard_agent_listen_port=_free_port(),
            **more,
        )
    except Exception as error:  # of no kind of its own
        raise UnimrgError(f"a node didn't start: {first_line(error)} Is the machine too busy?") from error


def _state(nodes: list[Any], token: str) -> State:
    processes = [
        [Process.of(info.process.pid) for kind in node.all_processes.values() for info in kind]
        for node in nodes
    ]
    address = f"http://{nodes[0].webui_url}"
    return State(address, nodes[0].gcs_address, token, Process.of(os.getpid()), processes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(folder: Path, patience: float = 30.0) -> bool:
    """End the cluster of a folder, and nothing else; was there one?"""
    state = State.read(folder)
    if state is None or not (left := state.running()):
        return False
    if owner := state.owner.find():
        owner.terminate()
        psutil.wait_procs([owner], timeout=patience)
        left = state.running()
    for process in left:  # of an owner that was killed
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=patience)
    (folder / STATE).unlink(missing_ok=True)
    return True


def serve(folder: Path, nodes: int, cpus: int) -> None:
    """Hold the cluster until this process is told to end (SIGINT, SIGTERM)."""
    told = threading.Event()
    with local_cluster(folder, nodes, cpus) as state:
        for number in (signal.SIGINT, signal.SIGTERM):  # in the place of Ray's, which drains a single node
            signal.signal(number, lambda number, frame: told.set())
        print(
            f"{nodes} nodes are up, {cpus} logical CPUs on each but the head: {state.address}\n"
            f"    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={state.token_file}\n"
            f"    ray job submit --address {state.address} --working-dir . -- "
            "python -m unimrg.train cluster.workers=2\n"
            "Ctrl-C, or python -m cluster.local --stop, takes it down",
            flush=True,
        )
        told.wait()


def main(words: list[str]) -> int:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=description)
    parser.add_argument("--nodes", type=int, default=3, help="with the head (default: %(default)s)")
    parser.add_argument(
        "--cpus", type=int, default=8, help="logical ones of each but the head (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=default_folder(), help="for several at once")
    parser.add_argument("--stop", action="store_true", help="end the one that runs in this folder")
    options = parser.parse_args(words)
    if options.nodes < 2 or options.cpus < 1:
        parser.error("needs --nodes of 2 or more and --cpus of 1 or more")
    if options.stop:
        ended = stop(options.folder)
        print("stopped" if ended else f"no cluster runs in {options.folder}")
        return 0 if ended else 1
    try:
        serve(options.folder, options.nodes, options.cpus)
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while it starts
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
