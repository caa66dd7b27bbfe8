"""The image encoder: a timm Vision Transformer with a [MASK] token and text injection in its last layers.

As the paper has it, some patches of the student's image become a learnable [MASK], and from layer
`inject_from` on (layers are counted from 1) the text tokens join the sequence, so that the masked patches are recovered
with the text's help.

Shapes: B images, N = grid * grid patches, L text tokens, D the width.
"""

import math
import re
from os import PathLike
from pathlib import Path

import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import Attention, resample_abs_pos_embed
from timm.layers.activations import QuickGELU as SlowQuickGELU
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.bert import attention, padding_mask
from models.tensors import Linear, QuickGELU
from models.weights import architecture_beside, check_value, find_weights, load_exactly, read_weights
from utils import UserError, one_line, reason, shown

# The arguments of timm.create_model that a configuration, a checkpoint or an exported folder may set. Others could name
# a file to load or a class to build with.
SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
RATES = ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
NUMBERS = ("mlp_ratio", "init_values")
FLAGS = ("qkv_bias", "qk_norm", "proj_bias", "no_embed_class", "pre_norm")
FAMILY = ("vision_transformer",)  # timm's module of the names that are accepted
ACT_LAYERS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


class ImageEncoder(nn.Module):
    """timm ViT + [MASK] + text injection.

    name: a timm VisionTransformer with a [CLS] token, e.g. `vit_base_patch16_clip_quickgelu_224` for OpenAI's
        CLIP, which was trained with QuickGELU.
    args: timm.create_model's keyword arguments (`embed_dim`, `depth`, ...), see `check_arguments`.
    weights: "random"; "openai" (timm's hub weights of that tag) or "hub" (the name's default tag); or what
        `load_vit_weights` reads. Positions are resized to `image_size`.
    checkpointing (an attribute): recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(self, name: str, image_size: int, args: dict | None = None, weights: str = "random"):
        super().__init__()
        self.vit = create_vit(name, image_size, dict(args or {}), weights)
        self.image_size, self.checkpointing = image_size, False
        self.width, self.depth = self.vit.embed_dim, len(self.vit.blocks)
        self.patch_size = self.vit.patch_embed.patch_size[0]
        self.grid = image_size // self.patch_size
        self.num_patches = self.grid**2
        self.mask_token = nn.Parameter(torch.empty(self.width))
        nn.init.normal_(self.mask_token, std=0.02)
        if weights in ("openai", "hub"):
            check_pixels(self.vit.pretrained_cfg, name)
        elif weights != "random":
            load_vit_weights(self, weights)

    def start_from_sincos(self) -> None:
        """Set the patches' positions [N, D] to MAE's two-dimensional sines and cosines; training goes on from there.

        Random positions say which patch is which and not which are neighbors, and are hardly seen beside the patches
        at first: a short training never learns where things are (docs/study.md). D must be a multiple of 4.
        """
        positions = build_sincos2d_pos_embed([self.grid, self.grid], self.width)
        with torch.no_grad():
            self.vit.pos_embed[:, -self.num_patches :] = positions

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images: [B, 3, S, S] -> the first layer's input [B, 1 + N, D].

        mask: [B, N] bool; patches where it is True become [MASK], before the positions are added.
        """
        x = self.vit.patch_embed(images)  # [B, N, D]
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return self.vit.norm_pre(self.vit._pos_embed(x))  # [CLS] in front

    def layers(
        self, x: Tensor, first: int, last: int, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Apply the layers first..last (from 1, both included) to x [B, 1 + N, D].

        With text [B, L, D] they see the sequence [x ; text], in which the tokens whose text_mask [B, L] is 0
        are never attended to. -> the whole sequence, [B, 1 + N (+ L), D]
        """
        mask = None
        if text is not None:
            if text_mask is not None:
                images = torch.ones(x.shape[:2], dtype=text_mask.dtype, device=x.device)
                mask = padding_mask(torch.cat((images, text_mask), dim=1), x)  # [B, 1, 1, 1 + N + L]
            x = torch.cat((x, text.to(x.dtype)), dim=1)
        for block in self.vit.blocks[first - 1 : last]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        return x

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        inject_from: int | None = None,
    ) -> Tensor:
        """images: [B, 3, S, S] -> image_embeds [B, 1 + N, D] after the final norm.

        mask: [B, N] bool, the patches to hide; text: [B, L, D], seen by the layers from `inject_from`
        (1..depth) on; without text, or with inject_from None, the image alone.
        """
        x = self.embed(images, mask)
        if text is None or inject_from is None:
            return self.vit.norm(self.layers(x, 1, self.depth))
        x = self.layers(x, 1, inject_from - 1)
        x = self.layers(x, inject_from, self.depth, text, text_mask)
        return self.vit.norm(x[:, : 1 + self.num_patches])

    def forward_twice(
        self, images: Tensor, text: Tensor, text_mask: Tensor | None, inject_from: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's two passes: (image alone, image with text), each [B, 1 + N, D] after the final norm.

        The layers below `inject_from` run once; with inject_from None both results are the same tensor. Third in the
        result is what the last layer reads of the image alone, for `last_values`. [B, 1 + N, D]
        """
        first = self.depth if inject_from is None else inject_from
        x = self.layers(self.embed(images), 1, first - 1)
        below = self.layers(x, first, self.depth - 1)  # what the last layer reads of the image alone
        plain = self.vit.norm(self.layers(below, self.depth, self.depth))
        if inject_from is None:
            return plain, plain, below
        injected = self.layers(x, inject_from, self.depth, text, text_mask)
        return plain, self.vit.norm(injected[:, : 1 + self.num_patches]), below

    def last_values(self, x: Tensor) -> Tensor:
        """What each token would give to [CLS] in the last layer: its value, projected and normed, unmixed by attention.

        [CLS] is a mean of these values (and what it was before), so they lie where a contrast trains [CLS] to lie, and
        the tokens themselves do not (MaskCLIP: Zhou et al. 2022, "Extract Free Dense Labels from CLIP", Section 3.2).
        x: the last layer's input [B, 1 + N, D] -> [B, 1 + N, D]
        """
        block = self.vit.blocks[-1]
        value = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)[2]
        return self.vit.norm(block.attn.proj(value))

    def resize_positions(
        self, state_dict: dict[str, Tensor], key: str, source: str | PathLike
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Fit the positional embeddings of a checkpoint from another resolution to this one.

        state_dict[key]: [1, 1 + n, D] with n a square number, resized by timm's bicubic, antialiased interpolation.
        -> (a state dict with the resized ones, a line for the log), or the same and no line if the sizes agree or n is
        no square, which loading then refuses.
        """
        own, found = self.vit.pos_embed, state_dict.get(key)
        if found is None or found.ndim != 3 or found.shape[::2] != own.shape[::2] or found.shape[1] == own.shape[1]:
            return state_dict, []
        prefix_tokens = 0 if self.vit.no_embed_class else 1
        side = math.isqrt(found.shape[1] - prefix_tokens)
        if side**2 != found.shape[1] - prefix_tokens:
            return state_dict, []
        now = f"{self.grid} x {self.grid} patches (image_size {self.image_size})"
        resized = resample_abs_pos_embed(found, new_size=[self.grid, self.grid], num_prefix_tokens=prefix_tokens)
        line = f"{source}: trained with {side} x {side} patches of an image, here {now}: its positions are resized"
        return {**state_dict, key: resized}, [line]


class ImageAttention(Attention):
    """timm's, with this project's `attention`, and split so that the gradients of queries, keys and values are written
    once, as the projection reads them; timm's order of dimensions has them copied."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, D]; attn_mask: additive, broadcastable to [B, H, N, N] -> [B, N, D]"""
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, d]
        drop = self.attn_drop.p if self.training else 0.0
        out = attention(self.q_norm(q), self.k_norm(k), v, attn_mask, drop, is_causal)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


