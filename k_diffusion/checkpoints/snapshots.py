"""Power-function averages of weights (EDM2, arXiv:2312.02696): the files that a run stores them in,
and the reconstruction of any other width from these after training.

The average of width sigma_rel weighs the weights at time tau <= t, both in images seen, by the
profile (gamma + 1) tau^gamma / t^(gamma + 1), whose standard deviation is sigma_rel t.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.untrusted import get_safetensors_metadata
from . import CheckpointError, read_torch, read_weights, write_inference
from .runs import latest_step

MAX_WIDTH = 12**-0.5  # gamma 0: all weights count the same


def check_width(width: float) -> float:
    """The width, rounded to MAX_WIDTH where it is just above it.

    Raises ValueError unless it is that of a profile that grows with time.
    """
    if not 0.001 <= width <= round(MAX_WIDTH, 4):
        raise ValueError(
            f"a width of an average must be from 0.001 to {MAX_WIDTH:.4f}, the plain mean; "
            f"got {width:g}; EDM2 stores 0.05 and 0.1"
        )
    return min(width, MAX_WIDTH)


def parse_width(text: str) -> float:
    """A width as the command line has it. Raises ValueError."""
    try:
        width = float(text)
    except ValueError:
        raise ValueError(f"a width of an average must be a number, got {text!r}") from None
    return check_width(width)


def gamma_of(width: float) -> float:
    """The exponent gamma of the profile of width sigma_rel (EDM2, equation 126).

    It is the largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    """
    inverse = check_width(width) ** -2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def width_of(gamma: float) -> float:
    """The width sigma_rel of the profile of exponent gamma: its standard deviation by t."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


# ------------------------------------------------------------------------------- files

Branch = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Snapshot:
    """A stored average.

    images: the time t, in images since averaging began. began: images that the run had seen before.
    buffers: the names that aren't averaged. branch: the run's, as of `branch_of`; older files have
    none, and `since`, the step at which the process that wrote them resumed.
    """

    path: Path
    step: int
    width: float
    images: int
    began: int
    buffers: tuple[str, ...]
    digest: str
    branch: Branch = ()
    since: int = 0


def snapshot_suffix(step: int, width: float) -> str:
    """What follows the run's name in that of a snapshot's file."""
    return f"{step:08}_ema{width:g}.safetensors"


PATTERN = r"(\d{8,})_ema[\d.]+\.safetensors"
SNAPSHOT = re.compile(f"(.+)_{PATTERN}")  # the run's name, then the step


def write_snapshot(
    path: Path,
    config: Mapping[str, Any],
    profile: Mapping[str, Any],
    *,
    step: int,
    width: float,
    branch: Branch,
) -> None:
    """Write an average as an inference checkpoint in float32. profile: its part of a checkpoint."""
    facts = {key: profile[key] for key in ("images", "began", "buffers")}
    facts |= {"step": step, "width": width, "branch": branch}
    write_inference(path, config, profile["weights"], "fp32", json.dumps(facts))


def read_snapshot(path: Path) -> Snapshot:
    """What a snapshot's file says of itself. Raises CheckpointError if it is none."""
    try:
        metadata = get_safetensors_metadata(path)
        facts = json.loads(metadata["snapshot"])
        facts["buffers"] = tuple(facts["buffers"])
        facts["branch"] = [(str(token), int(step)) for token, step in facts.get("branch", ())]
        return Snapshot(path, digest=metadata.get("sha256", ""), **facts)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no snapshot of an average ({error})") from None


