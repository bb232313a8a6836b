"""A kernel that must spill: eight thousand fp32 accumulators in one warp are 256 registers a thread, one too many."""

import tempfile

import triton
import triton.language as tl

from benchmarks.aot import Case, compile_case


@triton.jit
def spilling_kernel(source, target, steps, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.load(source + offsets)
    for step in range(steps):
        total = total * 2.0 + tl.load(source + step * BLOCK + offsets)
    tl.store(target + offsets, total)


if __name__ == "__main__":
    types = {"source": "*fp32", "target": "*fp32", "steps": "i32", "BLOCK": "constexpr"}
    case = Case("spilling", spilling_kernel, types, {"BLOCK": 8192}, frozenset(("source", "target")), {"num_warps": 1})
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        used = compile_case(case, 90)
    print(used)
    raise SystemExit(int(used.spills))
