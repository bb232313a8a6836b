"""The ways in which the engine is broken, each a small change of its source.

Each text must occur exactly once in its file, so that a case which no longer fits the source fails loudly.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One way to break it."""

    broken: str
    """What is wrong then."""
    path: str
    """File below ``meft_kernels``."""
    old: str
    new: str
    tests: tuple[str, ...]
    """What pytest is given, below ``tests``; the first failure ends it."""
    interpreted: bool = False
    """Whether Triton's interpreter runs the kernels."""


_CHECKSUM = "ops/coupling/checksum.py"
_REFERENCE = "ops/coupling/reference.py"
_LANE, _STEP, _CALL, _TAPE = "engine/lane.py", "engine/step.py", "engine/call.py", "engine/tape.py"
_KERNELS = ("isolated/check_coupling.py", "-k", "every_shape")

STREAMS = (
    Mutation(
        "the inverse forgets the remainder",
        _REFERENCE,
        "d.add_(unpack(remainder, q, d.shape))",
        "unpack(remainder, q, d.shape)",
        ("test_coupling_reference.py",),
    ),
    Mutation(
        "division rounds towards zero",
        _REFERENCE,
        'rounding_mode="floor"',
        'rounding_mode="trunc"',
        ("test_coupling_reference.py",),
    ),
    Mutation(
        "the lane's sign is lost",
        _REFERENCE,
        "y.add_(d, alpha=sign)",
        "y.add_(d)",
        ("test_coupling_reference.py",),
    ),
    Mutation(
        "the branch is cut off and not rounded",
        _REFERENCE,
        "scaled.round_().to(torch.int32), status",
        "scaled.to(torch.int32), status",
        ("test_coupling_reference.py",),
    ),
    Mutation(
        "a stream that leaves its range is not flagged",
        _REFERENCE,
        "status = status | _range_status(y)",
        "pass",
        ("test_coupling_reference.py",),
    ),
    Mutation(
        "packed remainders lose their upper parts",
        "ops/coupling/packing.py",
        "remainder | (part << (8 * (plane // 8)))",
        "remainder",
        ("test_coupling_reference.py",),
    ),
    Mutation(
        "overflow is ignored",
        _TAPE,
        "if status & ops.OVERFLOW:",
        "if False:",
        ("test_detection.py",),
    ),
    Mutation(
        "NaN is ignored",
        _TAPE,
        "if status & ops.NON_FINITE:",
        "if False:",
        ("test_detection.py",),
    ),
    Mutation(
        "streams are read out the wrong way round",
        _TAPE,
        "zip(self.readout, (self.x1, self.x2), strict=True)",
        "zip(self.readout, (self.x2, self.x1), strict=True)",
        ("test_engine.py", "-k", "start_is_kept"),
    ),
    Mutation(
        "streams are not dense",
        "engine/arithmetic.py",
        "ops.quantise(hidden_states.contiguous(), self.fraction_bits)",
        "ops.quantise(hidden_states, self.fraction_bits)",
        ("test_precision.py", "scenarios/test_transposed_states.py"),
    ),
)

CHECKSUMS = (
    Mutation(
        "rows weigh alike in the checksum",
        _CHECKSUM,
        "sums.mul_(weights(~first_row, ~(first_row + rows), stream.device)).sum()",
        "sums.sum()",
        ("test_checksum.py",),
    ),
    Mutation(
        "columns weigh alike in the checksum",
        _CHECKSUM,
        "sums = _line_sums(lines, weights(0, columns, stream.device))",
        "sums = lines.sum(1)",
        ("test_checksum.py",),
    ),
    Mutation(
        "rows and columns have the same weights",
        _CHECKSUM,
        "weights(~first_row, ~(first_row + rows), stream.device)",
        "weights(first_row, first_row + rows, stream.device)",
        ("test_checksum.py",),
    ),
    Mutation(
        "a tile counts as the first one",
        "engine/tiles.py",
        "return self.texts.start * shape[1] + self.tokens.start",
        "return 0",
        ("test_checksum.py",),
    ),
    Mutation(
        "a lane's checksum is not compared",
        _LANE,
        "        tape.comparisons.append((self.branch.where, checksum, self.checksum))\n",
        "",
        ("test_detection.py",),
    ),
    Mutation(
        "checksums are not looked at after backward",
        _STEP,
        "        tape.check_after_backward()\n",
        "",
        ("test_detection.py",),
    ),
    Mutation(
        "check='layer' does nothing",
        _TAPE,
        "        if self.check_layers:\n            self._compare()\n        elif",
        "        if",
        ("test_checks.py",),
    ),
    Mutation(
        "other processes get the gradients of a layer that did not repeat",
        _TAPE,
        "            self._mark(inputs, gradients)\n",
        "            pass\n",
        ("test_distributed.py", "-k", "does_not_repeat"),
    ),
    Mutation(
        "kernels: rows weigh alike in the checksum",
        "ops/kernel_parts.py",
        "return sums * place_weight(~row)",
        "return sums",
        _KERNELS,
        interpreted=True,
    ),
    Mutation(
        "kernels: a tile counts as the first one",
        "ops/coupling/triton.py",
        "checksums(old, first_row + row, column)",
        "checksums(old, row, column)",
        _KERNELS,
        interpreted=True,
    ),
    Mutation(
        "kernels: a stream that leaves its range is not flagged",
        "ops/coupling/triton.py",
        "status = tl.where((new <= -LIMIT) | (new >= LIMIT), status | OVERFLOW_FLAG, status)",
        "status = status",
        ("isolated/check_coupling.py", "-k", "status_of_the_sum"),
        interpreted=True,
    ),
)

