"""Commands of ``meft-kernels`` that are too long for ``cli.py``, and what commands share."""
