from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import metadata
from typing import Any

import numpy as np
import qpsolvers
from attrs import Attribute, field, frozen
from scipy.sparse import csc_matrix

from jdcore.errors import ParameterTypeError, UnknownNameError
from jdplugins.quadprog._backend import BackendError, DualConeBackend, Floats, Minimiser


def _installed(_: object, attribute: Attribute[Any], name: Any) -> None:
    if not isinstance(name, str):
        raise ParameterTypeError(attribute.name, "the name of a solver", repr(name))
    # Asked when the solver is made: an error in the first step would come much later.
    available = sorted(qpsolvers.available_solvers)
    if name not in available:
        # Its extras are called like the solvers that they install.
        known = name in (metadata("qpsolvers").get_all("Provides-Extra") or ())
        hint = f"It is not installed: pip install 'qpsolvers[{name}]'." if known else None
        close = difflib.get_close_matches(name, available)
        raise UnknownNameError(name, "backend of qpsolvers", close, available, hint)


@frozen(kw_only=True)
class QpsolversSolver(DualConeBackend):
    """
    Projection onto the dual cone by any solver that `qpsolvers
    <https://qpsolvers.github.io/qpsolvers/>`_ finds installed.

    Selected as ``solver="qpsolvers:daqp"``, after ``pip install daqp``. The dense active-set
    solvers ``daqp`` and ``quadprog`` suit these small problems best.

    Accuracy: that of float64 wherever the solver tells the positive entries of the answer from the
    zero ones, which all do on well-posed rows. Measured on the seven families of
    :mod:`jdcore.testing` with up to 32 rows, clarabel, daqp, highs, osqp, proxqp, quadprog and scs
    reach a residual of 1e-14.

    :param backend: Name of the solver, as qpsolvers spells it.
    :param options: Keyword arguments for the solver, e.g. ``{"eps_abs": 1e-9}`` for osqp.
    :param tolerance: Residual above which an answer counts as unsolved.
    :param fallback: Name of the solver that takes over where the answer is unsolved; None: a
        warning tells.
    :raises UnknownNameError: If the solver is not installed; the message lists those that are.

    >>> import torch
    >>> from jdcore.aggregation import UPGrad
    >>> UPGrad(solver="qpsolvers:quadprog")(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    tensor([0.2924, 1.9006, 1.9006])
    """

    backend: str = field(default="quadprog", kw_only=False, validator=_installed)
    options: Mapping[str, Any] = field(factory=dict)

    @property
    def label(self) -> str:
        return f"qpsolvers:{self.backend}"

    def minimiser(self, quadratic: Floats) -> Minimiser:
        # Given a dense matrix, qpsolvers converts it for these at each call, with a warning.
        sparse = self.backend not in qpsolvers.dense_solvers
        matrix = csc_matrix(quadratic) if sparse else quadratic
        zeros = np.zeros(len(quadratic))

        def minimise(linear: Floats) -> Floats:
            try:
                answer = qpsolvers.solve_qp(
                    matrix, linear, lb=zeros, solver=self.backend, **self.options
                )
            # Each solver has exceptions of its own; all of them end up in the text of a warning.
            except Exception as error:
                raise BackendError(f"{type(error).__name__}: {error}") from error
            if answer is None:
                raise BackendError("no answer within its limits")
            return np.asarray(answer, dtype=np.float64)

        return minimise
