"""Constructors as data: build(spec(make, **fields)) == make(**fields).

A spec lists every field of make with its default, so each of them can be set from the
command line (--config.model.depth=4) and a misspelled one is refused. As JSON a
constructor is its full name. A stored config is a stranger's data: from_json looks a
name up only if ROLES allows it for the field in which it stands, and leaves any other
as an Unavailable, which build() refuses.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import traceback
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import (
    RequiredValueError,
    placeholder,
    required_placeholder,
)

from sit_jax.errors import UserError, first_line
from sit_jax.ranges import ONLY_FILE, check_fields


@dataclasses.dataclass(frozen=True)
class Role:
    """What the constructors are like that a stored config may name in one field.

    packages: where they are defined. attribute: what each of their classes has.
    functions: whether a function may be called too, as optax's are. user_only: classes
    that run what their fields name, so that only a user's own file may name them.
    """

    packages: tuple[str, ...]
    attribute: str = "__init__"
    functions: bool = False
    user_only: tuple[str, ...] = ()


ROLES = {  # field of a config -> what may stand there, and in its fields
    "model": Role(("sit_jax.models",), "classes"),
    "process": Role(("sit_jax.diffusion",)),
    "timesteps": Role(("sit_jax.diffusion",)),
    "guidance": Role(("sit_jax.diffusion",)),
    "sampler": Role(("sit_jax.samplers", "sit_jax.diffusion", "diffrax")),
    "codec": Role(("sit_jax.models",), "decode"),
    "adapter": Role(("sit_jax.adapters",)),
    "optimizer": Role(("sit_jax.training", "optax"), functions=True),
    "source": Role(("sit_jax.data",), "__getitem__", user_only=("Tfds",)),
    "reference": Role(("sit_jax.data",), "__getitem__", user_only=("Tfds",)),
    "features": Role(("sit_jax.evaluation",), "__call__"),
}
# What configs stored by sit_jax 0.1 call otherwise. Whatever only moved to another
# module is found by its name.
RENAMED = {  # the last module and the name -> the name now
    "chain.Ancestral": "DDPM",
    "chain.Ddim": "DDIM",
    "adaptive.AdaptiveOde": "AdaptiveODE",
    "adaptive.over_batch": "batch_error_control",
    "adaptive.per_image": "per_sample_control",
    "diffusion.Diffusion": "GaussianDiffusion",
    "diffusion.bound": "kl_loss",
    "diffusion.hybrid": "hybrid_loss",
    "diffusion.rescaled_bound": "rescaled_kl_loss",
    "diffusion.rescaled_hybrid": "rescaled_hybrid_loss",
    "further.Further": "LabelOffset",
    "guidance.Interval": "GuidanceInterval",
    "lora.Lora": "LoRA",
    "min_snr.MinSnrHybrid": "MinSnrHybridLoss",
    "min_snr.min_snr": "mdt_min_snr_loss",
    "ode.Ode": "FixedStepODE",
    "rounding.to_uint8_darker": "to_uint8_mdt",
    "schedules.DdimSpacing": "DDIMSpacing",
    "sde.Sde": "SDE",
    "sde.by_score": "diffusion_sbdm",
    "sde.by_sigma": "diffusion_sigma",
    "sde.constant": "diffusion_constant",
    "sde.decreasing": "diffusion_decreasing",
    "sde.euler": "last_step_euler",
    "sde.falling": "diffusion_linear",
    "sde.increasing_decreasing": "diffusion_increasing_decreasing",
    "sde.mean": "last_step_mean",
    "sde.none": "last_step_none",
    "sde.tweedie": "last_step_tweedie",
    "styles.Styled": "ImageTransform",
    "styles.inverted": "invert",
    "time_densities.Times": "DensityTimesteps",
    "torchdiffeq.like_torchdiffeq": "torchdiffeq_control",
}
RENAMED_FIELDS = {  # of constructors that have the field on the right
    "broken_share": "max_corrupt_fraction",
    "frames": "trajectory_length",
    "hide": "mask_ratio",
    "kept": "use_timesteps",
    "lead": "cond_fn",
    "mend": "denoised_fn",
    "predicts": "prediction",
    "sample_margin": "sample_eps",
    "sizes": "mask_buckets",
    "spread": "mask_ratio_range",
    "style": "transform",
    "train_margin": "train_eps",
    "weight": "loss_weight",
}
WORDS = {  # type of a field -> what an argument for it must be
    bool: "True or False",
    int: "a whole number, in digits",
    float: "a number",
    tuple: "a tuple, like (1, 2)",
}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def spec(make, **fields):
    """Returns the ConfigDict of a constructor and all its fields.

    Args:
      make: a class or function.
      **fields: what differs from its defaults.

    Raises:
      UserError: there is no such field.
    """
    defaults = _fields(make)
    for name in fields:
        if name not in defaults:
            raise UserError(
                f"{make.__name__} has no field {name!r}{_near(name, defaults)}"
            )
    values = {name: _settable(value) for name, value in {**defaults, **fields}.items()}
    return ConfigDict({"make": make, **values}, convert_dict=False)


class Unavailable:
    """A name in a stored config that is not allowed where it stands."""

    def __init__(self, name, role):
        where = f"the role {role}" if role in ROLES else repr(role)
        self.__name__ = name
        self.reason = (
            f"a stored config names {name!r}, which may not stand for {where}, or is "
            "of another version; name it in a --config FILE of your own"
        )


def build(node):
    """Returns the object that a spec stands for; anything else as it is.

    Raises:
      UserError: a field does not fit its annotation, is missing, or is refused by the
        constructor; or a stored config names what it may not.
    """
    if isinstance(node, Unavailable):
        raise UserError(node.reason)
    if isinstance(node, (tuple, list)):
        return type(node)([build(item) for item in node])
    if not isinstance(node, ConfigDict):
        return node
    make = build(node.get("make", dict))
    if not callable(make):
        raise UserError(f"make is {make!r}; only a config file can name a constructor")
    fields = {}
    for name in node:
        try:
            if name != "make":
                fields[name] = build(node[name])
        except RequiredValueError as error:
            raise UserError(
                f"{make.__name__} needs a value for its field {name!r}"
            ) from error
    check_fields(make, fields)
    try:
        return make(**fields)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{make.__name__}: {first_line(error)}") from error


def load(path):
    """Returns the config of a Python file with a get_config(), run as a module.

    Args:
      path: FILE.py, or FILE.py:VARIANT for get_config(VARIANT).

    Raises:
      UserError: there is no such file, or it raises an exception.
    """
    path, variant = _split_variant(path)
    if not path.is_file():
        raise UserError(f"no config file at {path}{_config_hint(path)}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise UserError(f"{path} is not a Python file with a get_config()")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError("it has no get_config()")
        if variant and not inspect.signature(module.get_config).parameters:
            raise UserError(f"it has no variants, so no {variant[0]!r}")
        return module.get_config(*variant)
    except Exception as error:  # whatever the file raises, its author can mend
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        place = _place(path, error)
        raise UserError(f"{place}: {kind}{first_line(error)}") from error


def run_name(path):
    """Returns what a run of the config FILE.py or FILE.py:VARIANT is called."""
    path, variant = _split_variant(path)
    return "-".join([path.stem, *(re.sub(r"\W+", "-", word) for word in variant)])


def override(config, arguments):
    """Applies arguments of the form --config.a.b=value, in place."""
    for argument in arguments:
        flag, separator, text = argument.partition("=")
        node, name = _find_field(config, flag.removeprefix("--config."))
        if not separator:
            raise UserError(f"{flag} has no value; write {flag}=VALUE")
        kind = node.get_type(name)
        try:
            node[name] = _parse(text, kind)
        except (TypeError, ValueError, SyntaxError, KeyError) as error:
            words = WORDS.get(kind, "another value")
            raise UserError(f"{argument}: it must be {words}") from error


def to_json(node):
    """Returns a config as plain JSON values; constructors become their full names."""
    if isinstance(node, FieldReference):
        node = node.get()
    if isinstance(node, (ConfigDict, dict)):
        return {key: to_json(value) for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return [to_json(value) for value in node]
    if isinstance(node, np.generic):
        return node.item()
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, Unavailable):
        return {"name": node.__name__}
    if callable(node) and hasattr(node, "__qualname__"):
        if "<" in node.__qualname__:  # <lambda>, <locals>
            raise UserError(f"{node.__qualname__} has no name; define it in a module")
        return {"name": _full_name(node)}
    raise UserError(f"a config cannot hold {node!r}; write it as a spec")


def from_json(value, role=None):
    """Returns the config that to_json wrote, with every default of its time.

    Args:
      value: JSON of a whole config, or of the one field `role`.
      role: a key of ROLES, which says which names may be looked up. Names that may
        not become Unavailable: nothing of theirs is imported, and build() refuses them.

    Raises:
      UserError: the JSON is no config.
    """
    if isinstance(value, list):
        return tuple(from_json(item, role) for item in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {"name"}:
        return _look_up(str(value["name"]), role)
    items = {
        key: _settable(from_json(item, role or key)) for key, item in value.items()
    }
    make = items.get("make")
    if callable(make) and not _is_constructor(make, ROLES[role]):
        items["make"] = Unavailable(value["make"]["name"], role)
    elif callable(make):
        fields = _fields(make)
        for old, new in RENAMED_FIELDS.items():
            if old in items and old not in fields and new in fields:
                items[new] = items.pop(old)
    try:
        return ConfigDict(items, convert_dict=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"a stored config is none: {first_line(error)}") from error


def difference(one, other):
    """Returns [(dotted name, text, text)] of what differs in two JSON configs."""
    one, other = (
        {name: json.dumps(value) for name, value in leaves(config)}
        for config in (one, other)
    )
    absent = "(absent)"
    names = sorted({*one, *other})
    pairs = ((name, one.get(name, absent), other.get(name, absent)) for name in names)
    return [pair for pair in pairs if pair[1] != pair[2]]


def leaves(value, name=""):
    """Yields (dotted name, value) of all that a JSON config holds.

    A constructor is {"name": ...}, the value of its field "make".
    """
    if isinstance(value, dict) and set(value) != {"name"}:
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _fields(make):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in ("parent", "name")
    }


def _settable(value):
    """Returns a value as a field that the command line can set."""
    if value is inspect.Parameter.empty:
        return required_placeholder(object)
    if value is None:
        return placeholder(object)
    if hasattr(value, "__qualname__"):  # a function or class, stored by its name
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, ConfigDict):
        make = type(value)
        return spec(make, **{name: getattr(value, name) for name in _fields(make)})
    return value


def _look_up(name, role):
    """Returns the class or function of that full name, or an Unavailable."""
    packages = ROLES[role].packages if role in ROLES else ()
    module, _, attribute = name.rpartition(".")
    is_listed = any(module.startswith(f"{package}.") for package in packages)
    modules = [module] if is_listed or module in packages else []
    if name.startswith("sit_jax."):
        old = f"{module.rpartition('.')[2]}.{attribute}"
        attribute = RENAMED.get(old, attribute)
        modules += _modules(packages)
    for module in modules:
        try:
            value = vars(importlib.import_module(module)).get(attribute)
        except (ImportError, ValueError):
            continue
        # a name may lead to what a module only imports
        if callable(value) and _full_name(value) == f"{module}.{attribute}":
            return value
    return Unavailable(name, role)


def _modules(packages):
    """Yields the names of the modules in those packages that are ours."""
    for package in packages:
        if package.startswith("sit_jax."):
            path = importlib.import_module(package).__path__
            for module in pkgutil.iter_modules(path, f"{package}."):
                yield module.name


def _is_constructor(make, role):
    """Returns whether a stored config may have this callable called in a role."""
    if make.__name__ in role.user_only:
        return False
    return role.functions or (isinstance(make, type) and role.attribute in dir(make))


def _full_name(value):
    module, name = (getattr(value, key, "") for key in ("__module__", "__qualname__"))
    return f"{module}.{name}"


def _find_field(config, path):
    """Returns the node and name of a dotted path to a field that can be set."""
    node, *names = config, *path.split(".")
    for i, name in enumerate(names):
        if not isinstance(node, ConfigDict):
            raise UserError(f"--config.{'.'.join(names[:i])} has no fields")
        if name not in node:
            raise UserError(f"--config.{path}: no field {name!r}{_near(name, node)}")
        above, node = node, node.get_ref(name).get()
    if callable(node) or above.get_type(name) is type(None):
        what = "a function" if callable(node) else "None, or a function"
        raise UserError(f"--config.{path} is {what}; {ONLY_FILE}")
    if isinstance(node, ConfigDict):
        fields = sorted(name for name in node if name != "make")
        raise UserError(
            f"--config.{path} stands for several fields; set one of {fields}"
        )
    return above, name


def _parse(text, kind):
    """Returns the value of that type that a word of the command line stands for."""
    if kind is bool:
        return BOOLEANS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _split_variant(path):
    """Returns the Path of a config file and a tuple of its variant, if it has one."""
    match = re.fullmatch(r"(.*\.py):(.+)", str(path))
    return (Path(match[1]), (match[2],)) if match else (Path(path), ())


def _config_hint(path):
    """Returns where an old config file went, or which one is meant."""
    match = re.fullmatch(r"(sit|dit|mdt|mdtv2)_(s|b|l|xl)([248])(_\w+)?", path.stem)
    if match and path.parent.name == "configs":
        family, size, patch, words = match.groups()
        words = (words or "").replace("_weight", "-weight").replace("_", "+")
        words += "+v2" if family == "mdtv2" else ""
        file = path.with_name(f"{family.removesuffix('v2')}.py")
        return f"; it is now --config {file}:{size.upper()}/{patch}{words}"
    beside = sorted(file.name for file in path.parent.glob("*.py"))
    close = difflib.get_close_matches(path.name, beside, 1, cutoff=0.75)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _near(name, names):
    names = [other for other in names if other != "make"]
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(names)}"


def _place(path, error):
    """Returns the path, with the last of its lines that took part in the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)
