"""A session whose weights do not change computes nothing twice, and draws the same pictures at the same stated cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.backbones.answers import Kept
from core.config import compose, resolve
from core.data.requests import Requests
from core.metrics import fid
from core.metrics.measure import Judges, Reference
from core.run import Run
from core.sampler import Sampler, Setting
from experiments.session import Session, load_run

REQUESTS = Requests(("red apple", "red apple", "a boat", "a dog"))
STEPS = (1, 2, 4)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("unchanged")
    paths = [f"execution.runs_dir={folder}/runs", f"execution.cache_dir={folder}/cache"]
    run = Run.create(resolve(compose("flash/tiny", [*paths, "data.path=random:x", "eval.batch_size=2"])))
    return load_run(run.path, images=0)[0]


def draw(session: Session, *weights: str, guidance: float = 1.0) -> dict[tuple[str, int], tuple[np.ndarray, dict]]:
    found = {}
    for name in weights:
        for steps in STEPS:
            pictures = session.sample(REQUESTS, Setting(name, Sampler("lcm", steps, guidance)))
            found[name, steps] = pictures.images, (pictures.cost.images, dict(pictures.cost.evaluations))
    return found


@pytest.fixture
def calls(session: Session, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the network is called, and how many texts are encoded."""
    count = {"network": 0, "texts": 0}
    network, encode = session.backbone.network, session.backbone.encode_text

    def counted_network(role, x_t, t, cond):  # noqa: ANN001, ANN202
        count["network"] += 1
        return network(role, x_t, t, cond)

    def counted_texts(prompts):  # noqa: ANN001, ANN202
        count["texts"] += len(prompts)
        return encode(prompts)

    monkeypatch.setattr(session.backbone, "network", counted_network)
    monkeypatch.setattr(session.backbone, "encode_text", counted_texts)
    return count


def test_the_first_call_is_made_once_for_all_numbers_of_steps(session: Session, calls: dict[str, int]) -> None:
    apart = draw(session, "student")
    assert calls == {"network": 2 * (1 + 2 + 4), "texts": 3 * 3}  # two batches of two; the first has one text
    with session.unchanged():
        together = draw(session, "student")
    assert calls == {"network": 14 + 2 * (1 + 1 + 3), "texts": 9 + 3}
    for key, (images, cost) in apart.items():
        np.testing.assert_array_equal(images, together[key][0])
        assert cost == together[key][1], key
    assert apart["student", 4][1] == (4, {"student": 16})


def test_another_network_guidance_or_place_is_another_question(session: Session, calls: dict[str, int]) -> None:
    with session.unchanged():
        one = session.sample(REQUESTS, Setting("student", Sampler("lcm", 1)))
        other = session.sample(REQUESTS, Setting("student", Sampler("lcm", 1)), first=10)
        guided = session.sample(REQUESTS, Setting("student", Sampler("lcm", 1, 3.0)))
        session.sample(REQUESTS, Setting("student", Sampler("lcm", 1)), seed=1)
    assert calls["network"] == 4 * 2
    assert (one.images != other.images).any() and guided.cost.nfe == 2
    assert session.backbone.answers is None, "weights may change again"


def test_there_is_room_for_so_many_bytes() -> None:
    kept: Kept[np.ndarray] = Kept(lambda found: [found], budget=100)
    first, second = np.zeros(10), np.ones(10)
    assert kept.get("a", lambda: first) is first and kept.get("a", lambda: second) is first
    assert kept.get("b", lambda: first) is first and kept.get("b", lambda: second) is second, "160 bytes are too many"


def test_real_features_are_read_once_and_compared_with_themselves_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Judge:
        name, hash, resize = "judge", "h", "none"

        def outputs(self, images: np.ndarray, requests: Requests) -> np.ndarray:
            return images.reshape(len(images), -1)[:, :5].astype(np.float32)

    rng = np.random.default_rng(0)
    real = list(rng.integers(0, 255, (12, 4, 4, 3), dtype=np.uint8))
    judges = Judges({"judge": Judge}, tmp_path)
    found = [judges.reference_features("judge", Reference("r", 12, lambda: real)) for _ in range(2)]
    assert found[0] is found[1] and not found[0].flags.writeable
    generated = rng.standard_normal((6, 5)).astype(np.float32)
    sums: list[tuple[int, int]] = []
    whole = fid._kernel_sum
    monkeypatch.setattr(fid, "_kernel_sum", lambda x, y, b: sums.append((len(x), len(y))) or whole(x, y, b))
    values = {fid.kernel_distance(generated, found[0]) for _ in range(3)}
    assert sums.count((12, 12)) == 1 and sums.count((6, 6)) == 3
    assert values == {fid.kernel_distance(generated, found[0].copy())}
