"""After each refusal nothing has changed: neither `.jac` nor `.grad`, nor is the graph freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jdcore import ParameterError, ParameterTypeError
from jdcore.autojac import backward, jac, jac_to_grad, mtl_backward


class Scene:
    """Two trunk parameters, two heads, features and losses, all with a .jac and .grad before."""

    def __init__(self) -> None:
        self.a = torch.tensor([1.0, 2.0], requires_grad=True)
        self.b = torch.tensor([3.0, 4.0], requires_grad=True)
        self.heads = [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)]
        self.hidden = self.a.exp()
        self.features = self.hidden * self.b
        self.losses = [head * self.features.sum().exp() for head in self.heads]
        self.loss = self.losses[0]
        self.constant = torch.ones(2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.complex = torch.ones(2, dtype=torch.complex64, requires_grad=True)
        for leaf in self.leaves():
            leaf.jac = torch.full((2, *leaf.shape), 7.0)
            leaf.grad = torch.full_like(leaf, 9.0)

    def leaves(self) -> Iterator[Tensor]:
        yield from (self.a, self.b, *self.heads)


Call = Callable[[Scene], Any]

BOTH: list[tuple[str, Call, str]] = [
    ("no tensor", lambda s: [[]], r"at least one Tensor, got none"),
    ("not a tensor", lambda s: [1.0], r"a Tensor or a sequence of Tensors, got a float"),
    ("a module", lambda s: [nn.Linear(1, 1)], r"got a Linear. If its .* pass module.parameters"),
    ("a module that is iterable", lambda s: [nn.Sequential()], r"got a Sequential. If its para"),
    ("modules", lambda s: [[nn.Tanh()]], r"`\w+\[0\]` must be a Tensor, got a Tanh. If its para"),
    ("None inside", lambda s: [[s.loss, None]], r"`\w+\[1\]` must be a Tensor, got None"),
    ("a string", lambda s: ["losses"], r"got a str"),
    ("an array that is not iterable", lambda s: [np.array(1.0)], r"got a ndarray"),
    ("repeated", lambda s: [[s.loss, s.loss]], r"distinct tensors, got the same one at"),
    ("no grad", lambda s: [s.constant], r"requires grad"),
    ("none of them needs grad", lambda s: [[s.constant, torch.ones(())]], r"requires grad"),
    ("complex", lambda s: [s.complex * 2], r"real floating dtype, got a complex64"),
    ("integers", lambda s: [[s.loss, torch.tensor(1)]], r"`\w+\[1\]` .* real floating dtype"),
    ("no element", lambda s: [s.features[:0]], r"at least one element"),
]


def _jac_errors(name: str) -> list[tuple[str, Call, str]]:
    """What can be wrong with the initial Jacobians of one loss and the two features."""

    def given(*values: Any) -> Call:
        return lambda s: ([s.loss, s.features], {name: values[0] if len(values) == 1 else values})

    ones = torch.ones
    return [
        ("count", given(ones(3)), rf"`{name}` must be 2 tensors, one for each"),
        ("shape", given(ones(3), ones(3, 3)), rf"`{name}\[1\]` must be of shape \[m, 2\]"),
        ("no rows dimension", given(ones(()), ones(3, 2)), rf"`{name}\[0\]` must be of shape"),
        ("rows", given(ones(3), ones(4, 2)), rf"`{name}\[1\]` must be of 3 rows"),
        ("no row", given(ones(0), ones(0, 2)), r"at least one row"),
        ("dtype", given(ones(3).int(), ones(3, 2)), rf"`{name}\[0\]` must be of a real floating"),
        ("type", given(1.0, 2.0), rf"`{name}\[0\]` must be a Tensor, got a float"),
        ("device", given(ones(3, device="meta"), ones(3, 2)), r"on cpu, as its tensor"),
    ]


CHUNKS = [(0, ">= 1"), (-2, ">= 1"), (True, "an int"), (1.5, "an int"), ("2", "an int")]


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    for leaf in scene.leaves():
        assert leaf.jac.eq(7.0).all()
        assert leaf.jac.shape == (2, *leaf.shape)
        assert leaf.grad.eq(9.0).all()
    assert scene.frozen.grad is None
    torch.autograd.grad(scene.losses, [scene.a])  # raises if the graph was freed


def _ids(table: list[tuple[str, Call, str]]) -> list[str]:
    return [name for name, _, _ in table]


@pytest.mark.parametrize(("name", "arguments", "match"), BOTH, ids=_ids(BOTH))
@pytest.mark.parametrize("function", [backward, jac])
def test_tensors_to_differentiate(
    scene: Scene, function: Any, name: str, arguments: Call, match: str
) -> None:
    with pytest.raises(ParameterError, match=match):
        function(*arguments(scene))


@pytest.mark.parametrize(("name", "arguments", "match"), BOTH, ids=_ids(BOTH))
def test_losses_of_tasks(scene: Scene, name: str, arguments: Call, match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        mtl_backward(*arguments(scene), scene.features)


@pytest.mark.parametrize(("name", "arguments", "match"), BOTH, ids=_ids(BOTH))
def test_features(scene: Scene, name: str, arguments: Call, match: str) -> None:
    with pytest.raises(ParameterError, match=match.replace(r"\w+", "features")):
        mtl_backward(scene.losses, *arguments(scene))


@pytest.mark.parametrize(
    ("name", "arguments", "match"), _jac_errors("jac_tensors"), ids=_ids(_jac_errors(""))
)
def test_initial_jacobians_of_backward(
    scene: Scene, name: str, arguments: Call, match: str
) -> None:
    outputs, keywords = arguments(scene)
    with pytest.raises(ParameterError, match=match):
        backward(outputs, **keywords)


@pytest.mark.parametrize(
    ("name", "arguments", "match"), _jac_errors("jac_outputs"), ids=_ids(_jac_errors(""))
)
def test_initial_jacobians_of_jac(scene: Scene, name: str, arguments: Call, match: str) -> None:
    outputs, keywords = arguments(scene)
    with pytest.raises(ParameterError, match=match):
        jac(outputs, **keywords)


@pytest.mark.parametrize(("size", "match"), CHUNKS)
def test_chunk_sizes(scene: Scene, size: Any, match: str) -> None:
    for call in (
        lambda: backward(scene.losses, parallel_chunk_size=size),
        lambda: jac(scene.losses, parallel_chunk_size=size),
        lambda: mtl_backward(scene.losses, scene.features, parallel_chunk_size=size),
    ):
        with pytest.raises(ParameterError, match=f"`parallel_chunk_size` must be {match}"):
            call()


def test_flags_are_bools(scene: Scene) -> None:
    for call in (
        lambda: backward(scene.losses, retain_graph=1),
        lambda: jac(scene.losses, retain_graph=1),
        lambda: mtl_backward(scene.losses, scene.features, retain_graph=1),
        lambda: jac_to_grad([scene.a], torch.sum, retain_jac=1),
    ):
        with pytest.raises(ParameterTypeError, match=r"must be a bool, got 1"):
            call()


@pytest.mark.parametrize("function", [backward, jac])
def test_inputs(scene: Scene, function: Any) -> None:
    def refused(inputs: Any, match: str) -> None:
        with pytest.raises(ParameterError, match=match):
            function(scene.losses, inputs=inputs)

    refused([], "at least one Tensor")
    refused([scene.a, 1.0], r"`inputs\[1\]` must be a Tensor")
    refused([scene.a, scene.constant], r"`inputs\[1\]` must be a tensor that requires grad")
    refused([scene.complex], r"`inputs\[0\]` must be of a real floating dtype")
    if function is backward:
        refused([scene.frozen], "that `tensors` depend on, got none")
        refused([torch.ones(2, requires_grad=True)], "that `tensors` depend on, got none")
        refused([scene.hidden], r"`inputs\[0\]` must be a leaf, or .*ExpBackward0.*retain_grad")
    else:
        refused([scene.frozen], r"`inputs\[0\]` must be a tensor that requires grad")


def test_complex_parameters_behind_the_losses(scene: Scene) -> None:
    loss = scene.complex.abs().sum()
    with pytest.raises(ParameterTypeError, match="complex64"):
        backward([scene.loss, loss])
    with pytest.raises(ParameterTypeError, match="complex64"):
        jac([scene.loss, loss])
    with pytest.raises(ParameterTypeError, match="complex64"):
        mtl_backward([scene.loss, loss], [scene.features, scene.complex * 2])


def test_jacobians_of_another_number_of_rows_cannot_be_added(scene: Scene) -> None:
    with pytest.raises(ParameterError, match=r"`\.jac` must be None or .* shape \[1\], .* got a"):
        backward(scene.loss)
    with pytest.raises(ParameterError, match=r"`\.jac` must be None or .* shape \[3, 2\]"):
        mtl_backward([*scene.losses, scene.features.sum()], scene.features)


def test_task_parameters(scene: Scene) -> None:
    def refused(match: str, **keywords: Any) -> None:
        with pytest.raises(ParameterError, match=match):
            mtl_backward(scene.losses, scene.features, **keywords)

    first, second = scene.heads
    refused("2 groups of parameters, one per task, got 1", tasks_params=[[first]])
    for nothing in (1, nn.Linear(1, 1), np.array(1.0), torch.tensor(1.0)):
        refused("2 groups of parameters, one per task, got a", tasks_params=nothing)
    refused(
        r"`tasks_params\[1\]` must be disjoint from shared_params, .* shared_params\[0\]",
        tasks_params=[[first], [second, scene.a]],
        shared_params=[scene.a],
    )
    refused("disjoint", tasks_params=[[first], [scene.b]])
    refused(r"`tasks_params\[0\]\[0\]` must be a Tensor", tasks_params=[[1.0], []])
    refused(r"`tasks_params\[1\]\[0\]` .* requires grad", tasks_params=[[], [scene.constant]])
    refused(r"`shared_params` .* Linear. If .* module.parameters", shared_params=nn.Linear(1, 1))
    refused(r"`shared_params` must be .* got an? int", shared_params=3)
    refused(r"`shared_params\[0\]` must be a leaf", shared_params=scene.hidden.sum())
    refused(r"`tasks_params\[0\]` .* module.parameters", tasks_params=[nn.Linear(1, 1), []])
    refused(r"`shared_params\[0\]` .* requires grad", shared_params=[scene.constant])
    refused(r"`shared_params\[0\]` must be a leaf", shared_params=[scene.hidden])
    refused(r"`tasks_params\[0\]\[0\]` must be a leaf", tasks_params=[[scene.hidden], []])


def test_features_computed_from_one_another(scene: Scene) -> None:
    with pytest.raises(ParameterError, match=r"independently of one another, got features\[1\]"):
        mtl_backward(scene.losses, [scene.features, scene.hidden])


def test_non_scalar_losses_need_initial_gradients(scene: Scene) -> None:
    losses = [scene.loss, scene.features]
    with pytest.raises(ParameterError, match=r"`tensors\[1\]` must be a scalar, or come with"):
        mtl_backward(losses, scene.features)
    for gradients, match in (
        ([torch.ones(())], "`grad_tensors` must be 2 tensors"),
        ([torch.ones(()), torch.ones(3)], r"`grad_tensors\[1\]` must be of shape \[2\]"),
        ([torch.ones((), dtype=torch.int), torch.ones(2)], r"`grad_tensors\[0\]` .* dtype"),
        ([torch.ones(()), torch.ones(2, device="meta")], r"`grad_tensors\[1\]` must be on cpu"),
    ):
        with pytest.raises(ParameterError, match=match):
            mtl_backward(losses, scene.features, grad_tensors=gradients)


def test_jac_to_grad_refuses(scene: Scene) -> None:
    def refused(match: str, tensors: Any = scene.a, aggregator: Any = torch.sum) -> None:
        with pytest.raises(ParameterError, match=match):
            jac_to_grad(tensors, aggregator)

    refused("a Tensor or a sequence", tensors=1.0)
    refused("got a Linear. If its .* pass module.parameters", tensors=nn.Linear(1, 1))
    refused("at least one Tensor, got none", tensors=[])
    refused("at least one has a .jac", tensors=[scene.frozen, scene.constant])
    refused(
        r"an Aggregator or a function.* jdcore\.get_aggregator\('upgrad'\)", aggregator="upgrad"
    )
    refused(r"an Aggregator or a function.* Make one: Scene\(\)", aggregator=Scene)
    refused(r"returns a real Tensor of shape \[2\]", aggregator=torch.sum)
    refused(r"returns a real Tensor of shape \[2\]", aggregator=lambda matrix: None)


def test_jac_to_grad_refuses_jacobians_that_do_not_fit_together(scene: Scene) -> None:
    odd = torch.ones(2, requires_grad=True)
    odd.jac = torch.ones(3, 2)
    with pytest.raises(ParameterError, match=r"`\.jac` must be of 2 rows"):
        jac_to_grad([scene.a, odd], torch.sum)
    odd.jac = torch.ones(2, 5)
    with pytest.raises(ParameterError, match=r"`\.jac` must be a dense tensor of shape \[m, 2\]"):
        jac_to_grad([scene.a, odd], torch.sum)
    odd.jac = None
    with pytest.raises(ParameterError, match=r"has a \.jac"):
        jac_to_grad([odd], torch.sum)


def test_a_failing_aggregator_leaves_everything_as_it_was(scene: Scene) -> None:
    def fail(matrix: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jac_to_grad(scene.leaves(), fail)


class _Fails(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Fails.calls += 1
        if _Fails.calls > 1:
            raise ZeroDivisionError
        return gradient


@pytest.mark.parametrize("function", ["backward", "mtl_backward"])
def test_a_failure_in_the_middle_of_the_rows_leaves_everything_as_it_was(
    scene: Scene, function: str
) -> None:
    _Fails.calls = 0
    features = _Fails.apply(scene.features)
    losses = [head * features.sum() for head in scene.heads]
    with pytest.raises(ZeroDivisionError):
        backward(losses) if function == "backward" else mtl_backward(losses, features)
    assert _Fails.calls == 2


def _complex() -> Tensor:
    return torch.ones(2, dtype=torch.complex64, requires_grad=True)


def _float8() -> Tensor:
    return torch.ones(2).to(torch.float8_e4m3fn).requires_grad_()


def _nested() -> Tensor:
    parts = [torch.ones(2), torch.ones(3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def _sparse() -> Tensor:
    return torch.eye(2).to_sparse().requires_grad_()


def _meta() -> Tensor:
    return torch.ones(2, device="meta", requires_grad=True)


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_complex, r"of a real floating dtype, got a complex64 .*view_as_real"),
        (_float8, "of a real floating dtype, got a float8"),
        (_nested, "a dense Tensor, got a nested Tensor"),
        (_sparse, "a dense Tensor, got a sparse_coo Tensor"),
        (_meta, "holds values, got a Tensor on the meta device.*to_empty"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(
    make: Callable[[], Tensor], reason: str
) -> None:
    odd = make()
    a = torch.ones(2, requires_grad=True)
    loss = a.sum() + torch.zeros(()).to(a)
    calls: dict[str, Callable[[], Any]] = {
        r"tensors\[0\]": lambda: backward(odd),
        r"inputs\[1\]": lambda: backward(loss, inputs=[a, odd]),
        r"outputs\[0\]": lambda: jac(odd),
        r"features\[0\]": lambda: mtl_backward([loss], odd),
        r"shared_params\[0\]": lambda: mtl_backward([loss], a, shared_params=[odd]),
        r"tasks_params\[0\]\[0\]": lambda: mtl_backward([loss], a, tasks_params=[[odd]]),
    }
    for parameter, call in calls.items():
        with pytest.raises(ParameterError, match=f"`{parameter}` must be .*{reason}"):
            call()
    assert not hasattr(a, "jac")


def test_a_default_input_of_another_kind_is_refused() -> None:
    odd = _complex()
    with pytest.raises(ParameterError, match=r"`inputs\[0\]` must be of a real floating dtype"):
        backward(torch.view_as_real(odd).sum())


def test_losses_inside_of_a_transform_are_refused_with_the_reason() -> None:
    w = torch.ones(3, requires_grad=True)

    def inside(x: Tensor) -> Tensor:
        losses = [(w * x).sum(), (w * x).square().sum()]
        with pytest.raises(ParameterError, match=r"outside of the transforms of torch\.func"):
            backward(losses)
        return losses[0]

    torch.vmap(inside)(torch.ones(2, 3))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("size", [3, 40_000])  # small, or listened to while the pass goes on
@pytest.mark.parametrize("product", [False, True])
def test_data_of_another_shape_put_into_a_parameter_are_no_rows(
    product: bool, size: int, chunk_size: int | None
) -> None:
    given: Any = {"parallel_chunk_size": chunk_size}
    calls: list[Callable[[Tensor, Tensor, Tensor], Any]] = [
        lambda weight, features, losses: backward(losses, **given),
        lambda weight, features, losses: jac(losses, weight, **given),
        lambda weight, features, losses: mtl_backward(list(losses), features, **given),
    ]
    for call in calls:
        weight = torch.ones(1, size, requires_grad=True)
        x = torch.ones(3, 1 if product else size)
        features = x @ weight if product else x * weight
        losses = features.square().sum(1)
        # A row of the former shape can be copied to these places, as many times as there are.
        weight.data = torch.ones(2, size)
        with pytest.raises(ParameterError, match=rf"\[2, {size}\], got one of shape \[1, {size}\]"):
            call(weight, features, losses)
        assert not hasattr(weight, "jac")
