"""CLIP score with a tiny open_clip model: values by hand, loading from a local file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import UserError
from core.metrics.clip import ClipJudge, load_clip
from core.metrics.protocol import file_sha256


class _Lookup(torch.nn.Module):
    """An image's vector is its first pixel (r, g, 1); a text's vector is (length, 0, 1)."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def encode_text(self, lengths: torch.Tensor) -> torch.Tensor:
        self.texts_seen = getattr(self, "texts_seen", 0) + len(lengths)
        return torch.stack([lengths, torch.zeros_like(lengths), torch.ones_like(lengths)], dim=1)


def _judge(batch_size: int = 2) -> ClipJudge:
    def preprocess(images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images[:, 0, 0].astype(np.float32))
        return torch.cat([pixels[:, :2], torch.ones(len(pixels), 1)], dim=1)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([float(len(t)) for t in texts])

    return ClipJudge("lookup", "h", "none", _Lookup(), preprocess, tokenize, torch.device("cpu"), batch_size)


def test_score_is_the_mean_cosine_of_own_prompts() -> None:
    images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0] = [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    prompts = ["a", "aa", "a"]  # vectors (1,0,1), (2,0,1)
    expected = [1.0, 1 / np.sqrt(5), 0.5]
    judge = _judge()
    np.testing.assert_allclose(judge.similarities(images, prompts), expected, atol=1e-6)
    assert judge.score(images, prompts) == pytest.approx(np.mean(expected), abs=1e-6)
    assert judge.model.texts_seen == 4, "each distinct prompt is encoded once per call"


CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with random weights, whose architecture is also registered by name."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    folder.mkdir()
    (folder.parent / "tiny-fewstep.json").write_text(json.dumps(CONFIG))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    open_clip.add_model_config(folder.parent)
    torch.manual_seed(0)
    weights = open_clip.create_model("tiny-fewstep").state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


def test_weights_from_a_folder_or_a_file_are_loaded_and_hashed(folder: Path) -> None:
    import open_clip
    from safetensors.torch import load_file

    file = folder / "open_clip_model.safetensors"
    by_name, by_folder = load_clip(f"tiny-fewstep:{file}"), load_clip(str(folder))
    assert by_name.hash == file_sha256(file) and by_folder.name == "tiny-clip"
    model = open_clip.create_model("tiny-fewstep")
    model.load_state_dict(load_file(file))
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    for judge in (by_name, by_folder):
        with torch.no_grad():
            text = model.eval().encode_text(judge.tokenize(["red apple"]), normalize=True)
        np.testing.assert_allclose(judge.embed_texts(["red apple"]), text.numpy(), atol=1e-5)
        vectors = judge.embed_images(images)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
        assert not np.allclose(vectors[0], vectors[1])


def test_wrong_judges_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    for source, words in (
        ("ViT-huge", "'ViT-huge' is neither a folder nor an open_clip architecture"),
        ("ViT-bigG-14:missing.safetensors", "clip weights missing.safetensors do not exist"),
        ("tiny-fewstep", "needs a file, tiny-fewstep:FILE"),
        (str(tmp_path), "needs open_clip_config.json"),
        (f"tiny-fewstep:{tmp_path / 'damaged.safetensors'}", "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=words):
            load_clip(source)
