"""What the commands' parsers have in common: their help, their errors, and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from .failures import Mistake, Unavailable
from .notation import Notation, NotationError, parse
from .output import Output, width

DTYPES = ("float16", "bfloat16", "float32", "float64")
BACKENDS = ("auto", "triton", "tiled", "reference")
MASK_HELP = "a mask: causal_mask, 'sliding_window(64)', 'causal_mask & ~chunked(8)', my.masks:NAME, file.py:NAME"
MOD_HELP = "a score_mod or a mask: my.mods:NAME, file.py:NAME, 'my.mods:factory(30.0)', 'softcap(30)', or a mask"

_OPTION = re.compile(r"-(?!\d|\.\d)\S+")  # no negative number, nor a text with blanks; both may be values
_NO_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
_MEANT = {  # names that others use
    "half": "float16", "fp16": "float16", "f16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32",
    "f32": "float32", "double": "float64", "fp64": "float64", "f64": "float64", "gpu": "cuda",
}  # fmt: skip


class Command(NamedTuple):
    """A command.

    Attributes:
        name: the word.
        summary: a line of `flexattn --help`.
        description: the start of its own help.
        example: a line that shows it.
        add: adds its arguments to a parser.
        run: does it; the exit code.
    """

    name: str
    summary: str
    description: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Output], int]


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of its help as they are written, and raises `Mistake` instead of leaving.

    An option that it has not is refused before anything else, with the nearest that it has: argparse would take the value
    of a misspelt one for an argument, and complain about that.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=_formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise `Mistake`, with the usage unless the message is about one argument and says what to write there."""
        found = _NO_VALUE.match(message)
        if found:
            action = self._option_string_actions[found[1].split("/")[-1]]
            raise Mistake(f"argument {found[1]}: a value is missing; write {found[1]} {action.metavar}")
        raise Mistake(message if message.startswith("argument ") else f"{message}\n{self.format_usage().strip()}")

    # The stub has overloads for namespaces of the caller's own.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse; raises `Mistake` for options and arguments that there are not."""
        if self._subparsers is not None:
            own = itertools.takewhile(lambda w: w.startswith("-"), args)
            self._check_options(own, " before the command; those of a command come after its name")
            return super().parse_known_args(args, namespace)
        self._check_options(itertools.takewhile(lambda w: w != "--", args), "")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"{' '.join(rest)!r} is too much")
        return found, rest

    def _check_options(self, words: Iterable[str], where: str) -> None:
        for word in words:
            name = word.partition("=")[0]
            if _OPTION.fullmatch(word) and name not in self._option_string_actions:
                raise Mistake(f"there is no option {name}{where}; {_nearest(name, self._option_string_actions)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean --shape?", or which options there are."""
    word, names = name.strip("-").replace("_", "-").lower(), [k[2:] for k in known if k.startswith("--")]
    begun = [n for n in names if n.startswith(word)]
    close = begun if len(begun) == 1 else difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean --{close[0]}?" if close else f"there are {', '.join('--' + n for n in names)}"


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=width())


def notation(text: str) -> Notation:
    """The type of an argument that names a mask or a mod."""
    try:
        return parse(text)
    except NotationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of an argument that is one of a few words."""
    known = tuple(names)

    def word(text: str) -> str:
        if text not in known:
            close = (
                [_MEANT[text]] if _MEANT.get(text) in known else difflib.get_close_matches(text, known, n=1, cutoff=0.7)
            )
            said = f"; did you mean {close[0]}?" if close else "."
            raise argparse.ArgumentTypeError(f"{text!r} is unknown{said} Write one of {', '.join(known)}")
        return text

    return word


def add_dtype(parser: argparse.ArgumentParser, default: str = "float32") -> None:
    """Add --dtype; `default` says which one it is without."""
    parser.add_argument(
        "--dtype", type=one_of(DTYPES), metavar="DTYPE", help=f"of the query: {', '.join(DTYPES)} (default: {default})"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", type=one_of(("cpu", "cuda")), metavar="cpu|cuda", help="default: a GPU if there is one"
    )


def device(said: str | None) -> str:
    """What --device says, or the default. Raises `Unavailable` for a GPU that is not there."""
    import torch

    gpu = torch.cuda.is_available()
    if said == "cuda" and not gpu:
        raise Unavailable(
            "--device cuda: there is no GPU here, or this PyTorch was built without CUDA; see flexattn info"
        )
    return said or ("cuda" if gpu else "cpu")
