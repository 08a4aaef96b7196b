"""Publishing a teacher folder."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from core.backbones.tiny import write_tiny_sd
from core.config import UserError
from experiments.emoji.recipes.assemble import assemble


def test_a_published_folder_is_readable_and_names_no_machine(tmp_path: Path) -> None:
    source = write_tiny_sd(tmp_path / "tiny")
    file = source / "vae" / "config.json"
    facts = json.loads(file.read_text()) | {"_name_or_path": "/home/me/vae"}
    file.write_text(json.dumps(facts))
    file.chmod(0o600)
    assemble(source, None, tmp_path / "out")
    published = tmp_path / "out" / "vae" / "config.json"
    assert json.loads(published.read_text()) == {k: v for k, v in facts.items() if k != "_name_or_path"}
    assert published.stat().st_mode & 0o777 == 0o644


def test_a_decoder_is_exchanged_and_an_encoder_is_not(tmp_path: Path) -> None:
    source = write_tiny_sd(tmp_path / "tiny")
    vae = AutoencoderKL.from_pretrained(source / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.25)
    vae.save_pretrained(tmp_path / "decoder")
    assemble(source, tmp_path / "decoder", tmp_path / "out")
    found = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").decoder.conv_out.bias
    torch.testing.assert_close(found, vae.decoder.conv_out.bias.detach(), atol=1e-3, rtol=1e-3, check_dtype=False)
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(0.25)
    vae.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="encoder of .* is not the one that"):
        assemble(source, tmp_path / "encoder", tmp_path / "out")
