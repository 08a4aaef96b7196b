"""CLIP score: agreement of image and prompt, judged by an open_clip model.

The judge is ViT-bigG-14 (by local path or hub) at paper scale, or a small in-domain open_clip model handed in as an
object; both are a :class:`ClipJudge`. The score is the mean cosine, in [-1, 1]; papers often print 100 times as much.
Source: Hessel et al., CLIPScore, without its factor 2.5 and its clipping at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from core.config import UserError
from core.data.requests import Requests
from core.metrics.protocol import file_sha256

HUB_WEIGHTS = {"ViT-bigG-14": "laion2b_s39b_b160k"}


@dataclass(frozen=True)
class ClipJudge:
    """An open_clip model that judges pictures beside their prompts.

    ``preprocess`` turns uint8 (N, H, W, 3) into the model's input, ``tokenize`` texts into ids; ``hash`` identifies the
    weights, ``resize`` says in words what happens to a picture before it is seen.
    """

    name: str
    hash: str
    resize: str
    model: nn.Module
    preprocess: Callable[[np.ndarray], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 64

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Embed uint8 pictures (N, H, W, 3) as unit vectors, float32 (N, D)."""
        return self._embed(self.model.encode_image, self.preprocess, images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts as unit vectors, float32 (N, D)."""
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

    def outputs(self, images: np.ndarray, requests: Requests) -> np.ndarray:
        """A judge's outputs for pictures: the cosine of each with its text."""
        return self.similarities(images, requests.texts)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> float:
        """Mean cosine over all images."""
        return float(self.similarities(images, prompts).mean())


def load_clip(source: str = "ViT-bigG-14", device: str | torch.device = "cpu") -> ClipJudge:
    """Load an open_clip model as a judge.

    ``source``: a folder (``open_clip_config.json`` and weights), ``NAME:FILE`` (an architecture and its
    weights file), or ``NAME`` alone for weights from the hub.

    Raises:
        UserError: unknown architecture, missing file, damaged weights, no network for the hub.
    """
    import open_clip

    name, pretrained, digest = _locate(source)
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
        tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"clip model {source} cannot be loaded: {str(error).splitlines()[0]}") from error

    def preprocess(images: np.ndarray) -> Tensor:
        return torch.stack([transform(Image.fromarray(image)) for image in images])

    size = model.visual.image_size
    resize = f"open_clip bicubic to {size[0] if isinstance(size, tuple) else size}"
    label = Path(source).name if Path(source).is_dir() else name
    return ClipJudge(label, digest, resize, model.eval(), preprocess, tokenize, torch.device(device))


def _locate(source: str) -> tuple[str, str | None, str]:
    """open_clip's model name and ``pretrained``, and the identity of the weights."""
    import open_clip

    if Path(source).is_dir():
        return f"local-dir:{source}", None, _folder_hash(Path(source))
    name, _, file = source.partition(":")
    if name not in open_clip.list_models():
        raise UserError(f"clip model {source!r} is neither a folder nor an open_clip architecture such as ViT-bigG-14")
    if file and not Path(file).is_file():
        raise UserError(f"clip weights {file} do not exist")
    if file:
        return name, file, file_sha256(Path(file))
    if name not in HUB_WEIGHTS:
        raise UserError(f"clip model {name} needs a file, {name}:FILE; from the hub: {', '.join(HUB_WEIGHTS)}")
    return name, HUB_WEIGHTS[name], f"hub:{HUB_WEIGHTS[name]}"


def _folder_hash(folder: Path) -> str:
    """The identity of an open_clip folder: of its configuration and its weights."""
    files = sorted(folder.glob("open_clip_*"))
    if not (folder / "open_clip_config.json").is_file() or len(files) < 2:
        raise UserError(f"clip folder {folder} needs open_clip_config.json and open_clip_model.safetensors")
    return "+".join(file_sha256(file)[:16] for file in files)
