"""A budget: what is planned fits by measurement, in order of time, and a refusal leaves the model alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import meft_kernels
from meft_kernels import BudgetError, MeftConfig, UnsupportedModelError
from meft_kernels.estimate.estimator import Estimator
from meft_kernels.estimate.sizes import memory_size
from meft_kernels.estimate.step import tensor_bytes, text_batch
from meft_kernels.memory import LiveTensorMeter
from meft_kernels.planning.planner import least_that_fits

from .architectures.zoo import tiny_config

ROWS, TOKENS = 2, 160
LLAMA_LAYERS = 4


def llama_config(**settings: Any) -> Any:
    return LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=256, num_hidden_layers=LLAMA_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"], **settings,
    )  # fmt: skip


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(llama_config(**settings))


def bert() -> Any:
    torch.manual_seed(0)
    config = tiny_config("bert", num_hidden_layers=4, hidden_size=64, max_position_embeddings=256, dropout=0.1)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture(scope="module", autouse=True)
def simulated_once() -> Iterator[None]:
    """The same step is simulated once for all tests of this file."""
    known: dict[Any, Any] = {}
    plain = Estimator.simulate

    def simulate(self: Estimator, config: Any, rival: Any, tokens: int, parts: Any = None) -> Any:
        inside = repr(getattr(rival.prepare, "__self__", None))
        key = (
            config.to_json_string(),
            inside,
            self.model_class,
            self.meft,
            self.gpu,
            self.loss,
            self.rows,
            tokens,
            parts,
        )
        if key not in known:
            known[key] = plain(self, config, rival, tokens, parts)
        return known[key]

    with mock.patch.object(Estimator, "simulate", simulate):
        yield


def measured(model: Any) -> tuple[int, int]:
    """The most bytes in a second step, weights included, and those in host memory."""
    batch = text_batch(model, ROWS, TOKENS, torch.device("cpu"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    weights = tensor_bytes([*model.parameters(), *model.buffers()])
    with LiveTensorMeter() as meter:
        for _ in range(2):
            meter.reset_peak()
            model(**batch, **({"use_cache": False} if model.get_output_embeddings() else {})).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return weights + meter.peak_bytes, meter.host_peak_bytes


def totals(make: Any, **settings: Any) -> dict[str, int]:
    """What a step takes with every candidate, in their order."""
    model = make()
    with pytest.raises(BudgetError) as raised:
        meft_kernels.plan(model, rank=4, memory="1MiB", batch=(ROWS, TOKENS), allow_coefficient=True, **settings)
    return {each.what: each.step.total for each in raised.value.candidates}


def budget(total: int) -> int:
    """A memory of which just so many bytes are for tensors, on a CPU."""
    return -(-total * 100 // 95) + 20


@pytest.mark.parametrize("make", [llama, bert])
def test_what_is_planned_fits_and_more_memory_is_never_slower(make: Any) -> None:
    """From just too little to more than enough; each plan measured with real tensors."""
    order = list(totals(make).items())
    sizes = sorted({budget(total) for _, total in order} | {budget(order[0][1] * 3 // 2), budget(10 * order[0][1])})
    names = [name for name, _ in order]
    rank, before, kept, chosen = len(names), LLAMA_LAYERS + 1, 0, set()
    for size in sizes:
        model = make()
        meft_kernels.patch(model, rank=4, memory=size, batch=(ROWS, TOKENS), allow_coefficient=True)
        plan = meft_kernels.describe(model).plan
        assert plan is not None and plan.memory == size and plan.chosen.fits
        total, host = measured(model)
        assert total <= size
        assert plan.total == pytest.approx(total, rel=0.01)
        assert plan.host == pytest.approx(host, rel=0.01)
        layers = plan.settings.get("reversible_layers")
        place = -1 if layers is not None else names.index(plan.chosen.what)
        assert place <= rank
        if layers is not None:
            assert layers <= before
            before, kept = layers, kept + 1
        rank = place
        chosen.add(plan.chosen.what)
    assert kept >= 2 and before == 0 and names[0] in chosen


@pytest.mark.parametrize("make", [llama, bert])
def test_every_candidate_that_takes_less_than_those_before_is_reached(make: Any) -> None:
    order = totals(make)
    least = None
    reached = 0
    for name, total in order.items():
        if least is not None and total >= least:
            continue
        least = total
        plan = meft_kernels.plan(make(), rank=4, memory=budget(total), batch=(ROWS, TOKENS), allow_coefficient=True)
        assert plan.chosen.what == name and [each.fits for each in plan.candidates][:-1].count(True) == 0
        reached += 1
    assert reached >= 3
    with pytest.raises(BudgetError, match="longest that does is"):
        meft_kernels.plan(
            make(), rank=4, memory=budget(least or 0) - 1000, batch=(ROWS, TOKENS), allow_coefficient=True
        )


def test_the_coefficient_is_left_alone_unless_allowed() -> None:
    order = totals(llama)
    lighter = next(total for name, total in order.items() if name.startswith("coefficient") and "+" not in name)
    model = llama()
    plan = meft_kernels.plan(model, rank=4, memory=budget(lighter), batch=(ROWS, TOKENS))
    assert plan.config.coefficients == MeftConfig().coefficients
    assert not any("coefficient" in each.what for each in plan.candidates)
    allowed = meft_kernels.plan(model, rank=4, memory=budget(lighter), batch=(ROWS, TOKENS), allow_coefficient=True)
    assert allowed.settings == {"beta": -1 / 8} and "changes what is computed" in str(allowed)
    own = meft_kernels.plan(
        model, rank=4, beta=-1 / 64, memory=budget(order["all layers reversible"]), batch=(ROWS, TOKENS),
        allow_coefficient=True,
    )  # fmt: skip
    assert own.config.beta == -1 / 64


def test_what_was_given_is_kept() -> None:
    order = totals(llama)
    small = budget(max(order.values()) * 2)
    given = {"attention": "pieces", "remainders": "host", "tile": 64, "reversible_layers": 3}
    plan = meft_kernels.plan(llama(), MeftConfig(rank=4, **given), memory=10 * small, batch=(ROWS, TOKENS))
    assert plan.settings == {} and {name: getattr(plan.config, name) for name in given} == given
    tight = budget(order["host remainders"] if "host remainders" in order else min(order.values()))
    with pytest.raises(BudgetError):
        meft_kernels.plan(
            llama(), rank=4, remainders="device", attention="whole", tile="auto", memory=tight, batch=(ROWS, TOKENS)
        )


def test_values_do_not_change_with_the_plan() -> None:
    """The same loss and gradients, whatever was chosen."""
    order = totals(llama)
    sizes = [budget(10 * order["all layers reversible"]), budget(order["all layers reversible"])]
    found = []
    for size in sizes:
        model = llama()
        torch.manual_seed(1)
        meft_kernels.patch(model, rank=4, memory=size, batch=(ROWS, TOKENS))
        batch = text_batch(model, ROWS, TOKENS, torch.device("cpu"))
        model.train()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert found[0][0] == found[1][0]


def state_of(model: nn.Module) -> Any:
    return (
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        [(name, sorted(vars(m))) for name, m in model.named_modules()],
    )


@pytest.mark.parametrize("what", ["refused", "planned"])
def test_planning_leaves_no_trace(what: str) -> None:
    model = llama()
    before, config = state_of(model), copy.deepcopy(model.config.to_dict())
    random, level = torch.get_rng_state(), logging.getLogger("meft_kernels").level
    if what == "refused":
        with pytest.raises(BudgetError):
            meft_kernels.patch(model, rank=4, memory="1MiB", batch=(ROWS, TOKENS))
    else:
        meft_kernels.plan(model, rank=4, memory="1GiB", batch=(ROWS, TOKENS))
    assert state_of(model) == before and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.getLogger("meft_kernels").level == level
    assert isinstance(torch.empty(1), torch.Tensor) and type(torch.empty(1)) is torch.Tensor


def test_a_refusal_names_a_length_that_fits() -> None:
    order = totals(llama)
    size = budget(min(order.values())) * 2 // 3
    with pytest.raises(BudgetError, match=r"longest that does is 2 x .*fewer rows.*4-bit") as raised:
        meft_kernels.plan(llama(), rank=4, memory=size, batch=(ROWS, TOKENS), allow_coefficient=True)
    longest = raised.value.longest
    assert f"longest that does is 2 x {longest} tokens" in str(raised.value)
    assert 0 < longest < TOKENS
    assert meft_kernels.plan(llama(), rank=4, memory=size, batch=(ROWS, longest), allow_coefficient=True).chosen.fits
    with pytest.raises(BudgetError, match="not even 2 x 1 token"):
        meft_kernels.plan(llama(), rank=4, memory="1MiB", batch=(ROWS, TOKENS))


@pytest.mark.parametrize("wrong", ["lots", "", "-2GiB", -1, 0, True, float("nan"), 2.5, "0GB", ["22GiB"], b"22GiB"])
def test_memory_that_is_none(wrong: Any) -> None:
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"memory is a size such as 80GB or 79\.1GiB, or a whole number of bytes"):
        meft_kernels.patch(model, memory=wrong, batch=(1, 8))
    assert state_of(model) == before


@pytest.mark.parametrize("wrong", [8, (8,), (1, 2, 3), (0, 8), (1, -8), (True, 8), (1.0, 8), "18", {1: 8}])
def test_batches_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"batch is \(rows, tokens\)"):
        meft_kernels.patch(llama(), memory="1GiB", batch=wrong)


def test_one_without_the_other() -> None:
    with pytest.raises(ValueError, match="memory= is planned for a batch"):
        meft_kernels.patch(llama(), memory="1GiB")
    with pytest.raises(ValueError, match="give memory="):
        meft_kernels.patch(llama(), batch=(1, 8))
    assert memory_size("22GiB", "memory") == 22 * 2**30 == memory_size(22 * 2**30, "memory")


def test_models_that_cannot_be_simulated_are_told_of() -> None:
    for name in ("t5", "vit"):
        with pytest.raises(UnsupportedModelError, match="memory= is not available for"):
            meft_kernels.plan(tiny_config(name), memory="1GiB", batch=(1, 8))
    with pytest.raises(UnsupportedModelError):
        meft_kernels.patch(nn.Linear(2, 2), memory="1GiB", batch=(1, 8))
    with pytest.raises(ValueError, match="takes 64 tokens at most"):
        meft_kernels.patch(llama(max_position_embeddings=64), memory="1GiB", batch=(1, 65))
    with pytest.raises(ValueError, match="a model has its own"):
        meft_kernels.plan(llama(), memory="1GiB", batch=(1, 8), dtype=torch.bfloat16)


def test_lora_inside() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    plan = meft_kernels.plan(lora, adapters="none", memory="1GiB", batch=(ROWS, TOKENS))
    assert plan.settings == {"reversible_layers": 0}
    memory = budget(plan.candidates[0].step.total)
    plan = meft_kernels.plan(lora, adapters="none", memory=memory, batch=(ROWS, TOKENS))
    meft_kernels.patch(lora, adapters="none", memory=memory, batch=(ROWS, TOKENS))
    assert "all layers reversible" in meft_kernels.describe(lora).plan.chosen.what
    assert measured(lora.get_base_model())[0] == pytest.approx(plan.total, rel=0.01)


def test_the_smallest_number_is_found() -> None:
    for most in range(20):
        for least in range(most + 1):
            assert least_that_fits(lambda n, least=least: n >= least, most) == least


def test_a_patched_model_is_planned_for_again() -> None:
    model = llama()
    meft_kernels.patch(model, rank=4, memory="1GiB", batch=(ROWS, TOKENS))
    assert meft_kernels.patch(model, rank=4, memory="1GiB", batch=(ROWS, TOKENS)) is model
    assert "budget" in str(meft_kernels.describe(model)) and "1.00 GiB for 2 x 160 tokens" in str(
        meft_kernels.describe(model)
    )


def test_command_line(tmp_path: Any) -> None:
    testing = pytest.importorskip("typer.testing")
    from meft_kernels.programs.cli import app

    folder = tmp_path / "model"
    llama_config().save_pretrained(folder)

    def run(*arguments: str) -> Any:
        return testing.CliRunner().invoke(
            app, ["plan", "--model", str(folder), "--batch", "2", "--seq", "160", "--rank", "4", *arguments]
        )

    done = run("--gpu", "80GB", "--dtype", "float32", "--set", "attention=pieces", "--set", "lean_norms=false")
    assert done.exit_code == 0, done.output
    line = "meft_kernels.patch(model, rank=4, reversible_layers=0, attention='pieces', lean_norms=False)"
    assert line in done.output and "  lean_norms: false" in done.output
    assert run("--gpu", "567MB").exit_code == 1 and "does not fit" in run("--gpu", "567MB").output
    for wrong in (("--gpu", "lots"), ("--set", "atention=pieces"), ("--set", "tile"), ("--set", "tile=no")):
        done = run(*wrong)
        assert done.exit_code == 2 and "error: " in done.output, done.output


def test_a_budget_below_the_reserve_says_so() -> None:
    with pytest.raises(BudgetError, match=r"is no more than the reserve for .*nothing is left for tensors"):
        meft_kernels.plan(tiny_config("llama", architectures=["LlamaForCausalLM"]), memory="400MiB", batch=(2, 8))
