"""What solvers say of a set of samples: evaluations, steps, images left unfinished."""

from itertools import islice

import numpy as np

from sit_jax.diffusion.guidance import is_unguided

NAMED = 20  # classes that are named with a set of samples; its manifest has all


def summary(parts, count):
    """Lowest, mean and highest of each number, and the images left unfinished."""
    names = ("evaluations", "accepted", "rejected", "finished")
    found = {name: [] for name in names}
    for batch in range(count):
        for name in names:
            found[name].append(parts.stats(batch, name, default=np.zeros(0)))
    found = {name: np.concatenate(values) for name, values in found.items()}
    unfinished = np.flatnonzero(~found.pop("finished").astype(bool)).tolist()
    numbers = {
        name: {"min": int(v.min()), "mean": float(v.mean()), "max": int(v.max())}
        for name, v in found.items()
        if len(v)
    }
    return {**numbers, "unfinished": unfinished}


def lines(room, stats, drawn, seconds, compile_seconds):
    low, high = stats["evaluations"]["min"], stats["evaluations"]["max"]
    count = f"{low}" if low == high else f"{low} to {high}"
    calls = f"{count} network evaluations each"
    if "accepted" in stats:
        steps = {k: f"{stats[k]['mean']:.4g}" for k in ("accepted", "rejected")}
        calls += f" ({steps['accepted']} steps taken, {steps['rejected']} rejected)"
    rate = f"{drawn / max(seconds, 1e-9):.1f} images/s" if drawn else "drawn before"
    guided = "no guidance" if is_unguided(room.parts.guidance) else "guided"
    lines = [
        f"{len(room.job.labels)} images, {guided}, {calls}, {rate} "
        f"(compiled in {compile_seconds:.1f} s)"
    ]
    if names := room.record.get("class_names"):
        shown = ", ".join(f"{y} {name}" for y, name in islice(names.items(), NAMED))
        lines.append(f"classes: {shown}{' ..' * (len(names) > NAMED)}")
    if left := stats["unfinished"]:
        shown = ", ".join(map(str, left[:10])) + (", ..." if len(left) > 10 else "")
        lines.append(
            f"WARNING: the solver gave up before the end in {len(left)} images "
            f"({shown}); take a larger --rtol or --config.sampler.max_steps, or "
            "--sampler heun --steps 50"
        )
    return lines
