import os
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from k_diffusion import utils
from k_diffusion.common import images
from k_diffusion.data import datasets, stream, training_data, transforms

# ------------------------------------------------------------------------- the stream


def draws(length, batch_size, n, **kwargs):
    return list(islice(stream.Stream(length, batch_size, seed=7, **kwargs), n))


def test_an_epoch_is_a_permutation_and_epochs_differ():
    flat = [draw for batch in draws(10, 5, 6) for draw in batch]
    epochs = [[index for index, _ in flat[i : i + 10]] for i in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    seeds = [seed for _, seed in flat]
    assert len(set(seeds)) == 30


def test_the_stream_goes_on_from_any_position():
    whole = [draw for batch in draws(7, 3, 20) for draw in batch]
    for start in 1, 7, 26:
        parts = [draw for batch in draws(7, 3, 5, start=start) for draw in batch]
        assert parts == whole[start : start + 15]


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 3), (3, 2), (6, 1)])
def test_processes_share_out_the_stream_of_one(processes, batch_size):
    alone = draws(13, 6, 8)
    shares = [draws(13, batch_size, 8, process=i, processes=processes) for i in range(processes)]
    together = [[draw for share in step for draw in share] for step in zip(*shares)]
    assert together == alone


def test_seeds_give_other_orders():
    one, other = (next(iter(stream.Stream(50, 50, seed))) for seed in (1, 2))
    assert one != other


def test_a_data_set_smaller_than_a_batch_is_refused():
    assert len(draws(4, 4, 1)[0]) == 4
    with pytest.raises(ValueError, match=r"has 3 images, fewer than one batch of 4; .*size 3"):
        stream.Stream(3, 4, 0)
    with pytest.raises(ValueError, match="on each of 2 processes; pass --batch-size 3"):
        stream.Stream(7, 4, 0, process=1, processes=2)


def test_derived_seeds():
    seeds = [stream.derive_seed(*parts) for parts in ((1, 2), (2, 1), (1,), (1, 3), (1, 2, 3))]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream.derive_seed(1, 2) == seeds[0]


# ------------------------------------------------------------------------- images


