"""Constructors as data: build(spec(make, **fields)) == make(**fields).

A spec lists every field of make with its default, so each of them can be set from the
command line (--config.model.depth=4) and a misspelled one is refused. As JSON a
constructor is its full name. A stored config is a stranger's data: from_json looks a
name up only if ROLES allows it for the field in which it stands, and leaves any other
as an Unavailable, which build() refuses.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import numbers
import re
import traceback
from pathlib import Path

from sit_jax.errors import UserError
from sit_jax.ranges import ONLY_FILE, check_fields


@dataclasses.dataclass(frozen=True)
class Role:
    """What the constructors are like that a stored config may name in one field.

    packages: where they are defined. attribute: what each of their classes has.
    functions: whether a function may be called too, as optax's are.
    """

    packages: tuple[str, ...]
    attribute: str = "__init__"
    functions: bool = False


ROLES = {  # field of a config -> what may stand there, and in its fields
    "model": Role(("sit_jax.models",), "classes"),
    "process": Role(("sit_jax.diffusion",)),
    "timesteps": Role(("sit_jax.diffusion",)),
    "guidance": Role(("sit_jax.diffusion",)),
    "sampler": Role(("sit_jax.samplers", "sit_jax.diffusion", "diffrax")),
    "codec": Role(("sit_jax.models",), "decode"),
    "adapter": Role(("sit_jax.adapters",)),
    "optimizer": Role(("sit_jax.training", "optax"), functions=True),
    "source": Role(("sit_jax.data",), "__getitem__"),
    "reference": Role(("sit_jax.data",), "__getitem__"),
    "features": Role(("sit_jax.evaluation",), "__call__"),
}
REASONS = {  # how absl's words begin: what they mean
    "('Non-boolean argument": "it must be True or False",
    "invalid literal for int()": "it must be a whole number, in digits",
    "could not convert string to float": "it must be a number",
}
# Names in configs stored by sit_jax 0.1, below sit_jax -> what they are now: a module,
# or a class of its own; and fields of a class that had another name.
MOVED = {
    "adan": "training.optimizers",
    "codec": "models.codec",
    "data.arrays": "data.sources",
    "data.cache": "data.latent_cache",
    "data.cifar": "data.folders",
    "data.further.Further": "data.sources.LabelOffset",
    "data.prepared": "data.archives",
    "data.styles.Styled": "data.sources.ImageTransform",
    "data.styles.inverted": "data.sources.invert",
    "data.styles.slanted": "data.sources.slant",
    "diffusion": "diffusion.gaussian",
    "digit_features": "evaluation.digits",
    "guidance": "diffusion.guidance",
    "guidance_scales": "diffusion.guidance",
    "interpolant": "diffusion.interpolant",
    "lora": "adapters.lora",
    "lora.Lora": "adapters.lora.LoRA",
    "min_snr": "diffusion.loss_weights",
    "paths": "diffusion.paths",
    "predictions": "diffusion.predictions",
    "rounding": "models.codec",
    "rounding.to_uint8_darker": "models.codec.to_uint8_mdt",
    "samplers.adams": "samplers.fixed_ode",
    "samplers.adaptive": "samplers.adaptive_ode",
    "samplers.chain": "samplers.ddpm",
    "samplers.ode": "samplers.fixed_ode",
    "schedules": "diffusion.schedules",
    "time_densities": "diffusion.timesteps",
    "timesteps": "diffusion.timesteps",
    "diffusion.Diffusion": "diffusion.gaussian.GaussianDiffusion",
    "diffusion.bound": "diffusion.gaussian.kl_loss",
    "diffusion.hybrid": "diffusion.gaussian.hybrid_loss",
    "diffusion.previous": "diffusion.predictions.previous_x",
    "diffusion.rescaled_bound": "diffusion.gaussian.rescaled_kl_loss",
    "diffusion.rescaled_hybrid": "diffusion.gaussian.rescaled_hybrid_loss",
    "guidance.Interval": "diffusion.guidance.GuidanceInterval",
    "interpolant.likelihood_weight": "diffusion.loss_weights.likelihood_weight",
    "interpolant.unweighted": "diffusion.loss_weights.unweighted",
    "interpolant.velocity_weight": "diffusion.loss_weights.velocity_weight",
    "min_snr.MinSnrHybrid": "diffusion.loss_weights.MinSnrHybridLoss",
    "min_snr.min_snr": "diffusion.loss_weights.mdt_min_snr_loss",
    "samplers.adaptive.AdaptiveOde": "samplers.adaptive_ode.AdaptiveODE",
    "samplers.adaptive.over_batch": "samplers.adaptive_ode.batch_error_control",
    "samplers.adaptive.per_image": "samplers.adaptive_ode.per_sample_control",
    "samplers.chain.Ancestral": "samplers.ddpm.DDPM",
    "samplers.chain.Ddim": "samplers.ddpm.DDIM",
    "samplers.ode.Ode": "samplers.fixed_ode.FixedStepODE",
    "samplers.sde.Sde": "samplers.sde.SDE",
    "samplers.sde.by_score": "samplers.sde.diffusion_sbdm",
    "samplers.sde.by_sigma": "samplers.sde.diffusion_sigma",
    "samplers.sde.constant": "samplers.sde.diffusion_constant",
    "samplers.sde.decreasing": "samplers.sde.diffusion_decreasing",
    "samplers.sde.euler": "samplers.sde.last_step_euler",
    "samplers.sde.falling": "samplers.sde.diffusion_linear",
    "samplers.sde.increasing_decreasing": (
        "samplers.sde.diffusion_increasing_decreasing"
    ),
    "samplers.sde.mean": "samplers.sde.last_step_mean",
    "samplers.sde.none": "samplers.sde.last_step_none",
    "samplers.sde.tweedie": "samplers.sde.last_step_tweedie",
    "samplers.torchdiffeq.like_torchdiffeq": "samplers.torchdiffeq.torchdiffeq_control",
    "schedules.DdimSpacing": "diffusion.schedules.DDIMSpacing",
    "time_densities.Times": "diffusion.timesteps.DensityTimesteps",
}
_MDT = {
    "hide": "mask_ratio",
    "spread": "mask_ratio_range",
    "sizes": "mask_buckets",
}
_CORRUPT = {"broken_share": "max_corrupt_fraction"}
_CHAIN = {
    "mend": "denoised_fn",
    "lead": "cond_fn",
    "frames": "trajectory_length",
}
# new name of a class, below sit_jax -> {old field: new field}
RENAMED_FIELDS = {
    "diffusion.interpolant.Interpolant": {
        "predicts": "prediction",
        "weight": "loss_weight",
        "train_margin": "train_eps",
        "sample_margin": "sample_eps",
    },
    "diffusion.gaussian.GaussianDiffusion": {
        "predicts": "prediction",
        "kept": "use_timesteps",
    },
    "samplers.adaptive_ode.AdaptiveODE": {"frames": "trajectory_length"},
    "samplers.fixed_ode.FixedStepODE": {"frames": "trajectory_length"},
    "samplers.fixed_ode.Adams": {"frames": "trajectory_length"},
    "samplers.sde.SDE": {"frames": "trajectory_length"},
    "samplers.ddpm.DDPM": _CHAIN,
    "samplers.ddpm.DDIM": _CHAIN,
    "data.archives.ImageNetTar": _CORRUPT,
    "data.archives.Tfds": _CORRUPT,
    "data.archives.WebdatasetTars": _CORRUPT,
    "data.folders.AdmFolder": _CORRUPT,
    "data.folders.CifarFolder": _CORRUPT,
    "data.folders.ImageFolder": _CORRUPT,
    "data.sources.ImageTransform": {"style": "transform"},
    "models.mdt.MDT": _MDT,
    "models.mdt.MDTv2": _MDT,
}


def spec(make, **fields):
    """Returns the ConfigDict of a constructor and all its fields.

    Args:
      make: a class or function.
      **fields: what differs from its defaults.

    Raises:
      UserError: there is no such field.
    """
    from ml_collections import ConfigDict

    known = _fields(make)
    for name in fields:
        if name not in known:
            raise UserError(
                f"{make.__name__} has no field {name!r}{_near(name, known)}"
            )
    values = {name: _settable(value) for name, value in {**known, **fields}.items()}
    return ConfigDict({"make": make, **values}, convert_dict=False)


class Unavailable:
    """A name in a stored config that is not allowed where it stands, and why."""

    def __init__(self, name, reason):
        self.__name__, self.reason = name, reason


def build(node):
    """Returns the object that a spec stands for; anything else as it is.

    Raises:
      UserError: a field does not fit its annotation, is missing, or is refused by the
        constructor; or a stored config names what it may not.
    """
    from ml_collections import ConfigDict

    if isinstance(node, Unavailable):
        raise UserError(node.reason)
    if isinstance(node, (tuple, list)):
        return type(node)([build(item) for item in node])
    if not isinstance(node, ConfigDict):
        return node
    make = build(node.get("make", dict))
    if not callable(make):
        raise UserError(f"make is {make!r}; only a config file can name a constructor")
    fields = {name: _value(node, name) for name in node if name != "make"}
    check_fields(make, fields)
    try:
        return make(**fields)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{make.__name__}: {_first_line(error)}") from error


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
        raise UserError(f"{place}: {kind}{_first_line(error)}") from error


def run_name(path):
    """Returns what a run of the config FILE.py or FILE.py:VARIANT is called."""
    path, variant = _split_variant(path)
    return "-".join([path.stem, *(re.sub(r"\W+", "-", word) for word in variant)])


def override(config, arguments):
    """Applies arguments of the form --config.a.b=value, in place."""
    from absl import flags
    from ml_collections import config_flags

    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; see --help")
        _check_path(config, argument.partition("=")[0].removeprefix("--config."))
        if "=" not in argument:
            raise UserError(f"{argument} has no value; write {argument}=VALUE")
    values = flags.FlagValues()
    argv = ["", *arguments]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, sys_argv=argv
        )
        values(argv)
    except (flags.Error, TypeError, ValueError, AttributeError) as error:
        reason = _first_line(error).removeprefix("flag ")  # then it names its argument
        where = "" if reason.startswith("--") else f"{' '.join(arguments)}: "
        raise UserError(where + _plain(reason)) from error


def to_json(node):
    """Returns a config as plain JSON values; constructors become their full names."""
    from ml_collections import ConfigDict, FieldReference

    if isinstance(node, FieldReference):
        node = node.get()
    if isinstance(node, (ConfigDict, dict)):
        return {key: to_json(value) for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return [to_json(value) for value in node]
    if isinstance(node, numbers.Number) and hasattr(node, "item"):
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
    from ml_collections import ConfigDict

    if isinstance(value, list):
        return tuple(from_json(item, role) for item in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {"name"}:
        return _look_up(value["name"], role)
    items = {
        key: _settable(from_json(item, role or key)) for key, item in value.items()
    }
    make = items.get("make")
    if callable(make):
        renamed = RENAMED_FIELDS.get(_full_name(make).removeprefix("sit_jax."), {})
        items = {renamed.get(key, key): item for key, item in items.items()}
        if not _is_constructor(make, role):
            items["make"] = _unavailable(_full_name(make), role)
    try:
        return ConfigDict(items, convert_dict=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"a stored config is none: {_first_line(error)}") from error


def difference(one, other):
    """Returns [(dotted name, value, value)] of what differs in two JSON configs."""
    one, other = _flat(one), _flat(other)
    names = sorted(set(one) | set(other))
    absent = "(absent)"
    pairs = ((name, one.get(name, absent), other.get(name, absent)) for name in names)
    return [pair for pair in pairs if pair[1] != pair[2]]


def _fields(make):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in ("parent", "name")
    }


def _settable(value):
    """A value as a field that the command line can set."""
    from ml_collections.config_dict import ConfigDict, placeholder, required_placeholder

    if value is inspect.Parameter.empty:
        return required_placeholder(object)
    if value is None:
        return placeholder(object)
    if hasattr(value, "__qualname__"):  # a function or class, stored by its name
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, ConfigDict):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        known = _fields(type(value))
        return spec(type(value), **{k: v for k, v in fields.items() if k in known})
    return value


def _value(node, name):
    from ml_collections.config_dict import RequiredValueError

    try:
        return build(node[name])
    except RequiredValueError as error:
        make = node.get("make", dict).__name__
        raise UserError(f"{make} needs a value for its field {name!r}") from error


def _look_up(name, role):
    """Returns the class or function of that full name, or an Unavailable."""
    name = _moved(str(name))
    packages = ROLES[role].packages if role in ROLES else ()
    if not name.startswith(tuple(f"{package}." for package in packages)):
        return _unavailable(name, role)
    module, _, attribute = name.rpartition(".")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return Unavailable(name, f"this version has no {name!r}, a {role}")
    # a name may lead to what a module only imports
    if not callable(value) or _full_name(value) != name:
        return _unavailable(name, role)
    return value


def _is_constructor(make, role):
    """Whether a stored config may have this callable called in a role."""
    if getattr(make, "named_by_user_only", False):  # as it runs what its fields name
        return False
    role = ROLES[role]
    is_kind = isinstance(make, type) and role.attribute in dir(make)
    return role.functions or is_kind


def _unavailable(name, role):
    where = f"the role {role}" if role in ROLES else repr(role)
    reason = f"a stored config names {name!r}, which may not stand for {where}"
    return Unavailable(name, f"{reason}; name it in a --config FILE of your own")


def _moved(name):
    """A stored name, or what has taken its place since."""
    known = name.removeprefix("sit_jax.")
    module, _, attribute = known.rpartition(".")
    if known in MOVED:
        return f"sit_jax.{MOVED[known]}"
    return f"sit_jax.{MOVED[module]}.{attribute}" if module in MOVED else name


def _full_name(found):
    module, name = (getattr(found, k, "") for k in ("__module__", "__qualname__"))
    return f"{module}.{name}"


def _check_path(config, path):
    """Refuses a dotted path that the config does not have."""
    from ml_collections import ConfigDict

    node, above = config, None
    for name in path.split("."):
        if not isinstance(node, ConfigDict):
            return  # an index into a tuple, for ml_collections to judge
        if name not in node:
            raise UserError(f"--config.{path}: no field {name!r}{_near(name, node)}")
        node, above = node[name], node
    if callable(node) or above.get_type(name) is type(None):
        what = "a function" if callable(node) else "None, or a function"
        raise UserError(f"--config.{path} is {what}; {ONLY_FILE}")
    if isinstance(node, ConfigDict):
        fields = sorted(name for name in node if name != "make")
        raise UserError(
            f"--config.{path} stands for several fields; set one of {fields}"
        )


def _plain(reason):
    """absl's sentence about an argument, in plainer words where there are any."""
    argument, _, why = reason.partition(": ")
    plain = (words for start, words in REASONS.items() if why.startswith(start))
    return next((f"{argument}: {words}" for words in plain), reason)


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


def _near(name, known):
    names = [other for other in known if other != "make"]
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(names)}"


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _place(path, error):
    """path, with the last of its lines that took part in the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _flat(value, prefix=""):
    if isinstance(value, dict) and set(value) != {"name"}:
        flat = {}
        for key, item in value.items():
            flat |= _flat(item, f"{prefix}{key}.")
        return flat
    return {prefix[:-1]: json.dumps(value)}
