from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

import k_diffusion as K
from k_diffusion.training import validation


class Accelerator:
    """One of so many processes, which all have the same loss."""

    device = torch.device("cpu")

    def __init__(self, processes=1, index=0):
        self.num_processes, self.process_index, self.said = processes, index, []

    def reduce(self, x, reduction):
        return x

    def autocast(self):
        return nullcontext()

    def gather(self, x):
        return x

    def print(self, text):
        self.said.append(text)


def make(accelerator=None, config=None, **flags):
    args = {"validate_every": 1, "validate_n": 24, "batch_size": 8, "config": Path("x.json")}
    config = config or runs.tiny_config(dataset={"split": "train"})
    return validation.make_validation(
        accelerator or Accelerator(), Namespace(**{**args, **flags}), config
    )


class Denoiser:
    """Whose loss is what the batch was: the images' means and the noise levels."""

    inner_model = SimpleNamespace(takes_aug_cond=False)

    def loss(self, image, noise, sigma, class_cond):
        return 100 * sigma + image.mean((1, 2, 3)) + 1e-3 * noise.mean((1, 2, 3)) + class_cond


def uniform(shape):
    return K.densities.stratified_with_settings(shape)


def test_it_is_the_same_each_time_and_touches_no_other_random_number():
    measured = make()
    assert (measured.n, len(measured.batches)) == (24, 3)
    state = torch.get_rng_state()
    first = measured.loss(Denoiser(), uniform)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert measured.loss(Denoiser(), uniform) == first


def test_noise_levels_are_stratified_over_all_batches():
    drawn = []

    def density(shape):
        drawn.append(uniform(shape))
        return drawn[-1]

    make().loss(Denoiser(), density)
    found = (torch.cat(drawn) * 24).long().sort().values
    assert found.tolist() == list(range(24))


def test_processes_have_as_many_batches_and_share_what_one_has():
    alone = make(validate_n=50)
    assert (alone.n, len(alone.batches)) == (48, 6)
    shares = [make(Accelerator(2, i), validate_n=50) for i in range(2)]
    assert [len(share.batches) for share in shares] == [3, 3]
    for i, batch in enumerate(alone.batches):
        assert torch.equal(batch["index"], shares[i % 2].batches[i // 2]["index"])
    losses = [share.loss(Denoiser(), uniform) for share in shares]
    assert sum(losses) / 2 == pytest.approx(alone.loss(Denoiser(), uniform))
    few = [make(Accelerator(2, i), validate_n=6) for i in range(2)]
    assert [len(batch["index"]) for share in few for batch in share.batches] == [3, 3]


def test_the_images_are_those_held_out():
    config = runs.tiny_config(dataset={"split": "test"})
    test = K.data.training_data.make_training_data(config)
    measured = make(validate_n=10**6)
    seen = torch.cat([batch["image"] for batch in measured.batches])
    known = torch.stack([test[i, 0]["image"] for i in range(len(test))])
    assert len(seen) == len(known) // 8 * 8
    assert {x.numpy().tobytes() for x in seen} <= {x.numpy().tobytes() for x in known}


def test_a_streamed_sets_number_of_rows_is_of_the_split_that_it_trains_on(monkeypatch):
    read = []

    def make_data(config, *args, **kwargs):
        read.append(config["dataset"])
        raise ValueError("offline")

    monkeypatch.setattr(validation, "make_training_data", make_data)
    section = {"type": "huggingface", "location": "x", "num_classes": 10, "streaming": True}
    config = runs.tiny_config(dataset={**section, "num_examples": 40})
    assert make(config=config) is None
    (held_out,) = read
    assert (held_out["split"], held_out["num_examples"]) == ("test", None)
    assert config["dataset"]["num_examples"] == 40


def test_where_there_is_none():
    assert make(config=runs.tiny_config()) is None  # split all: nothing is held out
    assert make(validate_every=0) is None
    accelerator = Accelerator()
    section = {"type": "imagefolder", "location": "/nowhere", "split": "train"}
    config = runs.tiny_config(dataset={**section, "num_classes": 0})
    assert make(accelerator, config) is None
    (said,) = accelerator.said
    assert said.startswith("no validation loss: ")
    assert "/nowhere" in said
