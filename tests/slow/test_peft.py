"""Against the real peft: files written here on a torch network, and the reverse."""

import jax
import numpy as np
import pytest
from helpers.recorded import nchw, nhwc, relative
from record_peft import CASES, adapted, base, inputs

from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.lora import LoRA
from sit_jax.adapters.weights import LoRAWeight, flatten, is_weight_leaf, merge_adapters
from sit_jax.convert import peft as peft_files
from sit_jax.convert.adapters import apply_adapter, open_adapter
from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.models.dit import SiT

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

MODEL = SiT(depth=2, width=40, heads=4, patch=2, classes=10)
TARGETS = {
    "attention": ".*blocks/attn/(qkv|proj)/kernel",
    "all": ".*(blocks|cond|head)/.*",
}


def params():
    state = {name: value.numpy() for name, value in base().state_dict().items()}
    return to_flax(DIT_RULES, state)[0]


def ours(params):
    x, t, y = (array.numpy() for array in inputs())
    return nchw(apply_model(MODEL, params, nhwc(x), t, y))


def theirs(network):
    with torch.no_grad():
        return network.eval()(*inputs()).numpy()


def random_adapters(**settings):
    """Our adapters, every value of them random."""
    rng = np.random.default_rng(0)
    tree = LoRA(**settings).add_adapters(params(), jax.random.key(0))

    def kicked(node):
        if not isinstance(node, LoRAWeight):
            return node
        draw = lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32)
        node = node.replace(lora_a=draw(node.lora_a), lora_b=draw(node.lora_b))
        length = node.magnitude
        return node if length is None else node.replace(magnitude=length * 1.3)

    return jax.tree.map(kicked, tree, is_leaf=is_weight_leaf)


def written(tree, folder):
    pairs = peft_files.to_pairs(DIT_RULES, flatten(tree))
    peft_files.write_peft(folder, pairs, "base")
    return pairs


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(
    "more", [{}, {"rank_stabilized": True}, {"dora": True}], ids=str
)
def test_what_we_write_peft_loads_to_the_same_output(tmp_path, targets, more):
    pattern = TARGETS[targets]
    if "dora" in more and targets == "all":
        pattern = ".*(blocks|head)/.*"  # no table
    tree = random_adapters(targets=pattern, rank=3, alpha=4.0, **more)
    written(tree, tmp_path)
    network = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert relative(ours(tree), theirs(network)) < 3e-6
    assert (
        relative(ours(merge_adapters(tree)), theirs(network.merge_and_unload())) < 3e-6
    )
    assert relative(ours(tree), theirs(base())) > 0.05


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_what_peft_writes_we_load_to_the_same_output(tmp_path, name, seed):
    network = adapted(CASES[name], seed)
    network.save_pretrained(tmp_path)
    found = open_adapter(tmp_path, MODEL, params())
    assert (
        relative(ours(merge_adapters(apply_adapter(params(), found))), theirs(network))
        < 3e-6
    )


def test_two_adapters_add_up_as_in_peft(tmp_path):
    one, two = (
        random_adapters(targets=TARGETS["attention"], rank=r, alpha=a)
        for r, a in ((3, 4.0), (2, 1.0))
    )
    for tree, name in ((one, "one"), (two, "two")):
        (tmp_path / name).mkdir()
        written(tree, tmp_path / name)
    network = peft.PeftModel.from_pretrained(base(), tmp_path / "one", "one")
    network.load_adapter(tmp_path / "two", "two")
    network.base_model.set_adapter(["one", "two"])
    both = params()
    for name in ("one", "two"):
        both = apply_adapter(both, open_adapter(tmp_path / name, MODEL, params()))
    assert relative(ours(both), theirs(network)) < 3e-6
    assert relative(ours(merge_adapters(both)), theirs(network)) < 3e-6


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_reaches_what_pefts_reaches(dora):
    """One layer in training, torch's random mask replaced by ours."""
    network = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False))
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["0"], use_dora=dora, lora_dropout=0.5
    )
    network = peft.get_peft_model(network, config)
    layer = network.base_model.model[0]
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(weight + 0.3 * torch.randn_like(weight))
    take = lambda weight: weight.detach().numpy().T
    length = layer.lora_magnitude_vector["default"].weight if dora else None
    node = LoRAWeight(
        take(layer.base_layer.weight),
        take(layer.lora_A["default"].weight),
        take(layer.lora_B["default"].weight),
        length if length is None else length.detach().numpy(),
        jax.random.split(jax.random.key(0), 5),
        scale=4 / 3,
        dropout=0.5,
    )
    x = np.random.default_rng(0).standard_normal((5, 7, 16)).astype(np.float32)
    mask = torch.from_numpy(np.array(node._drop(np.ones_like(x))))
    layer.lora_dropout["default"] = Masked(mask)
    with torch.no_grad():
        wanted = network.train()(torch.from_numpy(x)).numpy()
        still = network.eval()(torch.from_numpy(x)).numpy()
    assert relative(node.product(x, np.float32), wanted) < 3e-6
    assert (
        relative(node.replace(dropout_keys=None).product(x, np.float32), still) < 3e-6
    )
    assert relative(still, wanted) > 0.05


class Masked(torch.nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask if self.training else x


def test_diffusers_names_on_a_network_with_split_qkv(tmp_path):
    """peft itself puts what we wrote for diffusers on three modules for q, k and v."""
    tree = random_adapters(targets=".*blocks/attn/qkv/kernel", rank=3, alpha=4.0)
    pairs = peft_files.to_diffusers(peft_files.to_pairs(DIT_RULES, flatten(tree)))
    network = split(base())
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=r".*\.to_[qkv]")
    network = peft.inject_adapter_in_model(config, network)
    state = {}
    for name, pair in pairs.items():
        name = name.replace("transformer_blocks", "blocks").replace("attn1", "attn.qkv")
        state[f"{name}.lora_A.weight"] = torch.from_numpy(pair.lora_a)
        state[f"{name}.lora_B.weight"] = torch.from_numpy(pair.lora_b)
    found = peft.set_peft_model_state_dict(network, state)
    assert not found.unexpected_keys
    assert relative(ours(tree), theirs(network)) < 3e-6


class Three(torch.nn.Module):
    """One linear map of q, k and v as three."""

    def __init__(self, fused):
        super().__init__()
        rows = fused.weight.chunk(3), fused.bias.chunk(3)
        for name, weight, bias in zip("qkv", *rows, strict=True):
            part = torch.nn.Linear(weight.shape[1], weight.shape[0])
            part.weight.data, part.bias.data = weight.clone(), bias.clone()
            self.add_module(f"to_{name}", part)

    def forward(self, x):
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)


def split(network):
    for block in network.blocks:
        block.attn.qkv = Three(block.attn.qkv)
    return network
