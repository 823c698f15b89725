"""Which names of torch that are no public interface are read, and where: docs/versions.md tells."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("jdcore/**/*.py", "jdplugins/*/src/**/*.py")
    for path in sorted(ROOT.glob(pattern))
}

HOOKS = {"_backward_hooks", "_post_accumulate_grad_hooks"}

READ = {
    "jdcore/_fields.py": {*HOOKS, "_version"},
    "jdcore/aggregation/_module.py": {"_apply"},
    "jdcore/autojac/_hidden.py": {"_backward_hooks"},
    "jdcore/autojac/_initial.py": {"_backward_hooks", "_base"},
    "jdcore/autojac/_products.py": {"_backward_hooks"},
    "jdcore/autojac/_vmap.py": {"_backward_hooks"},
    "jdcore/distributed/_gathering.py": {
        "_all_reduce_hook",
        "_backward_hooks",
        "_reduce_scatter_comm",
    },
    "jdcore/distributed/_heads.py": {"_post_accumulate_grad_hooks"},
    "jdcore/distributed/_replicas.py": {
        "_DDPSinkBackward",
        "_in_backward_optimizers",
        "_join_config",
    },
    "jdcore/distributed/_sharding.py": {
        "_composable_state",
        "_fsdp_param_group",
        "_fsdp_param_groups",
        "_is_flat_param",
        "_module_state_mapping",
        "_root_post_backward_final_callback",
        "_state_ctx",
        "_unsharded_param",
    },
    "jdcore/_modes.py": {
        "_C",
        "_current_level",
        "_functorch",
        "_get_fp32_precision_getter",
        "_is_any_autocast_enabled",
    },
    "jdcore/linalg/_blas.py": {"_current_level"},
    "jdcore/graph/_batched.py": {
        "_C",
        "_add_batch_dim",
        "_functorch",
        "_remove_batch_dim",
        "_vmap_decrement_nesting",
        "_vmap_increment_nesting",
    },
    "jdcore/graph/_hooks.py": HOOKS,
    "jdcore/graph/_jacobian.py": {"_backward_hooks"},
    "jdcore/graph/_passes.py": {"_engine_run_backward"},
    "jdcore/graph/_tasks.py": {"_backward_hooks"},
    "jdcore/graph/_saved.py": {
        "_C",
        "_CheckpointFrame",
        "_Handle",
        "_Holder",
        "_autograd",
        "_current_graph_task_id",
        "_forward_cls",
        "_functorch",
        "_get_sequence_nr",
        "_input_metadata",
        "_library",
        "_raw",
        "_raw_saved_",
        "_saved_",
        "_saved_scales",
        "_sequence_nr",
        "_sym_",
    },
    "jdcore/graph/_functions.py": {"_version"},
    "jdcore/graph/shares/_outer.py": {"_version"},
    "jdcore/graph/shares/_patches.py": {"_version"},
    "jdcore/graph/shares/_share.py": {"_version"},
}
"""By module, all that it reads."""

# Of Python, and a folder of ours.
NOT_OF_TORCH = {"_current_frames", "_getframe", "_initializing", "_template"}

_PRIVATE = re.compile(r"_[A-Za-z]\w*")


def private_names(source: str) -> set[str]:
    """
    Names with a leading underscore that a module reads, and does not define itself.

    Operations on lists of tensors, ``torch._foreach_*``, are not among them: they are documented,
    and the optimizers of torch are made of them.
    """
    tree = ast.parse(source)
    own = {name for node in ast.walk(tree) for name in _defined(node)}
    read = {
        part
        for node in ast.walk(tree)
        for part in _read(node)
        if _PRIVATE.fullmatch(part) and not part.startswith("_foreach_")
    }
    inherited = {node.attr for node in ast.walk(tree) if _is_inherited(node)}
    return (read - own) | inherited


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
        ("jdcore", "jdplugins")
    ):
        yield from (node.module or "").split(".")
        yield from (alias.name for alias in node.names)


def _read(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        # An attribute of `self` may be defined by a base class elsewhere.
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield node.attr
    elif isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split("."))
    elif isinstance(node, ast.ImportFrom):
        yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Constant):
        # A name to get by, or a module to find.
        name = node.value if isinstance(node.value, str) else ""
        yield from name.split(".") if re.fullmatch(r"_\w+|torch(\.\w+)+", name) else ()


def _is_inherited(node: ast.AST) -> bool:
    """Whether a node is a private name of a base class, as in ``super()._apply``."""
    return (
        isinstance(node, ast.Attribute)
        and _PRIVATE.fullmatch(node.attr) is not None
        and ast.unparse(node.value) == "super()"
    )


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._dynamo", {"_dynamo"}),
        ("from torch.fx import _x", {"_x"}),
        ("torch._C.f()", {"_C"}),
        ("tensor._backward_hooks", {"_backward_hooks"}),
        ("f(x)[0]._state._ctx", {"_state", "_ctx"}),
        ("getattr(unit, '_comm', None)", {"_comm"}),
        ("dir(kind).startswith('_saved_')", {"_saved_"}),
        ("sys.modules['torch.distributed._composable_state']", {"_composable_state"}),
        ("super()._apply(f)", {"_apply"}),
        ("torch._foreach_norm(x)", set()),
        ("from jdcore.graph._walk import _x", set()),
        ("class A:\n    _x: int\n    def f(self, other):\n        return other._x", set()),
        ("self._x = 1\nother._x", set()),
        ("x.__dict__", set()),
    ],
)
def test_private_names_are_found(source: str, names: set[str]) -> None:
    assert private_names(source) == names


@pytest.mark.parametrize("path", SOURCES)
def test_each_module_reads_the_private_names_of_torch_that_are_listed(path: str) -> None:
    found = private_names(SOURCES[path].read_text(encoding="utf-8")) - NOT_OF_TORCH

    assert found == READ.get(path, set())


def test_the_documentation_names_all_of_them() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    text = re.sub(r"`[\w/{},]+\.py`", "", page)  # without the modules
    documented = set(re.findall(r"(?<!\w)_[A-Za-z]\w*", text))
    read = set().union(*READ.values())

    assert [name for name in sorted(read) if name not in text] == []
    assert documented - read == set()
