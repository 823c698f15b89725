from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from jdcore import ParameterError, ParameterTypeError
from jdcore.autogram import Engine, backward, gramian
from jdcore.autojac import gramian_backward
from jdcore.errors import SinglePassError, UnservedGraphError
from tests.core.autogram.oracle import check_engine, randn

B = 5


def _refused(
    model: nn.Module, losses: Callable[[], Tensor], match: str, batch_dim: int | None = 0
) -> None:
    """Both entry points raise, and no gradient is left behind."""
    engine = Engine(model, batch_dim=batch_dim)
    with pytest.raises(ParameterError, match=match):
        engine.compute_gramian(losses())
    with pytest.raises(ParameterError, match=match):
        engine.backward(losses(), torch.diag)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch_dim", [0, None])
def test_reentrant_checkpointing(batch_dim: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))

    def losses() -> Tensor:
        out: Tensor = checkpoint(model[1], model[0](randn(B, 6)), use_reentrant=True)
        return out.pow(2).sum(1)

    _refused(model, losses, "reentrant", batch_dim)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda losses: Engine(nn.Linear(6, 6), batch_dim=None).compute_gramian(losses), "output"),
        (lambda losses: gramian(losses, batch_dim=None), "losses"),
        (lambda losses: gramian_backward(losses, torch.diag), "tensors"),
    ],
)
def test_the_losses_are_called_as_the_caller_calls_them(
    call: Callable[[Tensor], Any], name: str
) -> None:
    losses = checkpoint(nn.Linear(6, 1), randn(B, 6).requires_grad_(), use_reentrant=True)

    with pytest.raises(UnservedGraphError, match=f"Parameter `{name}` .* reentrant") as caught:
        call(losses)

    assert caught.value.operation == "a reentrant checkpoint"


class _Inner(nn.Module):
    """A model with one layer, ``blocks.1``, of which something is wrong."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 4), layer, nn.Linear(4, 1)])

    def forward(self, x: Tensor, through: Callable[..., Tensor] | None = None) -> Tensor:
        first, layer, last = self.blocks
        hidden = first(x)
        return last(layer(hidden) if through is None else through(layer, hidden)).squeeze(1)


def _listened(layer: nn.Module) -> None:
    torch.autograd.graph.register_multi_grad_hook(list(layer.parameters()), print)


class _Hiding(torch.autograd.Function):
    """Accumulates into parameters that it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Any:
        ctx.layer, ctx.x = layer, x.detach()
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            out = ctx.layer(ctx.x.requires_grad_())
        torch.autograd.backward(out, grads)
        return ctx.x.grad, None


def _hidden(layer: nn.Module, hidden: Tensor) -> Tensor:
    out: Tensor = _Hiding.apply(hidden, layer)
    return out


def _checkpointed(layer: nn.Module, hidden: Tensor) -> Tensor:
    out: Tensor = checkpoint(lambda x: layer(x), hidden, use_reentrant=True)
    return out


def _twice(layer: nn.Module, hidden: Tensor) -> Tensor:
    once: Tensor = layer(hidden)
    layer.float()
    return once + layer(hidden.float()).double()


def _replaced(layer: nn.Module, hidden: Tensor) -> Tensor:
    out: Tensor = layer(hidden)
    layer.weight.data = torch.ones(5)
    return out


@pytest.mark.parametrize(
    ("make", "prepare", "through"),
    [
        (lambda: nn.BatchNorm1d(4), None, None),
        (lambda: nn.BatchNorm1d(4, affine=False), None, None),
        (lambda: nn.BatchNorm1d(4).requires_grad_(False), None, None),
        (lambda: nn.Linear(4, 4), _listened, None),
        (lambda: nn.Linear(4, 4), None, _hidden),
        (lambda: nn.Linear(4, 4), None, _checkpointed),
        (lambda: nn.Linear(4, 4), None, _twice),
        (lambda: nn.LayerNorm(4, bias=False), None, _replaced),
    ],
)
def test_the_layer_at_fault_is_named(
    make: Callable[[], nn.Module],
    prepare: Callable[[nn.Module], None] | None,
    through: Callable[..., Tensor] | None,
) -> None:
    model = _Inner(make())
    if prepare is not None:
        prepare(model.blocks[1])
    where = rf"in layer '{{}}' \({type(model.blocks[1]).__name__}\): it"

    with pytest.raises(UnservedGraphError, match=where.format(r"blocks\.1")) as caught:
        Engine(model, batch_dim=0).backward(model(randn(B, 6), through), torch.diag)
    assert caught.value.layer == "blocks.1"
    assert not caught.value.tensors

    if through is _twice or through is _replaced:
        return  # once only
    # Of several modules by its number among them; and without modules, by what is at fault.
    parts = Engine(model.blocks[0], model.blocks, batch_dim=0)
    with pytest.raises(UnservedGraphError, match=where.format(r"1\.1")):
        parts.backward(model(randn(B, 6), through), torch.diag)
    with pytest.raises(UnservedGraphError, match=r"at a float64 Tensor of shape \[4") as caught:
        gramian(model(randn(B, 6), through), batch_dim=0)
    assert caught.value.layer is None


