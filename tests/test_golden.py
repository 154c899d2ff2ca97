"""Every number of the published package that is on record, through the public API."""

import golden
import pytest
import torch
from golden import cases_2
from golden.cases import CASES


def test_every_case_on_record_is_run():
    assert set(CASES) == golden.names()


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    torch.manual_seed(0)
    got = CASES[name]()
    want, facts = golden.load(name)
    assert golden.same_facts(got.pop("json", None), facts)
    assert set(got) == set(want)
    for key in want:
        a, b = got[key].detach().double(), want[key].double()
        assert a.shape == b.shape, key
        if name == "augmentation" and key.startswith("img"):
            assert (a - b).abs().mean() < 0.03, key  # another interpolator
        else:
            assert golden.error(a, b) <= 2e-3, key


def check_second(got, name):
    tensors, fact = golden.load(name, golden.SECOND)
    if tensors:
        assert got.shape == tensors["v"].shape
        assert golden.error(got.detach().double(), tensors["v"].double()) <= 2e-3
    else:
        assert golden.same_facts(got, fact)


def test_every_case_of_the_second_file_is_run():
    assert set(cases_2.CASES) | set(cases_2.SAMPLING) == golden.names(golden.SECOND)


@pytest.mark.parametrize("name", cases_2.CASES)
def test_second_case(name):
    torch.manual_seed(0)
    check_second(cases_2.CASES[name](), name)


@pytest.mark.parametrize("name", cases_2.SAMPLING)
def test_second_sampling_case(name):
    torch.manual_seed(0)
    check_second(cases_2.SAMPLING[name](), name)


def test_facts_are_compared_by_value():
    want = {"a": [1, 2.0], "b": None}
    assert golden.same_facts({"a": [1, 2.000001], "b": None, "c": 3}, want)
    for wrong in ({"a": [1, 2.1], "b": None}, {"a": [1, 2.0]}, {"a": [1], "b": None}):
        assert not golden.same_facts(wrong, want)
