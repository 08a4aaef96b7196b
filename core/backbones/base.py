"""The backbone contract: one conditional denoiser seen by every method, whatever the network predicts inside.

A method never converts predictions, never batches guidance itself and never asks which family it has.
Shapes: latents (B, C, H, W) float32, already scaled; ``t`` (B,) in the network's own units (VP: 0..999, flow: 0..1000).
Guidance, one convention everywhere: x_w = w x_cond + (1 - w) x_null, so w = 1 is no guidance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from core.backbones.answers import Answers
from core.backbones.precision import computing_in
from core.config import UserError
from core.diffusion.guidance import combine
from core.diffusion.process import Process

STUDENT, TEACHER, STUDENT_EMA, FAKE_SCORE = "student", "teacher", "student_ema", "fake_score"
PARENT = "parent"  # the student of the round before, where that is the teacher
REFERENCE = "reference"  # the student before RL
REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class Cond:
    """Conditioning of a batch: named tensors whose first dimension is the batch."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Cond:
        return Cond({name: value[rows] for name, value in self.tensors.items()})

    def expand(self, batch: int) -> Cond:
        """Repeat a batch of one (the null conditioning) without copying."""
        return Cond({name: value.expand(batch, *value.shape[1:]) for name, value in self.tensors.items()})

    def beside(self, cond: Cond) -> Cond:
        """The null conditioning for each row of ``cond``, which keeps what the null one lacks: an item's own inputs."""
        return Cond({**cond.tensors, **self.expand(len(cond)).tensors})

    def also(self, tensors: Mapping[str, Tensor]) -> Cond:
        """Add further tensors (B, ...) by name."""
        return Cond({**self.tensors, **tensors})

    def where(self, rows: Tensor, other: Cond) -> Cond:
        """The conditioning of ``other`` at ``rows``, bool (B,)."""
        tensors = {}
        for name, value in self.tensors.items():
            tensors[name] = torch.where(rows.view(-1, *[1] * (value.ndim - 1)), other.tensors[name], value)
        return Cond(tensors)

    def to(self, device: torch.device | str) -> Cond:
        """A copy on ``device``, made without waiting for it."""
        return Cond({name: value.to(device, non_blocking=True) for name, value in self.tensors.items()})

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        return Cond({name: torch.cat([cond.tensors[name] for cond in conds]) for name in conds[0].tensors})