@pytest.mark.parametrize("batch_dim", [0, None])
def test_selective_checkpointing_which_allows_one_pass(batch_dim: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    operations = [torch.ops.aten.addmm.default]
    selection = partial(create_selective_checkpoint_contexts, operations)

    def losses() -> Tensor:
        hidden: Tensor = checkpoint(model, randn(B, 6), use_reentrant=False, context_fn=selection)
        return hidden.pow(2).sum(1)

    engine = Engine(model, batch_dim=batch_dim)
    with pytest.raises(SinglePassError, match="without `context_fn`"):
        engine.backward(losses(), torch.diag)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode(affine: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2))
    _refused(model, lambda: model(randn(B, 6)).sum(1), "BatchNorm")


def test_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    _refused(model, lambda: model(randn(B, 6)).pow(3).sum(1), "BatchNorm")


def test_batch_norm_in_training_mode_outside_of_the_modules() -> None:
    model, norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
    _refused(model, lambda: norm(model(randn(B, 6))).pow(3).sum(1), "BatchNorm")


def test_batch_norm_in_training_mode_below_the_modules_does_no_harm() -> None:
    norm, model = nn.BatchNorm1d(6), nn.Linear(6, 2)
    losses = model(norm(randn(B, 6))).sum(1)
    engine = Engine(model, batch_dim=0)
    losses = model(norm(randn(B, 6))).sum(1)
    assert engine.compute_gramian(losses).shape == (B, B)


def test_batch_norm_in_training_mode_without_samples() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    check_engine(make, lambda m: m(randn(B, 6)).pow(2).mean(0), None)


def test_losses_that_are_no_samples_are_served_all_the_same() -> None:
    # A loss for each output depends on all rows of the batch, and on rows of the weight alone.
    check_engine(lambda: nn.Linear(6, 3), lambda m: m(randn(B, 6)).pow(2).sum(0), 0)
    check_engine(lambda: nn.Linear(6, 3), lambda m: m(randn(6, 6)).pow(2).sum(0), 0)


def test_a_batch_dim_that_is_no_dimension() -> None:
    model = nn.Linear(6, 3)
    _refused(model, lambda: model(randn(B, 6)).sum(1), "`batch_dim` must be a dimension", 1)


def test_losses_that_depend_on_several_samples() -> None:
    model = nn.Linear(6, 3)

    def losses() -> Tensor:
        out = model(randn(B, 6))
        return (out @ out.T).softmax(1).diagonal()

    _refused(model, losses, "samples that mix")


def test_the_check_of_samples_is_made_for_every_kind_of_graph() -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(model(randn(B, 6)).sum(1))
    with pytest.raises(ParameterError, match="samples that mix"):
        engine.compute_gramian(model(randn(B, 2, 6)).pow(2).sum((1, 2)).softmax(0))


class _Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x - 1.0


def test_samples_that_mix_behind_a_layer_that_starts_at_zero() -> None:
    model = nn.Sequential(nn.Linear(6, 6), _Centred(), nn.Linear(6, 2))
    nn.init.zeros_(model[2].weight)
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ParameterError, match="samples that mix"):
        engine.compute_gramian((model(randn(B, 6)) + 1.0).pow(2).sum(1))


def test_samples_that_mix_in_training_mode_only() -> None:
    model = nn.Sequential(nn.Linear(6, 6), _Centred(), nn.Linear(6, 2)).eval()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(model(randn(B, 6)).pow(2).sum(1))
    model[1].train()
    with pytest.raises(ParameterError, match="samples that mix"):
        engine.compute_gramian(model(randn(B, 6)).pow(2).sum(1))


