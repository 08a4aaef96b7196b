"""A round's target on the exact denoiser, in float64: it is where the teacher's steps lead, and chains lose nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from core.backbones.base import STUDENT, TEACHER, Cond
from core.backbones.gaussian import GaussianBackbone
from core.config import UserError
from core.data.batches import Batch
from core.diffusion.process import KINDS, FlowProcess, Process, VPProcess
from core.diffusion.solvers import ddim_step, few_step_sample, solve
from core.losses.distill import mse
from core.losses.weighting import WEIGHTINGS
from core.methods.clock import Clock
from core.methods.progressive import Progressive
from core.methods.progressive_config import ProgressiveConfig
from core.methods.regression import Problem
from tests.oracle.test_gaussian import SHAPE, VP, mixture

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {
    "vp": VP, "vp-zero-snr": VPProcess.from_config({**SD, "rescale_betas_zero_snr": True}),
    "flow": FlowProcess(), "flow-shifted": FlowProcess(3.0),
}  # fmt: skip
BATCH = 6


class Exact(GaussianBackbone):
    """The oracle, whose teacher is the exact student of an earlier round where there is one."""

    def __init__(self, process: Process, prediction: str, before: Progressive | None = None) -> None:
        super().__init__(mixture(3), process, prediction, SHAPE)
        self.before = before

    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if role == STUDENT or self.before is None:
            return super().network(role, x_t, t, cond)
        grid = list(self.before.timesteps)
        index = np.array([grid.index(time) for time in t.tolist()])
        batch = Batch(np.arange(len(x_t)), x_t, cond, self.encode_text([""]))
        x0 = self.before.target(Problem(batch, x_t, t, self.before.teacher_w(batch), index))
        return self.process.convert(x0, x_t, t, "x0", self.prediction)


def a_round(backbone: GaussianBackbone, teacher_steps: int, student_steps: int, **settings: object) -> Progressive:
    config = ProgressiveConfig(teacher_steps=teacher_steps, student_steps=student_steps, **settings)
    config.validate()
    return Progressive(config, backbone, seed=0)


def a_batch(backbone: GaussianBackbone, size: int = BATCH) -> Batch:
    x0 = torch.from_numpy(np.random.default_rng(1).standard_normal((size, *SHAPE)))
    cond = backbone.encode_text(["0", "1", "2", "0 1", "1 2", ""] * (size // 6))
    return Batch(np.arange(size), x0, cond, backbone.encode_text([""]))


def sound_pairs() -> list[tuple[str, str]]:
    """All processes and kinds of prediction, but for those that the method refuses."""
    blind = [(name, "eps") for name in ("vp-zero-snr", "flow", "flow-shifted")]
    return [pair for pair in itertools.product(PROCESSES, KINDS) if pair not in blind]


@pytest.mark.parametrize(("name", "prediction"), sound_pairs())
def test_a_rounds_target_leads_where_two_ddim_steps_of_the_teacher_do(name: str, prediction: str) -> None:
    """By one step of a student of any kind of prediction; the steps are written down with eps and sampling times."""
    process = PROCESSES[name]
    backbone = Exact(process, prediction)
    method = a_round(backbone, 8, 4, guidance_min=2.0, guidance_max=9.0)
    batch = a_batch(backbone, 12)
    rollout = method.rollout(batch, Clock(100, "images", 12))
    grid, fine = process.timesteps(4).tolist(), process.timesteps(8).tolist()
    w = torch.from_numpy(method.stream(STUDENT, "guidance").uniform(batch.positions, 2, 9)).float()
    index = [grid.index(t) for t in rollout.t.tolist()]
    assert {0, 3} <= set(index), "pure noise and the step to the data are among them"
    for row, step in enumerate(index):
        only = slice(row, row + 1)
        z, where = rollout.x_t[only], fine.index(grid[step])
        for k in (where, where + 1):
            z = _ddim(backbone, z, fine[k], fine[k + 1] if k < 7 else None, batch.cond[only], batch.null, w[row])
        t, target = rollout.t[only], rollout.target[only]
        raw = process.convert(target, rollout.x_t[only], t, "x0", prediction)
        x0 = process.convert(raw, rollout.x_t[only], t, prediction, "x0")
        s = torch.tensor([grid[step + 1]]) if step < 3 else None
        arrived = x0 if s is None else ddim_step(rollout.x_t[only], x0, t, s, process)
        torch.testing.assert_close(arrived, z, rtol=1e-6, atol=1e-6)
        assert arrived.dtype == torch.float64


def _ddim(
    backbone: GaussianBackbone, x: Tensor, t: float, s: float | None, cond: Cond, null: Cond, w: Tensor
) -> Tensor:
    """One step of the guided oracle from the time t to s, the data where s is None, by Song et al.'s Eq. 12."""
    alpha, sigma = _level(backbone.process, t)
    of_x0, of_null = (
        backbone.roles[TEACHER].denoise(x.flatten(1), alpha, sigma, part.tensors["components"]) for part in (cond, null)
    )
    x0 = (w.double() * of_x0 + (1 - w.double()) * of_null).view_as(x)
    if s is None:
        return x0
    eps = (x - alpha.view(1, 1, 1, 1) * x0) / sigma.view(1, 1, 1, 1)
    to_alpha, to_sigma = _level(backbone.process, s)
    return to_alpha.view(1, 1, 1, 1) * x0 + to_sigma.view(1, 1, 1, 1) * eps


