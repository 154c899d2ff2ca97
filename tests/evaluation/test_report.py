import json

import pytest

from k_diffusion.evaluation import report


def row(value, error=0.1, **settings):
    return {
        "key": "fd",
        "metric": "FD",
        "protocol": "random",
        "value": value,
        "error": error,
        "low": value - 0.2,
        "high": value + 0.2,
        "n": 10,
        "n_reference": 20,
        "settings": {"checkpoint": "a/b.pth", **settings},
        "line": "FD[random] <1>",
    }


def test_table_has_what_differs():
    rows = [row(1.0, steps=4, sampler="heun"), row(2.0, steps=8, sampler="heun")]
    heads, lines = report.columns(rows)
    assert heads == ["steps", "FD[random]"]
    assert lines == [(["4"], ["1.0 ± 0.1"]), (["8"], ["2.0 ± 0.1"])]


def test_csv_has_all_settings():
    text = report.to_csv([row(1.0, steps=4), row(2.0, classes=["3", "7"])])
    assert text.splitlines() == [
        "metric,protocol,value,error,low,high,n,n_reference,checkpoint,steps,classes",
        "FD,random,1.0,0.1,0.8,1.2,10,20,a/b.pth,4,",
        "FD,random,2.0,0.1,1.8,2.2,10,20,a/b.pth,,3 7",
    ]


def test_page_is_escaped_and_marks_the_best(tmp_path):
    rows = [row(1.0, steps=4), row(2.0, steps=8)]
    page = report.to_html(rows, "a & b", tmp_path)
    assert "a &amp; b" in page
    assert "&lt;1&gt;" in page
    assert '<td class="best">1.0 ± 0.1</td>' in page
    assert "<td>2.0 ± 0.1</td>" in page


def test_plot_needs_a_swept_number():
    assert report.plot([row(1.0, steps=4)]) is None
    assert report.plot([row(1.0, sampler="heun"), row(2.0, sampler="euler")]) is None
    pytest.importorskip("matplotlib")
    picture = report.plot([row(1.0, steps=4), row(2.0, steps=8)])
    assert picture.startswith(b"\x89PNG")


def test_damaged_results_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text("[{")
    with pytest.raises(ValueError, match=r"results\.json can't be read"):
        report.read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="isn't a list of results"):
        report.read_results(tmp_path)
    assert report.read_results(tmp_path / "nowhere") == []
