"""What may be in ``.grad`` and ``.jac`` already, and what follows when they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from jdcore import ParameterError, autogram
from jdcore._fields import disjoint, set_aside, through_tensor_hooks, write_grads, write_jacs
from jdcore.autogram import Engine
from jdcore.autojac import backward, gramian_backward, jac_to_grad, mtl_backward
from tests.operations import Operations


def equal_weights(gramian: Tensor) -> Tensor:
    return torch.full((len(gramian),), 1.0 / len(gramian), dtype=gramian.dtype)


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _inference(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(shape)


UNWRITABLE: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.zeros(1).expand(3),
    "windows that overlap": lambda: torch.zeros(4).as_strided((3, 1), (0, 1)).view(3),
    "made in inference mode": lambda: _inference(3),
    "sparse": lambda: torch.zeros(3).to_sparse(),
}


@pytest.mark.parametrize("make", UNWRITABLE.values(), ids=UNWRITABLE)
def test_no_grad_is_written_if_one_of_them_cannot_be(make: Callable[[], Tensor]) -> None:
    first, second = _leaf(3), _leaf(3)
    second.grad = make()
    with pytest.raises(ParameterError, match=r"`\.grad` must be None or a dense tensor"):
        write_grads({first: torch.ones(3), second: torch.ones(3)})
    assert first.grad is None


def test_a_grad_of_another_dtype_or_shape_is_refused() -> None:
    for replaced in (torch.zeros(3, dtype=torch.float64), torch.zeros(4)):
        first, second = _leaf(3), _leaf(3)
        second.grad = torch.ones(3)
        second.data = replaced  # keeps the gradient that no longer fits
        with pytest.raises(ParameterError, match=r"`\.grad`"):
            write_grads({first: torch.ones(3), second: torch.ones_like(replaced)})
        assert first.grad is None
        assert second.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("make", UNWRITABLE.values(), ids=UNWRITABLE)
def test_no_jac_is_written_if_one_of_them_cannot_be(make: Callable[[], Tensor]) -> None:
    first, second = _leaf(), _leaf()
    second.jac = make()
    with pytest.raises(ParameterError, match=r"`\.jac` must be None or a dense tensor"):
        write_jacs({first: torch.ones(3), second: torch.ones(3)})
    assert not hasattr(first, "jac")


def _steps() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    def losses(a: Tensor, b: Tensor) -> list[Tensor]:
        return [(a * b).sum(), (a - b).square().sum()]

    def through_jac(a: Tensor, b: Tensor) -> None:
        backward(losses(a, b))
        jac_to_grad([a, b], lambda matrix: matrix.sum(dim=0))

    def through_heads(a: Tensor, b: Tensor) -> None:
        features = a * 1.0
        mtl_backward(losses(features, b), features)
        jac_to_grad(a, lambda matrix: matrix.sum(dim=0))

    def straight(a: Tensor, b: Tensor) -> None:
        gramian_backward(losses(a, b), lambda gramian: torch.ones(2))

    return {"jac_to_grad": through_jac, "mtl_backward": through_heads, "lean": straight}


@pytest.mark.parametrize(
    ("name", "place"),
    [("jac_to_grad", 0), ("jac_to_grad", 1), ("mtl_backward", 1), ("lean", 0), ("lean", 1)],
)
def test_a_step_that_cannot_be_written_changes_no_grad(name: str, place: int) -> None:
    leaves = [torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)]
    leaves[place].grad = torch.zeros(1).expand(3)
    with pytest.raises(ParameterError, match="elements share memory"):
        _steps()[name](*leaves)
    assert leaves[1 - place].grad is None
    assert leaves[place].grad.tolist() == [0.0, 0.0, 0.0]


class _Watch:
    """Counts the calls of post-accumulate-grad hooks and keeps the gradients they found."""

    def __init__(self, register: Callable[..., Any], *leaves: Tensor) -> None:
        self.seen: list[list[float]] = []
        for leaf in leaves:
            register(leaf, self)

    def __call__(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.seen.append(leaf.grad.tolist())


@pytest.mark.parametrize("step", _steps().values(), ids=_steps())
def test_hooks_after_accumulation_run_once_and_see_the_whole_gradient(
    step: Callable[[Tensor, Tensor], Any], register: Callable[..., Any]
) -> None:
    a, b = torch.full((2,), 3.0, requires_grad=True), torch.ones(2, requires_grad=True)
    watch = _Watch(register, a, b)
    step(a, b)
    # d(ab)/da + d(a-b)^2/da = b + 2 (a - b) = 5, and a - 2 (a - b) = -1 for b
    assert sorted(watch.seen) == [[-1.0, -1.0], [5.0, 5.0]]


def test_all_gradients_are_written_before_the_first_hook_runs() -> None:
    a, b = _leaf(1), _leaf(1)
    found = []
    a.register_post_accumulate_grad_hook(lambda leaf: found.append(b.grad))
    write_grads({a: torch.ones(1), b: torch.ones(1)})
    assert found[0] is b.grad
    assert b.grad is not None


def test_a_hook_may_remove_itself(register: Callable[..., Any]) -> None:
    a = _leaf(1)
    handle = register(a, lambda leaf: handle.remove())
    other = _Watch(register, a)
    write_grads({a: torch.ones(1)})
    write_grads({a: torch.ones(1)})
    assert other.seen == [[1.0], [2.0]]


def test_hooks_of_what_was_frozen_for_a_while_run() -> None:
    a, b = _leaf(2), _leaf(2)
    node = get_gradient_edge(a).node
    handle = node.register_prehook(lambda gradients: (2 * gradients[0],))
    a.requires_grad_(False)
    write_grads({a: torch.ones(2), b: torch.ones(2)})
    a.requires_grad_(True)
    write_grads({a: torch.ones(2)})
    assert a.grad.tolist() == [3.0, 3.0]
    handle.remove()


def test_hooks_before_accumulation_may_replace_the_gradient_or_stop_the_step() -> None:
    a, b = _leaf(2), _leaf(2)
    node = get_gradient_edge(a).node
    handles = [
        node.register_prehook(lambda gradients: (2 * gradients[0],)),
        node.register_prehook(lambda gradients: None),
    ]
    write_grads({a: torch.ones(2), b: torch.ones(2)})
    assert (a.grad.tolist(), b.grad.tolist()) == ([2.0, 2.0], [1.0, 1.0])
    node.register_prehook(lambda gradients: (gradients[0][:1],))
    with pytest.raises(ParameterError, match="of the shape of its tensor"):
        write_grads({b: torch.ones(2), a: torch.ones(2)})
    assert b.grad.tolist() == [1.0, 1.0]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("way", ["autojac", "autogram"])
def test_an_optimizer_that_steps_in_its_hook_trains_as_after_a_backward_pass(
    way: str, register: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain.load_state_dict(model.state_dict())
    engine = Engine(model, batch_dim=None)
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def advance(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        register(parameter, advance)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        losses = model(x).square().mean(dim=0)
        if way == "autojac":
            backward(losses)
            jac_to_grad(model.parameters(), lambda matrix: matrix.mean(dim=0))
        else:
            engine.backward(losses, equal_weights)
        plain(x).square().mean(dim=0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_a_grad_takes_the_dtype_that_its_tensor_asks_for() -> None:
    a = _leaf(2, dtype=torch.bfloat16)
    if not hasattr(a, "grad_dtype"):
        pytest.skip("this torch has one dtype for a tensor and its gradient")
    a.grad_dtype = torch.float32
    backward([a.float().sum(), a.float().prod()])
    jac_to_grad(a, lambda matrix: matrix.sum(dim=0))
    write_grads({a: torch.ones(2, dtype=torch.bfloat16)})
    assert a.grad.dtype == torch.float32
    assert a.grad.tolist() == [2.0, 2.0]


def test_a_grad_has_the_memory_layout_of_its_tensor() -> None:
    weight = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(2, 3, 4, 4)
    write_grads({weight: gradient})
    assert weight.grad.stride() == weight.stride()
    torch.testing.assert_close(weight.grad, gradient)


class Marked(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_a_subclass_are_plain_tensors_as_those_of_a_backward_pass(
    transposed: bool,
) -> None:
    matrix = torch.randn(3, 2).T if transposed else torch.randn(2, 3)
    trunk = nn.Parameter(matrix.as_subclass(Marked))
    heads = [nn.Parameter(matrix.clone().as_subclass(Marked)) for _ in range(2)]

    def step(name: str) -> None:
        features = trunk * 2.0
        losses = [(features * head).sum() for head in heads]
        if name == "torch":
            sum(losses).backward()
        elif name == "mtl":
            mtl_backward(losses, features)
        elif name == "gramian":
            gramian_backward(losses, equal_weights)
        else:
            backward(losses)
        if hasattr(trunk, "jac"):
            jac_to_grad([trunk, *heads], lambda rows: rows.sum(0))

    for name in ("torch", "mtl", "gramian", "rows"):
        step(name)
        for parameter in (trunk, *heads):
            assert type(parameter.grad) is Tensor, name
            assert parameter.grad.stride() == parameter.stride(), name
            parameter.grad = None


def test_sparse_gradients_add_up() -> None:
    sparse, dense = _leaf(3), _leaf(3)
    dense.grad = torch.ones(3)
    for _ in range(2):
        gradient = torch.tensor([0.0, 2.0, 0.0]).to_sparse()
        write_grads({sparse: gradient, dense: gradient.clone()})
    assert sparse.grad.is_sparse
    assert sparse.grad.to_dense().tolist() == [0.0, 4.0, 0.0]
    assert dense.grad.tolist() == [1.0, 5.0, 1.0]


@pytest.mark.parametrize(
    "cut",
    [
        lambda whole: [whole[:2], whole[1:3]],  # with an end that belongs to none
        lambda whole: [whole.view(2, 2).T],
    ],
)
def test_gradients_that_only_seem_to_make_up_a_storage_are_copied(
    cut: Callable[[Tensor], list[Tensor]],
) -> None:
    whole = torch.arange(4.0)
    gradients = cut(whole)
    separate = disjoint(gradients)
    assert all(map(torch.equal, separate, gradients))
    assert all(gradient.is_contiguous() for gradient in separate)
    assert whole.untyped_storage().data_ptr() not in {
        gradient.untyped_storage().data_ptr() for gradient in separate
    }


def test_gradients_that_share_memory_are_taken_apart() -> None:
    shared = torch.ones(2)
    separate = disjoint([shared, shared, torch.ones(1).expand(2), shared], [torch.ones(2)])
    assert len({gradient.untyped_storage().data_ptr() for gradient in separate}) == 4
    assert all(gradient.tolist() == [1.0, 1.0] for gradient in separate)


def test_a_gradient_in_the_memory_of_another_tensor_is_copied() -> None:
    kept = torch.ones(2)
    [copied] = disjoint([kept], [kept])
    [same] = disjoint([kept], [torch.ones(2)])

    assert copied.data_ptr() != kept.data_ptr()
    assert same is kept


def test_a_grad_that_no_longer_fits_its_tensor_stays_where_it_is() -> None:
    a, b = _leaf(2), _leaf(2)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    a.data = torch.zeros(3)  # torch would refuse to set its .grad again

    with set_aside([a, b]):
        assert b.grad is None

    assert a.grad.tolist() == b.grad.tolist() == [1.0, 1.0]


def test_parameters_that_only_act_in_a_sum_get_gradients_of_their_own_from_the_engine() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

        def forward(self) -> Tensor:
            return self.a + self.b

    model = Sum()
    engine = Engine(model, batch_dim=None)
    for _ in range(2):
        engine.backward(model(), equal_weights)
    assert model.a.grad.tolist() == model.b.grad.tolist() == [1.0, 1.0]


def test_tensor_hooks_change_gradients_that_no_backward_pass_brought() -> None:
    a, b = _leaf(2), _leaf(2)
    a.register_hook(lambda gradient: gradient * torch.tensor([1.0, 0.0]))
    a.register_hook(lambda gradient: None)
    b.register_hook(lambda gradient: gradient[0])
    assert through_tensor_hooks({a: torch.ones(2)})[a].tolist() == [1.0, 0.0]
    with pytest.raises(ParameterError, match=r"`hook` must be a function that returns None"):
        through_tensor_hooks({b: torch.ones(2)})


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("combine", [torch.add, lambda a, _: a.view(2)])
def test_gradients_do_not_lie_in_the_weights_that_were_given(
    combine: Callable[[Tensor, Tensor], Tensor], batch_dim: int | None
) -> None:
    """Where losses are parameters, or a sum of them, a pass hands on what it starts with."""
    leaf, weights = _leaf(2), torch.tensor([1.0, 2.0])
    losses = combine(leaf, _leaf(2))
    autogram.backward(losses, lambda _: weights, batch_dim=batch_dim, second_pass=True)
    assert leaf.grad is not None
    leaf.grad.zero_()  # as optimizers do
    assert weights.tolist() == [1.0, 2.0]


# -- memory that ends ------------------------------------------------------------------------------


class _Ending(Operations):
    """Has memory for the results of so many operations."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def is_counted(self, name: str, function: Any) -> bool:
        takes = name != "view"  # as is made to look for hooks
        if takes and self.counts.total() == self.count:
            raise torch.OutOfMemoryError
        return takes


