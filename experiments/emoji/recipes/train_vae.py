"""Train the AutoencoderKL of the embedded teachers: 64x64 RGB to 8x8 latents of 8 (v1) or 16 (v2) channels.

L1 and squared error on pixels, L1 on image gradients and on two coarser scales, a small KL weight, which keeps
the latents smooth, and an anchor: the first three latent channels are the 8x smaller image, without which a short
training loses hues (group normalisation hides them from a small encoder). The second phase freezes the encoder
(so that cached latents stay valid) and trains the decoder alone: ``--phase decoder --init FOLDER``. With more
``--latent-channels`` than the autoencoder that ``--init`` names has, it is widened. Muon and AdamW; the learning
rate is a function of the images seen. Resumable, to the same weights: run the same command again.

``python -m experiments.emoji.recipes.train_vae --data FOLDER --out FOLDER --images 240000``
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from core.data.shards import Example, ImageTextDataset, open_dataset
from core.randomness import Stream
from experiments.emoji.recipes.muon import MuonAdamW
from experiments.emoji.views import BACKGROUNDS, SIZE, centred, compose

ANCHOR_SCALE = 1.5  # of the small image in [-1, 1], so that anchored latents have about unit variance
KL_WEIGHT = 2e-5  # per image, on the sum over latent elements, against losses averaged over pixels
CENTRED_PROB = 0.75  # of the views; the others are smaller and lie anywhere
MIN_SCALE = 0.5


def build_vae(latent_channels: int) -> AutoencoderKL:
    """2.6M parameters; few channels at 64x64, where a CPU spends its time."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def widened(vae: AutoencoderKL, latent_channels: int) -> AutoencoderKL:
    """A copy with more latent channels, which the decoder does not read yet: it reconstructs what ``vae`` does.

    Means come first in what the encoder gives, then log variances; both halves grow at their end.
    """
    out, old = build_vae(latent_channels), vae.config.latent_channels
    theirs = vae.state_dict()
    for name, value in out.state_dict().items():
        part = theirs[name]
        if name.startswith(("encoder.conv_out", "quant_conv")):
            value, part = value.unflatten(0, (2, -1)), part.unflatten(0, (2, -1))
            if name == "quant_conv.weight":
                value, part = value.unflatten(2, (2, -1)), part.unflatten(2, (2, -1))
                value[:, :old, :, old:] = 0
                value[:, :old, :, :old] = part
            else:
                value[:, :old] = part
        elif name == "decoder.conv_in.weight":
            value[:, old:] = 0
            value[:, :old] = part
        elif name == "post_quant_conv.weight":
            value[:old, old:] = 0
            value[:old, :old] = part
        elif name == "post_quant_conv.bias":
            value[:old] = part
        else:
            value.copy_(part)
    return out


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_images(x: torch.Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def reconstruction_loss(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared error and L1 on pixels, L1 on horizontal and vertical differences and on 2x and 4x coarser images."""
    error = x_hat - x
    loss = 5 * error.square().mean() + error.abs().mean()
    loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    return loss + F.avg_pool2d(error, 2).abs().mean() + 2 * F.avg_pool2d(error, 4).abs().mean()


def anchor_loss(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared distance of latent channels 0..2 (of (B, 8, 8, 8)) from the 8x smaller image."""
    return F.mse_loss(z[:, :3], ANCHOR_SCALE * F.avg_pool2d(x, 8))


def training_view(example: Example, variant: int) -> np.ndarray:
    """A centred view, or in a quarter of the cases a smaller one anywhere; uint8 (64, 64, 3)."""
    rng = Stream(1, "vae", f"layout/{example.key}").generator(variant)
    if rng.random() < CENTRED_PROB:
        return centred(example, variant, seed=1)[0]
    colour = str(rng.choice([*BACKGROUNDS]))
    shift = rng.integers(-SIZE // 4, SIZE // 4 + 1, size=2)
    return compose(example.image, colour, rng.uniform(MIN_SCALE, 1.0), (int(shift[0]), int(shift[1])))


def sample_batch(pool: list[Example], position: int, size: int) -> np.ndarray:
    """Views number ``position`` ... of keyed examples, uint8 (size, 64, 64, 3)."""
    rows = Stream(0, "vae", "examples").integers(range(position, position + size), 0, len(pool))
    return np.stack([training_view(pool[row], position + i) for i, row in enumerate(rows)])


def ema_update(ema: torch.nn.Module, model: torch.nn.Module, step: int, decay: float = 0.998) -> None:
    """EMA with warm-up: the decay is at most (1 + step) / (10 + step)."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


def learning_rate(fraction: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then cosine to 1% of the peak, in the fraction of the budget."""
    if fraction < warmup:
        return peak * fraction / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warmup) / (1 - warmup)))))


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean over images of the PSNR of deterministic reconstructions, uint8 (N, H, W, 3), in dB."""
    x = to_tensor(images)
    recon = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in x.split(64)])
    mse = (recon - x).square().mean((1, 2, 3)) / 4
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: np.ndarray) -> float:
    return float(torch.cat([vae.encode(part).latent_dist.mode() for part in to_tensor(images).split(64)]).std())


def validation_images(data: ImageTextDataset, count: int) -> np.ndarray:
    return np.stack([centred(data[i % len(data)], i // len(data), seed=2)[0] for i in range(count)])


class Trainer:
    """State of one training: model, EMA, optimizer, images seen, seconds spent."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args = args
        self.vae = AutoencoderKL.from_pretrained(args.init) if args.init else build_vae(args.latent_channels)
        if self.vae.config.latent_channels < args.latent_channels:
            self.vae = widened(self.vae, args.latent_channels)
        if args.phase == "decoder":
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.ema = build_vae(args.latent_channels)
        self.ema.load_state_dict(self.vae.state_dict())
        self.optimizer = MuonAdamW(self.vae, args.lr, weight_decay=1e-3)
        self.images, self.step, self.seconds = 0, 0, 0.0
        self.checkpoint = args.out / f"{args.phase}.pt"
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.vae.load_state_dict(state["vae"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizers"])
        self.images, self.step, self.seconds = state["images"], state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "vae": self.vae.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": self.optimizer.state_dict(),
            "images": self.images,
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(self.checkpoint)

    def loss(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        if self.args.phase == "decoder":
            with torch.no_grad():
                z = self.sampled(self.vae.encode(x).latent_dist)
            reconstruction = reconstruction_loss(self.vae.decode(z).sample, x)
            return reconstruction, {"reconstruction": reconstruction.item()}
        posterior = self.vae.encode(x).latent_dist
        reconstruction = reconstruction_loss(self.vae.decode(self.sampled(posterior)).sample, x)
        kl, anchor = posterior.kl().mean(), anchor_loss(posterior.mean, x)
        logs = {"reconstruction": reconstruction.item(), "kl": kl.item(), "anchor": anchor.item()}
        return reconstruction + KL_WEIGHT * kl + anchor, logs

    def sampled(self, posterior: DiagonalGaussianDistribution) -> torch.Tensor:
        """Latents drawn with noise that depends on the images seen alone, so that a resumed training draws the same."""
        rng = Stream(0, "vae", "posterior").generator(self.images)
        eps = torch.from_numpy(rng.standard_normal(tuple(posterior.mean.shape), dtype=np.float32))
        return posterior.mean + posterior.std * eps

    def update(self, x: torch.Tensor) -> dict[str, float]:
        loss, logs = self.loss(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.vae.parameters() if p.requires_grad], 1.0)
        self.optimizer.step(learning_rate(self.images / self.args.images, self.args.lr))
        self.step += 1
        self.images += len(x)
        ema_update(self.ema, self.vae, self.step)
        return logs

    def export(self, held_out: np.ndarray, train: np.ndarray) -> None:
        """Write the EMA weights as a diffusers folder with scaling_factor = 1 / std of the latents."""
        self.ema.register_to_config(scaling_factor=round(1 / latent_std(self.ema, train), 5))
        self.ema.save_pretrained(self.args.out / "vae")
        print(f"psnr heldout {psnr(self.ema, held_out):.2f} dB", self.ema.config.scaling_factor, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=240_000)
    parser.add_argument("--latent-channels", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--phase", choices=("joint", "decoder"), default="joint")
    parser.add_argument("--init", type=Path, help="diffusers AutoencoderKL folder to start from")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = open_dataset(args.data, "train")
    pool = list(data)
    held_out = validation_images(open_dataset(args.data, "heldout"), 256)
    train = validation_images(data, 512)
    trainer = Trainer(args)
    saved = time.monotonic()
    while trainer.images < args.images:
        began = time.monotonic()
        logs = trainer.update(to_tensor(sample_batch(pool, trainer.images, args.batch_size)))
        trainer.seconds += time.monotonic() - began
        if trainer.step % 20 == 0:
            rate = args.batch_size / (time.monotonic() - began)
            print(f"{trainer.seconds:.0f}s images {trainer.images} {rate:.0f}/s", logs, flush=True)
        if time.monotonic() - saved > 300:
            trainer.save()
            trainer.export(held_out, train)
            saved = time.monotonic()
    trainer.save()
    trainer.export(held_out, train)


if __name__ == "__main__":
    main()
