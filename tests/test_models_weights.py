"""The strict core that all readers of weights share."""

import pytest
import torch
from torch import nn

from models.weights import check_weights, load_exactly
from utils import UserError


def layers() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(2, 3), "second": nn.Linear(3, 2)})


def changed(**changes) -> dict:
    """The weights of `layers`, some replaced or, by None, taken out; `__` stands for a dot."""
    weights = layers().state_dict() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in weights.items() if value is not None}


def test_fitting_weights_are_copied():
    module, weights = layers(), changed()
    load_exactly(module, weights, "a.pth", "help")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(first__bias=None), "a.pth: first.bias is missing; help"),
        (changed(first__bias=None, second__bias=None), "a.pth: first.bias is missing (and 1 more); help"),
        (changed(third=torch.ones(1)), "a.pth: third has no place in the model; help"),
        (changed(first__bias=torch.ones(4)), "a.pth: first.bias has the shape [4] instead of [3]; help"),
    ],
)
def test_a_misfit_is_one_line_and_changes_nothing(weights, message):
    module = layers()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_exactly(module, weights, "a.pth", "help")
    assert str(error.value) == message
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_may_be_lacking_or_left_over_is_said_by_the_caller():
    module = layers()
    kept = module["second"].bias.clone()
    load_exactly(
        module, changed(second__bias=None, third=torch.ones(1)), "a.pth", "help", lacking="second.", extra=True
    )
    assert torch.equal(module["second"].bias, kept)
    with pytest.raises(UserError, match="first.bias is missing"):
        load_exactly(module, changed(first__bias=None), "a.pth", "help", lacking="second.")


def test_weights_are_called_as_in_their_file():
    with pytest.raises(UserError, match="^a.pth: FIRST.BIAS is missing"):
        check_weights(layers().state_dict(), changed(first__bias=None), "a.pth", "help", shown=str.upper)
