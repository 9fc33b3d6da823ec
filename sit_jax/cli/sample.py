"""Draws samples: python sample.py --weights runs/digits --labels 0,1,2 --out x.png

The network comes from the weights; sampler and guidance from there too, or from a
preset, a config or the flags. Image i follows from the seed, its label and i alone.
"""

import dataclasses
from argparse import Namespace
from pathlib import Path

import numpy as np

from sit_jax import config as configs
from sit_jax.adapters.quantize import FORMS, SKIP, make_quantizer
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert import adapters
from sit_jax.convert.open import WeightsRef, add_torch_flags
from sit_jax.errors import UserError
from sit_jax.models.codec import rounding_name
from sit_jax.parallel import multihost
from sit_jax.planning import report
from sit_jax.precision.emulation import EMULATED
from sit_jax.ranges import COUNT, SEED
from sit_jax.sampling import flags, job, labels, noise, outputs, presets, survey
from sit_jax.sampling.partial_results import is_begun
from sit_jax.sampling.run import build_context, run_sampling_job
from sit_jax.trainer.compile import use_compilation_cache
from sit_jax.trainer.previews import grid_labels

# flags beside --from-manifest: where things are, and what runs on how many hosts
REPEATED = set(
    "from_manifest weights out overwrite force save_noise coordinator processes "
    "process heartbeat".split()
)


@entry_point
def main() -> int:
    """Runs sample.py with the arguments of the process; returns the exit code."""
    args, overrides = parse_args(_parser())
    report.check_flags(args)
    if args.plan:
        return plan(args, overrides)
    if not args.out:
        raise UserError("--out X is needed: x.png, x.npy, x.npz or folder/")
    multihost.initialize(args)
    use_compilation_cache()
    with multihost.lock_output(args.out):
        if args.likelihood:
            return likelihood(args, overrides)
        return sample(args, overrides)


def sample(args: Namespace, overrides: list[str]) -> int:
    """Writes args.out and its manifest; returns the exit code."""
    # a kill may have come when the output was there and its parts not yet gone
    begun = is_begun(args.out, args.out)
    out = outputs.check_output(args.out, args.overwrite or begun)
    if args.trajectory is not None and out.suffix != ".png":
        raise UserError(f"--trajectory needs --out x.png, not {args.out}")
    if args.quantize is not None:
        make_quantizer(args.quantize, args.quantize_skip)
    wanted, expected = _make_job(args, overrides)
    weights = _open(wanted.weights, wanted.family, wanted.heads)
    guiding_weights = _open(wanted.weak) if wanted.weak else None
    expected = None if args.force else expected
    context = build_context(wanted, weights, guiding_weights, expected)
    outputs.check_codec(out, context.experiment)
    if args.save_noise:
        noise.save_noise(args.save_noise, context, args.overwrite)
    lines = run_sampling_job(
        context,
        out,
        overwrite=args.overwrite,
        columns=_columns(args, wanted),
    )
    print(*lines, out, sep="\n")
    return 0


def plan(args: Namespace, overrides: list[str]) -> int:
    """Prints what a batch would take; returns the exit code."""
    if args.weights:
        config = _open(args.weights, args.family, args.heads).config
    elif args.config:
        config, args.config = configs.load(args.config), None
    else:
        raise UserError("--plan needs --weights PATH or --config FILE")
    config = flags.apply(config, args, overrides, args.weights)
    lines = report.plan_sampling(
        config, args.batch_size, topology=args.topology, once=args.once
    )
    for line in lines:
        print(line, flush=True)
    return 0


def likelihood(args: Namespace, overrides: list[str]) -> int:
    """Writes a table of log likelihoods; returns the exit code."""
    if args.guidance not in (None, 1.0) or args.guidance_interval:
        raise UserError(
            "--likelihood: a guided field is no model's density; leave out --guidance"
        )
    for flag, value in (("--quantize", args.quantize), ("--lora", args.lora)):
        if value:
            raise UserError(f"--likelihood takes no {flag}: it measures the weights")
    if args.preset or args.from_manifest:
        raise UserError("--likelihood goes with --weights, not with a preset")
    out = survey.check_output(args.out, args.overwrite)
    weights = _open(args.weights, args.family, args.heads)
    config = flags.apply(weights.config, args, overrides, args.weights)
    args.seed = args.seed or 0
    fields = (f.name for f in dataclasses.fields(survey.Survey))
    chosen = survey.Survey(**{name: vars(args)[name] for name in fields})
    item = "params" if args.no_ema else "ema"
    print(*survey.measure(weights, config, out, item, chosen), out, sep="\n")
    return 0


