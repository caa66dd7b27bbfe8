"""The backbone that every stage shares: image encoder, text encoder, fusion encoder, decoder and their projections.

A backbone is built from a plain `description` (architecture only), which travels in every checkpoint, so that a
checkpoint alone is enough to rebuild the model at another resolution or without the parts a stage does not use.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import BertConfig, FusionEncoder, LMHead, TextDecoder, TextEncoder, load_bert_weights
from models.tensors import Linear, full_precision
from models.weights import check_weights, load_exactly
from utils import Config, UserError, find_file, load_checkpoint, reason, shown

KEYS = {"image_encoder", "bert", "text_layers", "fusion_layers", "decoder_layers", "embed_dim", "temperature", "sep"}
TEMPERATURE_RANGE = (0.001, 0.5)  # ALBEF clamps its temperature to this range
POSITIONS = "image_encoder.vit.pos_embed"
ADVICE = "use the config that the checkpoint was trained with"
PREFIX = "backbone."  # where every stage's model keeps its backbone, and so the prefix of its keys in a checkpoint


def describe(cfg: Config) -> dict:
    """The architecture in a config (`model`, `text.sep`, `itc.temperature`) as a plain dict for checkpoints."""
    encoder, bert = cfg.model.image_encoder, cfg.model.bert
    config = BertConfig.from_file(find_file(bert.config, "model.bert.config"), bert.args)
    return {
        "image_encoder": {"name": encoder.name, "image_size": encoder.image_size, "args": dict(encoder.args)},
        "bert": asdict(config),
        **{key: bert[key] for key in ("text_layers", "fusion_layers", "decoder_layers")},
        "embed_dim": cfg.model.embed_dim,
        "temperature": cfg.itc.temperature,
        "sep": cfg.text.sep,
    }


class SemMIM(nn.Module):
    """Image encoder E_I, text encoder E_T, fusion encoder E_F, decoder, projections into the ITC space, ITM head.

    decoder, mlm_head: whether to have these parts (retrieval needs neither).
    image_weights: see ImageEncoder; everything else starts at random here, `build_backbone` loads BERT's weights.
    """

    def __init__(self, description: dict, decoder: bool = True, mlm_head: bool = True, image_weights: str = "random"):
        # Here, because timm takes two seconds to import, for which only who builds a model should wait
        from models.vit import ImageEncoder

        super().__init__()
        self.description = description
        bert = BertConfig(**description["bert"])
        self.image_encoder = ImageEncoder(**description["image_encoder"], weights=image_weights)
        width = self.image_encoder.width
        if width != bert.hidden_size:
            raise UserError(
                f"the image encoder is {width} wide, the text encoder {bert.hidden_size}: text is injected among the "
                "patches and attends to them without a projection, so both widths must be equal; set "
                "model.image_encoder.args.embed_dim or model.bert.args.hidden_size"
            )
        self.text_encoder = TextEncoder(bert, description["text_layers"])
        self.fusion_encoder = FusionEncoder(bert, description["fusion_layers"])
        self.decoder = TextDecoder(bert, description["decoder_layers"]) if decoder else None
        self.mlm_head = LMHead(bert) if mlm_head else None
        self.vision_proj = Linear(width, description["embed_dim"])
        self.text_proj = Linear(width, description["embed_dim"])
        self.itm_head = Linear(width, 2)  # index 1: the pair matches
        # The logarithm is learned: a raw temperature moves by about one learning rate a step, far too fast at 1e-3.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(description["temperature"])))

    def set_checkpointing(self, image: bool, text: bool) -> None:
        """Whether to recompute the layers of the image encoder, or of the text encoder, fusion encoder and decoder, in
        the backward pass instead of keeping their activations: less memory, more time.
        """
        self.image_encoder.checkpointing = image
        for stack in (self.text_encoder, self.fusion_encoder, self.decoder):
            if stack is not None:
                stack.encoder.checkpointing = text

    def temperature(self) -> Tensor:
        """The learnable temperature of the ITC space, a scalar."""
        return self.log_temperature.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in TEMPERATURE_RANGE; called after every optimizer step."""
        low, high = (math.log(value) for value in TEMPERATURE_RANGE)
        self.log_temperature.clamp_(low, high)

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> (image_embeds [B, 1+N, D], image_feat [B, E])"""
        image_embeds = self.image_encoder(images)
        return image_embeds, project(self.vision_proj, image_embeds[:, 0])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, L], [B, L] -> (text_embeds [B, L, D], text_feat [B, E])"""
        text_embeds = self.text_encoder(input_ids, attention_mask)
        return text_embeds, project(self.text_proj, text_embeds[:, 0])

    def decoder_memory(
        self, image_embeds: Tensor, fused: Tensor, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the decoder attends to in every stage, [image tokens ; fused text] -> (memory, its mask [B, 1+N+L]).

        image_embeds: [B, 1+N, D]; fused: [B, L, D], of a prefix, prompt or question; text_mask: [B, L], None if
        nothing is padded; then the memory has no mask either.
        """
        memory = torch.cat([image_embeds, fused], 1)  # [B, 1+N+L, D]
        if text_mask is None:
            return memory, None
        return memory, torch.cat([text_mask.new_ones(image_embeds.shape[:2]), text_mask], 1)

    def encode_memory(
        self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor | None, image_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`decoder_memory` of images and what is said or asked of them. [U, 1+N, D], [B, L], [B, L] or None

        image_rows: [B] the image of each text; None: text b belongs to image b.
        """
        text_embeds = self.text_encoder(input_ids, attention_mask)  # [B, L, D]
        memory = self.fusion_encoder.project_memory(image_embeds)
        fused = self.fusion_encoder(text_embeds, attention_mask, memory, image_rows)  # [B, L, D]
        if image_rows is not None:
            image_embeds = image_embeds[image_rows]
        return self.decoder_memory(image_embeds, fused, attention_mask)

    def freeze_alignment(self) -> None:
        """No gradient for what writing text leaves unused: it stays as it is, and in the checkpoint."""
        for module in (self.vision_proj, self.text_proj, self.itm_head):
            module.requires_grad_(False)
        self.log_temperature.requires_grad_(False)
        self.image_encoder.mask_token.requires_grad_(False)

    def mlm_logits(self, fused: Tensor) -> Tensor:
        """[..., D] -> [..., V] with the text encoder's word embeddings as output layer"""
        return self.mlm_head(fused, self.text_encoder.embeddings.word_embeddings.weight)

    @full_precision
    def itm_logits(self, fused: Tensor) -> Tensor:
        """[R, L, D] -> [R, 2] from the fused [CLS]; in fp32, because they rank: in bf16 many would be equal"""
        return self.itm_head(fused[:, 0])


@full_precision
def project(layer: nn.Linear, tokens: Tensor) -> Tensor:
    """Project into the ITC space and L2-normalize, in fp32, because their cosines rank. [..., D] -> [..., E]"""
    return F.normalize(layer(tokens), dim=-1)


def build_backbone(
    cfg: Config, decoder: bool = True, mlm_head: bool = True, initial_weights: bool = True
) -> tuple[SemMIM, list[str]]:
    """A new backbone with the initial weights that the config names, and log lines that say what came from where.

    initial_weights: False if a checkpoint will replace them anyway, so that none are read or downloaded.
    """
    encoder, bert = cfg.model.image_encoder, cfg.model.bert
    weights = encoder.weights if initial_weights else "random"
    net = SemMIM(describe(cfg), decoder, mlm_head, image_weights=weights)
    net.set_checkpointing(encoder.checkpointing, bert.checkpointing)
    if not initial_weights:
        return net, []
    if encoder.weights == "random" and encoder.positions == "sincos":
        net.image_encoder.start_from_sincos()
    line = f"image encoder: {encoder.name}, weights: {encoder.weights}"
    if bert.weights == "random":
        return net, [line, "text encoder, fusion encoder, decoder: random weights"]
    parts = net.text_encoder, net.fusion_encoder, net.decoder, net.mlm_head
    return net, [line, *load_bert_weights(bert.weights, *parts, cfg.text.vocab)]


def load_backbone(
    path: str | Path,
    image_size: int | None = None,
    decoder: bool = False,
    mlm_head: bool = False,
    loaded: dict | None = None,
) -> tuple[SemMIM, dict, list[str]]:
    """Rebuild the backbone of a checkpoint of any stage, at its own or another resolution.

    loaded: the content of `path`, if it has been read already.
    -> (backbone, the rest of the checkpoint without model and optimizer, log lines: which parts were left out, and
    whether positions were resized). Raises UserError if the file is no checkpoint of this codebase, lacks weights that
    are asked for, or its description is not its weights'.
    """
    checkpoint = load_checkpoint(path) if loaded is None else loaded
    state, description = backbone_state(checkpoint, path), checkpoint.get("description")
    if description is None:
        raise UserError(
            f"{path}: no SemMIM checkpoint (it has no model description); give one that a script of this project wrote"
        )
    check_description(description, state, path)
    if decoder and not any(key.startswith("decoder.") for key in state):
        raise UserError(f"{path}: the checkpoint has no decoder, which writing text needs; give one of pre-training")
    if image_size is not None:
        description = {**description, "image_encoder": {**description["image_encoder"], "image_size": image_size}}
    backbone = SemMIM(description, decoder, mlm_head)
    state, resized = backbone.image_encoder.resize_positions(state, POSITIONS, path)
    load_exactly(backbone, state, path, ADVICE, extra=True)
    own = {f"{PREFIX}{key}" for key in backbone.state_dict()}
    unused = {key.removeprefix(PREFIX).split(".")[0] for key in checkpoint["model"] if key not in own}
    rest = {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}
    lines = [f"{path}: weights of step {checkpoint.get('progress', {}).get('step', '?')}", *resized]
    if unused:
        lines.append(f"{path}: not used here: {', '.join(sorted(unused))}")
    return backbone, {**rest, "description": description}, lines


def backbone_state(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint's backbone, without PREFIX."""
    state = checkpoint.get("model")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path}: its entry model is not what a script of this project writes")
    return {key[len(PREFIX) :]: value for key, value in state.items() if key.startswith(PREFIX)}


def check_description(description: dict, state: dict[str, Tensor], path: str | Path) -> None:
    """UserError, naming `path`, unless `description` is one of a model and `state` has exactly that model's weights.

    The model is built on the meta device: whatever sizes are described, nothing is allocated for them.
    """
    try:
        if set(description) - {"vocab"} != KEYS or not isinstance(description.get("vocab", ""), str):
            raise UserError(f"its keys are {shown(sorted(description))}")
        depths = [description[key] for key in KEYS if key.endswith("_layers")]
        if sum(depths) + description["image_encoder"]["args"].get("depth", 0) > len(state):
            raise UserError(f"it has more layers than the {len(state)} weights of the file")
        parts = [any(key.startswith(part) for key in state) for part in ("decoder.", "mlm_head.")]
        with torch.device("meta"):
            own = SemMIM(description, *parts).state_dict()
    except Exception as error:  # timm and torch stumble over values in ways of their own
        what = "its entry description is not what a script of this project writes"
        raise UserError(f"{path}: {what} ({reason(error)})") from None
    check_weights(own, state, path, "the description and the weights are of two models; take another file")