RECOMPUTES = (
    Mutation(
        "a recompute takes rows in another order",
        _LANE,
        "self.branch.whole(no_leaf(leaf))",
        "self.branch.whole(no_leaf(leaf.roll(1, 1)))",
        ("test_engine.py", "-k", "exact_rebuild"),
    ),
    Mutation(
        "a recompute draws other random numbers",
        "engine/replay.py",
        "torch.default_generator.manual_seed(self._seed)",
        "torch.default_generator.seed()",
        ("test_engine.py", "-k", "dropout or generator"),
    ),
    Mutation(
        "a recompute disturbs the user's random numbers",
        "engine/replay.py",
        "            generator.set_state(state)",
        "            pass",
        ("test_engine.py", "-k", "dropout or generator"),
    ),
    Mutation(
        "all tiles draw the same random numbers",
        "engine/branch.py",
        " + (kind << 60) + (number << 40)",
        "",
        ("test_random_numbers.py",),
    ),
    Mutation(
        "both lanes draw the same random numbers",
        "engine/branch.py",
        ' + (self.lane.name == "G")',
        "",
        ("test_random_numbers.py",),
    ),
    Mutation(
        "all layers draw the same random numbers",
        "engine/branch.py",
        "base + 2 * self.call.place",
        "base",
        ("test_random_numbers.py",),
    ),
    Mutation(
        "autocast is not restored",
        _CALL,
        "self.tape.autocast.restored(), torch.enable_grad():",
        "torch.enable_grad():",
        ("test_precision.py",),
    ),
    Mutation(
        "a recompute leaves the adapters out under disable_adapter",
        _CALL,
        "self.layer.with_adapters(), ",
        "",
        ("test_engine.py", "-k", "disable_adapter"),
    ),
    Mutation(
        "layers are given leaves, which autocast takes for weights",
        "engine/replay.py",
        "return tensor.view_as(tensor)",
        "return tensor",
        ("test_precision.py",),
    ),
    Mutation(
        "a recompute appends to the KV cache",
        "engine/arguments.py",
        'if name not in caches and name != "use_cache"}',
        'if name != "no"}',
        ("test_engine.py", "-k", "cache"),
    ),
    Mutation(
        "calibration fills the user's KV cache",
        "engine/calibration.py",
        "caches = copies_of_caches(named)",
        "caches: dict[str, Any] = {}",
        ("test_verify.py",),
    ),
    Mutation(
        "a host buffer is written to again while it is needed",
        "engine/remainders.py",
        "weakref.finalize(self, memory.give_back, buffer).atexit = False",
        "memory.give_back(buffer)",
        ("test_host_remainders.py",),
    ),
    Mutation(
        "the FFN's tap stays where it was put first",
        "engine/adapters.py",
        "return tapped is not None and tapped[0] is reads and tapped[1] is writes",
        "return tapped is not None",
        ("architectures/test_trainable.py", "-k", "merge"),
    ),
    Mutation(
        "what the FFN read outlives an error",
        "engine/adapters.py",
        '        """Drop what was read and not written, because a module in between failed."""\n'
        "        self._pending.hidden_states = None",
        '        """Drop what was read and not written, because a module in between failed."""',
        ("architectures/test_quirks.py", "-k", "failure"),
    ),
)

