"""The laws of :class:`jdcore.autogram.GramianRule`, checked on calls of the operation."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen

from jdcore._registry import get_gramian_rule
from jdcore._tables import Entry
from jdcore.autogram._rules import InstalledRules
from jdcore.graph import GramianRule, Rule, Share, Site
from jdcore.graph._call import call
from jdcore.testing._case import NotApplicable, demand, demand_close
from jdcore.testing._trial import (
    OperationExample,
    Recording,
    Trial,
    explicit_rows,
    tensors_of,
)

_EXACT = 1e-12
_SINGLE = 1e-6
# The rows that are compared with are rounded to eight bits, as are the gradients on the way.
_HALF = 2.0**-5
# All different in most, so that dimensions that are taken for one another show.
_SIZES = ((1, 5, 1), (3, 4, 1), (2, 3, 2), (2, 2, 4))
"""Tasks, samples, and entries of the first dimension per sample."""


@frozen
class RuleCase:
    """A rule, and a call to try it on."""

    entry: Entry
    example: OperationExample

    @property
    def rule(self) -> Rule:
        rule: Rule = get_gramian_rule(self.entry)
        return rule

    def serves(self, name: str, node: Any) -> bool:
        """Whether the rule is meant for a node."""
        found = InstalledRules.entries(name, node)
        return any(entry.qualified_name == self.entry.qualified_name for entry in found)

    def recording(self) -> Recording:
        """Rules with this one among them."""
        return Recording(self.serves, self.rule)


def satisfies_the_protocol(case: RuleCase) -> None:
    demand(isinstance(case.rule, GramianRule), f"{case.rule!r} cannot be called")
    demand(bool(case.rule.__doc__), "the rule has no docstring")


def serves_the_operation(case: RuleCase) -> None:
    trial, rules = Trial.of(case.example, 2, 3), case.recording()
    trial.served(rules)
    operation = case.entry.spec.operation
    # An example that the rule never sees would pass every other check.
    demand(rules.met > 0, f"no operand of {operation} belongs to no sample in the example")
    demand(bool(rules.uses), "the rule serves no operand of the example")
    use = rules.uses[0]
    found = InstalledRules.entries(use.site.name, use.site.node)
    names = [entry.qualified_name for entry in found]
    demand(names == [case.entry.qualified_name], f"{operation} is served by {names}")


def agrees_with_backward_passes(case: RuleCase) -> None:
    for tasks, samples, repeats in _SIZES:
        label = f"{tasks} tasks, {samples} samples of {repeats}"
        trial = Trial.of(case.example, tasks, samples, repeats)
        _demand_right(trial, trial.rows(), case.recording(), _EXACT, label)


def agrees_in_single_precision(case: RuleCase) -> None:
    trial = Trial.of(case.example, 2, 3, dtype=torch.float32)
    _demand_right(trial, trial.rows(), case.recording(), _SINGLE, "in float32")


def agrees_in_bfloat16(case: RuleCase) -> None:
    _demand_right_in_half(case, "in bfloat16", dtype=torch.bfloat16)


def agrees_under_autocast(case: RuleCase) -> None:
    _demand_right_in_half(case, "under autocast", dtype=torch.float32, autocast=True)


def _demand_right_in_half(case: RuleCase, label: str, **options: Any) -> None:
    try:
        trial = Trial.of(case.example, 2, 3, **options)
        rows = trial.rows()
    except (RuntimeError, TypeError) as error:
        # There are kernels for other dtypes alone, and backward passes that mix dtypes up.
        reason = f"the operation itself does not work {label}: {error}"
        raise NotApplicable(reason) from error
    _demand_right(trial, rows, case.recording(), _HALF, label)


def _demand_right(
    trial: Trial, rows: torch.Tensor, rules: Recording, tolerance: float, label: str
) -> None:
    gramian, gradient = trial.served(rules)
    demand_close(gramian, rows @ rows.T, tolerance, f"the Gramian, {label}")
    expected = trial.weights() @ rows
    demand_close(gradient, expected, 10 * tolerance, f"a weighted gradient, {label}")


def gives_rows_of_every_operand(case: RuleCase) -> None:
    trial, rules = Trial.of(case.example, 2, 3, 2), case.recording()
    trial.served(rules)
    for use in rules.uses:
        demand(isinstance(use.share, Share), f"operand {use.operand}: {use.share!r} is no Share")
        shape = use.site.shapes[use.operand]
        demand(use.share.shape == shape, f"operand {use.operand}: a share of another shape")
        with torch.no_grad():
            rows, expected = use.share.rows(), explicit_rows(use)
        demand_close(rows, expected, 1e-10, f"rows of operand {use.operand}")


def serves_operands_by_themselves(case: RuleCase) -> None:
    trial = Trial.of(case.example, 2, 3)
    # Frozen parameters: a rule may not count on the share of another operand.
    for i in range(len(trial.operands)):
        one = Trial.of(case.example, 2, 3)
        chosen = Trial(one.losses, [one.operands[i]])
        _demand_right(chosen, chosen.rows(), case.recording(), _EXACT, f"only operand {i} wanted")


def changes_nothing(case: RuleCase) -> None:
    trial, rules = Trial.of(case.example, 2, 3), case.recording()
    trial.served(rules)
    for use in rules.uses:
        before = [(t, t.detach().clone()) for t in tensors_of(use.site)]
        # The numbers of the user's dropout would change with the engine.
        state = torch.get_rng_state()
        with torch.no_grad():
            case.rule(use.site, use.operand).rows()
        demand(torch.equal(torch.get_rng_state(), state), "the rule draws random numbers")
        same = all(torch.equal(t, copy) for t, copy in before)
        demand(same, "the rule changes the gradients or what the operation saved")


def has_no_state(case: RuleCase) -> None:
    trial, rules = Trial.of(case.example, 2, 3), case.recording()
    trial.served(rules)
    other = Trial.of(case.example, 1, 2)
    for use in rules.uses:
        with torch.no_grad():
            first = case.rule(_fresh(use.site), use.operand).rows()
            # Another call in between, whose numbers a rule with a state would mix in.
            other.served(case.recording())
            again = case.rule(_fresh(use.site), use.operand).rows()
        demand(torch.equal(first, again), "the same site gives another share later")


def _fresh(site: Site) -> Site:
    return Site(site.node, site.name, site.grads, site.layouts, site.shapes)


def is_as_steady_as_declared(case: RuleCase) -> None:
    if not case.entry.spec.steady:
        raise NotApplicable("the rule does not declare its operation steady")
    trial, rules = Trial.of(case.example, 1, 4), case.recording()
    trial.served(rules)
    for use in rules.uses:
        for number, grad in enumerate(use.site.grads):
            layout = use.site.layouts[number]
            if grad is None or layout is None:
                continue
            # Where samples are is found by NaN: a backward that hides it would hide them.
            poisoned = torch.where(layout.masks(grad[0])[0], torch.nan, torch.zeros_like(grad[0]))
            grads = [None] * len(use.site.grads)
            grads[number] = poisoned  # type: ignore[call-overload]  # a list of either
            found = call(use.site.node, grads)[use.operand]
            hidden = found is not None and not found.isnan().any()
            demand(not hidden, f"the backward hides NaN from operand {use.operand}")


def refuses(case: RuleCase) -> None:
    trial, rules = Trial.of(case.example, 2, 3), case.recording()
    _demand_right(trial, trial.rows(), rules, _EXACT, "of a refused call")
    demand(rules.met > 0, f"no operand of {case.entry.spec.operation} is wanted in the example")
    demand(not rules.uses, "the rule serves what it was said to refuse")


ON_EXAMPLES = (
    satisfies_the_protocol,
    serves_the_operation,
    agrees_with_backward_passes,
    agrees_in_single_precision,
    agrees_in_bfloat16,
    agrees_under_autocast,
    gives_rows_of_every_operand,
    serves_operands_by_themselves,
    changes_nothing,
    has_no_state,
    is_as_steady_as_declared,
)

ON_REFUSED = (refuses,)
