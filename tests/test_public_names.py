"""Everything that a module exports is documented with its shapes, tested, and named on a page of the book."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import dlgm_tutorial

ROOT = Path(__file__).parents[1]
EVERYWHERE = ("args", "kwargs", "generator", "dtype", "device")  # they mean the same in the whole package


def public():
    """(module name, name, object) of everything that a module of the package exports by `__all__`."""
    for info in pkgutil.iter_modules(dlgm_tutorial.__path__):
        if not info.ispkg and not info.name.startswith("_"):
            module = importlib.import_module(f"dlgm_tutorial.{info.name}")
            assert hasattr(module, "__all__"), f"{info.name} has no __all__"
            for name in module.__all__:
                yield info.name, name, getattr(module, name)


def test_every_public_function_is_documented_with_its_shapes():
    faults = []
    for module, name, thing in public():
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        doc = inspect.getdoc(thing) or ""
        module_of = inspect.getmodule(thing)
        shared = inspect.getdoc(module_of) or ""  # arguments that a whole module has in common
        for other in re.findall(r"as (?:in|of|for) `(\w+)`", doc):
            shared += inspect.getdoc(getattr(module_of, other, None)) or ""
        arguments = [a for a in inspect.signature(thing).parameters if a not in EVERYWHERE] if inspect.isfunction(thing) else []
        if not doc:
            faults.append(f"{module}.{name}: no docstring")
        faults += [f"{module}.{name}: the docstring does not name {a}" for a in arguments if not re.search(rf"\b{a}\b", doc + shared)]
        if inspect.isfunction(thing) and any(a in ("x", "z", "log_w", "loc", "noise", "weight") for a in arguments) and "[" not in doc + shared:
            faults.append(f"{module}.{name}: no shape in the docstring")
    assert not faults, "\n".join(faults)


def test_every_public_name_is_tested_and_named_in_the_book():
    pages = "\n".join(p.read_text() for p in ROOT.glob("book/**/*.md") if "_generated" not in p.parts)
    tests = "\n".join(p.read_text() for p in ROOT.glob("tests/*.py"))
    faults = []
    for module, name, thing in public():
        if not callable(thing) or inspect.isclass(thing) and (issubclass(thing, tuple) or dataclasses.is_dataclass(thing)):
            continue  # a constant, or the plain container of a function's results
        word = re.compile(rf"\b{name}\b")
        faults += [f"{module}.{name}: in no test"] * (not word.search(tests))
        faults += [f"{module}.{name}: on no page"] * (not word.search(pages))
    assert not faults, "\n".join(faults)
