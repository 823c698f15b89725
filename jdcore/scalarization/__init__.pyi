# Written by `jdcore stubs`; a test compares it with the classes. Not to be edited.
from typing import Any as Any
from jdcore.scalarization._base import LossScalarizer as LossScalarizer
from jdcore.scalarization._base import TrainableScalarizer as TrainableScalarizer
from jdcore.scalarization._base import WeightedSum as WeightedSum
from jdcore.scalarization._losses import check_losses as check_losses
from jdcore.scalarization._losses import require_above as require_above
from jdplugins.standard.scalarization import COSMOS as COSMOS
from jdplugins.standard.scalarization import Chebyshev as Chebyshev
from jdplugins.standard.scalarization import Constant as Constant
from jdplugins.standard.scalarization import DWA as DWA
from jdplugins.standard.scalarization import FAMO as FAMO
from jdplugins.standard.scalarization import GeometricMean as GeometricMean
from jdplugins.standard.scalarization import IMTLL as IMTLL
from jdplugins.standard.scalarization import Mean as Mean
from jdplugins.standard.scalarization import PBI as PBI
from jdplugins.standard.scalarization import Random as Random
from jdplugins.standard.scalarization import STCH as STCH
from jdplugins.standard.scalarization import Sum as Sum
from jdplugins.standard.scalarization import UW as UW

# Methods of other distributions are found at run time.
def __getattr__(name: str) -> Any: ...
