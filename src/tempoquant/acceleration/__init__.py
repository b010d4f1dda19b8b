"""A whole video fast: attention kernels, caches of steps and compiled blocks, chosen together, said, and undone."""

from tempoquant.acceleration.accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
