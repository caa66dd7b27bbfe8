"""`train.compile`: in place, with the same numbers and the same checkpoints."""

import copy

import pytest
import torch
from conftest import refused
from tiny import NO_DROPOUT, make_batch, make_draws, tiny_model

from engine.distributed import compile_model

CLIP = "model.image_encoder.name=vit_base_patch16_clip_quickgelu_224"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.ones((), requires_grad=True).backward()  # before the compiler adds devices, or no later test may fork
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A torch.compile backend that runs what was traced as it is, and counts the graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module.forward


def one_step(model, seed):
    batch = make_batch(seed=seed)
    loss, logs = model(model.prepare(batch, make_draws(batch, seed)), 0.1 * seed, done=0.15 * seed)
    model.zero_grad()
    loss.backward()
    model.after_step()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([value for name, value in sorted(logs.items()) if name.startswith("loss/")]), gradients


SMALL = ("model.image_encoder.args={depth: 1}", "mim.inject_from=1")


@pytest.mark.parametrize(
    "overrides",
    [
        ("itm.temperature=1.0",),
        ("mim.target=pixels", "itc.negatives=batch", "model.image_encoder.checkpointing=true"),
    ],
)
def test_a_pre_training_step_is_one_graph_with_the_same_losses_and_gradients(overrides):
    plain = tiny_model(*NO_DROPOUT, CLIP, *SMALL, *overrides).train()
    compiled, graphs = copy.deepcopy(plain), Graphs()
    names = list(compiled.state_dict())
    compile_model(compiled, graphs)
    counts = []
    for seed in range(3):  # captions of several lengths, other weights of soft targets and shares that are done
        for ours, expected in zip(one_step(compiled, seed), one_step(plain, seed), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        counts.append(graphs.count)
    assert 0 < counts[0] and counts[-1] == counts[1]  # what varies is traced once as such
    assert list(compiled.state_dict()) == names
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_a_stage_whose_step_is_no_single_graph_is_refused():
    refused(lambda: compile_model(tiny_model().backbone), "train.compile: only a pre-training step")
