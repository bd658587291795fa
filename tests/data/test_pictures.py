"""Training data: crops, epochs, streams of local parquet and webdataset shards, some of them damaged."""

import copy
import io
import itertools
import random
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.transforms import InterpolationMode, Resize

from diffusers_pq.data.conditions import caption_texts, class_names
from diffusers_pq.data.loaders import (
    BadImages,
    EpochSampler,
    SeededDataset,
    SeededStream,
    StreamPosition,
    build_train_loader,
)
from diffusers_pq.data.pictures import (
    INTERPOLATION_MODES,
    RESIZE_MODES,
    BadImageError,
    ConditionedCrops,
    Crops,
    PictureSource,
    usable_rows,
)
from diffusers_pq.images import to_tensor


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def noise(width, height, seed):
    generator = np.random.default_rng(seed)
    return PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey(level, side=16):
    """A picture that its level identifies."""
    return PIL.Image.new("RGB", (side, side), (level,) * 3)


def level(crops):
    return round((float(crops.mean()) + 1) * 127.5)


def undecoded(encoded):
    rows = {"image": [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(encoded)]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))


@pytest.fixture
def pictures():
    """Seven pictures of noise, one of them smaller than a crop of 16 pixels."""
    return undecoded([png(noise(41, 20, seed)) for seed in range(6)] + [png(noise(9, 7, 6))])


def test_the_middle_is_the_same_each_time_and_small_pictures_have_one():
    middle = Crops.middle("image", 16)
    native = Crops.middle("image", 16, "native", image_interpolation_mode="bilinear")
    for row in undecoded([png(noise(41, 20, 0)), png(noise(9, 7, 1))]):
        assert torch.equal(middle(row, random.Random(0)), middle(row, random.Random(1)))
        assert native(row, random.Random(0)).shape == (1, 3, 16, 16)
    picture = noise(40, 20, 0)
    (crop,) = native(undecoded([png(picture)])[0], random.Random(0))
    assert torch.equal(crop, to_tensor(picture.crop((12, 2, 28, 18))))
    (crop,) = middle(undecoded([png(picture)])[0], random.Random(0))
    assert torch.equal(crop, to_tensor(picture.resize((32, 16), PIL.Image.Resampling.BICUBIC).crop((8, 0, 24, 16))))


def test_crops_depend_on_epoch_index_and_seed_only(pictures):
    transform = Crops("image", 16, crops_per_image=3, random_flip=True, min_image_side=1)
    crops = SeededDataset(pictures, transform, seed=1)
    assert [tuple(crops[0, index].shape) for index in range(7)] == [(3, 3, 16, 16)] * 7
    first = crops[0, 2]
    assert torch.equal(crops[0, 2], first), "reading other crops in between changes nothing"
    for other in (crops[1, 2], SeededDataset(pictures, transform, seed=2)[0, 2]):
        assert not torch.equal(other, first)


def test_random_flip_mirrors_half_the_crops(pictures):
    crops = SeededDataset(pictures, Crops("image", 20, random_flip=True))
    plain = SeededDataset(pictures, Crops("image", 20))
    # Crops as high as the picture: a flip is then visible as a window that occurs mirrored only.
    windows = to_tensor(noise(41, 20, 0)).unfold(2, 20, 1).permute(2, 0, 1, 3)
    flipped = [not (windows == crops[epoch, 0]).flatten(1).all(1).any() for epoch in range(60)]
    assert 15 < sum(flipped) < 45
    assert all((windows == plain[epoch, 0]).flatten(1).all(1).any() for epoch in range(10))


def test_centre_crops_to_train_on_do_not_move(pictures):
    crops = Crops("image", 16, center_crop=True)
    first, second = (crops(pictures[0], random.Random(seed)) for seed in (0, 1))
    assert torch.equal(first, second)


def test_the_centre_is_the_centre():
    picture = PIL.Image.new("RGB", (41, 20))
    picture.putpixel((20, 10), (255, 255, 255))
    centre = Crops("image", 16, center_crop=True)(undecoded([png(picture)])[0], random.Random(0))
    assert centre.shape == (1, 3, 16, 16) and centre[0, 0].argmax() == 8 * 16 + 8


