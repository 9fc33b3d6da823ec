"""Constructors as data: made, changed, stored and read back, also from files."""

import dataclasses
import json
import os
from collections.abc import Callable

import diffrax
import optax
import pytest
from helpers import ROOT
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sit_jax.adapters.lora import LoRA
from sit_jax.config import (
    ROLES,
    Unavailable,
    build,
    difference,
    from_json,
    load,
    override,
    spec,
    to_json,
)
from sit_jax.data.archives import Tfds
from sit_jax.data.sources import Digits
from sit_jax.diffusion import paths, predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import likelihood_weight
from sit_jax.errors import UserError
from sit_jax.evaluation.digits import DigitFeatures
from sit_jax.models.codec import Pixels, to_uint8_mdt
from sit_jax.models.dit import SIZES, SiT
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.ddpm import DDPM
from sit_jax.samplers.fixed_ode import euler
from sit_jax.samplers.sde import last_step_euler
from sit_jax.training.optimizers import adan

MAKERS = {  # roles: a constructor for them
    "model": SiT,
    "process timesteps guidance sampler": GaussianDiffusion,
    "sampler": DDPM,
    "codec": Pixels,
    "adapter": LoRA,
    "optimizer": optax.adamw,
    "source reference": Digits,
    "features": DigitFeatures,
    "": Tfds,
}


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    path: Callable = paths.linear
    solver: object = diffrax.Heun()
    limit: float | None = None
    kept: tuple | None = None

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative\nand more")


def example():
    c = ConfigDict()
    c.shape = (8, 8, 1)
    c.model = spec(SiT, patch=2, **SIZES["S"])
    c.process = spec(GaussianDiffusion)
    c.sampler = spec(DDPM)
    c.optimizer = spec(optax.adamw, learning_rate=1e-4, weight_decay=0.0)
    c.clip = placeholder(float)
    c.synthetic = False
    c.steps = 10
    c.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return c


def changed(*arguments):
    c = example()
    override(c, arguments)
    return {name: now for name, _, now in difference(to_json(example()), to_json(c))}


def stored(c):
    return json.loads(json.dumps(to_json(c)))


def test_spec_lists_every_field_and_build_calls_the_constructor():
    node = spec(SiT, depth=3)
    fields = {field.name for field in dataclasses.fields(SiT)}
    assert set(node) == (fields | {"make"}) - {"parent", "name"}
    assert build(node) == SiT(depth=3)
    assert build(spec(Part, size=3)) == Part(3)


def test_build_leaves_values_alone_and_goes_into_groups_and_sequences():
    assert build(3) == 3 and build("x") == "x" and build(None) is None
    assert build(ConfigDict({"data": 1, "fsdp": -1})) == {"data": 1, "fsdp": -1}
    parts = (spec(Part, size=1), spec(Part, size=2))
    assert build(parts) == (Part(1), Part(2))
    ramps = [spec(optax.constant_schedule, value=float(i)) for i in (1, 2)]
    node = spec(optax.join_schedules, schedules=ramps, boundaries=[5])
    schedule = build(from_json(stored(node), "optimizer"))
    assert (schedule(0), schedule(9)) == (1.0, 2.0)


def test_defaults_that_are_objects_become_specs():
    node = spec(Part, size=1, path=paths.VP(beta_max=10.0))
    assert node.solver.make is diffrax.Heun
    node.path.beta_min = 0.3
    assert build(node).path == paths.VP(beta_min=0.3, beta_max=10.0)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"dpeth": 3}, "SiT has no field 'dpeth'; did you mean 'depth'?"),
        ({"zzz": 3}, "SiT has no field 'zzz'; there are"),
        ({"parent": 3}, "SiT has no field 'parent'"),
    ],
)
def test_spec_refuses_fields_that_are_not_there(fields, said):
    with pytest.raises(UserError) as error:
        spec(SiT, **fields)
    assert str(error.value).startswith(said)


def test_a_constructor_s_refusal_and_a_field_left_out_are_one_line():
    with pytest.raises(UserError, match=r"^Part: size -1 is negative$"):
        build(spec(Part, size=-1))
    with pytest.raises(UserError, match=r"^adamw needs a value .* 'learning_rate'$"):
        build(spec(optax.adamw))