def find_snapshots(
    run: Path, step: int | None = None, width: float | None = None
) -> list[Snapshot]:
    """The snapshots that led to a run's latest checkpoint, or to that of `step`, in their order.

    run: the run's name with its folder, a folder that holds one run, or a checkpoint of the run,
    whose step it then is. The latest checkpoint is the one that NAME_state.json names; without that
    file it is the newest snapshot. Snapshots of a run that was left for an earlier checkpoint are
    not on the way. All are of averages that began at one moment, as only these share their time: as
    that of `width` did, if it is stored there, else the longest. Raises CheckpointError where there
    are none.
    """
    folder, name = (run, None) if run.is_dir() else (run.parent, run.name)
    if name and (checkpoint := re.fullmatch(r"(.+)_(\d{8,})\.pth", name)):
        name, step = checkpoint[1], int(checkpoint[2]) if step is None else step
    paths = _list_snapshots(folder)
    names = sorted({of for of, _ in paths.values() if name in (None, of)})
    if len(names) > 1:
        raise CheckpointError(f"{run} has snapshots of {', '.join(names)}; name one of these runs")
    found = [read_snapshot(path) for path, (of, _) in paths.items() if of in names]
    there = sorted({s.step for s in found})
    if not there:
        raise CheckpointError(
            f"{run} has no snapshots of averages; train.py --power-ema 0.05 0.1 writes them"
        )
    own = folder / names[0]
    # those after the latest are of a run that was left, or of a checkpoint that wasn't finished
    end = step if step is not None else latest_step(str(own))
    way = _that_led_to(there[-1] if end is None else end, found, own)
    if step is None:
        step = max((s.step for s in way), default=end)
    begun: dict[float | None, int] = {s.width: s.began for s in way if s.step == step}
    if not begun:
        others = ", ".join(str(s) for s in there if s != step)
        raise CheckpointError(f"{run} has no snapshot of step {step}; there are {others or 'none'}")
    began = begun.get(width, min(begun.values()))
    return sorted((s for s in way if s.began == began), key=lambda s: (s.images, s.width))


def _list_snapshots(folder: Path) -> dict[Path, tuple[str, int]]:
    """The snapshots in a folder, by their file names: of which run, and of which step."""
    matches = {p: SNAPSHOT.fullmatch(p.name) for p in folder.glob("*.safetensors")}
    return {p: (m[1], int(m[2])) for p, m in matches.items() if m}


def branch_of(name: str, step: int, before: Branch, resumed: bool = True) -> Branch:
    """The branch of a run that starts or goes on at `step`: the tokens of the branches that led to
    it, each with the step from which it counts.

    The first token is empty. A run that leaves snapshots of later steps behind gets one of its own,
    so that they are known. before: the branch of its checkpoint. resumed: from one of its own;
    otherwise all snapshots of its name are of another run.
    """
    base = Path(name)
    steps = [at for of, at in _list_snapshots(base.parent).values() if of == base.name]
    if any(at > step or not resumed for at in steps):
        return [*(before if resumed else ()), (secrets.token_hex(4), step)]
    return before or [("", step)]


def _that_led_to(step: int, found: Sequence[Snapshot], own: Path) -> list[Snapshot]:
    """Those of a run's snapshots that its checkpoint of `step` has come by.

    own: the run's name with its folder. Where that checkpoint is gone, the last snapshot written of
    the steps up to there tells the branch.
    """
    until = [s for s in found if s.step <= step]
    branch = _branch_of_checkpoint(Path(f"{own}_{step:08}.pth"))
    if branch is None and until:
        branch = max(until, key=lambda s: (s.step, s.path.stat().st_mtime_ns)).branch
    tokens, starts = zip(*branch) if branch else ((), ())
    ends = dict(zip(tokens, [*starts[1:], step]))
    # older files have no branch
    old = {s.step: s.since for s in until if not s.branch}
    way = lineage(old, starts[0] if starts else step)
    return [
        s for s in until if (s.step <= ends.get(s.branch[-1][0], 0) if s.branch else s.step in way)
    ]


