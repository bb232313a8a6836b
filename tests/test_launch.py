"""Scripts in forked processes: they have torchrun's variables, and what fails in one of them is told of."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from .launch import launch

SCRIPT = """
import os, sys, time
print(sys.argv[1], os.environ["RANK"], "of", os.environ["WORLD_SIZE"], __name__, flush=True)
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    raise ValueError("seen outside")
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "fail":
    time.sleep(200)  # as if it waited for the other
"""


@pytest.mark.slow
def test_what_comes_back(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert sorted(launch(2, script, "run").splitlines()) == ["run 0 of 2 __main__", "run 1 of 2 __main__"]
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="seen outside"):
        launch(2, script, "fail")
    assert time.monotonic() - begun < 100
    with pytest.raises(AssertionError, match="exit 0 of 1"):
        launch(1, script, "exit")
    assert "run 0 of 1" in launch(1, script, "run")
