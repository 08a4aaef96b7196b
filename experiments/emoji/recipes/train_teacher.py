"""Train the denoiser and the text encoder of an embedded teacher on latents of a frozen VAE.

Mean squared error on v (Salimans & Ho 2022, appendix D) with uniform t and Stable Diffusion's noise schedule, or on
the velocity of a rectified flow with uniform t (``--family flux2``); 10% empty captions, EMA of both networks. Muon for
the hidden matrices (over images 12,800 to 19,200 of the former the mean loss was 0.377 against AdamW's 0.422), AdamW
for the rest. Kinds are drawn in a balanced way, then a picture of the kind, then a view of it; latents of a fixed
number of such draws are computed once. The learning rate is constant and falls over the last quarter of the images.
Resumable: run the same command again; elsewhere, from a milestone's weights and tokenizer (``--init``), without the
optimizer's state. ``emoji-sd-v1`` and ``emoji-flux2-v1`` were trained by earlier forms of this file, on views with
scale and shift.

``python -m experiments.emoji.recipes.train_teacher --data FOLDER --vae FOLDER --out FOLDER --images 4500000``
"""

import argparse
import copy
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.allocator import keep_freed_memory
from core.backbones.precision import computing_in
from core.data.shards import Example, open_dataset
from core.randomness import Stream, permutation
from core.training.loop import lr_factor
from experiments.emoji.recipes.flux2_recipe import Flux2Recipe
from experiments.emoji.recipes.muon import MuonAdamW
from experiments.emoji.recipes.train_vae import ema_update, to_tensor
from experiments.emoji.tokenizer import MAX_TOKENS, train_tokenizer
from experiments.emoji.views import centred

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DROPOUT = 0.1
WARM_UP, DECAY = 0.005, 0.25  # first and last part of the images, in which the learning rate rises and falls
EMA_DECAY = 0.9995
KIND_POWER = 0.25  # a kind with n pictures is drawn n**0.25 times as often as one with a single picture


