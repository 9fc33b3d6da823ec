"""Configs, each a file with get_config(); and what bare weights are taken for."""

import importlib


def published(family):
    """The config of the published run that a torch file's network is put into."""
    return importlib.import_module(f"configs.{family}_xl2").get_config()
