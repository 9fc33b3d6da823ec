"""The run of tests/small.py with a curve of distances by a toy network."""

import test_curve


def get_config():
    return test_curve.config()