def build_unet(latent_channels: int, hidden: int = 128) -> UNet2DConditionModel:
    """5.9M parameters: cross-attention at 8x8 and in the middle, plain residual blocks at 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=hidden,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, hidden: int = 128) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            projection_dim=hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def balanced_rows(examples: list[Example], count: int, seed: int) -> np.ndarray:
    """int64 (count,): rows of ``examples``, kinds first (weight n**KIND_POWER), then a picture of the kind."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        by_kind[example.meta["kind"]].append(row)
    kinds = [by_kind[name] for name in sorted(by_kind)]
    weights = np.array([len(rows) ** KIND_POWER for rows in kinds])
    # Systematic sampling: every kind gets its expected number of draws to within one.
    counts = np.diff(np.floor(np.concatenate([[0], np.cumsum(weights)]) / weights.sum() * count + 0.5)).astype(int)
    rng = Stream(seed, "teacher", "balance").generator(0)
    chosen = [rows[i % len(rows)] for rows, n in zip(kinds, counts, strict=True) for i in range(n)]
    return rng.permutation(np.array(chosen, dtype=np.int64))


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, examples: list[Example], count: int, path: Path) -> tuple[torch.Tensor, list]:
    """Scaled latents float16 (count, C, 8, 8) of balanced views and their captions; computed once, then loaded."""
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["latents"], state["captions"]
    rows = balanced_rows(examples, count, seed=3)
    latents, captions = torch.empty(count, vae.config.latent_channels, 8, 8, dtype=torch.float16), []
    for start in range(0, count, 128):
        part = [centred(examples[row], start + i, seed=3) for i, row in enumerate(rows[start : start + 128])]
        mode = vae.encode(to_tensor(np.stack([image for image, _ in part]))).latent_dist.mode()
        latents[start : start + len(part)] = (mode * vae.config.scaling_factor).half()
        captions += [caption for _, caption in part]
        if start % 12800 == 0:
            print(f"latents {start}/{count}", flush=True)
    torch.save({"latents": latents, "captions": captions}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return latents, captions


class Networks(torch.nn.Module):
    """UNet and text encoder as one module: latents, timesteps, token ids to the predicted v."""

    def __init__(self, tokenizer: CLIPTokenizer, latent_channels: int) -> None:
        super().__init__()
        self.unet = build_unet(latent_channels)
        self.text_encoder = build_text_encoder(tokenizer)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(x_t, t, self.text_encoder(ids)[0]).sample


class SDRecipe:
    """The miniature Stable Diffusion: v of a variance-preserving process on 8x8 latents."""

    outside = ("embedding", "conv_in", "conv_out")  # of Muon

    def __init__(self, examples: list[Example], folder: Path) -> None:
        self.tokenizer = train_tokenizer(examples, folder / "tokenizer")
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        self.alpha, self.sigma = abar.sqrt().float(), (1 - abar).sqrt().float()

    def networks(self, latent_channels: int) -> Networks:
        return Networks(self.tokenizer, latent_channels)

    def latents(self, scaled: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        return scaled

    def ids(self, captions: list[str]) -> torch.Tensor:
        return tokenize(self.tokenizer, captions)

    def noised(
        self, x0: torch.Tensor, eps: torch.Tensor, uniform: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_t, t in 0..999 and v."""
        t = (uniform * 1000).long()
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        return alpha * x0 + sigma * eps, t, alpha * eps - sigma * x0

    def export(self, folder: Path, networks: Networks, vae: AutoencoderKL) -> None:
        export_pipeline(folder, vae, networks, self.tokenizer)


RECIPES: dict[str, type[SDRecipe] | type[Flux2Recipe]] = {"sd": SDRecipe, "flux2": Flux2Recipe}


class Trainer:
    """State of one training; a step is a pure function of it and of the images seen."""

    def __init__(self, args: argparse.Namespace, recipe: SDRecipe | Flux2Recipe, vae: AutoencoderKL) -> None:
        torch.manual_seed(0)
        self.args, self.recipe, self.vae = args, recipe, vae
        channels = vae.config.latent_channels
        # Convolutions in channels last: a fifth of a step on a CPU
        layout = torch.channels_last
        self.networks, self.ema = (recipe.networks(channels).to(memory_format=layout) for _ in range(2))
        if args.init is not None:
            for name, network in self.networks.named_children():
                network.load_state_dict(type(network).from_pretrained(args.init / name).state_dict())
        self.ema.load_state_dict(self.networks.state_dict())
        self.ema.requires_grad_(False).eval()
        self.optimizer = MuonAdamW(self.networks, args.lr, 0.01, recipe.outside)
        self.forward = torch.compile(self.networks) if args.compile else self.networks
        self.images, self.step, self.seconds = args.seen, 0, 0.0
        self.checkpoint = args.out / "teacher.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.networks.load_state_dict(state["networks"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizers"])
            self.images, self.step, self.seconds = state["images"], state["step"], state["seconds"]

    def save(self) -> None:
        state = {"networks": self.networks.state_dict(), "ema": self.ema.state_dict()}
        state |= {"optimizers": self.optimizer.state_dict()}
        state |= {"images": self.images, "step": self.step, "seconds": self.seconds}
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").rename(self.checkpoint)

    def batch(self, latents: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keyed x_t, t, token ids and target of the next batch."""
        size, count = self.args.batch_size, len(latents)
        epoch, offset = divmod(self.images, count - count % size)
        rows = torch.from_numpy(permutation(0, "teacher", count, epoch)[offset : offset + size])
        rng = Stream(0, "teacher", "noise").generator(self.images)
        # Stratified t: one draw per bin of the batch, uniform as a whole.
        uniform = torch.from_numpy((np.arange(size) + rng.random(size)) / size)
        eps = torch.from_numpy(rng.standard_normal((size, *latents.shape[1:]), dtype=np.float32))
        tokens = ids[rows].clone()
        tokens[torch.from_numpy(rng.random(size) < DROPOUT)] = ids[-1]
        x_t, t, target = self.recipe.noised(latents[rows].float(), eps, uniform)
        return x_t, t, tokens, target

    def update(self, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x_t, t, tokens, target = self.batch(latents, ids)
        with computing_in(torch.bfloat16 if self.args.bf16 else None, x_t):
            predicted = self.forward(x_t, t, tokens)
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        fraction = self.images / self.args.images
        self.optimizer.step(self.args.lr * min(1.0, fraction / WARM_UP) * lr_factor(fraction, DECAY))
        self.step += 1
        self.images += len(target)
        ema_update(self.ema, self.networks, self.step, EMA_DECAY)
        return loss.detach()

    def export(self, folder: Path) -> None:
        self.recipe.export(folder, self.ema, self.vae)
        print(f"exported {folder} at {self.images} images", flush=True)


def export_pipeline(folder: Path, vae: AutoencoderKL, networks: Networks, tokenizer: CLIPTokenizer) -> None:
    """Write an ordinary StableDiffusionPipeline folder with float16 weights."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(networks.text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(networks.unet).half().to(memory_format=torch.contiguous_format),  # as files hold it
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers loads in the dtype its config names, diffusers in float32: without this they would disagree.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 (n + 1, MAX_TOKENS): ids of the captions, then of the empty caption."""
    settings = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer([*captions, ""], **settings).input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*RECIPES], default="sd")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="milestone to begin with: its networks and its tokenizer")
    parser.add_argument("--seen", type=int, default=0, help="images that --init has seen, where the rate goes on")
    parser.add_argument("--images", type=int, default=4_500_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--views", type=int, default=96_000)
    parser.add_argument("--export-every", type=float, default=10, help="minutes between exports to OUT/pipeline")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="faster where the processor has units for it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.init is not None and not (args.out / "tokenizer").exists():
        shutil.copytree(args.init / "tokenizer", args.out / "tokenizer")  # another one gives words other numbers
    keep_freed_memory()
    examples = list(open_dataset(args.data, "train"))
    recipe = RECIPES[args.family](examples, args.out)
    vae = AutoencoderKL.from_pretrained(args.vae)
    latents, captions = cache_latents(vae, examples, args.views, args.out / "latents.pt")
    latents = recipe.latents(latents, vae)
    print("latents", tuple(latents.shape), "std", float(latents.float().std()), flush=True)
    ids = recipe.ids(captions)
    trainer = Trainer(args, recipe, vae)
    print({name: sum(p.numel() for p in m.parameters()) for name, m in trainer.networks.named_children()}, flush=True)
    exported, losses, mark = time.monotonic(), [], time.monotonic()
    while trainer.images < args.images:
        began = time.monotonic()
        losses.append(trainer.update(latents, ids))
        trainer.seconds += time.monotonic() - began
        if trainer.step % 50 == 0:
            rate = 50 * args.batch_size / (time.monotonic() - mark)
            mean = float(torch.stack(losses).mean())
            print(f"{trainer.seconds:.0f}s images {trainer.images} {rate:.0f}/s loss {mean:.4f}", flush=True)
            losses, mark = [], time.monotonic()
        if time.monotonic() - exported > 60 * args.export_every:
            trainer.save()
            trainer.export(args.out / "pipeline")
            exported = time.monotonic()
    trainer.save()
    trainer.export(args.out / "pipeline")


if __name__ == "__main__":
    main()
