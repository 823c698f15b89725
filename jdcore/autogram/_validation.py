from __future__ import annotations

from torch.autograd.graph import Node

from jdcore.autogram._plan import Plan
from jdcore.autogram._survey import Survey, leads_to_parameter
from jdcore.errors import ParameterError
from jdcore.graph import Unreadable, saved


def refuse_impossible(found: Survey, plan: Plan, batch_dim: int | None) -> None:
    """
    Refuse graphs for which some closed form would be wrong.

    :raises ParameterError: See there.
    """
    for record in found.sites:
        if record.modified():
            raise ParameterError(
                "output",
                "computed from inputs that are still what they were",
                f"an input of `{record.served.label}` that was modified in place after its call",
                "Work on a copy: x = x + y instead of x += y.",
            )
    if found.stray:
        name = plan.names[next(iter(found.stray))]
        raise ParameterError(
            "modules",
            "used through recorded calls only",
            f"`{name}` used in another way",
            "Another module uses it, a hook ran on the output of its layer before the engine could "
            "see it, the forward pass ran before the engine was made or under torch.compile, or "
            "the parameter was replaced. Pass the module that uses it as a layer "
            "with a rule of its own, compile submodules before making the engine, or use "
            "batch_dim=None.",
        )
    if batch_dim is not None:
        _refuse_batch_statistics(found, plan)


def _refuse_batch_statistics(found: Survey, plan: Plan) -> None:
    for node in found.batch_norms:
        if _mixes_samples(node) and leads_to_parameter(node, plan):
            raise ParameterError(
                "batch_dim",
                "None where a BatchNorm in training mode makes every loss depend on every sample",
                batch_dim_text(found),
                "Call .eval() on it, use GroupNorm or InstanceNorm, or use batch_dim=None.",
            )


def _mixes_samples(batch_norm: Node) -> bool:
    try:
        # Instance normalization is the same operation on a batch of one.
        images = saved(batch_norm, "input").shape[0]
        return bool(saved(batch_norm, "training")) and images > 1
    except Unreadable:
        return True  # rather a call too many refused than a wrong number


def batch_dim_text(found: Survey) -> str:
    """What to call the offending layer."""
    names = [
        record.served.label
        for record in found.sites
        if record.training and "BatchNorm" in type(record.served.module).__name__
    ]
    return f"a BatchNorm in training mode{f' (`{names[0]}`)' if names else ''}"
