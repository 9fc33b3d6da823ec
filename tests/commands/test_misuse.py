"""Mistakes that a person makes on a command line: one line, exit code 2, no output."""

from importlib import import_module

import numpy as np
import pytest
from helpers import small

TRAIN = "train --config {config} --workdir {new}"
SAMPLE = "sample --weights {run} --out {new}.png"
PORT = "port_weights {run} {new}.pt"
EXTRACT = "extract_features --data {folder} --vae {missing} --out {new}"
EVALUATE = "evaluate --features {features} --reference {features} --out {new} --force"
QUANTIZE = "quantize {run} {new}"
FIELDS = {  # of small_config.py: wrong values
    "accumulate": "0 3 x",
    "batch_size": "0 -8 7 1.5",
    "clip": "0 -1 nan",
    "ema_decay": "-1 1.5 nan",
    "evaluate_every": "-1 1",
    "guidance": "nan x",
    "keep_last": "0",
    "label_drop": "-0.1 1.5 nan",
    "log_every": "0",
    "mesh.data": "3 0",
    "mesh.tensor": "3",
    "model.attention": "nonsense",
    "model.classes": "0 -1",
    "model.depth": "0 x",
    "model.dpeth": "4",
    "model.dtype": "float7",
    "model.heads": "0 3",
    "model.patch": "0 3",
    "model.remat": "nonsense",
    "model.width": "0 7",
    "optimizer.b1": "-0.1 1.5",
    "optimizer.learning_rate": "-1 nan inf 1e9",
    "optimizer.weight_decay": "-1 nan",
    "precision.training": "nonsense",
    "process.path": "cubic",
    "sampler.steps": "0 -1",
    "save_every": "0",
    "seed": "-1 4294967296",
    "shape": "(4,4) (0,4,1)",
    "steps": "0 x",
    "synthetic": "maybe",
    "vae": "{missing}",
    "workers": "-1",
}
FLAGS = {
    TRAIN: "--steps=4 --init={missing} --heads=0 --family=nonsense --devices=8",
    SAMPLE: "--weights={missing} --labels=99 --labels=x --labels=1,,2 --num=0 "
    "--seed=-1 --seed=x --noise={missing}.npy --noise=torch:x --lora={missing} "
    "--vae={missing} --quantize=w3 --autoguidance={missing} --rounding=up "
    "--sampler=nonsense --steps=0 "
    "--respacing=x --respacing=250 --eta=0.5 --atol=0 --rtol=0.1 --guidance=nan "
    "--guidance-interval=0.8,0.2 --guidance-channels=4 --precision=fp4 --batch-size=0 "
    "--diffusion-form=sigma --last-step=Mean --trajectory=0 --preset=nonsense "
    "--from-manifest={missing} --config={missing} --heads=4 --emulate=abacus --stpes=4",
    PORT: "--step=-1 --step=7 --to=nonsense --family=sit --config={missing} "
    "--adapter=peft --reference={missing}",
    EXTRACT: "--size=7 --batch-size=0 --dtype=int8 --workers=-1 --broken-share=1.1 "
    "--kind=nonsense --threads=0",
    EVALUATE: "--metrics=nonsense --bootstrap=9 --features={missing} --batch-size=0 "
    "--reference={garbage} --network=nonsense",
    QUANTIZE: "--form=w3 --skip=( --heads=4",
}
OUTPUTS = (  # an output that exists, lies below a file, or has no such format
    "sample --weights {run} --out {garbage}",
    "sample --weights {run} --out {garbage}/x.npz",
    "sample --weights {run} --out {new}.jpg",
    "port_weights {run} {garbage}",
    "port_weights {missing} {new}.pt",
    "port_weights {garbage} {new}",
    "quantize {run} {garbage}",
    "train --config {missing}.py --workdir {new}",
    "train --config {config} --workdir {garbage}/below",
    "diagnose {missing} {features} --out {new}",
)
LINES = {  # what the line says, where a person needs more than the flag and its range
    f"{SAMPLE} --labels=1,5": "--labels: 5 is not a class; there are 0..4",
    f"{SAMPLE} --labels=cat": "'cat': random, balanced, classes",
    f"{SAMPLE} --labels=1,2 --num=3": "3 is not divisible by the 2 labels",
    f"{SAMPLE} --sampler=hein": "'hein' is unknown; there are",
    f"{SAMPLE} --sampler=ddpm": "DDPM",
    f"{SAMPLE} --sampler=dopri5 --steps=9": "AdaptiveODE has no such setting",
    f"{SAMPLE} --sampler=dopri5 --step-control=image": "there are global, sample,",
    f"{SAMPLE} --sampler=dopri5 --config.sampler.rtol=-1": "rtol=-1",
    f"{SAMPLE} --sampler=ddim --eta=2": "--eta 2: a number from 0 to 1",
    f"{SAMPLE} --sampler=euler-maruyama --diffusion-form=sigmoid": "there are sigma",
    f"{SAMPLE} --last-step=Mean": "--last-step Mean: FixedStepODE",
    f"{SAMPLE} --config.sampler.stesp=3": "did you mean 'steps'?",
    f"{SAMPLE} --guidance=nan": "--cfg-scale 'nan': a number",
    f"{SAMPLE} --guidance-interval=0.5": "two numbers LO,HI",
    f"{SAMPLE} --guidance-interval=0.5,0.2": "LO < HI in [0, 1]",
    f"{SAMPLE} --precision=double": "there are exact, fast, bf16",
    f"{SAMPLE} --emulate=tpu": "there are tpu-default, gpu-tf32",
    f"{SAMPLE} --noise=torch:x": "torch:SEED with a whole number",
    f"{SAMPLE} --vae=sd-vae-ft-mse": "not on latents; leave out --vae",
    f"{SAMPLE} --stpes=4": "did you mean --steps?",
    "sample --out {new}.png": "--weights PATH is needed",
    "sample --out {new}.png --preset=sit": "there are sit-paper-ode",
    "sample --out {new}.png --from-manifest=no.json": "no manifest to read",
    "sample --out {new}.png --from-manifest=no.json --seed=3 --guidance=2": (
        "--seed, --guidance: --from-manifest makes the same samples again"
    ),
    "sample --out {new}.npy --weights nowhere": "no weights at nowhere",
    "sample --out {new}.npy --weights {folder}": "no checkpoint in",
    "sample --out {new}.npy --weights {run} --trajectory=3": "needs --out x.png",
    "sample --out {new}.npy --weights {run} --labels=-1": "'-1': random, balanced",
    "sample --out {new}.csv --weights {run} --likelihood": "of real data",
    "sample --out {new}.csv --weights {run} --likelihood --guidance=2": (
        "a guided field is no model's density"
    ),
    "quantize {run} {new} --form=w5": "'w5' is no form",
    "quantize {run} {new} --config.seed=1": "unknown argument '--config.seed=1'",
}
CASES = [
    *(
        f"{TRAIN} --config.{f}={v}"
        for f, values in FIELDS.items()
        for v in values.split()
    ),
    *(f"{line} {flag}" for line, flags in FLAGS.items() for flag in flags.split()),
    *OUTPUTS,
    *LINES,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files to name, in a folder with a space and an umlaut."""
    root = tmp_path_factory.mktemp("a place ö")
    (root / "folder").mkdir()
    (root / "garbage").write_bytes(b"\x93NUM\0PY" * 50)
    rng = np.random.default_rng(0)
    np.savez(root / "features.npz", features=rng.normal(size=(20, 4)))
    small.checkpoint(root / "run", small.config())
    return root


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_one_line_and_touches_nothing(case, place, call):
    names = ("folder", "garbage", "run", "new", "missing")
    paths = {name: place / name for name in names}
    paths |= {"features": place / "features.npz", "config": small.FILE}
    script, *words = [word.format(**paths) for word in case.split()]
    before = sorted(place.rglob("*"))
    code, _, err = call(import_module(f"sit_jax.cli.{script}"), *words)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert LINES.get(case, "") in err
    assert sorted(place.rglob("*")) == before
