"""The published runs as functions: sit("XL/2"), dit("B/4"), mdt("XL/2", version=2).

Each returns a ConfigDict, of which experiment.FIELDS says what every field means.
configs/ builds on them, as do torch files whose network takes a published one's place.
What a variant of the command line adds to a size, as in configs/sit.py:B/2+noise, is
in VARIANTS.
"""

import optax

from sit_jax.config import spec
from sit_jax.data.sources import LatentFolder
from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import (
    likelihood_weight,
    mdt_min_snr_loss,
    velocity_weight,
)
from sit_jax.diffusion.paths import VP, gvp
from sit_jax.errors import UserError
from sit_jax.models.codec import Latents, to_uint8_mdt
from sit_jax.models.dit import SIZES, DiT, SiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.parallel.mesh import fsdp_groups
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.ddpm import DDPM
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.samplers.sde import SDE
from sit_jax.training.optimizers import adan

VARIANTS = {  # word after a size: arguments of the recipe
    "512": {"resolution": 512},
    "gvp": {"process": {"path": gvp}},
    "vp": {"process": {"path": VP()}},
    "noise": {"process": {"prediction": predictions.noise}},
    "score": {"process": {"prediction": predictions.score}},
    "velocity-weight": {"process": {"loss_weight": velocity_weight}},
    "likelihood-weight": {"process": {"loss_weight": likelihood_weight}},
    "heun": {"sampler": lambda: spec(FixedStepODE, method=heun, steps=125)},
    "sde": {"sampler": lambda: spec(SDE)},
    "v2": {"version": 2},
}


