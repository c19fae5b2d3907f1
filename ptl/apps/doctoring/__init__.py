"""The parts of ``ptl doctor``: facts of a machine, its speed, ranks that meet, and what is wrong with it all."""