@pytest.mark.parametrize("make", ["os.system", 3, None])
def test_what_cannot_be_called_is_no_constructor(make):
    with pytest.raises(UserError, match="constructor"):
        build(ConfigDict({"make": make, "x": 1}))


@pytest.mark.parametrize(
    "argument, field, value",
    [
        ("--config.model.depth=4", "model.depth", "4"),
        ("--config.model.learn_sigma=False", "model.learn_sigma", "false"),
        ("--config.model.dtype=bfloat16", "model.dtype", '"bfloat16"'),
        ("--config.mesh.data=-1", "mesh.data", "-1"),
        ("--config.shape=(4,4,1)", "shape", "[4, 4, 1]"),
        ("--config.clip=1", "clip", "1.0"),  # None before
        ("--config.optimizer.mu_dtype=bfloat16", "optimizer.mu_dtype", '"bfloat16"'),
        ("--config.optimizer.b2=0.95", "optimizer.b2", "0.95"),
        ("--config.sampler.steps=20", "sampler.steps", "20"),
    ],
)
def test_any_field_can_be_set(argument, field, value):
    assert changed(argument) == {field: value}


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--config.model.dpeth=4", "--config.model.dpeth: no field 'dpeth'; did you"),
        ("--config.stpes=4", "--config.stpes: no field 'stpes'; did you mean 'steps'"),
        ("--config.model.depth=abc", "--config.model.depth=abc: it must be a whole"),
        ("--config.steps=2.5", "--config.steps=2.5: it must be a whole"),
        ("--config.steps=None", "--config.steps=None: it must be a whole"),
        ("--config.synthetic=maybe", "--config.synthetic=maybe: "),
        ("--config.synthetic", "--config.synthetic has no value"),
        ("--config.model=S", "--config.model stands for several fields; set one of"),
        ("--config.model.make=os.system", "--config.model.make is a function; only a"),
        (
            "--config.process.prediction=score",
            "--config.process.prediction is a function",
        ),
        ("--config.shape.x=3", "--config.shape has no fields"),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_name(argument, said):
    with pytest.raises(UserError) as error:
        changed(argument)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_json_and_back_keeps_everything():
    c = example()
    c.process = spec(
        GaussianDiffusion, use_timesteps=(0, 5, 9), prediction=predictions.data
    )
    again = from_json(stored(c))
    assert stored(again) == stored(c)
    for name in ("model", "process", "sampler", "mesh", "shape", "clip"):
        assert build(again[name]) == build(c[name])
    override(again, ["--config.model.depth=2", "--config.clip=0.5"])
    assert build(again.model).depth == 2 and again.clip == 0.5


def test_json_keeps_solvers_and_instances_with_fields():
    c = ConfigDict({"process": spec(Interpolant, path=spec(paths.VP, beta_min=0.2))})
    c.sampler = spec(AdaptiveODE, solver=spec(diffrax.Heun))
    again = from_json(stored(c))
    assert build(again.process).path == paths.VP(beta_min=0.2)
    assert isinstance(build(again.sampler).solver, diffrax.Heun)


@pytest.mark.parametrize("value", [lambda t: t, object(), {1, 2}])
def test_what_has_no_name_cannot_be_stored(value):
    with pytest.raises(UserError):
        to_json({"x": value})


NAMES = [
    "os.system",
    "builtins.eval",
    "sit_jax_evil.codec.f",
    "sit_jax.models.codec",
    "sit_jax.models.codec.jax",
    "sit_jax.models.codec.UserError",  # a name in codec, but of another module
    "sit_jax.models.layers.math.sqrt",
    "sit_jax.models.dit.SIZES",
    "sit_jax.models.dit.os",
    "sit_jax.checkpoint.Checkpoints",  # ours, but nothing a config is made of
    "sit_jax.data.extract.ExtractOptions",
    "optax._src.alias.jnp",
    "optax._src.alias.functools.partial",
    "optax.adamw.__globals__",
    "sit_jax.models.codec.Pixels.__init__",
    "sit_jax.models.codec.",
    ".os.system",
    "",
    3,
    ["sit_jax.models.codec.Pixels"],
]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_stored_names_of_other_things_are_kept_and_not_built(name):
    for role in (*ROLES, "mesh"):
        value = {role: {"make": {"name": name}, "command": "true"}}
        again = from_json(value)
        assert isinstance(again[role].make, Unavailable)
        assert to_json(again)[role]["make"] == {"name": str(name)}
        with pytest.raises(UserError, match="a stored config names"):
            build(again[role])