def _branch_of_checkpoint(path: Path) -> Branch | None:
    """None of one that is gone, damaged or of an older version."""
    try:
        return [(str(token), int(step)) for token, step in read_torch(path, mapped=True)["branch"]]
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def lineage(since: Mapping[int, int], step: int) -> list[int]:
    """The steps of a run's snapshots that led to `step`, which is the last of them.

    since: for the step of each, the step at which the process that wrote it resumed.
    """
    way: list[int] = []
    end = step
    while before := [s for s in since if s <= end]:
        begin = since[max(before)]
        way += [s for s in before if s > begin and since[s] == begin]
        end = begin
    return sorted(way)


# ---------------------------------------------------------------------- reconstruction

Profile = tuple[float, float]  # t in images, gamma


def _products(a: Sequence[Profile], b: Sequence[Profile]) -> Any:
    """Integrals of the products of profiles, (len(a), len(b)), in float64 (EDM2, appendix C)."""
    ta, ga = (x[:, None] for x in np.array(a, np.float64).T)
    tb, gb = np.array(b, np.float64).T
    exponent = np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * (ta / tb) ** exponent / ((ga + gb + 1) * np.maximum(ta, tb))


def coefficients(stored: Sequence[Profile], target: Profile) -> tuple[Any, float]:
    """How to combine stored profiles into another, by least squares in float64.

    Returns the coefficients, whose sum is 1, and the distance of their profile from the target by
    the target's norm. A stored profile has the coefficient 1 and the distance 0.
    """
    if target in stored:
        return np.eye(len(stored))[list(stored).index(target)], 0.0
    products, wanted = _products(stored, stored), _products(stored, [target])[:, 0]
    scale = np.diag(products) ** -0.5
    # Profiles of neighbouring steps are nearly the same: below rcond their difference is rounding.
    solution = np.linalg.lstsq(products * scale * scale[:, None], wanted * scale, rcond=1e-12)[0]
    found = solution * scale
    found /= found.sum()
    norm = _products([target], [target])[0, 0]
    square = norm - 2 * found @ wanted + found @ products @ found
    return found, float(max(0.0, square / norm) ** 0.5)


@dataclass(frozen=True)
class Average:
    """A reconstructed average: its weights in float32, and the run's config.

    snapshots: those that it was made of. error: the distance of its profile from the one asked for,
    by that one's norm. digest: of the files and the width.
    """

    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    snapshots: list[Snapshot]
    step: int
    error: float
    digest: str


def reconstruct(run: Path, width: float, step: int | None = None) -> Average:
    """The average of any width over a run, up to its latest checkpoint or that of `step`.

    run: as of `find_snapshots`. A stored width comes back as it was stored. Raises ValueError.
    """
    snapshots = find_snapshots(run, step, width)
    last = snapshots[-1]
    gammas = {s.width: gamma_of(s.width) for s in snapshots}
    target = float(last.images), gammas.get(width, gamma_of(width))
    factors, error = coefficients([(float(s.images), gammas[s.width]) for s in snapshots], target)
    used = [(s, float(factor)) for s, factor in zip(snapshots, factors) if factor]
    total: dict[str, torch.Tensor] = {}
    for snapshot, factor in used:
        weights = read_weights(snapshot.path)
        if not total:
            total = {k: torch.zeros_like(x, dtype=torch.float64) for k, x in weights.items()}
        if total.keys() != weights.keys() or any(total[k].shape != weights[k].shape for k in total):
            raise CheckpointError(f"{snapshot.path} and {used[0][0].path} are of two models")
        for key, x in weights.items():
            if key not in last.buffers:
                total[key].add_(x.double(), alpha=factor)
    # The last one used is of the newest step.
    averaged = {k: x.float() for k, x in total.items() if k not in last.buffers}
    text = " ".join([f"{width!r}", *(s.digest for s, _ in used)])
    return Average(
        {**weights, **averaged},
        json.loads(get_safetensors_metadata(last.path)["config"]),
        [s for s, _ in used],
        last.step,
        error,
        hashlib.sha256(text.encode()).hexdigest(),
    )
