"""The plan against what is there: bytes of a real training, and what checkpointing and sharing save."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from core.backbones import tiny
from core.backbones.roles import Sharing
from core.backbones.tiny import write_tiny_flux2, write_tiny_sd
from core.config import UserError, compose
from core.losses.perceptual import PERCEPTUAL_LOSSES
from experiments.architectures import FILE
from experiments.bench.peaks import MEMORY, peak_of_two_iterations
from experiments.build import FAMILIES, source_of
from experiments.cli import main
from experiments.fake_training import LiveBytes, Lived, as_on_cuda, build, iteration
from experiments.memory import GB, Row, plan_memory, planned_bytes
from tests import worlds


def plan(experiment: str, *overrides: str, gpus: int = 1) -> dict[tuple[str, str], Row]:
    rows = plan_memory(compose(experiment, ["data.path=x", *overrides]), gpus)
    return {(row.role, row.what): row for row in rows}


@pytest.fixture
def states_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations need half a minute."""
    monkeypatch.setattr("experiments.memory.iteration", lambda *given: Lived(0, {}))


@pytest.mark.usefixtures("states_only")
@pytest.mark.parametrize(("sharing", "state_dtype"), [("lora", "fp32"), ("full", "bf16")])
def test_parameters_gradients_and_moments_are_those_of_a_training(
    tmp_path: Path, sharing: str, state_dtype: str
) -> None:
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    options = [f"train.state_dtype={state_dtype}", "train.ema_decay=0.9"]
    rows = plan("dmd2/tiny", f"backbone.path={folder}", f"backbone.sharing={sharing}", *options)
    trained = worlds.trainer(tmp_path, options, sharing, experiment="dmd2/tiny")
    trained._iteration()
    for name, player in trained.players.items():
        moments = [player.optimizer.state[part][key] for part in player.parts for key in ("exp_avg", "exp_avg_sq")]
        assert rows[name, "AdamW's two moments"].all == sum(moment.nbytes for moment in moments)
        assert rows[name, "gradients"].all == sum(p.grad.nbytes for p in player.trained)
    backbone = trained.method.backbone
    roles = {"student": "parameters", "fake_score": "parameters", "student_ema": "parameters (fp32 average)"}
    for role, what in roles.items():
        held = sum(p.nbytes for p in backbone.role_parameters(role).values())
        assert rows[role, what].all == rows[role, what].each == held, role


@pytest.mark.usefixtures("states_only")
def test_a_device_of_several_holds_its_part(tmp_path: Path) -> None:
    folder = write_tiny_flux2(tmp_path / "tiny-flux2")
    options = ["backbone=tiny_flux2", f"backbone.path={folder}", "train.batch_size=8", "method.gan=off"]
    alone, sharded = plan("dmd2/tiny", *options), plan("dmd2/tiny", *options, "execution.sharding=fsdp", gpus=4)
    held = {"all": 0, "each": 0}
    for key, row in alone.items():
        if "activations" in key[1]:
            continue
        if "adapter in them" in key[1]:
            assert key not in sharded, "adapters of parts are not merged"
            continue
        assert sharded[key].each >= row.all / 4 and sharded[key].all == row.all
        held = {"all": held["all"] + row.all, "each": held["each"] + sharded[key].each}
    assert held["each"] < 0.35 * held["all"], "first dimensions that four does not divide are rounded up"
    targets = ("to_q", "to_k", "to_v", "to_qkv_mlp_proj")
    base = worlds.backbone(tmp_path, "full", "flux2").roles.base
    adapted = sum(p.nbytes for name, p in base.named_parameters() if name.removesuffix(".weight").endswith(targets))
    assert alone["student", "weights with the adapter in them"].all == adapted
    replicated = plan("dmd2/tiny", *options, gpus=4)
    assert replicated["teacher", "parameters"].all == 4 * alone["teacher", "parameters"].all


