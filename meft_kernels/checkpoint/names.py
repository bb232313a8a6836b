"""Names of tensors, as files have them."""

from __future__ import annotations

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile and others put into the names of what they wrap."""


def plain_name(name: str) -> str:
    """A tensor's name without those of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
