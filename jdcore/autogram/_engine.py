from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.parameter import is_lazy

from jdcore._compilation import not_traced
from jdcore.autogram._layers import named
from jdcore.autogram._losses import checked_batch_dim, checked_budget, objectives_of, shape_of
from jdcore.autogram._report import Verification, explained, verified
from jdcore.autogram._step import Step
from jdcore.autogram._together import crossed, take_step
from jdcore.distributed._sharding import Gathered
from jdcore.errors import ParameterError, ParameterTypeError
from jdcore.graph import Plans
from jdcore.validators import describe_tensor


class Engine:
    """
    Computes the Gramian of the Jacobian of losses with respect to the parameters of modules.

    The Jacobian itself is never formed: one backward pass brings the gradients of the losses to the
    operations that parameters enter, and from these and what the operation saved its share of the
    Gramian follows in closed form (`Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/pdf/2406.16232>`_, section 6, has the idea layer by layer). With
    :meth:`backward` the weighted gradient comes from the same pass.

    The autograd graph of the losses holds all that is needed. The engine attaches nothing to the
    modules: it can be made before or after the forward pass, and looks up their parameters at each
    call. Operations without a closed form are called themselves, once for each sample: right, if
    slower. :meth:`explain` says what serves what, and :meth:`verify` checks it.

    Hooks of tensors and operations are not shown by the graph. Where somebody made such hooks since
    the last call, each loss gets a backward pass of its own, which runs them as they are meant to
    run; a :class:`~jdcore.RowByRowWarning` says so. What retains its gradient
    (:meth:`~torch.Tensor.retain_grad`) gets that of the weighted losses from :meth:`backward`, for
    one backward pass more, and stays as it is in all other calls.

    Products of float32 gradients are made in float32 and added in float64. They are made once more
    in float64 where what is summed up to a row nearly cancels (positions of a sequence, samples of
    a task, uses of a layer), where squares of rows leave the range of float32, and where the rows
    of up to 64 losses nearly cancel, as they are for :func:`~jdcore.autojac.jac_to_grad`, so that
    near Pareto stationarity the update is that of the same rows in float64; this takes half of a
    plain step to a whole one. For more losses, what the
    products hide counts as zero: combinations of rows of length one that are shorter than 1e-3. An
    update that is promised to conflict with no row may do so by as much of the lengths of the rows;
    models in float64 are exact. Weights that
    float32 cannot carry, because the rows they multiply cancel, are summed in float64 wherever one
    pass serves.

    :param modules: The modules whose parameters are meant, all of a model or the shared ones only.
    :param batch_dim: The dimension of samples in the losses, if each loss depends on one sample
        only (instance-wise risk minimization), so that one backward pass serves all samples. None
        if any loss may depend on the whole batch (multi-task learning); then the losses go through
        the trunk that they share together where that is known to be right and faster, else one
        after the other. With a ``batch_dim`` the first call for a kind of graph takes a few
        backward passes more, which show where in the graph the samples are. Their gradients are
        NaN, so a function of Python that keeps a state in its backward needs None.
    :param memory_budget: Bytes that a temporary may have. By default 256 MB on an accelerator, or
        an eighth of its free memory if that is less, and 2 MB (of float32) on a CPU. A step
        whose activations take less than 256 MB keeps them to 32 MB, a larger one to an eighth.
        Two or three of them may be there at once, and what a step has anyway may be larger: the
        gradients of all samples and tasks at an operation, and whole rows of parameters that are
        used by operations without a closed form, or from which weights are computed.
    :raises ParameterTypeError: If a module is no ``nn.Module``, or another argument of the wrong
        type.
    :raises ParameterError: If a module is in ``DataParallel``.

    >>> import torch
    >>> from jdcore.autogram import Engine
    >>> model = torch.nn.Linear(2, 1)
    >>> engine = Engine(model, batch_dim=0)
    >>> losses = model(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).squeeze(1)
    >>> engine.compute_gramian(losses)
    tensor([[2., 1.],
            [1., 5.]])
    """

    def __init__(
        self, *modules: nn.Module, batch_dim: int | None, memory_budget: int | None = None
    ) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ParameterTypeError("modules", "torch.nn.Module objects", repr(module))
            _refuse_replicating(module)
        self._modules = modules
        self._batch_dim = checked_batch_dim(batch_dim)
        self._budget = checked_budget(memory_budget)
        self._plans = Plans()

    @property
    def batch_dim(self) -> int | None:
        """The dimension of samples in the losses."""
        return self._batch_dim

    @not_traced
    def compute_gramian(self, output: Tensor, /) -> Tensor:
        """
        Compute the Gramian of the Jacobian of the losses.

        Leaves all ``.grad`` fields and the graph as they are, so that ``output.backward(weights)``
        can follow.

        :param output: The losses, a Tensor of any shape.
        :returns: Gramian [m, m] for a vector, a scalar for a scalar, the generalized Gramian
            [m1, ..., mk, mk, ..., m1] for any other shape. float64 for float64 losses, else
            float32.
        :raises ParameterTypeError: If the output is no floating Tensor.
        :raises ParameterError: If what was asked for cannot be right: see the class. Where the
            graph is at fault, a :class:`~jdcore.UnservedGraphError`, whose ``layer`` is the name of
            the module.
        """
        return self._step(output, self._trainable()).gramian()

    @not_traced
    def cross_gramian(self, output: Tensor, other: Tensor, /) -> Tensor:
        """
        Compute the inner products of the gradients of the losses of two batches.

        Of two independent batches, ``J₁ J₂ᵀ`` is an unbiased estimate of the Gramian of the
        expected losses, for methods that ask for it:
        ``weights = weighting(engine.cross_gramian(losses, other_losses))``, then
        ``losses.backward(weights)``, or better the losses of a third batch.

        Leaves all ``.grad`` fields and the graphs as they are. It takes the time of
        :meth:`compute_gramian` for both batches at once. With a ``batch_dim``, batches that do not
        go through the same operations, or of fewer than two losses, take one backward pass for each
        loss.

        :param output: The losses of one batch, a vector [m].
        :param other: The losses of another one, a vector [l], usually of as many.
        :returns: Cross-Gramian [m, l]. float64 for float64 losses, else float32.
        :raises ParameterTypeError: If one of them is no floating Tensor.
        :raises ParameterError: If they are no vectors, or what was asked for cannot be right: see
            the class.
        """
        trainable = self._trainable()
        batches = [self._step(output, trainable), self._step(other, trainable, "other")]
        both = evolve(batches[0], objectives=objectives_of([output, other], None, "output"))
        for name, losses in (("output", output), ("other", other)):
            if losses.ndim != 1:
                raise ParameterError(name, "a vector of losses", describe_tensor(losses))
        if self._batch_dim is not None:
            return both.for_user(crossed(*batches))
        for batch in batches:
            with batch.opened():
                pass  # each of them is refused by itself where it depends on no parameter
        # The losses of both batches as one vector: what is wanted is above the diagonal blocks.
        return both.gramian()[: len(output), len(output) :].clone()

    @not_traced
    def backward(
        self,
        output: Tensor,
        /,
        weighting: Callable[[Tensor], Tensor],
        *,
        retain_graph: bool = False,
        second_pass: bool = False,
        group: Any = None,
        per_process: bool = False,
    ) -> Tensor:
        """
        Compute the Gramian, weigh it, and add the weighted gradients to the ``.grad`` fields.

        Does what ``gramian = engine.compute_gramian(output)``, ``weights = weighting(gramian)`` and
        ``output.backward(weights)`` do, up to rounding, for the price of about one backward pass.
        All leaves that ``output.backward`` would reach get their gradient, also those outside of
        the modules of this engine.

        On several processes, for parameters of a ``DistributedDataParallel`` module or with a
        ``group``, the losses are those of all processes, one after the other along ``batch_dim``:
        the weighting gets the Gramian of them all, with the products of samples on different
        processes, and all processes write the same gradients. Where a process has fewer than two
        samples, all take one backward pass for each loss. Parameters under ``fully_shard`` are
        gathered for the step, and each process writes its part.

        :param output: As for :meth:`compute_gramian`; the losses of this process.
        :param weighting: A :class:`~jdcore.Weighting` for a vector of losses, a
            :class:`~jdcore.GeneralizedWeighting` for any other shape, or the aggregator of one.
        :param retain_graph: Whether to keep the graph for another backward pass.
            Otherwise it may be freed, but is not where the step reads what operations saved after
            its last pass, or tries for the first time to differentiate several rows at once: it
            then lives as long as the losses, and another differentiation is no error.
        :param second_pass: Whether to take the weighted gradients from a second backward pass
            instead of keeping what the first one found: slower, with less memory. By one process
            only.
        :param group: The ``torch.distributed`` process group whose processes all hold the
            parameters, equal. None finds that of ``DistributedDataParallel``.
        :param per_process: Whether each process weighs its own samples by themselves, and the mean
            of the processes' updates is written. This exchanges nothing but gradients, but is
            another method: what is promised of the update holds for no batch as a whole.
        :returns: The weights, of the shape of the losses (of all processes, unless
            ``per_process``).
        :raises ParameterError: As :meth:`compute_gramian`, or if the weighting does not fit. No
            ``.grad`` field is changed then.
        :raises PeerError: If another process could not make this step. None of them writes
            anything.
        """
        # Looked up at each call, since modules change: layers are replaced, parameters frozen and
        # thawed.
        trainable = self._trainable()
        return take_step(
            lambda: self._step(output, trainable),
            weighting,
            trainable,
            group,
            named=True,
            retain_graph=retain_graph,
            second_pass=second_pass,
            per_process=per_process,
        )

    @not_traced
    def explain(self, output: Tensor, /) -> str:
        """
        Say what serves each parameter, in a table without numbers.

        Computes the Gramian once. Names of operations are those of ``grad_fn``.

        :param output: As for :meth:`compute_gramian`.
        """
        return explained(self._step(output, self._trainable()), self._names())

    @not_traced
    def verify(self, output: Tensor, /) -> Verification:
        """
        Compare the Gramian with that of rows by plain backward passes, parameter by parameter.

        Takes one backward pass for each loss, a step for each parameter (of thousands of them:
        verify some modules), and the memory of the whole Jacobian.

        :param output: As for :meth:`compute_gramian`.
        :returns: One entry for each parameter behind the losses; printed, a table.
        """
        return verified(self._step(output, self._trainable()), self._names())

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for place, module in named(self._modules):
            for name, parameter in module.named_parameters(place, recurse=False):
                # A parameter that several modules share has the name of its first place.
                names.setdefault(parameter, name)
        return names

    def _trainable(self) -> list[Tensor]:
        # By identity, since the hash of a tensor is a function of Python.
        found = {id(p): p for module in self._modules for p in module.parameters()}
        return [p for p in found.values() if p.requires_grad]

    def _step(self, output: Any, trainable: list[Tensor], parameter: str = "output") -> Step:
        if not isinstance(output, Tensor):
            hint = "Stack the losses: torch.stack(losses)." if isinstance(output, list) else None
            raise ParameterTypeError(parameter, "a floating Tensor", describe_tensor(output), hint)
        objectives = objectives_of(output, self._batch_dim, parameter)
        # Under FSDP2 the graph ends at gathered parameters, not at those that modules have outside
        # of their forward pass.
        wanted = Gathered().leaves(trainable)
        for tensor in {type(tensor): tensor for tensor in wanted}.values():
            # A lazy parameter has no shape yet: without this, torch's error would come from deep
            # inside. It has a class of its own.
            if is_lazy(tensor):
                raise ParameterError(
                    "modules", "initialised", "a lazy parameter", "Run one forward pass before."
                )
        known, shape = (self._plans, "modules", self._budget), shape_of(output)
        return Step(
            *(objectives, wanted, *known),
            all_leaves=True,
            shape=shape,
            losses=parameter,
            modules=self._modules,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Plans concern graphs of this process.
        return {**self.__dict__, "_plans": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plans = Plans()


def _refuse_replicating(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, DataParallel):
            raise ParameterError(
                "modules",
                "on one device each",
                f"a DataParallel as `{name}`",
                "The graph goes through copies of its parameters. Give one process to each device, "
                "and DistributedDataParallel to each process.",
            )
