"""Views of an emoji: keyed draws of a caption level, a background, a scale, a shift and a mirror image.

With one caption per picture the conditional distribution is almost a point and few-step sampling is trivial.
Views make it rich: one prompt ("person role", "woman pilot", "red apple") has many right pictures. Everything
is a pure function of (example, variant, seed).
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from core.data.shards import Example
from core.randomness import Stream

SIZE = 64
METADATA = frozenset({"genders", "group", "hair", "kind", "mirror", "subgroup", "tones"})  # read by the views
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "gray": (158, 158, 158),
    "red": (226, 74, 74),
    "orange": (247, 150, 60),
    "yellow": (255, 224, 102),
    "green": (88, 178, 96),
    "blue": (74, 134, 232),
    "purple": (146, 104, 216),
    "pink": (255, 166, 206),
    "brown": (141, 100, 74),
}
WHITE_PROB = 0.4
NAMED_PROB = 0.4  # of the backgrounds are named in the caption
MIN_SCALE = 0.75
MAX_SHIFT = 4  # pixels
# name, name without some attributes, subgroup, group
LEVEL_PROBS = (0.62, 0.18, 0.12, 0.08)


def view(example: Example, variant: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """View number ``variant`` of an example of emoji-64-v1: uint8 (64, 64, 3) and its caption."""
    rng = Stream(seed, "data", f"view/{example.key}").generator(variant)
    words = _caption(example.meta, example.caption, rng)
    colour = _background(rng)
    named = rng.random() < NAMED_PROB
    scale = rng.uniform(MIN_SCALE, 1.0)
    shift = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
    mirrored = rng.random() < 0.5 and example.meta["mirror"]
    image = compose(example.image, colour, scale, (int(shift[0]), int(shift[1])), mirrored)
    return image, f"{words} on a {colour} background" if named else words


def centred(example: Example, variant: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """A ``view`` in which the picture always fills the canvas: uint8 (64, 64, 3) and its caption.

    A network that must also guess scale and shift from noise spends its few steps on them and blurs what is drawn.
    """
    rng = Stream(seed, "data", f"centred/{example.key}").generator(variant)
    words = _caption(example.meta, example.caption, rng)
    colour = _background(rng)
    named = rng.random() < NAMED_PROB
    mirrored = rng.random() < 0.5 and example.meta["mirror"]
    image = compose(example.image, colour, mirrored=mirrored)
    return image, f"{words} on a {colour} background" if named else words


def compose(
    rgba: np.ndarray, colour: str, scale: float = 1.0, shift: tuple[int, int] = (0, 0), mirrored: bool = False
) -> np.ndarray:
    """Put an RGBA picture (64, 64, 4) on a named background; the shift never moves it past the border."""
    picture = Image.fromarray(rgba[:, ::-1] if mirrored else rgba)
    side = round(SIZE * scale)
    if side != SIZE:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    margin = SIZE - side
    left, top = (min(max(margin // 2 + step, 0), margin) for step in shift)
    canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[colour], 255))
    canvas.alpha_composite(picture, (left, top))
    return np.asarray(canvas)[..., :3].copy()


def _background(rng: np.random.Generator) -> str:
    if rng.random() < WHITE_PROB:
        return "white"
    return str(rng.choice([name for name in BACKGROUNDS if name != "white"]))


def _caption(meta: dict, full: str, rng: np.random.Generator) -> str:
    level = rng.choice(len(LEVEL_PROBS), p=LEVEL_PROBS)
    if level == 1:
        return _without_some(meta, full, rng)
    if level == 2:
        return meta["subgroup"]
    return meta["group"] if level == 3 else full


def _without_some(meta: dict, full: str, rng: np.random.Generator) -> str:
    """Drop tones, hair or genders, each with probability 1/2 (at least one of those present)."""
    present = [field for field in ("tones", "hair", "genders") if meta[field]]
    if not present:
        return full
    left = full
    for field in _some(present, rng):
        left = _without(left, meta[field])
    return left or meta["kind"]


def _some(values: list[str], rng: np.random.Generator) -> list[str]:
    """Each of the values with probability 1/2, at least one of them."""
    chosen = [value for value in values if rng.random() < 0.5]
    return chosen or [str(rng.choice(values))]


def _without(text: str, phrases: Iterable[str]) -> str:
    words = f" {text} "
    for phrase in phrases:
        words = words.replace(f" {phrase} ", " ", 1)
    return " ".join(words.split())
