"""Judges images: python evaluate.py samples.npz --reference VIRTUAL_imagenet256.npz"""

from sit_jax.cli import evaluate

if __name__ == "__main__":
    evaluate.main()