def test_epochs_follow_each_other_without_a_gap_and_can_be_entered_anywhere():
    items = list(itertools.islice(EpochSampler(5, seed=3), 17))
    assert [epoch for epoch, _ in items] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2
    orders = [[index for epoch, index in items if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    for start in (1, 5, 12):
        assert list(itertools.islice(EpochSampler(5, seed=3, start=start), 17 - start)) == items[start:]


def test_processes_share_out_the_items_of_one():
    alone = list(itertools.islice(EpochSampler(5, seed=3, start=2), 12))
    shares = [itertools.islice(EpochSampler(5, 3, 2, process, 3), 4) for process in range(3)]
    assert [item for items in zip(*shares) for item in items] == alone


def test_a_dataset_must_be_named_once():
    for sources in ((None, None), ("a", "b")):
        with pytest.raises(ValueError, match="exactly one of"):
            PictureSource(*sources)


DAMAGED, SMALL = 5, 11  # of 24 pictures, each of a level of its own


@pytest.fixture(scope="module")
def encoded():
    pictures = [png(grey(10 * number, 8 if number == SMALL else 16)) for number in range(24)]
    pictures[DAMAGED] = pictures[DAMAGED][:50]
    return pictures


GOOD_LEVELS = [10 * number for number in range(24) if number not in (DAMAGED, SMALL)]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, encoded):
    """Four parquet shards of six pictures."""
    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(4):
        undecoded(encoded[6 * shard : 6 * shard + 6]).to_parquet(folder / f"train-{shard}.parquet")
    return folder


@pytest.fixture(scope="module")
def webdataset(tmp_path_factory, encoded):
    """Four tars of six pictures."""
    folder = tmp_path_factory.mktemp("webdataset")
    for shard in range(4):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for number in range(6 * shard, 6 * shard + 6):
                info = tarfile.TarInfo(f"{number:03d}.png")
                info.size = len(encoded[number])
                tar.addfile(info, io.BytesIO(encoded[number]))
    return folder


def load_stream(folder, cache, column="image"):
    return PictureSource(str(folder), None, column, cache_dir=str(cache), streaming=True).load("train")


def streamed(stream, column="image", resolution=16, **options):
    return SeededStream(stream, Crops(column, resolution), **options)


def epoch_of(samples, count):
    return [level(crops) for crops in itertools.islice(samples, count)]


@pytest.mark.parametrize("column", ["image", "png"])
def test_an_epoch_of_a_stream_has_every_good_picture_once(column, request, tmp_path):
    folder = request.getfixturevalue("parquet" if column == "image" else "webdataset")
    samples = streamed(load_stream(folder, tmp_path, column), column, shuffle_buffer=7)
    levels = iter(epoch_of(samples, 3 * len(GOOD_LEVELS)))
    epochs = [list(itertools.islice(levels, len(GOOD_LEVELS))) for _ in range(3)]
    assert all(sorted(epoch) == GOOD_LEVELS for epoch in epochs)
    assert epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1], "shuffled, each epoch anew"
    assert samples.bad_images.counts.tolist() == [6], "two bad pictures in each of three epochs"


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 1), (2, 2), (3, 2)], ids=str)
def test_no_two_readers_see_the_same_picture_in_an_epoch(processes, workers, parquet, tmp_path, monkeypatch):
    # With three processes and two workers there are more readers than the four shards.
    stream = load_stream(parquet, tmp_path)
    seen = []
    for process, worker in itertools.product(range(processes), range(workers)):
        monkeypatch.setattr("diffusers_pq.data.loaders._reader", lambda worker=worker: (worker, workers))
        bad_images = BadImages("skip", workers)
        samples = streamed(stream, process_index=process, num_processes=processes, bad_images=bad_images)
        for crops in samples:
            if samples.state_dict()["epoch"] > 0:
                break
            seen.append(level(crops))
    assert sorted(seen) == GOOD_LEVELS


def skipped(state):
    """Sum of all numbers called so in a nested state."""
    if not isinstance(state, dict | list):
        return 0
    values = list(state.items()) if isinstance(state, dict) else list(enumerate(state))
    return sum(value if name == "skipped" else skipped(value) for name, value in values)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(workers, parquet, tmp_path):
    def loader():
        samples = streamed(load_stream(parquet, tmp_path), seed=1, shuffle_buffer=5, bad_images=BadImages("skip", 2))
        return StatefulDataLoader(samples, batch_size=2, num_workers=workers, generator=torch.Generator())

    accelerator = Accelerator(cpu=True)
    whole = loader()
    batches, states = [], []
    for batch in itertools.islice(whole, 40):
        batches.append(batch)
        states.append(copy.deepcopy(StreamPosition(whole, accelerator).state_dict()))
    for stop in (0, 3, 11, 25):
        resumed = loader()
        StreamPosition(resumed, accelerator).load_state_dict(states[stop])
        rest = list(itertools.islice(resumed, 39 - stop))
        assert all(torch.equal(found, expected) for found, expected in zip(rest, batches[stop + 1 :]))
        assert skipped(StreamPosition(resumed, accelerator).state_dict()) == skipped(states[-1]) > 0


