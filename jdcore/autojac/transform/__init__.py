"""
The transforms that ``backward``, ``mtl_backward`` and ``jac`` are made of.

>>> import torch
>>> from jdcore.autojac.transform import AccumulateJac, Diagonalize, Init, Jac
>>> w = torch.tensor([1.0, 2.0], requires_grad=True)
>>> losses = w**2
>>> graph = Init([losses]) >> Diagonalize([losses]) >> Jac([losses], [w]) >> AccumulateJac([w])
>>> print(graph)
Init(float32[2] of Pow)
>> Diagonalize(float32[2] of Pow)
>> Jac(float32[2] of Pow -> float32[2])
>> AccumulateJac(float32[2])
>>> _ = graph()
>>> w.jac
tensor([[2., 0.],
        [0., 4.]])
"""

from jdcore.autojac.transform._accumulate import AccumulateGrad, AccumulateJac
from jdcore.autojac.transform._base import Chain, Transform, Union
from jdcore.autojac.transform._differentiate import Jac
from jdcore.autojac.transform._sharded import ShardedJac
from jdcore.autojac.transform._sources import Diagonalize, Init, Keep
from jdcore.autojac.transform._tasks import PerTask

__all__ = [
    "AccumulateGrad",
    "AccumulateJac",
    "Chain",
    "Diagonalize",
    "Init",
    "Jac",
    "Keep",
    "PerTask",
    "ShardedJac",
    "Transform",
    "Union",
]
