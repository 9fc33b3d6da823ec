"""SiT-XL/2 on ImageNet 256: linear path, velocity, 7M steps of 256 images.

SiT's README: FID-50K 2.06, IS 270.27; it also speaks of 2.15 against the paper's 2.06,
without naming both samplers. Data: a folder of cached latents, data/imagenet256.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sit_jax.config import spec
from sit_jax.data.sources import LatentFolder
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.models.codec import Latents
from sit_jax.models.dit import SIZES, SiT
from sit_jax.parallel.mesh import fsdp_groups
from sit_jax.samplers.adaptive_ode import AdaptiveODE


def get_config():
    c = ConfigDict()
    c.shape = (32, 32, 4)
    c.model = spec(SiT, patch=2, remat="dots", **SIZES["XL"])
    c.process = spec(Interpolant)
    c.codec = spec(Latents)
    c.vae = placeholder(str)  # name or path: encodes images, draws the sheets
    c.source = spec(LatentFolder, path="data/imagenet256")
    c.count_classes = False  # model.classes becomes the number that the data has
    c.synthetic = False  # random latents instead of c.source
    c.optimizer = spec(optax.adamw, learning_rate=1e-4, weight_decay=0.0)
    c.clip = placeholder(float)  # global norm of the gradient; None: no clipping
    c.workers = 0  # processes that decode images; 0: threads
    c.batch_size = 256  # over all devices
    c.accumulate = 1  # parts that a batch is gone through in
    c.ema_decay = 0.9999
    c.label_drop = 0.1
    c.seed = 0
    c.steps = 7_000_000
    c.max_skipped = 10  # steps in a row without a finite gradient, then it stops
    c.check_replicas = 1_000  # steps between comparisons of what devices copy; 0: never
    c.log_every = 100
    c.save_every = 5_000
    c.keep_last = 3
    c.keep_every = 50_000
    c.sample_every = 10_000
    c.preview = 32  # images on the sheet made every sample_every steps
    c.evaluate_every = 0  # steps between points of a curve of FIDs; 0: none
    c.evaluate_images = 10_000  # drawn for a point
    c.reference = placeholder(object)  # what they are held against: a file, a source
    c.features = placeholder(object)  # of what network; None: Inception
    c.sampler = spec(AdaptiveODE, rtol=1e-3, atol=1e-6)
    c.guidance = 4.0
    c.guidance_channels = 3
    c.precision = ConfigDict({"training": "fast", "model": "exact", "vae": "exact"})
    c.mesh = ConfigDict(fsdp_groups())
    return c
