"""``jdcore info NAME``: all about one method or scalarizer."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from typing import Any

from jdcore._commands._output import plugins_on_stderr, print_json
from jdcore._commands._records import discover, record_of, solver_records
from jdcore._commands.listing import inputs, scalarizer_kinds
from jdcore._discovery import AGGREGATOR, SCALARIZER, Kind
from jdcore._registry import registry, signature_of

_PARAMETER = re.compile(r"^:param (\w+): (.*?)(?=^:|\Z)", re.DOTALL | re.MULTILINE)


def add_parser(commands: Any) -> None:
    """Add ``info`` to the commands of the program."""
    parser = commands.add_parser("info", help="show one method: parameters, paper, solvers")
    parser.add_argument(
        "--scalarizer", action="store_true", help="the scalarizer of this name, not the aggregator"
    )
    parser.add_argument("name", metavar="NAME", help="name of the method, in any spelling")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Print what is known of a method.

    :raises JDCoreError: If there is no such method, or it cannot be imported.
    """
    with plugins_on_stderr():
        discover()
        record = described(SCALARIZER if arguments.scalarizer else AGGREGATOR, arguments.name)
    if arguments.json:
        print_json(record)
    else:
        _print(record)
    return 0


def described(kind: Kind, name: str) -> dict[str, Any]:
    """The record of a method or scalarizer, with parameters and solvers. Imports it."""
    from jdcore import _methods  # imports torch, which other commands do without

    find = _methods.aggregator_class if kind is AGGREGATOR else _methods.scalarizer_class
    cls = find(name)
    entry = registry.entry(kind, name)
    # Under its plain name, however it was asked for, unless several distributions claim that.
    plain = entry.spec.name in registry.names(kind)
    record = record_of(kind, entry.spec.name if plain else entry.qualified_name)
    record["parameters"] = _parameters(cls)
    problem = None
    if kind is AGGREGATOR:
        record["problem"] = problem = solver_problem(cls)
    record["solvers"] = [] if problem is None else solver_records(problem)
    # Not inspect.getdoc(), which falls back on the docstring of a base class.
    record["doc"] = inspect.cleandoc(cls.__doc__ or "")
    return record


def solver_problem(cls: Any) -> str | None:
    """The problem whose solvers the argument ``solver`` of a method selects, if it has one."""
    # A composed aggregator takes the arguments of its weighting.
    fields = getattr(getattr(cls, "weighting_class", cls), "__attrs_attrs__", ())
    problems = (field.metadata.get("jdcore.problem") for field in fields)
    return next(filter(None, problems), None)


def _parameters(cls: Any) -> list[dict[str, Any]]:
    descriptions = _parameter_descriptions(cls)
    return [
        {
            "name": parameter.name,
            "type": _annotation(parameter.annotation),
            "required": parameter.default is parameter.empty,
            "default": None if parameter.default is parameter.empty else repr(parameter.default),
            "description": descriptions.get(parameter.name, ""),
        }
        for parameter in signature_of(cls).parameters.values()
    ]


def _parameter_descriptions(cls: Any) -> dict[str, str]:
    """The ``:param x:`` fields of a class and its bases, each on one line."""
    found = {}
    # Arguments that a base class has are described there; a class may say more of its own.
    for base in reversed(getattr(cls, "weighting_class", cls).__mro__):
        doc = inspect.cleandoc(base.__doc__ or "").partition("\n>>>")[0]
        for name, text in _PARAMETER.findall(doc):
            found[name] = _plain(" ".join(text.split()))
    return found


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return "" if annotation is inspect.Parameter.empty else text


def _print(record: dict[str, Any]) -> None:
    print(f"{record['name']} ({record['class_name']}): {record['summary']}\n")
    for label, text in _facts(record):
        print(f"{label + ':':13}{text}")
    for parameter in record["parameters"]:
        _print_parameter(parameter)
    for solver in record["solvers"]:
        _print_entry(f"solver {solver['name']!r} ({solver['distribution']})", _summary(solver))
    if record["doc"]:
        print(f"\n{_description(record['doc'])}")


def _print_parameter(parameter: dict[str, Any]) -> None:
    default = "" if parameter["required"] else f" = {parameter['default']}"
    kind = f": {parameter['type']}" if parameter["type"] else ""
    _print_entry(f"{parameter['name']}{kind}{default}", parameter["description"])


def _print_entry(head: str, text: str) -> None:
    print(f"\n{head}")
    if text:
        print(textwrap.fill(text, 88, initial_indent="    ", subsequent_indent="    "))


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    reference = record["reference"]
    paper = reference and f"{reference['title']} ({reference['year']}), {reference['url']}"
    if "trainable" in record:
        advanced_by = record["advanced_by"]
        own = [("kind", scalarizer_kinds(record)), ("call too", advanced_by and f"{advanced_by}()")]
    else:
        own = _facts_of_method(record)
    facts = [
        ("paper", paper),
        *own,
        ("aliases", ", ".join(record["aliases"])),
        ("provided by", f"{record['distribution']} {record['version'] or ''}".rstrip()),
        ("needs", record["install"]),
    ]
    return [(label, text) for label, text in facts if text]


def _facts_of_method(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("input", inputs(record)),
        ("wraps", "another method" if record["wrapper"] else ""),
        ("properties", ", ".join(record["properties"])),
        ("stateful", "yes" if record["stateful"] else ""),
        ("stochastic", "yes" if record["stochastic"] else ""),
        ("rows", f"at least {record['min_rows']}" if record["min_rows"] > 1 else ""),
    ]


def _summary(solver: dict[str, Any]) -> str:
    return solver["summary"] if solver["installed"] else f"not installed: {solver['install']}"


def _description(doc: str) -> str:
    """The prose of a docstring: neither parameters nor example."""
    prose = doc.partition("\n>>>")[0].partition("\n:param")[0]
    return "\n\n".join(
        textwrap.fill(_plain(p), 88, break_on_hyphens=False) for p in prose.strip().split("\n\n")
    )


def _plain(text: str) -> str:
    """Text without the markup that only a renderer understands."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?:\s+<[^`]*>)?`", r"\1", text)
    return re.sub(r"`([^`<]+?)\s+<([^`]+)>`_", r"\1 (\2)", text).replace("``", "")
