"""Figures are drawn once from the same numbers, side by side, and every file equals that of a drawing anew."""

from pathlib import Path

import numpy as np
import pytest

from analysis import drawing
from analysis.artefacts import samples, timesteps
from analysis.drawing import KEPT, Drawing, draw_all
from analysis.looks import encode

TITLES = ["a", "b", "c", "d"]


def bars(last: float) -> Drawing:
    """The distributions of timesteps, of which the last one ends in ``last``."""
    masses = [np.array([0.5, 0.25, 0.25, last])] * 4
    return Drawing("bars", timesteps.draw, (masses, TITLES))


def anew(one: Drawing) -> tuple[bytes, ...]:
    """The files of a drawing, made without the code under test."""
    figure = one.draw(*one.arguments)
    return encode(figure, "png"), encode(figure, "pdf")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every further drawing an error."""

    def refuse(packed: bytes) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawing, "_draw", refuse)


@pytest.mark.parametrize("processors", [1, 2])
def test_files_are_those_of_a_drawing_anew(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(drawing, "_processors", lambda: processors)
    one, other = bars(0.0), bars(0.5)
    expected = [anew(one), anew(other), anew(one)]
    assert expected[0] != expected[1]
    assert list(draw_all([one, other, one])) == expected
    assert len(list(KEPT.iterdir())) == 4


def test_what_was_drawn_is_not_drawn_again(request: pytest.FixtureRequest) -> None:
    expected = list(draw_all([bars(0.0)]))
    request.getfixturevalue("no_drawing")
    assert list(draw_all([bars(0.0)])) == expected
    with pytest.raises(AssertionError, match="drawn again"):
        list(draw_all([bars(0.25)]))


@pytest.mark.parametrize("damage", ["torn", "edited", "gone"])
def test_what_is_damaged_is_drawn_again(damage: str) -> None:
    (expected,) = draw_all([bars(0.0)])
    file = next(KEPT.glob("*.pdf"))
    content = file.read_bytes()
    changed = {"torn": content[:-9], "edited": content.replace(b"PDF", b"XDF")}
    file.write_bytes(changed[damage]) if damage in changed else file.unlink()
    assert list(draw_all([bars(0.0)])) == [expected] and file.read_bytes() == content


def test_a_disk_that_refuses_costs_only_time() -> None:
    KEPT.parent.write_text("no folder")
    assert list(draw_all([bars(0.0)])) == [anew(bars(0.0))]


def test_a_file_that_is_read_and_the_code_belong_to_the_key(tmp_path: Path) -> None:
    def key() -> str:
        drawing._code_hash.cache_clear()
        return Drawing("sheet", samples.draw, (tmp_path, []), (picture,)).key

    picture = tmp_path / "0.png"
    keys = [key()]
    for content in (b"1", b"2"):
        picture.write_bytes(content)
        keys.append(key())
    assert key() == keys[-1] and len(set(keys)) == 3
    sources = drawing._sources(samples.__name__)
    assert {Path(samples.__file__), drawing.STYLE, Path(drawing.__file__)} <= set(sources)
    before = drawing._code_hash((picture,))
    drawing._code_hash.cache_clear()
    picture.write_bytes(b"3")
    assert drawing._code_hash((picture,)) != before
