"""Adapters on disk: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT has it."""
