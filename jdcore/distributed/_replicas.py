from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from attrs import define, field
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from jdcore._living import instances
from jdcore.errors import ParameterError
from jdcore.graph import Reach


def several_processes() -> bool:
    """Whether this process has been told of others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def replicas_of(tensors: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules that keep tensors equal on several processes."""
    return _WRAPPERS.of(tensors) if several_processes() else []


def parameters_of(replica: DistributedDataParallel) -> list[Tensor]:
    """The parameters that a wrapper keeps equal, in the same order on all processes."""
    ignored = replica.parameters_to_ignore
    return [p for name, p in replica.module.named_parameters() if name not in ignored]


def places_in(replicas: Iterable[DistributedDataParallel]) -> dict[Tensor, str]:
    """
    By parameter of some wrappers, what tells it from others on all processes.

    Nothing is said of wrappers of as many parameters as another one: which is which, torch does not
    tell.
    """
    sizes = [len(parameters_of(module)) for module in _WRAPPERS.made()]
    return {
        parameter: f"{i} of {len(parameters)}"
        for replica in replicas
        for parameters in [parameters_of(replica)]
        if sizes.count(len(parameters)) == 1
        for i, parameter in enumerate(parameters)
    }


@define(eq=False)
class _Wrappers:
    """
    The DistributedDataParallel modules of this process.

    A parameter does not know the reducer that watches it, nor does torch list the wrappers. A hook
    of torch tells of those that are constructed. Earlier ones, copies, and those that were loaded
    are found by a search through all objects, for parameters that none of the known ones has.
    """

    known: list[weakref.ref[DistributedDataParallel]] = field(factory=list)
    """In the order in which they were made, as far as that was heard."""
    listens: bool = False
    owners: Any = field(factory=WeakIdKeyDictionary)
    """By parameter, a weak reference to its wrapper, or None if it has none."""

    def of(self, tensors: Iterable[Tensor]) -> list[DistributedDataParallel]:
        """The wrappers of those tensors that have one."""
        # Nothing else is wrapped, such as inputs, of which each step has new ones.
        parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        if any(map(self._is_unknown, parameters)):
            self._assign(parameters)
        found = (self.owners[parameter] for parameter in parameters)
        owners = (reference() for reference in found if reference is not None)
        return list(dict.fromkeys(owner for owner in owners if owner is not None))

    def made(self) -> list[DistributedDataParallel]:
        """Those that can reduce, in the order in which they were made."""
        modules = (reference() for reference in self.known)
        return [module for module in modules if module is not None and _can_reduce(module)]

    def _is_unknown(self, parameter: Tensor) -> bool:
        if parameter not in self.owners:
            return True
        reference = self.owners[parameter]
        # Where its wrapper is gone, an earlier one may still be there.
        return reference is not None and reference() is None

    def _assign(self, parameters: Iterable[Tensor]) -> None:
        """Find out the wrappers of some parameters."""
        unknown = [parameter for parameter in parameters if self._is_unknown(parameter)]
        for parameter in unknown:
            self.owners.pop(parameter, None)
        self._file()
        if any(parameter not in self.owners for parameter in unknown):
            self._search()
            self._file()
        for parameter in unknown:
            self.owners.setdefault(parameter, None)

    def _file(self) -> None:
        for module in self.made():  # the last one counts, should several have a parameter
            for parameter in parameters_of(module):
                self.owners[parameter] = weakref.ref(module)

    def _search(self) -> None:
        if not self.listens:
            # Before the search, so that a wrapper made by another thread meanwhile is not missed. A
            # wrapper registers the module that it wraps.
            register_module_module_registration_hook(self._notice)
            self.listens = True
            # Which of those found was made last, nobody can tell: at least none of them is garbage.
            gc.collect()
        heard = {reference() for reference in self.known}
        found = (module for module in instances(DistributedDataParallel) if module not in heard)
        self.known = [
            *(reference for reference in self.known if reference() is not None),
            *map(weakref.ref, found),
        ]

    def _notice(self, module: nn.Module, name: str, submodule: nn.Module) -> None:
        del name
        if isinstance(module, DistributedDataParallel):
            self.known.append(weakref.ref(module))
            # They may have had no wrapper, or an earlier one.
            for parameter in submodule.parameters():
                self.owners.pop(parameter, None)


def _can_reduce(module: DistributedDataParallel) -> bool:
    """Whether the construction of a wrapper did not fail, and its processes are still a group."""
    if not hasattr(module, "reducer"):
        return False
    try:
        dist.get_backend(module.process_group)
    except ValueError:  # the group was destroyed
        return False
    return True


_WRAPPERS = _Wrappers()


def check_replicas(tensors: Iterable[Tensor], graphs: Iterable[Reach], parameter: str) -> None:
    """
    Check that the Jacobian of a DistributedDataParallel module can be computed.

    Its reducer takes no part: rows are averaged over the processes when they are aggregated.

    :param graphs: What is differentiated.
    :raises ParameterError: If its reducer would be left in a state that spoils later steps.
    """
    for replica in replicas_of(tensors):
        if replica.static_graph and any(map(_sinks, graphs)):
            raise ParameterError(
                parameter,
                "of a DistributedDataParallel module without static_graph=True",
                "one with it",
                "After a Jacobian, its ordinary backward passes would silently not be averaged. "
                "Drop the option, call model.module instead of model, or make an ordinary step "
                "first.",
            )
        if replica._join_config.enable:
            raise ParameterError(
                parameter,
                "used outside of DistributedDataParallel.join",
                "parameters of a module inside of it",
                "Processes that have run out of data cannot take part in aggregating a Jacobian: "
                "let them go on with global_means and counts of zero. torch stays in this mode "
                "until `with model.join(enable=False): pass`.",
            )
        # It takes away the hooks by which they would step, for a hook of its reducer.
        if any(hasattr(p, "_in_backward_optimizers") for p in parameters_of(replica)):
            raise ParameterError(
                parameter,
                "without optimizers that DistributedDataParallel steps in its reduction",
                "some with _apply_optimizer_in_backward",
                "They would never step. Put them into hooks of the parameters, "
                "register_post_accumulate_grad_hook, which run once in each step.",
            )
        if replica.mixed_precision is not None:
            raise ParameterError(
                parameter,
                "of a DistributedDataParallel module without mixed_precision",
                "one with it",
                "Use torch.autocast instead.",
            )


def check_trunk(trunk: Reach, heads: Reach, parameter: str) -> None:
    """
    Check that heads do not run through the same DistributedDataParallel call as the trunk.

    :param trunk: What lies behind the features.
    :param heads: What lies between the losses and the features.
    :raises ParameterError: If they do and it ties everything together.
    """
    # With find_unused_parameters, all outputs of the wrapper pass one node: behind each of the
    # losses, but not on the way to the features, then lie the parameters of all tasks.
    if several_processes() and _sinks(trunk) & _sinks(heads):
        raise ParameterError(
            parameter,
            "outputs of a trunk whose DistributedDataParallel wrapper does not hold the heads",
            "outputs of a wrapper with find_unused_parameters=True that gave the heads' outputs",
            "It ties all outputs together, so all parameters would count as shared. Drop the "
            "option, or wrap the trunk and each head by itself.",
        )


def _sinks(graph: Reach) -> set[Node]:
    return {node for node in graph.nodes if node.name() == "_DDPSinkBackward"}
