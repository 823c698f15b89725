"""The laws of :class:`jdcore.protocols.GramianRule`, checked on examples of layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from jdcore._registry import registry
from jdcore._tables import Entry
from jdcore.autogram import Block, Engine
from jdcore.autogram._plan import make_plan
from jdcore.protocols import GramianRule
from jdcore.testing._case import ConformanceError, NotApplicable, demand, demand_close
from jdcore.testing._trial import (
    LayerExample,
    Trial,
    dense_gradients,
    gramian_of,
    make_trial,
    named_arguments,
    weighted_by,
)

_EXACT = 1e-12
_SINGLE = 1e-6
_SIZES = ((1, 5, 1), (3, 4, 1), (2, 3, 2), (2, 1, 4))
"""Tasks, samples, and entries of the first dimension per sample."""


@frozen
class RuleCase:
    """A rule, and a layer to try it on."""

    entry: Entry
    rule: Any
    example: LayerExample

    def trial(
        self, tasks: int = 2, samples: int = 3, repeats: int = 1, dtype: Any = torch.float64
    ) -> Trial:
        layer = self.example.layer(dtype)
        arguments = self.example.arguments(samples * repeats, dtype)
        return make_trial(layer, arguments, tasks, samples)

    def blocks(self, trial: Trial) -> list[Block]:
        with torch.no_grad():
            return list(self.rule.blocks(trial.call))


def satisfies_the_protocol(case: RuleCase) -> None:
    rule, layer = case.rule, case.example.layer()
    demand(isinstance(rule, GramianRule), f"{rule!r} is no GramianRule")
    demand(bool(type(rule).__doc__), "the rule has no docstring")
    demand(not isinstance(rule.parameters, str), "`parameters` is a string, not names")
    unknown = {name for name, _ in layer.named_parameters()} - set(rule.parameters)
    demand(not unknown, f"`parameters` does not name {sorted(unknown)}")


def serves_the_layer(case: RuleCase) -> None:
    layer = case.example.layer()
    found = [entry.qualified_name for entry in registry.gramian_rules(type(layer))]
    demand(found == [case.entry.qualified_name], f"{type(layer).__name__} is served by {found}")
    refusal = case.rule.refusal(layer)
    demand(refusal is None, f"the rule refuses the layer: {refusal}")
    [served] = make_plan([layer]).served
    demand(
        type(served.rule) is type(case.rule), f"the engine does not use the rule: {served.reason}"
    )


def keeps_samples_apart(case: RuleCase) -> None:
    """Of the layer, not of the rule: if it mixes samples, there is no row of one sample."""
    layer, samples = case.example.layer(), 4
    one = case.example.arguments(samples, seed=1)
    other = case.example.arguments(samples, seed=3)
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(a, Tensor) and a.ndim and len(a) == samples:
            b[:1] = a[:1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        outputs = zip(
            tree_leaves(copy.deepcopy(layer)(*one)), tree_leaves(layer(*other)), strict=True
        )
    for a, b in outputs:
        if isinstance(a, Tensor):
            demand(len(a) % samples == 0, f"an output of shape {list(a.shape)} for {samples}")
            demand_close(b[:1], a[:1], 1e-9, "the layer mixes samples, so no rule can serve it")


def _demand_right(case: RuleCase, trial: Trial, tolerance: float, label: str) -> None:
    _demand_sum(case.blocks(trial), trial.jacobian, trial.call.batch_size, tolerance, label)


def _demand_sum(
    blocks: list[Block],
    jacobian: dict[Parameter, Tensor],
    samples: int,
    tolerance: float,
    label: str,
) -> None:
    rows = torch.cat(list(jacobian.values()), dim=1)
    with torch.no_grad():
        weights = torch.linspace(-1.0, 2.0, len(rows), dtype=torch.float64, device="cpu")
        by_task = weights.reshape(-1, samples)
        gradients = weighted_by(blocks, by_task)
        gramian = gramian_of(blocks, len(rows))
    demand_close(gramian, rows @ rows.T, tolerance, f"the Gramian, {label}")
    for parameter, of_parameter in jacobian.items():
        expected = (weights @ of_parameter).view(parameter.shape)
        got = gradients.get(parameter)
        if got is None:
            demand(not expected.any(), f"no block for a parameter, {label}")
        else:
            demand_close(got.to_dense(), expected, 10 * tolerance, f"a weighted gradient, {label}")


def agrees_with_backward_passes(case: RuleCase) -> None:
    for tasks, samples, repeats in _SIZES:
        label = f"{tasks} tasks, {samples} samples of {repeats}"
        _demand_right(case, case.trial(tasks, samples, repeats), _EXACT, label)


def agrees_in_lower_precision(case: RuleCase) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        trial = case.trial(dtype=dtype)
        dtypes = {block.dtype for block in case.blocks(trial)}
        demand(dtypes <= {torch.float32}, f"blocks of {dtypes} for a layer in {dtype}")
        _demand_right(case, trial, _SINGLE, f"{dtype} against float64 of the same numbers")


def gives_explicit_rows(case: RuleCase) -> None:
    trial = case.trial()
    for block in [part for whole in case.blocks(trial) for part in whole.split()]:
        demand(len(block.columns) == 1, "split() leaves a block of several parameters")
        [(parameter, part)] = block.columns
        expected = trial.jacobian[parameter].view(-1, *(parameter.shape or (1,)))
        if part is not None:
            expected = expected.clone()
            expected[:, : part[0]] = expected[:, part[1] :] = 0.0
        length = expected.shape[1]
        for start, stop in ((0, length), (length // 2, length)):
            with torch.no_grad():
                got = block.rows(start, stop)
            demand_close(got, expected[:, start:stop].flatten(1), 1e-10, "rows of a block")


def adds_up_over_calls(case: RuleCase) -> None:
    layer = case.example.layer()
    trials = [make_trial(layer, case.example.arguments(3, seed=s), 2, 3) for s in (1, 2)]
    first, second = (trial.jacobian for trial in trials)
    jacobian = {parameter: first[parameter] + second[parameter] for parameter in first}
    blocks = [block for trial in trials for block in case.blocks(trial)]
    _demand_sum(blocks, jacobian, 3, _EXACT, "two calls of one layer")


def serves_only_what_is_wanted(case: RuleCase) -> None:
    for name, _ in case.example.layer().named_parameters():
        layer = case.example.layer()
        for other, parameter in layer.named_parameters():
            parameter.requires_grad_(other == name)
        trial = make_trial(layer, case.example.arguments(3), 2, 3)
        [wanted] = trial.jacobian
        columns = [p for block in case.blocks(trial) for p, _ in block.columns]
        demand(all(p is wanted for p in columns), f"blocks of frozen parameters beside {name}")
        _demand_right(case, trial, _EXACT, f"only {name} is wanted")


def takes_arguments_by_keyword(case: RuleCase) -> None:
    layer, arguments = case.example.layer(), case.example.arguments(3)
    names = named_arguments(layer, arguments)
    if names is None:
        raise NotApplicable("the layer takes its arguments by position only")
    trial = make_trial(layer, arguments, 2, 3, keywords=names)
    _demand_right(case, trial, _EXACT, f"arguments by keyword, {names}")


def copes_with_unused_outputs(case: RuleCase) -> None:
    layer, arguments = case.example.layer(), case.example.arguments(3)
    outputs = len(make_trial(layer, arguments, 1, 3).call.output_grads)
    for used in range(outputs):
        trial = make_trial(layer, arguments, 2, 3, used=used)
        _demand_right(case, trial, _EXACT, f"only output {used} is used")


def changes_nothing(case: RuleCase) -> None:
    trial = case.trial()
    call, layer = trial.call, trial.call.module
    given = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    given += [g for g in call.output_grads if g is not None]
    given += [*layer.parameters(), *layer.buffers()]
    copies, generator = [t.detach().clone() for t in given], torch.get_rng_state()
    modes = [module.training for module in layer.modules()]
    with _uncallable(layer):
        blocks = case.blocks(trial)
        gramian_of(blocks, 6)
        weighted_by(blocks, torch.ones(2, 3, dtype=torch.float64, device="cpu"))
    same = all(torch.equal(t, c) for t, c in zip(given, copies, strict=True))
    demand(same, "the rule modified the layer, its inputs or the gradients")
    demand(torch.equal(torch.get_rng_state(), generator), "the rule drew random numbers")
    demand(modes == [m.training for m in layer.modules()], "the rule changed a training mode")
    demand(all(p.grad is None for p in layer.parameters()), "the rule left a .grad")


@contextmanager
def _uncallable(layer: nn.Module) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise ConformanceError("the rule calls the layer")

    handles = [module.register_forward_pre_hook(refuse) for module in layer.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_no_state(case: RuleCase) -> None:
    first, other = case.trial(), case.trial(tasks=1, samples=2)
    with torch.no_grad():
        before = gramian_of(case.blocks(first), 6)
        gramian_of(case.blocks(other), 2)
        again = gramian_of(case.blocks(first), 6)
    demand(torch.equal(before, again), "the same call gives another result later")


def estimates_its_cost(case: RuleCase) -> None:
    beats_rows = case.rule.beats_rows
    layer, arguments = case.example.layer(), case.example.arguments(3)
    shape = make_trial(layer, arguments, 1, 3).call.output_grads[0].shape[1:]  # type: ignore[union-attr]  # all outputs are used
    for given in (arguments, ()):  # all of them may come by keyword
        for tasks in (1, 16):
            answer = beats_rows(layer, given, shape, tasks)
            demand(isinstance(answer, bool), f"beats_rows gives {answer!r}")


class _Model(nn.Module):
    """A layer called twice, and a twin that shares its parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.twin = layer, copy.deepcopy(layer)
        for name, _ in list(layer.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            setattr(
                self.twin.get_submodule(owner),
                attribute,
                getattr(layer.get_submodule(owner), attribute),
            )

    def forward(self, samples: int, *calls: Any) -> Tensor:
        outputs = [self.layer(*calls[0]), self.layer(*calls[1]), self.twin(*calls[2])]
        tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        return torch.stack([_scores(t.reshape(samples, -1)) for t in tensors]).sum(0)


def _scores(features: Tensor) -> Tensor:
    """Two smooth functions of the features of each sample, shape [B, 2]."""
    mixing = torch.randn(
        features.shape[1], 2, generator=torch.Generator().manual_seed(4), device="cpu"
    )
    scaled = mixing.to(features) / max(1, features.shape[1]) ** 0.5
    return torch.tanh(features @ scaled) + features.square().mean(1, keepdim=True)


def works_in_the_engine(case: RuleCase) -> None:
    model = _Model(case.example.layer())
    _demand_engine(model, case.example, "reused and shared")
    next(model.parameters()).requires_grad_(False)
    if any(p.requires_grad for p in model.parameters()):
        _demand_engine(model, case.example, "the first parameter frozen")


def _demand_engine(model: nn.Module, example: LayerExample, label: str) -> None:
    samples = 3
    calls = [example.arguments(samples, seed=s) for s in (1, 2, 3)]
    shapes: dict[int | None, Callable[[Tensor], Tensor]] = {
        0: lambda losses: losses[:, 0],
        1: lambda losses: losses.T,
        None: lambda losses: losses.mean(0),
    }
    for batch_dim, of in shapes.items():
        engine = Engine(model, batch_dim=batch_dim)
        with torch.random.fork_rng(devices=[]):
            losses = of(model(samples, *calls))
        _demand_gramian(engine, model, losses, f"{label}, batch_dim={batch_dim}")


def _demand_gramian(engine: Engine, model: nn.Module, losses: Tensor, label: str) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in losses.reshape(-1):
        dense = dense_gradients([loss], parameters, [None])
        rows.append(torch.cat([g.reshape(-1) for g in dense]))
    jacobian = torch.stack(rows)
    expected = jacobian @ jacobian.T
    gramian = engine.compute_gramian(losses)
    if losses.ndim == 2:
        gramian = gramian.permute(0, 1, 3, 2).reshape(expected.shape)
    demand_close(gramian, expected, _EXACT, f"the Gramian of a model, {label}")
    weights = torch.linspace(-1.0, 2.0, losses.numel(), dtype=losses.dtype, device="cpu").view_as(
        losses
    )
    engine.backward(losses, lambda _: weights)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    update = torch.cat([g.reshape(-1) for g in grads])
    model.zero_grad(set_to_none=True)
    demand_close(update, weights.reshape(-1) @ jacobian, 1e-11, f"the fused gradient, {label}")


def refuses_the_layer(case: RuleCase) -> None:
    layer = case.example.layer()
    reason = case.rule.refusal(layer)
    demand(isinstance(reason, str) and bool(reason.strip()), f"refusal gives {reason!r}")
    table = Engine(layer, batch_dim=0).explain()
    demand(reason in table, "the reason is not shown by Engine.explain")


ON_EXAMPLES = (
    satisfies_the_protocol,
    serves_the_layer,
    keeps_samples_apart,
    agrees_with_backward_passes,
    agrees_in_lower_precision,
    gives_explicit_rows,
    adds_up_over_calls,
    serves_only_what_is_wanted,
    takes_arguments_by_keyword,
    copes_with_unused_outputs,
    changes_nothing,
    has_no_state,
    works_in_the_engine,
)

WITH_COST = (estimates_its_cost,)

ON_REFUSED = (refuses_the_layer,)
