"""Faster videos: attention kernels, step caches and compiled blocks, chosen together, reported, and
undone.
"""

from tempoquant.acceleration.accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
