"""Compile the Triton kernels without a GPU and report what each one takes of it.

``python -m benchmarks.aot`` prints a table (kernel, compute capability, threads, registers, spills, shared memory) and
exits with 1 if a kernel spills (but for ``KNOWN_SPILLS``). The figures are ptxas's own (its ``-v`` report), taken from
the run that makes the binary. ``--sample`` is what the tests compile: see :func:`sampled`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SAMPLED = (80, 86, 90, 100, 120)
"""What the tests compile for: sm_89 gives the figures of sm_86 in every row of the table."""
TABLE = Path(__file__).parent / "results" / "aot.txt"
NEAR = 0.75

_POINTERS = {"int32": "*i32", "fp32": "*fp32", "fp16": "*fp16", "bf16": "*i16"}  # bf16 travels as its bits
_FULL = ("stream", "branch", "center", "out", "value", "packed", "totals")


KNOWN_SPILLS = (
    "r=256 fp32 gelu q=10 odd",
    "r=256 fp32 gelu odd",
    "adapter_couple r=16 bf16 gelu float",
    "adapter_couple r=64 bf16 gelu float",
    "adapter_uncouple_backward r=256 bf16 gelu float",
)
"""Float32 at ranks above 128 in widths that are no multiple of 64: right, but slow. No tile was found that holds it.
And 8 or 16 bytes of the float streams' kernels on sm_90, which exact streams do not have.
"""


class Resources(NamedTuple):
    """What ptxas says that a kernel takes, per thread but for ``shared`` (bytes per block)."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        """Whether anything lives in local memory: spilled registers, or an array that found no registers at all."""
        return bool(self.stack or self.spill_stores or self.spill_loads)


class Case(NamedTuple):
    """One specialisation of one kernel."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    """Arguments that are multiples of 16."""
    options: dict[str, Any]


def parse_ptxas(log: str) -> Resources:
    """The figures of the only kernel in a ``ptxas -v`` log.

    Raises:
        ValueError: a figure is missing; a report that cannot be read must not pass for one without spills.
    """
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if frame is None or used is None:
        raise ValueError(f"not a ptxas report: {log!r}")
    return Resources(int(used[1]), int(frame[1]), int(frame[2]), int(frame[3]), 0)


def compile_case(case: Case, capability: int) -> Resources:
    """Compile for ``capability`` and read the resources. TRITON_CACHE_DIR must be fresh: a cache hit has no report."""
    import triton

    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(case.signature) if name in case.divisible
    }
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    source = triton.compiler.ASTSource(case.function, case.signature, case.constants, attributes)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=case.options)
    return parse_ptxas(log.getvalue())._replace(shared=compiled.metadata.shared)


def _case(name: str, function: Any, types: Mapping[str, str | None], constants: dict[str, Any], **options: Any) -> Case:
    """A case from the argument names of a coupling kernel; ``types`` maps the roles in _FULL to pointer types."""
    roles = dict(zip(function.arg_names, _FULL, strict=False))
    signature, fixed, divisible = {}, dict(constants), set()
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in roles:
            kind = types.get(roles[argument])
            signature[argument] = kind or "constexpr"
            if kind is None:
                fixed[argument] = None
            else:
                divisible.add(argument)
        elif argument.endswith("_stride"):
            signature[argument] = "i32"
            divisible.add(argument)
        elif argument in ("groups", "row_groups", "columns"):
            signature[argument] = "i32"  # never specialised, see do_not_specialize there
        elif argument == "first_row":
            signature[argument] = "i64"
        else:
            signature[argument] = "fp32"
    return Case(name, function, signature, fixed, frozenset(divisible), options)


def _adapter_case(
    name: str, function: Any, types: Mapping[str, str | None], constants: dict[str, Any], options: dict[str, Any]
) -> Case:
    """A case of an adapter kernel; ``types`` maps its pointers to their types, None where nothing is passed."""
    signature, fixed, divisible = {}, dict(constants), set()
    for argument in function.arg_names:
        if argument in types:
            signature[argument] = types[argument] or "constexpr"
            if types[argument] is None:
                fixed[argument] = None
            else:
                divisible.add(argument)
        elif argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_stride") or argument in ("columns", "size", "total"):
            signature[argument] = "i32"
            if constants.get("EVEN", True):
                divisible.add(argument)
        elif argument in ("rows", "split_rows", "seed", "threshold"):
            signature[argument] = "i64"  # never specialised
        else:
            signature[argument] = "i32" if argument == "splits" else "fp32"
    fixed = {argument: value for argument, value in fixed.items() if argument in function.arg_names}
    return Case(name, function, signature, fixed, frozenset(divisible), options)


def adapter_cases(*, representative: bool = False) -> Iterator[Case]:
    """The adapter kernels: every kind worth having, or those that need most registers and shared memory."""
    from meft_kernels.ops.adapter import triton_backward as backward
    from meft_kernels.ops.adapter import triton_forward as forward
    from meft_kernels.ops.adapter.triton_parts import padded_rank, tile_for
    from meft_kernels.ops.adapter.types import ACTIVATIONS
    from meft_kernels.ops.coupling.packing import remainder_bits

    # Full: all of gelu in fp32 and bf16; other activations, fp16 and rank 8 (padded to 16) where it could matter.
    kinds = [(rank, dtype, "gelu") for rank in (16, 64, 128, 256) for dtype in ("fp32", "bf16")]
    if not representative:
        kinds += [(8, "bf16", "gelu"), (8, "fp32", "gelu"), (64, "fp16", "gelu"), (256, "fp16", "gelu")]
        kinds += [(64, dtype, name) for dtype in ("fp32", "bf16") for name in ("gelu_tanh", "relu", "silu")]
    for rank, dtype, activation in kinds:
        pointer, main = _POINTERS[dtype], activation == "gelu" and rank != 8 and dtype != "fp16"
        tensors: dict[str, str | None] = dict.fromkeys(
            ("x", "down", "down_bias", "up", "up_bias", "dy", "z_rows", "d_pre_rows"), pointer
        )
        variants = [(True, 8, True)]  # exact, q, even
        if representative and rank == 64:
            variants.append((True, 10, False))
        if main and not representative:
            variants += [(True, 1, True), (False, 1, True), (True, 10, False)]
        for exact, q, even in variants:
            tile = tile_for(rank, 64 if even else 100, narrow=dtype != "fp32")
            constants = {
                "ACT": ACTIVATIONS[activation], "DROPOUT": q == 10 or not exact, "RANK": rank if even else rank - 1,
                "RANKS": padded_rank(rank), "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_H": tile.block_h,
                "EVEN": even, "EXACT": exact, "Q": q, "SIGN": 1, "BITS": remainder_bits(q), "RESIDUAL": q > 1,
                "LANE": True, "SKIP": q > 1,
            }  # fmt: skip
            stream = "*i32" if exact else pointer
            types: dict[str, str | None] = tensors | {"stream": stream, "out": stream, "value": pointer}
            types |= {"center": stream if q > 1 else None, "packed": "*u8" if q > 1 else None, "totals": "*i64"}
            types |= {"into": pointer, "dx": pointer}
            label = f"r={rank} {dtype} {activation} {f'q={q}' if exact else 'float'}{'' if even else ' odd'}"
            for inverse in (False, True):
                if inverse and representative and rank != 64:
                    continue
                name = f"adapter_{'un' if inverse else ''}couple {label}"
                fixed = constants | {"INVERSE": inverse}
                yield _adapter_case(name, forward.adapter_couple_kernel, types, fixed, tile.options())
            fixed = constants | {"INVERSE": True}
            name = f"adapter_uncouple_backward {label}"
            yield _adapter_case(name, backward.adapter_backward_kernel, types, fixed, tile.options())
            if exact and (q != 8 or (representative and rank == 64)):
                nothing = dict.fromkeys(("stream", "center", "out", "value", "packed", "totals"))
                alone = types | nothing
                fixed |= {"LANE": False}
                label = f"r={rank} {dtype} {activation}{'' if even else ' odd'}"
                name = f"adapter_backward {label}"
                yield _adapter_case(name, backward.adapter_backward_kernel, alone, fixed, tile.options())
                alone = tensors | {"residual": pointer, "out": pointer}
                yield _adapter_case(f"adapter {label}", forward.adapter_kernel, alone, fixed, tile.options())
        if main or representative:
            table = backward.WEIGHT_TILES_FP32 if dtype == "fp32" else backward.WEIGHT_TILES
            tile = table[rank]
            fixed = {"RANK": rank, "RANKS": rank, "BLOCK_M": tile.block_m, "BLOCK_H": tile.block_h}
            types = tensors | {"partial": "*fp32"}
            name = f"adapter_weights r={rank} {dtype}"
            yield _adapter_case(name, backward.adapter_weights_kernel, types, fixed, tile.options())
    types = {"partial": "*fp32", "out": "*i16"}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    yield _adapter_case("sum_splits", backward.sum_splits_kernel, types, {"BLOCK": backward.SUM_BLOCK}, options)


def _layouts(layout: str) -> dict[str, bool]:
    return {"FLAT": layout == "flat", "EVEN": layout != "odd"}


def coupling_cases(qs: tuple[int, ...] = (1, 8, 10, 256), *, representative: bool = False) -> Iterator[Case]:
    """The coupling kernels: every specialisation worth having, or a subset that holds one of each kind of code.

    Layouts: "flat" is what a model runs; "rows" a strided stream; "odd" a width that is no multiple of eight.
    """
    from meft_kernels.ops.coupling import triton as kernels
    from meft_kernels.ops.coupling.packing import remainder_bits

    block = max(size for _, size in kernels.BLOCKS)  # the larger tile needs more registers
    dtypes = ("bf16",) if representative else ("fp32", "fp16", "bf16")
    shapes = [("flat", True), ("odd", True)] if representative else [("flat", True), ("flat", False)]
    exact = {"couple_exact": kernels.couple_exact_kernel, "uncouple_exact": kernels.uncouple_exact_kernel}
    variants = [(q, dtype, layout, centred) for q in qs for dtype in dtypes for layout, centred in shapes]
    if representative:
        variants = [variant for variant in variants if variant[2] == "flat" or variant[0] == max(qs)]
    else:
        variants += [(10, "bf16", "rows", True), (10, "fp32", "odd", True)]
        variants += [(q, "bf16", "flat", True) for q in (3, 257, 65537, 2**31 - 1)]  # 2, 9, 17 and 31 planes
    for name, function in exact.items():
        for q, dtype, layout, centred in variants:
            pointer = _POINTERS[dtype]
            types = {"stream": "*i32", "branch": pointer, "center": "*i32" if centred else None, "out": "*i32"}
            types |= {"value": pointer, "packed": "*u8" if q > 1 else None, "totals": "*i64"}
            constants = {"Q": q, "SIGN": 1, "BITS": remainder_bits(q), "BLOCK": block, **_layouts(layout)}
            label = f"{name} q={q} {dtype} {layout}{' center' if centred else ''}"
            yield _case(label, function, types, constants, **kernels.OPTIONS)
    for inverse in (False, True):
        for dtype in dtypes:
            for layout, centred in shapes:
                pointer = _POINTERS[dtype]
                types = {"stream": pointer, "branch": pointer, "center": pointer if centred else None}
                types |= {"out": pointer, "value": pointer, "packed": None, "totals": "*i64"}
                constants = {"INVERSE": inverse, "BLOCK": block, **_layouts(layout)}
                name = "uncouple_float" if inverse else "couple_float"
                label = f"{name} {dtype} {layout}{' center' if centred else ''}"
                yield _case(label, kernels.float_kernel, types, constants, **kernels.OPTIONS)


def bound_of(threads: int) -> int:
    """Registers a thread of which two blocks fit into an SM, and no more than a thread can have."""
    return min(255, 65536 // (2 * threads))


def table(path: Path = TABLE) -> dict[str, dict[int, tuple[float, Resources]]]:
    """The last table: by case and capability, what share of its bound in registers a case takes, and its figures."""
    found: dict[str, dict[int, tuple[float, Resources]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        name, *figures = line.rsplit(maxsplit=5)
        capability, threads, registers, spilled, shared = map(int, figures)
        used = Resources(registers, 0, spilled, 0, shared)
        found.setdefault(name, {})[capability] = registers / bound_of(threads), used
    return found


def sampled(cases: Iterable[Case], capability: int) -> Iterator[Case]:
    """Of the representative cases those that might spill on this GPU, and two fifths of the others, in turn.

    From one GPU to the next a case's registers differ by a third, seldom by more. What stayed below ``NEAR`` of its
    bound on all of them in the last table is compiled for two of the five in ``SAMPLED``: a change of the code that
    takes it further shows there. What came nearer, whatever needs most of its kernel, and what the table does not have
    is compiled for each.
    """
    known = {name: max(share for share, _ in rows.values()) for name, rows in table().items()}
    most: dict[str, float] = {}
    cases = list(cases)
    for case in cases:
        kernel = case.name.split()[0]
        most[kernel] = max(most.get(kernel, 0.0), known.get(case.name, 0.0))
    for number, case in enumerate(cases):
        share = known.get(case.name, 1.0)
        turn = (SAMPLED[number % len(SAMPLED)], SAMPLED[(number + 2) % len(SAMPLED)])
        if share >= NEAR or share == most[case.name.split()[0]] or capability in turn:
            yield case


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if any kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--cc", type=int, nargs="+", default=list(CAPABILITIES), help="compute capabilities, as 90")
    parser.add_argument("--full", type=int, nargs="*", default=[90], help="those that get every specialisation")
    parser.add_argument("--full-adapters", type=int, nargs="*", default=[90], help="the same for the adapter kernels")
    parser.add_argument("--sample", action="store_true", help="leave out most of what is far from spilling")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    import triton

    spilled, rows = 0, []
    print(f"{'kernel':44} {'cc':>4} {'threads':>7} {'registers':>9} {'spill bytes':>11} {'shared':>7}")
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        for capability in options.cc:
            coupling = coupling_cases(representative=capability not in options.full)
            adapters = adapter_cases(representative=options.sample or capability not in options.full_adapters)
            if options.sample:
                adapters = sampled(adapters, capability)
                if capability not in options.full:  # those of every width and dtype are quick
                    coupling = sampled(coupling, capability)
            cases = itertools.chain(coupling, adapters)
            for case in cases:
                used = compile_case(case, capability)
                spilled += used.spills and not case.name.endswith(KNOWN_SPILLS)
                threads = 32 * case.options["num_warps"]
                rows.append({"kernel": case.name, "cc": capability, "threads": threads, **used._asdict()})
                spill = max(used.stack, used.spill_stores + used.spill_loads)
                print(
                    f"{case.name:44} {capability:4} {threads:7} {used.registers:9} {spill:11} {used.shared:7}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
