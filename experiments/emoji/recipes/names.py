"""Unicode CLDR short names of emoji: parsing, captions, and their attributes (skin tone, hair, gender)."""

import re
from dataclasses import dataclass
from pathlib import Path

TONES = ("medium-light skin tone", "medium-dark skin tone", "light skin tone", "medium skin tone", "dark skin tone")
HAIR = ("red hair", "curly hair", "white hair", "bald", "beard", "blond hair")
GENDERS = ("man", "woman", "men", "women", "person", "people", "boy", "girl")
_LINE = re.compile(r"^(?P<code>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (?P<name>.+)$")


@dataclass(frozen=True)
class EmojiName:
    """One fully-qualified emoji of emoji-test.txt."""

    text: str
    name: str
    group: str
    subgroup: str

    @property
    def key(self) -> str:
        return "-".join(f"{ord(c):x}" for c in self.text)


def parse_emoji_test(path: Path) -> list[EmojiName]:
    """All fully-qualified emoji in the order of ``emoji-test.txt`` (Unicode UTS #51)."""
    group = subgroup = ""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := _LINE.match(line):
            text = "".join(chr(int(code, 16)) for code in match["code"].split())
            found.append(EmojiName(text, match["name"], group, subgroup))
    return found


def caption(name: str) -> str:
    """The name in lower case without punctuation: ``flag: Japan`` gives ``flag japan``."""
    plain = name.lower().replace("’", "").replace("keycap: *", "keycap asterisk").replace("keycap: #", "keycap hash")
    return " ".join(re.sub(r"[:,“”\".!&()]", " ", plain).split())


def attributes(name: str) -> dict[str, list[str]]:
    """Skin tones, hair and gender words named after the colon or leading the name, in reading order."""
    head, _, tail = name.partition(": ")
    parts = [part.strip() for part in tail.split(",")]
    words = head.split()
    found: dict[str, list[str]] = {"tones": [], "hair": [], "genders": []}
    if words[0] in GENDERS and len(words) > 1:
        found["genders"].append(words[0])
    for field, known in (("tones", TONES), ("hair", HAIR), ("genders", GENDERS)):
        found[field] += [part for part in parts if part in known]
    return found


def kind(name: str) -> str:
    """The name without skin tone, hair and gender: what balanced sampling treats as one thing.

    ``woman pilot: dark skin tone`` and ``pilot`` are one kind; so are all families and all kisses. A plain
    ``woman: red hair`` stays ``woman``; flags and keycaps are kinds of their own.
    """
    head, _, tail = name.partition(": ")
    parts = [p.strip() for p in tail.split(",") if p]
    kept = [p for p in parts if p not in TONES + HAIR + GENDERS]
    words = head.split()
    if words[0] in GENDERS and len(words) > 1:
        words = words[1:]
    return " ".join([*words, *kept])
