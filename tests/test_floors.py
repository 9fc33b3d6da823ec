"""Imports point down: a file imports only files of lower floors, DESIGN's and these."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A new file gets a place here: the lowest its imports allow that
# still says what it is for.
FLOORS = (
    "products heap models.by_head models.turns errors interrupts json_text versions",
    "opening",
    "buckets",
    "places",
    "fields drafts leases mirrors adan pickles checkpoint.folder checkpoint.sums "
    "checkpoint.trees cluster rendezvous greeting numerals lora_numbers "
    "numbered comparison sharding hlo topology program_cache",
    "torch_containers checkpoint.whole party locks models.attention",
    "checkpoint.handling checkpoint.newest hosts",
    "checkpoint.saving checkpoint.reading",
    # nouns of their own
    "paths schedules noise config port placement checkpoint manifest metrics pictures "
    "chips meter tracking tensor_files moments precision "
    "models.layers data.sources data.names data.coins data.tags data.shards "
    "data.images data.arrays data.styles data.further averages timesteps "
    "guidance_scales models.masking time_densities emulation probe samplers.walk "
    "torch_noise rounding gaussians array_files graph_files "
    "models.inception_layers metrics.gaussian metrics.score metrics.manifold "
    "metrics.kernel stored resampling",
    "predictions guidance autoguidance rates codec data.reading data.folders data.tars "
    "data.cache quantized data.filling data.prepared command workdir logging "
    "outputs torch_files labels download models.vae_layers models.applied replicas "
    "history lora lora_names pod",
    "checkpoint.__main__ diffusers_files job label_policy",
    "image_sets bundle paired worst_pairs effects models.inception parts releases "
    "models.vae lora_files",
    "features feature_parts",
    "interpolant diffusion models.dit data data.archives data.cifar data.workers "
    "data.pairs",
    "models.mdt min_snr data.feed extraction models.tiles models.vae_weights",
    "models.mdt_weights models.mdt_cost vae_files reference",
    "summary evaluation",
    "evaluated causes ladder report",
    "diagnosis unfinished",
    "models.kinds",
    "samplers.flow samplers.sde samplers.chain torch_config",
    "samplers.ode samplers.adaptive samplers.torchdiffeq",
    "samplers.adams samplers.likelihood",
    "passes",
    "training generation recipe samplers.names quantizing",
    "base",
    "weights transfer adapters",
    "start preview digit_features released presets settings mdt_files starts program "
    "residuals solved",
    "inception_weights exchange adapter_exchange sampling densities activations card "
    "conversion plan keeper",
    "model_folder planning introduction",
    "directions",
    "stages given curve adapting judges swapping",
    "watching",
    "train sample port_weights quantize score_digits extract_features evaluate "
    "diagnose",
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
SCRIPTS = {file.stem for file in ROOT.glob("*.py")}
PACKAGES = {"sit_jax", "sit_jax.models", "sit_jax.samplers"}  # empty, apart from words


def files():
    """-> {dotted name below sit_jax, or of a script: path}"""
    found = {file.stem: file for file in ROOT.glob("*.py")}
    for file in (ROOT / "sit_jax").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name not in PACKAGES:
            found[name.removeprefix("sit_jax.")] = file
    return found


def imported(text):
    """Full names of modules that a text imports, anywhere in it.

    `from a import b` may mean the module a.b; then it stands for both.
    """
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where things are"
            names |= {node.module}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = files()


def ours(text):
    """Those of our files, by their names in FLOOR."""
    names = imported(text)
    inside = {name.removeprefix("sit_jax.") for name in names if "sit_jax." in name}
    return (inside | (names & SCRIPTS)) & set(FILES)


def test_the_reader_sees_every_kind_of_import():
    text = (
        "import sit_jax.codec\nfrom sit_jax import noise, paths as p\n"
        "def f():\n    from sit_jax.data.sources import Digits\n    import train\n"
        "import logging\n"  # Python's, not ours
    )
    assert ours(text) == {"codec", "noise", "paths", "data.sources", "train"}


def test_every_file_has_one_floor():
    assert set(FILES) == set(FLOOR)
    assert sum(len(names.split()) for names in FLOORS) == len(FLOOR)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down(name):
    below = {other for other in FLOOR if FLOOR[other] < FLOOR.get(name, 0)}
    package = f"{name}." if (ROOT / "sit_jax" / name).is_dir() else None
    wrong = ours(FILES[name].read_text()) - below
    if package:
        wrong = {other for other in wrong if not other.startswith(package)}
    assert not wrong, f"{name} imports {sorted(wrong)}, not below it"


@pytest.mark.parametrize("name", sorted(set(FILES) - SCRIPTS))
def test_the_package_imports_no_script_and_no_config(name):
    for module in imported(FILES[name].read_text()):
        assert module.split(".")[0] not in {"configs", "tests", *SCRIPTS}, module


def test_packages_stay_empty():
    """Or importing one file would import all its neighbours."""
    for name in PACKAGES:
        file = ROOT.joinpath(*name.split("."), "__init__.py")
        assert not imported(file.read_text()), name


@pytest.mark.parametrize(
    "module, where",
    [
        ("flax.linen", "models."),  # a move to another library stays in one folder
        ("orbax", "checkpoint"),
        ("etils", "places"),
        ("fsspec", "buckets"),
        ("diffrax", "samplers."),
        ("sklearn", "data.sources"),
        ("tensorboardX", "tracking"),
        ("wandb", "tracking"),
        ("grain", "data.feed"),
        ("array_record", "data.shards"),
        ("tensorflow_datasets", "data.prepared"),
        ("tensorflow", "nowhere"),
    ],
)
def test_what_only_one_place_knows(module, where):
    for name, file in FILES.items():
        used = any(f"{m}.".startswith(f"{module}.") for m in imported(file.read_text()))
        # the demo's score comes from scikit-learn's classifier
        allowed = name.startswith(where) or (module, name) == (
            "sklearn",
            "digit_features",
        )
        assert not used or allowed, f"{name} imports {module}"


def test_models_know_no_process_and_processes_no_model():
    for name, file in FILES.items():
        if name.startswith("models."):
            others = {"interpolant", "diffusion", "paths", "predictions", "guidance"}
            assert not ours(file.read_text()) & others, name
        if name.startswith(("samplers.", "interpolant", "diffusion", "guidance")):
            modules = imported(file.read_text())
            assert not any(
                module.startswith(("flax", "sit_jax.models")) for module in modules
            )
