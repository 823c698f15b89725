"""
The one writer of the ``.grad`` and ``.jac`` of tensors.

What is written at once is checked at once: either every field is written or none. A ``.grad`` obeys
the rules of a backward pass (its dtype and memory layout, the hooks that follow it), except that
the hooks run after all fields are written, once for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from jdcore._accumulators import accumulator_hooks
from jdcore.errors import ParameterError, ParameterTypeError, UnservedGraphError
from jdcore.validators import describe_tensor


def get_jac(tensor: Tensor) -> Tensor | None:
    """The ``.jac`` of a tensor, None if it has none."""
    return getattr(tensor, "jac", None)


def free_jacs(tensors: Iterable[Tensor]) -> None:
    """Remove the ``.jac`` of those tensors that have one."""
    for tensor in tensors:
        if get_jac(tensor) is not None:
            del tensor.jac  # type: ignore[attr-defined]  # a field that autojac adds to tensors


def check_grads(tensors: Iterable[Tensor]) -> None:
    """
    Check that dense gradients can be added to the ``.grad`` of tensors.

    :raises ParameterError: If a ``.grad`` is not a dense tensor in memory of its own, of the shape
        and on the device of its tensor and of the dtype that its tensor asks for.
    """
    for tensor in tensors:
        if (present := tensor.grad) is not None:
            _check_grad(tensor, present, torch.strided)


def _check_grad(tensor: Tensor, present: Tensor, layout: torch.layout) -> None:
    # Gradients of a sparse embedding add up where both are sparse, and to a dense tensor.
    if not layout == present.layout == torch.sparse_coo:
        dtype = _grad_dtype(tensor) or present.dtype
        _check_field(".grad", present, tuple(tensor.shape), dtype, tensor.device)


def check_jacs(tensors: Iterable[Tensor], m: int) -> None:
    """
    Check that m rows can be added to the ``.jac`` of tensors.

    :raises ParameterError: If a ``.jac`` is not a dense tensor ``[m, *S]`` in memory of its own, of
        the dtype and on the device of its tensor of shape S.
    """
    for tensor in tensors:
        present = get_jac(tensor)
        if present is not None:
            _check_field(".jac", present, (m, *tensor.shape), tensor.dtype, tensor.device)


def check_jac(tensor: Tensor, jacobian: Tensor) -> None:
    """
    Check that a tensor found in ``.jac`` is a Jacobian with at least one dimension more.

    :raises ParameterError: If its shape, dtype, device or layout does not fit its tensor.
    """
    # By `shape`, as the `len` of a tensor is a function of Python.
    m = jacobian.shape[0] if isinstance(jacobian, Tensor) and jacobian.ndim else 0
    shape = (m, *tensor.shape)
    fault = _mismatch(jacobian, shape, tensor.dtype, tensor.device)
    if fault is not None:
        expected = f"a dense tensor of shape [{', '.join(['m', *map(str, tensor.shape)])}]"
        raise ParameterError(".jac", f"{expected}, {_kind(tensor.dtype, tensor.device)}", fault)


def write_jacs(jacobians: Mapping[Tensor, Tensor]) -> None:
    """
    Make Jacobians the ``.jac`` of tensors, or add them to those present.

    :param jacobians: Jacobian ``[m, *S]`` by tensor of shape S. They belong to this function: they
        share memory with nothing else.
    :raises ParameterError: As :func:`check_jacs`; nothing is written then.
    """
    # Read once: what is checked is what is written to, should another thread change a field.
    fields = [(tensor, jacobian, get_jac(tensor)) for tensor, jacobian in jacobians.items()]
    for tensor, jacobian, present in fields:
        if present is not None:
            check_jacs([tensor], len(jacobian))
    with torch.no_grad():
        for tensor, jacobian, present in fields:
            if present is None:
                tensor.jac = jacobian  # type: ignore[attr-defined]  # a field of autojac
            else:
                present.add_(jacobian)


def check_fits(shape: Sequence[int], tensor: Tensor) -> None:
    """
    Check that a gradient has the shape of its tensor, whose data may have been replaced.

    Copies and products would be spread over another one without a word.

    :param shape: That of the gradient.
    :raises UnservedGraphError: If it has another one.
    """
    if shape != tensor.shape:
        raise UnservedGraphError(
            f"one of shape {list(shape)}",
            "it belongs to data that were replaced after the forward pass",
            "Compute the losses once more.",
            "gradient",
            f"of the shape of its tensor, {list(tensor.shape)}",
        ).at([tensor])


def write_grads(gradients: Mapping[Tensor, Tensor]) -> None:
    """
    Make gradients the ``.grad`` of tensors, or add them to those present, and run what follows.

    After all gradients are written, the hooks of
    :meth:`torch.Tensor.register_post_accumulate_grad_hook` run, and those of the operations that
    accumulate, once for each tensor, so that optimizers which step during the backward pass work.
    An exception of a hook propagates, as in a backward pass: the gradients are written by then.

    :param gradients: Gradient by tensor, of its shape and on its device, dense or sparse. They
        belong to this function: they share memory with nothing else.
    :raises ParameterError: As :func:`check_grads`, or if a gradient has another shape than its
        tensor by now; nothing is written then.
    """
    hooks = accumulator_hooks(gradients)
    if hooks:
        with torch.no_grad():
            changed = {tensor: found.replaced(gradients[tensor]) for tensor, found in hooks.items()}
        gradients = {**gradients, **changed}
    fields = [(tensor, gradient, tensor.grad) for tensor, gradient in gradients.items()]
    for tensor, gradient, present in fields:
        if gradient.shape != tensor.shape:  # asked here, as it is called for every parameter
            check_fits(gradient.shape, tensor)
        if present is not None:
            _check_grad(tensor, present, gradient.layout)
    with torch.set_grad_enabled(False):  # half of the calls of torch.no_grad()
        # What takes memory, and may fail, comes before the first field is written.
        made = as_grads(gradients).values()
        for (tensor, _, present), gradient in zip(fields, made, strict=True):
            if present is not None:
                present.add_(gradient)
            else:
                tensor.grad = gradient
        for tensor, gradient in gradients.items():
            # torch keeps the hooks in this field, None if there are none; there is no public way to
            # ask.
            if (following := tensor._post_accumulate_grad_hooks) is not None:
                for hook in list(following.values()):  # a hook may remove itself
                    hook(tensor)
            if hooks and tensor in hooks:
                hooks[tensor].accumulated(gradient)


def dense(gradient: Tensor) -> Tensor:
    """
    A gradient that is not sparse.

    :raises ParameterTypeError: If it is masked: some of its entries have no value.
    """
    if gradient.layout != torch.strided:
        return gradient.to_dense()
    if type(gradient) is not Tensor and isinstance(gradient, MaskedTensor):
        raise ParameterTypeError(
            "inputs",
            "tensors whose gradients are plain ones",
            "a gradient that is a MaskedTensor, of which some entries have no value",
            "Mask by torch.where(mask, values, 0.0) in place of torch.masked.",
        )
    return gradient


def disjoint(gradients: Iterable[Tensor], others: Iterable[Tensor] = ()) -> list[Tensor]:
    """
    Gradients in contiguous memory of their own, sparse ones as they are.

    Those are copied that share memory: with one another (as for a + b), or with others. Gradients
    that lie one behind the other and make up a storage together do not: each copy would cost a
    kernel.
    """
    # Twice over: iterators are used up by the first pass.
    given = list(gradients)
    seen = {other.untyped_storage().data_ptr() for other in others}
    apart = _covering(given, seen)
    return [
        gradient
        if gradient.layout != torch.strided or i in apart
        else gradient.clone(memory_format=torch.contiguous_format)
        for i, gradient in enumerate(given)
    ]


def _covering(gradients: Sequence[Tensor], seen: Set[int]) -> set[int]:
    """The numbers of those that fill their storages, none of which is seen, without overlap."""
    of_storage: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for i, gradient in enumerate(gradients):
        if gradient.layout == torch.strided:
            storage = gradient.untyped_storage()
            start = storage.data_ptr()
            of_storage.setdefault(start, []).append(i)
            sizes[start] = storage.nbytes()
    found: set[int] = set()
    for start, numbers in of_storage.items():
        places: dict[int, int] = {}
        for i in numbers:
            places.setdefault(gradients[i].data_ptr(), i)
        end = start
        for place, i in sorted(places.items()) if len(places) > 1 else places.items():
            if place != end or not gradients[i].is_contiguous():
                break
            end += gradients[i].nbytes
        else:
            if end == start + sizes[start] and start not in seen:
                found.update(places.values())
    return found


@contextmanager
def set_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """
    Take the ``.grad`` of leaves away, and the hooks that follow it, for the time of a block.

    What functions in a backward pass accumulate by themselves can then be told, and leaves no
    trace.
    """
    # Not a copy: whoever holds the gradient, as buckets of reducers do, finds it again.
    before = [(leaf, leaf.grad) for leaf in leaves if _can_be_put_back(leaf, leaf.grad)]
    # torch calls what it finds in these dictionaries.
    hooks = [leaf._post_accumulate_grad_hooks for leaf, _ in before]
    for accumulator in accumulator_hooks(leaf for leaf, _ in before).values():
        hooks += [accumulator.before, accumulator.after]
    calls = [(found, dict(found)) for found in hooks if found]
    for found, _ in calls:
        found.clear()
    for leaf, _ in before:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient
        for found, entries in calls:
            found.update(entries)


def grad_versions(leaves: Iterable[Tensor]) -> list[tuple[Tensor | None, int]]:
    """The ``.grad`` of leaves, and how often each was modified, to compare with later."""
    gradients = [leaf.grad for leaf in leaves]
    return [(g, 0 if g is None or g.is_inference() else g._version) for g in gradients]


def _can_be_put_back(leaf: Tensor, gradient: Tensor | None) -> bool:
    # torch refuses to set a gradient that no longer fits since `leaf.data` was replaced.
    if gradient is None:
        return True
    dtype = _grad_dtype(leaf) or gradient.dtype
    kind = gradient.shape, gradient.dtype, gradient.device
    return kind == (leaf.shape, dtype, leaf.device)


def through_tensor_hooks(gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """
    What the hooks of :meth:`torch.Tensor.register_hook` make of gradients on their way to leaves.

    For gradients that did not come through a backward pass, which has run these hooks itself.

    :raises ParameterError: If a hook returns something else than a gradient of the same shape.
    """
    return {leaf: _through_hooks(leaf, gradient) for leaf, gradient in gradients.items()}


def _through_hooks(leaf: Tensor, gradient: Tensor) -> Tensor:
    # torch keeps the hooks in this field, None if there are none; there is no public way to ask.
    hooks = leaf._backward_hooks
    if not hooks:
        return gradient
    with torch.no_grad():
        for hook in list(hooks.values()):  # a hook may remove itself
            replaced = hook(gradient)
            if replaced is None:
                continue
            if not isinstance(replaced, Tensor) or replaced.shape != leaf.shape:
                expected = f"a function that returns None or a Tensor of shape {list(leaf.shape)}"
                raise ParameterError("hook", expected, describe_tensor(replaced))
            # A hook may hand out the same buffer for each gradient.
            gradient = gradient if replaced is gradient else replaced.clone()
    return gradient


def as_grads(gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Gradients as :func:`write_grads` can write them without any further memory."""
    return {t: as_grad(t, g) if t.grad is None else g for t, g in gradients.items()}


