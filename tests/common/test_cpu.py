"""What the scripts set before torch is there: how threads wait, and that freed memory is kept."""

import os
import platform
import sys

import pytest
import runs
import torch

from k_diffusion.common import cpu

SCRIPTS = [
    *sorted(path.name for path in runs.ROOT.glob("*.py")),
    *sorted(f"benchmarks/{path.name}" for path in (runs.ROOT / "benchmarks").glob("*.py")),
]

# Runs a script up to its first import of torch, and prints what torch would find.
UP_TO_TORCH = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("SPIN", os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Stop())
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def spin_count(script, folder, **env):
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    with pytest.MonkeyPatch.context() as patch:
        for name in unset:
            patch.delenv(name, raising=False)
        code, text = runs.run(
            sys.executable, "-c", UP_TO_TORCH, runs.ROOT / script, folder=folder, **env
        )
    assert code == 0, text
    return text.split("SPIN ")[1].strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_set_it_before_torch_is_imported(script, tmp_path):
    assert spin_count(script, tmp_path) == str(cpu.SPIN_COUNT)


def test_what_the_user_set_stays(tmp_path):
    assert spin_count("train.py", tmp_path, GOMP_SPINCOUNT="77") == "77"
    assert spin_count("train.py", tmp_path, OMP_WAIT_POLICY="active") == "None"


def test_importing_the_library_sets_nothing(tmp_path):
    code = "import os, k_diffusion as K; K.sampling; print(os.environ.get('GOMP_SPINCOUNT'))"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GOMP_SPINCOUNT", raising=False)
        assert runs.run(sys.executable, "-c", code, folder=tmp_path) == (0, "None\n")


RESIDENT = """
import re, sys
from pathlib import Path
if "kept" in sys.argv:
    import k_diffusion.common.cpu

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

freed = [bytearray(16 << 20) for _ in range(8)]
before = resident()
del freed
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_unless_the_user_has_set_how(tmp_path):
    def given_back(*argv, **env):
        with pytest.MonkeyPatch.context() as patch:
            for name in "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_":
                patch.delenv(name, raising=False)
            code, text = runs.run(sys.executable, "-c", RESIDENT, *argv, folder=tmp_path, **env)
        assert code == 0, text
        return int(text)

    assert given_back() > 100  # of 128 MiB
    assert given_back("kept") < 28
    assert given_back("kept", MALLOC_TRIM_THRESHOLD_="131072") > 100


class Environment(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return os.environ.get("GOMP_SPINCOUNT")


def test_loading_processes_inherit_it(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1234")
    loader = torch.utils.data.DataLoader(
        Environment(), num_workers=1, multiprocessing_context="fork"
    )
    assert list(loader) == [["1234"]]


@pytest.mark.slow
def test_processes_of_the_launcher_have_it(tmp_path):
    (tmp_path / "script.py").write_text(
        "import k_diffusion.common.cpu\n"
        "import os\n"
        "from k_diffusion import distributed\n"
        "accelerator = distributed.make_accelerator()\n"
        "text = f'SPIN {os.environ[\"GOMP_SPINCOUNT\"]} {accelerator.num_processes}\\n'\n"
        "os.write(1, text.encode())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GOMP_SPINCOUNT", raising=False)
        launcher = "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2
        code, text = runs.run(sys.executable, *launcher, "script.py", folder=tmp_path)
    assert code == 0, text
    assert text.count(f"SPIN {cpu.SPIN_COUNT} 2") == 2
