"""Every row of the tables: one sentence, the right exit code, and nothing written."""

import copy
import json
import shutil
import time

import pytest
import runs

from . import calls, commands, configs, data, files
from .table import Call, Row, check_sentence, listing, run

pytest.importorskip("accelerate")

ROWS: list[Row] = [*commands.ROWS, *configs.ROWS, *files.ROWS, *data.ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "tiny.json").write_text(json.dumps(runs.TINY))
    files.write(folder)
    data.write(folder)
    return folder


def write_changed(folder, changes):
    config = copy.deepcopy(runs.TINY)
    for path, value in changes.items():
        *sections, key = path.split(".")
        at = config
        for section in sections:
            at = at[section]
        at[key] = value
    (folder / "changed.json").write_text(json.dumps(config))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_command_refuses(row, folder):
    if row.config:
        write_changed(folder, row.config)
    before = listing(folder)
    code, text, noise = run(row, folder)
    check_sentence(text, row.says)
    assert code == row.code
    assert noise == []
    after = listing(folder)
    shutil.rmtree(folder / "new", ignore_errors=True)  # not to be found by the next row
    assert after == before


@pytest.mark.parametrize("row", calls.ROWS, ids=lambda row: row.name)
def test_a_call_refuses(row: Call):
    with pytest.raises((ValueError, OSError), match=row.says) as error:
        row.call()
    assert "\n" not in str(error.value)


def test_there_are_enough_rows():
    assert len(ROWS) + len(calls.ROWS) >= 150
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_process_refuses(folder):
    """As a person runs it: the output of the interpreter itself, its exit code, soon."""
    (row,) = [row for row in ROWS if row.name == "sample --checkpoint evil.pth"]
    before = listing(folder)
    code, text, seconds = timed(row.script, *row.argv, folder=folder)
    check_sentence(text, row.says)
    assert (code, listing(folder)) == (row.code, before)
    assert seconds < 5 + 3 * timed(row.script, "--help", folder=folder)[2]


def timed(script, *args, folder):
    start = time.perf_counter()
    return *runs.run(
        *runs.python(script, *args), folder=folder, cold=True
    ), time.perf_counter() - start
