"""Evaluations as one HTML page that opens from disk."""
