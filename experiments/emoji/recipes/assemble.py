"""Make a trained teacher pipeline the folder to publish, with a further trained decoder if there is one.

``python -m experiments.emoji.recipes.assemble --pipeline FOLDER [--vae FOLDER] --out FOLDER``. The encoder must be the
one whose latents the teacher was trained on.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from core.config import UserError


def assemble(pipeline_folder: Path, vae_folder: Path | None, out: Path) -> None:
    """Write ``out`` with the pipeline's networks and the other VAE (None: its own), float16.

    Raises:
        UserError: the VAE's encoder differs from the pipeline's (beyond float16 rounding).
    """
    vae = None if vae_folder is None else _with_same_encoder(pipeline_folder, vae_folder)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(pipeline_folder, out)
    if vae is not None:
        vae.half().save_pretrained(out / "vae")
    _publish(out)


def _with_same_encoder(pipeline_folder: Path, vae_folder: Path) -> AutoencoderKL:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    for part in ("encoder", "quant_conv"):
        ours, theirs = getattr(vae, part).state_dict(), getattr(pipeline.vae, part).state_dict()
        if any(not torch.allclose(ours[name], theirs[name], atol=1e-3, rtol=1e-3) for name in ours):
            raise UserError(f"the {part} of {vae_folder} is not the one that {pipeline_folder} was trained on")
    vae.register_to_config(scaling_factor=pipeline.vae.config.scaling_factor)
    return vae


def _publish(folder: Path) -> None:
    """Readable by everybody, and without the paths of the machine that it was trained on."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0o644)
        if file.name == "config.json":
            facts = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
            file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    assemble(args.pipeline, args.vae, args.out)


if __name__ == "__main__":
    main()
