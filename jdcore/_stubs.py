"""
What editors and type checkers see of registered methods, written from the classes themselves.

Aggregators of weightings are composed when somebody asks for one, and packages hand out their
classes on demand: neither is visible in the sources. The stub of a package has one class for each,
a subclass of the real one, with the signature that its constructor has.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
from attrs import define, field

from jdcore._methods import aggregator_class, scalarizer_class, weighting_class
from jdcore._registry import registry
from jdcore.errors import ParameterError
from jdcore.spec import AggregatorSpec, ScalarizerSpec

_STATEFUL = (
    "def reset(self) -> None: ...",
    "def state_dict(self) -> dict[str, Any]: ...",
    "def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...",
)
_HEAD = "# Written by `jdcore stubs`; a test compares it with the classes. Not to be edited.\n"


def stubs_of(distribution: str) -> dict[Path, str]:
    """
    The stubs of a distribution: the text of each by its path.

    :param distribution: Name of an installed distribution, normalized.
    :raises ParameterError: If it provides neither aggregators nor scalarizers.
    """
    records = [r for r in registry.records() if r.distribution == distribution]
    aggregators = [spec for record in records for spec in record.aggregators]
    scalarizers = [spec for record in records for spec in record.scalarizers]
    if not aggregators and not scalarizers:
        raise ParameterError(
            "distribution", "one that is installed and provides methods", repr(distribution)
        )
    stubs: dict[Path, str] = {}
    if aggregators:
        factories = [spec.weighting or spec.aggregator or "" for spec in aggregators]
        stubs[_path(factories)] = _text(_classes(distribution, aggregators))
    if scalarizers:
        path = _path([spec.scalarizer for spec in scalarizers])
        stubs[path] = _text(
            (s.class_name, scalarizer_class(f"{distribution}:{s.name}"), None) for s in scalarizers
        )
    return stubs


def _classes(
    distribution: str, specs: Sequence[AggregatorSpec]
) -> Iterator[tuple[str, type, AggregatorSpec | None]]:
    """Name and class of all methods, and the spec of those that are composed of a weighting."""
    for spec in specs:
        name = f"{distribution}:{spec.name}"
        if spec.weighting is None:
            yield spec.class_name, aggregator_class(name), None
            continue
        yield f"{spec.class_name}Weighting", weighting_class(name), None
        yield spec.class_name, weighting_class(name), spec


def _path(factories: Iterable[str]) -> Path:
    # Beside the package as it is installed: a type checker looks nowhere else.
    return Path(str(import_module(_package(factories)).__file__)).with_name("__init__.pyi")


def _package(factories: Iterable[str]) -> str:
    """
    The package that the modules of all factories lie in.

    :raises ParameterError: If there is no such package.
    """
    packages = {factory.partition(":")[0].rpartition(".")[0] for factory in factories}
    # The shortest is the one that could hold all others.
    package = min(packages, key=len)
    if any(not f"{other}.".startswith(f"{package}.") for other in packages):
        raise ParameterError("distribution", "of one package", f"several: {sorted(packages)}")
    return package


def _text(classes: Iterable[tuple[str, type, AggregatorSpec | None]]) -> str:
    stub = _Stub()
    parts = [
        stub.subclass(name, cls) if spec is None else stub.composed(name, cls, spec)
        # In an order that no registration changes, so that a difference is a change.
        for name, cls, spec in sorted(classes, key=lambda entry: (entry[0].lower(), entry[0]))
    ]
    return "\n".join([_HEAD + stub.imports(), *parts])


def stubs_of_core(distributions: Sequence[str]) -> dict[Path, str]:
    """
    The stubs of the doors of the core: the packages that export methods, and the look-ups.

    :param distributions: Names of the distributions whose methods are seen there, all installed.
    """
    records = [r for r in registry.records() if r.distribution in distributions]
    methods = [(r.distribution, s) for r in records for s in r.aggregators]
    scalarizers = [(r.distribution, s) for r in records for s in r.scalarizers]
    classes = [
        (_package([s.weighting or s.aggregator or ""]), name)
        for _, s in methods
        for name in _class_names(s)
    ]
    others = [(_package([s.scalarizer]), s.class_name) for _, s in scalarizers]
    core = Path(__file__).parent
    return {
        core / "aggregation" / "__init__.pyi": _door("jdcore.aggregation", classes),
        core / "scalarization" / "__init__.pyi": _door("jdcore.scalarization", others),
        core / "_typed.pyi": _lookups(methods, scalarizers),
    }


def _class_names(spec: AggregatorSpec) -> list[str]:
    weighting = [f"{spec.class_name}Weighting"] if spec.weighting is not None else []
    return [spec.class_name, *weighting]


def _door(package: str, classes: Iterable[tuple[str, str]]) -> str:
    """What a package of the core exports, and the classes of registered methods."""
    import_module(package)
    # As its source says it: what a package has at run time tells nothing of where it came from.
    own = [
        f"from {node.module} import {alias.name} as {alias.name}"
        for node in _tree(package).body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if alias.asname is None  # what has another name here is for the package itself
    ]
    found = [f"from {module} import {name} as {name}" for module, name in sorted(classes)]
    why = "# Methods of other distributions are found at run time."
    rest = "def __getattr__(name: str) -> Any: ..."
    return "\n".join([_HEAD.rstrip(), *own, *found, "", why, rest, ""])


def _lookups(
    methods: Sequence[tuple[str, AggregatorSpec]], scalarizers: Sequence[tuple[str, ScalarizerSpec]]
) -> str:
    """The look-ups by name, one overload for each name that is known."""
    stub = _Stub()
    stub.names |= {name: ("typing", name) for name in ("Any", "Literal", "overload")}
    stub.names["Mapping"] = ("collections.abc", "Mapping")
    parts: list[str] = []

    def add(function: str, name: str, constructor: type, returned: str, package: str) -> None:
        stub.modules.add(package)
        # By name only, as look-ups take their arguments.
        signature = stub.signature(constructor, f'name: Literal["{name}"], /', keyword_only=True)
        parts.append(f"@overload\ndef {function}({signature}) -> {package}.{returned}: ...")

    for distribution, spec in methods:
        name = f"{distribution}:{spec.name}"
        package = _package([spec.weighting or spec.aggregator or ""])
        takes = aggregator_class(name) if spec.weighting is None else weighting_class(name)
        add("get_aggregator", spec.name, takes, spec.class_name, package)
        if spec.weighting is not None:
            add("get_weighting", spec.name, takes, f"{spec.class_name}Weighting", package)
    for distribution, other in scalarizers:
        cls = scalarizer_class(f"{distribution}:{other.name}")
        add("get_scalarizer", other.name, cls, other.class_name, _package([other.scalarizer]))
    # Any other name, any other spelling, and configurations.
    rest = "(name: str | Mapping[str, Any], /, **arguments: Any) -> Any: ..."
    functions = ("get_aggregator", "get_weighting", "get_scalarizer")
    parts = [part for f in functions for part in [*_of(f, parts), f"@overload\ndef {f}{rest}"]]
    return "\n".join([_HEAD + stub.imports(), *parts, ""])


def _of(function: str, parts: list[str]) -> list[str]:
    return [part for part in parts if part.startswith(f"@overload\ndef {function}(")]


@define(eq=False)
class _Stub:
    """One stub: what it imports is found as its classes are written."""

    modules: set[str] = field(factory=set)
    names: dict[str, tuple[str, str]] = field(factory=dict)

    def imports(self) -> str:
        plain = [f"import {module}" for module in sorted(self.modules)]
        by_module: dict[str, list[str]] = {}
        for name, (module, original) in sorted(self.names.items()):
            alias = original if name == original else f"{original} as {name}"
            by_module.setdefault(module, []).append(alias)
        found = [f"from {m} import {', '.join(names)}" for m, names in sorted(by_module.items())]
        return "\n".join([*plain, *found, ""])

    def subclass(self, name: str, cls: type) -> str:
        """A class as it is, with the exact signature of its constructor."""
        self.modules.add(cls.__module__)
        head = f"class {name}({cls.__module__}.{cls.__qualname__}):"
        lines = [head, *_summary(cls), f"    def __init__({self.signature(cls)}) -> None: ..."]
        return "\n".join([*lines, ""])

    def composed(self, name: str, weighting: type, spec: AggregatorSpec) -> str:
        """The aggregator of a weighting."""
        # Not the composed class, which exists at run time only.
        self.names["GramianAggregator"] = ("jdcore.aggregation", "GramianAggregator")
        lines = [f"class {name}(GramianAggregator):", *_summary(weighting)]
        lines.append(f"    weighting: {name}Weighting")
        lines.append(f"    def __init__({self.signature(weighting)}) -> None: ...")
        if spec.stateful:
            self.names["Any"] = ("typing", "Any")
            self.names["Mapping"] = ("collections.abc", "Mapping")
            lines += [f"    {method}" for method in _STATEFUL]
        return "\n".join([*lines, ""])

    def signature(self, cls: Any, first: str = "self", keyword_only: bool = False) -> str:
        """
        The parameters of a constructor.

        :param first: What comes before them.
        :param keyword_only: Whether all of them come by name.
        """
        parts = [first, "*"] if keyword_only else [first]
        parameters = inspect.signature(cls).parameters.values()
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                parts.append("*")
                keyword_only = True
            default = "" if parameter.default is parameter.empty else " = ..."
            parts.append(f"{parameter.name}: {self._annotation(cls, parameter.name)}{default}")
        return ", ".join(parts if parameters else parts[:1])

    def _annotation(self, cls: Any, parameter: str) -> str:
        owner, attribute = _owner(cls, parameter)
        # As text of the source: evaluated, names for type checkers only would be unknown.
        source = _annotations_of(owner).get(attribute)
        if source is None:
            self.names["Any"] = ("typing", "Any")
            return "Any"
        known = _imports_of(owner.__module__)
        for node in ast.walk(source):
            if isinstance(node, ast.Name) and node.id in known:
                self._need(node.id, known[node.id])
        return ast.unparse(source)

    def _need(self, name: str, origin: tuple[str, str]) -> None:
        if not origin[1]:
            self.modules.add(origin[0])
            return
        if self.names.setdefault(name, origin) != origin:
            raise ParameterError("name", f"one thing in all methods, {self.names[name]}", origin)


def _summary(cls: type) -> list[str]:
    """The first paragraph of a docstring, for editors, which look for it where the stub is."""
    paragraph = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
    return [f'    r"""{" ".join(paragraph.split())}"""'] if paragraph else []


def _owner(cls: Any, parameter: str) -> tuple[type, str]:
    """The class whose source has the annotation of a parameter, and what it is called there."""
    # attrs drops leading underscores from the names of arguments.
    attribute = parameter
    if attrs.has(cls):
        attribute = next(f.name for f in attrs.fields(cls) if f.alias == parameter)
    # A field that a subclass declares anew has the newer annotation.
    for base in cls.__mro__:
        if attribute in _annotations_of(base):
            return base, attribute
    return cls, attribute


@cache
def _annotations_of(cls: type) -> dict[str, ast.expr]:
    """Annotations in the body of a class, and those of its constructor."""
    found: dict[str, ast.expr] = {}
    module = _tree(cls.__module__)
    definitions = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    for node in (n for d in definitions if d.name == cls.__name__ for n in d.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node.annotation
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args, *node.args.kwonlyargs]
            found |= {a.arg: a.annotation for a in arguments if a.annotation is not None}
    return found


@cache
def _tree(module: str) -> ast.Module:
    file = getattr(sys.modules.get(module), "__file__", None)
    # Of notebooks and of compiled modules there is no source: all is Any there.
    if file is None or not file.endswith(".py"):
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(Path(file).read_text(encoding="utf-8"))


@cache
def _imports_of(module: str) -> dict[str, tuple[str, str]]:
    """Names that a module imports, or defines at its top, by where they come from."""
    found: dict[str, tuple[str, str]] = {}
    tree = _tree(module)
    for node in ast.walk(tree):
        # Also those under TYPE_CHECKING, wherever they stand.
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            found |= {a.asname or a.name: (str(node.module), a.name) for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0]: (a.name, "") for a in node.names if not a.asname}
    for definition in tree.body:
        if isinstance(definition, ast.ClassDef):
            found[definition.name] = (module, definition.name)
        if isinstance(definition, ast.Assign):
            targets = [t.id for t in definition.targets if isinstance(t, ast.Name)]
            found |= {name: (module, name) for name in targets}
    return found
