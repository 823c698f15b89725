from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from jdcore._layers import CHOOSE
from jdcore._registry import get_gramian_rule, registry
from jdcore.distributed._refusals import refuse_sharded
from jdcore.errors import ParameterError, ParameterTypeError, PluginWarning, warn
from jdcore.protocols import GramianRule

OPERATIONS = "operations"
"""Stands for the rules that serve everything without a closed form of its own."""


@frozen(eq=False)
class Served:
    """
    A module whose calls are recorded.

    :param name: Its name in messages.
    :param module: The module.
    :param rule: The closed form, or None for the generic rule.
    :param rule_name: Name of the rule.
    :param reason: Why this rule.
    :param parameters: All parameters of the module that a call covers, by name.
    """

    name: str
    module: nn.Module
    rule: GramianRule | None
    rule_name: str
    reason: str
    parameters: dict[str, Parameter]
    covered: frozenset[Parameter] = field(init=False)

    @covered.default
    def _covered(self) -> frozenset[Parameter]:
        return frozenset(self.parameters.values())

    @property
    def label(self) -> str:
        """The name, or the type of a module that is the whole model."""
        return self.name or type(self.module).__name__


@define
class Plan:
    """Which rule serves which module and parameter. Made once, when the engine is."""

    served: list[Served] = field(factory=list)
    direct: dict[Parameter, str] = field(factory=dict)
    names: dict[Parameter, str] = field(factory=dict)
    open: set[Parameter] = field(factory=set)
    """Parameters that may be used anywhere: those of modules without a closed form."""


def make_plan(modules: Sequence[nn.Module]) -> Plan:
    """
    Choose a rule for every module below the given ones.

    :raises ParameterTypeError: If one of them is no module.
    :raises ParameterError: If a module is wrapped for distributed training, or not initialised.
    """
    plan = Plan()
    seen: set[nn.Module] = set()
    for position, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise ParameterTypeError("modules", "torch.nn.Modules", repr(module))
        prefix = f"modules[{position}]" if len(modules) > 1 else ""
        for name, child in module.named_modules(prefix=prefix):
            _refuse_unusable(name, child)
        _visit(plan, module, prefix, seen)
    for served in plan.served:
        if served.rule is None:
            plan.open.update(served.parameters.values())
    plan.open.update(plan.direct)
    return plan


def _visit(plan: Plan, module: nn.Module, name: str, seen: set[nn.Module]) -> None:
    if module in seen:
        return
    seen.add(module)
    if next(module.parameters(), None) is None:
        return
    served = _serve(module, name)
    if served is not None:
        seen.update(module.modules())
        plan.served.append(served)
        for parameter_name, parameter in served.parameters.items():
            plan.names.setdefault(parameter, _joined(name, parameter_name))
        return
    for parameter_name, parameter in module.named_parameters(recurse=False):
        plan.direct[parameter] = plan.names[parameter] = _joined(name, parameter_name)
    for child_name, child in module.named_children():
        _visit(plan, child, _joined(name, child_name), seen)


def _serve(module: nn.Module, name: str) -> Served | None:
    """The module as one layer, or None if its children are to be served one by one."""
    opaque = _opaque(module)
    if opaque is not None:
        return _generic(module, name, opaque)
    entries = registry.gramian_rules(type(module))
    if len(entries) > 1:
        return _generic(module, name, _clash(type(module), entries))
    if entries:
        return _ruled(module, name, entries[0])
    leaf = not any(next(child.parameters(), None) is not None for child in module.children())
    return _generic(module, name, f"no rule for {type(module).__name__}") if leaf else None


def _clash(layer: type, entries: Sequence[Any]) -> str:
    claims = " and ".join(e.qualified_name for e in entries)
    text = f"{claims} claim the same layer {layer.__name__}, and none of them serves it. {CHOOSE}"
    warn(PluginWarning(text))
    return f"{claims} disable each other"


def _ruled(module: nn.Module, name: str, entry: Any) -> Served:
    rule = get_gramian_rule(entry)
    refusal = _mismatch(module, rule) or rule.refusal(module)
    if refusal is not None:
        return _generic(module, name, refusal)
    parameters = dict(module.named_parameters())
    reason = f"closed form for {entry.spec.layer.partition(':')[2]}: {entry.spec.summary}"
    return Served(name, module, rule, entry.spec.name, reason, parameters)


def _generic(module: nn.Module, name: str, reason: str) -> Served:
    reason += ": by the operations that use its parameters, or row by row"
    return Served(name, module, None, OPERATIONS, reason, dict(module.named_parameters()))


def _opaque(module: nn.Module) -> str | None:
    if is_parametrized(module):
        return "parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if isinstance(module, nn.MultiheadAttention):
        return "uses the parameters of its submodule without calling it"
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return "compiled"
    return None


def _mismatch(module: nn.Module, rule: Any) -> str | None:
    """Why the module is not quite the layer that the rule knows."""
    if "forward" in vars(module):
        return "forward is replaced on this instance"
    unknown = [n for n, _ in module.named_parameters() if n not in rule.parameters]
    return f"unknown parameters {', '.join(unknown)}" if unknown else None


def _refuse_unusable(name: str, module: nn.Module) -> None:
    if isinstance(module, (DistributedDataParallel, DataParallel, FullyShardedDataParallel)):
        raise ParameterError(
            "modules",
            "not wrapped for distributed training",
            f"a {type(module).__name__} as `{name}`",
            "Its gradients are reduced by hooks that the engine does not run; give the engine a "
            "module on one device.",
        )
    for parameter_name, parameter in module.named_parameters(recurse=False):
        label = _joined(name, parameter_name)
        refuse_sharded([parameter], f"modules.{label}")
        if isinstance(parameter, UninitializedParameter):
            raise ParameterError(
                "modules",
                "initialised",
                f"a lazy parameter as `{label}`",
                "Run one forward pass before making the engine.",
            )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def explanation(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Name, rule and reason, for every module and every parameter served by itself."""
    for served in plan.served:
        yield served.label, served.rule_name, served.reason
    for name in plan.direct.values():
        yield name, OPERATIONS, "used by a module with children: by the operations that use it"
