"""Reward models of pictures: their values are their libraries', and wrong weights are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from core.backbones.base import Cond
from core.config import UserError, compose
from core.rewards.base import Prompts
from core.rewards.image import aesthetic_head
from core.rewards.known import KNOWN_REWARDS
from core.rewards.registry import load_reward
from experiments.needs import missing_needs
from tests import worlds

TEXTS = ["a red apple", "a blue heart", "a red apple"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with the tokenizer of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(str(worlds.WRITERS["unet"](folder / "sd") / "tokenizer"))
    text = {**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BICUBIC)) for x in coarse])


def prompts() -> Prompts:
    cond = Cond({"text": torch.zeros(3, 1)})
    return Prompts(TEXTS, cond, cond[:1])


def pixels() -> Tensor:
    return torch.from_numpy(pictures().copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


class Place:
    """What a reward model asks of a backbone."""

    device = torch.device("cpu")


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_scores_of_clip_are_transformers_own(clip: Path, name: str) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = CLIPImageProcessor(**size)(list(pictures()), return_tensors="pt").pixel_values
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=images, **tokens).logits_per_image.diagonal()
        if name == "clip":
            expected = expected / model.logit_scale.exp()
    found = load_reward(name, str(clip), Place()).score(pixels(), prompts(), torch.zeros(3))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    assert len(set(found.tolist())) == 3


def test_a_score_has_a_gradient_and_a_caption_is_embedded_once(clip: Path) -> None:
    reward, x = load_reward("pickscore", str(clip), Place()), pixels().requires_grad_()
    embedded = []
    embed = reward.embed
    reward.embed = lambda texts: embedded.append(list(texts)) or embed(texts)
    for _ in range(2):
        reward.score(x, prompts(), torch.zeros(3)).sum().backward()
    assert embedded == [["a red apple", "a blue heart"]]
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in reward.network.parameters())


def test_aesthetics_is_five_linear_layers_on_the_unit_vector(clip: Path) -> None:
    head = aesthetic_head(16)
    save_file({f"layers.{name}": value for name, value in head.state_dict().items()}, clip / "aesthetics.safetensors")
    assert [name for name in aesthetic_head().state_dict() if "weight" in name] == [
        f"{n}.weight" for n in (0, 2, 4, 6, 7)
    ]
    reward = load_reward("aesthetics", str(clip), Place())
    x = load_reward("clip", str(clip), Place()).images(pixels())
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
    for layer in (layer for layer in head if isinstance(layer, torch.nn.Linear)):
        x = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(reward.score(pixels(), prompts(), torch.zeros(3)), x[:, 0])


@pytest.mark.parametrize("name", [name for name, row in KNOWN_REWARDS.items() if row.file])
def test_without_weights_one_line_says_what_is_needed_before_anything_is_built(name: str, tmp_path: Path) -> None:
    row, config = KNOWN_REWARDS[name], compose("dmd2/tiny", [f"method.rl.reward={name}"])
    (line,) = [line for line in missing_needs(config, evaluate=False) if "rl" in line]
    for part in (f"method.rl.reward={name}", "method.rl.reward_path", row.file, row.source, row.licence):
        assert part in line
    config = compose("dmd2/tiny", [f"method.rl.reward={name}", f"method.rl.reward_path={tmp_path}"])
    (line,) = [line for line in missing_needs(config, evaluate=False) if "rl" in line]
    assert line == f"method.rl.reward_path={tmp_path}: no file {row.file} there"


def refused(name: str, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_reward(name, str(folder), Place())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_weights_are_one_line(clip: Path, tmp_path: Path) -> None:
    """Truncated, of another network, or pickled."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    whole = (clip / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is not a CLIP in transformers' format" in refused("pickscore", tmp_path)
    state = load_file(clip / "model.safetensors")
    save_file({f"other.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    assert "it does not hold the weights of a CLIP" in refused("pickscore", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert "is not a CLIP in transformers' format" in refused("pickscore", tmp_path)
    save_file({"layers.0.weight": torch.zeros(2, 2)}, clip / "aesthetics.safetensors")
    assert "is not the 10 tensors of this network as safetensors" in refused("aesthetics", clip)


@pytest.mark.parametrize("name", ["image_reward", "mps"])
def test_what_cannot_be_exact_is_not_approximated(name: str, tmp_path: Path) -> None:
    (tmp_path / KNOWN_REWARDS[name].file).write_bytes(b"weights")
    assert "is in neither transformers nor open_clip" in refused(name, tmp_path)
