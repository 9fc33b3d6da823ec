"""A stand-in for a package that is not there, where only its names are asked for."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types


def stand_in(package):
    """Makes imports of a package work if it is missing or does not fit this torch.

    Every name in it is an empty class. What really needs the package fails later.
    """
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):  # the latter beside another version of torch
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder(package))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package):
        self._package = package

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != self._package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


class _Class(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})
