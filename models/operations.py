"""How many floating-point operations a pre-training step's matrix products take, counted from its shapes.

A multiplication and an addition are two operations. A backward pass takes twice the forward pass's (the gradients of
inputs and of weights); what is recomputed under checkpointing counts for nothing, as in "model FLOP utilisation".
tests/test_models_operations.py compares with what torch counts.
"""

from models.mim import masked_count
from models.pretrain import PretrainModel

# Dense peaks in TFLOP/s (NVIDIA's data sheets), the first name that the device's own contains: (bf16, fp32)
PEAKS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """A GPU's peak of matrix products in `precision` (bf16 | fp32), None where it is not known."""
    for name, (bf16, fp32) in PEAKS.items():
        if name in device_name:
            return bf16 if precision == "bf16" else fp32
    return None


def layer(length: int, width: int, inner: int, keep: int | None = None) -> int:
    """One row's forward pass through a layer: four projections, the products of attention, the feed-forward.

    keep: how many leading tokens are needed of the result (None: all).
    """
    needed = length if keep is None else keep
    projections = 2 * width**2 * (2 * length + 2 * needed)  # keys and values of all; queries and outputs
    return projections + 4 * needed * length * width + 4 * needed * width * inner


def cross(length: int, memory: int, width: int) -> int:
    """One row's cross-attention to `memory` tokens whose keys and values are given."""
    return 4 * length * width**2 + 4 * length * memory * width


def project(memory: int, width: int) -> int:
    """Keys and values of one image's `memory` tokens, for one layer."""
    return 4 * memory * width**2


def pretrain_operations(model: PretrainModel, pairs: int, tokens: int, scored: float | None = None) -> float:
    """Of a forward and backward pass over `pairs` captions of `tokens` tokens, padding included.

    scored: how many tokens of a caption get scores over the vocabulary, MLM's and PLM's; None: as many as are expected.
    """
    if scored is None:
        pieces = tokens - 1  # without [CLS]; the suffix has 1..pieces of them, and [SEP]
        scored = max(1.0, model.mlm.probability * pieces) + (pieces + 1) / 2 + 1
    # no gradient is needed of the pixels
    return pairs * (
        3 * student(model, tokens, scored) + teacher(model, tokens) - (1 + model.second_view) * patches(model)
    )


def student(model: PretrainModel, tokens: int, scored: float) -> float:
    """A pair's forward pass through what learns."""
    net, encoder = model.backbone, model.backbone.image_encoder
    bert = net.description["bert"]
    width, inner, vocab = bert["hidden_size"], bert["intermediate_size"], bert["vocab_size"]
    texts, fusions, decoders = (net.description[f"{name}_layers"] for name in ("text", "fusion", "decoder"))
    seen, memory = 1 + encoder.num_patches, 1 + encoder.num_patches + tokens

    text = 3 * texts * layer(tokens, width, inner)  # the caption, the masked caption, the prefix
    images = image_encoder(model, encoder.depth)
    if model.second_view:
        images += image_encoder(model, below(model)) + (encoder.depth - below(model)) * image_layer(model, memory)
        encoding = model.mim.target == "encoding"
        every = encoding and model.mim.predict == "all"
        rows = encoder.num_patches if every else masked_count(encoder.num_patches, model.mim.mask_ratio)
        images += (rows + encoding) * head(model)
    attending = cross(tokens, seen, width)
    matching = 3 * ((fusions - 1) * (layer(tokens, width, inner) + attending))
    matching += 3 * (layer(tokens, width, inner, keep=1) + cross(1, seen, width))
    fused = 2 * fusions * (layer(tokens, width, inner) + attending)  # MLM's rows and the prefixes
    written = decoders * (layer(tokens, width, inner) + cross(tokens, memory, width) + project(memory, width))
    vocabulary = scored * 2 * width * (width + vocab)
    projections = 2 * 2 * width * net.description["embed_dim"] + 3 * 4 * width
    return text + images + fusions * project(seen, width) + matching + fused + written + vocabulary + projections


def teacher(model: PretrainModel, tokens: int) -> float:
    """A pair's forward pass through the momentum teacher, and ITC's products with the queue."""
    net, encoder = model.backbone, model.backbone.image_encoder
    bert, embed = net.description["bert"], net.description["embed_dim"]
    total = 0.0
    if model.uses_queue:
        total += net.description["text_layers"] * layer(tokens, bert["hidden_size"], bert["intermediate_size"])
        total += (1 + model.teacher_sees) * 2 * encoder.width * embed
        # two directions: the logits, the soft targets, the gradient of the query
        total += 3 * 2 * 2 * model.queue.size * embed
    if not model.teacher_sees:
        return total
    total += image_encoder(model, encoder.depth)
    if model.mim.target == "encoding":
        above = encoder.depth - below(model)
        total += above * image_layer(model, 1 + encoder.num_patches + tokens) + (1 + encoder.num_patches) * head(model)
    if model.guided:
        total += 2 * encoder.num_patches * encoder.width * embed
        if model.mim.similarity == "values":  # queries and keys are projected with them, and not used
            total += 8 * (1 + encoder.num_patches) * encoder.width**2
    return total


def below(model: PretrainModel) -> int:
    """How many image layers run before the text joins."""
    first = model.mim.inject_from
    return model.backbone.image_encoder.depth if first is None else first - 1


def patches(model: PretrainModel) -> int:
    encoder = model.backbone.image_encoder
    return 2 * encoder.num_patches * 3 * encoder.patch_size**2 * encoder.width


def image_layer(model: PretrainModel, length: int) -> int:
    encoder = model.backbone.image_encoder
    return layer(length, encoder.width, encoder.vit.blocks[0].mlp.fc1.out_features)


def image_encoder(model: PretrainModel, layers: int) -> int:
    """The embedding of an image's patches and so many layers."""
    return patches(model) + layers * image_layer(model, 1 + model.backbone.image_encoder.num_patches)


def head(model: PretrainModel) -> int:
    """The encoding head on one token."""
    hidden, output = model.head.hidden, model.head.output
    return 2 * (hidden.in_features * hidden.out_features + output.in_features * output.out_features)
