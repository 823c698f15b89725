"""Names of solver backends: plain, qualified, with a variant; and the errors for unknown ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field, frozen

import jdcore
from jdcore import ParameterError, ParameterTypeError, SolverSpec, UnknownNameError
from jdcore import _registry as registry_module
from jdcore._discovery import Plugin, PluginRecord
from jdcore._loading import Loading
from jdcore._registry import Registry
from jdcore.aggregation import find_solver, solution, solver_field
from jdcore.errors import AmbiguousNameError, PluginError


@frozen
class Constant:
    """Solves "nothing" by the variant it was made for."""

    variant: str = field(default="plain")
    factor: float = field(default=1.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.variant == "absent":
            raise UnknownNameError(self.variant, "variant of constant", known=["plain"])

    def __call__(self) -> tuple[str, float]:
        return self.variant, self.factor


def solver(name: str, *, variants: bool = False) -> SolverSpec:
    return SolverSpec(
        name=name,
        problem="nothing",
        summary="For these tests.",
        factory=f"{__name__}:Constant",
        variants=variants,
        api_version=1,
    )


Fill = Callable[..., Registry]


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Fill:
    """Make the registry of the process one that holds the given solvers, by distribution."""

    def make(error: Exception | None = None, **distributions: list[SolverSpec]) -> Registry:
        records = [
            PluginRecord(distribution=d, version="1", entry_point=d, solvers=tuple(specs))
            for d, specs in distributions.items()
        ]
        if error is not None:
            records.append(
                PluginRecord(
                    distribution="jdplugins-quadprog",
                    version="1",
                    entry_point="quadprog",
                    error=error,
                )
            )
        registry = Registry()
        registry._loading = Loading([Plugin(record=record, point=None) for record in records])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other tests are about these
            registry.records()
        monkeypatch.setattr(registry_module, "registry", registry)
        monkeypatch.setattr(jdcore.registry, "registry", registry)
        registry_module.shared_solver.cache_clear()
        return registry

    return make


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("many", "plain"),
        ("MANY", "plain"),
        ("many:fast", "fast"),
        ("many:Two Words", "Two Words"),
        ("one:many", "plain"),
        ("one:many:fast", "fast"),
        ("One:Many:fast", "fast"),
    ],
)
def test_a_variant_is_what_follows_the_name(fill: Fill, name: str, variant: str) -> None:
    fill(one=[solver("many", variants=True)])

    assert jdcore.get_solver("nothing", name)() == (variant, 1.0)


def test_arguments_go_to_the_backend_with_and_without_a_variant(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])

    assert jdcore.get_solver("nothing", "many", factor=2.0)() == ("plain", 2.0)
    assert jdcore.get_solver("nothing", "many:fast", factor=2.0)() == ("fast", 2.0)
    with pytest.raises(ParameterTypeError, match="Parameter `speed` must be one that 'many' takes"):
        jdcore.get_solver("nothing", "many", speed=3)
    with pytest.raises(ParameterTypeError, match=r"takes \(factor\), got an unknown one"):
        jdcore.get_solver("nothing", "many:fast", variant="slow")


def test_a_backend_in_c_may_have_no_signature(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Constant", dict)  # inspect.signature(dict) raises
    fill(one=[solver("plain")])

    assert jdcore.get_solver("nothing", "plain", factor=2.0) == {"factor": 2.0}


def test_a_qualified_name_comes_before_a_variant(fill: Fill) -> None:
    # "many:fast" is the solver fast of the distribution many as well as a variant of many.
    fill(many=[solver("fast")], one=[solver("many", variants=True)])

    assert jdcore.get_solver("nothing", "many:fast")() == ("plain", 1.0)
    assert jdcore.get_solver("nothing", "one:many:fast")() == ("fast", 1.0)


def test_a_solver_that_two_distributions_claim_needs_a_qualified_name(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)], two=[solver("many", variants=True)])

    for name in ("many", "many:fast"):
        with pytest.raises(AmbiguousNameError, match="'one:many', 'two:many'"):
            jdcore.get_solver("nothing", name)
    assert jdcore.get_solver("nothing", "two:many:fast")() == ("fast", 1.0)
    assert jdcore.list_solvers("nothing") == {"nothing": ("one:many", "two:many")}


@pytest.mark.parametrize("name", ["single:fast", "many:", ":many", "other:many", "", ":"])
def test_a_name_that_fits_nothing_is_unknown(fill: Fill, name: str) -> None:
    fill(one=[solver("single"), solver("many", variants=True)])

    with pytest.raises(UnknownNameError, match="No nothing solver is registered under") as caught:
        jdcore.get_solver("nothing", name)

    assert caught.value.known == ("many", "single")


def test_a_variant_is_refused_by_the_backend_itself(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])

    with pytest.raises(UnknownNameError, match="Registered: plain"):
        jdcore.get_solver("nothing", "many:absent")


def known_problem(name: str) -> SolverSpec:
    return SolverSpec(
        name=name,
        problem="dual_cone",
        summary="For these tests.",
        factory=f"{__name__}:Constant",
        api_version=1,
    )


@pytest.mark.parametrize(
    "name", ["quadprog", "QuadProg", "qpsolvers:daqp", "jdplugins-quadprog:qpsolvers:daqp"]
)
def test_the_error_for_a_known_solver_says_what_to_install(fill: Fill, name: str) -> None:
    fill(one=[known_problem("own")])

    with pytest.raises(UnknownNameError) as caught:
        jdcore.get_solver("dual_cone", name)

    assert caught.value.hint == (
        "It is provided by jdplugins-quadprog: pip install jdplugins-quadprog."
    )
    assert caught.value.known == ("own",)


def test_the_error_for_any_other_solver_says_what_could_be_installed(fill: Fill) -> None:
    fill(**{"jdplugins-standard": [known_problem("native")]})

    with pytest.raises(UnknownNameError) as caught:
        jdcore.get_solver("dual_cone", "natiev")

    assert caught.value.hint == (
        "Not installed: 'qpsolvers', 'quadprog' (pip install jdplugins-quadprog)."
    )
    assert caught.value.close == ("native",)


@pytest.mark.parametrize("name", ["quadprog", "qpsolvers:daqp", "jdplugins-quadprog:quadprog"])
def test_a_solver_whose_plugin_failed_says_why(fill: Fill, name: str) -> None:
    failure = ImportError("no module named quadprog")
    fill(failure)

    with pytest.raises(PluginError, match="no module named quadprog") as caught:
        jdcore.get_solver("dual_cone", name)

    assert caught.value.__cause__ is failure


@define(eq=False)
class Poser:
    solver: Any = solver_field("nothing", default="many")
    fallback: Any = solver_field("nothing", default=None)


def test_a_field_takes_a_name_with_a_variant_and_keeps_it(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])

    poser = Poser(solver="many:fast")

    assert repr(poser) == "Poser(solver='many:fast', fallback=None)"
    assert find_solver("nothing", poser.solver)() == ("fast", 1.0)


def test_a_name_in_a_field_is_resolved_once(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])

    assert find_solver("nothing", "many:fast") is find_solver("nothing", "many:fast")
    assert find_solver("nothing", "many:fast") is not find_solver("nothing", "many")


def test_a_field_refuses_what_solves_nothing_and_keeps_what_it_had(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])
    poser = Poser(solver="many:fast", fallback="many")

    with pytest.raises(UnknownNameError):
        poser.solver = "meny"
    with pytest.raises(UnknownNameError):
        poser.solver = "many:absent"
    with pytest.raises(ParameterError, match="name of a nothing solver or such a solver, got 3"):
        poser.fallback = 3
    with pytest.raises(ParameterError):
        poser.solver = None  # only a fallback is optional

    assert (poser.solver, poser.fallback) == ("many:fast", "many")
    poser.fallback = None


def test_a_field_takes_an_object(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])
    own = Constant("own")

    assert find_solver("nothing", Poser(solver=own).solver) is own


def test_a_field_refuses_an_object_that_is_not_called_as_the_default_is(fill: Fill) -> None:
    fill(one=[solver("many", variants=True)])

    with pytest.raises(ParameterTypeError, match=r"got <function.*It is called as solver\(\)\."):
        Poser(solver=lambda gramian: gramian)
    with pytest.raises(ParameterTypeError, match=r"Make one: Constant\(\)"):
        Poser(solver=Constant)
    for given in (lambda gramian=None: gramian, lambda *_: None):
        assert Poser(solver=given).solver is given


def _with_more(gramian: Any, *_: Any) -> Any:
    return gramian


@functools.wraps(_with_more)
def _decorated() -> Any:
    return _with_more(None)


class _Bare:
    @staticmethod
    def __call__() -> None: ...


class _Odd:
    @property
    def __signature__(self) -> Any:
        raise OSError

    def __call__(self) -> None: ...


@pytest.mark.parametrize("given", [_decorated, functools.partial(_with_more, 1), _Bare(), _Odd()])
def test_a_field_takes_what_can_be_called_whatever_it_tells(fill: Fill, given: Any) -> None:
    fill(one=[solver("many", variants=True)])

    assert Poser(solver=given).solver is given


def test_a_field_takes_an_object_where_its_default_is_missing(fill: Fill) -> None:
    fill(one=[])

    assert Poser(solver=_decorated).solver is _decorated


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "a NoneType"),
        (1.0, "a float"),
        ([[1.0], [1.0, 2.0]], "a list"),
        (np.ones((1, 2)), r"an array of float64 of shape \[1, 2\]"),
        (np.ones(2, complex), r"an array of complex128 of shape \[2\]"),
        (torch.ones(2, device="meta"), r"a float32 Tensor of shape \[2\] on the meta device"),
    ],
)
def test_what_is_no_answer_is_told(answer: Any, told: str) -> None:
    expected = rf"a nothing problem by a real array of shape \[2\], got {told}"
    with pytest.raises(ParameterError, match=expected):
        solution("nothing", lambda given: given, (2,), answer)


@pytest.mark.parametrize(
    "answer",
    [
        *([1, 2], np.array([1.0, 2.0], np.float32), torch.arange(1, 3)),
        torch.tensor([1.0, 2.0], requires_grad=True),
    ],
)
def test_an_answer_is_of_float64(answer: Any) -> None:
    found = solution("nothing", lambda given: given, (2,), answer)

    assert (found.dtype, found.tolist()) == (np.float64, [1.0, 2.0])


def test_listing_solvers_makes_none(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(one=[solver("many", variants=True), solver("single")])
    monkeypatch.setattr(registry_module, "load_factory", lambda *_: pytest.fail("imported"))

    assert jdcore.list_solvers() == {"nothing": ("many", "single")}
    assert jdcore.list_solvers("dual_cone") == {"dual_cone": ()}


@pytest.mark.parametrize("problem", [None, 1, [], {}])
def test_a_problem_is_a_string(problem: Any) -> None:
    with pytest.raises(ParameterTypeError, match="`problem` must be a string"):
        jdcore.get_solver(problem, "native")