def sit(size="XL/2", resolution=256, process=(), sampler=None):
    """Returns the config of a SiT on ImageNet: linear path, velocity, 7M steps of 256.

    Parameters and multiply-adds of an image of 256 pixels: XL/2 675M, 118.6G; L/2 458M,
    80.7G; B/2 130M, 23.0G; S/2 33M, 6.06G; patches of 4 and 8 cost 1/4 and 1/16 of it.

    Source: SiT's train.py and README: XL/2 FID-50K 2.06, inception score 270.27 (it
    also speaks of 2.15 against the paper's 2.06, without naming both samplers); at 512
    pixels 2.62 and 252.21; B/2 33.0 after 400K steps by SDE without guidance (paper;
    34.7 in issue 31). An author in issue 18: the released weights were evaluated by
    125 steps of Heun's method with guidance 1.5.

    Args:
      size: S, B, L or XL, and the patch: "B/4".
      resolution: pixels of an image's side.
      process: fields of the Interpolant that differ.
      sampler: function that returns a spec; None: dopri5 with guidance 4.
    """
    c = _training_defaults()
    c.shape = (resolution // 8, resolution // 8, 4)
    c.source.path = f"data/imagenet{resolution}"
    c.model = spec(SiT, remat="dots", **_size(size))
    c.process = spec(Interpolant, **dict(process))
    c.sampler = spec(AdaptiveODE, rtol=1e-3, atol=1e-6)
    if sampler is not None:
        c.sampler, c.guidance = sampler(), 1.5
    return c


def dit(size="XL/2", resolution=256):
    """Returns the config of a DiT on ImageNet: diffusion with learned variance.

    Source: DiT's README: XL/2 FID-50K 2.27, inception score 278.24 with guidance 1.5;
    19.5 without guidance after 400K steps (in JAX; the PyTorch port: 2.21 and 18.1); at
    512 pixels 3.04 and 240.82; B/4 68.4 after 400K steps without guidance (68.9 in
    PyTorch). Paper: S/8 153.6 (about 167.5 with another evaluator, issue 21).
    Parameters and multiply-adds are those of sit().
    """
    c = sit(resolution=resolution)
    c.model = spec(DiT, remat="dots", **_size(size))
    c.process = spec(GaussianDiffusion)
    c.sampler = spec(DDPM, steps=250)
    return c


def mdt(size="XL/2", version=1):
    """Returns the config of an MDT on ImageNet 256: a DiT that also hides tokens.

    Source: sail-sg/MDT, version 1 on its branch mdtv1; in brackets which file. FID-50K
    of XL/2: version 1 1.79, inception score 283.01 with guidance, without it 6.23 after
    6.5M steps; version 2 1.58 and 314.73, without guidance 7.70 after 400K steps. After
    400K steps without guidance: B/2 34.33, version 2 19.55; S/2 version 2 39.50. The
    paper's ablations: S/2 50.26 (57.01 after 300K steps elsewhere).

    Paper and repository of version 2 differ in the hidden share (0.3 falling to 0.05,
    against 0.3 to 0.5; the author in issue 45: the latter) and in the length of
    training (1080 epochs in tables, 4.6M steps elsewhere). The README said 2 decoder
    blocks until April 2024. For S/2 the author in issue 39: the paper's depths are
    right; the README's copy of run.sh has no --lr, which would be 3e-4. The decoders of
    B/2 and L/2 are not told: 4 is what the model takes if not told.
    """
    c = dit()
    # [image_sample.py: (x + 1) 127.5 to bytes, half a level less than DiT's rule]
    c.codec = spec(Latents, rounding=to_uint8_mdt)
    c.batch_size = 256  # [README: 64 GPUs x 4]
    c.ema_decay = 0.9999  # [image_train.py: ema_rate]; a tuple of rates keeps several
    c.timesteps = None  # [schedule_sampler uniform]; or spec(LossSecondMoment)
    c.log_quartiles = True  # [train_util.py]
    c.save_every = 10_000  # [save_interval]
    # [image_sample.py: cfg_scale 3.8, scale_pow 4, 250 steps]
    with c.ignore_type():  # which was a number's
        c.guidance = spec(PowerCosine, scale=3.8, power=4.0)
    if version == 2:
        # [run_sample.sh, infer_mdt.py and the weights: 4 blocks; run.sh: S/2 6]
        decoder = 6 if size == "S/2" else 4
        # [--mask_ratio 0.30; models.py: + 0.2 U(0,1)]
        masking = {"decoder": decoder, "mask_ratio": 0.3, "mask_ratio_range": 0.2}
        c.model = spec(MDTv2, remat="dots", **masking, **_size(size))
        c.process = spec(GaussianDiffusion, objective=mdt_min_snr_loss)
        # [train_util.py: betas 0.98, 0.92, 0.99, max_grad_norm 1; image_train.py: lr]
        c.optimizer = spec(adan, learning_rate=5e-4 if size == "S/2" else 3e-4)
        c.clip = 1.0
        c.log_every = 500  # [log_interval]
        c.steps = 4_600_000  # with batches of 256
        return c
    # [run.sh: --mask_ratio 0.30 --decode_layer 2, of all sizes; models.py: sizes]
    c.model = spec(MDT, decoder=2, mask_ratio=0.3, remat="dots", **_size(size))
    # [image_train.py: lr 3e-4, weight_decay 0, lr_anneal_steps 0, which means constant;
    # train_util.py: torch's AdamW]. --lr_anneal_steps N would be spec(
    # optax.linear_schedule, init_value=3e-4, end_value=0.0, transition_steps=N,
    # transition_begin=1), for the released loop lowers the rate after its step.
    c.optimizer = spec(optax.adamw, learning_rate=3e-4, weight_decay=0.0)
    c.log_every = 10  # [log_interval]
    c.steps = 6_500_000  # paper
    return c


def published(family):
    """Returns the config of the XL/2 of "sit", "dit", "mdt" or "mdtv2"."""
    if family == "mdtv2":
        return mdt(version=2)
    return {"sit": sit, "dit": dit, "mdt": mdt}[family]()


def from_variant(recipe, variant):
    """Returns the config of a recipe's variant, as configs/sit.py:B/2+noise names it.

    Args:
      recipe: sit, dit or mdt.
      variant: a size and words of VARIANTS, joined by "+".

    Raises:
      UserError: there is no such variant.
    """
    size, *words = variant.split("+")
    known = {"sit": set(VARIANTS) - {"v2"}, "dit": {"512"}, "mdt": {"v2"}}
    fields = {}
    for word in words:
        if word not in known[recipe.__name__]:
            listed = ", ".join(sorted(known[recipe.__name__]))
            raise UserError(f"variant {variant!r}: no {word!r}; there are {listed}")
        for name, value in VARIANTS[word].items():
            same = name == "process"
            fields[name] = {**fields.get(name, {}), **value} if same else value
    return recipe(size, **fields)


def _training_defaults():
    """Returns the fields that all runs share, with what SiT's train.py takes."""
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder

    c = ConfigDict()
    c.codec = spec(Latents)
    c.vae = placeholder(str)
    c.source = spec(LatentFolder, path="data/imagenet256")
    c.count_classes = False
    c.synthetic = False
    c.optimizer = spec(optax.adamw, learning_rate=1e-4, weight_decay=0.0)
    c.clip = placeholder(float)
    c.workers = 0
    c.batch_size = 256
    c.accumulate = 1
    c.ema_decay = 0.9999
    c.label_drop = 0.1
    c.seed = 0
    c.steps = 7_000_000
    c.max_skipped = 10
    c.check_replicas = 1_000
    c.log_every = 100
    c.save_every = 5_000
    c.keep_last = 3
    c.keep_every = 50_000
    c.sample_every = 10_000
    c.preview = 32
    c.evaluate_every = 0
    c.evaluate_images = 10_000
    c.reference = placeholder(object)
    c.features = placeholder(object)
    c.guidance = 4.0
    c.guidance_channels = 3
    c.precision = ConfigDict({"training": "fast", "model": "exact", "vae": "exact"})
    c.mesh = ConfigDict(fsdp_groups())
    return c


def _size(size):
    """Returns the model's fields of a size as in "XL/2"."""
    letters, _, patch = size.partition("/")
    if letters not in SIZES or patch not in ("2", "4", "8"):
        raise UserError(
            f"size {size!r}: S, B, L or XL, and a patch: S/2, B/4, XL/8 ..."
        )
    return {**SIZES[letters], "patch": int(patch)}
