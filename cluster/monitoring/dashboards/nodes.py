"""Cluster: nodes, GPUs and Ray, by Ray's own metrics."""

from __future__ import annotations

from typing import Any

from cluster.monitoring.panels import Panel, Row, dashboard
from cluster.monitoring.queries import CLUSTER, CLUSTER_NAMESPACE, CLUSTERS, FIRING


def cluster() -> dict[str, Any]:
    """Nodes, GPUs and Ray itself, by Ray's own metrics."""

    def node(name: str, function: str = "max") -> str:
        return f"{function} by (ip) ({name}{CLUSTERS})"

    head = '{namespace=~"$namespace", ray_io_cluster=~"$ray_io_cluster", IsHeadNode="true"}'
    spilled = '{namespace=~"$namespace", ray_io_cluster=~"$ray_io_cluster", Location="SPILLED"}'
    nodes = Row(
        "Nodes",
        [
            Panel(
                "Nodes",
                [
                    (
                        f"sum by (ray_io_cluster) (ray_cluster_active_nodes{CLUSTERS})",
                        "{{ray_io_cluster}} active",
                    )
                ],
                "nodes that Ray counts as alive",
            ),
            Panel(
                "Memory of the head",
                [
                    (
                        f"max by (ray_io_cluster) (ray_node_mem_used{head}) / "
                        f"max by (ray_io_cluster) (ray_node_mem_total{head})",
                        "{{ray_io_cluster}} used",
                    )
                ],
                "when the head dies, the run does",
                "percentunit",
                high=1,
            ),
            FIRING,
            Panel(
                "CPU",
                [(node("ray_node_cpu_utilization"), "{{ip}}")],
                "load of each node",
                "percent",
                high=100,
            ),
            Panel(
                "Memory",
                [(f"{node('ray_node_mem_used')} / {node('ray_node_mem_total')}", "{{ip}}")],
                "memory of each node in use",
                "percentunit",
                high=1,
            ),
            Panel(
                "Disk",
                [(node("ray_node_disk_utilization_percentage"), "{{ip}}")],
                "disk of each node in use; spilled objects lie there",
                "percent",
                high=100,
            ),
            Panel(
                "Network",
                [
                    (node("ray_node_network_receive_speed"), "{{ip}} in"),
                    (node("ray_node_network_send_speed"), "{{ip}} out"),
                ],
                "bytes that each node receives and sends, a second",
                "Bps",
                width=24,
            ),
        ],
    )
    gpus = Row(
        "GPUs",
        [
            Panel(
                "GPU",
                [(node("ray_node_gpus_utilization", "avg"), "{{ip}}")],
                "mean load of the GPUs of each node",
                "percent",
                width=12,
                high=100,
            ),
            Panel(
                "GPU memory",
                [(node("ray_node_gram_used", "sum"), "{{ip}}")],
                "memory in use on the GPUs of each node",
                "decmbytes",
                width=12,
            ),
        ],
    )
    ray = Row(
        "Ray",
        [
            Panel(
                "Object store",
                [(f"sum by (Location) (ray_object_store_memory{CLUSTERS})", "{{Location}}")],
                "bytes of objects, by where they lie",
                "bytes",
            ),
            Panel(
                "Spilled to disk",
                [(f"sum by (NodeAddress) (ray_object_store_memory{spilled})", "{{NodeAddress}}")],
                "objects that had no room in memory",
                "bytes",
            ),
            Panel(
                "Logical resources in use",
                [
                    (
                        "sum by (Name) (ray_resources"
                        '{namespace=~"$namespace", ray_io_cluster=~"$ray_io_cluster", State="USED", '
                        'Name=~"CPU|GPU"})',
                        "{{Name}}",
                    )
                ],
                "CPUs and GPUs that Ray has given away",
            ),
            Panel(
                "Actors",
                [(f"sum by (State) (ray_actors{CLUSTERS})", "{{State}}")],
                "Ray's actors by state; pending ones have no room",
                width=12,
            ),
            Panel(
                "Tasks",
                [(f"sum by (State) (ray_tasks{CLUSTERS})", "{{State}}")],
                "Ray's tasks by state",
                width=12,
            ),
        ],
    )
    return dashboard(
        "unimrg-cluster",
        "unimrg: cluster",
        "Nodes, GPUs and Ray under the runs.",
        [CLUSTER_NAMESPACE, CLUSTER],
        [nodes, gpus, ray],
    )
