"""Files of the autoencoder: dialects, containers, config.json, and what is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.codecs import (
    BIN,
    CONFIG,
    GOLDEN,
    SAFE,
    compvis,
    folder,
    recorded_state,
    same,
)
from helpers.recorded import case

from sit_jax.convert import pretrained
from sit_jax.convert.vae import load_vae, read_vae_config
from sit_jax.errors import UserError
from sit_jax.models.codec import to_uint8, to_uint8_mdt
from sit_jax.models.vae import AutoencoderKL


def test_the_recorded_folder_becomes_a_codec():
    vae = load_vae(GOLDEN)
    same(vae)
    assert vae.model == AutoencoderKL(channels=(4, 8, 8, 8), groups=4)
    assert vae.scale == 0.18215 and vae.rounding is to_uint8
    assert vae.precision.name == "exact"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(vae.params))


def old():
    """The names and config.json of diffusers before 0.16."""
    names, wanted = case("vae")["state_dict_keys"], case("vae")["old_keys"]
    attention = (name for name in names if ".attentions." in name)
    names = dict(zip(attention, wanted, strict=True))
    state = {names.get(name, name): x for name, x in recorded_state().items()}
    return state, case("vae")["config"] | {"_class_name": "AutoencoderKL"}


def original():
    """CompVis' names; attention as 1 x 1 convolutions, and the discriminator's."""
    state = {compvis(name): x for name, x in recorded_state().items()}
    for name in state:
        if ".attn_1." in name and state[name].ndim == 2:
            state[name] = state[name][..., None, None]
    return {"loss.logvar": np.zeros((), np.float32)} | state, CONFIG


@pytest.mark.parametrize("name", [SAFE, BIN])
@pytest.mark.parametrize("dialect", [old, original], ids=["old", "compvis"])
def test_every_dialect_in_every_container(tmp_path, dialect, name):
    state, config = dialect()
    same(load_vae(folder(tmp_path, state, config, name)))


def test_places_that_files_are_found_in(tmp_path):
    folder(tmp_path / "pipeline" / "vae")
    same(load_vae(tmp_path / "pipeline"))
    same(load_vae(str(tmp_path / "pipeline" / "vae" / SAFE)))
    file = folder(
        tmp_path / "wrapped", {"state_dict": dict(recorded_state())}, name=BIN
    )
    same(load_vae(file / BIN))


def test_halves_become_floats(tmp_path):
    state = {n: x.astype(np.float16) for n, x in recorded_state().items()}
    safetensors.numpy.save_file(state, folder(tmp_path) / SAFE)
    vae = load_vae(tmp_path)
    leaves = jax.tree.leaves(vae.params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    found = vae.params["encoder"]["quant"]["bias"]
    np.testing.assert_array_equal(found, np.float32(state["quant_conv.bias"]))


def test_without_config_json_it_is_the_published_size(tmp_path):
    alone = folder(tmp_path, config=None)
    with pytest.raises(UserError, match="for lack of a config.json .*: weights lack "):
        load_vae(alone)


def test_settings_go_into_the_codec(tmp_path):
    config = CONFIG | {"scaling_factor": 0.5}
    path = folder(tmp_path, config=config)
    vae = load_vae(path, "bf16", rounding=to_uint8_mdt, group=3)
    assert vae.model.dtype == "bfloat16" and vae.precision.name == "bf16"
    assert (vae.scale, vae.group, vae.rounding) == (0.5, 3, to_uint8_mdt)
    assert load_vae(path, scale=1.0).scale == 1.0
    with pytest.raises(UserError, match="no precision 'half'"):
        load_vae(path, "half")


def changed(**fields):
    return {k: v for k, v in (CONFIG | fields).items() if v != "left out"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (changed(_class_name="AutoencoderTiny"), "_class_name 'AutoencoderTiny', not"),
        (changed(act_fn="gelu"), "act_fn 'gelu', not 'silu': there is code for"),
        (changed(use_quant_conv=False), "use_quant_conv False, not True"),
        (changed(shift_factor=0.1), "shift_factor 0.1, not None"),
        (changed(latents_mean=[0.0]), r"latents_mean \[0.0\], not None"),
        (changed(in_channels=4), "in_channels 4, not 3"),
        (
            changed(down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDown"]),
            "down_block_types .*AttnDown",
        ),
        (changed(up_block_types=["UpDecoderBlock2D"] * 3), "up_block_types .*, not "),
        (changed(block_out_channels="left out"), "no 'block_out_channels'"),
        (changed(block_out_channels=8), "no config.json of a VAE"),
        (changed(norm_num_groups="4"), "sizes must be whole numbers"),
        (changed(scaling_factor=[1]), "no config.json of a VAE"),
        ([3], "no config.json of a VAE"),
    ],
    ids="class act quant shift mean in down up width one groups scale list".split(),
)
def test_a_config_of_something_else_is_one_line(tmp_path, config, told):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=told) as caught:
        read_vae_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_is_no_json_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no config.json of a VAE"):
        read_vae_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda s: s.pop("decoder.conv_in.weight"), "lack decoder.conv_in.weight"),
        (
            lambda s: s.update({"extra.weight": np.zeros(3, np.float32)}),
            "have in addition extra.weight",
        ),
        (
            lambda s: s.update({"quant_conv.bias": np.zeros(7, np.float32)}),
            r"config.json: .* encoder/quant/bias is \(7,\), not \(8,\)",
        ),
    ],
    ids=["missing", "spare", "shape"],
)
def test_weights_of_another_network_are_named(tmp_path, fault, told):
    state = dict(recorded_state())
    fault(state)
    with pytest.raises(UserError, match=told) as caught:
        load_vae(folder(tmp_path, state))
    assert str(tmp_path / SAFE) in str(caught.value)


def test_where_there_is_no_vae_the_names_are_told(tmp_path):
    with pytest.raises(
        UserError, match="no VAE at nowhere; names are sd-vae-ft-mse, sd"
    ):
        load_vae("nowhere")
    (tmp_path / "vae").mkdir()
    with pytest.raises(
        UserError, match="has no diffusion_pytorch_model.safetensors or"
    ):
        load_vae(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="does not end in .pt"):
        load_vae(tmp_path / "x.ckpt")


def test_files_of_the_hub_and_names_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    folder(tmp_path / "me" / "small")
    same(load_vae(f"hf:me/small/{SAFE}"))
    (tmp_path / "me" / "small" / "config.json").unlink()
    with pytest.raises(UserError, match="resolve/main/config.json was not loaded"):
        load_vae(f"hf:me/small/{SAFE}")
    # a name of the table is of the published size, without a config.json
    source = f"hf:me/small/{SAFE}"
    monkeypatch.setitem(
        pretrained.PRETRAINED,
        "sd-vae-ft-ema",
        pretrained.PretrainedFile(source, "MIT", "vae"),
    )
    with pytest.raises(UserError, match="another architecture"):
        load_vae("sd-vae-ft-ema")
