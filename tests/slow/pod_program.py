"""A training step as a TPU's compiler has it before it writes the chip's code.

By then operations, their order and their memory are settled; what follows is nine
tenths of the time. The compiler cannot be asked to end there, so it runs in a process
of its own, prints what it has settled, and is ended.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from sit_jax import config as configs
from sit_jax.parallel.mesh import make_mesh
from sit_jax.planning import programs, tpu_compile
from sit_jax.recipes import published

# What it prints, in this order: the next one is there when the one before is whole.
MEMORY = "after_optimizations-buffer-assignment"
TEXT = "after_optimizations"
NEXT = "after_optimizations_after_buffer_assignment"
ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.M)


@dataclasses.dataclass(frozen=True)
class Settled:
    """Of one device, in bytes."""

    arguments: int
    output: int  # what of it is not in the memory of a donated argument
    text: str


def recipe(name, slice_, settings):
    """-> config of that name under {field: value}, its recipe, mesh of the slice."""
    c = published(name.removesuffix("_xl2"))
    configs.override(c, [f"--config.{k}={v}" for k, v in settings.items()])
    mesh = make_mesh(**c.mesh, devices=tpu_compile.get_tpu_devices(slice_))
    return c, programs.build_training_experiment(c), mesh


def lowered(c, parts, mesh):
    return programs.lower_train_step(c, parts, mesh, c.batch_size, "tpu")


def settled(folder, name, slice_, settings, limit=400):
    """-> Settled of a program that fits; printed into an empty folder."""
    asked = [sys.executable, __file__, str(folder), name, slice_, json.dumps(settings)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    begun, errors = time.monotonic(), folder / "stderr"
    with errors.open("w") as file:
        child = subprocess.Popen(asked, stderr=file, env=env)
    try:
        while not list(folder.glob(f"*jit_train_step*.{NEXT}.txt")):
            assert child.poll() is None, errors.read_text()[-2000:]
            assert time.monotonic() < begun + limit, "too slow"
            time.sleep(0.2)
    finally:
        child.kill()
        child.wait()
    memory, text = (_read(folder, kind) for kind in (MEMORY, TEXT))
    found = ALLOCATION.findall(memory)
    size = lambda wanted: sum(int(size) for size, told in found if wanted(told))
    return Settled(
        arguments=size(lambda told: "parameter" in told),
        output=size(lambda told: "live-out" in told and "parameter" not in told),
        text=text,
    )


def _read(folder, kind):
    (path,) = folder.glob(f"*jit_train_step*.{kind}.txt")
    return path.read_text()


def main(folder, name, slice_, settings):
    made = lowered(*recipe(name, slice_, json.loads(settings)))
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    with tpu_compile.without_compilation_cache():
        made.compile(options)


if __name__ == "__main__":
    main(*sys.argv[1:])
