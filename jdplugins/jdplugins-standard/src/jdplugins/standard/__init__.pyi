# Written by `jdcore stubs`; a test compares it with the classes. Not to be edited.
import jdplugins.standard.aligned_mtl
import jdplugins.standard.cagrad
import jdplugins.standard.config
import jdplugins.standard.conic_grad
import jdplugins.standard.constant
import jdplugins.standard.cr_mogm
import jdplugins.standard.db_mtl
import jdplugins.standard.dcgd
import jdplugins.standard.dualproj
import jdplugins.standard.epo
import jdplugins.standard.excess_mtl
import jdplugins.standard.fairgrad
import jdplugins.standard.graddrop
import jdplugins.standard.gradnorm
import jdplugins.standard.gradvac
import jdplugins.standard.imtl_g
import jdplugins.standard.krum
import jdplugins.standard.mean
import jdplugins.standard.mgda
import jdplugins.standard.moco
import jdplugins.standard.modo
import jdplugins.standard.nash_mtl
import jdplugins.standard.pcd
import jdplugins.standard.pcgrad
import jdplugins.standard.per_group
import jdplugins.standard.periodic
import jdplugins.standard.present_tasks
import jdplugins.standard.random
import jdplugins.standard.row_momentum
import jdplugins.standard.row_normalized
import jdplugins.standard.sdmgrad
import jdplugins.standard.sum
import jdplugins.standard.trimmed_mean
import jdplugins.standard.upgrad
import torch
from collections.abc import Callable, Mapping, Sequence
from jdcore.aggregation import GramianAggregator
from jdcore.protocols import Aggregator, ConflictAverseSolver, DualConeSolver, FairAllocationSolver, MinNormSolver, NashBargainingSolver, Weighting
from torch import Tensor
from typing import Any, Literal

class AlignedMTL(GramianAggregator):
    r"""Alignment of the principal components of J: all its singular values are made equal."""
    weighting: AlignedMTLWeighting
    def __init__(self, pref_vector: Tensor | None = ..., scale_mode: Literal['min', 'median', 'rmse'] = ..., *, check_finite: bool | None = ...) -> None: ...

class AlignedMTLWeighting(jdplugins.standard.aligned_mtl.AlignedMTLWeighting):
    r"""Alignment of the principal components of J: all its singular values are made equal."""
    def __init__(self, pref_vector: Tensor | None = ..., scale_mode: Literal['min', 'median', 'rmse'] = ..., *, check_finite: bool | None = ...) -> None: ...

class CAGrad(GramianAggregator):
    r"""Conflict-averse gradient: the best worst-case improvement in a ball around the mean."""
    weighting: CAGradWeighting
    def __init__(self, c: float, *, check_finite: bool | None = ..., solver: ConflictAverseSolver | str = ...) -> None: ...

class CAGradWeighting(jdplugins.standard.cagrad.CAGradWeighting):
    r"""Conflict-averse gradient: the best worst-case improvement in a ball around the mean."""
    def __init__(self, c: float, *, check_finite: bool | None = ..., solver: ConflictAverseSolver | str = ...) -> None: ...

