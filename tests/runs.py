"""Tiny training runs for tests: a config, and the scripts called in this process or in another."""

import copy
import functools
import importlib.util
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

TINY = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 1,
        "input_size": [8, 8],
        "patch_size": [2, 2],
        "depths": [1, 1],
        "widths": [16, 32],
        "self_attns": [
            {"type": "neighborhood", "d_head": 8, "kernel_size": 3},
            {"type": "global", "d_head": 16},
        ],
        "mapping_depth": 1,
        "mapping_width": 16,
        "loss_config": "karras",
        "sigma_data": 0.75,
        "sigma_min": 0.02,
        "sigma_max": 40,
        "sigma_sample_density": {"type": "lognormal", "mean": -1.0, "std": 1.0},
    },
    "dataset": {"type": "digits", "num_classes": 10, "cond_dropout_rate": 0.25},
    "optimizer": {"type": "adamw", "lr": 2e-3},
    "lr_sched": {"type": "inverse", "inv_gamma": 10.0, "power": 1.0, "warmup": 0.9},
    "ema_sched": {"type": "inverse", "power": 0.75, "max_value": 0.99},
}


def tiny_config(**sections):
    """The tiny config as a loaded one; `model={...}` is laid over it, unless it has a type."""
    import k_diffusion as K

    raw = copy.deepcopy(TINY)
    for name, section in sections.items():
        raw[name] = section if "type" in section else {**raw[name], **section}
    return K.config.load_config(raw)


def call(script, *args, folder, monkeypatch):
    """Run a root script's main() in this process, as if called in `folder` with these arguments."""
    from accelerate.state import AcceleratorState

    spec = importlib.util.spec_from_file_location(f"script_{script}", ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        try:
            module.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _hangup_counts():
    """SIGHUP isn't ignored, though the tests may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Started:
    """A script forked from the warm process, with what tests use of a `subprocess.Popen`."""

    def __init__(self, argv, folder, env, stdout=None):
        self.returncode = None
        reading, output = os.pipe()
        self.stdout = os.fdopen(reading)
        self._report, report = socket.socketpair()
        job = {"argv": argv, "folder": str(folder), "env": env}
        fds = [stdout or output, output, report.fileno()]
        socket.send_fds(warm_process(), [json.dumps(job).encode()], fds)
        os.close(output)
        report.close()
        self._told = self._report.makefile()
        self.pid = int(self._told.readline())

    def wait(self, timeout=None):
        self._report.settimeout(timeout)
        if self.returncode is None:
            self.returncode = int(self._told.readline())
        return self.returncode

    def communicate(self, timeout=None):
        text = []
        reader = threading.Thread(target=lambda: text.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"still runs after {timeout} s")
        self.wait(timeout)
        return text[0], None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@functools.cache
def warm_process():
    """The socket to the process of warm.py that scripts of this one are forked from."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, ROOT / "tests/warm.py", str(theirs.fileno())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], preexec_fn=_hangup_counts)
    theirs.close()
    return ours


def start(*command, folder, cold=False, stdout=None, **env):
    """Start a program in its own process group, its output in one pipe, or in stdout, a file.

    A script is forked from a process that has imported torch and the like, unless `cold`: those of
    users begin with seconds of imports.
    """
    words = [str(word) for word in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    # its programs, and launchers of them
    warm = words[0] == sys.executable and re.match(
        r"-m (k_diffusion|torch)\b|(?!-)\S*\.py\b", " ".join(words[1:])
    )
    if warm and not cold:
        return Started(words[1:], folder, env, stdout)
    return subprocess.Popen(
        words,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_hangup_counts,
    )


def run(*command, folder, cold=False, **env):
    """Run a program to its end. Returns (exit code, output)."""
    process = start(*command, folder=folder, cold=cold, **env)
    text, _ = process.communicate(timeout=120)
    return process.returncode, text


def run_two(script, *args, folder, **env):
    """Run a script in two processes of gloo, as a launcher does. Returns (exit code, output)."""
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    both = [
        start(*python(script, *args), folder=folder, RANK=rank, LOCAL_RANK=rank, **env)
        for rank in "01"
    ]
    texts = [process.communicate(timeout=120)[0] for process in both]
    return max((process.returncode for process in both), key=abs), "".join(texts)


def python(script, *args):
    return sys.executable, ROOT / f"{script}.py", *args


def accelerate(processes, script, *args):
    launcher = "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes
    return sys.executable, *launcher, ROOT / f"{script}.py", *args


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_two_processes(function, *args):
    """Call function(rank, *args), of a module's top level, in each of two gloo processes."""
    job = pickle.dumps((function, args)).hex()
    code, text = run_two("tests/rank", job, folder=ROOT, PYTHONPATH=os.pathsep.join(sys.path))
    assert code == 0, text


def read(path):
    return torch.load(path, weights_only=True)


def differences(a, b, path=""):
    """Where two nests of dicts, lists and tensors differ, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{path}.{k}" for k in a.keys() ^ b.keys()]
        return keys + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{path}.{k}")
        ]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if a == b and type(a) is type(b) else [path]
