"""Save, load, add, switch, train, disable, unpatch, copy: in every order that a user might try.

A state machine draws the orders. What must hold after each step: the base weights are those of the start, bit for bit;
the logits are those of the adapter that is active, as they were when it was last changed; a model that is not patched
has nothing left of us.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import meft_kernels
from meft_kernels import PatchError
from meft_kernels.patching.state import find_state, require_state

from .models import tiny_batch, tiny_bert, tiny_llama

NAMES = st.sampled_from(["default", "a", "b"])
FOLDERS = st.sampled_from(["x", "y"])


class Lifecycle(RuleBasedStateMachine):
    """One model, up to three adapters, two folders."""

    build: Any = staticmethod(tiny_llama)
    heads: tuple[str, ...] = ()
    """Modules that train with the adapters, which unpatch leaves trained."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = self.build()
        self.batch = tiny_batch(self.model)
        self.frozen = {
            name: tensor.clone() for name, tensor in self.model.state_dict().items() if not self.is_head(name)
        }
        self.required = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.names = list(self.model.state_dict())
        self.modules = [name for name, _ in self.model.named_modules()]
        self.base_logits = self.logits()
        self.expected: dict[str, torch.Tensor] = {}
        self.rank: dict[str, int] = {}
        self.saved: dict[str, tuple[int, torch.Tensor]] = {}
        self.active: str | None = None
        self.seed = 0

    def is_head(self, name: str) -> bool:
        return name.startswith(self.heads) if self.heads else False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model.eval()(**self.batch).logits

    def note(self, rank: int | None = None) -> None:
        """The active adapter was changed."""
        assert self.active is not None
        self.expected[self.active] = self.logits()
        if rank is not None:
            self.rank[self.active] = rank

    @precondition(lambda self: self.active is None)
    @rule(rank=st.sampled_from([2, 3]))
    def patch(self, rank: int) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        meft_kernels.patch(self.model, rank=rank, up_init_std=0.3, dropout=0.0)
        self.active = "default"
        self.note(rank)

    @precondition(lambda self: self.active is not None)
    @rule()
    def patch_again(self) -> None:
        with pytest.raises(PatchError, match="already patched"):
            meft_kernels.patch(self.model, rank=7)

    @precondition(lambda self: self.active is not None)
    @rule(name=NAMES, rank=st.sampled_from([2, 3]))
    def add(self, name: str, rank: int) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        if name in self.expected:
            with pytest.raises(PatchError, match="already"):
                meft_kernels.add_adapter(self.model, name, rank=rank)
            return
        meft_kernels.add_adapter(self.model, name, rank=rank, fraction_bits=None)
        before = self.active
        meft_kernels.set_adapter(self.model, name)
        self.active = name
        self.note(rank)
        meft_kernels.set_adapter(self.model, before)
        self.active = before

    @precondition(lambda self: self.active is not None)
    @rule(name=NAMES)
    def switch(self, name: str) -> None:
        if name not in self.expected:
            with pytest.raises(PatchError, match="no adapter"):
                meft_kernels.set_adapter(self.model, name)
            return
        meft_kernels.set_adapter(self.model, name)
        self.active = name

    @precondition(lambda self: self.active is not None)
    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name == self.active or name not in self.expected:
            with pytest.raises(PatchError, match=r"active|no adapter"):
                meft_kernels.delete_adapter(self.model, name)
            return
        meft_kernels.delete_adapter(self.model, name)
        del self.expected[name], self.rank[name]

    @precondition(lambda self: self.active is not None)
    @rule()
    def train(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        before = [p.detach().clone() for p in parameters]
        self.model.train()(**self.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        self.note()

    @precondition(lambda self: self.active is not None)
    @rule(folder=FOLDERS, name=NAMES)
    def save(self, folder: str, name: str) -> None:
        if name not in self.expected:
            with pytest.raises(PatchError, match="no adapter"):
                meft_kernels.save_adapter(self.model, self.folder / folder, adapter_name=name)
            return
        meft_kernels.save_adapter(self.model, self.folder / folder, adapter_name=name)
        self.saved[folder] = self.rank[name], self.expected[name]

    @rule(folder=FOLDERS, name=NAMES)
    def load(self, folder: str, name: str) -> None:
        if folder not in self.saved:
            with pytest.raises(meft_kernels.AdapterFileError, match="holds no"):
                meft_kernels.load_adapter(self.model, self.folder / folder, name)
            return
        rank, expected = self.saved[folder]
        if self.rank.get(name, rank) != rank:
            with pytest.raises(PatchError, match="rank"):
                meft_kernels.load_adapter(self.model, self.folder / folder, name)
            return
        meft_kernels.load_adapter(self.model, self.folder / folder, name)
        self.expected[name], self.rank[name] = expected, rank
        self.active = self.active or name

    @precondition(lambda self: self.active is not None)
    @rule()
    def unpatch(self) -> None:
        meft_kernels.unpatch(self.model)
        self.active = None
        self.expected.clear()
        self.rank.clear()
        if self.heads:
            self.base_logits = self.logits()  # a trained head stays

    @rule()
    def copied(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def failed_forward(self) -> None:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            self.model(input_ids=torch.full((1, 3), 10**6))

    @invariant()
    def base_weights_are_untouched(self) -> None:
        state = self.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in self.frozen.items())

    @invariant()
    def logits_are_the_active_adapters(self) -> None:
        if self.active is None:
            assert torch.equal(self.logits(), self.base_logits)
            return
        assert meft_kernels.adapter_names(self.model)[0] == self.active
        assert set(meft_kernels.adapter_names(self.model)) == set(self.expected)
        assert torch.equal(self.logits(), self.expected[self.active])
        if not self.heads:
            with meft_kernels.disable_adapter(self.model):
                assert torch.equal(self.logits(), self.base_logits)

    @invariant()
    def nothing_is_left_behind(self) -> None:
        if self.active is not None:
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            assert all(".meft." in name or self.is_head(name) for name in trained)
            assert require_state(self.model).active == self.active
            return
        assert find_state(self.model) is None
        assert list(self.model.state_dict()) == self.names
        assert [name for name, _ in self.model.named_modules()] == self.modules
        assert {name: p.requires_grad for name, p in self.model.named_parameters()} == self.required
        for module in self.model.modules():
            assert (
                not module._forward_hooks and not module._forward_pre_hooks and not module._load_state_dict_post_hooks
            )
            assert "forward" not in vars(module) and "save_pretrained" not in vars(module)


class ClassifierLifecycle(Lifecycle):
    """With a head and a pooler that belong to each adapter."""

    build = staticmethod(tiny_bert)
    heads = ("classifier.", "bert.pooler.")


PROFILE = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = PROFILE
TestClassifierLifecycle = ClassifierLifecycle.TestCase
TestClassifierLifecycle.settings = PROFILE
