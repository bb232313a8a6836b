"""Run the tests of PEFT, accelerate and TRL, unchanged, on plain models and on patched ones.

``python -m benchmarks.peers`` clones the versions that our tests are pinned to; ``--source peft=PATH`` takes a checkout
that is @@ with 1 if a test passes plain, fails patched, and ``cases.py`` does not say why.

Each peer's tests run twice, in a process each: as they are, and with every model of a supported family patched
(``adapters="none"``: reversible, what the test trains is trained) as soon as it is loaded or wrapped by PEFT. Models,
tokenizers and data are tiny and made here, so that no hub is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cases import PEERS, Peer
from .hub import build

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TIMEOUT = 1800

Outcomes = dict[str, dict[str, Any]]


def _checkout(peer: Peer, given: dict[str, Path], folder: Path) -> Path:
    if peer.name in given:
        return given[peer.name].resolve()
    pinned = re.search(rf"\b{peer.name}==([\w.]+)", (ROOT / peer.pinned_in).read_text(encoding="utf-8"))
    if pinned is None:
        raise SystemExit(f"{peer.pinned_in} has no version of {peer.name}")
    to = folder / peer.name
    subprocess.run(
        ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{pinned[1]}", peer.repository, str(to)], check=True
    )
    return to


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _run(peer: Peer, checkout: Path, home: Path, patch: bool) -> dict[str, Any]:
    """What the plugin wrote.

    Raises:
        SystemExit: pytest did not get to the end.
    """
    out = home / f"{peer.name}-{'patched' if patch else 'plain'}.json"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.peers.plugin", "-p", "no:cacheprovider"]
    # Not the options of its own, some of which want other plugins; and newer dependencies deprecate what it uses.
    command += ["-o", "addopts=", "-W", "ignore::FutureWarning", "-q", "--tb=no", "--no-header", "--disable-warnings"]
    command += ["--peer", peer.name, "--outcomes", str(out), *(["--patch"] if patch else []), *peer.files]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout / peer.source), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode not in (0, 1):  # all passed, some failed
        raise SystemExit(
            f"pytest ended with {done.returncode} in {checkout}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        )
    return dict(json.loads(out.read_text(encoding="utf-8")))


def record(commit: str, plain: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a peer's two runs: one line a test.

    Raises:
        SystemExit: not the same tests ran.
    """
    if plain["tests"].keys() != patched["tests"].keys():
        raise SystemExit(f"{commit}: other tests ran plain than patched")
    tests = {
        name: {
            "plain": found["outcome"],
            "patched": patched["tests"][name]["outcome"],
            "models": patched["tests"][name]["models"],
            "passes": patched["tests"][name]["passes"],
            "why": (patched["tests"][name]["why"] or found["why"]).split("\n")[0][:160],
        }
        for name, found in plain["tests"].items()
    }
    return {"commit": commit, "left_out": plain["left_out"], "tests": tests}


def _text(kept: dict[str, Any]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(test)}" for name, test in kept["tests"].items()]
    head = "".join(f'"{key}": {json.dumps(kept[key])},\n' for key in ("commit", "left_out"))
    return "{\n" + head + '"tests": {\n' + ",\n".join(lines) + "\n}\n}\n"


def _differing(tests: Outcomes) -> list[str]:
    return [name for name, test in tests.items() if test["plain"] == "passed" and test["patched"] != "passed"]


def _unexplained(peer: Peer, tests: Outcomes) -> list[str]:
    return [
        f"{name}: {tests[name]['why']}"
        for name in _differing(tests)
        if peer.difference(name, tests[name]["why"]) is None
    ]


def _count(tests: Outcomes, run: str, outcome: str = "passed", having: str | None = None) -> int:
    return sum(test[run] == outcome and (having is None or test[having] > 0) for test in tests.values())


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _document(peers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Peers' own tests on patched models",
        "",
        "`python -m benchmarks.peers`; every test by name is in `peers/`. The last two columns: of the tests",
        'that pass patched (`adapters="none"`), in how many a model was, and in how many a backward pass rebuilt every',
        "stream and compared it with the forward's (in eval mode with a KV cache, which many tests use, activations",
        "are kept).",
        "",
        _row(
            "peer", "commit", "plain: passed", "failed", "skipped", "patched: passed", "with a patched model", "rebuilt"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, kept in peers.items():
        tests = kept["tests"]
        plain = [_count(tests, "plain", outcome) for outcome in ("passed", "failed", "skipped")]
        patched = [_count(tests, "patched", having=having) for having in (None, "models", "passes")]
        lines.append(_row(name, kept["commit"], *plain, *patched))
    lines += ["", "## Passed plain and not patched", "", _row("test", "says", "why"), "| --- | --- | --- |"]
    for name, kept in peers.items():
        for test in _differing(kept["tests"]):
            says = kept["tests"][test]["why"]
            known = PEERS[name].difference(test, says)
            why = known.why if known else "**not explained**"
            lines.append(_row(f"{name}: `{test.rpartition('::')[2]}`", known.error if known else says, why))
    lines += ["", "## Failed plain", "", _row("test", "says"), "| --- | --- |"]
    for name, kept in peers.items():
        failed = {test: found["why"] for test, found in kept["tests"].items() if found["plain"] == "failed"}
        lines += [_row(f"{name}: `{test.rpartition('::')[2]}`", why) for test, why in failed.items()]
    lines += ["", "## Not run, of the same files", "", _row("peer", "tests", "why"), "| --- | --- | --- |"]
    for name, kept in peers.items():
        lines += [_row(name, count, why) for why, count in sorted(kept["left_out"].items())]
    return "\n".join(lines) + "\n"


def write_document(results: Path = RESULTS) -> None:
    """``peers.md`` of the peers whose files are there."""
    files = {name: results / "peers" / f"{name}.json" for name in PEERS}
    kept = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    (results / "peers.md").write_text(_document(kept), encoding="utf-8")


def write_record(name: str, kept: dict[str, Any], results: Path = RESULTS) -> None:
    """One peer's file."""
    (results / "peers").mkdir(exist_ok=True)
    (results / "peers" / f"{name}.json").write_text(_text(kept), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run them; the exit status is 1 if there is a difference that nothing explains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--source", action="append", default=[], metavar="PEER=PATH", help="a checkout that is there")
    parser.add_argument("--only", choices=list(PEERS), help="one of them; of the others the table keeps what was")
    options = parser.parse_args(arguments)
    given = {name: Path(path) for name, _, path in (source.partition("=") for source in options.source)}
    if unknown := given.keys() - PEERS.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    unexplained: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [peer for peer in PEERS.values() if options.only in (None, peer.name)]
        checkouts = {peer.name: _checkout(peer, given, folder) for peer in chosen}
        templates = checkouts["trl"] / "trl" / "chat_templates" if "trl" in checkouts else None
        build(folder / "home", templates)
        for peer in chosen:
            start = time.perf_counter()
            checkout = checkouts[peer.name]
            plain, patched = (_run(peer, checkout, folder / "home", patch) for patch in (False, True))
            kept = record(_commit(checkout), plain, patched)
            write_record(peer.name, kept)
            tests, differ = kept["tests"], _unexplained(peer, kept["tests"])
            unexplained += differ
            counts = f"{_count(tests, 'plain')} passed plain, {_count(tests, 'patched')} patched"
            print(f"{time.perf_counter() - start:5.0f} s  {peer.name}: {counts}", *differ, sep="\n    ", flush=True)
    write_document()
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
