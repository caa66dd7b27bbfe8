import torch
from torch import nn

from optim import create_optimizer


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.block = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.image_encoder = Encoder()
        self.backbone.proj = nn.Linear(4, 4)
        self.backbone.log_temperature = nn.Parameter(torch.zeros(()))
        self.teacher = nn.Linear(4, 4).requires_grad_(False)


def test_every_parameter_is_in_the_group_that_the_rule_says_and_has_its_rate():
    model = Model()
    optimizer = create_optimizer(model, lr=1e-4, lr_vit=1e-5, weight_decay=0.02, betas=[0.9, 0.98])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        (group["name"], group["weight_decay"]): {names[id(p)].split(".", 1)[1] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups == {
        ("vit", 0.02): {"image_encoder.pos_embed", "image_encoder.block.weight"},
        ("vit", 0.0): {
            *("image_encoder.cls_token", "image_encoder.block.bias"),
            *("image_encoder.norm.weight", "image_encoder.norm.bias"),
        },
        ("rest", 0.02): {"proj.weight"},
        ("rest", 0.0): {"image_encoder.mask_token", "proj.bias", "log_temperature"},
    }
    for group in optimizer.param_groups:
        assert group["lr"] == group["peak_lr"] == (1e-5 if group["name"] == "vit" else 1e-4)
        assert group["betas"] == (0.9, 0.98) and group["fused"]
