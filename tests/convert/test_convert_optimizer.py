"""Torch files of a training: written so that torch goes on from them."""

import pytest
import torch
from helpers.torch_files import saved

from sit_jax.convert import tensor_files
from sit_jax.convert.optimizer import torch_content
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError


def trained(steps=3):
    """A torch model with one frozen parameter, and its optimizer after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def training_file(model, optimizer, **changes):
    model = model.state_dict()
    return {"model": model, "ema": model, "opt": optimizer.state_dict()} | changes


def test_torch_content_lets_torch_go_on(tmp_path):
    model, optimizer = trained()
    read = read_torch_file(saved(tmp_path, training_file(model, optimizer)))
    opt = torch_content(read.adam, list(read.model))
    tensor_files.write(tmp_path / "back.pt", {"model": dict(read.model), "opt": opt})
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    again, fresh = trained(steps=0)
    again.load_state_dict(back["model"], strict=True)
    fresh.load_state_dict(back["opt"])
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    x = torch.randn(5, 3)
    for m, o in ((model, optimizer), (again, fresh)):
        o.zero_grad()
        m(x).square().sum().backward()
        o.step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_read_adam_gives_none_before_step_1(tmp_path):
    read = read_torch_file(saved(tmp_path, training_file(*trained(steps=0))))
    assert read.adam is None
    assert read.ignored == ("opt",)


def changed(opt, **group):
    return opt | {"param_groups": [opt["param_groups"][0] | group]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda opt: 3, "not the state of an AdamW"),
        (lambda opt: {"state": {}}, "not the state of an AdamW"),
        (lambda opt: opt | {"param_groups": 2 * opt["param_groups"]}, "one parameter"),
        (lambda opt: changed(opt, params=[0, 1]), "opt has 2 parameters, model 4"),
        (lambda opt: changed(opt, maximize=True), "no plain AdamW"),
        (
            lambda opt: changed(opt, weight_decay=0.1, decoupled_weight_decay=False),
            "no plain AdamW",
        ),
        (
            lambda opt: opt | {"state": {i: {"momentum": 1} for i in range(4)}},
            "not the state of an AdamW",
        ),
        (
            lambda opt: (
                opt | {"state": opt["state"] | {1: opt["state"][1] | {"step": 9}}}
            ),
            "several steps",
        ),
    ],
)
def test_read_adam_refuses_other_optimizers(tmp_path, change, told):
    model, optimizer = trained()
    content = training_file(model, optimizer, opt=change(optimizer.state_dict()))
    with pytest.raises(UserError, match=told):
        read_torch_file(saved(tmp_path, content))
