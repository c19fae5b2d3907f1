"""What every stage of ``python -m benchmarks.peers`` is measured and compared with."""