def test_an_output_without_a_graph() -> None:
    engine = Engine(nn.Linear(6, 3), batch_dim=0)
    for output in (torch.ones(3), torch.ones(3, requires_grad=True)):
        with pytest.raises(ParameterError, match="`output` must be the result of"):
            engine.compute_gramian(output)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_losses_inside_of_a_transform(batch_dim: int | None) -> None:
    layer = nn.Linear(6, 3)
    engine = Engine(layer, batch_dim=batch_dim)

    def total(x: Tensor) -> Tensor:
        return engine.compute_gramian(layer(x).sum(1)).sum()

    for transform in (torch.func.vmap(total), torch.func.grad(total)):
        with pytest.raises(ParameterError, match="`output` must be computed outside of the trans"):
            transform(torch.ones(2, 4, 6))


def test_losses_with_a_tangent() -> None:
    layer = nn.Linear(6, 3)
    with forward_ad.dual_level():  # type: ignore[no-untyped-call]
        inputs = forward_ad.make_dual(torch.ones(2, 6), torch.ones(2, 6))  # type: ignore[no-untyped-call]
        with pytest.raises(ParameterError, match=r"without a tangent of forward-mode AD"):
            Engine(layer, batch_dim=0).compute_gramian(layer(inputs).sum(1))


@pytest.mark.parametrize("output", [1.0, torch.ones(3, dtype=torch.int64)])
def test_an_output_that_is_no_floating_tensor(output: object) -> None:
    engine = Engine(nn.Linear(6, 3), batch_dim=0)
    with pytest.raises(ParameterTypeError, match=r"`output` must be (a floating|of a real)"):
        engine.compute_gramian(output)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_dim", ["0", 1.0, True])
def test_a_batch_dim_of_the_wrong_type(batch_dim: object) -> None:
    with pytest.raises(ParameterTypeError, match="`batch_dim`"):
        Engine(nn.Linear(6, 3), batch_dim=batch_dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["retain_graph", "second_pass", "per_process"])
def test_flags_are_bools(flag: str) -> None:
    net = nn.Linear(3, 1)
    losses = net(randn(4, 3)).squeeze(1)
    arguments: dict[str, Any] = {flag: 1}
    with pytest.raises(ParameterTypeError, match=f"`{flag}` must be a bool, got 1"):
        Engine(net, batch_dim=0).backward(losses, torch.ones_like, **arguments)
    with pytest.raises(ParameterTypeError, match=f"`{flag}` must be a bool, got 1"):
        backward(losses, torch.ones_like, batch_dim=0, **arguments)
    assert net.weight.grad is None


@pytest.mark.parametrize(
    ("inputs", "hint"), [(nn.Linear(2, 1), r"module\.parameters\(\)"), (5, "sequence"), ([], "one")]
)
def test_inputs_that_are_no_tensors(inputs: Any, hint: str) -> None:
    losses = nn.Linear(2, 3)(torch.ones(2))
    with pytest.raises(ParameterError, match=rf"`inputs` must be .*{hint}"):
        backward(losses, weighting=torch.diag, inputs=inputs, batch_dim=None)
    with pytest.raises(ParameterError, match=rf"`inputs` must be .*{hint}"):
        gramian_backward(losses, torch.diag, inputs=inputs)


def test_a_list_of_losses_where_one_tensor_is_meant() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(ParameterTypeError, match=r"torch\.stack\(losses\)"):
        Engine(model, batch_dim=None).backward(list(model(torch.ones(2))), torch.diag)


def test_something_that_is_no_module() -> None:
    with pytest.raises(ParameterTypeError, match="`modules` must be"):
        Engine([nn.Linear(6, 3)], batch_dim=0)  # type: ignore[arg-type]


def test_lazy_parameters() -> None:
    model = nn.LazyLinear(3)
    engine = Engine(nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3)), batch_dim=0)
    with pytest.raises(ParameterError, match="lazy parameter"):
        engine.compute_gramian(nn.Linear(6, 1)(randn(B, 6)).squeeze(1))
    engine = Engine(model, batch_dim=0)
    assert engine.compute_gramian(model(randn(B, 6)).sum(1)).shape == (B, B)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_parameter_whose_dtype_changes_between_two_uses(batch_dim: int | None) -> None:
    model = nn.Linear(6, 3, bias=False)

    def losses() -> Tensor:
        before = model.double()(randn(B, 6).double())
        return (before + model.float()(randn(B, 6).float())).square().sum(1)

    _refused(model, losses, "dtype or device changed between two uses", batch_dim)


