"""Results go to disk whole, and come back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from meft_kernels.comparison.records import Record, read_all

CPU = torch.device("cpu")


def test_round_trip(tmp_path):
    record = Record.now("step", {"model": "minilm"}, [{"seconds": 0.5}], CPU)
    record.write(tmp_path / "step" / "one.json")
    assert read_all(tmp_path) == [record]
    assert record.environment["torch"]
    assert "CPU" in record.environment["device"]
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["one.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"kind": "a"}', '{"kind": "a", "settings": {}, "figures": 1, "x": 2}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is no record"):
        read_all(tmp_path)


def test_the_command_can_be_typed_again(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text("from meft_kernels.comparison.records import command; print(command())")
    for arguments, expected in (
        ([str(script), "--a", "b c"], "measure.py --a 'b c'"),
        (["-m", "measure", "--a"], "python -m measure --a"),
    ):
        made = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert made.stdout.strip() == expected