def gradient(h, w, mode="RGB"):
    y, x = np.mgrid[:h, :w]
    pixels = np.stack([y * 255 // max(h - 1, 1), x * 255 // max(w - 1, 1), 0 * x], -1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_modes_and_range(channels, mode):
    for stored in "L", "RGB", "RGBA", "P":
        image, original, aug = transforms.ImageTransform((4, 6), channels)(gradient(4, 6, stored))
        assert image.shape == original.shape == (channels, 4, 6)
        assert image.min() >= -1
        assert image.max() <= 1
        assert torch.equal(aug, torch.zeros(9))
    want = utils.from_pil_image(gradient(4, 6, mode))
    assert torch.equal(transforms.ImageTransform((4, 6), channels)(gradient(4, 6, mode))[0], want)


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "16.png")
    image = transforms.ImageTransform((16, 16), 1)(Image.open(tmp_path / "16.png"))[0]
    want = utils.from_pil_image(Image.fromarray(levels.astype(np.uint8)))
    assert torch.equal(image, want)


def test_other_sizes_are_scaled_to_cover_and_cropped_around_the_centre():
    """16 x 12 to 4 x 4: rows of the whole height would need a width of 3, so it's columns."""
    image = transforms.ImageTransform((4, 4), 3)(gradient(16, 12))[0]
    rows, columns = image[0].mean(1), image[1].mean(0)
    assert image.shape == (3, 4, 4)
    # all columns, from end to end; of the rows the middle three quarters
    assert columns[0] == pytest.approx(-1 + 2 * 1 / 11, abs=0.05)
    assert rows[0] == pytest.approx(-1 + 2 * 3 / 15, abs=0.05)
    assert torch.allclose(rows, -rows.flip(0), atol=0.02)


def test_crops_anywhere_and_flips_of_every_other_image():
    columns = Image.fromarray(np.asarray(gradient(8, 40))[..., 1])
    where = {"crop": [], "flip": []}
    plain = transforms.ImageTransform((8, 8), 1)(columns)[1]
    for seed in range(60):
        torch.manual_seed(seed)
        cropped = transforms.ImageTransform((8, 8), 1, random_crop=True)(columns)[1]
        torch.testing.assert_close(
            cropped - cropped.mean(), plain - plain.mean(), rtol=0, atol=0.02
        )
        where["crop"].append(cropped.mean().item())
        torch.manual_seed(seed)
        flipped = transforms.ImageTransform((8, 8), 1, horizontal_flip=True)(columns)[1]
        mirrored = torch.equal(flipped, plain.flip(2))
        assert mirrored or torch.equal(flipped, plain)
        where["flip"].append(mirrored)
    middles = np.array(where["crop"])  # from that of the first to that of the last eight columns
    assert middles.min() < -0.7
    assert middles.max() > 0.7
    assert abs(middles.mean()) < 4 * 0.9 / np.sqrt(3 * 60)
    assert 14 < sum(where["flip"]) < 46


@pytest.mark.parametrize("turned", [False, True])
def test_jpegs_twice_as_large_as_needed_are_decoded_smaller(tmp_path, turned):
    y, x = np.mgrid[:96, :160]
    pixels = 128 + 60 * np.sin(x / 25) + 60 * np.cos(y / 19 + x / 60)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    picture = Image.fromarray(pixels.astype(np.uint8))
    if turned:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    picture.save(tmp_path / "0.jpg", quality=95, exif=exif)
    picture.save(tmp_path / "1.png", exif=exif)
    sizes = {}
    for size in (96, 160), (48, 80), (47, 81), (40, 60), (24, 40), (12, 20), (5, 5):
        decoded = [images.open_image(tmp_path / name, None, size) for name in ("0.jpg", "1.png")]
        sizes[size] = decoded[0].size
        assert decoded[1].size == (160, 96)
        draft, exact = (
            datasets.FolderOfImages(
                tmp_path, transforms.ImageTransform(size, 1, jpeg_draft=on), mode=None
            )[0][0][0]
            for on in (True, False)
        )
        assert (draft - exact).abs().max() < 0.03
        assert torch.equal(draft, exact) == (decoded[0].size == (160, 96))
    assert sizes == {
        (96, 160): (160, 96), (48, 80): (80, 48), (47, 81): (160, 96), (40, 60): (80, 48),
        (24, 40): (40, 24), (12, 20): (20, 12), (5, 5): (20, 12),
    }  # fmt: skip


def test_channels_that_no_image_has():
    with pytest.raises(ValueError, match="input_channels is 5"):
        transforms.ImageTransform((4, 4), 5)


# ------------------------------------------------------------------------- items


class Folder(Dataset):
    """Numbers for images, drawn upon; those in `corrupt` can't be read."""

    def __init__(self, n=10, corrupt=(), label=lambda i: i % 3):
        self.n, self.corrupt, self.label = n, corrupt, label

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.corrupt:
            error = utils.CorruptImageError(f"can't read the image /x/{index}.png: no")
            error.filename = f"/x/{index}.png"
            raise error
        drawn = torch.full((1, 2, 2), float(index)) + torch.rand(1, 2, 2)
        return (drawn, drawn, torch.zeros(9)), self.label(index)


def test_a_lost_image_is_skipped_and_named_like_a_corrupt_one():
    class Lost(Folder):
        def __getitem__(self, index):
            (image, *rest), label = super().__getitem__(index)
            return (image * (float("nan") if index == 4 else 1), *rest), label

    item = training_data.TrainingData(Lost())[4, 0]
    assert item["index"] == 5
    assert 5 <= item["image"].min() < 6
    assert item["skipped"] == "item 4, which is NaN or infinite somewhere"
    with pytest.raises(utils.CorruptImageError, match="item 4 of the data set is NaN or infinite"):
        training_data.TrainingData(Lost(), strict=True)[4, 0]


def test_an_item_depends_on_its_index_and_seed_alone():
    training = training_data.TrainingData(Folder(), num_classes=3)
    torch.manual_seed(5)
    one = training[4, 99]
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == after  # drawing an item leaves the global generator alone
    both = training.__getitems__([(3, 98), (4, 99)])
    assert torch.equal(both[1]["image"], one["image"])
    assert both[1]["class"] == 1
    assert not torch.equal(training[4, 100]["image"], one["image"])


def test_corrupt_images_are_stood_in_for_by_the_next_one():
    training = training_data.TrainingData(Folder(corrupt={8, 9}), num_classes=3)
    item = training[8, 1]
    assert item["skipped"] == "/x/8.png\n/x/9.png"
    assert torch.equal(item["image"], training[0, 1]["image"].clone())
    assert item["class"] == 0
    assert training[1, 1]["skipped"] == ""


def test_strict_data_stops_and_so_does_a_folder_of_none():
    with pytest.raises(utils.CorruptImageError, match=r"/x/8.png"):
        training_data.TrainingData(Folder(corrupt={8}), strict=True)[8, 1]
    with pytest.raises(utils.CorruptImageError):
        training_data.TrainingData(Folder(corrupt=range(10)))[8, 1]


@pytest.mark.parametrize("label", [3, -1])
def test_classes_out_of_range(label):
    training = training_data.TrainingData(Folder(label=lambda i: label), num_classes=3)
    with pytest.raises(ValueError, match=f"item 2 .* class {label}, outside of 0 to 2"):
        training[2, 0]


@pytest.mark.parametrize("key", [2, "label"])
def test_missing_classes(key):
    with pytest.raises(ValueError, match=r"no class id at .* set dataset.class_key"):
        training_data.TrainingData(Folder(), num_classes=3, class_key=key)[2, 0]


def test_images_that_the_transform_was_not_applied_to():
    class Raw(Folder):
        def __getitem__(self, index):
            return (gradient(4, 4),)

    with pytest.raises(ValueError, match="no image that `transform` was applied to at 0"):
        training_data.TrainingData(Raw())[2, 0]


class Pictures(Dataset):
    """Pictures, some of which can't be read, as a transform leaves them."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 5:
            raise utils.CorruptImageError("no")
        return (self.transform(gradient(9, 12 + index)),)


def test_batches_are_augmented_as_their_images_are_one_by_one():
    alone, later = (
        transforms.ImageTransform((10, 8), 3, 0.4, random_crop=True, later=later)
        for later in (False, True)
    )
    together = training_data.TrainingData(Pictures(later), transform=later)
    alone = training_data.TrainingData(Pictures(alone))
    draws = [(i, 70 + i) for i in range(12)]
    for a, b in zip(together.__getitems__(draws), alone.__getitems__(draws), strict=True):
        assert a.keys() == b.keys()
        assert (a["index"], a["skipped"]) == (b["index"], b["skipped"])
        assert torch.equal(a["aug_cond"], b["aug_cond"])
        assert torch.equal(a["original"], b["original"])
        torch.testing.assert_close(a["image"], b["image"], rtol=0, atol=2e-6)


# ------------------------------------------------------------------------- loading


def loaded(n, num_workers=0, **kwargs):
    training = training_data.TrainingData(Folder(11), num_classes=3)
    loader = stream.make_loader(training, stream.Stream(11, 4, 1, **kwargs), num_workers, "fork")
    return [
        (batch["image"], batch["original"], batch["class"]) for batch in islice(iter(loader), n)
    ]


def test_workers_change_nothing_of_the_data():
    alone = loaded(6)
    for a, b in (alone, loaded(6, num_workers=2)), (alone[2:], loaded(4, 2, start=8)):
        assert all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q))


def test_signals_to_the_group_do_not_reach_workers():
    class Session(Folder):
        def __getitem__(self, index):
            item, _ = super().__getitem__(index)
            return item, int(os.getsid(0) == os.getpid())

    training = training_data.TrainingData(Session(), num_classes=3)
    batch = next(iter(stream.make_loader(training, stream.Stream(10, 4, 1), 1, "fork")))
    assert batch["class"].tolist() == [1, 1, 1, 1]


def test_data_sets_in_memory_have_workers_where_they_are_augmented(monkeypatch):
    monkeypatch.setattr(stream.memory, "cores", lambda: 3)

    def loader(num_workers, augment_prob=0.5):
        transform = transforms.ImageTransform((10, 8), 3, augment_prob, later=True)
        pictures = Pictures(transform)
        pictures.in_memory = True
        training = training_data.TrainingData(pictures, transform=transform)
        return stream.make_loader(training, stream.Stream(12, 4, 1), num_workers, "fork")

    assert [loader(8).num_workers, loader(1).num_workers, loader(8, 0.0).num_workers] == [2, 1, 0]
    for processes, workers in (1, 2), (2, 0):  # on this machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loader(8).num_workers == workers
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    made = [[batch["image"] for batch in islice(iter(loader(n)), 4)] for n in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_are_sentences(num_workers):
    training = training_data.TrainingData(Folder(label=lambda i: 7), num_classes=3)
    loader = stream.make_loader(training, stream.Stream(10, 10, 1), num_workers, "fork")
    with pytest.raises(ValueError, match=r"^item \d of the data set has class 7, outside of 0"):
        next(stream.checked(loader, lambda *seen: None))


def test_each_batch_is_reported_with_the_time_it_was_waited_for(monkeypatch):
    now, seen = [0.0], []
    monkeypatch.setattr(stream.time, "monotonic", lambda: now[0])

    def batches():
        for i in 1, 2:
            now[0] += i
            yield {"a": i}

    for _ in stream.checked(batches(), lambda *batch: seen.append(batch)):
        now[0] += 100  # a step
    assert seen == [({"a": 1}, 1.0), ({"a": 2}, 2.0)]


@pytest.mark.parametrize(
    "said",
    [
        "DataLoader worker (pid 3) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 3, 4) exited unexpectedly",
    ],
)
def test_a_killed_worker_is_a_sentence(said):
    def batches():
        yield {"a": 1}
        raise RuntimeError(said)

    stream_of_batches = stream.checked(batches(), lambda *seen: None)
    next(stream_of_batches)
    with pytest.raises(OSError, match=r"a loading process was killed.*smaller --num-workers"):
        next(stream_of_batches)


def test_other_errors_of_batches_stay_as_they_are():
    def batches():
        raise RuntimeError("shapes differ")
        yield

    with pytest.raises(RuntimeError, match="shapes differ"):
        next(stream.checked(batches(), lambda *seen: None))
