"""`tools.benchmark caption`: beam search against transformers' generate, and self-critical training steps."""

from __future__ import annotations

import argparse

import torch

import utils
from dataset.caption import CaptionCollate
from dataset.text import Tokenizer
from evaluation.cider import CiderReward
from models.bert import TextDecoder
from models.caption import CaptionModel, SelfCritical
from models.generation import Generation, generate
from models.semmim import build_backbone
from optim import create_optimizer
from tools.benchmark.model import machine, random_config, timed, tokenizer_of
from tools.demo import scenes

DOCUMENTS = 500  # scenes whose captions give the document frequencies


@torch.random.fork_rng()
def run_caption(args: argparse.Namespace) -> dict:
    """{"beam_search": {...}, "scst": {...}} for a model of the configuration's size with random weights."""
    device = torch.device(utils.choose_device(args.device))
    cfg = random_config(args.config, args.override)
    tokenizer = tokenizer_of(cfg)
    torch.manual_seed(0)
    model = CaptionModel(build_backbone(cfg, mlm_head=False)[0], tokenizer).to(device)
    result = {"config": str(args.config), "machine": machine(device)}
    result["beam_search"] = time_beam_search(model.eval(), args, device)
    if args.scst_steps:
        result["scst"] = time_scst(model.train(), tokenizer, cfg, args, device)
    return result


def time_beam_search(model: CaptionModel, args: argparse.Namespace, device) -> dict:
    """Ours and transformers' on the same decoder weights and memory, one after the other; equal sentences."""
    from transformers import DynamicCache, EncoderDecoderCache

    decoder, image_encoder = model.backbone.decoder, model.backbone.image_encoder
    memory = torch.randn(args.images, 2 + image_encoder.num_patches, decoder.config.hidden_size, device=device)
    mask = torch.ones(memory.shape[:2], dtype=torch.int64, device=device)
    theirs = transformers_decoder(decoder).to(device)
    start = torch.full((args.images, 1), model.tokens.cls_id, device=device)

    def ours():
        options = Generation(beams=args.beams, max_tokens=args.max_tokens)
        return generate(decoder, memory, mask, model.tokens, options)[0]

    @torch.no_grad()
    def reference():
        return theirs.generate(
            input_ids=start,
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            num_beams=args.beams,
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=args.max_tokens,
            bos_token_id=model.tokens.cls_id,
            eos_token_id=model.tokens.sep_id,
            pad_token_id=model.tokens.pad_id,
        )[:, 1:]

    sides = {"ours": ours, "transformers": reference}
    sentences, seconds = {name: function() for name, function in sides.items()}, {name: [] for name in sides}
    for _ in range(args.repeats):  # in turns, so that both meet the same load of the machine
        for name, function in sides.items():
            seconds[name].append(timed(function, device)[0])
    speed = {name: args.images / min(times) for name, times in seconds.items()}
    same = (sentences["ours"][:, : sentences["transformers"].shape[1]] == sentences["transformers"]).float().mean()
    return {
        "images": args.images,
        "memory_tokens": memory.shape[1],
        "beams": args.beams,
        "tokens": sentences["ours"].shape[1],
        "captions_per_second": round(speed["ours"], 3),
        "captions_per_second_transformers": round(speed["transformers"], 3),
        "ratio": round(speed["ours"] / speed["transformers"], 2),
        "equal_tokens": round(float(same), 4),
    }


def transformers_decoder(decoder: TextDecoder) -> torch.nn.Module:
    """transformers' BertLMHeadModel with cross-attention and the weights of ours."""
    from transformers import BertConfig, BertLMHeadModel

    shape = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    shape = {key: getattr(decoder.config, key) for key in (*shape, "type_vocab_size", "layer_norm_eps")}
    layers = len(decoder.encoder.layer)
    config = BertConfig(**shape, num_hidden_layers=layers, is_decoder=True, add_cross_attention=True)
    model = BertLMHeadModel(config).eval()
    own = decoder.state_dict()
    state = {key: own.get(key.removeprefix("bert."), value) for key, value in model.state_dict().items()}
    words = own["embeddings.word_embeddings.weight"]  # transformers names the tied tensors twice
    state |= {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": own["cls.predictions.bias"]}
    model.load_state_dict(state)
    return model


def time_scst(model: CaptionModel, tokenizer: Tokenizer, cfg, args: argparse.Namespace, device) -> dict:
    """Whole training steps (forward, generation, reward, backward, AdamW) on random images, references of scenes."""
    references = [scenes.captions(scenes.make_scene(0, index)) for index in range(max(DOCUMENTS, args.images))]
    reward = CiderReward(tokenizer, references)
    objective = SelfCritical(reward, mode="sample", samples=args.beams, max_tokens=args.max_tokens)
    size = cfg.model.image_encoder.image_size
    samples = [
        {
            "image": torch.randn(3, size, size),
            "caption": texts[0],
            "prompt": "",
            "references": texts,
            "path": "",
            "bad": [],
        }
        for texts in references[: args.images]
    ]
    batch = utils.to_device(CaptionCollate(tokenizer, args.max_tokens, 25)(samples), device)
    optimizer = create_optimizer(model, lr=1e-6, lr_vit=1e-6, weight_decay=0.02)
    precision = utils.resolve_precision("auto" if device.type == "cuda" else "fp32", device)

    def step():
        with utils.autocast(device, precision):
            loss, _ = model(batch, objective)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # warm up
    objective.reward_seconds = 0.0
    seconds = sum(timed(step, device)[0] for _ in range(args.scst_steps))
    return {
        "images": args.images,
        "samples": args.beams,
        "steps_per_second": round(args.scst_steps / seconds, 4),
        "reward_share": round(objective.reward_seconds / seconds, 4),
    }
