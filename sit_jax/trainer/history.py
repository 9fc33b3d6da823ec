"""What a run was before it goes on: how far in its data, and with which settings.

The order of the records is one endless sequence, and a step takes the next batch_size
of them. A run that goes on with batches of another size goes on in the same sequence.
"""

import dataclasses

from sit_jax.checkpoint import read_meta, steps
from sit_jax.config import difference


@dataclasses.dataclass(frozen=True)
class History:
    """skip: records that this run has taken beyond step * batch_size.

    changes: a sentence for each thing that is not as it was when the step was saved.
    """

    batch_size: int
    mesh: dict
    skip: int = 0
    changes: tuple[str, ...] = ()

    def meta(self, step):
        """What a checkpoint of that step tells of it."""
        records = self.skip + step * self.batch_size
        return {"records": records, "mesh": self.mesh}


def history(directory, step, config, mesh):
    """-> History of a run that goes on from a step of its own with a JSON config.

    A run without a checkpoint of its own begins its data at step * batch_size.
    """
    size, now = config["batch_size"], dict(mesh.shape)
    if step not in steps(directory):
        return History(size, now)
    meta = read_meta(directory, step)
    before = meta["config"]
    records = meta.get("records", step * before["batch_size"])
    said = [
        f"{name} was {old}, is {new}"
        for name, old, new in difference(before, config)
        if not name.startswith("mesh")
    ]
    if before["batch_size"] != size:
        rate = "the learning rate is the config's, whatever the batch"
        said.append(f"from record {records:,} on a step takes {size}; {rate}")
    then = dict.fromkeys(now, 1) | meta.get("mesh", now)  # an axis may be newer
    if then != now:
        said.append(f"saved on {_devices(then)}, goes on on {_devices(now)}")
    return History(size, now, records - step * size, tuple(said))


def _devices(mesh):
    count, parts = 1, []
    for name, size in mesh.items():
        count *= size
        parts.append(f"{name} {size}")
    return f"{count} devices ({' x '.join(parts)})"
