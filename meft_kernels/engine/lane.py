"""One lane of one layer in one forward pass: moved forward, and undone again in backward.

A lane's branch is computed in one go, or its position-wise part tile by tile: what is as wide as the FFN then exists
for one tile. Forward and recompute cut the same tiles, for a matrix product over other rows may round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ..memory import shortened
from ..ops import Coupled
from .branch import LaneBranch
from .call import Call, Gradients, edge_of
from .extras import Extras
from .graph import leaf_of
from .pieces import AttentionInPieces
from .remainders import Remainders
from .replay import no_leaf
from .tiles import Tile, joined
from .variants import Lane


class Undoing(NamedTuple):
    """What a lane's inverse starts from."""

    y: torch.Tensor
    """The stream to be rebuilt, in place."""
    center: torch.Tensor
    """The other stream, which the branch reads."""
    dy: torch.Tensor
    """Gradient of ``y``."""
    d_center: torch.Tensor
    """Gradient of ``center`` so far; ours to write to."""
    d_extras: tuple[torch.Tensor, ...]
    """Gradients of the extras that need one."""
    wants_center: bool
    """Whether the gradient of ``center`` is wanted at all."""


class LanePass:
    """One lane of one layer in one forward pass.

    Attributes:
        call: the layer's call that it is part of.
        branch: computes what the lane adds.
        checksum: of the stream that the inverse must give back.
        remainders: what the inverse needs beside the streams.
    """

    def __init__(self, call: Call, lane: Lane) -> None:
        self.call = call
        self.lane = lane
        self.branch = LaneBranch(call, lane)
        self.checksum: torch.Tensor = call.tape.checksums[0]
        self.remainders = Remainders(call.tape.host, call.tape.latest)
        call.tape.latest = self.remainders

    def forget(self) -> None:
        """Let go of what backward has used."""
        self.remainders.clear()
        vars(self.branch).pop("pieces", None)  # it holds the call's masks and position embeddings

    def _undone(self) -> Iterator[tuple[int, Tile]]:
        """The tiles and their numbers. Where tensors hold no data most are left out, and with them their remainders."""
        before = -1
        for number, tile in shortened(list(enumerate(self.branch.tiles))):
            self.remainders.drop(before + 1, number)
            before = number
            yield number, tile

    # ------------------------------------------------------------------ forward

    def move(
        self,
        a: torch.Tensor,
        center: torch.Tensor,
        center_value: torch.Tensor,
        *,
        recording: bool,
        wants_value: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Move ``a`` past the lane, in place.

        Returns:
            Its new checksum, and its value if that is wanted.
        """
        tape, lane = self.call.tape, self.lane
        value_dtype = tape.dtype if wants_value else None
        fused = self.branch.fused(center_value)
        if fused is not None:
            coupled = tape.arithmetic.couple_adapter(
                a, fused, lane.coefficient, center if lane.centered else None, value_dtype
            )
            if recording:
                self.remainders.put(coupled.remainder)
            return self._noted([coupled]), coupled.value
        self.branch.tiles = self.call.layer.tiles(lane.branch, center_value)
        one = len(self.branch.tiles) == 1
        value = torch.empty_like(a, dtype=value_dtype) if value_dtype is not None and not one else None
        done: list[Coupled] = []
        left_out = len(self.branch.tiles) - len(shortened(self.branch.tiles))  # in a simulation, after the second
        for tile, branch in self._outputs(center_value, recording):
            coupled = self._couple(tile, a, branch, center, value_dtype, inplace=True)
            if recording:  # nobody goes back otherwise, and what is held here lives as long as the pass
                self.remainders.put(coupled.remainder, 1 + left_out if len(done) == 1 else 1)
            if one:
                value = coupled.value
            elif value is not None and coupled.value is not None:
                tile.of(value).copy_(coupled.value)
            done.append(coupled._replace(value=None, remainder=None))
            del branch, coupled
        return self._noted(done), value

    def _outputs(self, center_value: torch.Tensor, recording: bool) -> Iterator[tuple[Tile, torch.Tensor]]:
        """What the branch gives, tile by tile.

        With ``recording`` it runs with grad enabled although its graph is dropped at once: kernels may be chosen by it,
        and the recompute in backward needs it. Without, as the user has it: where nothing is known to train there is no
        graph, unless something does that a reversible layer would give no gradient.
        """
        call = self.call
        grad = recording or torch.is_grad_enabled()
        if len(self.branch.tiles) == 1:
            with torch.set_grad_enabled(grad):
                x = call.entering(center_value, recording)
                branch, extras = self.branch.whole(x)
            self._keep(extras, [branch], x)
            del x
            yield self.branch.tiles[0], branch.detach()
            return
        if self.lane.branch == "layer":
            call.layer.check_blocks(center_value, call.kwargs, self.branch.seed())
        pieces = self.branch.pieces
        if pieces is not None:
            attended = pieces.attend(
                self.branch.tiles,
                lambda tile: call.entering(tile.of(center_value), recording),
                recording=recording,
                note=call.note,
            )
        else:
            with torch.set_grad_enabled(grad):
                x = call.entering(center_value, recording)
                mixed, extras = self.branch.mixed(x)
            self._keep(extras, [mixed], x)
            del x
            mixed = mixed.detach()
            del extras
        for number, tile in shortened(list(enumerate(self.branch.tiles))):
            with torch.set_grad_enabled(grad):
                x = call.entering(tile.of(center_value if pieces else mixed), recording)
                context = call.entering(attended.of(tile), recording) if pieces else None
                out = self.branch.rows(number, x, pieces, context)
            call.note([out], [x] if context is None else [x, context])
            del x, context
            out = out.detach()
            yield tile, out
            del out

    def _keep(self, extras: tuple[Any, ...] | None, made: list[torch.Tensor], x: torch.Tensor) -> None:
        """Take up what the layer returns beside its hidden states, and note what all of it is made of."""
        self.call.note([*made, *tree_leaves(extras)], [x])
        if extras is not None:
            self.call.extras = Extras.of(extras)

    def _couple(
        self,
        tile: Tile,
        a: torch.Tensor,
        branch: torch.Tensor,
        center: torch.Tensor,
        value_dtype: torch.dtype | None,
        *,
        inplace: bool,
    ) -> Coupled:
        return self.call.tape.arithmetic.couple(
            tile.of(a),
            branch,
            self.lane.coefficient,
            tile.of(center) if self.lane.centered else None,
            value_dtype,
            inplace,
            tile.first_row(a.shape),
        )

    def _noted(self, coupled: list[Coupled]) -> torch.Tensor:
        """Take note of all tiles' status, and return the sum of their checksums."""
        if len(coupled) == 1:
            status, checksum = coupled[0].status, coupled[0].checksum
        else:
            # NON_FINITE comes with OVERFLOW or where there is no other: the greatest status has all that matters.
            status = torch.stack([each.status for each in coupled]).amax()
            checksum = torch.stack([each.checksum for each in coupled]).sum()
        self.call.tape.statuses.append((self.branch.where, status))
        return checksum

    def move_with_graph(
        self, a: torch.Tensor, center: torch.Tensor, center_carrier: torch.Tensor
    ) -> tuple[Coupled, torch.Tensor, tuple[Any, ...] | None]:
        """The same numbers under plain autograd, which keeps every activation; streams are not written to.

        Returns:
            What the lane made, the branch with its graph, and what else the layer returned.
        """
        lane, tape = self.lane, self.call.tape
        self.branch.tiles = self.call.layer.tiles(lane.branch, center_carrier)
        if len(self.branch.tiles) == 1:
            branch, extras = self.branch.whole(center_carrier)
        else:
            extras = None
            pieces = self.branch.pieces
            if pieces is not None:
                attended = pieces.attend_with_graph(self.branch.tiles, center_carrier)
                parts = [
                    self.branch.rows(number, tile.of(center_carrier), pieces, attended.of(tile))
                    for number, tile in enumerate(self.branch.tiles)
                ]
            else:
                mixed, extras = self.branch.mixed(center_carrier)
                parts = [self.branch.rows(number, tile.of(mixed)) for number, tile in enumerate(self.branch.tiles)]
            branch = joined(parts, center_carrier.shape)
        with torch.no_grad():
            coupled = self._couple(Tile(), a, branch.detach(), center, tape.dtype, inplace=False)
        self.call.tape.statuses.append((self.branch.where, coupled.status))
        return coupled, branch, extras

    # ------------------------------------------------------------------ backward

    def undo(
        self, given: Undoing, center_value: torch.Tensor | None, gradients: Gradients, *, wants_value: bool
    ) -> torch.Tensor | None:
        """Rebuild the lane's stream in place; adds to ``given.d_center`` and to ``gradients``.

        Args:
            center_value: value of the center, if somebody has made it already.
            wants_value: whether the value of the rebuilt stream is wanted.
        """
        tape, lane = self.call.tape, self.lane
        if len(self.branch.tiles) > 1 and (pieces := self.branch.pieces) is not None:
            checksum = self._undo_pieces(given, pieces, gradients)
        else:
            if center_value is None:
                center_value = tape.arithmetic.value(given.center, tape.dtype)
            with tape.autocast.restored():
                fused = self.branch.fused(center_value)
            if fused is not None:
                undone = tape.arithmetic.uncouple_adapter(
                    given.y,
                    given.dy,
                    fused,
                    lane.coefficient,
                    self.remainders.take(0),
                    given.center if lane.centered else None,
                    tape.dtype if wants_value else None,
                    given.d_center,
                )
                self.call.collect(zip(fused.weights, undone.gradients, strict=True), gradients)
                if lane.centered:
                    given.d_center.sub_(given.dy * lane.coefficient)
                tape.comparisons.append((self.branch.where, undone.checksum, self.checksum))
                return undone.value
            undo = self._undo_whole if len(self.branch.tiles) == 1 else self._undo_tiles
            checksum = undo(given, center_value, gradients)
        tape.comparisons.append((self.branch.where, checksum, self.checksum))
        # Only after the branch's backward, so that no more is held meanwhile.
        return tape.arithmetic.value(given.y, tape.dtype) if wants_value else None

    def _uncouple(self, number: int, tile: Tile, given: Undoing, branch: torch.Tensor) -> torch.Tensor:
        """Rebuild one tile of the stream; its checksum."""
        lane = self.lane
        return self.call.tape.arithmetic.uncouple(
            tile.of(given.y),
            branch,
            lane.coefficient,
            self.remainders.take(number),
            tile.of(given.center) if lane.centered else None,
            None,
            tile.first_row(given.y.shape),
        ).checksum

    def _add(self, tile: Tile, given: Undoing, dx: torch.Tensor | None) -> None:
        """What comes through the branch and, of a centered lane, beside it, in this order."""
        target = tile.of(given.d_center)
        if dx is not None:
            target.add_(dx)
        if self.lane.centered:
            target.sub_(tile.of(given.dy) * self.lane.coefficient)

    def _undo_whole(self, given: Undoing, center_value: torch.Tensor, gradients: Gradients) -> torch.Tensor:
        call = self.call
        with call.again():
            leaf = leaf_of(center_value)
            branch, extras = self.branch.whole(no_leaf(leaf))
        outputs = [branch] if extras is None else [branch, *call.extras.again(extras)]
        edges = [edge_of(output) for output in outputs]
        # A branch's backward may write into what it is given (Liger's norms do), and into what the branch gave.
        incoming = [given.dy.to(branch.dtype, copy=True), *(given.d_extras if len(edges) > 1 else ())]
        checksum = self._uncouple(0, self.branch.tiles[0], given, branch.detach())
        del branch, outputs, extras
        leaves = [leaf] if given.wants_center else []
        found = call.differentiate(edges, incoming, leaves, gradients)
        del leaf, edges, incoming, leaves
        if given.wants_center:
            self._add(self.branch.tiles[0], given, found[0])
        return checksum

    def _undo_tiles(self, given: Undoing, center_value: torch.Tensor, gradients: Gradients) -> torch.Tensor:
        call = self.call
        mixes = call.layer.mixes(self.lane.branch)
        mixed, edges, leaf = center_value, [], center_value
        if mixes:
            with call.again():
                leaf = leaf_of(center_value)
                mixed, extras = self.branch.mixed(no_leaf(leaf))
            outputs = [mixed] if extras is None else [mixed, *call.extras.again(extras)]
            edges = [edge_of(output) for output in outputs]
            # A copy, into which gradients will be written: the graph may hold what it gave.
            mixed = mixed.detach().clone()
            del outputs, extras
        del center_value
        checksums = []
        for number, tile in self._undone():
            with call.again():
                x = leaf_of(tile.of(mixed))
                out = self.branch.rows(number, no_leaf(x))
            checksums.append(self._uncouple(number, tile, given, out.detach()))
            incoming = tile.of(given.dy).to(out.dtype, copy=True)
            edge = edge_of(out)
            del out
            wanted = [x] if mixes or given.wants_center else []
            found = call.differentiate([edge], [incoming], wanted, gradients)
            del edge, incoming, wanted
            if mixes:
                dx = found[0]
                x.data.zero_() if dx is None else x.data.copy_(dx)  # over this tile of ``mixed``, which is done with
                del dx
            elif given.wants_center:
                self._add(tile, given, found[0])
            del x, found
        if mixes:
            incoming_of_all = [mixed, *(given.d_extras if len(edges) > 1 else ())]
            del mixed
            found = call.differentiate(edges, incoming_of_all, [leaf] if given.wants_center else [], gradients)
            del incoming_of_all, edges, leaf
            if given.wants_center:
                dx = found[0]
                for tile in shortened(self.branch.tiles):
                    self._add(tile, given, None if dx is None else tile.of(dx))
        return torch.stack(checksums).sum()

    def _undo_pieces(self, given: Undoing, pieces: AttentionInPieces, gradients: Gradients) -> torch.Tensor:
        call, tape = self.call, self.call.tape

        def read(tile: Tile) -> torch.Tensor:
            return tape.arithmetic.value(tile.of(given.center), tape.dtype)

        with call.again():
            attended = pieces.attend(
                self.branch.tiles, lambda tile: no_leaf(leaf_of(read(tile))), recording=True, keeping=True
            )
        checksums = []
        for number, tile in self._undone():
            with call.again():
                x, context = leaf_of(read(tile)), leaf_of(attended.of(tile))
                out = self.branch.rows(number, no_leaf(x), pieces, no_leaf(context))
            checksums.append(self._uncouple(number, tile, given, out.detach()))
            incoming = tile.of(given.dy).to(out.dtype, copy=True)
            edge = edge_of(out)
            del out
            wanted = [context, x] if given.wants_center else [context]
            d_context, *dx = call.differentiate([edge], [incoming], wanted, gradients)
            del edge, incoming, wanted, x, context
            attended.write_gradient(tile, d_context)
            if given.wants_center and dx[0] is not None:
                tile.of(given.d_center).add_(dx[0])
            del d_context, dx
        attended.backward()
        for number, tile in shortened(list(enumerate(self.branch.tiles))):
            with call.again():
                x = leaf_of(read(tile))
                made = pieces.project(number, tile, no_leaf(x))
            edges = [edge_of(part) for part in made]
            del made
            found = call.differentiate(edges, attended.gradients_of(tile), [x] if given.wants_center else [], gradients)
            del edges, x
            if given.wants_center:
                self._add(tile, given, found[0])
            del found
        return torch.stack(checksums).sum()
