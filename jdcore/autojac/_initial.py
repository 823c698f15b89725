from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from attrs import frozen
from torch import Tensor

from jdcore._differentiable import check_real
from jdcore.autojac import _checks as checks
from jdcore.autojac._hidden import default_error, is_reentrant
from jdcore.autojac.transform import Diagonalize, Init, Transform
from jdcore.autojac.transform._sharded import jac_of
from jdcore.distributed._passes import telling_holders
from jdcore.distributed._refusals import refuse_flat
from jdcore.distributed._sharding import still_trainable
from jdcore.errors import ParameterError
from jdcore.graph import Reach, edge_of, reach
from jdcore.graph._hooks import node_has_hooks
from jdcore.validators import describe_tensor, tensor_list


@frozen(eq=False)
class Call:
    """
    What ``backward`` and ``jac`` are asked to differentiate, checked.

    :param outputs: The tensors to be differentiated.
    :param initial: Initial Jacobians, None for one row per element of the outputs.
    :param graph: What lies behind the outputs.
    :param inputs: With respect to what, if that is given.
    """

    outputs: list[Tensor]
    initial: list[Tensor] | None
    graph: Reach
    inputs: list[Tensor] | None = None

    @property
    def m(self) -> int:
        """Number of rows."""
        if self.initial is not None:
            return len(self.initial[0])
        return sum(output.numel() for output in self.outputs)

    def jacobian(
        self,
        targets: Sequence[Tensor],
        *,
        watched: Iterable[Tensor] = (),
        retain_graph: bool = False,
        chunk_size: int | None = None,
    ) -> Transform:
        """The transform that makes the Jacobian with respect to some targets; it needs no keys."""
        start: Transform = Init(self.outputs, self.initial)
        uses = None
        if self.initial is None:
            start, uses = start >> Diagonalize(self.outputs), _one_each(self.outputs)
        return start >> jac_of(
            self.outputs,
            targets,
            self.graph,
            watched=watched,
            retain_graph=retain_graph,
            chunk_size=chunk_size,
            uses=uses,
        )


def _one_each(outputs: Sequence[Tensor]) -> list[list[int]]:
    """For each row, the output it differentiates, where each element has a row."""
    return [[i] for i, output in enumerate(outputs) for _ in range(output.numel())]


@contextmanager
def begun(
    tensors: Tensor | Sequence[Tensor],
    initial: Tensor | Sequence[Tensor] | None,
    inputs: Tensor | Iterable[Tensor] | None,
    names: tuple[str, str],
    *,
    retain_graph: bool,
    chunk_size: int | None,
) -> Iterator[Call]:
    """
    Check what ``backward`` and ``jac`` are given, and tell other processes of errors meanwhile.

    :param names: What ``tensors`` and ``initial`` are called.
    :raises ParameterError: If an argument does not fit.
    """
    # Before the others are told of errors: which processes these are is found from the outputs.
    outputs = tensor_list(tensors, names[0])
    with telling_holders(outputs, inputs):
        checks.check_call(outputs, names[0], retain_graph, chunk_size)
        start = initial_jacobians(initial, outputs, names[1])
        # Once: it may be an iterator such as model.parameters(), and is needed twice.
        given = None if inputs is None else tensor_list(inputs, "inputs")
        if start is None:
            outputs = _as_vector(outputs, given or ())
        yield Call(outputs, start, reach(outputs), given)


