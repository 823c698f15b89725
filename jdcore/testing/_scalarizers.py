"""The laws of :class:`jdcore.Scalarizer`, for every scalarizer."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

import jdcore.scalarization
from jdcore._discovery import SCALARIZER
from jdcore._gramian_rules import RUNTIME
from jdcore._methods import scalarizer_class
from jdcore._registry import registry
from jdcore.config import to_config
from jdcore.config._arguments import arguments_of
from jdcore.protocols import Stateful
from jdcore.registry import get_scalarizer
from jdcore.spec import ScalarizerSpec
from jdcore.testing._case import accelerator, demand, demand_close, demand_refusal
from jdcore.testing._check import ConformanceCheck, checks_by, distribution_test
from jdcore.testing._description import (
    Names,
    demand_description,
    demand_expression,
    modules_after_listing,
)
from jdcore.testing._lifecycle import foreign_states

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@frozen
class ScalarizerCase:
    """One scalarizer under test: makes fresh instances and losses to call them on."""

    name: str

    @property
    def spec(self) -> ScalarizerSpec:
        spec: ScalarizerSpec = registry.entry(SCALARIZER, self.name).spec
        return spec

    def make(self, m: int = 4, arguments: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
        """A new scalarizer for m losses, seeded if it is stochastic."""
        seeded = {"generator": torch.Generator().manual_seed(seed)} if self.spec.stochastic else {}
        # What a check asks for comes before the example.
        chosen = {**self.spec.example(m), **seeded, **(arguments or {})}
        return scalarizer_class(self.name)(**chosen)

    def losses(self, m: int = 4, seed: int = 0) -> Tensor:
        """Positive losses, float64 Tensor [m]."""
        generator = torch.Generator().manual_seed(seed)
        # Away from zero, as some scalarizers take logarithms, and their derivatives are compared
        # with finite differences.
        return 0.5 + torch.rand(m, generator=generator, dtype=torch.float64, device="cpu")

    def advance(self, scalarizer: Any, seed: int) -> None:
        """One step of training."""
        scalarizer(self.losses(seed=seed))
        if self.spec.advanced_by is not None:
            method = getattr(scalarizer, self.spec.advanced_by)
            takes = len(inspect.signature(method).parameters)
            # Losses after the step, for those that want them: somewhat smaller.
            method(*[0.9 * self.losses(seed=seed + 100)][:takes])


Check = Callable[[ScalarizerCase], None]


def makes_one_loss_of_the_same_dtype(case: ScalarizerCase) -> None:
    for dtype in _DTYPES:
        losses = case.losses().to(dtype)
        result = case.make()(losses).detach()
        demand(result.shape == (), f"shape {list(result.shape)} for a vector of losses")
        demand(result.dtype == dtype, f"{dtype} in, {result.dtype} out")
        demand(bool(torch.isfinite(result)), f"{result} in {dtype}")
        wide = case.make()(losses.double()).detach()
        tolerance = 8 * torch.finfo(dtype).eps
        demand_close(result[None], wide.to(dtype)[None], tolerance, f"{dtype} against float64")


def works_on_accelerators(case: ScalarizerCase) -> None:
    kind = accelerator()
    arguments = {
        name: value.to(kind)
        for name, value in case.spec.example(4).items()
        if isinstance(value, Tensor)
    }
    scalarizer = case.make(arguments=arguments)
    if isinstance(scalarizer, torch.nn.Module):
        scalarizer.to(kind)
    result = scalarizer(case.losses().float().to(kind))
    demand(result.device.type == kind, f"{kind} in, {result.device} out")


def leaves_the_losses_alone(case: ScalarizerCase) -> None:
    losses = case.losses()
    copied = losses.clone()
    case.make()(losses)
    demand(torch.equal(losses, copied), "the losses were modified")


def handles_few_losses(case: ScalarizerCase) -> None:
    demand(case.make(0)(torch.zeros(0, device="cpu")).item() == 0.0, "no losses should give zero")
    demand(bool(torch.isfinite(case.make(1)(case.losses(1)))), "one loss gives no finite result")


def refuses_what_is_no_vector_of_losses(case: ScalarizerCase) -> None:
    losses = case.losses()
    malformed = {
        "a matrix": losses[None],
        "a scalar": losses[0],
        "integers": losses.long(),
        "complex numbers": losses.to(torch.complex64),
        "a sparse vector": losses.to_sparse(),
        "a vector without entries": losses.to("meta"),
        "a list": losses.tolist(),
    }
    for label, example in malformed.items():
        demand_refusal(partial(case.make(), example), label)


def refuses_losses_without_a_logarithm(case: ScalarizerCase) -> None:
    # Zero as well: its logarithm is infinite, and so is every gradient.
    for value in (0.0, -1.0):
        losses = case.losses()
        losses[1] = value
        demand_refusal(partial(case.make(), losses), f"a loss of {value}")


def is_not_finite_for_non_finite_losses(case: ScalarizerCase) -> None:
    losses = case.losses()
    losses[1] = torch.nan
    demand(not bool(torch.isfinite(case.make()(losses))), "NaN in, a finite loss out")


def differentiates(case: ScalarizerCase) -> None:
    losses = case.losses().requires_grad_()
    [gradient] = torch.autograd.grad(case.make()(losses), [losses])
    demand(bool(torch.isfinite(gradient).all()), f"gradient {gradient}")
    # The gradient of a surrogate is another one than that of its value, by design.
    if not case.spec.surrogate:
        demand(
            torch.autograd.gradcheck(lambda wide: case.make()(wide), (losses,)),
            "the derivative is wrong",
        )


def is_deterministic(case: ScalarizerCase) -> None:
    losses = case.losses()
    first, second = (case.make(seed=3)(losses) for _ in range(2))
    demand(torch.equal(first, second), "the same losses and generator gave different bits")


def is_trainable_as_declared(case: ScalarizerCase) -> None:
    scalarizer = case.make()
    parameters = list(scalarizer.parameters()) if isinstance(scalarizer, torch.nn.Module) else []
    demand(bool(parameters) == case.spec.trainable, f"it has {len(parameters)} parameters")
    if parameters:
        gradients = torch.autograd.grad(scalarizer(case.losses()), parameters)
        demand(all(bool(g.any()) for g in gradients), "its parameters have no gradient")


def is_stateful_as_declared(case: ScalarizerCase) -> None:
    stateful = isinstance(case.make(), Stateful)
    demand(stateful == case.spec.stateful, f"stateful is {stateful}, declared {case.spec.stateful}")


def continues_from_a_saved_state(case: ScalarizerCase) -> None:
    one, two = case.make(), case.make()
    for seed in range(3):
        case.advance(one, seed)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        demand(torch.equal(one(case.losses()), two(case.losses())), f"step {seed} differs")
        case.advance(one, seed)
        case.advance(two, seed)


def advances_and_resets(case: ScalarizerCase) -> None:
    used, new = case.make(), case.make()
    for seed in range(3):
        case.advance(used, seed)
    losses = case.losses(seed=9)
    # Else reset() would have nothing to do, and the check nothing to see.
    demand(not torch.equal(used(losses), new(losses)), "three steps changed nothing")
    used.reset()
    demand(torch.equal(used(losses), case.make()(losses)), "reset() left something behind")


def keeps_its_state_when_a_call_fails(case: ScalarizerCase) -> None:
    scalarizer = case.make()
    case.advance(scalarizer, 0)
    before = repr(scalarizer.state_dict())
    broken = case.losses()
    broken[1] = torch.nan
    scalarizer(broken)
    demand(repr(scalarizer.state_dict()) == before, "NaN changed the state")
    demand_refusal(lambda: scalarizer(case.losses()[None]), "a matrix")
    # A state belongs to its objectives: there is nothing to continue from for another number.
    demand_refusal(lambda: scalarizer(case.losses(5)), "another number of losses")
    for label, foreign in foreign_states(scalarizer.state_dict()):
        demand_refusal(partial(scalarizer.load_state_dict, foreign), label)
    demand(repr(scalarizer.state_dict()) == before, "what was refused changed the state")


def survives_pickling_and_copying(case: ScalarizerCase) -> None:
    original = case.make()
    case.advance(original, 0)
    losses = case.losses(seed=5)
    for other in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
        demand(repr(other) == repr(original), f"{other} is not {original}")
        demand(torch.equal(other(losses), original(losses)), "the copy behaves otherwise")


def survives_a_config_round_trip(case: ScalarizerCase) -> None:
    omit = ["generator"] if case.spec.stochastic else []
    original = case.make()
    config = json.loads(json.dumps(to_config(original, omit=omit)))
    known = {name: torch.Generator().manual_seed(0) for name in omit}
    rebuilt = get_scalarizer(config, **known)
    demand(to_config(rebuilt, omit=omit) == config, f"{config} became {rebuilt}")
    losses = case.losses()
    demand(torch.equal(rebuilt(losses), case.make()(losses)), "it behaves otherwise")


def refuses_unusable_arguments(case: ScalarizerCase) -> None:
    for argument in arguments_of(scalarizer_class(case.name)).values():
        nonsense = partial(case.make, arguments={argument.name: object()})
        demand_refusal(nonsense, f"nonsense as {argument.name}")


def describes_itself(case: ScalarizerCase) -> None:
    cls = scalarizer_class(case.name)
    demand_description(cls, case.spec)
    advanced_by = case.spec.advanced_by
    demand(advanced_by is None or callable(getattr(cls, advanced_by, None)), f"no {advanced_by}()")


def shows_what_you_would_type(case: ScalarizerCase) -> None:
    names = Names(jdcore.scalarization, {case.spec.class_name: scalarizer_class(case.name)})
    demand_expression(repr(case.make()), names)


def is_listed_without_being_imported(case: ScalarizerCase) -> None:
    modules = modules_after_listing(registry.entry(SCALARIZER, case.name).distribution)
    for module in ("torch", case.spec.scalarizer.partition(":")[0]):
        demand(module not in modules, f"listing the plugin imports {module}")


_ALWAYS: tuple[Check, ...] = (
    makes_one_loss_of_the_same_dtype,
    works_on_accelerators,
    leaves_the_losses_alone,
    handles_few_losses,
    refuses_what_is_no_vector_of_losses,
    is_not_finite_for_non_finite_losses,
    differentiates,
    is_deterministic,
    is_trainable_as_declared,
    survives_a_config_round_trip,
    refuses_unusable_arguments,
    describes_itself,
)
_OF_STATE: tuple[Check, ...] = (
    is_stateful_as_declared,
    continues_from_a_saved_state,
    advances_and_resets,
    keeps_its_state_when_a_call_fails,
)


def scalarizer_checks(name: str) -> list[ConformanceCheck]:
    """
    The checks that apply to a scalarizer.

    :raises ConformanceError: If its spec expects the failure of a check that does not apply.
    """
    case = ScalarizerCase(name)
    return checks_by(_applicable(case), name, case, case.spec.expected_failures)


def _applicable(case: ScalarizerCase) -> Iterator[Check]:
    yield from _ALWAYS
    if case.spec.positive:
        yield refuses_losses_without_a_logarithm
    # A module has a state_dict() of its own, which holds the parameters.
    yield from _OF_STATE if case.spec.stateful else (() if case.spec.trainable else _OF_STATE[:1])
    if not case.spec.stochastic:  # a torch.Generator has no literal and cannot be pickled
        yield from (shows_what_you_would_type, survives_pickling_and_copying)
    if registry.entry(SCALARIZER, case.name).distribution != RUNTIME:
        yield is_listed_without_being_imported


def scalarizer_tests(distribution: str) -> Any:
    """
    Make a pytest test that runs every check on every scalarizer of a distribution.

    :param distribution: Name of an installed distribution that provides scalarizers.
    :returns: A parametrized test function.
    :raises ConformanceError: If the distribution provides none.
    """
    return distribution_test(
        distribution, "scalarizer", lambda plugin: plugin.scalarizers, scalarizer_checks
    )