class Backbone(ABC):
    """One or more roles (teacher, student, fake_score, ...) of one denoising network.

    ``evaluations`` counts network evaluations in samples, by role; guidance costs ``passes`` a sample. What a method
    gets is contiguous, however a network lays out its own: a sum's order must not depend on who computed the summands.
    """

    process: Process
    prediction: str  # what the network predicts: "eps", "v", "x0" or "flow"
    latent_shape: tuple[int, int, int]
    guidance_layers: ClassVar[tuple[str, ...]] = ()  # endings of the names of the layers of an added guidance input

    def __init__(self) -> None:
        self.evaluations: Counter[str] = Counter()
        self.compute_dtype: torch.dtype | None = None  # autocast dtype of every forward, rollouts included
        self.answers: Answers | None = None  # given while pictures are drawn again and again from the same noise
        self.read_as: Mapping[str, str] = {}  # by role, what its output is taken for where that is not ``prediction``
        self.has_guidance_layer = False  # added for students that take guidance as an input
        self.guidance_inputs: frozenset[str] = frozenset()  # the roles that take guidance as an input, in one pass
        # One adapter that holds those of earlier rounds, which are part of the base's weights; None: it is what it was
        self.merged_parent: Mapping[str, Tensor] | None = None

    # What a family implements.
    @abstractmethod
    def network(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The role's raw prediction, of kind ``self.prediction``; (B, C, H, W)."""

    @abstractmethod
    def network_features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The role's bottleneck (B, F, h, w), by an explicit half-forward (an early stop breaks sharding)."""

    @abstractmethod
    def add_role(
        self, role: str, like: str | None = None, *, trainable: bool, average: bool = False, seed: int = 0
    ) -> None:
        """Create a role: an adapter or a copy, initialised from ``like`` (or as the teacher).

        An ``average`` is kept in fp32: it moves by less than bf16 can tell.
        """

    @abstractmethod
    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters by stable name (adapters only, when the base is shared)."""

    @abstractmethod
    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, 3) -> latents (B, C, h, w), scaled to about unit variance."""

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1], with a graph."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """Prompts -> conditioning; the null conditioning is that of the empty prompt."""

    def release_text_encoders(self) -> None:  # noqa: B027  not every backbone has any
        """Free the memory of the text encoders until ``encode_text`` is called again."""

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """The denoising networks: one base with adapters, or a copy per role."""

    @abstractmethod
    def shard_units(self) -> list[nn.Module]:
        """The blocks of all networks: a sharded trainer gathers one at a time."""

    # Whether backward passes compute activations again, of whatever a method reads beside the networks, too
    checkpoints_activations: bool = False

    def enable_activation_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them; after the last ``add_role``."""
        raise UserError(f"execution.activation_checkpointing is not for {type(self).__name__}")

    def compile_blocks(self, backend: str | None) -> None:
        """Compile each block by torch.compile when it is next called; None: run plain from now on."""
        for unit in self.shard_units():
            compile_block(unit, backend)

    def lay_out_for_sampling(self) -> None:  # noqa: B027  most networks are as fast in any layout
        """No network of this backbone will train: have their weights lie in memory as forwards read them fastest."""

    def keep_adapters_apart(self) -> None:  # noqa: B027  not every backbone has adapters
        """Never compute with merged weights: where parameters lie in parts, or must not change their number."""

    def merge_again(self, role: str | None = None) -> None:  # noqa: B027
        """Parameters of ``role`` (None: of any) were written to, and torch may not have counted it.

        It counts what happens to a parameter under ``torch.no_grad()``, but neither steps of fused optimizers nor
        ``parameter.data += ...``.
        """

    @property
    def merged_bytes(self) -> int:
        """Memory that each role beside the teacher takes for merged weights, once it is called without gradients."""
        return 0

    def stepping(self, role: str | None) -> AbstractContextManager:
        """A context in which no other role's parameters get gradients (None: nobody's): theirs need no graph."""
        return nullcontext()

    @property
    @abstractmethod
    def feature_shape(self) -> tuple[int, int, int]:
        """Shape (F, h, w) of a sample's ``features``."""

    # What a method calls.
    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, h, w) -> uint8 (B, H, W, 3)."""
        pixels = ((self.pixels(latents) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def training_pixels(self, latents: Tensor) -> Tensor:
        """``pixels`` in the precision of training, returned as float32: for losses, never for measurements."""
        with self._autocast(latents):
            return self.pixels(latents).float()

    def predict(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, as_: str = "x0") -> Tensor:
        """The role's prediction converted once, at least in fp32, to ``as_``: "x0", "eps", "v" or "flow"."""
        if self.answers is None:
            return self._predicted(role, x_t, t, cond, as_)
        question = (role, as_, float(t[0]), len(t))
        call = partial(self._predicted, role, x_t, t, cond, as_)
        return self.answers.answer(x_t, question, self.evaluations, call)

    def _predicted(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, as_: str) -> Tensor:
        self.evaluations[role] += len(x_t)
        with self._autocast(x_t):
            raw = self.network(role, x_t, t, cond)
        return self.process.convert(raw.contiguous(), x_t, t, self.kind_of(role), as_)

    def kind_of(self, role: str) -> str:
        """The kind of prediction that the role's network gives."""
        return self.read_as.get(role, self.prediction)

    def guided(
        self, role: str, x_t: Tensor, t: Tensor, cond: Cond, null: Cond, w: Tensor | float, as_: str = "x0"
    ) -> Tensor:
        """Classifier-free guidance as **one** batch of 2B; w is a number or one value per sample.

        The number 1 (no guidance) asks for the conditional pass alone, and a role that takes guidance as an input for
        one pass at any w.
        """
        if self.takes_guidance(role):
            scale = torch.as_tensor(w, dtype=torch.float32, device=x_t.device).expand(len(x_t))
            return self.predict(role, x_t, t, cond.also({"guidance": scale}), as_)
        if self.passes(w, role) == 1:
            return self.predict(role, x_t, t, cond, as_)
        both = self.predict(role, torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([cond, null.beside(cond)]), as_)
        return combine(*both.chunk(2), w)

    def takes_guidance(self, role: str) -> bool:
        """Whether guidance is an input of the role's network instead of a second pass."""
        return role in self.guidance_inputs

    def passes(self, w: Tensor | float, role: str = TEACHER) -> int:
        """Evaluations of the network that ``guided`` takes for one sample."""
        return 1 if self.takes_guidance(role) or (isinstance(w, (int, float)) and w == 1) else 2

    def features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Bottleneck features for a critic, float32; counted apart (half a network)."""
        self.evaluations[f"{role}_features"] += len(x_t)
        with self._autocast(x_t):
            return self.network_features(role, x_t, t, cond).float().contiguous()

    def stages(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The outputs of all stages of the encoder half, float32 (B, F_i, h_i, w_i), the bottleneck last."""
        self.evaluations[f"{role}_features"] += len(x_t)
        with self._autocast(x_t):
            return [found.float() for found in self.network_stages(role, x_t, t, cond)]

    def network_stages(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The stages of ``stages``; where a family has none but its bottleneck, that."""
        return [self.network_features(role, x_t, t, cond)]

    def _autocast(self, like: Tensor) -> AbstractContextManager:
        return computing_in(self.compute_dtype, like)

    def count_in(self, counter: Counter[str]) -> None:
        """Go on counting evaluations in ``counter``, which is the caller's."""
        self.evaluations = counter

    @contextmanager
    def uncounted(self) -> Iterator[Counter[str]]:
        """Count the evaluations inside apart: sampling for metrics and sheets is no training. Yields that count."""
        counted, self.evaluations = self.evaluations, Counter()
        try:
            yield self.evaluations
        finally:
            self.evaluations = counted


def compile_block(block: nn.Module, backend: str | None) -> None:
    """Compile a block at its next call; None: call it as it is again."""
    block._compiled_call_impl = None
    if backend is not None:
        block.compile(backend=backend)


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Exclude parameters from training for good: roles never flip ``requires_grad`` later."""
    for parameter in parameters:
        parameter.requires_grad_(False)
