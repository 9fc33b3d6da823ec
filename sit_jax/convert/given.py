"""Weights that a flag names, with what a bare file of them does not tell."""

import dataclasses
from collections.abc import Callable

from sit_jax.convert.infer_config import FAMILIES
from sit_jax.convert.weights import family_of, open_weights, require_torch
from sit_jax.ranges import COUNT


@dataclasses.dataclass(frozen=True)
class Given:
    """base(family): the config of the published run that a torch file is put into."""

    path: str | None = None
    weights_only: bool = False
    family: str | None = None
    heads: int | None = None
    base: Callable | None = None

    def open(self):
        """-> what open_weights gives."""
        require_torch(self.path, self.family, self.heads)
        return open_weights(self.path, self.torch_file)

    def torch_file(self, path):
        """-> exchange.TorchWeights of a .pt or .safetensors."""
        from sit_jax.convert.checkpoint import open_torch_file

        family = family_of(self.path, self.family)
        return open_torch_file(path, self.base, family=family, heads=self.heads)


def add_flags(parser):
    """--init and what goes with it."""
    add = parser.add_argument_group("weights to begin with").add_argument
    add("--init", metavar="PATH", help="workdir, checkpoint, .pt ... or a name")
    add("--weights-only", action="store_true", help="no optimizer: begin at step 0")
    add_untold(add)


def add_untold(add):
    """What a bare file does not tell. add: a parser's add_argument, or a group's."""
    add("--family", choices=FAMILIES, help="of a bare .pt or .safetensors")
    said = "of a bare file whose width is not a published one"
    add("--heads", type=COUNT, metavar="N", help=said)