@pytest.mark.parametrize("roles", MAKERS)
def test_each_role_is_built_from_its_own_kind_alone(roles):
    for role in ROLES:
        again = from_json({role: {"make": to_json(MAKERS[roles])}})
        assert (again[role].make is MAKERS[roles]) == (role in roles.split())


def test_nothing_is_imported_for_a_name_that_is_not_allowed(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    for role in ROLES:
        from_json({role: {"make": {"name": "stranger.Evil"}}})


def test_functions_of_a_role_are_values_but_no_constructors():
    c = {"process": {"make": {"name": "sit_jax.diffusion.paths.linear"}}}
    with pytest.raises(UserError, match="paths.linear', which may not stand for"):
        build(from_json(c).process)
    assert from_json({"process": {"name": "sit_jax.paths.linear"}}).process is (
        paths.linear
    )


@pytest.mark.parametrize(
    "role, old, new",
    [
        ("codec", "codec.Pixels", Pixels),  # to another module
        ("codec", "rounding.to_uint8_darker", to_uint8_mdt),
        ("process", "interpolant.likelihood_weight", likelihood_weight),
        ("sampler", "samplers.chain.Ancestral", DDPM),
        ("sampler", "samplers.ode.euler", euler),
        ("sampler", "samplers.sde.euler", last_step_euler),
        ("adapter", "lora.Lora", LoRA),
        ("optimizer", "adan.adan", adan),
        ("features", "digit_features.DigitFeatures", DigitFeatures),
    ],
)
def test_name_of_version_0_1_is_found(role, old, new):
    assert from_json({"name": f"sit_jax.{old}"}, role) is new


def test_fields_of_version_0_1_are_renamed():
    old = {"make": {"name": "sit_jax.models.mdt.MDTv2"}, "hide": 0.4, "width": 8}
    assert from_json({"model": old}).model.mask_ratio == 0.4
    old = {"make": {"name": "sit_jax.samplers.chain.Ddim"}, "frames": 3}
    assert build(from_json({"sampler": old}).sampler).trajectory_length == 3


def test_difference_names_what_differs():
    one, other = example(), example()
    other.model.depth, other.shape = 4, (4, 4, 1)
    other.process = spec(GaussianDiffusion, prediction=predictions.data)
    del other.clip
    found = difference(to_json(one), to_json(other))
    names = [name for name, _, _ in found]
    assert names == ["clip", "model.depth", "process.prediction", "shape"]
    assert found[0][1:] == ("null", "(absent)") and found[1][1:] == ("12", "4")


# ---- files ----


def test_load_runs_the_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return 3\n")
    assert load(file) == load(str(file)) == 3


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1\n", "{file}: it has no get_config()"),
        ("x = 1\ndef f(:\n", "{file}, line 2: SyntaxError: "),
        ("\nimport no_such_thing\n", "{file}, line 2: ModuleNotFoundError: No module"),
        (
            "from sit_jax.config import spec\nfrom sit_jax.models.dit import SiT\n"
            "def get_config():\n    return spec(SiT, dpeth=1)\n",
            "{file}, line 4: SiT has no field 'dpeth'; did you mean 'depth'?",
        ),
    ],
)
def test_load_names_the_line_of_a_bad_file(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value).startswith(said.format(file=file))
    assert "\n" not in str(error.value)


def test_load_refuses_what_is_no_config_file(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match="no config file at"):
            load(path)
    with pytest.raises(UserError, match=r"did you mean .*/sit_xl2.py\?"):
        load(ROOT / "configs" / "sit_xl_2.py")
    text = tmp_path / "config.txt"
    text.write_text("def get_config(): return 1")
    with pytest.raises(UserError, match="not a Python file"):
        load(text)
    binary = tmp_path / "binary.py"
    binary.write_bytes(os.urandom(64) + b"\0")
    with pytest.raises(UserError, match="binary.py"):
        load(binary)