def test_a_stream_refuses_a_position_of_other_readers(parquet, tmp_path):
    stream = load_stream(parquet, tmp_path)
    state = streamed(stream, num_processes=2).state_dict()
    with pytest.raises(ValueError, match="a stream with 2 readers, now there are 1"):
        streamed(stream).load_state_dict(state)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_is_left_of_a_damaged_shard_is_skipped(kind, request, tmp_path, caplog):
    whole = request.getfixturevalue(kind)
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    column = "image" if kind == "parquet" else "png"
    stream = load_stream(tmp_path, tmp_path / "cache", column)
    last = max(path for path in tmp_path.iterdir() if path.is_file())
    # A tar that is merely cut passes for one that ends there.
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 3] if kind == "parquet" else b"no tar" * 1000)
    samples = streamed(stream, column, shuffle_buffer=3)
    seen = []
    for crops in samples:
        if samples.state_dict()["epoch"] > 0:
            break
        seen.append(level(crops))
    assert set(GOOD_LEVELS[:16]) <= set(seen) <= set(GOOD_LEVELS) and len(seen) == len(set(seen)) < len(GOOD_LEVELS)
    assert "what is left of shard 3 of the dataset" in caplog.text
    raising = streamed(stream, column, bad_images=BadImages("raise"))
    with pytest.raises(BadImageError, match="what is left of shard 3|cannot be read|too small"):
        epoch_of(raising, 24)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_pictures_can_end_the_run_instead(streaming, encoded, parquet, tmp_path):
    dataset = PictureSource(str(parquet), cache_dir=str(tmp_path), streaming=streaming).load("train")
    loader = build_train_loader(dataset, Crops("image", 16), Accelerator(cpu=True), 1, on_bad_image="raise")
    with pytest.raises(BadImageError, match=r"(\.png cannot be read: )|(too small: 8 x 8, needs at least 16 a side)"):
        epoch_of(iter(loader), 24)


def test_a_dataset_replaces_bad_pictures_by_the_next_ones_and_counts_them(encoded):
    samples = SeededDataset(undecoded(encoded), Crops("image", 16))
    assert level(samples[0, DAMAGED]) == 10 * (DAMAGED + 1) and level(samples[0, SMALL]) == 10 * (SMALL + 1)
    assert samples.bad_images.total(Accelerator(cpu=True)) == 2
    nothing = SeededDataset(undecoded([encoded[DAMAGED]]), Crops("image", 16))
    with pytest.raises(ValueError, match="no picture that can be used"):
        nothing[0, 0]


def test_a_stream_without_good_pictures_ends_with_an_error(encoded):
    stream = undecoded([encoded[DAMAGED], encoded[SMALL]]).to_iterable_dataset()
    with pytest.raises(ValueError, match="no picture that can be used"):
        next(iter(streamed(stream)))