GRADIENTS = (
    Mutation(
        "the second gradient of a tensor is left out",
        _CALL,
        "gradient if held is None else held + gradient",
        "gradient if held is None else held",
        ("test_tiles.py", "-k", "lora or half"),
    ),
    Mutation(
        "the leak's gradient has the wrong sign",
        _LANE,
        "target.sub_(tile.of(given.dy) * self.lane.coefficient)",
        "target.add_(tile.of(given.dy) * self.lane.coefficient)",
        ("test_engine.py", "-k", "exact_rebuild"),
    ),
    Mutation(
        "the leak's gradient has the wrong sign beside a fused adapter",
        _LANE,
        "given.d_center.sub_(given.dy * lane.coefficient)",
        "given.d_center.add_(given.dy * lane.coefficient)",
        ("isolated/check_engine.py", "-k", "oracle or equals_torch"),
        interpreted=True,
    ),
    Mutation(
        "a lane's coefficient is left out of its stream's gradient",
        _STEP,
        "if coefficient != 1:",
        "if False:",
        ("test_engine.py", "-k", "exact_rebuild"),
    ),
    Mutation(
        "a tile's gradient goes to the first tile's rows",
        _LANE,
        "            elif given.wants_center:\n                self._add(tile, given, found[0])",
        "            elif given.wants_center:\n                self._add(self.branch.tiles[0], given, found[0])",
        ("test_tiles.py", "-k", "half_precision and meft3"),
    ),
    Mutation(
        "attention in pieces drops the gradient beside it",
        _LANE,
        "tile.of(given.d_center).add_(dx[0])",
        "pass",
        ("test_tiles.py", "-k", "half_precision and everything"),
    ),
    Mutation(
        "a gradient that somebody else holds is written to",
        "engine/gradients.py",
        "return alone is not None and _holders(tensor) == alone",
        "return True",
        ("test_stream_gradients.py", "-k", "hook"),
    ),
    Mutation(
        "a gradient that is not ours is written to",
        _STEP,
        "if not owns_center:",
        "if False:",
        ("test_stream_gradients.py", "test_inplace.py"),
    ),
    Mutation(
        "a branch may write into the gradient that the lane needs",
        _LANE,
        "[given.dy.to(branch.dtype, copy=True),",
        "[given.dy.to(branch.dtype),",
        ("test_inplace.py",),
    ),
    Mutation(
        "half of the entering gradient is left out",
        "engine/reversible.py",
        "return d_other + d_main, None",
        "return d_main, None",
        ("test_engine.py", "-k", "embeddings"),
    ),
    Mutation(
        "the read-out's gradients go to the wrong streams",
        "engine/reversible.py",
        "made = gradient * w1, gradient * w2",
        "made = gradient * w2, gradient * w1",
        ("test_engine.py", "-k", "exact_rebuild"),
    ),
    Mutation(
        "gradients of what a layer returns beside its hidden states are dropped",
        "engine/reversible.py",
        "d_other, d_main, d_extras, owned=owned",
        "d_other, d_main, tuple(map(torch.zeros_like, d_extras)), owned=owned",
        ("architectures/test_trainable.py", "-k", "position_bias"),
    ),
    Mutation(
        "arguments get no gradient",
        "engine/surroundings.py",
        "        self._arguments.append(tensor)\n        if not tensor.requires_grad:",
        "        self._arguments.append(tensor)\n        if tensor is not None:",
        ("test_engine.py", "-k", "cross_attention"),
    ),
    Mutation(
        "norms by rows forget the earlier rows",
        "engine/norms.py",
        "of_parameters if totals is None else [a + b for a, b in zip(totals, of_parameters, strict=True)]",
        "of_parameters",
        ("test_norms.py",),
    ),
)

REFUSALS = (
    Mutation(
        "a second backward goes through",
        _STEP,
        "if position != self.position + 1:",
        "if False:",
        ("test_bad_input.py", "-k", "second_backward"),
    ),
    Mutation(
        "parameters that are gone are not missed",
        "engine/surroundings.py",
        "        self._check(unchanged)\n",
        "",
        ("test_bad_input.py", "-k", "parameters_gone"),
    ),
    Mutation(
        "hidden states may change between two layers",
        "engine/passes.py",
        "        if not same:\n",
        "        if False:\n",
        ("test_bad_input.py", "-k", "changed_between"),
    ),
    Mutation(
        "a layer may write into its own input",
        _CALL,
        "if version_of(x) != version:",
        "if False:",
        ("test_inplace.py", "-k", "into_its_input"),
    ),
    Mutation(
        "a filled KV cache is taken in training",
        "engine/refusals.py",
        "return length is None or int(length(index)) > 0",
        "return False",
        ("test_bad_input.py", "-k", "filled_cache"),
    ),
    Mutation(
        "streams go on where states are injected",
        "architectures/layer_lists.py",
        "ends = [0, *self.begins, len(self.calls)]",
        "ends = [0, len(self.calls)]",
        ("architectures/test_structures.py", "-k", "exact and runs"),
    ),
    Mutation(
        "a shared layer draws the same random numbers in all its calls",
        "engine/branch.py",
        "base + 2 * self.call.place",
        "base + 2 * self.call.layer.index",
        ("architectures/test_structures.py", "-k", "random_numbers"),
    ),
    Mutation(
        "another model than the saved one is patched",
        "architectures/found/saved.py",
        "if here != there:",
        "if False:",
        ("architectures/test_structures.py", "-k", "another_model_than"),
    ),
    Mutation(
        "layers may be called out of order",
        "engine/passes.py",
        "if self._due(place) is not layer:",
        "if False:",
        ("test_bad_input.py", "-k", "out_of_order"),
    ),
    Mutation(
        "a loss that is kept keeps the streams",
        _STEP,
        "            tape.finish()\n",
        "            pass\n",
        ("test_engine.py", "-k", "kept_after_backward"),
    ),
    Mutation(
        "a loss that is kept keeps the arguments",
        _STEP,
        "        self.call.forget()\n",
        "",
        ("test_engine.py", "-k", "keeps_no_arguments"),
    ),
)

