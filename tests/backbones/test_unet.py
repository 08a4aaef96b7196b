"""The UNet backbone and its roles: parameter counts, isolation, guidance in one batch, activation checkpointing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from core.backbones.base import Cond
from core.backbones.roles import Sharing
from core.backbones.unet import UNetBackbone
from core.config import UserError, compose
from core.critics.latent import LatentCritic
from tests import worlds

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest: diffusers' defaults
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, Cond, Cond]:
    draw = torch.Generator().manual_seed(0)
    x_t, text = (torch.randn(*shape, generator=draw) for shape in ((batch, 4, 8, 8), (batch, 16, 16)))
    t = torch.tensor([999, 500, 3])[:batch]
    return x_t, t, Cond({"text": text}), Cond({"text": torch.randn(1, 16, 16, generator=draw)})


def test_sd15_has_the_papers_trainable_parameters() -> None:
    """25,509,888 in LoRA of rank 128 and 870,720 in the head: the 26.4M of Flash Diffusion, Table 1."""
    config = compose("flash/sd15")
    spec = config.backbone
    sharing = Sharing(spec.sharing, spec.lora_rank, spec.lora_alpha, tuple(spec.lora_targets))
    with torch.device("meta"):
        backbone = UNetBackbone.from_architecture(SD15, SCHEDULER, sharing)
        backbone.add_role("student", trainable=True)
        head = LatentCritic(backbone.feature_shape, config.method.critic_channels)
    lora = sum(p.numel() for p in backbone.role_parameters("student").values())
    critic = sum(p.numel() for p in head.parameters())
    assert (lora, critic) == (25_509_888, 870_720)
    assert sum(p.numel() for p in backbone.role_parameters("teacher").values()) == 859_520_964
    assert backbone.feature_shape == (1280, 8, 8)


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_a_role_starts_as_the_teacher_and_changes_alone(tmp_path: Path, sharing: str) -> None:
    backbone = worlds.backbone(tmp_path, sharing)
    backbone.add_role("student", trainable=True, seed=0)
    backbone.add_role("student_ema", like="student", trainable=False)
    x_t, t, cond, _ = inputs()
    teacher = backbone.predict("teacher", x_t, t, cond)
    assert torch.equal(backbone.predict("student", x_t, t, cond), teacher)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.add_(0.1)
    assert (backbone.predict("student", x_t, t, cond) - teacher).abs().max() > 1e-2
    assert torch.equal(backbone.predict("teacher", x_t, t, cond), teacher)
    assert torch.equal(backbone.predict("student_ema", x_t, t, cond), teacher)


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_choosing_a_role_never_changes_what_trains(tmp_path: Path, sharing: str) -> None:
    backbone = worlds.backbone(tmp_path, sharing)
    backbone.add_role("student", trainable=True)
    backbone.add_role("student_ema", like="student", trainable=False)
    for role in ("teacher", "student_ema", "student", "teacher"):
        backbone.predict(role, *inputs()[:3])
        trains = {
            r: {p.requires_grad for p in backbone.role_parameters(r).values()} for r in ("teacher", "student_ema")
        }
        assert trains == {"teacher": {False}, "student_ema": {False}}
        assert all(p.requires_grad for p in backbone.role_parameters("student").values())


def test_initial_adapters_depend_on_the_key_alone(tmp_path: Path) -> None:
    def factors(seed: int, draws_before: int) -> torch.Tensor:
        torch.rand(draws_before)
        backbone = worlds.backbone(tmp_path)
        backbone.add_role("student", trainable=True, seed=seed)
        return next(p for n, p in backbone.role_parameters("student").items() if "lora_A" in n)

    assert torch.equal(factors(0, 1), factors(0, 7))
    assert not torch.equal(factors(0, 1), factors(1, 1))


def test_guidance_is_one_batch_and_one_convention(tmp_path: Path) -> None:
    backbone = worlds.backbone(tmp_path)
    x_t, t, cond, null = inputs()
    conditional = backbone.predict("teacher", x_t, t, cond)
    unconditional = backbone.predict("teacher", x_t, t, null.expand(3))
    backbone.evaluations.clear()
    w = torch.tensor([1.0, 3.0, 0.0])
    guided = backbone.guided("teacher", x_t, t, cond, null, w)
    assert backbone.evaluations == {"teacher": 6}
    expected = w.view(-1, 1, 1, 1) * conditional + (1 - w.view(-1, 1, 1, 1)) * unconditional
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    backbone.evaluations.clear()
    torch.testing.assert_close(backbone.guided("teacher", x_t, t, cond, null, 1.0), conditional)
    assert backbone.evaluations == {"teacher": 3}
    assert [backbone.passes(w) for w in (1.0, 7.5, w)] == [1, 2, 2]


@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_checkpointed_gradients_are_exact_when_another_role_runs_in_between(tmp_path: Path, sharing: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        backbone = worlds.backbone(tmp_path, sharing)
        backbone.add_role("student", trainable=True)
        with torch.no_grad():
            for parameter in backbone.role_parameters("student").values():
                parameter.add_(0.05)
        if checkpointing:
            backbone.enable_activation_checkpointing()
        x_t, t, cond, _ = inputs()
        loss = backbone.predict("student", x_t, t, cond).square().mean()
        with torch.no_grad():
            backbone.predict("teacher", x_t, t, cond)  # the active role is now another one
        loss.backward()
        return [p.grad for p in backbone.role_parameters("student").values()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_attention_in_16_bit_does_not_take_the_slow_kernel(tmp_path: Path) -> None:
    """On a CPU; also where activations are computed again, which would fail if that chose another one."""

    def step(checkpointing: bool) -> tuple[set[str], list[torch.Tensor]]:
        backbone = worlds.backbone(tmp_path)
        backbone.compute_dtype = torch.bfloat16
        backbone.add_role("student", trainable=True)
        if checkpointing:
            backbone.enable_activation_checkpointing()
        x_t, t, cond, _ = inputs()
        loss = backbone.predict("student", x_t, t, cond).square().mean()
        nodes, left = set(), [loss.grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in nodes:
                left += [following for following, _ in node.next_functions]
                nodes.add(node)
        loss.backward()
        return {node.name() for node in nodes}, [p.grad for p in backbone.role_parameters("student").values()]

    kernels, plain = step(False)
    assert "BmmBackward0" in kernels and not any("FlashAttention" in name for name in kernels)
    for once, again in zip(plain, step(True)[1], strict=True):
        torch.testing.assert_close(again, once, rtol=1e-6, atol=1e-8)


def test_losses_on_pixels_decode_as_training_computes_and_measurements_do_not(tmp_path: Path) -> None:
    backbone, latents = worlds.backbone(tmp_path), inputs()[0].requires_grad_(True)
    exact, shown = backbone.pixels(latents), backbone.decode(latents)
    assert torch.equal(backbone.training_pixels(latents), exact)
    backbone.compute_dtype = torch.bfloat16
    rough = backbone.training_pixels(latents)
    error = (rough - exact).abs().max() / exact.abs().max()
    assert rough.dtype == torch.float32 and 1e-5 < error < 0.05
    assert np.array_equal(backbone.decode(latents), shown)
    rough.square().mean().backward()
    assert latents.grad.abs().max() > 0


def test_critic_features_are_the_encoder_half(tmp_path: Path) -> None:
    """They equal what the whole network's mid block puts out, and cost no full evaluation."""
    backbone = worlds.backbone(tmp_path)
    x_t, t, cond, _ = inputs()
    seen = []
    handle = backbone.roles.base.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    backbone.predict("teacher", x_t, t, cond)
    handle.remove()
    backbone.evaluations.clear()
    features = backbone.features("teacher", x_t, t, cond)
    assert torch.equal(features, seen[0])
    assert features.shape[1:] == backbone.feature_shape
    assert backbone.evaluations == {"teacher_features": 3}


