"""Five optimizer steps of a tiny model on fixed data and draws; run by torchrun or as one process.

    PYTHONPATH=.:tests python tests/distributed_steps.py pretrain|retrieval OUT.pth RANKS [override ...]

One process stands in for RANKS of them: ITM then draws its negatives within the rows that each of them would have.

Everything is in fp64: AdamW divides by the root of the squared gradient, which blows rounding noise up to whole steps
where the exact gradient is zero (the biases of attention keys).
"""

import sys

import torch
from tiny import NO_DROPOUT, draws_part, make_batch, make_draws, tiny_config, tiny_model

from engine.distributed import compile_layers, init_distributed, wrap_ddp
from models import alignment
from models.retrieval import RetrievalModel
from optim import create_optimizer
from utils import all_reduce_sum, is_main, leave_group, rank, run_main, unwrap, world_size

GLOBAL_BATCH, STEPS = 8, 5


def negatives_within(ranks: int) -> None:
    """Let ITM take negatives only from the rows that would be on the same one of `ranks` ranks."""
    everywhere = alignment.legal_negatives

    def legal_negatives(image_id, caption_id):
        owner = torch.arange(len(image_id)) * ranks // len(image_id)
        return everywhere(image_id, caption_id) & (owner[:, None] == owner)

    alignment.legal_negatives = legal_negatives


def main(stage: str, out: str, ranks: str, *overrides: str) -> None:
    device = init_distributed("cpu")
    torch.set_num_threads(1)
    if world_size() == 1:
        negatives_within(int(ranks))
    cfg = tiny_config(*overrides)
    model = tiny_model(*NO_DROPOUT, *overrides).double()
    if stage == "retrieval":
        model.backbone.decoder = model.backbone.mlm_head = None
        model = RetrievalModel(model.backbone, cfg).double()
    if cfg.train.compile:  # forward and backward graphs as ever, without the minutes that a C++ compiler takes
        compile_layers(model, device, "aot_eager")
    wrapped = wrap_ddp(model, device)
    optimizer = create_optimizer(model, lr=1e-3, lr_vit=1e-4, weight_decay=0.02)
    history = []
    for step in range(STEPS):
        batch = make_batch(GLOBAL_BATCH, seed=step)
        draws = make_draws(batch, seed=step)
        size = GLOBAL_BATCH // world_size()
        rows = slice(rank() * size, (rank() + 1) * size)
        length = int(batch["attention_mask"][rows].sum(1).max())  # each rank pads to its own longest caption
        mine = {name: value[rows] for name, value in batch.items()}
        for name in ("input_ids", "attention_mask"):
            mine[name] = mine[name][:, :length]
        mine = {name: x.double() if x.is_floating_point() else x for name, x in mine.items()}
        if stage == "retrieval":
            mine["image"], draws_mine = mine["image1"], torch.stack([draws.itm_image, draws.itm_text])[:, rows]
        else:
            draws_mine = draws_part(draws, rows, length)
        loss, logs = wrapped(mine, 0.4, draws=draws_mine)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        unwrap(wrapped).after_step()
        losses = [value for name, value in sorted(logs.items()) if name.startswith("loss/")]
        history.append(all_reduce_sum(torch.stack(losses)) / world_size())
    if is_main():
        compiled = sum(module._compiled_call_impl is not None for module in model.modules())
        torch.save({"losses": torch.stack(history), "state": model.state_dict(), "compiled": compiled}, out)
    leave_group()


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:]))
