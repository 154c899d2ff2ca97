import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from runs import tiny_config

from k_diffusion.config import load_config
from k_diffusion.data import stream, streamed, training_data


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The library, offline, and a data set of 23 rows in two parquet files."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    library.disable_progress_bars()
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(23)})
    (tmp_path / "d").mkdir()
    for name, part in ("0", range(12)), ("1", range(12, 23)):
        pictures = [Image.fromarray(np.full((8, 8), 10 * i, np.uint8)) for i in part]
        rows = {"image": pictures, "label": list(part)}
        data = library.Dataset.from_dict(rows, features=features)
        data.to_parquet(str(tmp_path / "d" / f"train-{name}.parquet"))
    return tmp_path / "d"


def made(location, **keys):
    section = {"type": "huggingface", "location": str(location), "streaming": True, **keys}
    section = {"num_classes": 23, "num_examples": 23, "shuffle_window": 5, **section}
    config = load_config({"model": tiny_config()["model"], "dataset": section})
    return training_data.make_training_data(config)


def test_rows_are_those_of_the_data_set(hub):
    data = made(hub)
    assert len(data) == 23
    for i in (0, 3, 4, 22, 1, 7):  # on, and back
        item = data[i, 0]
        assert (item["class"], item["index"]) == (i, i)
        assert round((item["original"][0, 0, 0].item() + 1) * 127.5) == 10 * i
    assert pickle.loads(pickle.dumps(data))[9, 0]["class"] == 9


def test_a_streamed_run_resumes_at_the_sample_and_reads_on_once_an_epoch(hub, monkeypatch):
    begun = []
    rows = streamed.StreamedRows.__getitem__

    def counted(self, index):
        before = self._rows
        row = rows(self, index)
        begun.extend([index] * (self._rows is not before))
        return row

    monkeypatch.setattr(streamed.StreamedRows, "__getitem__", counted)
    data = made(hub)

    def batches(start, n, workers=0):
        shares = stream.make_stream(data, 4, 3, start=start)
        loader = stream.make_loader(data, shares, workers, "fork")
        return [batch["class"].tolist() for batch in itertools.islice(iter(loader), n)]

    begun.clear()
    whole = batches(0, 23)  # four epochs
    assert len(begun) == 3  # beside the first, which the check of the data set began
    assert max(begun) < 5
    assert sorted(itertools.chain(*whole)) == sorted([*range(23)] * 4)
    flat = list(itertools.chain(*whole))
    assert [sorted(flat[i : i + 5]) for i in (0, 5, 10)] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14],
    ]  # fmt: skip
    assert flat[:23] != flat[23:46]
    assert batches(16, 6) == whole[4:10]
    assert batches(0, 8, workers=2) == whole[:8]
    shares = stream.make_stream(data, 4, 3)
    assert stream.make_loader(data, shares, 8, "fork").num_workers == 1


def test_the_order_of_an_epoch_of_one_window_is_the_plain_one():
    plain, window = (stream.Stream(20, 5, 7, window=w) for w in (None, 20))
    assert list(itertools.islice(plain, 9)) == list(itertools.islice(window, 9))


def test_another_row_of_the_window_stands_in_for_a_corrupt_one():
    rows = streamed.StreamedRows(range(23), 23, 5)
    assert [rows.after(i) for i in (0, 4, 21, 22)] == [1, 0, 22, 20]
    training = training_data.TrainingData(SimpleNamespace(data=rows, __len__=lambda: 23))
    assert training._after(4) == 0


def test_another_split_has_a_number_of_rows_of_its_own(hub):
    library = pytest.importorskip("datasets")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(23)})
    rows = {"image": [Image.new("L", (8, 8))] * 3, "label": [20, 21, 22]}
    library.Dataset.from_dict(rows, features=features).to_parquet(str(hub / "test-0.parquet"))
    splits = "".join(
        f"  - name: {k}\n    num_examples: {n}\n" for k, n in (("train", 23), ("test", 3))
    )
    (hub / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    section = {"type": "huggingface", "location": str(hub), "streaming": True, "num_classes": 23}
    loaded = load_config(
        {"model": tiny_config()["model"], "dataset": {**section, "num_examples": 23}}
    )
    for split, n in ("train", 23), ("test", 3):
        loaded["dataset"] = training_data.of_split(loaded["dataset"], split)
        data = training_data.make_training_data(loaded)
        assert (len(data), data[n - 1, 0]["class"]) == (n, 22)


def test_lengths_that_are_wrong_or_not_known(hub):
    with pytest.raises(ValueError, match="fewer than the 40 rows"):
        made(hub, num_examples=40)[39, 0]
    with pytest.raises(
        ValueError, match="dataset.num_examples: .* how many rows its split 'train' has"
    ):
        made(hub, num_examples=None)
    with pytest.raises(ValueError, match="no column 'picture' of images"):
        made(hub, image_key="picture")