@pytest.mark.usefixtures("states_only")
def test_copies_of_a_training_average_the_gradients_of_a_turn_in_one_message(tmp_path: Path) -> None:
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    options = [f"backbone.path={folder}", "backbone.sharing=full", "train.batch_size=8"]
    key = ("all", "gradients of a turn, averaged at once")
    found = plan("dmd2/tiny", *options, gpus=2)
    turns = [row.each for (role, what), row in found.items() if what == "gradients"]
    assert len(turns) == 2 and found[key].each == max(turns) and found[key].all == 2 * max(turns)
    assert key not in plan("dmd2/tiny", *options) | plan("dmd2/tiny", *options, "execution.sharding=fsdp", gpus=2)


def test_what_lives_is_counted_once_and_no_longer() -> None:
    weight = torch.ones(10, 10)
    with LiveBytes([weight]) as live:
        first = weight.t() @ weight  # a view of what is known costs nothing
        second = first.view(100)
        assert live.now == live.peak == 400
        third = torch.zeros(25)
        del first, second
        assert live.now == 100 and live.peak == 500
        live.forget(third)
        del third
    assert live.now == 0


@pytest.mark.slow
def test_checkpointing_saves_activations(tmp_path: Path) -> None:
    rows = plan("dmd2/tiny", f"backbone.path={write_tiny_sd(tmp_path / 'tiny-sd')}", "train.batch_size=8")
    kept, checkpointed = (rows["all", f"activations, {how}"].each for how in ("all kept", "checkpointed"))
    assert 0 < checkpointed < 0.8 * kept


@pytest.mark.usefixtures("states_only")
def test_the_flux2_recipe_needs_more_than_500_gb() -> None:
    """Three networks of 32B in bf16, gradients and moments of two; moments are "about half" of it."""
    rows = plan("dmd2/flux2_dev", gpus=8)
    network = 2 * 32_223_281_152
    assert rows["teacher", "parameters"].all == rows["student", "gradients"].all == network
    states = {key: row for key, row in rows.items() if key[0] in ("teacher", "student", "fake_score")}
    whole = sum(row.all for row in states.values())
    moments = sum(row.all for (_, what), row in states.items() if "moments" in what)
    assert whole == 9 * network and 500e9 < whole < 600e9 and moments / whole == pytest.approx(4 / 9)


def test_an_unknown_architecture_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="neither a folder with unet/config.json nor one of stable-diffusion-v1-5/"):
        plan("dmd2/tiny", "backbone.path=somebody/else")


def test_flash_diffusion_is_planned_without_solving_the_teachers_ode(tmp_path: Path) -> None:
    """Nor does the plan ask for the files of a perceptual loss."""
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    rows = plan("flash/tiny", f"backbone.path={folder}", "method.distill_loss=effnet_lite1")
    kept, checkpointed = (rows["all", f"activations, {how}"].each for how in ("all kept", "checkpointed"))
    assert kept > checkpointed > 0 and rows["critic", "parameters"].each > 0


