"""Times a step of each published sampler in the k_diffusion of a folder, and prints them as JSON.

`sampler_overhead.py --against FOLDER` runs it for two versions in turn. Of the package only
`k_diffusion.sampling` is imported; what that imports and isn't installed is replaced by nothing.

    python benchmarks/harness/step_times.py FOLDER [--shape 1 4 32 32] [--steps 50]
"""

import argparse
import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import bench
import torch

NAMES = "euler heun dpm_2 euler_ancestral dpm_2_ancestral lms dpmpp_2s_ancestral dpmpp_sde dpmpp_2m"
NAMES += " dpmpp_2m_sde dpmpp_3m_sde dpm_fast dpm_adaptive"
WITH_NOISE = (
    "euler_ancestral dpm_2_ancestral dpmpp_2s_ancestral dpmpp_sde dpmpp_2m_sde dpmpp_3m_sde"
)


class Empty(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Missing:
    """Finds the packages that it's told of."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, name: str, *args: object) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def load_sampling(folder: Path) -> types.ModuleType:
    """Its `k_diffusion.sampling`, without running `k_diffusion/__init__.py`."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(folder / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    missing = Missing()
    sys.meta_path.append(missing)
    while True:
        try:
            return importlib.import_module("k_diffusion.sampling")
        except ModuleNotFoundError as e:
            name = str(e.name).split(".")[0]
            if name in missing.names | {"k_diffusion"}:
                raise
            missing.names.add(name)


def best(run: bench.Run, repeats: int) -> float:
    run()
    return min(bench.seconds(run, torch.device("cpu")) for _ in range(repeats))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path, help="that has a folder k_diffusion in it")
    p.add_argument("--shape", type=int, nargs="+", default=[1, 4, 32, 32])
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--repeats", type=int, default=9)
    args = p.parse_args()
    torch.set_num_threads(1)
    sampling = load_sampling(args.folder)
    x = torch.randn(args.shape)
    noise, sigmas = torch.randn_like(x), sampling.get_sigmas_karras(args.steps, 0.03, 15.0)
    times = {}
    for name in NAMES.split():
        sample = getattr(sampling, f"sample_{name}", None)
        if sample is None:
            continue

        def run(sample=sample, name=name, **options) -> object:
            if name == "dpm_fast":
                options["n"] = args.steps
            levels = (0.03, 15.0) if name in ("dpm_fast", "dpm_adaptive") else (sigmas,)
            return sample(lambda x, sigma: x * 0.5, x, *levels, disable=True, **options)

        given = {"noise_sampler": lambda a, b: noise} if name in WITH_NOISE.split() else {}
        times[name] = best(lambda: run(**given), args.repeats) / args.steps * 1e6  # noqa: B023
        if name.endswith("_sde"):
            times[f"{name}, own noise"] = best(run, 2) / args.steps * 1e6
    print(json.dumps(times))


if __name__ == "__main__":
    main()
