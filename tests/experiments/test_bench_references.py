"""Reference steps: as many evaluations as the releases make, and the losses that ours has on the same draws."""

from pathlib import Path

import pytest
import torch

from core.backbones.base import Cond
from core.backbones.tiny import write_tiny_sd
from core.diffusion.solvers import solve
from core.methods.base import draw
from core.methods.matching import distribution_matching
from experiments.bench.references import flash
from experiments.bench.references.dmd2 import Dmd2Reference
from experiments.bench.references.fastgen import FastGenReference
from experiments.bench.references.flash import FlashReference
from experiments.bench.references.networks import Adapters, Examples, shared_by_batch
from experiments.bench.references.pipeline import PipelineReference
from tests import worlds

CPU, BATCH = torch.device("cpu"), 2
ADAPTERS = Adapters(4, worlds.TARGETS)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_tiny_sd(tmp_path / "tiny-unet"))


@pytest.fixture
def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, 4, 8, 8), (BATCH, 16, 16), (1, 16, 16))
    return Examples(*(torch.randn(shape, generator=generator) for shape in shapes))


def updates(optimizer: torch.optim.Optimizer) -> float:
    """How often an optimizer has stepped."""
    return next(iter(optimizer.state.values()))["step"].item()


@pytest.mark.parametrize("adapters", [ADAPTERS, None])
def test_flash_solves_and_judges_once_for_each_of_its_two_optimizers(
    source: str, examples: Examples, adapters: Adapters | None
) -> None:
    """Release: the model is called once for the student and once more for the discriminator."""
    reference = FlashReference(source, adapters, None, 8, CPU)
    before = [parameter.detach().clone() for parameter in reference.student.trained()]
    head = [parameter.detach().clone() for parameter in reference.critic.parameters()]
    reference.step(examples, start=3)
    assert dict(reference.evaluations) == {
        "student": 2 * BATCH * 2,  # its own pass and the fake score
        "teacher": 2 * BATCH * (2 * (8 - 3) + 2),  # guidance is two passes: of the solver, and of the real score
        "teacher_features": 2 * BATCH * 2,  # fake and real
    }
    assert any(not torch.equal(a, b) for a, b in zip(before, reference.student.trained(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(head, reference.critic.parameters(), strict=True))


def test_flash_solves_the_teachers_ode_as_ours_does(
    source: str, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' solver from the middle of its grid, at one guidance."""
    monkeypatch.setattr(flash, "GUIDANCE", (4.0, 4.0))
    reference = FlashReference(source, None, None, 8, CPU)
    backbone = worlds.backbone(Path(source).parent)
    x_t, t = reference._noised(examples.latents, 3)
    assert t.tolist() == [backbone.process.timesteps(8)[3]] * BATCH
    cond, null = (Cond({"text": text}) for text in (examples.text, examples.null))

    def denoise(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return backbone.guided("teacher", x, t, cond[rows], null, 4.0)

    ours = solve(denoise, x_t, torch.full((BATCH,), 3), backbone.process.timesteps(8), backbone.process, "dpmpp_2m")[0]
    torch.testing.assert_close(reference._solution(x_t, 3, examples), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapters", [ADAPTERS, None])
def test_dmd2_makes_the_passes_of_its_release(source: str, examples: Examples, adapters: Adapters | None) -> None:
    """Five iterations: one update of the student, five of fake score and critic."""
    reference, stops = Dmd2Reference(source, adapters, CPU), [3, 0, 1, 2, 1]
    for number, stop in enumerate(stops):
        reference.iteration(number, examples, stop)
    assert dict(reference.evaluations) == {
        "student": BATCH * (sum(stops) + 5),
        "teacher": BATCH * 2,
        "fake_score": BATCH * (1 + 5),
        "fake_score_features": BATCH * (1 + 5 * 2),
    }
    optimizers = (reference.student_optimizer, reference.guidance_optimizer)
    assert [updates(optimizer) for optimizer in optimizers] == [1, 5]


def test_fastgen_updates_the_student_or_its_critics(source: str, examples: Examples) -> None:
    """Six iterations: one update of the student, five of fake score and critic, which read ten half passes."""
    reference = FastGenReference(source, ADAPTERS, CPU)
    for number in range(6):
        reference.iteration(number, examples)
    assert dict(reference.evaluations) == {
        "student": BATCH * 6,
        "teacher": BATCH * 2,
        "fake_score": BATCH * 6,
        "teacher_features": BATCH * 2 * 5,
    }
    optimizers = (reference.student_optimizer, *reference.critic_optimizers)
    assert [updates(optimizer) for optimizer in optimizers] == [1, 5, 5]


def test_dmd2_has_our_losses_on_our_draws(tmp_path: Path) -> None:
    """Matching and denoising of the same sample at the same times and noises."""
    trained = worlds.trainer(tmp_path, ["method.gan=off"], sharing="full", experiment="dmd2/tiny")
    method, backbone = trained.method, trained.method.backbone
    worlds.move_apart(backbone)
    reference = Dmd2Reference(backbone.source, None, CPU)
    reference.fake_score.unet.load_state_dict(backbone.roles._copies["fake_score"].state_dict())
    batch = trained.data.batch(trained.clock.positions())
    given = Examples(batch.x0, batch.cond.tensors["text"], batch.null.tensors["text"])
    x0, shape = batch.x0, batch.x0.shape[1:]

    def draws(player: str, purpose: str, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        time, noise = (f"{purpose}timestep", f"{purpose}noise")
        t = backbone.process.timestep(draw(method.stream(player, time).uniform(batch.positions, low, high), x0))
        return draw(method.stream(player, noise).normal(batch.positions, shape), x0), t

    ours = 0.5 * distribution_matching(method, x0, batch, 8.0, "fake_score", 0.02, 0.98)
    theirs = reference.matching_loss(x0, *draws("student", "dmd_", 0.02, 0.98), given)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=0)
    rollout = method.rollout(batch, trained.clock)
    rollout.samples = x0
    denoise = method.losses("fake_score", rollout, trained.clock)["denoise"]
    theirs = reference.denoising_loss(x0, *draws("fake_score", "", 0, 1), given)
    torch.testing.assert_close(theirs, denoise, rtol=1e-4, atol=0)


@pytest.mark.parametrize("adapters", [ADAPTERS, None])
def test_a_plain_pipeline_takes_four_passes_at_the_students_times(source: str, adapters: Adapters | None) -> None:
    reference = PipelineReference(source, adapters, CPU)
    images = reference.sample(["red apple", "a boat", "a dog"], 4)
    assert images.shape == (3, 64, 64, 3) and dict(reference.evaluations) == {"student": 3 * 4}
    assert reference.pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_one_number_for_a_batch_keeps_the_sum() -> None:
    assert shared_by_batch([[0, 3], [1, 2], [2, 2], [0, 1]]) == [2, 1, 2, 1]  # 1.5, 3, 5, 5.5
    assert shared_by_batch([[5, 5, 6]]) == [5]


def test_a_bottleneck_stops_there(source: str, examples: Examples) -> None:
    """A half pass equals the middle block of a whole one, and leaves the network as it was."""
    counted = Dmd2Reference(source, None, CPU).teacher
    t = torch.tensor([10, 700])
    half = counted.bottleneck(examples.latents, t, examples.text)
    whole, middle = counted.with_bottleneck(examples.latents, t, examples.text)
    assert torch.equal(half, middle) and torch.equal(whole, counted(examples.latents, t, examples.text))
    assert half.shape == (BATCH, 16, 4, 4)
