"""The parts of ``ptl serve``."""
