"""The forms of an export: which student takes which, and what is in the files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from core.backbones.base import STUDENT
from core.backbones.pipeline import PipelineBackbone
from core.backbones.roles import Sharing
from core.config import UserError, compose, resolve
from core.run import Run
from core.sampler import Sampler
from experiments.build import FAMILIES
from experiments.export import export, lora_state
from experiments.formats import Form
from experiments.kohya import Factors, kohya_state
from tests import worlds

TWO_STEPS = Sampler("lcm", 2)
FLUX2_LAYERS = tuple(compose("dmd2/flux2_klein").backbone.lora_targets)
ANSWERS = """
import json, sys
from experiments.cli import main
for words in json.loads(sys.argv[1]):
    print(main(words), "torch" in sys.modules)
"""
NO_READER = "diffusers has no reader of such keys for {}, which could check the file; allowed: diffusers"


def _student(folder: Path, family: str, targets: tuple[str, ...]) -> PipelineBackbone:
    settings = Sharing("lora", rank=4, alpha=2, targets=targets)
    backbone = FAMILIES[family].load(str(worlds.WRITERS[family](folder / family)), settings, image_size=64)
    backbone.add_role(STUDENT, trainable=True)
    with torch.no_grad():
        for number, parameter in enumerate(backbone.role_parameters(STUDENT).values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return backbone


def test_kohyas_keys_name_layers_and_their_alpha(tmp_path: Path) -> None:
    backbone = _student(tmp_path, "unet", ("to_q", "conv1"))
    file = export(backbone, tmp_path / "mine", TWO_STEPS, form=Form("kohya")) / "mine.safetensors"
    state, ours = load_file(file), backbone.role_parameters(STUDENT)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"lora_unet_{layer.replace('.', '_')}"
    assert torch.equal(state[f"{key}.lora_down.weight"], ours[f"{layer}.lora_A.weight"])
    assert torch.equal(state[f"{key}.lora_up.weight"], ours[f"{layer}.lora_B.weight"])
    assert state[f"{key}.alpha"] == 2 and 3 * len(ours) == 2 * len(state)
    with safe_open(file, "pt") as opened:
        facts = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2"}
        assert opened.metadata() == {"format": "pt"} | facts


def test_flux2_keys_join_q_k_and_v_and_diffusers_takes_them_apart(tmp_path: Path) -> None:
    """Every layer that the paper-scale configuration trains; the products of the factors come back exactly."""
    backbone = _student(tmp_path, "flux2", FLUX2_LAYERS)
    ours = backbone.role_parameters(STUDENT)
    state = kohya_state(backbone, ours, backbone.roles.sharing)
    fused = "lora_unet_double_blocks_0_txt_attn_qkv"
    assert len(state[f"{fused}.lora_down.weight"]) == 12 and state[f"{fused}.alpha"] == 6
    read = Flux2KleinPipeline.lora_state_dict(dict(state))
    wanted = lora_state(ours, backbone.roles.sharing)
    assert {name.removeprefix("transformer.") for name in read} == wanted.keys()
    for name in [name for name in wanted if ".lora_A." in name]:
        pairs = [(found[prefix + name.replace("lora_A", "lora_B")], found[prefix + name])
                 for found, prefix in ((read, "transformer."), (wanted, ""))]  # fmt: skip
        (theirs_up, theirs_down), (up, down) = pairs
        torch.testing.assert_close(theirs_up @ theirs_down, up @ down, rtol=0, atol=0)


def test_a_missing_part_of_q_k_and_v_adds_nothing() -> None:
    some = Factors(torch.ones(2, 3), torch.ones(4, 2))
    joined = Factors.joined([None, some, None])
    product = joined.up @ joined.down
    assert product.shape == (12, 3) and (product[4:8] == 2).all() and product.sum() == 24


def test_a_layer_without_a_key_that_is_read_back_is_one_clear_line(tmp_path: Path) -> None:
    backbone = _student(tmp_path, "unet_sdxl", ("linear_1", "linear_2"))
    with pytest.raises(UserError, match="no such key for add_embedding.linear_1 .one of 2 layers"):
        export(backbone, tmp_path / "out", TWO_STEPS, form=Form("kohya"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "sharing", "form", "said"),
    [
        (
            "unet",
            "full",
            Form("kohya"),
            "--format kohya is for a LoRA, not for whole weights (backbone.sharing=full, or",
        ),
        ("unet", "lora", Form("comfyui", merge=True), "--format comfyui is for a LoRA, and --merge leaves none"),
        ("pixart", "lora", Form("kohya"), NO_READER.format("PixArt")),
        ("pixart", "lora", Form("comfyui"), NO_READER.format("PixArt")),
        ("mmdit", "lora", Form("kohya"), NO_READER.format("Stable Diffusion 3") + ", comfyui"),
        ("flux2", "lora", Form(dtype="fp8"), "--dtype fp8 stores whole layers, not a LoRA's factors; add --merge"),
    ],
)
def test_a_form_that_a_student_cannot_take(family: str, sharing: str, form: Form, said: str) -> None:
    with pytest.raises(UserError) as refused:
        form.check(family, sharing)
    assert said in str(refused.value)


@pytest.mark.parametrize("family", [*worlds.WRITERS])
def test_every_family_has_the_forms_that_are_left(family: str) -> None:
    for form in (Form(), Form(dtype="fp16"), Form(merge=True, dtype="fp8")):
        form.check(family, "lora")
        form.check(family, "full")
    if family != "pixart":
        Form("comfyui").check(family, "lora")


def test_a_mistake_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    made = {
        "lora": "flash/tiny", "full": "flash/tiny backbone.sharing=full", "sd3": "flash/tiny backbone=tiny_sd3",
        "teacher": "teacher/tiny",
    }  # fmt: skip
    runs = {name: str(Run.create(resolve(compose(*_split(words)))).path) for name, words in made.items()}
    lines = {
        "export full --out x --format kohya": "--format kohya is for a LoRA, not for whole weights",
        "export lora --out x --dtype fp8": "--dtype fp8 stores whole layers",
        "export lora --out x --format kohya --merge": "--merge leaves none",
        "export sd3 --out x --format kohya": "for Stable Diffusion 3, which could check the file; allowed: diffusers, ",
        "export lora --out x --weights ema": "weights=ema cannot be exported from this run",
        "export teacher --out x": "is the teacher itself: nothing to export",
        "export lora --out x --format kohay": "unknown --format 'kohay'; nearest: kohya",
        "export lora --out x --dtype int8": "unknown --dtype 'int8'",
    }
    commands = [[runs.get(word, word) for word in text.split()] for text in lines]
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["2 False"] * len(lines)
    for said, wanted in zip(done.stderr.splitlines(), lines.values(), strict=True):
        assert said.startswith("error: ") and wanted in said


def _split(words: str) -> tuple[str, list[str]]:
    experiment, *overrides = words.split()
    return experiment, overrides


def test_a_whole_pipeline_needs_nothing_else(tmp_path: Path) -> None:
    """All parts are in it, stored as asked; no part tells where it came from."""
    backbone = _student(tmp_path, "unet", ("to_q",))
    out = export(backbone, tmp_path / "out", TWO_STEPS, form=Form(merge=True, dtype="fp16"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"] and "_name_or_path" not in index
    files = list(out.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder"}
    for file in files:
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}, file
    card = (out / "README.md").read_text()
    assert "a whole pipeline, the base model's with the student in `unet/`, which is stored in float16." in card
    assert "base" not in card.partition("```python")[2].partition("```")[0]
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.config.original_inference_steps == 2


def test_the_card_names_keys_and_storage(tmp_path: Path) -> None:
    backbone = _student(tmp_path, "unet", ("to_q",))
    cards = {}
    for form in (Form(), Form("kohya", dtype="bf16"), Form("comfyui")):
        card = export(backbone, tmp_path / "out", TWO_STEPS, form=form) / "README.md"
        cards[form.keys] = " ".join(card.read_text().split())
    assert "a LoRA, `pytorch_lora_weights.safetensors`, stored in float32, in diffusers' keys." in cards["diffusers"]
    assert "a LoRA, `out.safetensors`, stored in bfloat16, in Kohya's keys, which" in cards["kohya"]
    assert 'load_lora_weights(student, weight_name="out.safetensors")' in cards["kohya"]
    assert "stored in float32, in keys that ComfyUI and diffusers read." in cards["comfyui"]
