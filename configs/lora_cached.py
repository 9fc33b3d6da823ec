"""LoRA for classes of one's own: adapters of SiT-XL/2, and a new label for each class.

python train.py --config configs/lora_cached.py --init sit-w8 --workdir runs/own \
    --config.source.source.path=latents --config.adapter.new_classes=3
latents: a cache of extract_features.py, of three classes here, which get the numbers
1000 to 1002; sit-w8: a checkpoint of quantize.py (QLoRA), or one of floats.
docs/how-to/lora.md has all commands.
"""

from configs.lora_xl2 import get_config as lora_xl2
from sit_jax.config import spec
from sit_jax.data.latent_cache import LatentCache
from sit_jax.data.sources import LabelOffset


def get_config():
    c = lora_xl2()
    c.source = spec(
        LabelOffset, source=spec(LatentCache, path="data/latents"), after=1000
    )
    c.count_classes = True
    c.adapter.new_classes = 1
    c.precision.training = "bf16"
    c.batch_size = 32
    c.steps = 5_000
    c.save_every = 500
    c.sample_every = 500
    c.preview = 8
    return c
