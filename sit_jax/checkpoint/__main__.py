"""Compares the steps of a run with their sums: python -m sit_jax.checkpoint verify DIR.

Exit code 0: none is damaged; 1: some are; 2: there is nothing to look at.
"""

from sit_jax import command
from sit_jax.checkpoint.folder import find, steps, unfinished
from sit_jax.checkpoint.sums import damages, has_sums
from sit_jax.errors import UserError
from sit_jax.places import absolute


def main():
    parser = command.parser(__doc__.splitlines()[0])
    parser.add_argument("what", choices=["verify"])
    parser.add_argument("directory", metavar="DIR", help="workdir, checkpoints or step")
    args, rest = command.parse(parser)
    if rest:
        raise UserError(f"{rest[0]}: this command has no config")
    directory, newest = find(args.directory)
    one = absolute(args.directory) == directory / str(newest)
    found = [newest] if one else steps(directory)
    print(directory)
    damaged = [step for step in found if not _report(directory / str(step))]
    for step in [] if one else unfinished(directory):
        print(
            f"{step:>9}  cut off while it was saved; the run removes it when it goes on"
        )
    return 1 if damaged else 0


def _report(step):
    """Prints a line for a step; -> whether it may be used."""
    if not has_sums(step):
        print(f"{step.name:>9}  no sums: saved before they were kept, cannot be told")
        return True
    lines = damages(step)
    for line in lines:
        print(f"{step.name:>9}  DAMAGED: {line}")
    if not lines:
        print(f"{step.name:>9}  good")
    return not lines


if __name__ == "__main__":
    command.script(main)