def test_an_imagefolder_can_be_streamed(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for number in range(5):
        grey(10 * number).save(tmp_path / "data" / "train" / f"{number}.png")
    stream = PictureSource(data_dir=str(tmp_path / "data"), streaming=True).load("train")
    assert sorted(epoch_of(streamed(stream), 5)) == [0, 10, 20, 30, 40]


def test_an_unknown_column_is_named(parquet, tmp_path):
    with pytest.raises(ValueError, match="no column 'picture'; the dataset has image"):
        load_stream(parquet, tmp_path, "picture")


def test_the_validation_leaves_out_what_cannot_be_read(encoded):
    rows = usable_rows(undecoded(encoded), "image", 6)
    assert [row["image"]["path"] for row in rows] == [f"{number}.png" for number in (0, 1, 2, 3, 4, 6)]


def test_small_pictures_are_enlarged_down_to_the_limit():
    row = {"image": {"bytes": png(grey(50, 8)), "path": None}}
    assert level(Crops("image", 16, min_image_side=8)(row, random.Random(0))) == 50
    with pytest.raises(BadImageError, match="a picture is too small"):
        Crops("image", 16, min_image_side=9)(row, random.Random(0))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_whose_pictures_are_all_too_small_names_the_flag_and_a_picture(streaming, tmp_path):
    for number in range(3):
        grey(number).save(tmp_path / f"{number}.png")
    images = PictureSource(data_dir=str(tmp_path), streaming=streaming).load("train")
    loader = build_train_loader(images, Crops("image", 32), Accelerator(cpu=True), 2)
    with pytest.raises(ValueError, match=r"`--min_image_side`, which is the resolution.*\.png is too small: 16 x 16"):
        next(iter(loader))


@pytest.mark.parametrize("value, texts", [("a", ["a"]), (None, []), ([], []), (["a", None, "b"], ["a", "b"])])
def test_captions_are_a_text_or_a_list_with_gaps(value, texts):
    assert caption_texts(value, "text") == texts


@pytest.mark.parametrize("value", [7, 0.5, {"en": "a"}, ["a", 7], True])
def test_captions_that_are_no_texts_name_their_column(value):
    with pytest.raises(ValueError, match="column 'caption' must be texts.* but one is"):
        caption_texts(value, "caption")


@pytest.mark.parametrize("values", [[0.0, 1.0], [[0], [1]], [{"id": 0}, {"id": 1}]], ids=["floats", "lists", "dicts"])
@pytest.mark.parametrize("names", [None, "names.txt"])
def test_classes_that_are_no_whole_numbers_or_strings_name_their_column(values, names):
    dataset = datasets.Dataset.from_dict({"label": values})
    with pytest.raises(ValueError, match="whole numbers or strings, but the column 'label' holds"):
        class_names(dataset, "label", names)


def test_sizes_say_where_a_crop_lies_in_the_resized_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "picture.png")
    row = {"image": {"path": str(tmp_path / "picture.png"), "bytes": None}}
    whole = to_tensor(PIL.Image.open(tmp_path / "picture.png"))
    seen = set()
    for seed in range(8):
        cut = Crops("image", 40, resize_mode="short_side", random_flip=True)
        crops = ConditionedCrops(cut, lambda row, generator: {"a": 1}, with_sizes=True)
        example = crops(row, random.Random(seed))
        height, width, top, left, *target = example["condition"]["sizes"].int().tolist()
        assert (height, width, top, *target) == (40, 60, 0, 40, 40) and example["condition"]["a"] == 1
        parts = {
            mirrored: picture[:, :, left : left + 40] for mirrored, picture in ((False, whole), (True, whole.flip(2)))
        }
        (mirrored,) = (name for name, part in parts.items() if torch.equal(part, example["pixel_values"]))
        seen.add(mirrored)
    assert seen == {False, True}


@pytest.mark.parametrize("mode", INTERPOLATION_MODES)
def test_stretched_pictures_are_whole_and_resized_as_the_papers_authors_do(mode):
    """Their loader: `transforms.Resize((R, R))` on Pillow's pictures, which is bilinear unless told otherwise."""
    picture = noise(301, 120, 0)
    crops = Crops("image", 24, resize_mode="stretch", image_interpolation_mode=mode)
    expected = to_tensor(Resize((24, 24), InterpolationMode(mode))(picture))
    for seed in (0, 1):
        assert torch.equal(crops(undecoded([png(picture)])[0], random.Random(seed))[0], expected)


def test_native_crops_are_not_resized_and_those_of_the_short_side_are():
    row = undecoded([png(noise(60, 40, 0))])[0]
    windows = to_tensor(noise(60, 40, 0)).unfold(1, 20, 1).unfold(2, 20, 1).permute(1, 2, 0, 3, 4)
    found = {}
    for mode in RESIZE_MODES:
        crop = Crops("image", 20, resize_mode=mode)(row, random.Random(0))[0]
        found[mode] = bool((windows == crop).flatten(2).all(2).any())
    assert found == {"native": True, "short_side": False, "stretch": False}
    smaller = to_tensor(noise(60, 40, 0).resize((30, 20), PIL.Image.Resampling.BILINEAR, reducing_gap=3.0))
    crop = Crops("image", 20, 1, "short_side", "bilinear", center_crop=True)(row, random.Random(0))[0]
    assert torch.equal(crop, smaller[:, :, 5:25])


@pytest.mark.parametrize("labels", [[0, 10**9], [-1, 3]])
def test_absurd_labels_are_refused_before_a_table_of_them_is_made(labels):
    dataset = datasets.Dataset.from_dict({"label": labels})
    with pytest.raises(ValueError, match=f"'label' range from {labels[0]} to {labels[1]}, but must lie in"):
        class_names(dataset, "label")
