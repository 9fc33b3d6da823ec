"""Weights in other forms than plain arrays: LoRA, DoRA, 8 and 4 bits, new classes."""
