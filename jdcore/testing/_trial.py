"""What a Gramian rule is tried on: calls of its operation, as the library meets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from jdcore.autogram._report import plain_rows
from jdcore.graph import Jacobian, NoRule, Objectives, Plans, Rule, Rules, Share, Site
from jdcore.graph._call import called_shares
from jdcore.graph._hooks import look
from jdcore.graph._memory import Memory


@frozen(eq=False)
class OperationExample:
    """
    A call of the operation that a Gramian rule is for.

    :param call: Calls it, and whatever belongs around it, on the inputs and the operands; returns
        one floating Tensor with the samples first.
    :param inputs: Makes the inputs for a number of samples, which are the first dimension of every
        Tensor. Drawn from the default generator.
    :param operands: Makes the operands that belong to no sample. Drawn from the default generator.
    :param label: A name.
    """

    call: Callable[..., Tensor]
    inputs: Callable[[int], tuple[Any, ...]]
    operands: Callable[[], tuple[Tensor, ...]]
    label: str = field(default="example", kw_only=True)


@frozen(eq=False)
class Use:
    """A share that the rule made."""

    site: Site
    operand: int
    share: Share


class Recording(Rules):
    """
    The rules of the core and one more, whose uses are noted.

    :param serves: Whether a node is the operation of that rule.
    """

    def __init__(self, serves: Callable[[str, Any], bool], rule: Rule | None) -> None:
        self._serves, self._rule = serves, rule
        self.uses: list[Use] = []
        self.met = 0
        """Operands of the operation that a share was wanted for."""

    def find(self, name: str, node: Any) -> Rule | None:
        return self._noting if self._serves(name, node) else super().find(name, node)

    def _noting(self, site: Site, operand: int) -> Share:
        self.met += 1
        if self._rule is None:
            raise NoRule
        share = self._rule(site, operand)
        self.uses.append(Use(site, operand, share))
        return share


@frozen(eq=False)
class Trial:
    """
    Losses of an example.

    :param losses: Shape [K, B].
    :param operands: What they are differentiated with respect to.
    """

    losses: Tensor
    operands: list[Tensor]

    @classmethod
    def of(
        cls,
        example: OperationExample,
        tasks: int,
        samples: int,
        repeats: int = 1,
        dtype: torch.dtype = torch.float64,
        autocast: bool = False,
    ) -> Trial:
        """
        Call the operation.

        :param repeats: Entries of the first dimension per sample.
        :param dtype: Of all floating tensors.
        :param autocast: Whether the call is made under autocast to bfloat16.
        """
        look()  # hooks made by others so far are not on the graph that is made here
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            operands = [t.detach().to(dtype).requires_grad_() for t in example.operands()]
            inputs = [_converted(value, dtype) for value in example.inputs(samples * repeats)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = example.call(*inputs, *operands)
            features = found.reshape(samples, -1)
            mixing = (
                torch.randn(features.shape[1], tasks, device="cpu").to(features)
                / features.shape[1] ** 0.5
            )
        return cls(torch.tanh(features @ mixing).T + features.square().mean(1), operands)

    def served(self, rules: Rules) -> tuple[Tensor, Tensor]:
        """The Gramian [K B, K B] and a weighted gradient, as the library computes them."""
        jacobian = Jacobian(Objectives([self.losses], 1), self.operands, Plans(), rules=rules)
        gramian = jacobian.gramian(keep=True, retain_graph=True)
        found = jacobian.weighted(self.weights(), retain_graph=True)
        grads = [found.get(t, torch.zeros_like(t)).to_dense() for t in self.operands]
        return gramian, torch.cat([grad.flatten() for grad in grads])

    def weights(self) -> Tensor:
        """Some weights, one for each loss."""
        return torch.linspace(-1.0, 2.0, self.losses.numel(), dtype=torch.float64, device="cpu")

    def rows(self) -> Tensor:
        """The Jacobian by one backward pass for each loss, float64."""
        return torch.cat(plain_rows([self.losses], self.operands), 1)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype).requires_grad_() if floating else value


def explicit_rows(use: Use) -> Tensor:
    """The rows of a share by calling the operation, shape [K, B, *shape]."""
    memory = Memory(1 << 30, 1 << 30, 1 << 30, cached=False)
    return called_shares(use.site, [use.operand], memory)[use.operand].rows()


def tensors_of(site: Site) -> Sequence[Tensor]:
    """What a rule may read and must not change."""
    kept = getattr(site.node, "saved_tensors", ())
    return [t for t in (*site.grads, *kept) if isinstance(t, Tensor)]
