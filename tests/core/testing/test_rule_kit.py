"""The checks of Gramian rules catch what they promise to catch: each saboteur breaks one law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jdcore
from jdcore import GramianRuleSpec, UnknownNameError
from jdcore.autogram import Dense, NoRule, Share, Site
from jdcore.testing import (
    ConformanceError,
    NotApplicable,
    OperationExample,
    gramian_rule_tests,
    rule_checks,
)


class Affine(torch.autograd.Function):
    """Scale and shift of each feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale + shift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, scale = ctx.saved_tensors
        over = list(range(x.ndim - 1))
        return grads[0] * scale, (grads[0] * x).sum(over), grads[0].sum(over)


def honest(site: Site, operand: int) -> Share:
    """Sums over positions."""
    x, scale = site.node.saved_tensors
    if operand == 0 or len(scale) == 1:
        raise NoRule
    return site.broadcast(site.grad * x if operand == 1 else site.grad, operand)


def forgetful(site: Site, operand: int) -> Share:
    """Forgets all but the first position of a sample."""
    x, _ = site.node.saved_tensors
    rows = site.positions(site.grad * x if operand == 1 else site.grad, 1)
    return Dense(rows[:, :, 0], site.shapes[operand])


def imprecise(site: Site, operand: int) -> Share:
    """Rounds to half precision on the way."""
    share = honest(site, operand)
    return Dense(share.rows().half().to(site.grad.dtype), share.shape)


def coarse(site: Site, operand: int) -> Share:
    """Rounds to two bits where there are eight."""
    share = honest(site, operand)
    if site.grad.dtype != torch.bfloat16:
        return share
    return Dense(share.rows().to(torch.float8_e5m2).float(), share.shape)


def confident(site: Site, operand: int) -> Share:
    """Takes it that gradients have the dtype of what was saved."""
    x, _ = site.node.saved_tensors
    if operand != 1:
        return honest(site, operand)
    rows = torch.einsum("kbtf,btf->kbf", site.positions(site.grad, lead=1), site.positions(x))
    return Dense(rows, site.shapes[operand])


def overwriting(site: Site, operand: int) -> Share:
    """Multiplies the gradients in place."""
    x, _ = site.node.saved_tensors
    return site.broadcast(site.grad.mul_(x) if operand == 1 else site.grad, operand)


_seen = [1.0]


def remembering(site: Site, operand: int) -> Share:
    """Adds what it saw before."""
    _seen[0] += 1.0
    share = honest(site, operand)
    return Dense(share.rows() * _seen[0], share.shape)


def transposing(site: Site, operand: int) -> Share:
    """Swaps tasks and samples, which no Gramian of one task shows."""
    share = honest(site, operand)
    rows = share.rows()
    return Dense(rows.flip(-1), share.shape)


def refusing(site: Site, operand: int) -> Share:
    """Refuses everything."""
    raise NoRule


def undocumented(site: Site, operand: int) -> Share:
    return honest(site, operand)


def _example(features: int = 4) -> OperationExample:
    return OperationExample(
        Affine.apply,
        lambda n: (torch.randn(n, 3, features),),
        lambda: (torch.randn(features), torch.randn(features)),
    )


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(rule: Callable[..., Any], **fields: Any) -> str:
        own = jdcore._registry.Registry()
        for module in ("jdcore.autogram._rules", "jdcore.testing._rules"):
            monkeypatch.setattr(f"{module}.registry", own)
        own.register(
            GramianRuleSpec(
                name="affine",
                operation=f"{__name__}:Affine",
                rule=f"{__name__}:{rule.__name__}",
                summary="For this test.",
                api_version=1,
                **fields,
            )
        )
        return "runtime:affine"

    return register


def _failures(rule: str, *examples: OperationExample) -> set[str]:
    found = set()
    for check in rule_checks(rule, *examples):
        try:
            check.run()
        except ConformanceError:
            found.add(check.check.__name__)
        except NotApplicable:
            assert check.check.__name__ == "is_as_steady_as_declared"
    return found


