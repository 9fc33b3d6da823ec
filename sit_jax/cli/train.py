"""Trains what a config describes: python train.py --config configs/digits.py

The same command in the same workdir goes on where its last checkpoint left off.
"""

from sit_jax import config as configs
from sit_jax.cli.main import StopSignal, entry_point, make_parser, parse_args
from sit_jax.convert.open import WeightsRef, add_init_flags
from sit_jax.experiment import describe
from sit_jax.parallel import multihost
from sit_jax.planning import report
from sit_jax.trainer.compile import keep_freed_memory, use_compilation_cache
from sit_jax.trainer.loop import train


@entry_point
def main() -> int:
    """Runs train.py's command line."""
    keep_freed_memory()  # before JAX starts its threads
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/CONFIG")
    parser.add_argument("--print-config", action="store_true", help="and do no more")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log to wandb")
    add_init_flags(parser)
    multihost.add_flags(parser)
    report.add_flags(parser)
    args, overrides = parse_args(parser)
    report.check_flags(args)
    if not args.plan:
        multihost.initialize(args, heed_sigterm=True)
        use_compilation_cache()
    config = configs.load(args.config)
    configs.override(config, overrides)
    if args.print_config:
        print(*describe(config), sep="\n")
        return 0
    if args.plan:
        options = {flag: getattr(args, flag) for flag in report.FLAGS}
        for line in report.plan_training(config, **options):
            print(line, flush=True)
        return 0
    workdir = args.workdir or f"runs/{configs.run_name(args.config)}"
    init = WeightsRef(args.init, args.weights_only, args.family, args.heads)
    train(config, workdir, init, wandb=args.wandb, stop=StopSignal())
    return 0


if __name__ == "__main__":
    main()
