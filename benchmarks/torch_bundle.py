"""A bundle by an original in PyTorch: torch_bundle.py --reference DIR --collect OUT

DIR is a clone of SiT, DiT, fast-DiT or MDT (branch mdtv1 for the first version). The
clone's own code computes what diagnose.py --collect does of --from-manifest M, from the
same weights and inputs, a VAE is diffusers', Inception torch-fidelity's. OUT takes its
place beside another side's: python diagnose.py JAX TORCH --out report/. The clone needs
timm, SiT's also torchdiffeq; torchvision is not needed.
"""

import contextlib
import platform
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import torch
import torch_stages
from absent import stand_in
from torch_judge import TorchJudge

from sit_jax.cli import diagnose
from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert import inception
from sit_jax.convert.parity import build_original, import_original
from sit_jax.convert.rules import to_torch
from sit_jax.convert.state_dict import StateDictSpec
from sit_jax.diagnosis import bundle, stages
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.errors import UserError
from sit_jax.files import require_free
from sit_jax.manifest import weights_hash
from sit_jax.precision import probe
from sit_jax.ranges import COUNT

PACKAGES = ("torch", "timm", "torchdiffeq", "diffusers", "torch-fidelity", "numpy")
WIDTHS = ((1,), (3,))  # of pictures


@entry_point
def main():
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--reference", required=True, metavar="DIR", help="a clone of the original")
    add("--collect", required=True, metavar="OUT", help="the bundle, a folder")
    add("--from-manifest", required=True, metavar="M", help="of samples")
    add("--weights", metavar="PATH", help="where they are on this machine")
    add("--inputs", metavar="BUNDLE", help="take its noise, times and labels")
    add("--images", type=COUNT, default=8, metavar="N")
    add("--steps", type=COUNT, default=50, metavar="N", help="of the fixed grid")
    add("--inception", metavar="FILE", help="weights of the 2015 network, for features")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tf32", action="store_true", help="as the originals' scripts set it")
    add("--force", action="store_true", help="other weights than the manifest's")
    add("--overwrite", action="store_true")
    args, rest = parse_args(parser)
    if rest:
        raise UserError(f"{rest[0]}: this script has no config")
    _check_device(args.device)
    out = require_free(args.collect, args.overwrite)
    given = bundle.read(args.inputs) if args.inputs else None
    context, manifest = diagnose.open_context(args)
    torch_stages.check(context)
    allow_tf32(args.tf32)
    judge = None
    if args.inception:
        judge = TorchJudge(inception.load_inception(args.inception), args.device)
    made = collect(context, manifest, out, args, given, judge)
    bundle.write(made)
    print(f"{len(made.stages)} stages of {len(made.inputs['t'])} images")
    print(made.record["precision"]["line"], out, sep="\n")
    return 0


def _check_device(name):
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}") from error


def collect(context, manifest, out, args, given=None, judge=None):
    """Returns the Bundle of what the clone computes for a job and its manifest."""
    parts, program = context.experiment, stages.stage_program(context, args.steps)
    inputs = stages.make_inputs(context, args.images, given)
    # first: diffusers takes the stand-in for torchvision for the real one
    vae = torch_stages.autoencoder(parts.codec)
    network, held = _network(context, args)
    x, t, y = (torch.from_numpy(np.array(inputs[n])) for n in bundle.INPUTS)
    x, t, y = (a.to(args.device) for a in (x.permute(0, 3, 1, 2), t, y.long()))
    found = torch_stages.activations(network, x.contiguous(), t, y)
    net, both, more = torch_stages.guided(parts, network, y)
    if more:
        found["guidance"] = torch_stages.nhwc(net(both(x), both(t))[: len(x)])
    chain = not isinstance(parts.process, Interpolant)
    run = torch_stages.chain
    if not chain:
        run = partial(torch_stages.flow, method=program.method)
    last = run(parts, net, both(x), more, args.steps, found)[: len(x)]
    found[f"{args.steps} steps"] = torch_stages.nhwc(last)
    found |= torch_stages.pictures(parts.codec, vae, last)
    judged = judge is not None and found.get("uint8", np.empty(0)).shape[-1:] in WIDTHS
    if judged:
        found |= judge.stages(found["uint8"])
    measured = _measured(args, context.record["precision"]["words"])
    where = _environment(args)
    drawn = ("job", "noise_sha256", "batch_size", "threefry_partitionable")
    manifest = {
        **{name: manifest[name] for name in drawn if name in manifest},
        **context.record,
        "weights_sha256": weights_hash(held),
        "precision": measured,
        **where,
    }
    count = args.steps * (1 if chain else program.method.stages)
    name = "DDIM" if chain else program.method.__name__
    record = {
        "manifest": manifest,
        "architecture": stages.architecture(context),
        "weights": stages.hash_weights(held),
        "precision": measured,
        "environment": where,
        "solver": {"method": name, "steps": args.steps, "evaluations": count},
        "stages": list(found),
        **({bundle.EVALUATION: judge.pipeline} if judged else {}),
    }
    return bundle.Bundle(out, record, inputs, found)


def allow_tf32(allowed):
    """Products by TF32 on a GPU that has it: two flags, of cuBLAS and of cuDNN."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _network(context, args):
    """Returns the clone's network with the job's weights, and its state of them."""
    parts = context.experiment
    released = StateDictSpec(parts.model, parts.shape)
    ours = jax.tree.map(np.asarray, context.params)
    state = to_torch(released.rules, ours) | released.constants
    sys.path.insert(0, str(Path(args.reference).expanduser()))
    stand_in("torchvision")  # timm imports it for its data, and wants none here
    module = import_original(args.reference)
    with contextlib.redirect_stdout(sys.stderr):  # MDT's says what it was given
        network = build_original(module, parts.model, parts.shape, state)
    network = network.to(args.device).requires_grad_(False)
    kept = {n: v.cpu().numpy() for n, v in network.state_dict().items()}
    return network, released.to_params(kept)


def _measured(args, words):
    """What a manifest says of precision: probe.py's measurement, made by torch."""
    left, right, image, kernel = (
        torch.from_numpy(a).to(args.device) for a in probe.operands()
    )
    patches = torch.nn.functional.conv2d(
        image.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), stride=2
    )
    dot = probe.bits(torch_stages.numpy(left @ right))
    convolution = probe.bits(torch_stages.nhwc(patches).reshape(probe.SIZE, probe.SIZE))
    word = "fast" if args.tf32 else "exact"
    flags = {
        "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    name = _device_name(args)
    return {
        "words": {**words, "model": word, "vae": word},
        "emulate": None,
        "default dot": dot,
        "model dot": dot,
        "convolution": convolution,
        "flags": flags,
        "line": f"precision: torch, TF32 {'on' if args.tf32 else 'off'}; mantissa bits "
        f"of a dot {dot}, convolution {convolution} ({name})",
    }


def _environment(args):
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": found,
        "platform": "cpu" if args.device == "cpu" else "gpu",
        "device": _device_name(args),
        "devices": 1,
        "hosts": 1,
    }


def _device_name(args):
    cpu = args.device == "cpu"
    return "torch on a CPU" if cpu else torch.cuda.get_device_name(args.device)


if __name__ == "__main__":
    main()