def _as_vector(outputs: list[Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    """
    The vector that a loop took some outputs out of, if they are all of its entries, in its place.

    Torch makes of the gradient of one entry a zero for each other one: m of them in each of m rows.
    """
    vector, node = outputs[0]._base, outputs[0].grad_fn
    if (
        vector is None
        or node is None
        or node.name() != "UnbindBackward0"
        or vector.shape != (len(outputs),)
        # What was written into it since does not count.
        or not vector.requires_grad
        or node.next_functions[0] != edge_of(vector)
        or any(tensor.grad_fn is node for tensor in inputs)
    ):
        return outputs
    are_all = all(o.grad_fn is node and o.output_nr == i for i, o in enumerate(outputs))
    # Hooks of entries, and their `.grad`, want gradients that would no longer pass by.
    heard = any(t._backward_hooks or t.retains_grad for t in (vector, *outputs))
    return [vector] if are_all and not heard and not node_has_hooks(node) else outputs


def inputs_or_leaves(graph: Reach, inputs: Tensor | Iterable[Tensor] | None) -> list[Tensor]:
    """
    The inputs that a call is given, or by default all leaves behind what it differentiates.

    :raises ParameterError: If a graph does not show all of its leaves, or shows others than those
        of the user.
    """
    refuse_flat(graph.leaves, "inputs")
    if inputs is not None:
        return tensor_list(inputs, "inputs")
    if is_reentrant(graph):
        raise default_error("inputs")
    return still_trainable(graph.leaves)


def initial_jacobians(
    value: Tensor | Sequence[Tensor] | None, outputs: Sequence[Tensor], parameter: str
) -> list[Tensor] | None:
    """
    The initial Jacobians as a list, checked against the outputs.

    :raises ParameterTypeError: If they are not tensors of a real floating dtype.
    :raises ParameterError: If their count, shapes, devices or numbers of rows do not fit.
    """
    if value is None:
        return None
    jacobians = tensor_list(value, parameter)
    check_real(jacobians, parameter)
    _check_count(jacobians, outputs, parameter)
    m = jacobians[0].shape[0] if jacobians[0].ndim else 0
    for i, (jacobian, output) in enumerate(zip(jacobians, outputs, strict=True)):
        if jacobian.ndim == 0 or jacobian.shape[1:] != output.shape:
            expected = f"of shape {['m', *output.shape]}".replace("'", "")
            raise ParameterError(f"{parameter}[{i}]", expected, describe_tensor(jacobian))
        if len(jacobian) != m:
            raise ParameterError(
                f"{parameter}[{i}]",
                f"of {m} rows, as {parameter}[0]",
                f"{len(jacobian)} rows",
            )
        _check_device(jacobian, output, f"{parameter}[{i}]")
    if m == 0:
        raise ParameterError(parameter, "of at least one row", "0 rows")
    return jacobians


def initial_gradients(
    value: Tensor | Sequence[Tensor] | None, outputs: Sequence[Tensor], parameter: str
) -> list[Tensor] | None:
    """
    The initial gradients as a list, checked against the outputs.

    :raises ParameterTypeError: If they are not tensors of a real floating dtype.
    :raises ParameterError: If their count, shapes or devices do not fit, or they are left out
        although an output is not a scalar.
    """
    if value is None:
        for i, output in enumerate(outputs):
            if output.numel() != 1:
                raise ParameterError(
                    f"tensors[{i}]",
                    f"a scalar, or come with `{parameter}`",
                    describe_tensor(output),
                    "Reduce it to one loss per task, or say how its elements count.",
                )
        return None
    gradients = tensor_list(value, parameter)
    check_real(gradients, parameter)
    _check_count(gradients, outputs, parameter)
    for i, (gradient, output) in enumerate(zip(gradients, outputs, strict=True)):
        if gradient.shape != output.shape:
            expected = f"of shape {list(output.shape)}, as its tensor"
            raise ParameterError(f"{parameter}[{i}]", expected, describe_tensor(gradient))
        _check_device(gradient, output, f"{parameter}[{i}]")
    return gradients


def _check_count(values: Sequence[Tensor], outputs: Sequence[Tensor], parameter: str) -> None:
    if len(values) != len(outputs):
        raise ParameterError(
            parameter, f"{len(outputs)} tensors, one for each to differentiate", len(values)
        )


def _check_device(value: Tensor, output: Tensor, parameter: str) -> None:
    if value.device != output.device:
        raise ParameterError(
            parameter, f"on {output.device}, as its tensor", f"a tensor on {value.device}"
        )
