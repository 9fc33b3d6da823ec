"""Makes a checkpoint of int8 or 4-bit weights: python quantize.py runs/digits digits-w8

What sample.py takes by --weights; a fourth of the bytes on disk and in memory, or less.
"""

from sit_jax.cli import quantize

if __name__ == "__main__":
    quantize.main()
