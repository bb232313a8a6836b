"""The command ``meft-kernels``."""