def as_grad(tensor: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the dtype and memory layout that a backward pass would give it."""
    # As :func:`_grad_dtype`, without its call for each parameter.
    dtype = (tensor.grad_dtype if tensor.is_leaf else tensor.dtype) or gradient.dtype
    if gradient.layout != torch.strided:
        return gradient.to(dtype)
    if gradient.dtype == dtype and gradient.stride() == tensor.stride():
        return gradient
    # Optimizers are fast where both have the same layout. For a tensor with gaps or repetitions,
    # `empty_like` gives a contiguous one.
    made = torch.empty_like(tensor, dtype=dtype).copy_(gradient)
    # Backward passes give parameters of a subclass plain gradients.
    return made if type(made) is type(gradient) else made.as_subclass(Tensor)


def _grad_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that the ``.grad`` of a tensor must have, None for any."""
    # Of what is no leaf, torch refuses to tell, but lets it have no other.
    return tensor.grad_dtype if tensor.is_leaf else tensor.dtype


def _check_field(
    field: str, present: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    fault = _mismatch(present, shape, dtype, device) or _unwritable(present)
    if fault is not None:
        raise ParameterError(
            field,
            f"None or a dense tensor of shape {list(shape)}, {_kind(dtype, device)}, that can be "
            "added to",
            fault,
            f"Use what earlier calls left in {field} first, or delete it.",
        )


def _kind(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"


def _mismatch(
    value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> str | None:
    if not isinstance(value, Tensor):
        return describe_tensor(value)
    if value.layout != torch.strided:
        return f"a {value.layout} tensor"
    if value.shape != shape or value.dtype != dtype:
        return describe_tensor(value)
    return None if value.device == device else f"a tensor on {value.device}"


def _unwritable(present: object) -> str | None:
    assert isinstance(present, Tensor)
    if present.is_inference():
        return "a tensor made in inference mode"
    return "a tensor whose elements share memory (expanded)" if _overlaps(present) else None


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may lie in the same place; a tensor that is added to must have none."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
