"""Starting Ray, or joining the cluster that is there.

`ray job submit` sets RAY_ADDRESS: then the running cluster is used as it is. Otherwise Ray is started on
this machine for this one command, without a dashboard, and its logs stay in its own folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unimrg.errors import UnimrgError, first_line

# A pipeline stage, two teachers and a trainer need room side by side; logical CPUs may exceed cores.
LAPTOP_CPUS = 8
OBJECT_STORE_BYTES = 512 << 20

ENVIRONMENT = {
    # Most S3-compatible stores refuse the SDKs' new trailing checksums, and Ray's processes write there too.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    # How long Ray Data keeps the share of a pipeline that died: three renewals, in place of three minutes in
    # which its successor might find no room.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
}
"""Of all processes of a command, wherever they run."""


@contextlib.contextmanager
def ray_session(cpus: int = LAPTOP_CPUS) -> Iterator[str]:
    """Ray for the duration of a command; yields where its logs are. Stops only what it started.

    cpus: logical ones, at least, of a Ray that is started on this machine.
    """
    if ray.is_initialized():
        yield "the running Ray session"
        return
    _quiet(cpus)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(log_to_driver=False, logging_level="error", runtime_env={"env_vars": ENVIRONMENT})
        except Exception as error:  # Ray raises several kinds; each means: no cluster there
            raise UnimrgError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}); "
                "unset it to run on this machine"
            ) from error
        logs = f"the cluster at {address}"
    else:
        context = ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="error",
        )
        logs = str(Path(context.address_info["session_dir"]) / "logs")
    try:
        yield logs
    finally:
        ray.shutdown()


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For actors that read what lies on this node's disk."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def node_resource() -> str:
    """The same as a resource, of which each node has its own."""
    mine = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == mine)
    return next(name for name in node["Resources"] if name.startswith("node:") and "internal" not in name)


def root_cause(error: BaseException) -> BaseException:
    """What failed inside a task or an actor, in the place of Ray's account of it in many lines."""
    while isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, UnimrgError):  # Ray Data adds lines of advice
        error.args = (first_line(error), *error.args[1:])
    return error


def gpus_of_cluster() -> int:
    """All GPUs that Ray knows of."""
    return int(ray.cluster_resources().get("GPU", 0))


def _quiet(cpus: int) -> None:
    """Settings Ray reads at start: fewer words on the terminal, faster polls than its defaults."""
    # Not at the top: workers import this module, and few of them need models.
    from transformers.utils.logging import disable_progress_bar

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one of Ray Tune can't be turned off
    # Teachers, trainer and pipelines are many processes; above four times this number Ray warns of them.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(3 * cpus // 4))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()  # one for every model that is loaded
    # What it logs as an error it raises too, and there it becomes one sentence.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
