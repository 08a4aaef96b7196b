"""CLIP score: agreement of image and prompt, judged by an open_clip model.

The judge is ViT-bigG-14 (by local path or hub) at paper scale, or a small in-domain open_clip model handed in
as an object; both are a :class:`ClipJudge`. The score is the mean cosine, in [-1, 1]: papers often print 100
times it. Source: Hessel et al., CLIPScore, without its factor 2.5 and its clipping at 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from core.config import UserError
from core.metrics.protocol import file_sha256

ESTIMATOR = "mean cosine of image and prompt"
HUB_WEIGHTS = {"ViT-bigG-14": "laion2b_s39b_b160k"}


@dataclass(frozen=True)
class ClipJudge:
    """An open_clip model with its input side: ``preprocess`` uint8 (N, H, W, 3) -> tensor, ``tokenize`` texts
    -> ids."""

    name: str
    hash: str
    resize: str
    model: nn.Module
    preprocess: Callable[[np.ndarray], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 64

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 (N, D)."""
        return self._embed(self.model.encode_image, self.preprocess, images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 (N, D)."""
        return self._embed(self.model.encode_text, self.tokenize, list(texts))

    @torch.no_grad()
    def _embed(
        self, encode: Callable[[Tensor], Tensor], prepare: Callable, items: np.ndarray | list[str]
    ) -> np.ndarray:
        batches = [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        vectors = [encode(prepare(batch).to(self.device)).float() for batch in batches]
        return nn.functional.normalize(torch.cat(vectors), dim=-1).cpu().numpy()

    def similarities(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each image with its own prompt, float64 (N,). Repeated prompts are encoded once."""
        assert len(images) == len(prompts), "one prompt per image"
        distinct = sorted(set(prompts))
        row = {text: i for i, text in enumerate(distinct)}
        texts = self.embed_texts(distinct)[[row[p] for p in prompts]]
        return (self.embed_images(images).astype(np.float64) * texts).sum(axis=1)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> float:
        """Mean cosine over all images."""
        return float(self.similarities(images, prompts).mean())


def load_clip(
    name: str = "ViT-bigG-14", path: str | Path | None = None, device: str | torch.device = "cpu"
) -> ClipJudge:
    """An open_clip model by architecture name: weights from the file ``path``, or from the hub when it is
    None.

    Raises:
        UserError: unknown architecture, missing file, no network for the hub.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise UserError(f"unknown open_clip model {name!r}; for example: {', '.join(HUB_WEIGHTS)}")
    if path is not None and not Path(path).is_file():
        raise UserError(f"clip weights {path} do not exist")
    if path is None and name not in HUB_WEIGHTS:
        raise UserError(
            f"eval.clip_path must name a weights file for {name}; from the hub: {', '.join(HUB_WEIGHTS)}"
        )
    pretrained = str(path) if path is not None else HUB_WEIGHTS[name]
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot load {name} from {pretrained}: {str(error).splitlines()[0]}") from error
    digest = file_sha256(Path(path)) if path is not None else f"hub:{pretrained}"

    def preprocess(images: np.ndarray) -> Tensor:
        return torch.stack([transform(Image.fromarray(image)) for image in images])

    tokenize = open_clip.get_tokenizer(name)
    size = model.visual.image_size
    resize = f"open_clip bicubic to {size[0] if isinstance(size, tuple) else size}"
    return ClipJudge(name, digest, resize, model.eval(), preprocess, tokenize, torch.device(device))