def create_vit(name: str, image_size: int, args: dict, weights: str = "random") -> VisionTransformer:
    """-> timm VisionTransformer without a head; everything that does not fit this project is a UserError."""
    check_arguments(name, image_size, args)
    if weights == "openai" and "." not in name:
        name += ".openai"
    if weights != "random" and name.endswith(".openai") and "quickgelu" not in name and "act_layer" not in args:
        raise UserError(
            f"model.image_encoder.name: {name} computes gelu, OpenAI's CLIP was trained with quick_gelu; take "
            f"{name.replace('_clip_', '_clip_quickgelu_')}"
        )
    pretrained = weights in ("openai", "hub")
    try:
        options = {"num_classes": 0, "global_pool": "", "img_size": image_size}
        vit = timm.create_model(name, pretrained=pretrained, **options, **args)
    except Exception as error:  # timm checks little: any of its layers may stumble over a value
        what = f"get the hub weights of {name}" if pretrained else f"build {name} with args {shown(args)}"
        raise UserError(f"model.image_encoder: timm cannot {what} ({reason(error)})") from None
    for part in vit.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
    for block in vit.blocks:
        if isinstance(block.mlp.act, SlowQuickGELU):
            block.mlp.act = QuickGELU()
        if type(block.attn) is Attention and block.attn.gate is None:
            block.attn.__class__ = ImageAttention  # equal weights and names
    plain = type(vit) is VisionTransformer and vit.has_class_token and vit.num_prefix_tokens == 1
    if not plain or vit.pos_embed is None:
        raise UserError(
            f"model.image_encoder.name: {name} is not a plain Vision Transformer with one [CLS] token and learned "
            "positions; take one such as vit_base_patch16_clip_quickgelu_224"
        )
    patch = vit.patch_embed.patch_size[0]
    if image_size % patch:
        raise UserError(f"model.image_encoder.image_size: {image_size} is not divisible by the patch size {patch}")
    return vit


