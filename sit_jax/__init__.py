"""Scalable interpolant transformers in JAX.

Letters used for shapes everywhere:
B batch · H W latent height and width · C latent channels · T tokens · D width
L layers · K classes. Images are uint8 [B, H, W, 3]; latents float32 [B, H, W, C].
Time runs from 0 (noise) to 1 (data) on a path, and over 0..999 in a diffusion.
"""

__version__ = "0.2.0"
