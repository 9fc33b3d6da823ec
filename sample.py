"""Draws samples: python sample.py --weights runs/digits --labels 0,1,2 --out x.png"""

from sit_jax.cli import sample

if __name__ == "__main__":
    sample.main()
