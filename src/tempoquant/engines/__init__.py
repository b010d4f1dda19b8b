"""Where work runs: in this process, in one process per device, or on a Ray cluster. Nothing in here knows what the work
is: whoever has some writes a `Stage`, opens a crew with an `Engine`, and has it run the stage's items."""

from tempoquant.engines.crew import Crew
from tempoquant.engines.engine import Engine, Local, RayCluster
from tempoquant.engines.stage import Stage

__all__ = ["Crew", "Engine", "Local", "RayCluster", "Stage"]
