"""Less work for Triton's interpreter, where the checks run under it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _replace_the_language_once_a_launch() -> Iterator[None]:
    """Not again at each call of one jitted function by another.

    The interpreter puts its own functions into ``triton.language`` for a launch, and looks through all of it anew at
    every such call, to find nothing left to replace: 37 % of the time of the adapter's checks.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    seen: set[int] = set()  # modules of the functions called in this launch

    def replace_once(function: Any) -> Any:
        if id(function.__globals__) in seen:
            return None  # a function called by a kernel, for which nobody restores
        scope = replace(function)
        seen.add(id(function.__globals__))
        restore = scope.restore

        def restore_and_forget() -> None:
            seen.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", replace_once)
        yield
