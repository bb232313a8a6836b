"""Behind ``meft-kernels train``: settings from YAML, data, and a run of ``transformers.Trainer`` to resume."""
