"""A row's label is written once, as text with TeX mathematics between dollar signs, and shown everywhere."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator

_SYMBOLS = {
    r"\pi": "π", r"\lambda": "λ", r"\omega": "ω", r"\times": "×", r"\sim": "∼", r"\mathcal": "", r"\mathrm": "",
    r"\text": "", r"\_": "_", "~": " ",
}  # fmt: skip
_TEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--",
    "‡": r"$\ddagger$", "†": r"$\dagger$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "³": "$^3$",
}  # fmt: skip
ONE_LINE = 12  # characters of a heading


def without_math(text: str) -> str:
    """``$L_{distil}$`` becomes ``L_distil``."""
    return re.sub(r"[${}]", "", _symbols(text))


def capitalized(words: str) -> str:
    """Words that begin a line: the first letter becomes a capital one, the others stay as they are."""
    return words[:1].upper() + words[1:]


def to_html(text: str) -> str:
    """``$L_{distil}$`` becomes an italic L with a subscript."""
    return "".join(_parts(text, prose=html.escape, mathematics=_math))


def to_tex(text: str) -> str:
    """Escape what TeX would read; in mathematics, words in subscripts and superscripts are set upright."""
    return "$".join(_parts(text, prose=_escaped, mathematics=_upright))


def stacked_tex(text: str) -> str:
    """A heading for LaTeX; one of more than a dozen characters stands on two lines of about equal length."""
    words = text.split(" ")
    if len(text) <= ONE_LINE or len(words) < 2:
        return to_tex(text)
    halves = [(" ".join(words[:cut]), " ".join(words[cut:])) for cut in range(1, len(words))]
    first, second = min(halves, key=lambda pair: max(map(len, pair)))
    return rf"\shortstack[r]{{{to_tex(first)}\\{to_tex(second)}}}"


def mathtext(text: str) -> str:
    """The label for matplotlib, which reads mathematics and leaves other text alone."""
    return "$".join(_parts(text, prose=str, mathematics=_upright))


def _parts(text: str, prose: Callable[[str], str], mathematics: Callable[[str], str]) -> Iterator[str]:
    """The parts of a label in order, each treated as prose or as what stands between dollar signs."""
    for index, part in enumerate(text.split("$")):
        treat = mathematics if index % 2 else prose
        yield treat(part)


def _escaped(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _upright(text: str) -> str:
    return re.sub(r"([_^])\{([A-Za-z]{2,}\.?)\}", r"\1{\\mathrm{\2}}", text)


def _math(text: str) -> str:
    text = html.escape(_symbols(text))
    text = re.sub(r"(?<![A-Za-z{])([A-Za-z])(?![A-Za-z])", r"<i>\1</i>", text)
    text = re.sub(r"_(?:\{([^}]*)\}|(\w))", lambda m: f"<sub>{m[1] or m[2]}</sub>", text)
    text = re.sub(r"\^(?:\{([^}]*)\}|(\w))", lambda m: f"<sup>{m[1] or m[2]}</sup>", text)
    return re.sub(r"[{}]", "", text)


def _symbols(text: str) -> str:
    for tex, symbol in _SYMBOLS.items():
        text = text.replace(tex, symbol)
    return text
