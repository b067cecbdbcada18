"""What MODULE:NAME and PATH.py:NAME name: a module of the current folder or the Python path, or a file, and something in it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .failures import Mistake, raised


def imported(source: str, name: str) -> Any:
    """The object. Raises `Mistake` for a module that is not there or cannot be imported, and for a name it has not."""
    found: Any = _file(source) if source.endswith(".py") else _module(source)
    reached = source
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Mistake(_not_there(found, reached, part)) from None
        reached = f"{reached}:{part}" if reached == source else f"{reached}.{part}"
    return found


def _not_there(found: Any, reached: str, part: str) -> str:
    """What is said where `found`, which was reached by that text, has no such attribute."""
    if isinstance(found, (Mapping, Sequence)):
        return (
            f"{reached} is a {type(found).__name__}, and a path goes through attributes; give its entry a name of its own in "
            "the module"
        )
    names = [n for n in dir(found) if not n.startswith("_")]
    close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
    return f"{reached} has no {part!r}; {f'did you mean {close[0]}?' if close else f'it has {_listed(names)}'}"


def _listed(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "no names"


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise _fallen(f"module {name!r}", error) from error
    except (Exception, SystemExit) as error:
        raise _fallen(f"module {name!r}", error) from error
    package, _, rest = missing.rpartition(".")
    if package in sys.modules and not hasattr(sys.modules[package], "__path__"):
        raise Mistake(f"{package!r} is a module and no package, so that there is no {name!r}; write {package}:NAME")
    stems = [p.stem for p in Path.cwd().glob("*.py")]
    close = difflib.get_close_matches(rest, stems, n=1, cutoff=0.7) if not package else []
    said = f"did you mean {close[0]}?" if close else f"a file is named by its path: {missing.replace('.', '/')}.py:NAME"
    raise Mistake(f"there is no module {name!r} in this folder or on the Python path; {said}")


def _fallen(what: str, error: BaseException) -> Mistake:
    """A module that raised while it was imported."""
    if isinstance(error, SystemExit):
        return Mistake(
            f"{what} ends Python when it is imported, by sys.exit; put what it does as a script under "
            'if __name__ == "__main__":'
        )
    return Mistake(f"{what} cannot be imported: {raised(error)}")


def _file(text: str) -> ModuleType:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise Mistake(f"there is no file {text!r} (current folder: {Path.cwd().name})")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    folder = str(path.parent)
    if folder not in sys.path:  # as for a script: what lies beside it can be imported
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _fallen(repr(text), error) from error
    return module
