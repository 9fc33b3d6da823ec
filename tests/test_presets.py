"""Published evaluations: each resolves to a whole recipe, and says its figure."""

import pytest

from configs import dit_xl2, sit_xl2
from sit_jax import presets
from sit_jax.config import from_json, to_json
from sit_jax.errors import UserError
from sit_jax.recipe import recipe
from sit_jax.releases import RELEASES
from sit_jax.rounding import ROUNDINGS
from sit_jax.samplers.ode import Ode, heun


def configured(name):
    chosen = presets.preset(name)
    config = (sit_xl2 if name.startswith("sit") else dit_xl2).get_config()
    with config.ignore_type():
        config.sampler, config.guidance = chosen.sampler, chosen.guidance
    return chosen, config


@pytest.mark.parametrize("name", presets.PRESETS)
def test_each_is_a_recipe_that_can_be_recorded(name):
    chosen, config = configured(name)
    parts = recipe(config)
    assert recipe(from_json(to_json(config))).sampler == parts.sampler
    assert chosen.weights in RELEASES and chosen.vae in RELEASES
    assert chosen.rounding in ROUNDINGS
    said = presets.described(name, chosen)
    assert chosen.figure in said and chosen.source in said and "\n" not in said


def test_the_papers_ode_takes_250_evaluations():
    _, config = configured("sit-paper-ode")
    assert recipe(config).sampler == Ode(heun, 125) and config.guidance == 1.5


def test_an_unknown_one_lists_the_known():
    with pytest.raises(UserError, match="there are sit-paper-ode, sit-paper-sde"):
        presets.preset("sit")
