"""The undistilled teacher as a method without training, so that reference rows are ordinary runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.backbones.base import TEACHER, Backbone, Cond
from core.config import UserError
from core.data.batches import Batch
from core.diffusion.process import VPProcess
from core.diffusion.solvers import solve
from core.diffusion.unipc import unipc
from core.methods.base import Method, Player, Role, Rollout, Turn
from core.methods.clock import Clock
from core.sampler import Sampler


@torch.no_grad()
def teacher_sample(
    backbone: Backbone, x_t: Tensor, cond: Cond, null: Cond, sampler: Sampler, role: str = TEACHER
) -> Tensor:
    """Solve the ODE of the teacher (``role``) from pure noise ``x_t`` as ``sampler`` says; latents (B, C, H, W)."""

    def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return backbone.guided(role, x, t, cond[rows], null, sampler.guidance)

    if sampler.solver == "unipc":
        return unipc(denoise, x_t, sampler.steps, backbone.process)
    start = np.zeros(len(x_t), dtype=np.int64)
    return solve(denoise, x_t, start, backbone.process.timesteps(sampler.steps), backbone.process, sampler.solver)[0]


class Teacher(Method):
    """The teacher as it is; settings are ``TeacherConfig``: solver, steps, guidance."""

    def roles(self) -> list[Role]:
        """None: the teacher is the base."""
        return []

    def build(self) -> None:
        """The teacher needs no role of its own."""
        if self.config.solver == "unipc" and not isinstance(self.backbone.process, VPProcess):
            raise UserError("method.solver=unipc is for variance-preserving teachers; allowed here: dpmpp_2m, ddim")

    def players(self) -> list[Player]:
        return []

    def turns(self, clock: Clock) -> Sequence[Turn]:
        return ()

    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        return Rollout(batch)

    def losses(self, turn: str, rollout: Rollout, clock: Clock) -> dict[str, Tensor]:
        raise AssertionError("the teacher does not train")

    def weights(self, turn: str, clock: Clock) -> dict[str, float]:
        return {}
