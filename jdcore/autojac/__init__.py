"""
Jacobians for training: ``backward`` and ``mtl_backward`` fill ``.jac``, ``jac_to_grad`` ``.grad``.

All of them run one small graph of transforms, which is public: :mod:`jdcore.autojac.transform`.
"""

from jdcore.autojac._backward import backward
from jdcore.autojac._gramian_backward import gramian_backward
from jdcore.autojac._jac import jac
from jdcore.autojac._jac_to_grad import jac_to_grad, zero_jac
from jdcore.autojac._mtl_backward import mtl_backward

__all__ = ["backward", "gramian_backward", "jac", "jac_to_grad", "mtl_backward", "zero_jac"]