_GRAPH, _SURROUNDINGS, _BETWEEN = "engine/graph.py", "engine/surroundings.py", "engine/between.py"

AROUND = (
    Mutation(
        "hooks on parameters run for a branch's part of the gradient, too",
        _GRAPH,
        "return None if _state.inner else self._hook(gradient)",
        "return self._hook(gradient)",
        ("scenarios/test_hooks.py",),
    ),
    Mutation(
        "a gradient that comes down to a captured tensor is dropped",
        _GRAPH,
        "if not _state.inner:  # arguments' leaves serve the recompute, too",
        "if False:",
        ("scenarios/test_hooks.py",),
    ),
    Mutation(
        "tensors that need a gradient come in by another door",
        _CALL,
        "self._refuse_foreign(leaf)\n\n",
        "pass\n\n",
        ("scenarios/test_hooks.py",),
    ),
    Mutation(
        "weights may change in place between forward and backward",
        _SURROUNDINGS,
        "        if versions == self._versions:",
        "        if True:",
        ("test_surroundings.py",),
    ),
    Mutation(
        "running statistics move in the recompute as well",
        _SURROUNDINGS,
        "return [*changes, *self._small]",
        "return changes",
        ("test_surroundings.py",),
    ),
    Mutation(
        "hooks taken off after forward are missing in the recompute",
        "engine/inventory.py",
        "    if before == now:",
        "    if True:",
        ("scenarios/test_hooks.py",),
    ),
    Mutation(
        "what was found of a layer is not held against what is there",
        "engine/inventory.py",
        " and last.is_true:",
        ":",
        ("test_inventory.py",),
    ),
    Mutation(
        "modules of a layer are not looked for again",
        "modules.py",
        " and same(held_by(map(_CHILDREN, found[1])), found[2]):",
        ":",
        ("test_inventory.py",),
    ),
    Mutation(
        "a kernel compiled for aligned tensors is given others",
        "ops/launching.py",
        "if well_placed and self._compiled is not None:",
        "if self._compiled is not None:",
        ("test_launching.py",),
    ),
    Mutation(
        "launches are looked up without the dtypes of streams",
        "ops/adapter/triton_forward.py",
        "(x.dtype, *tensors.dtypes)",
        "(x.dtype,)",
        ("test_launching.py",),
    ),
    Mutation(
        "hooks between layers see one stream",
        _BETWEEN,
        "return bool(hooks) and not all(",
        "return False and not all(",
        ("scenarios/test_readers.py",),
    ),
    Mutation(
        "what stands in the graph between two layers is passed by",
        _BETWEEN,
        "if node is None or kind not in _IDENTITIES:",
        "if node is None or False:",
        ("scenarios/test_readers.py",),
    ),
    Mutation(
        "disable_adapter holds for all threads",
        "engine/threads.py",
        "class Switch(threading.local):",
        "class Switch:",
        ("scenarios/test_threads.py",),
    ),
    Mutation(
        "an interrupted change is left half done",
        "rollback.py",
        "if kind is not None:",
        "if False:",
        ("test_injected_errors.py",),
    ),
)

_INFERENCE = "engine/inference.py"

INFERENCE = (
    Mutation(
        "without gradients the streams are not coupled",
        _INFERENCE,
        "a - center if lane.centered else a, alpha=lane.coefficient)",
        "a - center if lane.centered else a, alpha=0.0)",
        ("test_inference.py",),
    ),
    Mutation(
        "without gradients hooks between layers see one stream",
        "engine/passes.py",
        "current.read_out() if seen else current.main",
        "current.main",
        ("test_inference.py",),
    ),
    Mutation(
        "a pass without gradients in train mode has other bits",
        "engine/stack.py",
        "torch.is_grad_enabled() or self.owner.training or",
        "torch.is_grad_enabled() or",
        ("test_inference.py",),
    ),
)

MUTATIONS = (*STREAMS, *CHECKSUMS, *RECOMPUTES, *GRADIENTS, *REFUSALS, *AROUND, *INFERENCE)