@pytest.mark.parametrize("second_pass", [False, True])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_data_of_another_shape_put_into_a_parameter(
    batch_dim: int | None, second_pass: bool
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    losses = model(randn(B, 6)).square().sum(1)
    model[2].weight.data = torch.ones(7, 4)
    with pytest.raises(
        ParameterError, match=r"shape of its tensor, \[7, 4\], got one of shape \[2, 4"
    ):
        Engine(model, batch_dim=batch_dim).backward(losses, torch.diag, second_pass=second_pass)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("call", ["compute_gramian", "verify", "explain"])
def test_data_of_no_entries_put_into_parameters(call: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    losses = model(randn(B, 6)).square().sum(1)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as where parameters are moved away after their use
    with pytest.raises(ParameterError, match=r"shape of its tensor, \[0\], got one of shape"):
        getattr(Engine(model, batch_dim=0), call)(losses)


@pytest.fixture
def process_group() -> Iterator[None]:
    # A store in memory: a port may be taken by another run of the tests.
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


UNUSABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "complex": lambda losses: losses * 1j,
    "nested": lambda losses: torch.nested.as_nested_tensor([losses[:2], losses[2:]]),
    "jagged": lambda losses: torch.nested.as_nested_tensor(
        [losses[:2], losses[2:]], layout=torch.jagged
    ),
    "sparse": lambda losses: losses.to_sparse(),
    "mkldnn": lambda losses: losses.float().to_mkldnn(),
    "meta": lambda losses: losses.to("meta"),
    "wrapper": lambda losses: TwoTensor(losses, losses),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_losses_that_are_not_dense_and_real_in_memory(kind: str, batch_dim: int | None) -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=batch_dim)
    losses = UNUSABLE[kind](model(randn(B, 6)).sum(1))
    calls: list[Callable[[], object]] = [
        lambda: engine.compute_gramian(losses),
        lambda: engine.backward(losses, torch.diag),
        lambda: engine.explain(losses),
        lambda: engine.verify(losses),
        lambda: gramian(losses, batch_dim=batch_dim),
        lambda: backward(losses, torch.diag, batch_dim=batch_dim),
        lambda: gramian_backward(losses, torch.diag),
    ]
    for call in calls:
        with pytest.raises(
            ParameterError, match=r"must be (of a real|a dense|a Tensor (that|with))"
        ):
            call()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_nested_parameter(batch_dim: int | None) -> None:
    parts = [torch.randn(2), torch.randn(3)]
    model = nn.Linear(6, 3)
    model.odd = nn.Parameter(torch.nested.nested_tensor(parts, layout=torch.jagged))
    _refused(model, lambda: model(randn(B, 6)).sum(1) + model.odd.values().sum(), "nested")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("batch_dim", [0, None])
def test_losses_that_are_divided_among_processes(batch_dim: int | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    model, mesh = nn.Linear(6, 3), init_device_mesh("cpu", (1,))

    def losses() -> Tensor:
        return DTensor.from_local(model(randn(B, 6)).sum(1), mesh)

    _refused(model, losses, "DTensor", batch_dim)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
def test_distributed_modules_and_tensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(ParameterError, match="one device"):
        Engine(nn.Sequential(nn.DataParallel(model)), batch_dim=0)
    mesh = init_device_mesh("cpu", (1,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ParameterError, match="DTensor"):
        engine.compute_gramian(nn.Linear(6, 1)(randn(B, 6)).squeeze(1))


def test_a_weighting_for_vectors_on_losses_of_more_dimensions() -> None:
    from jdcore.validators import check_gramian

    def weighting(gramian: Tensor) -> Tensor:
        check_gramian(gramian)
        return gramian.diagonal()

    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ParameterError, match=r"Flattening\(weighting\)"):
        engine.backward(model(randn(B, 6)), weighting)
    assert model.weight.grad is None


def test_weights_of_the_wrong_shape() -> None:
    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ParameterError, match=r"weights of shape \[5\]"):
        engine.backward(model(randn(B, 6)).sum(1), lambda g: g)
    assert model.weight.grad is None


def test_an_error_of_the_weighting_leaves_no_gradient() -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("mine")

    model = nn.Linear(6, 3)
    engine = Engine(model, batch_dim=0)
    with pytest.raises(RuntimeError, match="mine"):
        engine.backward(model(randn(B, 6)).sum(1), broken)
    assert model.weight.grad is None
