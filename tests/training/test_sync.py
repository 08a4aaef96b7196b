"""Between two log points the step never waits for the device: no tensor becomes a number of the host."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import worlds

OURS = ("core.", "tests.")
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero")
COPIES = ("cpu", "cuda")
FLASH = ["method.adversarial_weight=[.1,.1,.1,.1]", "method.dmd_weight=[.3,.3,.3,.3]"]
DMD2 = ["method.regression_weight=0.25", "method.regression_steps=4"]
IMAGES = ["method.gan=effnet_lite1", "method.ttur=1", "execution.activation_checkpointing=true"]
CASES = [
    ("flash/tiny", "unet", FLASH), ("dmd2/tiny", "unet", DMD2), ("dmd2/tiny", "flux2", DMD2),
    ("dmd2/tiny", "unet", IMAGES),
]  # fmt: skip
OPTIONS = ["train.ema_decay=0.9", "train.lr_decay=0.5", "execution.micro_batch=2", "execution.log_every_images=1000"]


def forbid_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody may look into a tensor."""
    for name in READS:

        def read(self: torch.Tensor, *given: object, name: str = name) -> None:
            raise AssertionError(f"Tensor.{name} in a training step")

        monkeypatch.setattr(torch.Tensor, name, read)
    for name in COPIES:
        copy = getattr(torch.Tensor, name)

        def copied(self: torch.Tensor, *given: object, copy: Callable = copy, name: str = name) -> object:
            caller = sys._getframe(1).f_globals["__name__"]
            assert not caller.startswith(OURS), f"{caller}: Tensor.{name} in a training step"
            return copy(self, *given)

        monkeypatch.setattr(torch.Tensor, name, copied)
    to = torch.Tensor.to

    def move(self: torch.Tensor, *given: object, **named: object) -> torch.Tensor:
        device = named.get("device", given[0] if given and isinstance(given[0], torch.device | str) else None)
        if device is not None and not named.get("non_blocking"):  # libraries ask for the device where a tensor is
            caller = sys._getframe(1).f_globals["__name__"]
            assert not caller.startswith(OURS), f"{caller}: a copy to a device waits for it in a training step"
        return to(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", move)
    for name in ("tensor", "as_tensor"):
        make = getattr(torch, name)

        def made(*given: object, make: Callable = make, name: str = name, **named: object) -> torch.Tensor:
            assert named.get("device") is None, f"torch.{name} on a device waits for it in a training step"
            return make(*given, **named)

        monkeypatch.setattr(torch, name, made)


@pytest.mark.parametrize(("experiment", "family", "settings"), CASES)
def test_no_tensor_is_turned_into_a_number_in_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, family: str, settings: list[str]
) -> None:
    trained = worlds.trainer(tmp_path, [*settings, *OPTIONS], experiment=experiment, family=family)
    trained._iteration()  # what is computed once: tables on the device, moments
    with monkeypatch.context() as patch:
        forbid_reads(patch)
        trained._iteration()
        trained._iteration()
    assert trained.clock.iteration == 3


def test_the_guard_sees_a_copy_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        forbid_reads(patch)
        torch.zeros(1).to("cpu", non_blocking=True)
        for wait in (lambda: torch.zeros(1).to("cpu"), lambda: torch.tensor([0], device="cpu")):
            with pytest.raises(AssertionError, match="waits for it in a training step"):
                wait()
        for wait in (lambda: torch.zeros(1).cpu(), lambda: torch.ones(1).nonzero()):
            with pytest.raises(AssertionError, match="in a training step"):
                wait()


def test_the_guard_sees_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = worlds.trainer(tmp_path, OPTIONS)
    losses = trained.method.losses
    trained.method.losses = lambda *given: {name: term for name, term in losses(*given).items() if term > -1}
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="Tensor.__bool__ in a training step"):
        forbid_reads(patch)
        trained._iteration()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("experiment", "family", "settings"), CASES)
def test_no_host_synchronisation_on_cuda(tmp_path: Path, experiment: str, family: str, settings: list[str]) -> None:
    trained = worlds.trainer(tmp_path, [*settings, *OPTIONS], experiment=experiment, family=family, device="cuda")
    trained._iteration()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained._iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")
