"""Throughput of the real command over a grid of settings: one JSON line a cell."""
