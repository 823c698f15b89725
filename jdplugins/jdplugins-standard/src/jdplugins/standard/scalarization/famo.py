from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from jdcore.aggregation import StateFields, not_traced
from jdcore.errors import ParameterError
from jdcore.scalarization import LossScalarizer, check_losses, require_above
from jdcore.validators import describe_tensor, real, row_vector
from jdplugins.standard.scalarization._fields import nothing, require_as_many, vector_state


# By keyword: elsewhere the first argument of FAMO is the number of losses.
@define(eq=False, kw_only=True)
class FAMO(StateFields, LossScalarizer):
    """
    Fast adaptive multitask optimization: the logarithms of all losses shall fall equally fast.

    With ``z = softmax(ξ)`` and ``1 / c = Σ_i z_i / (L_i - b_i)`` it is ``c Σ_i z_i log(L_i -
    b_i)``. After the step of the model, :meth:`update` moves ξ by what each loss has gained:
    ``ξ ← ξ - β (Jᵀ δ + γ ξ)``, with ``δ_i = log(L_i - b_i)`` before less after the step, and J the
    Jacobian of the softmax. From `FAMO: Fast Adaptive Multitask Optimization
    <https://arxiv.org/pdf/2306.03792>`_.

    Choose it to come near to methods of the Jacobian at the price of one gradient and of the losses
    after the step, which a further forward pass on the same batch gives. c and z are constants of
    the gradient, so the update is a convex combination of the gradients of the losses.

    Stateful: ξ starts at zero. Call :meth:`update` after each step. All calls between two
    :meth:`reset` must have the same number of losses.

    :param lr: Step size β of ξ.
    :param gamma: Decay γ of ξ.
    :param min_losses: Lower bounds b of the losses, Tensor [m]. None stands for zero.

    >>> import torch
    >>> from jdcore.scalarization import FAMO
    >>> scalarizer = FAMO()
    >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
    >>> scalarizer(losses).backward()
    >>> losses.grad  # 1.6 (0.5 / 1) and 1.6 (0.5 / 4)
    tensor([0.8000, 0.2000])
    >>> scalarizer.update(torch.tensor([0.5, 3.9]))  # the first has gained more
    >>> scalarizer.xi < 0
    tensor([ True, False])
    """

    lr: float = field(default=0.025, validator=real(0.0))
    gamma: float = field(default=0.001, validator=real(0.0))
    min_losses: Tensor | None = field(default=None, validator=row_vector)
    xi: Tensor = vector_state()
    before: Tensor = vector_state()

    @not_traced
    def scalarize(self, losses: Tensor) -> Tensor:
        logarithms = self._logarithms(losses)
        values = logarithms.detach().double().cpu()
        shares = self._xi(len(values)).softmax(0)
        # Detached, as are the shares: c and z are constants of the gradient.
        scale = 1.0 / (shares * torch.exp(-values)).sum()
        # A step on losses that are not finite leaves no state, as if it had not been.
        if torch.isfinite(values).all():
            self.before = values
        return (scale * shares).to(losses) @ logarithms

    @not_traced
    def update(self, losses_after: Tensor) -> None:
        """
        Move ξ by what each loss has gained in a step.

        :param losses_after: The losses after the step of the model, on the same batch, Tensor [m].
            If they are not finite, ξ stays.
        :raises ParameterError: If they do not fit those of the last call, or there was none.
        """
        check_losses(losses_after, "losses_after")
        if not len(self.before):
            raise ParameterError("losses", "scalarized before they are updated", "none")
        if len(losses_after) != len(self.before):
            expected = f"{len(self.before)} values, as in the last call"
            raise ParameterError("losses_after", expected, describe_tensor(losses_after))
        after = self._logarithms(losses_after.detach().double(), "losses_after").cpu()
        if not torch.isfinite(after).all():
            return
        xi = self._xi(len(after))
        shares, gains = xi.softmax(0), self.before - after
        slope = shares * (gains - shares @ gains)
        self.xi = xi - self.lr * (slope + self.gamma * xi)
        self.before = nothing()

    def _logarithms(self, losses: Tensor, parameter: str = "losses") -> Tensor:
        if self.min_losses is None:
            require_above(losses, 0.0, parameter)
            return losses.log()
        bounds = self.min_losses.detach().to(losses)
        require_above(losses, bounds, parameter)
        return (losses - bounds).log()

    def _xi(self, m: int) -> Tensor:
        require_as_many(self.xi, m)
        return self.xi if len(self.xi) else torch.zeros(m, dtype=torch.float64, device="cpu")
