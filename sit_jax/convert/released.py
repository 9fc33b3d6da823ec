"""What the originals' state dict of a network is: its names, shapes and constants."""

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.convert.rules import (
    join_names,
    rules_for,
    to_flax,
    to_torch,
    torch_constants,
)
from sit_jax.errors import UserError
from sit_jax.training.state import init_params

# An average of the table, taken 7M times in float32, was up to 5e-4 off the table.
DRIFT = 1e-3


@dataclasses.dataclass(frozen=True)
class Released:
    """The state dict of a model for data of this shape (H, W, C)."""

    model: Any
    shape: tuple[int, int, int]

    @cached_property
    def params(self):
        """Shapes of our parameters by path."""
        init = partial(init_params, self.model, self.shape)
        return flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")

    @property
    def rules(self):
        return rules_for(self.model)

    @cached_property
    def constants(self):
        return torch_constants(self.model, self.shape[0])

    @cached_property
    def names(self):
        """All in torch's order: a module's constants after its other tensors."""
        names = [name for name in self.constants if "." not in name]
        inner = {name.rpartition(".")[0]: name for name in self.constants}
        for name in self.trained:
            names.append(name)
            if (constant := inner.get(name.rpartition(".")[0])) is not None:
                names.append(constant)
        return names

    @cached_property
    def trained(self):
        """Torch name -> shape; what has a gradient."""
        shapes = {}
        for torch_name, path, layout in self.rules:
            there, here = layout.split("->")
            size = self.params[path].shape
            axes = dict(zip(here, size[-len(here) :], strict=True))
            count = size[0] if "*" in torch_name else 1
            for i in range(count):
                name = torch_name.replace("*", str(i))
                shapes[name] = tuple(axes[axis] for axis in there)
        tiny = {
            path: np.zeros([size if i == 0 else 1 for i, size in enumerate(leaf.shape)])
            for path, leaf in self.params.items()
        }
        return {name: shapes[name] for name in to_torch(self.rules, nest(tiny))}

    def tree(self, state, put=lambda leaf: leaf):
        """State dict -> params, each leaf passed through put."""
        return nest({path: put(leaf) for path, leaf in self.leaves(state)})

    def leaves(self, state):
        """Yields (path, array) of a state dict's params, the largest first."""
        for rule in sorted(self.rules, key=lambda rule: -self.params[rule[1]].size):
            leaf, _ = to_flax([rule], state)
            yield rule[1], flatten_dict(leaf, sep="/")[rule[1]]

    def check(self, path, state):
        """Refuses a state dict with other names or shapes, listing them."""
        want = {n: table.shape for n, table in self.constants.items()} | self.trained
        have = state.shapes
        faults = {
            "missing": [name for name in want if name not in have],
            "spare": [name for name in have if name not in want],
            "misshapen": [
                f"{name} {have[name]} instead of {shape}"
                for name, shape in want.items()
                if have.get(name, shape) != shape
            ],
        }
        listed = (
            f"{what}: {join_names(names)}" for what, names in faults.items() if names
        )
        if told := "; ".join(listed):
            raise UserError(f"{path} holds another architecture; {told}")
        for name, table in self.constants.items():
            drift = float(np.abs(state[name] - table).max())
            if not drift <= DRIFT:
                kind = "position" if table.dtype.kind == "i" else "sine-cosine"
                raise UserError(
                    f"{path}: {name} is not the {kind} table of this size but up "
                    f"to {drift:.2g} off"
                )


def nest(flat):
    """{"a/b": leaf} -> {"a": {"b": leaf}}"""
    return unflatten_dict(flat, sep="/")