def check_arguments(name: str, image_size: int, args: dict) -> None:
    """UserError unless timm has a Vision Transformer `name` and `args` are its architecture alone: nothing is fetched
    or loaded because of them."""
    if not (isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)?", name) and is_model_in_modules(name, FAMILY)):
        raise UserError(f"model.image_encoder.name: timm {timm.__version__} has no Vision Transformer {shown(name)}")
    check_value("model.image_encoder.image_size", image_size, int, 1, 4096)
    for key, value in args.items():
        label = f"model.image_encoder.args: {one_line(key, 80)}"
        if key in SIZES:
            check_value(label, value, int)
        elif key in RATES or key in NUMBERS:
            check_value(label, value, float, low=0, high=0.99 if key in RATES else 1000)
        elif not (value in ACT_LAYERS if key == "act_layer" else key in FLAGS and isinstance(value, bool)):
            known = ", ".join((*SIZES, *NUMBERS, *RATES, *FLAGS, "act_layer"))
            raise UserError(f"{label}: {shown(value)} cannot be set here; the architecture's arguments are {known}")


# ------------------------------------------------------------------------------------------ weights of others

# Entries of published weight files that are not part of the image encoder, as regular expressions matched from the
# start of the name: a classifier or a pooling head, CLIP's text tower and its projections into the common space.
# Anything else that is left over, or missing, is an error.
IGNORED = (
    r"head\.|fc_norm\.|attn_pool\.|pre_logits\.|proj$"
    r"|text_model\.|text_projection\.|visual_projection\.|logit_scale$|vision_model\.embeddings\.position_ids$"
)
# timm's names for those of CLIP at Hugging Face | at OpenAI
CLIP_NAMES = [
    (r"^(embeddings\.patch_embedding|conv1)\.", "patch_embed.proj."),
    (r"^(embeddings\.)?class_embedding$", "cls_token"),
    (r"^(embeddings\.position_embedding\.weight|positional_embedding)$", "pos_embed"),
    (r"^(pre_layrnorm|ln_pre)\.", "norm_pre."),  # the published name has this misspelling
    (r"^(post_layernorm|ln_post)\.", "norm."),
    (r"^(encoder\.layers|transformer\.resblocks)\.", "blocks."),
    (r"\.(?:layer_norm|ln_)([12])\.", r".norm\1."),
    (r"\.(self_attn|attn)\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def load_vit_weights(encoder: ImageEncoder, source: str) -> None:
    """Load the ViT of `encoder` from `source` (see `weights.find_weights`); positions are resized.

    Known layouts: timm's; Hugging Face's CLIPModel and CLIPVisionModel; state dicts in OpenAI's names, as open_clip has
    them. Entries in IGNORED are skipped; anything else missing, left over or of another shape is a UserError.
    """
    path = find_weights(source)
    weights = to_timm(read_weights(path), path)
    check_activation(encoder.vit, path)
    for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
        check_pixels(architecture_beside(path, name), path)
    weights, _ = encoder.resize_positions(weights, "pos_embed", path)
    advice = "set model.image_encoder.name and args to the architecture that the file was made for"
    load_exactly(encoder.vit, weights, path, advice)


def to_timm(weights: dict[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """A state dict in timm's names and fp32 from any of the layouts, without what IGNORED lists."""
    if any(key.startswith("visual.") for key in weights):  # of OpenAI, whose text tower has no name of its own
        weights = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    weights = {key.removeprefix("vision_model."): v.float() for key, v in weights.items() if not re.match(IGNORED, key)}
    if "patch_embed.proj.weight" in weights:
        return weights
    result = {}
    for key, value in weights.items():
        for pattern, replacement in CLIP_NAMES:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    if "cls_token" not in result or "pos_embed" not in result:
        raise UserError(f"{source}: neither timm's nor Hugging Face's nor OpenAI's names of a Vision Transformer")
    result["cls_token"] = result["cls_token"].view(1, 1, -1)
    result["pos_embed"] = result["pos_embed"].unsqueeze(0)
    for key in [key for key in result if ".attn.q." in key]:
        names = [key.replace(".q.", f".{part}.") for part in "qkv"]
        if all(name in result for name in names):
            result[key.replace(".q.", ".qkv.")] = torch.cat([result.pop(name) for name in names])
    return result


def check_activation(vit: VisionTransformer, path: Path) -> None:
    """A UserError if the config.json beside a weight file states another activation than the encoder's.

    Activations have no weights: with the wrong one a file loads, and every number is off by about a hundredth.
    """
    own = "quick_gelu" if isinstance(vit.blocks[0].mlp.act, QuickGELU) else "gelu"
    values, stated = architecture_beside(path), own
    if "architecture" in values:  # timm's
        openai = values.get("pretrained_cfg", {}).get("tag") == "openai"
        stated = "quick_gelu" if openai or "quickgelu" in values["architecture"] else "gelu"
    elif str(values.get("model_type")).startswith("clip"):  # Hugging Face's
        stated = values.get("vision_config", values).get("hidden_act", "quick_gelu")
    if (stated == "quick_gelu") != (own == "quick_gelu"):
        raise UserError(
            f"{path}: its config.json states the activation {shown(stated)}, model.image_encoder.name computes {own}; "
            "take a name with or without quickgelu, or other weights"
        )


def check_pixels(stated: dict, source: str | PathLike) -> None:
    """UserError if weights state that their images were normalized otherwise than by CLIP's mean and deviation, as all
    are here: every number would be off. stated: what timm, Hugging Face or open_clip say of their preprocessing."""
    stated = stated.get("pretrained_cfg") or stated.get("preprocess_cfg") or stated
    for kind, clips in (("mean", OPENAI_CLIP_MEAN), ("std", OPENAI_CLIP_STD)):
        found = stated.get(kind, stated.get(f"image_{kind}", clips))
        if [round(value, 3) for value in found] != [round(value, 3) for value in clips]:
            raise UserError(
                f"{source}: trained on images of {kind} {shown(found)}, here all are normalized with CLIP's "
                f"{shown(clips)}; take weights that were trained so"
            )
