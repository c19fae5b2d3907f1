"""One module or package a stage of training: how ``ptl`` and its peer are run on the same rows.

``python -m benchmarks.peers --stage NAME`` finds a stage by its name here and calls

- ``PEER``: the other side's name, without its version, and ``PEER_PACKAGE``, the package that has it;
- ``add_arguments(parser)``: the options of the stage;
- ``make_spec(arguments, folder)``: what both sides are told, as a JSON object; rows and other inputs are written to
  ``folder``;
- ``run_ptl(spec)`` and ``run_peer(spec)``: one measured run each, called in a fresh process, giving a ``Measured``.
"""
