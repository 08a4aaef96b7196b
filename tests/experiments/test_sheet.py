"""Contact sheets show every image in its place."""

import numpy as np
import pytest

from experiments.sheet import LABEL_WIDTH, MARGIN, PAPER, contact_sheet

COLOURS = np.arange(1, 7, dtype=np.uint8).reshape(2, 3) * 40  # one grey per cell


def test_every_image_is_where_its_labels_say() -> None:
    images = np.broadcast_to(COLOURS[:, :, None, None, None], (2, 3, 64, 64, 3)).copy()
    sheet = np.asarray(contact_sheet(["red apple", "a very long prompt " * 5], ["a", "b", "c"], images))
    cell, top = 128, sheet.shape[0] - 2 * (128 + MARGIN)
    assert sheet.shape[1] == LABEL_WIDTH + MARGIN + 3 * (cell + MARGIN)
    for r in range(2):
        for c in range(3):
            y, x = top + r * (cell + MARGIN), LABEL_WIDTH + MARGIN + c * (cell + MARGIN)
            assert (sheet[y : y + cell, x : x + cell] == COLOURS[r, c]).all()
    labels = sheet[top : top + cell, :LABEL_WIDTH]
    assert (labels != PAPER).any(), "row labels are drawn"
    assert (sheet[:top, LABEL_WIDTH:] != PAPER).any(), "column labels are drawn"


def test_long_labels_stay_in_their_column() -> None:
    images = np.full((1, 1, 64, 64, 3), 255, dtype=np.uint8)
    sheet = np.asarray(contact_sheet(["word " * 20], ["x"], images))
    assert (sheet[:, LABEL_WIDTH : LABEL_WIDTH + MARGIN] == PAPER).all()


def test_labels_must_match_the_images() -> None:
    with pytest.raises(AssertionError):
        contact_sheet(["a"], ["b", "c"], np.zeros((1, 1, 8, 8, 3), dtype=np.uint8))
