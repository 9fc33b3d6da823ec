"""Compares the steps of a run with their checksums.

python -m sit_jax.checkpoint verify DIR ends with exit code 0 if no step is damaged, 1
if one is, and 2 if there is no step.
"""

from sit_jax.checkpoint.checksums import damages, has_checksums
from sit_jax.checkpoint.store import find_step, steps
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.errors import UserError
from sit_jax.files import absolute_path


@entry_point
def main():
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("what", choices=["verify"])
    parser.add_argument("directory", metavar="DIR", help="workdir, checkpoints or step")
    args, rest = parse_args(parser)
    if rest:
        raise UserError(f"{rest[0]}: this command has no config")
    directory, newest = find_step(args.directory)
    is_step = absolute_path(args.directory) == directory / str(newest)
    print(directory)
    intact = [
        _report(directory / str(step))
        for step in ([newest] if is_step else steps(directory))
    ]
    return 0 if all(intact) else 1


def _report(step):
    """Prints a line for a step, and returns whether it may be used."""
    if not has_checksums(step):
        print(f"{step.name:>9}  has no checksums, so damage cannot be noticed")
        return True
    problems = damages(step)
    for problem in problems:
        print(f"{step.name:>9}  DAMAGED: {problem}")
    if not problems:
        print(f"{step.name:>9}  good")
    return not problems


if __name__ == "__main__":
    main()
