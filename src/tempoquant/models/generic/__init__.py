"""A family for pipelines that no other family covers: what it must know is observed in a few calls, and stored."""
