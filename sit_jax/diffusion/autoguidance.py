"""A worse network to be led away from: Karras et al., arXiv:2406.02507."""

import dataclasses

from sit_jax.errors import UserError


def check(parts, other, path):
    """Refuses a worse network (a Recipe) from which nothing can be led away."""
    if other.shape != parts.shape or other.model.classes != parts.model.classes:
        raise UserError(
            f"--autoguidance {path} is for {other.shape} in {other.model.classes} "
            f"classes, not for {parts.shape} in {parts.model.classes}"
        )
    ours, theirs = (_asked(each.process) for each in (parts, other))
    if ours != theirs:
        raise UserError(
            f"--autoguidance {path} answers another question: {theirs}, where "
            f"{ours} is led away from; take a worse network of the same process"
        )


def _asked(process):
    """What its networks are asked, in words: alike where outputs mean the same."""
    names = ("path", "schedule", "steps", "predicts")
    fields = {f.name for f in dataclasses.fields(process)}.intersection(names)
    word = lambda value: getattr(value, "__name__", str(value))
    said = [f"{n}={word(getattr(process, n))}" for n in names if n in fields]
    return f"{type(process).__name__}({', '.join(said)})"
