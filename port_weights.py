"""Turns PyTorch weights into a checkpoint directory, or a checkpoint into PyTorch's.

python port_weights.py SiT-XL-2-256.pt sit-xl2 --family sit
python port_weights.py runs/digits digits.pt
"""

from sit_jax.cli import port_weights

if __name__ == "__main__":
    port_weights.main()
