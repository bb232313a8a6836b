"""The pages under docs/ speak of messages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import meft_kernels

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def messages_in_source() -> str:
    """All source, with string literals that are continued on the next line made one, and placeholders left out."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "meft_kernels").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_message_of_ours_is_in_the_source() -> None:
    source = messages_in_source()
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    for row in rows:
        cell = row.split(" | ")[0]
        if any(theirs in cell for theirs in ("(torch's)", "(PEFT's)", "transformers')")):
            continue
        for fragment in re.findall(r"`([^`]+)`", cell):
            pieces = fragment.replace("adapter_config.json", "{path.name}")
            assert fragment in source or pieces in source, fragment


def test_every_error_is_told_of() -> None:
    errors = [
        name
        for name in meft_kernels.__all__
        if isinstance(found := getattr(meft_kernels, name), type) and issubclass(found, meft_kernels.MeftError)
    ]
    assert len(errors) > 6
    assert not [name for name in errors if name not in PAGE]


def test_links_lead_somewhere() -> None:
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    named = re.findall(r"^::: meft_kernels\.[\w.]*?(\w+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(set(meft_kernels.__all__) - {"ops"})
