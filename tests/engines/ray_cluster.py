"""A Ray cluster of two machines, both of them this one."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

RAY_IS_MISSING = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no wheel here")


@contextlib.contextmanager
def two_machines() -> Iterator[Any]:
    """Return a `ray.cluster_utils.Cluster` of two nodes with one CPU each. The driver is not yet
    connected.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