def test_a_missing_pipeline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone.path=.*nowhere.*needs unet/") as error:
        UNetBackbone.load(str(tmp_path / "nowhere"), Sharing("lora", 4, 4, worlds.TARGETS))
    assert "\n" not in str(error.value)


def test_a_frozen_base_is_channels_last_and_what_is_saved_is_not(tmp_path: Path) -> None:
    backbone = worlds.backbone(tmp_path, targets=("conv1",))
    backbone.add_role("student", trainable=True)
    base = backbone.roles.base.conv_in.weight
    assert base.is_contiguous(memory_format=torch.channels_last) and not base.is_contiguous()
    assert all(parameter.is_contiguous() for parameter in backbone.role_parameters("student").values())
    assert all(parameter.is_contiguous() for parameter in backbone.roles.merged("student").parameters())
    assert worlds.backbone(tmp_path, "full").roles.base.conv_in.weight.is_contiguous(), "as the copies that train"


def test_networks_that_only_sample_are_channels_last_until_they_are_saved(tmp_path: Path) -> None:
    backbone = worlds.backbone(tmp_path, "full")
    backbone.add_role("student", trainable=True)
    x_t, t, cond, _ = inputs()
    with torch.no_grad():
        plain = backbone.predict("student", x_t, t, cond)
        backbone.lay_out_for_sampling()
        weight = backbone.role_parameters("student")["conv_in.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        torch.testing.assert_close(backbone.predict("student", x_t, t, cond), plain, rtol=1e-4, atol=1e-4)
    assert all(parameter.is_contiguous() for parameter in backbone.roles.merged("student").parameters())
