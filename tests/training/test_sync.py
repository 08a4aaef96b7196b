"""Between two log points the step never waits for the device: no tensor becomes a number of the host."""

from pathlib import Path

import pytest
import torch

from tests import worlds

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")
EXPERIMENTS = {
    "flash/tiny": ["method.adversarial_weight=[.1,.1,.1,.1]", "method.dmd_weight=[.3,.3,.3,.3]"],
    "dmd2/tiny": ["method.regression_weight=0.25", "method.regression_steps=4"],
}
OPTIONS = ["train.ema_decay=0.9", "train.lr_decay=0.5", "execution.micro_batch=2", "execution.log_every_images=1000"]


def forbid_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody may look into a tensor."""
    for name in READS:

        def read(self: torch.Tensor, *given: object, name: str = name) -> None:
            raise AssertionError(f"Tensor.{name} in a training step")

        monkeypatch.setattr(torch.Tensor, name, read)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_tensor_is_turned_into_a_number_in_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    trained = worlds.trainer(tmp_path, [*EXPERIMENTS[experiment], *OPTIONS], experiment=experiment)
    trained._iteration()  # what is computed once: tables on the device, moments
    with monkeypatch.context() as patch:
        forbid_reads(patch)
        trained._iteration()
        trained._iteration()
    assert trained.clock.iteration == 3


def test_the_guard_sees_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = worlds.trainer(tmp_path, OPTIONS)
    losses = trained.method.losses
    trained.method.losses = lambda *given: {name: term for name, term in losses(*given).items() if term > -1}
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="Tensor.__bool__ in a training step"):
        forbid_reads(patch)
        trained._iteration()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_host_synchronisation_on_cuda(tmp_path: Path, experiment: str) -> None:
    trained = worlds.trainer(tmp_path, [*EXPERIMENTS[experiment], *OPTIONS], experiment=experiment, device="cuda")
    trained._iteration()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained._iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")
