"""Pictures of several proportions: each batch is of one, and a run goes on where it was."""

import io
import itertools
import logging
import random

import datasets
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from test_pictures import noise, png, undecoded

from diffusers_pq.data.loaders import GroupBatchSampler, build_train_loader, change_data
from diffusers_pq.data.pictures import BadImageError, BucketCrops, ConditionedCrops, aspect_ratio_buckets, picture_size


BUCKETS = [(16, 16), (12, 24), (24, 12)]


def turned():
    """40 x 20 as stored, upright 20 x 40."""
    exif, buffer = PIL.Image.Exif(), io.BytesIO()
    exif[274] = 6
    noise(40, 20, 0).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.fixture
def pictures():
    sizes = [(40, 20), (20, 20), (20, 40), (38, 20), (21, 20), (20, 38), (41, 20)]
    return undecoded([png(noise(*size, seed)) for seed, size in enumerate(sizes)] + [b"no picture", turned()])


def take(loader, count):
    return [batch["pixel_values"] for batch in itertools.islice(loader, count)]


def conditioned(crops):
    return ConditionedCrops(crops, lambda row, generator: {"none": torch.tensor(0)})


def test_buckets_have_about_the_pixels_of_the_square_and_allowed_sides():
    for height, width in aspect_ratio_buckets(1024, 64):
        assert height % 64 == width % 64 == 0 and abs(height * width / 1024**2 - 1) < 0.1
        assert 0.45 < height / width < 2.2
    assert aspect_ratio_buckets(512, 16, [(768, 1344), (1024, 1024)]) == [(384, 672), (512, 512)]


def test_the_size_is_known_from_the_header_and_upright():
    rows = undecoded([png(noise(30, 20, 0)), turned(), b"no picture"])["image"]
    assert picture_size(rows[0]) == (30, 20) and picture_size(rows[1]) == (20, 40)
    with pytest.raises(BadImageError, match="2.png cannot be read"):
        picture_size(rows[2])


def test_pictures_go_to_the_bucket_of_their_proportions(pictures, caplog):
    crops = BucketCrops("image", 16, buckets=BUCKETS)
    with caplog.at_level(logging.WARNING):
        groups = crops.groups(pictures)
    assert groups == [1, 0, 2, 1, 0, 2, 1, None, 2] and "Left out: 7.png cannot be read" in caplog.text
    for index in (0, 1, 2, 8):
        crop, sizes = crops.with_sizes(pictures[index], random.Random(0))
        assert tuple(crop.shape[1:]) == BUCKETS[groups[index]] == tuple(sizes[-2:].int().tolist())
    # 40 x 20 shrinks to 24 x 12 whole.
    assert crops.with_sizes(pictures[0], random.Random(0))[1].tolist() == [20, 40, 0, 0, 12, 24]


def test_what_would_be_enlarged_is_too_small_unless_allowed(pictures):
    row = undecoded([png(noise(22, 11, 0))])[0]
    with pytest.raises(BadImageError, match="0.png is too small: 22 x 11, needs 24 x 12"):
        BucketCrops("image", 16, buckets=BUCKETS)(row, random.Random(0))
    crop = BucketCrops("image", 16, buckets=BUCKETS, min_image_side=8)(row, random.Random(0))
    assert crop.shape == (1, 3, 12, 24)


def test_batches_are_of_one_group_and_nothing_is_dropped():
    groups = [0, 1, 0, None, 2, 1, 0]
    batches = list(itertools.islice(GroupBatchSampler(groups, 2, seed=1), 30))
    assert all(len({groups[index] for _, index in batch}) == 1 for batch in batches)
    seen = [item for batch in batches for item in batch]
    assert len(set(seen)) == len(seen) == 60
    complete = {(epoch, index) for epoch in range(8) for index in (0, 1, 2, 5, 6)}
    assert complete <= set(seen), "waiting pictures are in later batches"
    for start in (2, 10, 34):
        rest = list(itertools.islice(GroupBatchSampler(groups, 2, seed=1, start=start), 10))
        assert rest == batches[start // 2 : start // 2 + 10]
    shares = [itertools.islice(GroupBatchSampler(groups, 2, 1, 4, process, 3), 4) for process in range(3)]
    assert [batch for turn in zip(*shares) for batch in turn] == batches[2:14]
    with pytest.raises(ValueError, match="no picture that can be used"):
        GroupBatchSampler([None, None], 2)


def test_a_bad_picture_is_replaced_by_one_of_its_group(pictures):
    crops = BucketCrops("image", 16, buckets=BUCKETS)
    damaged = pictures.to_list()
    data = damaged[3]["image"]["bytes"]
    damaged[3]["image"]["bytes"] = data[: len(data) // 2]  # the header is whole
    rows = datasets.Dataset.from_list(damaged, features=pictures.features)
    transform = conditioned(crops)
    loader = build_train_loader(rows, transform, Accelerator(cpu=True), 2, seed=0, groups=transform.groups(rows))
    shapes = {tuple(batch.shape) for batch in take(loader, 12)}
    assert shapes == {(2, 3, *bucket) for bucket in BUCKETS} and loader.dataset.bad_images.counts.sum() > 0


def test_a_loader_goes_on_with_other_buckets(pictures):
    first, second = (conditioned(BucketCrops("image", 16, buckets=buckets)) for buckets in (BUCKETS, [(8, 16)]))
    accelerator = Accelerator(cpu=True)
    loader = build_train_loader(pictures, first, accelerator, 2, seed=3, groups=first.groups(pictures))
    take(loader, 3)
    groups = second.groups(pictures)
    change_data(loader, pictures, second, 6, groups)
    expected = build_train_loader(pictures, second, accelerator, 2, seed=3, start=6, groups=groups)
    assert all(torch.equal(one, other) for one, other in zip(take(loader, 4), take(expected, 4), strict=True))
