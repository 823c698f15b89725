# Written by `jdcore stubs`; a test compares it with the classes. Not to be edited.
import jdplugins.robust.arc
import jdplugins.robust.bucketing
import jdplugins.robust.caf
import jdplugins.robust.centered_clipping
import jdplugins.robust.clipping
import jdplugins.robust.coordinate_wise_median
import jdplugins.robust.geometric_median
import jdplugins.robust.mda
import jdplugins.robust.meamed
import jdplugins.robust.monna
import jdplugins.robust.multi_krum
import jdplugins.robust.nnm
import jdplugins.robust.smea
import torch
from jdcore.aggregation import GramianAggregator
from jdcore.protocols import Aggregator

class ARC(jdplugins.robust.arc.ARC):
    r"""Adaptive robust clipping: the longest rows clipped to the norm of the next one."""
    def __init__(self, aggregator: Aggregator, *, check_finite: bool | None = ..., n_byzantine: int) -> None: ...

class Bucketing(jdplugins.robust.bucketing.Bucketing):
    r"""Means of random buckets of rows, handed to another aggregator."""
    def __init__(self, aggregator: Aggregator, *, check_finite: bool | None = ..., bucket_size: int = ..., generator: torch.Generator | None = ...) -> None: ...

class CAF(GramianAggregator):
    r"""Covariance-bound agnostic filter: rows that stand out where variance is largest lose weight."""
    weighting: CAFWeighting
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...

class CAFWeighting(jdplugins.robust.caf.CAFWeighting):
    r"""Covariance-bound agnostic filter: rows that stand out where variance is largest lose weight."""
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...

class CenteredClipping(jdplugins.robust.centered_clipping.CenteredClipping):
    r"""Mean of the rows, each clipped to a ball around the previous update."""
    def __init__(self, tau: float = ..., n_iter: int = ..., *, check_finite: bool | None = ...) -> None: ...

class Clipping(jdplugins.robust.clipping.Clipping):
    r"""Rows clipped to a given norm, handed to another aggregator."""
    def __init__(self, aggregator: Aggregator, *, check_finite: bool | None = ..., max_norm: float = ...) -> None: ...

class CoordinateWiseMedian(jdplugins.robust.coordinate_wise_median.CoordinateWiseMedian):
    r"""Median of each coordinate; the mean of the two middle entries for an even number of rows."""
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class GeometricMedian(GramianAggregator):
    r"""Geometric median: the vector with the least sum of distances to all rows."""
    weighting: GeometricMedianWeighting
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class GeometricMedianWeighting(jdplugins.robust.geometric_median.GeometricMedianWeighting):
    r"""Geometric median: the vector with the least sum of distances to all rows."""
    def __init__(self, *, check_finite: bool | None = ...) -> None: ...

class MDA(GramianAggregator):
    r"""Minimum-diameter averaging: the mean of the ``m - n_byzantine`` rows that are closest together."""
    weighting: MDAWeighting
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...

class MDAWeighting(jdplugins.robust.mda.MDAWeighting):
    r"""Minimum-diameter averaging: the mean of the ``m - n_byzantine`` rows that are closest together."""
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...

class MeaMed(jdplugins.robust.meamed.MeaMed):
    r"""Mean around the median: of each coordinate, the mean of the entries closest to its median."""
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...

class MoNNA(GramianAggregator):
    r"""Nearest-neighbour averaging: the mean of the rows closest to one row that is trusted."""
    weighting: MoNNAWeighting
    def __init__(self, n_byzantine: int, trusted: int = ..., *, check_finite: bool | None = ...) -> None: ...

class MoNNAWeighting(jdplugins.robust.monna.MoNNAWeighting):
    r"""Nearest-neighbour averaging: the mean of the rows closest to one row that is trusted."""
    def __init__(self, n_byzantine: int, trusted: int = ..., *, check_finite: bool | None = ...) -> None: ...

class MultiKrum(GramianAggregator):
    r"""Mean of the rows that lie closest to their neighbours, as many as can be honest."""
    weighting: MultiKrumWeighting
    def __init__(self, n_byzantine: int, n_selected: int | None = ..., *, check_finite: bool | None = ...) -> None: ...

class MultiKrumWeighting(jdplugins.robust.multi_krum.MultiKrumWeighting):
    r"""Mean of the rows that lie closest to their neighbours, as many as can be honest."""
    def __init__(self, n_byzantine: int, n_selected: int | None = ..., *, check_finite: bool | None = ...) -> None: ...

class NNM(jdplugins.robust.nnm.NNM):
    r"""Nearest-neighbour mixing: each row becomes the mean of the rows closest to it."""
    def __init__(self, aggregator: Aggregator, *, check_finite: bool | None = ..., n_byzantine: int) -> None: ...

class SMEA(GramianAggregator):
    r"""Smallest maximum eigenvalue averaging: the mean of the set of rows with the least variance."""
    weighting: SMEAWeighting
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...

class SMEAWeighting(jdplugins.robust.smea.SMEAWeighting):
    r"""Smallest maximum eigenvalue averaging: the mean of the set of rows with the least variance."""
    def __init__(self, n_byzantine: int, *, check_finite: bool | None = ...) -> None: ...
