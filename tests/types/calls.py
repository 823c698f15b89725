"""Right and wrong calls as users write them; never run. Type checkers refuse the wrong ones."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import jdcore
from jdcore.aggregation import (
    NNM,
    CAGrad,
    GradDrop,
    GramianAggregator,
    KrumWeighting,
    NashMTL,
    UPGrad,
    UPGradWeighting,
)
from jdcore.autojac import backward, jac_to_grad
from jdcore.scalarization import FAMO, STCH, UW
from jdplugins.robust import MDA, GeometricMedian
from jdplugins.standard import UPGrad as SameUPGrad
from jdplugins.standard import UPGradWeighting as SameWeighting
from jdplugins.standard.scalarization import STCH as SameSTCH

preference = torch.tensor([0.5, 0.5])

assert_type(UPGrad(pref_vector=preference)(torch.eye(2)), torch.Tensor)
UPGrad(preference, solver="quadprog", check_finite=True)
UPGrad(pref_vectr=preference)  # wrong: misspelt
UPGrad(pref_vector=3)  # wrong: no Tensor
UPGrad(preference, "quadprog")  # wrong: solver comes by name
UPGrad(solver=2)  # wrong: no solver
CAGrad(c=0.5)
CAGrad()  # wrong: c is missing
KrumWeighting(n_byzantine=1, n_selected=2)
KrumWeighting(n_byzantine="1")  # wrong: no int
NashMTL().reset()
UPGrad().reset()  # wrong: it has no state

assert_type(UPGrad().weighting, UPGradWeighting)
assert_type(UPGrad().weighting.pref_vector, "torch.Tensor | None")
print(UPGrad().weighting.pref_vectr)  # wrong: misspelt
assert_type(SameUPGrad(), UPGrad)
assert_type(SameWeighting(), UPGradWeighting)
assert_type(SameSTCH(), STCH)

GradDrop(f=lambda purity: purity, leak=preference)
GradDrop(f=0.5)  # wrong: no function
NNM(GeometricMedian(), n_byzantine=1)
NNM(aggregator=MDA(n_byzantine=2), n_byzantine=1)
NNM(n_byzantine=1)  # wrong: nothing to wrap
MDA(n_bizantine=1)  # wrong: misspelt

STCH(mu=0.1, pref_vector=preference)
STCH(nu=0.1)  # wrong: misspelt
FAMO().update(torch.ones(2))
STCH().update(torch.ones(2))  # wrong: it has no state
torch.optim.SGD(UW(n_losses=2).parameters(), lr=0.1)

assert_type(jdcore.get_aggregator("upgrad", pref_vector=preference), UPGrad)
assert_type(jdcore.get_weighting("upgrad"), UPGradWeighting)
assert_type(jdcore.get_scalarizer("stch", mu=0.1), STCH)
jdcore.get_aggregator({"name": "upgrad", "solver": "native"})
jdcore.get_aggregator("my-methods:norm_mean", power=0.5)
jdcore.get_aggregator(3)  # wrong: no name

model = torch.nn.Linear(2, 2)
backward(model(torch.ones(4, 2)).mean(0))
jac_to_grad(model.parameters(), UPGrad())
jac_to_grad(model.parameters(), GramianAggregator(UPGradWeighting()))
jac_to_grad(model.parameters(), NNM(UPGrad(), n_byzantine=1))
