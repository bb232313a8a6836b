"""Behind ``meft-kernels predict`` and ``generate``: what a run left, asked about texts."""