def _parser():
    parser = make_parser(__doc__.splitlines()[0])
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--weights", metavar="PATH", help="workdir, checkpoint, .pt ... or a name")
    add("--preset", metavar="NAME", help=", ".join(presets.PRESETS))
    add("--from-manifest", metavar="FILE", help="the same samples again")
    add("--config", metavar="FILE", help="another sampler and guidance; same network")
    add("--labels", metavar="A,B,...", help="classes | random | balanced | FILE")
    add("--num", type=COUNT, metavar="N", help="images; default: one for each label")
    add("--seed", type=SEED, metavar="N", help="default: the preset's, else 0")
    add("--out", metavar="X", help="x.png | x.npy | x.npz | folder/")
    add("--noise", metavar="FILE.npy", help="start from it; or torch:SEED")
    add("--save-noise", metavar="FILE.npy", help="keep what the images started from")
    many = {"action": "append", "default": []}
    add("--lora", metavar="PATH[:WEIGHT]", help="adapters, of any kind", **many)
    add("--autoguidance", metavar="PATH", help="worse weights, to lead away from")
    add("--no-ema", action="store_true", help="the weights themselves, not their mean")
    add("--vae", metavar="PATH", help="or sd-vae-ft-mse, sd-vae-ft-ema")
    add("--rounding", metavar="RULE", help="dit (DiT, SiT) | mdt (MDT)")
    add_torch_flags(add)
    add("--overwrite", action="store_true")
    add("--force", action="store_true", help="other weights than the manifest's")
    flags.add_flags(parser)
    survey.add_flags(parser)
    how = parser.add_argument_group("how it is computed")
    add = how.add_argument
    add("--batch-size", type=COUNT, default=64, metavar="N")
    add("--emulate", metavar="PLATFORM", help=", ".join(EMULATED))
    add("--quantize", metavar="FORM", help=FORMS)
    add("--quantize-skip", default=SKIP, metavar="REGEX")
    multihost.add_flags(parser)
    report.add_flags(parser)
    return parser


def _make_job(args, overrides):
    """Returns the job, and the sha256 that its weights must have, or None."""
    if args.from_manifest:
        _require_same(args, overrides)
        recorded, expected = job.read_manifest(args.from_manifest)
        if args.weights:
            recorded = dataclasses.replace(recorded, weights=args.weights)
        return recorded, expected
    preset = presets.get_preset(args.preset) if args.preset else None
    if preset:
        print(presets.describe_preset(args.preset, preset))
    source = args.weights or (preset and preset.weights)
    if not source:
        raise UserError("--weights PATH is needed, or --preset or --from-manifest")
    weights = _open(source, args.family, args.heads)
    config = flags.apply(weights.config, args, overrides, source, preset)
    item = "params" if args.no_ema else "ema"
    classes = config.model.classes + adapters.count_new_classes(
        args.lora, weights, item
    )
    seed = preset.seed if preset and args.seed is None else args.seed or 0
    word, number = _requested_labels(args, preset, tuple(config.shape))
    made = job.SamplingJob(
        weights=str(source),
        config=configs.to_json(config),
        labels=labels.make_labels(word, number, classes, seed),
        item=item,
        family=args.family,
        heads=args.heads,
        seed=seed,
        noise=args.noise,
        batch_size=args.batch_size,
        weak=args.autoguidance,
        vae=args.vae or (preset.vae if preset else _own_vae(args, config)),
        rounding=args.rounding
        or (preset.rounding if preset else rounding_name(config.codec.rounding)),
        emulate=args.emulate,
        lora=tuple(args.lora),
        quantize=args.quantize,
        quantize_skip=args.quantize_skip,
    )
    return made, None


def _requested_labels(args, preset, shape):
    """Returns the word for labels, and how many images, or None."""
    number, word = args.num, args.labels
    if preset and word is None and number is None:
        number, word = preset.num, preset.labels
    if args.noise and not args.noise.startswith("torch:") and number is None:
        number = len(noise.read_noise(args.noise, shape))
    return word, number


def _require_same(args, overrides):
    """Refuses what would make other samples than those of a manifest."""
    usual = vars(_parser().parse_args([]))
    changed = [name for name, value in vars(args).items() if value != usual[name]]
    other = [f"--{n.replace('_', '-')}" for n in changed if n not in REPEATED]
    if other := [*other, *overrides]:
        raise UserError(
            f"{', '.join(other)}: --from-manifest makes the same samples again; for "
            "others name --weights and all that is wanted instead"
        )


def _own_vae(args, config):
    """The VAE that the run was trained with, if pictures are wanted."""
    return config.get("vae") if outputs.wants_pictures(Path(args.out)) else None


def _open(path, family=None, heads=None):
    return WeightsRef(path, family=family, heads=heads).open()


def _columns(args, wanted):
    """Of a sheet: a row for each listed label with several images, else a square."""
    listed = (args.labels or "").split(",")
    each = len(wanted.labels) // len(listed)
    if args.labels and each > 1 and np.all(np.char.isdecimal(listed)):
        return each
    return grid_labels(len(wanted.labels) + 1, len(wanted.labels))[0]


if __name__ == "__main__":
    main()
