"""Encodes images to a cache of latents; sit_jax/cli/extract_features.py."""

from sit_jax.cli import extract_features

if __name__ == "__main__":
    extract_features.main()
