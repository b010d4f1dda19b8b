"""Engines: work runs in this process, in one process per device, or on a Ray cluster.

No module here knows the work itself: a caller writes a `Stage`, opens a crew with an `Engine`, and
lets it run the stage's items.
"""

from tempoquant.engines.crew import Crew
from tempoquant.engines.engine import Engine, Local, RayCluster
from tempoquant.engines.stage import Stage

__all__ = ["Crew", "Engine", "Local", "RayCluster", "Stage"]
