"""Losses against direct transcriptions, and the registry."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslscale.errors import UserError
from sslscale.objectives import OBJECTIVES, find_objective, objective_settings
from sslscale.objectives.simclr import nt_xent


def test_nt_xent_is_the_papers_formula():
    rng = np.random.default_rng(0)
    z_1, z_2 = (F.normalize(torch.tensor(rng.normal(size=(5, 7))), dim=1) for _ in range(2))
    z = torch.cat([z_1, z_2]).numpy()
    losses = []
    for i in range(10):
        j = (i + 5) % 10
        total = sum(np.exp(z[i] @ z[k] / 0.3) for k in range(10) if k != i)
        losses.append(-np.log(np.exp(z[i] @ z[j] / 0.3) / total))
    assert nt_xent(z_1, z_2, 0.3).item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_settings_are_those_of_the_class_with_its_defaults():
    _, settings = objective_settings({"name": "simclr", "temperature": 0.2})
    assert settings == {"temperature": 0.2, "hidden_dim": 512, "output_dim": 128}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "simclr", "temprature": 0.2}, r"did you mean 'temperature'"),
        ({"name": "simclr", "temperature": "warm"}, r"objective\(simclr\)\.temperature"),
        ({"name": "simcrl"}, "did you mean 'simclr'"),
        ({}, "needs a name"),
        ({"name": "nowhere.to.be:Found"}, "cannot be imported"),
        ({"name": "collections:OrderedDict"}, "is not an objective"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(config, message):
    with pytest.raises(UserError, match=message):
        objective_settings(config)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_registered_name_is_a_class(name):
    assert find_objective(name).__doc__
