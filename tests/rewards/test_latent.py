"""The latent reward model by value, on a real tiny UNet, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.backbones.base import Cond
from core.backbones.pipeline import PipelineBackbone
from core.config import UserError
from core.rewards.base import Prompts
from core.rewards.latent import LatentHead, latent_features, save_head, stage_widths, text_features
from core.rewards.registry import load_reward
from experiments.emoji.recipes.train_lrm import accuracy, train_head
from tests import worlds


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> PipelineBackbone:
    return worlds.backbone(tmp_path_factory.mktemp("lrm"))


def asked(unet: PipelineBackbone) -> tuple[torch.Tensor, torch.Tensor, Prompts]:
    """Two noisy latents of two captions at two times."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *unet.latent_shape, generator=generator)
    cond, null = unet.encode_text(["a fox", "an owl"]), unet.encode_text([""])
    return x_t, torch.tensor([951, 51]), Prompts(["a fox", "an owl"], cond, null)


def test_features_are_means_of_the_stages_and_the_last_is_guided(unet: PipelineBackbone) -> None:
    """Against hooks on the blocks of a whole forward pass; both passes are counted."""
    x_t, t, prompts = asked(unet)
    before = unet.evaluations["teacher_features"]
    found = latent_features(unet, x_t, t, prompts.cond, prompts.null)
    assert unet.evaluations["teacher_features"] - before == 4
    seen: dict[str, list[torch.Tensor]] = {"mid": [], "last resnet": []}
    network = unet.roles.base
    last = network.down_blocks[-1].resnets[-1]
    attentions = getattr(network.down_blocks[-1], "attentions", None)
    last = attentions[-1] if attentions else last
    hooks = [
        network.mid_block.register_forward_hook(lambda m, given, out: seen["mid"].append(out)),
        last.register_forward_hook(lambda m, given, out: seen["last resnet"].append(out[0] if attentions else out)),
    ]
    for cond in (prompts.cond, prompts.null.expand(2)):
        unet.predict("teacher", x_t, t, cond)
    for hook in hooks:
        hook.remove()
    (mid, null_mid), (outer, _) = ([x.mean((2, 3)) for x in seen[name]] for name in ("mid", "last resnet"))
    widths = stage_widths(unet)
    assert found.shape == (2, sum(widths))
    *_, of_last, of_mid = found.split(widths, dim=1)
    torch.testing.assert_close(of_mid, null_mid + 7.5 * (mid - null_mid), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of_last, outer.reshape(of_last.shape), rtol=1e-3, atol=1e-4)


def test_the_score_is_a_scaled_cosine_and_has_a_gradient(unet: PipelineBackbone, tmp_path: Path) -> None:
    x_t, t, prompts = asked(unet)
    torch.manual_seed(0)
    head = LatentHead(sum(stage_widths(unet)), 16, 8)
    save_head(head, tmp_path)
    reward = load_reward("lrm", str(tmp_path), unet)
    x_t.requires_grad_()
    scores = reward.score(x_t, prompts, t)
    v = latent_features(unet, x_t, t, prompts.cond, prompts.null) @ head.visual.weight.T
    words = prompts.cond.tensors["text"].mean(1) @ head.text.weight.T
    cosine = (v * words).sum(1) / v.norm(dim=1) / words.norm(dim=1)
    torch.testing.assert_close(scores, head.log_scale.exp() * cosine)
    scores.sum().backward()
    assert x_t.grad.abs().sum() > 0 and all(p.grad is None for p in unet.roles.base.parameters())
    other = reward.score(x_t, prompts, torch.tensor([501, 501]))
    assert (other - scores).abs().min() > 1e-4, "the same latent is worth something else at another time"


def test_a_pooled_output_is_the_text_where_there_is_one() -> None:
    cond = Cond({"text": torch.ones(2, 3, 4), "pooled": torch.full((2, 5), 2.0)})
    assert torch.equal(text_features(cond), torch.full((2, 5), 2.0))


def test_the_head_learns_which_side_is_better(unet: PipelineBackbone) -> None:
    """Where one direction of the features decides, as a function of the text, held-out pairs are ordered rightly."""
    generator = torch.Generator().manual_seed(0)
    features, texts = torch.randn(3, 600, 2, 6, generator=generator), torch.randn(600, 6, generator=generator)
    agreement = (features * texts[:, None]).sum(-1)
    order = agreement.argsort(-1, descending=True)
    features = torch.gather(features, 2, order[..., None].expand_as(features))
    head = train_head(features[:, :500], texts[:500], iterations=200, lr=1e-2)
    assert min(accuracy(head, features[:, 500:], texts[500:])) > 0.8
    swapped = accuracy(head, features[:, 500:].flip(2), texts[500:])
    assert max(swapped) < 0.2


def test_a_wrong_head_is_one_line(unet: PipelineBackbone, tmp_path: Path) -> None:
    save_head(LatentHead(7, 16, 8), tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "reward.safetensors").write_bytes(b"not tensors")
    lines = {"other": "it reads 7 features, and this backbone's half has", "broken": "is not the head of a latent"}
    for name, line in lines.items():
        with pytest.raises(UserError, match=line) as error:
            load_reward("lrm", str(tmp_path / name), unet)
        assert "\n" not in str(error.value)


def test_rl_with_a_latent_reward_counts_two_half_passes_of_each_candidate(tmp_path: Path) -> None:
    network = worlds.backbone(tmp_path)
    save_head(LatentHead(sum(stage_widths(network)), 16, 8), tmp_path / "lrm")
    options = ["method.rl.reward=lrm", f"method.rl.reward_path={tmp_path}/lrm", "method.rl.distil=false"]
    trained = worlds.trainer(tmp_path, options, experiment="dmd2/tiny")
    trained._iteration()
    assert (
        trained.clock.evaluations["teacher_features"] == 2 * 4 * 4 and "reward_model" not in trained.clock.evaluations
    )
    assert "reward_head" in trained.method.networks_beside()
