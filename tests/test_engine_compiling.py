"""`train.compile`: the layers compiled in place, with the same numbers and the same checkpoints."""

import copy

import pytest
import torch
from tiny import NO_DROPOUT, make_batch, make_draws, tiny_model

from engine.distributed import VARIANTS, compile_layers
from evaluation.sharded import evaluating
from models.caption import CaptionModel
from models.generation import Generation

CLIP = "model.image_encoder.name=vit_base_patch16_clip_quickgelu_224"


@pytest.fixture(autouse=True)
def fresh_compiler():
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
    loss, logs = model(model.prepare(batch, make_draws(batch, seed)), 0.4)
    model.zero_grad()
    loss.backward()
    model.after_step()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([value for name, value in sorted(logs.items()) if name.startswith("loss/")]), gradients


def test_every_layer_is_one_graph_with_the_same_losses_and_gradients():
    plain = tiny_model(*NO_DROPOUT, CLIP).train()
    compiled, graphs = copy.deepcopy(plain), Graphs()
    names = list(compiled.state_dict())
    assert (
        compile_layers(compiled, graphs, fullgraph=True) == 3 + 1 + 1 + 1 + 3 + 1
    )  # the students' and the teacher's layers
    counts = []
    for seed in range(4):  # captions of several lengths
        for ours, expected in zip(one_step(compiled, seed), one_step(plain, seed), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        counts.append(graphs.count)
    assert 0 < counts[0] and counts[-1] == counts[-2] <= VARIANTS  # lengths that vary are traced once
    assert list(compiled.state_dict()) == names
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_checkpointing_and_compiling_go_together():
    switches = ("model.image_encoder.checkpointing=true", "model.bert.checkpointing=true")
    plain = tiny_model(*NO_DROPOUT, CLIP).train()
    compiled = tiny_model(*NO_DROPOUT, CLIP, *switches).train()
    compile_layers(compiled, Graphs(), fullgraph=True)
    for ours, expected in zip(one_step(compiled, 0), one_step(plain, 0), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_evaluation_and_generation_run_uncompiled():
    model, batch, graphs = tiny_model(*NO_DROPOUT), make_batch(), Graphs()
    compile_layers(model, graphs)
    captioner = CaptionModel(model.backbone, model.tokens)
    with evaluating(captioner):
        options = Generation("greedy", max_tokens=3)
        captioner.generate(batch["image1"], batch["input_ids"], batch["attention_mask"], options)
    assert graphs.count == 0
