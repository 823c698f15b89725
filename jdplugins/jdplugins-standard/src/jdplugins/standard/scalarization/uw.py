from __future__ import annotations

from torch import Tensor

from jdcore.scalarization import TrainableScalarizer


class UW(TrainableScalarizer):
    """
    Uncertainty weighting: losses divided by learned variances, ``Σ_i (e^(-s_i) L_i + s_i) / 2``.

    The parameters s are the logarithms of the variances σ² of Gaussian noise. From `Multi-Task
    Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics
    <https://arxiv.org/pdf/1705.07115>`_.

    Trainable: ``scalarizer.parameters()`` go to the optimizer of the model. At their optimum
    ``e^(s_i)`` is ``L_i``.

    :param n_losses: Number of losses.

    >>> import torch
    >>> from jdcore.scalarization import UW
    >>> UW(n_losses=2)(torch.tensor([1.0, 4.0])).item()
    2.5
    """

    def scalarize(self, losses: Tensor, logits: Tensor) -> Tensor:
        return 0.5 * (logits.neg().exp() * losses + logits).sum()
