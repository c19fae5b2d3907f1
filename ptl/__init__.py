"""Distributed post-training of language models on PyTorch Lightning and DeepSpeed.

The package imports nothing at start-up, so that light commands answer at once; import from the rooms:
``ptl.objectives.sft.SFT``, ``ptl.data.module.ChatDataModule``, ``ptl.models.spec.ModelSpec``.
"""
