"""The parser of the ``fewstep`` command: a mistake is a UserError of one line that names what was probably meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from core.schema import UserError, nearest


class Parser(argparse.ArgumentParser):
    """A parser that never prints its usage for a mistake; parsed arguments carry their subcommand's ``parser``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message, and say where the help is."""
        raise UserError(f"{message}; see: {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        what = "/".join(action.option_strings) or action.metavar or action.dest
        raise UserError(f"{self.prog}: unknown {what} '{value}'{nearest(str(value), known)}; all: {', '.join(known)}")

    def options(self) -> list[str]:
        """The options that the command takes."""
        return [option for action in self._actions for option in action.option_strings]


def add_command(subparsers: Any, name: str, summary: str) -> Parser:
    """A new subcommand; its help is ``summary`` in the list of all, and as a sentence in its own."""
    return subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """``parser`` and all its subcommands' parsers, each with the words that lead to it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, (*words, name))


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``argv``; ``key=value`` may also follow an option, which argparse alone does not allow."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all(map(_is_override, rest))):
        raise UserError(_unknown(arguments.parser, rest))
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _unknown(parser: Parser, words: Iterable[str]) -> str:
    """The line for words that the command does not take: about the first option among them, or all of them."""
    option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if option is None:
        return f"{parser.prog} takes no '{' '.join(words)}'; see: {parser.prog} --help"
    known = parser.options()
    return f"{parser.prog} has no option {option}{nearest(option, known)}; all: {', '.join(known)}"
