"""The run of tests/small.py as a config file."""

import small


def get_config():
    return small.config()
