"""Compares the steps of a run with their checksums.

python -m sit_jax.checkpoint verify DIR ends with exit code 0 if no step is damaged, 1
if one is, and 2 if there is no step.
"""

from sit_jax.checkpoint.checksums import damages, has_checksums
from sit_jax.checkpoint.store import find_step, steps
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.files import absolute_path


@entry_point
def main() -> int:
    """Runs the command, which prints a line for each step."""
    parser = make_parser(__doc__.splitlines()[0], has_config=False)
    parser.add_argument("what", choices=["verify"])
    parser.add_argument("directory", metavar="DIR", help="workdir, checkpoints or step")
    args, _ = parse_args(parser)
    directory, newest = find_step(args.directory)
    is_step = absolute_path(args.directory) == directory / str(newest)
    print(directory)
    is_damaged = False
    for number in [newest] if is_step else steps(directory):
        step = directory / str(number)
        problems = [f"DAMAGED: {problem}" for problem in damages(step)]
        is_damaged = is_damaged or bool(problems)
        if not has_checksums(step):
            problems = ["has no checksums, so damage cannot be noticed"]
        for line in problems or ["good"]:
            print(f"{number:>9}  {line}")
    return int(is_damaged)


if __name__ == "__main__":
    main()