@pytest.mark.parametrize("name", ["jac_to_grad", "mtl_backward", "gramian_backward", "autogram"])
def test_memory_that_ends_anywhere_leaves_all_fields_as_they_were(name: str) -> None:
    """Also of parameters whose ``.grad`` is laid out otherwise than the gradient: it is copied."""

    def run(count: int) -> bool:
        leaves = [torch.ones(3, 2).t().requires_grad_() for _ in range(3)]
        features = leaves[0].sin()
        scales = torch.ones(2, dtype=torch.float64)  # so that weights are told in another dtype
        losses = (features * leaves[1] * leaves[2] * torch.ones(2, 3)).sum(1) * scales
        steps: dict[str, Callable[[], object]] = {
            "jac_to_grad": lambda: jac_to_grad(leaves, lambda jacobian: jacobian.mean(0)),
            "mtl_backward": lambda: mtl_backward(list(losses), features),
            "gramian_backward": lambda: gramian_backward(losses, equal_weights),
            "autogram": lambda: autogram.backward(losses, equal_weights, batch_dim=0),
        }
        if name == "jac_to_grad":
            backward(losses)
        before = [getattr(leaf, "jac", None) for leaf in leaves]
        try:
            with _Ending(count):
                steps[name]()
        except torch.OutOfMemoryError:
            assert all(leaf.grad is None for leaf in leaves)
            assert all(getattr(t, "jac", None) is j for t, j in zip(leaves, before, strict=True))
            return False
        assert any(leaf.grad is not None for leaf in leaves)
        return True

    assert not run(0)
    assert any(run(count) for count in range(1, 400))
