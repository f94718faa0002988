"""The projection head h (section 3.1, "Network architecture"; tour, stop 3).

Features [b, d] -> logits [b, k]: a three-layer MLP with GELU, l2 normalisation in a bottleneck, and
a weight-normalised linear layer without bias. Each logit is thus g times the cosine between the
bottleneck and a prototype. There is no batch normalisation, as in the paper's ViT runs.
"""

import torch
import torch.nn.functional as F
from torch import nn


class WeightNormLinear(nn.Module):
    """y = x W^T, where each row of W is g v / ||v||.

    norm_last_layer keeps every g at 1, which is steadier; the name is the reference code's.
    """

    def __init__(self, in_dim, out_dim, norm_last_layer=True):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        # as in nn.Linear: the length of v sets how fast a prototype turns
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)

    def forward(self, x):
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=-1, keepdim=True))
        return F.linear(x, weight)


class DINOHead(nn.Module):
    """[b, in_dim] -> logits [b, out_dim], before any temperature. out_dim is K."""

    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256,
                 norm_last_layer=True):  # fmt: skip
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        for layer in self.mlp[::2]:
            std = 0.02 if in_dim >= 192 else layer.in_features**-0.5  # for small nets, as in vit.py
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, norm_last_layer)

    def forward(self, x):
        # not in bf16, whose rounding moves logit / tau_t by up to 0.1 (on GPUs products are TF32)
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(F.normalize(self.mlp(x.float()), dim=-1))
