"""``jdcore new NAME``: write a distribution of one's own, ready to install and test."""

from __future__ import annotations

import argparse
import re
import sys
from importlib.resources import files
from keyword import iskeyword
from pathlib import Path
from string import Template
from typing import Any

from jdcore._discovery import installed_version, normalize_distribution
from jdcore.errors import ParameterError
from jdcore.spec import normalize_name

_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "init.py": "src/$package/__init__.py",
    "init.pyi": "src/$package/__init__.pyi",
    "plugin.py": "src/$package/plugin.py",
    "method.py": "src/$package/$method.py",
    "py.typed": "src/$package/py.typed",
    "test_conformance.py": "tests/test_conformance.py",
    "test_method.py": "tests/test_$method.py",
    "test_types.py": "tests/test_types.py",
}
"""Files of the template, and where they go."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_METHOD = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Packages that one of the same name would hide, from what it has to import as well.
_TAKEN = {"jdcore", "jdplugins", "tests", "attr", "attrs", "numpy", "pytest", "torch"}
_TAKEN |= sys.stdlib_module_names
# With the tests and the module of the method, two files would have one name.
_TAKEN_METHODS = {"conformance", "plugin", "types"}


def add_parser(commands: Any) -> None:
    """Add ``new`` to the commands of the program."""
    parser = commands.add_parser(
        "new",
        help="write a distribution with a method of your own",
        description="Write a folder with a distribution that provides one method, with tests.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the distribution, e.g. my-methods")
    parser.add_argument(
        "--method", metavar="NAME", default="norm_mean", help="name of its first method"
    )
    parser.add_argument(
        "--class-name",
        metavar="NAME",
        help="name of its class, e.g. NormMean; made of the method's",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="where the folder goes"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """
    Write the folder and say what to do next.

    :raises ParameterError: If a name is not usable, or the folder exists. Nothing is written then.
    """
    names = _names(arguments.name, arguments.method, arguments.class_name)
    folder: Path = arguments.out / names["distribution"]
    try:
        # It fails where the folder exists, so that no file that exists is replaced.
        folder.mkdir(parents=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ParameterError(
            "--out", "a folder to write to", f"{str(folder)!r} ({reason})"
        ) from error
    for source, target in _FILES.items():
        path = folder / Template(target).substitute(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(_read(source)).substitute(names), encoding="utf-8")
    print(
        f"Wrote {folder}. Next:\n"
        f"  cd {folder}\n"
        "  pip install -e '.[test]'\n"
        "  pytest\n"
        f"  jdcore info {names['method']}"
    )


def _read(source: str) -> str:
    return (files("jdcore") / "_template" / f"{source}.txt").read_text(encoding="utf-8")


def _names(name: str, method: str, class_name: str | None) -> dict[str, str]:
    distribution = normalize_distribution(name)
    package = distribution.replace("-", "_")
    if not _NAME.fullmatch(distribution) or package in _TAKEN or iskeyword(package):
        raise ParameterError(
            "NAME",
            "letters, digits and dashes, and no package of jdcore, Python or what they need",
            repr(name),
        )
    if not _METHOD.fullmatch(method) or iskeyword(method) or method in _TAKEN_METHODS:
        taken = ", ".join(sorted(_TAKEN_METHODS))
        expected = f"a lower snake case name such as 'norm_mean', and none of {taken}"
        raise ParameterError("--method", expected, repr(method))
    if class_name is None:
        class_name = "".join(word.capitalize() for word in method.split("_"))
    # Both names find the method: one in the registry, the other in an import.
    if normalize_name(class_name) != normalize_name(method) or not class_name.isidentifier():
        expected = f"{method!r} without underscores, capitals where you like"
        raise ParameterError("--class-name", expected, repr(class_name))
    version = installed_version("jdcore") or "0"
    # With a minor version, the core may change what plugins build on.
    major, minor = [*version.split("."), "0"][:2]
    return {
        "distribution": distribution,
        "package": package,
        "method": method,
        "Method": class_name,
        "version": f"{major}.{minor}",
        "next_version": f"{major}.{int(minor) + 1}",
    }
