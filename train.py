"""Trains what a config describes: python train.py --config configs/digits.py"""

from sit_jax.cli import train

if __name__ == "__main__":
    train.main()
