"""The one computation behind the engine and the functions: Gramian, weights, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn

from jdcore._differentiable import check_each
from jdcore._fields import check_fits, check_grads, write_grads
from jdcore._modes import plain_modes
from jdcore.aggregation import GramianSource, weigh
from jdcore.aggregation._finite import all_finite
from jdcore.aggregation._nested_state import state_kept
from jdcore.autogram._layers import layer_of
from jdcore.autogram._rules import RULES_IN_USE
from jdcore.distributed._refusals import refuse_replicated, refuse_sharded
from jdcore.errors import ParameterError, UnservedGraphError
from jdcore.graph import Jacobian, Objectives, Plans
from jdcore.graph._cancelling import products_of
from jdcore.graph._saved import results_of
from jdcore.linalg import unflatten_gramian
from jdcore.linalg._combine import sent
from jdcore.validators import describe_tensor

_REMEDY = "Freeze it (requires_grad_(False)), or use a dense real tensor in its place."


@frozen(eq=False)
class Step:
    """
    What there is to do with some losses.

    :param objectives: The losses.
    :param wanted: The tensors that the Jacobian is with respect to.
    :param plans: What is known of graphs of this kind.
    :param parameter: What the tensors are called in messages.
    :param budget: Bytes that a temporary may have; None lets the library choose.
    :param all_leaves: Whether all leaves behind the losses get a gradient.
    :param shape: Shape of the losses, to which Gramian and weights belong; None for a vector.
    :param losses: What the losses are called in messages.
    :param modules: Where the tensors belong, as far as it is known.
    """

    objectives: Objectives
    wanted: Sequence[Tensor]
    plans: Plans
    parameter: str
    budget: int | None
    all_leaves: bool
    shape: Sequence[int] | None
    losses: str = "output"
    modules: Sequence[nn.Module] = ()

    @contextmanager
    def opened(self, *, together: bool = False, report: bool = False) -> Iterator[Jacobian]:
        """
        The Jacobian, not yet computed, and the modes of torch in which it may be.

        :param together: Whether the processes that hold the tensors make the step together.
        :param report: Whether it notes what serves each operand, and nothing of it is written.
        :raises UnservedGraphError: If it cannot be right, also instead of torch's error where data
            of another shape were put into a parameter after the forward pass.
        """
        jacobian = None
        try:
            try:
                with plain_modes(self.objectives.outputs):
                    jacobian = self._jacobian(together, report)
                    yield jacobian
            except RuntimeError:
                # Asked only now: of a leaf whose data were replaced before, too, a graph that still
                # lives knows the former shape.
                if jacobian is not None:
                    for i, leaf in jacobian.graph.leaves.items():
                        check_fits(results_of(jacobian.graph.nodes[i])[0][:-1], leaf)
                raise
        except UnservedGraphError as error:
            self._tell(error)
            raise

    def _tell(self, error: UnservedGraphError) -> None:
        """Let an error of the graph, which knows neither arguments nor modules, tell of these."""
        parameter = self.losses if error.parameter == "output" else error.parameter
        layer, where = error.layer, error.where
        if found := layer_of(self.modules, error.tensors):
            layer, where = found[0], f"in layer {found[0]!r} ({found[1]})"
        elif error.tensors:
            where = f"at {describe_tensor(error.tensors[0])}"
        error.tell(parameter, layer, where)

    def _jacobian(self, together: bool, report: bool) -> Jacobian:
        # Refused by kind before the graph is read, where the same things fail with errors that name
        # no argument.
        if not together:
            refuse_sharded(self.wanted, self.parameter)
        # One process alone would weigh its own samples with parameters that all hold, and the
        # copies would drift apart.
        if not (together or report):
            refuse_replicated(self.wanted, self.parameter)
        check_each(self.wanted, self.parameter, _REMEDY)
        jacobian = Jacobian(
            self.objectives,
            self.wanted,
            self.plans,
            rules=RULES_IN_USE,
            budget=self.budget,
            all_leaves=self.all_leaves,
            report=report,
        )
        devices = {tensor.device for tensor in jacobian.graph.targets.values()}
        if len(devices) > 1:
            raise ParameterError(
                self.parameter,
                "on one device",
                f"tensors on {' and '.join(sorted(map(str, devices)))}",
                "Use jdcore.autojac.backward and jac_to_grad, or move them to one.",
            )
        # The Gramian would be zero, and training would do nothing without a word.
        if not jacobian.graph.form.leading:
            raise ParameterError(
                self.parameter,
                "something that the losses depend on",
                "nothing behind the losses",
                "Were the parameters replaced, frozen, or the losses computed by another model or "
                "a copy?",
            )
        return jacobian

    def gramian(self) -> Tensor:
        """The Gramian in the form that belongs to the shape of the losses. The graph is kept."""
        with self.opened() as jacobian:
            total = self.for_user(jacobian.gramian(keep=False, retain_graph=True))
        return total if self.shape is None else unflatten_gramian(total, self.shape)

    def for_user(self, result: Tensor) -> Tensor:
        """A copy of a result where the losses are: float64 for float64 losses, else float32."""
        outputs = self.objectives.outputs
        wide = torch.float64 in [output.dtype for output in outputs]
        dtype = torch.float64 if wide else torch.float32
        return sent(result, outputs[0].device, dtype, copy=True)

    def backward(
        self,
        weighting: Callable[[Tensor], Tensor],
        *,
        retain_graph: bool,
        second_pass: bool = False,
    ) -> Tensor:
        """
        Weigh the Gramian and write the weighted gradients.

        :param weighting: As :func:`~jdcore.aggregation.as_weighting` gives it.
        :param second_pass: Whether to take the gradients from a second backward pass.
        :returns: The weights.
        """
        with self.opened() as jacobian:
            outputs = self.objectives.outputs
            # Shares that do not fit into memory are added up and dropped, so that the gradients
            # need a pass of their own.
            second_pass |= jacobian.too_large or self.objectives.rows == 0
            fields = [*jacobian.changed, *jacobian.graph.retained]
            # Leaves outside of the modules, as the matrix of a graph may be one.
            sparse = [t for t in jacobian.changed if t.layout != torch.strided and t.requires_grad]
            check_each(sparse, f"leaves behind {self.losses}", _REMEDY)
            # Whether a sparse `.grad` fits shows when its gradient is there, which may be sparse as
            # well; `write_grads` then checks before it writes.
            check_grads([t for t in fields if t.grad is not None and not t.grad.is_sparse])

            def compute() -> Tensor:
                return jacobian.gramian(
                    keep=not second_pass, retain_graph=retain_graph or second_pass
                )

            values = [output.detach().reshape(-1) for output in outputs]
            losses = values[0] if len(values) == 1 else torch.cat(values)
            source = source_of(jacobian, losses, compute)
            with state_kept(weighting):  # what follows the weighing may fail
                weights = weights_of(weighting, source, self.shape)
                # A weighting that asked for no Gramian, such as the mean, left no pass to take
                # gradients from.
                if second_pass or jacobian.roots is None:
                    gradients = jacobian.differentiated(weights, retain_graph=retain_graph)
                    # Of a method that did not look at the rows, NaN is no step.
                    if source.undo and not _are_finite(gradients.values()):
                        source.take_back()
                else:
                    wide = not jacobian.definite and source.rounding_shows(weights.reshape(-1))
                    # And the Gramian, which is as large as a layer where there are many losses.
                    del source
                    gradients = jacobian.weighted(weights, retain_graph=retain_graph, wide=wide)
            answer = self.for_user(weights)  # before anything is written, as it takes memory
            write_grads(gradients)
            return answer


def _are_finite(gradients: Iterable[Tensor]) -> bool:
    return all_finite([g.coalesce().values() if g.is_sparse else g for g in gradients])


def source_of(jacobian: Jacobian, losses: Tensor, compute: Callable[[], Tensor]) -> GramianSource:
    """
    What a weighting may ask.

    :param jacobian: That of this process.
    :param losses: The values of all losses [m].
    :param compute: Makes their Gramian, float64 [m, m].
    """
    rows, precision = losses.shape[0], jacobian.graph.form.precision
    return GramianSource(
        *(rows, precision, losses.device, compute),
        products=products_of(rows, precision),
        losses=losses,
    )


def weights_of(
    weighting: Callable[[Tensor], Tensor], source: GramianSource, shape: Sequence[int] | None
) -> Tensor:
    """
    Ask a weighting.

    :param shape: Shape of the losses, None for a vector.
    :raises ParameterError: If it cannot weigh losses of this shape.
    """
    try:
        return weigh(weighting, source, shape)
    except ParameterError as error:
        if shape is None or error.parameter != "gramian":
            raise
        raise ParameterError(
            "weighting",
            f"made for losses of shape {list(shape)}",
            "one that refuses a generalized Gramian",
            f"Losses of shape {list(shape)} need a GeneralizedWeighting: Flattening(weighting).",
        ) from error
