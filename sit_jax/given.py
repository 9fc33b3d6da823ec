"""The weights that train.py --init names."""

import dataclasses
from collections.abc import Callable

from sit_jax.numerals import COUNT
from sit_jax.torch_config import FAMILIES
from sit_jax.weights import family_of


@dataclasses.dataclass(frozen=True)
class Given:
    """base(family): the config of the published run that a torch file is put into."""

    path: str | None = None
    weights_only: bool = False
    family: str | None = None
    heads: int | None = None
    base: Callable | None = None

    def torch_file(self, path):
        """-> exchange.TorchWeights of a .pt or .safetensors."""
        from sit_jax.exchange import open_torch

        family = family_of(self.path, self.family)
        return open_torch(path, self.base, family, self.heads)


def add_flags(parser):
    add = parser.add_argument_group("weights to begin with").add_argument
    add("--init", metavar="PATH", help="workdir, checkpoint, .pt ... or a name")
    add("--weights-only", action="store_true", help="no optimizer: begin at step 0")
    add("--family", choices=FAMILIES, help="of a bare .pt or .safetensors")
    add(
        "--heads",
        type=COUNT,
        help="of a bare file whose width is not a published one",
    )