class ConFIG(GramianAggregator):
    r"""Conflict-free inverse gradients: equal cosines with all rows, and the length they add up to."""
    weighting: ConFIGWeighting
    def __init__(self, pref_vector: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...

class ConFIGWeighting(jdplugins.standard.config.ConFIGWeighting):
    r"""Conflict-free inverse gradients: equal cosines with all rows, and the length they add up to."""
    def __init__(self, pref_vector: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...

class ConicGrad(GramianAggregator):
    r"""The best worst case in a cone around the mean of the rows, as long as the mean."""
    weighting: ConicGradWeighting
    def __init__(self, c: float = ..., *, check_finite: bool | None = ..., solver: MinNormSolver | str = ...) -> None: ...

class ConicGradWeighting(jdplugins.standard.conic_grad.ConicGradWeighting):
    r"""The best worst case in a cone around the mean of the rows, as long as the mean."""
    def __init__(self, c: float = ..., *, check_finite: bool | None = ..., solver: MinNormSolver | str = ...) -> None: ...

class Constant(GramianAggregator):
    r"""Weights chosen by the user: gradient descent on a weighted sum of the losses."""
    weighting: ConstantWeighting
    def __init__(self, weights: Tensor, *, check_finite: bool | None = ...) -> None: ...

class ConstantWeighting(jdplugins.standard.constant.ConstantWeighting):
    r"""Weights chosen by the user: gradient descent on a weighted sum of the losses."""
    def __init__(self, weights: Tensor, *, check_finite: bool | None = ...) -> None: ...

class CRMOGM(GramianAggregator):
    r"""Momentum on the weights of another method: ``λ ← α λ + (1 - α) λ̂``."""
    weighting: CRMOGMWeighting
    def __init__(self, weighting: Weighting, alpha: float = ..., initial_weights: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class CRMOGMWeighting(jdplugins.standard.cr_mogm.CRMOGMWeighting):
    r"""Momentum on the weights of another method: ``λ ← α λ + (1 - α) λ̂``."""
    def __init__(self, weighting: Weighting, alpha: float = ..., initial_weights: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...

class DBMTL(jdplugins.standard.db_mtl.DBMTL):
    r"""Dual-balancing: gradients of the logarithms of the losses, averaged, and made equally long."""
    def __init__(self, beta: float = ..., beta_sigma: float = ..., *, check_finite: bool | None = ...) -> None: ...

class DCGD(GramianAggregator):
    r"""Dual cone gradient descent: the sum of two groups of rows, brought into their dual cone."""
    weighting: DCGDWeighting
    def __init__(self, variant: Literal['center', 'projection', 'average'] = ..., n_residuals: int = ..., *, check_finite: bool | None = ...) -> None: ...

class DCGDWeighting(jdplugins.standard.dcgd.DCGDWeighting):
    r"""Dual cone gradient descent: the sum of two groups of rows, brought into their dual cone."""
    def __init__(self, variant: Literal['center', 'projection', 'average'] = ..., n_residuals: int = ..., *, check_finite: bool | None = ...) -> None: ...

class DualProj(GramianAggregator):
    r"""Dual projection: the mean of the rows, projected onto the dual cone."""
    weighting: DualProjWeighting
    def __init__(self, pref_vector: Tensor | None = ..., *, check_finite: bool | None = ..., solver: DualConeSolver | str = ...) -> None: ...

class DualProjWeighting(jdplugins.standard.dualproj.DualProjWeighting):
    r"""Dual projection: the mean of the rows, projected onto the dual cone."""
    def __init__(self, pref_vector: Tensor | None = ..., *, check_finite: bool | None = ..., solver: DualConeSolver | str = ...) -> None: ...

class EPO(GramianAggregator):
    r"""Exact Pareto optimal search: descent towards the solution where losses are as preferred."""
    weighting: EPOWeighting
    def __init__(self, preference: Tensor | None = ..., eps: float = ..., *, check_finite: bool | None = ...) -> None: ...

class EPOWeighting(jdplugins.standard.epo.EPOWeighting):
    r"""Exact Pareto optimal search: descent towards the solution where losses are as preferred."""
    def __init__(self, preference: Tensor | None = ..., eps: float = ..., *, check_finite: bool | None = ...) -> None: ...

class ExcessMTL(jdplugins.standard.excess_mtl.ExcessMTL):
    r"""Weights that grow with the excess risk, the loss that an objective may still lose."""
    def __init__(self, robust_step_size: float = ..., n_warmup_steps: int = ..., *, check_finite: bool | None = ...) -> None: ...

class FairGrad(GramianAggregator):
    r"""Alpha-fair gains: the more an objective has gained, the less a further gain counts."""
    weighting: FairGradWeighting
    def __init__(self, alpha: float = ..., *, check_finite: bool | None = ..., solver: FairAllocationSolver | str = ...) -> None: ...

class FairGradWeighting(jdplugins.standard.fairgrad.FairGradWeighting):
    r"""Alpha-fair gains: the more an objective has gained, the less a further gain counts."""
    def __init__(self, alpha: float = ..., *, check_finite: bool | None = ..., solver: FairAllocationSolver | str = ...) -> None: ...

class GradDrop(jdplugins.standard.graddrop.GradDrop):
    r"""Gradient sign dropout: each coordinate keeps its positive or its negative entries only."""
    def __init__(self, f: Callable[[Tensor], Tensor] = ..., leak: Tensor | None = ..., *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...

class GradNorm(GramianAggregator):
    r"""Gradient normalisation: weights under which slower objectives have the longer gradients."""
    weighting: GradNormWeighting
    def __init__(self, alpha: float = ..., lr: float | None = ..., *, check_finite: bool | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class GradNormWeighting(jdplugins.standard.gradnorm.GradNormWeighting):
    r"""Gradient normalisation: weights under which slower objectives have the longer gradients."""
    def __init__(self, alpha: float = ..., lr: float | None = ..., *, check_finite: bool | None = ...) -> None: ...

class GradVac(GramianAggregator):
    r"""Gradient vaccine: pairs of rows are brought to the cosine they have had on average."""
    weighting: GradVacWeighting
    def __init__(self, beta: float = ..., *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class GradVacWeighting(jdplugins.standard.gradvac.GradVacWeighting):
    r"""Gradient vaccine: pairs of rows are brought to the cosine they have had on average."""
    def __init__(self, beta: float = ..., *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...

class IMTLG(GramianAggregator):
    r"""Impartial gradients: the update has the same projection onto the direction of every row."""
    weighting: IMTLGWeighting
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class IMTLGWeighting(jdplugins.standard.imtl_g.IMTLGWeighting):
    r"""Impartial gradients: the update has the same projection onto the direction of every row."""
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class Krum(GramianAggregator):
    r"""Robust selection: the mean of the rows that lie closest to their neighbours."""
    weighting: KrumWeighting
    def __init__(self, n_byzantine: int, n_selected: int = ..., squared: bool = ..., *, check_finite: bool | None = ...) -> None: ...

class KrumWeighting(jdplugins.standard.krum.KrumWeighting):
    r"""Robust selection: the mean of the rows that lie closest to their neighbours."""
    def __init__(self, n_byzantine: int, n_selected: int = ..., squared: bool = ..., *, check_finite: bool | None = ...) -> None: ...

class Mean(GramianAggregator):
    r"""Equal weights 1/m: the update is the gradient of the mean of the losses."""
    weighting: MeanWeighting
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class MeanWeighting(jdplugins.standard.mean.MeanWeighting):
    r"""Equal weights 1/m: the update is the gradient of the mean of the losses."""
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class MGDA(GramianAggregator):
    r"""Multiple-gradient descent: the shortest vector in the convex hull of the rows."""
    weighting: MGDAWeighting
    def __init__(self, *, check_finite: bool | None = ..., solver: MinNormSolver | str = ...) -> None: ...

class MGDAWeighting(jdplugins.standard.mgda.MGDAWeighting):
    r"""Multiple-gradient descent: the shortest vector in the convex hull of the rows."""
    def __init__(self, *, check_finite: bool | None = ..., solver: MinNormSolver | str = ...) -> None: ...

class MoCo(jdplugins.standard.moco.MoCo):
    r"""Multi-objective gradient correction: tracked rows, and a step towards their shortest mixture."""
    def __init__(self, beta: float = ..., gamma: float = ..., rho: float = ..., beta_sigma: float = ..., gamma_sigma: float = ..., onto: Literal['softmax', 'projection'] = ..., *, check_finite: bool | None = ...) -> None: ...

class MoDo(GramianAggregator):
    r"""Multi-objective gradient with double sampling: one step towards the shortest combination."""
    weighting: MoDoWeighting
    def __init__(self, gamma: float = ..., rho: float = ..., *, check_finite: bool | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class MoDoWeighting(jdplugins.standard.modo.MoDoWeighting):
    r"""Multi-objective gradient with double sampling: one step towards the shortest combination."""
    def __init__(self, gamma: float = ..., rho: float = ..., *, check_finite: bool | None = ...) -> None: ...

class NashMTL(GramianAggregator):
    r"""The Nash bargaining solution: every objective gets the same relative gain."""
    weighting: NashMTLWeighting
    def __init__(self, n_tasks: int | None = ..., max_norm: float = ..., update_weights_every: int = ..., *, check_finite: bool | None = ..., solver: NashBargainingSolver | str = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class NashMTLWeighting(jdplugins.standard.nash_mtl.NashMTLWeighting):
    r"""The Nash bargaining solution: every objective gets the same relative gain."""
    def __init__(self, n_tasks: int | None = ..., max_norm: float = ..., update_weights_every: int = ..., *, check_finite: bool | None = ..., solver: NashBargainingSolver | str = ...) -> None: ...

class PCD(GramianAggregator):
    r"""Priority-constrained descent: the first row, and some progress for all others."""
    weighting: PCDWeighting
    def __init__(self, tau: float | Tensor = ..., beta: float = ..., *, check_finite: bool | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class PCDWeighting(jdplugins.standard.pcd.PCDWeighting):
    r"""Priority-constrained descent: the first row, and some progress for all others."""
    def __init__(self, tau: float | Tensor = ..., beta: float = ..., *, check_finite: bool | None = ...) -> None: ...

class PCGrad(GramianAggregator):
    r"""Projecting conflicting gradients: each row loses its components against the others."""
    weighting: PCGradWeighting
    def __init__(self, *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...

class PCGradWeighting(jdplugins.standard.pcgrad.PCGradWeighting):
    r"""Projecting conflicting gradients: each row loses its components against the others."""
    def __init__(self, *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...

class PerGroup(jdplugins.standard.per_group.PerGroup):
    r"""Another method on each group of parameters by itself, such as the layers of a network."""
    def __init__(self, aggregator: Aggregator, columns: Sequence[int], *, check_finite: bool | None = ...) -> None: ...

class Periodic(GramianAggregator):
    r"""Weights of another method, computed at every k-th call and reused in between."""
    weighting: PeriodicWeighting
    def __init__(self, weighting: Weighting, every: int = ..., *, check_finite: bool | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class PeriodicWeighting(jdplugins.standard.periodic.PeriodicWeighting):
    r"""Weights of another method, computed at every k-th call and reused in between."""
    def __init__(self, weighting: Weighting, every: int = ..., *, check_finite: bool | None = ...) -> None: ...

class PresentTasks(jdplugins.standard.present_tasks.PresentTasks):
    r"""Another method on those objectives only that are present in the batch."""
    def __init__(self, aggregator: Aggregator, present: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...

class Random(GramianAggregator):
    r"""Positive random weights that sum to 1, drawn anew at each call."""
    weighting: RandomWeighting
    def __init__(self, *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...

class RandomWeighting(jdplugins.standard.random.RandomWeighting):
    r"""Positive random weights that sum to 1, drawn anew at each call."""
    def __init__(self, *, check_finite: bool | None = ..., generator: torch.Generator | None = ...) -> None: ...

class RowMomentum(jdplugins.standard.row_momentum.RowMomentum):
    r"""Another method on the moving averages of the rows: ``Y ← β Y + (1 - β) J``."""
    def __init__(self, weighting: Weighting, beta: float = ..., *, check_finite: bool | None = ...) -> None: ...

class RowNormalized(jdplugins.standard.row_normalized.RowNormalized):
    r"""Another method on rows that are divided by their norms, their losses, or both."""
    def __init__(self, aggregator: Aggregator, by: Literal['none', 'l2', 'loss', 'loss+'] = ..., *, check_finite: bool | None = ...) -> None: ...

class SDMGrad(GramianAggregator):
    r"""Stochastic direction-oriented descent: few steps towards a short update near a preferred one."""
    weighting: SDMGradWeighting
    def __init__(self, lr: float = ..., momentum: float = ..., n_iter: int = ..., lambda_: float = ..., pref_vector: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

class SDMGradWeighting(jdplugins.standard.sdmgrad.SDMGradWeighting):
    r"""Stochastic direction-oriented descent: few steps towards a short update near a preferred one."""
    def __init__(self, lr: float = ..., momentum: float = ..., n_iter: int = ..., lambda_: float = ..., pref_vector: Tensor | None = ..., *, check_finite: bool | None = ...) -> None: ...

class Sum(GramianAggregator):
    r"""Weights 1: the update is the gradient of the sum of the losses."""
    weighting: SumWeighting
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class SumWeighting(jdplugins.standard.sum.SumWeighting):
    r"""Weights 1: the update is the gradient of the sum of the losses."""
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class TrimmedMean(jdplugins.standard.trimmed_mean.TrimmedMean):
    r"""Mean of each coordinate without its ``trim_number`` largest and smallest entries."""
    def __init__(self, trim_number: int, *, check_finite: bool | None = ...) -> None: ...

class UPGrad(GramianAggregator):
    r"""Unconflicting projection of gradients: every row projected onto the dual cone, then averaged."""
    weighting: UPGradWeighting
    def __init__(self, pref_vector: Tensor | None = ..., *, check_finite: bool | None = ..., solver: DualConeSolver | str = ...) -> None: ...

class UPGradWeighting(jdplugins.standard.upgrad.UPGradWeighting):
    r"""Unconflicting projection of gradients: every row projected onto the dual cone, then averaged."""
    def __init__(self, pref_vector: Tensor | None = ..., *, check_finite: bool | None = ..., solver: DualConeSolver | str = ...) -> None: ...