def test_an_honest_rule_passes_every_check(registered: Any) -> None:
    assert _failures(registered(honest), _example()) == set()
    assert _failures(registered(honest, steady=True), _example()) == set()


@pytest.mark.parametrize(
    ("saboteur", "expected"),
    [
        (forgetful, "agrees_with_backward_passes"),
        (imprecise, "agrees_in_single_precision"),
        (coarse, "agrees_in_bfloat16"),
        (overwriting, "changes_nothing"),
        (remembering, "has_no_state"),
        (transposing, "gives_rows_of_every_operand"),
        (refusing, "serves_the_operation"),
        (undocumented, "satisfies_the_protocol"),
    ],
)
def test_each_saboteur_is_caught(
    registered: Any, saboteur: Callable[..., Any], expected: str
) -> None:
    assert expected in _failures(registered(saboteur), _example())


def test_a_rule_that_trusts_dtypes_is_caught_under_autocast(registered: Any) -> None:
    def behind_a_product(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return Affine.apply(x @ torch.eye(4, dtype=x.dtype), scale, shift)  # type: ignore[no-any-return]

    example = OperationExample(
        behind_a_product,
        lambda n: (torch.randn(n, 3, 4),),
        lambda: (torch.randn(4), torch.randn(4)),
    )

    assert _failures(registered(confident), example) == {"agrees_under_autocast"}
    assert _failures(registered(honest), example) == set()


class Wide(Affine):
    """Knows no bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("no kernel for bfloat16")
        return _forward(ctx, x, scale, shift)


_forward = Affine.forward


def test_what_the_operation_itself_cannot_do_is_not_asked_of_its_rule(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = registered(honest)
    monkeypatch.setattr(Affine, "forward", Wide.forward)
    checks = {c.check.__name__: c for c in rule_checks(rule, _example())}

    with pytest.raises(NotApplicable, match="does not work in bfloat16: no kernel for bfloat16"):
        checks["agrees_in_bfloat16"].run()
    checks["agrees_under_autocast"].run()


class Forgiving(Affine):
    """Hides NaN in its backward."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.nan_to_num() for g in _backward(ctx, *grads))


_backward = Affine.backward


def test_an_operation_that_hides_nan_is_not_steady(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = registered(honest, steady=True)
    monkeypatch.setattr(Affine, "backward", Forgiving.backward)
    assert "is_as_steady_as_declared" in _failures(rule, _example())


def test_refused_calls_are_checked(registered: Any) -> None:
    rule = registered(honest)
    rule_checks(rule, _example(), refused=[_example(1)])[-1].run()
    with pytest.raises(ConformanceError, match="serves what it was said to refuse"):
        rule_checks(rule, _example(), refused=[_example()])[-1].run()


def test_a_check_says_which_rule_and_which_call(registered: Any) -> None:
    first = rule_checks(registered(honest), _example())[0]
    assert str(first) == "runtime:affine-example-satisfies_the_protocol"


def test_errors_name_what_was_wrong(registered: Any) -> None:
    rule = registered(forgetful)
    checks = {c.check.__name__: c for c in rule_checks(rule, _example())}
    with pytest.raises(ConformanceError, match=r"the Gramian, 1 tasks, 5 samples of 1: error \d"):
        checks["agrees_with_backward_passes"].run()


def test_a_rule_that_is_not_there_and_one_without_examples(registered: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"No Gramian rule is registered under the name"):
        gramian_rule_tests("jdcore:linaer", _example())
    with pytest.raises(ConformanceError, match="without an example of its operation"):
        gramian_rule_tests(registered(honest))


def test_hooks_that_others_made_before_do_not_matter(registered: Any) -> None:
    for check in rule_checks(registered(honest, steady=True), _example()):
        (torch.ones(1, requires_grad=True) * 2).register_hook(lambda grad: grad)
        check.run()
