"""Coins: which records are seen in a mirror."""

import numpy as np


def coins(seed, positions):
    """positions int [N] -> bool [N], each true with probability 1/2.

    The top bit of splitmix64 (Steele, Lea, Flood 2014), started at a hash of the seed
    that the order does not use.
    """
    start = np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)
    x = start + np.asarray(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(63) == 1
