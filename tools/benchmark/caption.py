"""`tools.benchmark caption`: captions per second of beam search, against transformers' generate."""

import argparse
import dataclasses

import torch

from models.generation import Generation, generate
from models.semmim import build_backbone
from tools.benchmark.model import by_turns, random_config, tokenizer_of
from tools.benchmark.roofline import predict_call

BEAMS, LENGTH = 5, 20  # of a search; tokens of a caption


@torch.no_grad()
def run_caption(args: argparse.Namespace, device: torch.device) -> dict:
    """Ours and transformers' on the same random decoder weights and memory by turns; their sentences are equal."""
    # here: it takes seconds to import
    from transformers import BertConfig, BertLMHeadModel, DynamicCache, EncoderDecoderCache

    cfg = random_config(args.config, args.override)
    tokens = tokenizer_of(cfg)
    torch.manual_seed(0)
    backbone = build_backbone(cfg, mlm_head=False)[0].to(device).eval()
    decoder = backbone.decoder
    shape = {**dataclasses.asdict(decoder.config), "num_hidden_layers": len(decoder.encoder.layer)}
    theirs = BertLMHeadModel(BertConfig(**shape, is_decoder=True, add_cross_attention=True)).to(device).eval()
    weights = {key.removeprefix("bert."): value for key, value in theirs.state_dict().items()}
    decoder.load_state_dict({key: weights[key] for key in decoder.state_dict()})
    memory_tokens = 2 + backbone.image_encoder.num_patches  # [CLS] of the image and of the empty prompt
    memory = torch.randn(args.images, memory_tokens, decoder.config.hidden_size, device=device)
    mask = torch.ones(memory.shape[:2], dtype=torch.int64, device=device)
    sentences = {}

    def ours():
        sentences["ours"] = generate(decoder, memory, mask, tokens, Generation(beams=BEAMS, max_tokens=LENGTH))[0]

    def reference():
        sentences["transformers"] = theirs.generate(
            input_ids=torch.full((args.images, 1), tokens.cls_id, device=device),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            num_beams=BEAMS,
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=LENGTH,
            bos_token_id=tokens.cls_id,
            eos_token_id=tokens.sep_id,
            pad_token_id=tokens.pad_id,
        )[:, 1:]

    times = by_turns({"ours": ours, "transformers": reference}, args.repeats, device)
    speed = {name: args.images / seconds for name, (seconds, _) in times.items()}
    same = sentences["ours"][:, : sentences["transformers"].shape[1]] == sentences["transformers"]
    return {
        "memory_tokens": memory_tokens,
        "tokens": sentences["ours"].shape[1],
        "captions_per_second": round(speed["ours"], 3),
        "captions_per_second_transformers": round(speed["transformers"], 3),
        "predicted": predict_call(ours, args.images, device, "captions"),
        "ratio": round(speed["ours"] / speed["transformers"], 2),
        "equal_tokens": round(same.float().mean().item(), 4),
    }
