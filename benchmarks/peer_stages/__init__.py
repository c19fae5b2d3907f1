"""One file a stage of training: how ``ptl`` and its peer are run on the same rows, for ``python -m benchmarks.peers``.

A stage's module has

- ``PEER``: the other side's name, without its version, and the package that has it;
- ``PEER_PACKAGE``: the package whose version is recorded;
- ``add_arguments(parser)``: the options of the stage;
- ``make_spec(arguments, folder)``: what both sides are told, as a JSON object; rows and other inputs are written to
  ``folder``;
- ``run_ptl(spec)`` and ``run_peer(spec)``: one measured run each, called in a fresh process, giving a ``Measured``.
"""
