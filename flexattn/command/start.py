"""Reading the arguments before PyTorch is loaded, which takes seconds: help and mistakes answer at once.

`flexattn/__init__.py` asks `arguments_come_first`, and where they do it imports nothing. What is asked of it then, or
`load_package`, imports all of it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import Any

PACKAGE = "flexattn"
_loaded = False


def arguments_come_first() -> bool:
    """Whether this process is `flexattn ...` or `python -m flexattn ...`, and has not read its arguments yet."""
    if _loaded or not sys.argv:
        return False
    if sys.argv[0] == "-m":  # as long as Python looks for the module
        words = sys.orig_argv
        return "-m" in words and words[words.index("-m") + 1 :][:1] == [PACKAGE]
    return PurePath(sys.argv[0]).stem == PACKAGE


def load_package() -> None:
    """Import all of flexattn, unless that has been done."""
    global _loaded
    before, _loaded = _loaded, True
    package = sys.modules[PACKAGE]
    if not before and "flex_attention" not in vars(package):
        importlib.reload(package)


def attribute(name: str) -> Any:
    """`__getattr__` of a package that has imported nothing yet: imports all of it, for a public name."""
    package = sys.modules[PACKAGE]
    if _loaded or name not in vars(package).get("__all__", ()):
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
    load_package()
    return vars(package)[name]