def _level(process: Process, t: float) -> tuple[Tensor, Tensor]:
    alpha, sigma = process.alpha_sigma(torch.tensor([t]), torch.float64)
    return alpha.view(1, 1), sigma.view(1, 1)


@pytest.mark.parametrize("name", ["vp", "flow", "flow-shifted"])
@pytest.mark.parametrize("counts", [(32, 16, 8, 4, 2, 1), (24, 8, 4, 1)], ids=str)
def test_a_chain_of_exact_rounds_has_no_error(name: str, counts: tuple[int, ...]) -> None:
    """The last round's student goes in one step where the guided base goes in all of its own."""
    process = PROCESSES[name]
    backbone, method = Exact(process, "v"), None
    for number, (teacher_steps, student_steps) in enumerate(itertools.pairwise(counts)):
        teacher = "parent" if number else "base"
        backbone = Exact(process, "v", method)
        method = a_round(backbone, teacher_steps, student_steps, teacher=teacher, guidance_min=4.0, guidance_max=4.0)
    batch, last = a_batch(backbone), Exact(process, "v", method)
    noise = torch.from_numpy(np.random.default_rng(2).standard_normal((BATCH, *SHAPE)))

    def student(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return last.predict(TEACHER, x, t, batch.cond[rows])

    got = few_step_sample(student, [noise], process.timesteps(1), process, "ddim", consistency=False)
    base, start = Exact(process, "v"), np.zeros(BATCH, np.int64)

    def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return base.guided(TEACHER, x, t, batch.cond[rows], batch.null, 4.0)

    expected = solve(denoise, noise, start, process.timesteps(counts[0]), process, "ddim")[0]
    exact = 1e-9 if process is VP else 1e-6  # the solver's times of a flow are float32
    torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("name", ["vp-zero-snr", "flow"])
def test_a_prediction_that_is_blind_at_pure_noise_is_refused(name: str) -> None:
    """At alpha = 0 an eps says nothing of x0: no one-step target could be learnt there."""
    with pytest.raises(UserError, match=r"method\.prediction=eps .* allowed: x0, v, flow"):
        a_round(Exact(PROCESSES[name], "v"), 8, 4, prediction="eps")


@pytest.mark.parametrize("process", [VP, FlowProcess(3.0)], ids=["vp", "flow"])
def test_any_list_of_step_counts_makes_rounds(process: Process) -> None:
    """A round that does not halve takes two parts of each step, whose ends are those of the student's grid."""
    for teacher_steps, student_steps, parts in ((50, 25, 2), (25, 12, 2), (12, 8, 2), (8, 1, 8), (50, 8, 6)):
        method = a_round(Exact(process, "v"), teacher_steps, student_steps)
        assert method.config.parts == parts
        assert (method.teacher_timesteps[::parts] == process.timesteps(student_steps)).all()
        assert (np.diff(method.teacher_timesteps) < 0).all()


@pytest.mark.parametrize(("weighting", "kind"), [("constant", "x0"), ("snr", "eps"), ("v", "velocity")])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_each_weighting_is_the_error_of_a_kind_of_prediction(name: str, weighting: str, kind: str) -> None:
    process = PROCESSES[name]
    kind = {"vp": "v", "flow": "flow"}[name] if kind == "velocity" else kind
    backbone = Exact(process, "x0")
    method = a_round(backbone, 8, 4, weighting=weighting, guidance_max=9.0)
    rollout = method.rollout(a_batch(backbone), Clock(100, "images", BATCH))
    loss = method.losses(STUDENT, rollout, Clock(100, "images", BATCH))["distill"]
    ours, theirs = (process.convert(x0, rollout.x_t, rollout.t, "x0", kind)
                    for x0 in (rollout.samples, rollout.target))  # fmt: skip
    assert loss.item() == pytest.approx(mse(ours, theirs).mean().item(), rel=1e-5)


def test_the_truncated_weight_is_the_larger_of_two() -> None:
    alpha, sigma = VP.alpha_sigma(torch.tensor([10, 300, 990]))
    truncated = WEIGHTINGS["truncated_snr"](alpha, sigma)
    larger = torch.maximum(WEIGHTINGS["snr"](alpha, sigma), WEIGHTINGS["constant"](alpha, sigma))
    assert torch.equal(truncated, larger) and truncated[-1] == 1 < truncated[0]
