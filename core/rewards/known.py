"""The facts of every reward model: what it scores, its licence, and where its weights come from. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

OFF = "off"


@dataclass(frozen=True)
class KnownReward:
    """One reward model by name.

    ``space``: ``image`` scores clean decoded pictures, ``latent`` noisy latents at their own time. ``file`` lies in the
    folder that ``method.rl.reward_path`` names, ``kind`` says how it is stored; "": it has no weights of its own.
    """

    name: str
    space: str
    licence: str
    source: str
    file: str
    kind: str

    def needed(self) -> str:
        """The line for a user who has not set the path."""
        return (
            f"method.rl.reward={self.name} needs method.rl.reward_path: {self.kind} with {self.file}, "
            f"from {self.source}; licence: {self.licence}"
        )


_CLIP = "a CLIP in transformers' format, a folder"
KNOWN_REWARDS: dict[str, KnownReward] = {
    row.name: row
    for row in (
        KnownReward(
            "lrm", "latent", "the teacher's", "python -m experiments.emoji.recipes.train_lrm", "reward.safetensors",
            "a folder"
        ),
        KnownReward(
            "emoji_clip", "image", "Apache-2.0", "python -m experiments.emoji.recipes.train_clip --trunk 1",
            "model.safetensors", "a folder"
        ),
        KnownReward("clip", "image", "MIT (OpenAI's)", "openai/clip-vit-large-patch14", "config.json", _CLIP),
        KnownReward(
            "pickscore", "image", "MIT",
            "yuvalkirstain/PickScore_v1, tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "config.json", _CLIP,
        ),
        KnownReward(
            "hpsv2", "image", "Apache-2.0", "xswu/HPSv2, HPS_v2.1_compressed.pt, saved as safetensors",
            "hpsv2.safetensors", "the state of an open_clip ViT-H-14, a folder"
        ),
        KnownReward(
            "aesthetics", "image", "MIT (predictor and CLIP)",
            "christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth, saved as safetensors",
            "aesthetics.safetensors", "a CLIP ViT-L/14 in transformers' format, and the predictor beside it, a folder"
        ),
        KnownReward(
            "image_reward", "image", "Apache-2.0", "THUDM/ImageReward", "ImageReward.pt", "the release, a folder"
        ),
        KnownReward(
            "mps", "image", "Apache-2.0", "Kwai-Kolors/MPS", "MPS_overall_checkpoint.pth", "the release, a folder"
        ),
    )
}  # fmt: skip
