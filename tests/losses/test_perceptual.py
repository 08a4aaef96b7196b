"""Perceptual distances: closed form of the formula, the real networks' behaviour, weights by path."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from core.config import UserError
from core.losses.perceptual import VGG_FILE, EffnetDistance, LpipsDistance, PerceptualLoss, load_vgg


class Stages(nn.Module):
    """Stands for the network: its stages are the image and its mirror image."""

    def forward_intermediates(self, x: Tensor, intermediates_only: bool) -> list[Tensor]:
        return [x, x.flip(-1)]


@pytest.fixture(scope="module")
def effnet() -> EffnetDistance:
    return EffnetDistance()


def pixels(*colours: tuple[float, float, float]) -> Tensor:
    """Plain images whose normalised values have these directions."""
    normalised = torch.tensor(colours)[:, :, None, None].expand(-1, 3, 4, 4)
    return (normalised * 128 + 127) / 127.5 - 1


def test_distance_is_twice_one_minus_the_cosine_at_every_stage() -> None:
    distance = EffnetDistance(Stages())
    a, b = pixels((0.5, 0, 0), (0.3, 0.4, 0)), pixels((0.1, 0, 0), (0.4, 0, 0.3))
    cosines = torch.tensor([1.0, 0.12 / 0.25])
    torch.testing.assert_close(distance(a, b), 2 * 2 * (1 - cosines), rtol=1e-4, atol=1e-4)


def test_a_stronger_blur_is_farther_and_samples_do_not_mix(effnet: EffnetDistance) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = [nn.functional.avg_pool2d(image, k, stride=1, padding=k // 2) for k in (1, 3, 5)]
    together = effnet(torch.cat(blurred), image.expand(3, -1, -1, -1))
    assert together[0] == 0 and 0 < together[1] < together[2] < 4 * 5
    torch.testing.assert_close(effnet(blurred[2], image), together[2:], rtol=1e-4, atol=1e-5)


def test_loss_decodes_both_and_only_the_prediction_has_a_graph(effnet: EffnetDistance) -> None:
    graphs: list[bool] = []

    def decode(latents: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return latents.tanh()

    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(2, 3, 32, 32, generator=generator).requires_grad_() for _ in range(2))
    PerceptualLoss(effnet, decode)(pred, target).mean().backward()
    assert graphs == [False, True]
    assert pred.grad.abs().sum() > 0 and target.grad is None
    assert all(p.grad is None for p in effnet.parameters())


def test_lpips_takes_torchvisions_weights() -> None:
    import lpips

    torch.manual_seed(0)
    source = vgg16(weights=None).eval()
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    load_vgg(model.net, source.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.net(x).relu1_2, source.features[:4](x))
        torch.testing.assert_close(model.net(x).relu5_3, source.features[:30](x))


def test_missing_and_wrong_vgg_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"needs method.lpips_path: the file {VGG_FILE} of torchvision"):
        LpipsDistance(None)
    with pytest.raises(UserError, match=f"method.lpips_path=.*: no file {VGG_FILE} there"):
        LpipsDistance(tmp_path)
    (tmp_path / VGG_FILE).write_bytes(b"something else")
    with pytest.raises(UserError, match=f"is not {VGG_FILE}: its sha256 starts with"):
        LpipsDistance(tmp_path)
