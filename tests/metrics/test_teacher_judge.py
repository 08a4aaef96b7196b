"""The distilled backbone's own features as a judge, on the embedded teacher and real emoji."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from core.backbones.base import STUDENT
from core.config import compose, resolve
from core.data.requests import reference_images
from core.data.shards import open_dataset
from core.identity import locate
from core.metrics.fid import kernel_distance, teacher_extractor
from experiments.build import build_backbone, build_method, build_task

NUM_IMAGES = 96


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    config = compose("flash/emoji")
    dataset = open_dataset(locate(config.data.path), "train")
    return np.stack(list(reference_images(dataset, build_task(config).item, NUM_IMAGES)))


def test_it_tells_blur_by_its_strength_and_is_the_teacher_s_alone(real: np.ndarray) -> None:
    config = resolve(compose("flash/emoji", ["train.precision=fp32"]))
    method = build_method(config, build_backbone(config), training=False)
    judge = teacher_extractor(method.backbone, "weights")
    features = judge(real)
    assert features.shape == (NUM_IMAGES, method.backbone.feature_shape[0]) and features.dtype == np.float32
    np.testing.assert_allclose((features**2).mean(axis=1), 1.0, rtol=1e-5)
    assert not method.backbone.evaluations, "judging is not training"

    def blurred(radius: float) -> np.ndarray:
        return np.stack([Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)) for image in real])

    halves = slice(0, None, 2), slice(1, None, 2)  # the same pictures at each strength: their own spread cancels
    clear = kernel_distance(features[halves[0]], features[halves[1]])
    distances = [kernel_distance(judge(blurred(r)[halves[0]]), features[halves[1]]) for r in (0.7, 1.5, 3.0)]
    assert sorted([clear, *distances]) == [clear, *distances] and distances[2] - clear > 0.02, (clear, distances)

    with torch.no_grad():
        for parameter in method.backbone.role_parameters(STUDENT).values():
            parameter.add_(1.0)
    np.testing.assert_array_equal(judge(real), features)
