# Written by `jdcore stubs`; a test compares it with the classes. Not to be edited.
import jdplugins.standard.scalarization.chebyshev
import jdplugins.standard.scalarization.constant
import jdplugins.standard.scalarization.cosmos
import jdplugins.standard.scalarization.dwa
import jdplugins.standard.scalarization.famo
import jdplugins.standard.scalarization.geometric_mean
import jdplugins.standard.scalarization.imtl_l
import jdplugins.standard.scalarization.mean
import jdplugins.standard.scalarization.pbi
import jdplugins.standard.scalarization.random
import jdplugins.standard.scalarization.stch
import jdplugins.standard.scalarization.sum
import jdplugins.standard.scalarization.uw
import torch
from torch import Tensor

class Chebyshev(jdplugins.standard.scalarization.chebyshev.Chebyshev):
    r"""The largest weighted distance from a reference point, ``max_i w_i (L_i - z_i)``."""
    def __init__(self, pref_vector: Tensor | None = ..., reference: Tensor | None = ...) -> None: ...

class Constant(jdplugins.standard.scalarization.constant.Constant):
    r"""Weighted sum of the losses, with weights chosen by the user."""
    def __init__(self, weights: Tensor) -> None: ...

class COSMOS(jdplugins.standard.scalarization.cosmos.COSMOS):
    r"""Weighted sum with a reward for losses in the direction of the preferences."""
    def __init__(self, lambda_: float = ..., pref_vector: Tensor | None = ...) -> None: ...

class DWA(jdplugins.standard.scalarization.dwa.DWA):
    r"""Dynamic weight average: losses that fall slowly weigh more, from epoch to epoch."""
    def __init__(self, temperature: float = ...) -> None: ...

class FAMO(jdplugins.standard.scalarization.famo.FAMO):
    r"""Fast adaptive multitask optimization: the logarithms of all losses shall fall equally fast."""
    def __init__(self, *, lr: float = ..., gamma: float = ..., min_losses: Tensor | None = ...) -> None: ...

class GeometricMean(jdplugins.standard.scalarization.geometric_mean.GeometricMean):
    r"""Geometric mean of the losses, ``(Π L_i)^(1/m)``, known as GLS."""
    def __init__(self) -> None: ...

class IMTLL(jdplugins.standard.scalarization.imtl_l.IMTLL):
    r"""Impartial losses: learned scales that make all losses equally large, ``Σ_i e^(s_i) L_i - s_i``."""
    def __init__(self, n_losses: int) -> None: ...

class Mean(jdplugins.standard.scalarization.mean.Mean):
    r"""Mean of the losses: the baseline every other method is compared with."""
    def __init__(self) -> None: ...

class PBI(jdplugins.standard.scalarization.pbi.PBI):
    r"""Penalised boundary intersection: progress along a ray, and a penalty on leaving it."""
    def __init__(self, theta: float = ..., pref_vector: Tensor | None = ..., reference: Tensor | None = ...) -> None: ...

class Random(jdplugins.standard.scalarization.random.Random):
    r"""Weighted sum of the losses, with positive random weights drawn anew at each call."""
    def __init__(self, *, generator: torch.Generator | None = ...) -> None: ...

class STCH(jdplugins.standard.scalarization.stch.STCH):
    r"""Smooth Chebyshev scalarization, ``μ log Σ_i exp(w_i (L_i - z_i) / μ)``."""
    def __init__(self, mu: float = ..., pref_vector: Tensor | None = ..., reference: Tensor | None = ...) -> None: ...

class Sum(jdplugins.standard.scalarization.sum.Sum):
    r"""Sum of the losses, known as equal weighting."""
    def __init__(self) -> None: ...

class UW(jdplugins.standard.scalarization.uw.UW):
    r"""Uncertainty weighting: losses divided by learned variances, ``Σ_i (e^(-s_i) L_i + s_i) / 2``."""
    def __init__(self, n_losses: int) -> None: ...