def test_attention_and_norms_keep_what_cuda_keeps() -> None:
    """In bf16 of 2 heads of 64 positions and width 16: q, k, v, out and a logsumexp in fp32; no 64 x 64 matrix."""
    with FakeTensorMode(), as_on_cuda():
        q, k, v = (torch.empty(1, 2, 64, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        x, scale = torch.empty(4, 16, dtype=torch.bfloat16, requires_grad=True), torch.empty(16, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with LiveBytes([q, k, v]) as live:
                out = F.scaled_dot_product_attention(q, k, v)
            assert live.now == out.nbytes + 4 * 2 * 64
            norms = [F.layer_norm(x, (16,)), F.group_norm(x, 2), F.rms_norm(x, (16,), scale, 1e-6)]
            assert [norm.dtype for norm in norms] == [torch.float32] * 3
            assert type(norms[2].grad_fn) is type(norms[0].grad_fn), "one operation"
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention, "put back"


@pytest.mark.slow
def test_activations_grow_with_the_tokens_and_not_with_their_square(tmp_path: Path) -> None:
    """16 times the tokens; with matrices of tokens by tokens 100 times the bytes and more."""
    options = ["backbone=tiny_flux2", f"backbone.path={write_tiny_flux2(tmp_path / 'flux2')}", "train.precision=bf16"]
    small, large = (
        iteration(compose("dmd2/tiny", [*options, f"data.image_size={size}"]), 1, False, False).peak
        for size in (256, 1024)
    )
    assert 14 < large / small < 18


@pytest.mark.usefixtures("states_only")
def test_latents_have_the_size_of_the_images() -> None:
    """dmd2/emoji_flux2 learns from 64 pixels: 16 tokens, and a critic's head for 4x4 maps."""
    config = compose("dmd2/emoji_flux2")
    method = build(config)
    assert method.backbone.latent_shape == (32, 4, 4)
    last = method.critic[-1]
    assert last.weight.shape == (1, 128, 4, 4)
    rows = plan("dmd2/emoji_flux2")
    assert rows["fake_score: head", "parameters"].all == sum(p.nbytes for p in method.critic.parameters())


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "sd3", "flux2"])
def test_conditions_have_the_sizes_that_the_encoders_give(tmp_path: Path, family: str) -> None:
    folder = getattr(tiny, f"write_tiny_{family}")(tmp_path / family)
    kind = {"sd": "unet", "sdxl": "unet_sdxl", "sd3": "mmdit"}.get(family, family)
    loaded = FAMILIES[kind].load(str(folder), Sharing("full"))
    encoded = {name: tuple(value.shape[1:]) for name, value in loaded.encode_text(["a"]).tensors.items()}
    tokens = json.loads((folder / "tokenizer/tokenizer_config.json").read_text())["model_max_length"]
    assert loaded.cond_shapes(tokens) == encoded


def test_conditions_of_the_published_pipelines() -> None:
    """77 tokens of CLIP, with T5's 256 in SD3; 120 of PixArt's T5; 512 of FLUX.2's language model."""
    texts = {}
    for experiment in ("flash/sd15", "flash/sdxl", "flash/pixart", "flash/sd3", "dmd2/flux2_dev"):
        config = compose(experiment)
        known = yaml.safe_load(FILE.read_text())[config.backbone.path]
        texts[experiment] = build(config).backbone.cond_shapes(known["tokens"])
    assert texts == {
        "flash/sd15": {"text": (77, 768)},
        "flash/sdxl": {"text": (77, 2048), "pooled": (1280,)},
        "flash/pixart": {"text": (120, 4096), "mask": (120,)},
        "flash/sd3": {"text": (333, 4096), "pooled": (2048,)},
        "dmd2/flux2_dev": {"text": (512, 15360)},
    }


@pytest.mark.usefixtures("states_only")
def test_the_flux2_recipes_critic_is_planned() -> None:
    """DINOv2-B stands for a DINO that is not given; the VAE that its images need has 84M parameters."""
    rows = plan("dmd2/flux2_dev", gpus=8)
    assert rows["image_features", "parameters"].each == 4 * 86_580_480
    assert rows["vae", "parameters"].each == pytest.approx(4 * 84e6, rel=0.01)
    assert rows["critic", "parameters"].each == 2 * 3 * (768 * 64 + 64 + 2 * 64 + 64 + 1)


@pytest.mark.slow
def test_what_judges_decoded_images_counts_in_the_activations(tmp_path: Path) -> None:
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    options = [f"backbone.path={folder}", "data.image_size=64"]
    peaks = {
        gan: iteration(compose("dmd2/tiny", [*options, f"method.gan={gan}"]), 1, False, False).peak
        for gan in ("off", "dino", "effnet_lite1")
    }
    assert peaks["dino"] > 2 * peaks["off"] and peaks["effnet_lite1"] > 2 * peaks["off"]
    assert set(PERCEPTUAL_LOSSES) == {"lpips", "effnet_lite1"}
    losses = {
        loss: iteration(compose("flash/tiny", [options[0], f"method.distill_loss={loss}"]), 1, False, False).peak
        for loss in ("mse", *PERCEPTUAL_LOSSES)
    }
    assert min(losses["lpips"], losses["effnet_lite1"]) > 2 * losses["mse"]


@pytest.mark.usefixtures("states_only")
def test_sam_is_planned_without_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """The first twelve layers of ViT-H, each of 19.7M parameters, beside the VAE and the heads."""
    options = ["method.gan=sam", "method.critic_channels=256"]
    rows = plan("flash_dmd/emoji", *options)
    layers = rows["image_features", "parameters"].all / 4 / 12
    assert 19.6e6 < layers < 20.5e6 and rows["vae", "parameters"].all > 0
    heads = 4 * ((1280 + 256 + 256) * 256 * 16 + 256 * 256 * 9 + 12 * 256 + 257)
    assert rows["critic", "parameters"].all == 4 * heads
    assert main(["plan-memory", "flash_dmd/emoji", *options]) == 0
    assert "method.sam_path is not set: image_features is planned as SAM ViT-H" in capsys.readouterr().out


def test_terms_of_later_stages_are_planned(tmp_path: Path) -> None:
    """Flash Diffusion's first stage has no adversarial term."""
    folder = write_tiny_sd(tmp_path / "tiny-sd")
    late, always = (
        iteration(
            compose("flash/tiny", [f"backbone.path={folder}", f"method.adversarial_weight={weights}"]), 1, False, False
        ).peak
        for weights in ([0, 0, 0, 1], [1, 1, 1, 1])
    )
    assert late == always


@pytest.mark.slow
def test_gradients_that_accumulate_are_held_whole(tmp_path: Path) -> None:
    """FSDP2 adds them up in fp32 and averages them after the last micro-batch."""
    options = [f"backbone.path={write_tiny_sd(tmp_path / 'tiny-sd')}", "backbone.sharing=full", "train.precision=bf16"]
    options += ["train.batch_size=8", "execution.sharding=fsdp"]
    key = ("all", "gradients of a turn, while they accumulate")
    alone = plan("dmd2/tiny", *options, "method.gan=off", "execution.micro_batch=2", gpus=2)
    student = alone["student", "parameters"].all // 4
    assert alone[key].each == 4 * student
    at_once = plan("dmd2/tiny", *options, "method.gan=off", "execution.micro_batch=4", gpus=2)
    assert key not in at_once
    critic = plan("dmd2/tiny", *options, "execution.micro_batch=2", gpus=2)
    assert 4 * student < critic[key].each < 8 * student, "the student's turn goes through half of the fake score"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["dmd2/tiny", "--gpus", "3"], "3 processes do not divide train.batch_size=4"),
        (["dmd2/tiny", "--gpus", "2", "execution.micro_batch=4"], "micro_batch=4 does not divide .*=4 / 2 processes"),
    ],
)
def test_a_share_that_the_trainer_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    assert main(["plan-memory", *words]) == 2
    assert re.fullmatch(f"error: .*{error}\n", capsys.readouterr().err)


@pytest.mark.usefixtures("states_only")
def test_what_is_not_planned_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-memory", "dmd2/flux2_dev", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "method.dino_path is not set: image_features is planned as DINOv2-B" in out and "not planned: CUDA" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sharing", ["lora", "full"])
def test_the_plan_is_within_15_percent_of_what_a_gpu_gives_out(sharing: str, checkpointing: bool) -> None:
    options = [f"backbone.sharing={sharing}", f"execution.activation_checkpointing={checkpointing}"]
    words = [*MEMORY[:-1], "train.precision=bf16", "train.batch_size=32", "execution.device=cuda", *options]
    config = compose(words[0], words[1:])
    config.backbone.path = source_of(config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() / GB  # by tests before
    assert planned_bytes(config, 1)[1] / GB == pytest.approx(peak_of_two_iterations(words) - held, rel=0.15)
