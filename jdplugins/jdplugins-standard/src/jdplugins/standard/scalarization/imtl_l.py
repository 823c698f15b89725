from __future__ import annotations

from torch import Tensor

from jdcore.scalarization import TrainableScalarizer


class IMTLL(TrainableScalarizer):
    """
    Impartial losses: learned scales that make all losses equally large, ``Σ_i e^(s_i) L_i - s_i``.

    From `Towards Impartial Multi-task Learning
    <https://discovery.ucl.ac.uk/id/eprint/10120667/>`_, whose part for gradients is :class:`IMTLG
    <jdcore.aggregation.IMTLG>`.

    Trainable: ``scalarizer.parameters()`` go to the optimizer of the model. At their optimum every
    ``e^(s_i) L_i`` is 1.

    :param n_losses: Number of losses.

    >>> import torch
    >>> from jdcore.scalarization import IMTLL
    >>> IMTLL(n_losses=2)(torch.tensor([1.0, 4.0])).item()
    5.0
    """

    def scalarize(self, losses: Tensor, logits: Tensor) -> Tensor:
        return (logits.exp() * losses - logits).sum()
