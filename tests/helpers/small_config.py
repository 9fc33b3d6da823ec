"""The run of tests/helpers/small.py as a config file."""

from helpers import small


def get_config():
    return small.config()
