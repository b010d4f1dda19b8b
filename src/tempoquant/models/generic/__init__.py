"""A family for pipelines that no other family covers: its facts are observed in a few calls, and
stored.
"""
