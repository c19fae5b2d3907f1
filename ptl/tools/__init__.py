"""Tools that a model may call: what they are, how a call is read and run, and the loop around it; ``docs/tools.md``."""
