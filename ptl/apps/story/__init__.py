"""``make story``: from a base model to a small assistant, each stage for real, on a CPU, and a page of what came of it.

``data`` takes rows out of packages, ``stages`` says what is done, ``running`` does it, ``page`` shows what came of it.
"""
