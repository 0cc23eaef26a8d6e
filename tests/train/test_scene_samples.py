import numpy as np
import pytest

from tinyvit.image_spec import ImageSpec
from tinyvit.train.data.masks import open_mask_set
from tinyvit.train.tasks.segment import SceneSampler, collate_scenes

from .shapes import write_shapes


@pytest.fixture
def data(tmp_path):
    return open_mask_set(write_shapes(tmp_path, 2))


def test_few_objects_come_again_with_other_prompts(data):
    sampler = SceneSampler(data, ImageSpec.sam(64), None, objects=5, least_pixels=4)
    sample = sampler.sample(0, np.random.default_rng(0))
    assert sample.masks.shape == (5, 64, 64)
    assert sample.size == (48, 64)
    assert not sample.masks[:, 48:].any()
    assert len(np.unique(sample.masks.reshape(5, -1), axis=0)) == 2
    assert len(np.unique(sample.boxes, axis=0)) == 5


def test_small_objects_are_left_out_where_larger_ones_are(data):
    areas = data[0].load()[1].sum((1, 2))
    between = int(areas.mean())
    sampler = SceneSampler(data, ImageSpec.sam(64), None, objects=4, least_pixels=between)
    sample = sampler.sample(0, np.random.default_rng(0))
    assert set(sample.masks.sum((1, 2))) == {areas.max()}
    none = SceneSampler(data, ImageSpec.sam(64), None, objects=4, least_pixels=10**6)
    assert none.sample(0, np.random.default_rng(0)).masks.any((1, 2)).all()


def test_a_batch_has_the_images_first(data):
    sampler = SceneSampler(data, ImageSpec.sam(32), objects=3, least_pixels=1)
    batch = collate_scenes([sampler.sample(i, np.random.default_rng(i)) for i in (0, 1)])
    shapes = {name: tuple(v.shape) for name, v in batch.items() if name != "broken"}
    assert shapes == {
        "index": (2,),
        "images": (2, 3, 32, 32),
        "sizes": (2, 2),
        "masks": (2, 3, 32, 32),
        "points": (2, 3, 2),
        "boxes": (2, 3, 4),
    }
    assert batch["broken"] == {}


def test_images_that_are_cropped_are_refused(data):
    with pytest.raises(ValueError, match="fitted by their longest side, not 'crop'"):
        SceneSampler(data, ImageSpec.timm(224))
