"""The backbone against textbook formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange

import textbook
import vit
from conftest import backbone_of
from util.checkpoint import recompute_activations, untrained
from vit import ViT


def small(**changes):
    sizes = dict(patch_size=4, embed_dim=24, depth=3, num_heads=3, img_size=16)
    return ViT(**sizes | changes).eval()


def test_patch_embedding_is_a_convolution():
    backbone, images = small(), torch.randn(2, 3, 16, 24)
    kernel = rearrange(backbone.patch_embed.proj.weight, "d (c p q) -> d c p q", c=3, p=4)
    expected = F.conv2d(images, kernel, backbone.patch_embed.proj.bias, stride=4)
    torch.testing.assert_close(
        backbone.patch_embed(images), rearrange(expected, "b d h w -> b (h w) d")
    )


def test_attention_is_softmax_of_scaled_products():
    attention, x = vit.Attention(12, 3), torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).chunk(3, -1)
    out, weights = [], []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        w = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(4), -1)
        weights.append(w)
        out.append(w @ v[..., part])
    weights, out = torch.stack(weights, 1), attention.proj(torch.cat(out, -1))
    for queries in (None, 1, 3):
        torch.testing.assert_close(attention.weights(x, queries), weights[:, :, :queries])
        torch.testing.assert_close(attention(x, queries), out[:, :queries])


def test_forward_is_the_class_token_and_tokens_are_the_last_blocks():
    backbone, images = small(), torch.randn(2, 3, 16, 16)
    tokens = backbone.get_intermediate_layers(images, 2)
    assert tokens.shape == (2, 2, 17, 24)
    torch.testing.assert_close(backbone(images), tokens[-1][:, 0])
    x = backbone.blocks[1](backbone.blocks[0](backbone.prepare_tokens(images)))
    torch.testing.assert_close(tokens[0], backbone.norm(x))
    assert torch.equal(backbone.get_intermediate_layers(images), tokens[1:])


def test_attention_is_the_last_blocks():
    backbone, images = small(), torch.randn(2, 3, 16, 16)
    seen = []
    backbone.blocks[-1].norm1.register_forward_hook(lambda module, x, y: seen.append(y))
    weights = backbone.get_last_selfattention(images)
    assert weights.shape == (2, 3, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 17))
    backbone(images)
    torch.testing.assert_close(backbone.blocks[-1].attn.weights(seen[-1]), weights)
    torch.testing.assert_close(backbone.get_last_selfattention(images, 1), weights[:, :, :1])


@pytest.mark.parametrize(
    "h, w", [(6, 6), (30, 30), (14, 20), (37, 53)]
)  # 96, 480 and 224 x 320 pixels, and any
def test_position_embeddings_are_the_references(h, w):
    backbone = ViT(16, embed_dim=24, depth=1, num_heads=1, img_size=224)
    got = backbone.interpolate_pos_encoding(h, w)
    assert got.shape == (1, 1 + h * w, 24)
    torch.testing.assert_close(
        got, textbook.positions(backbone.state_dict(), 16, h, w), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(got[:, :1], backbone.pos_embed[:, :1])


def test_position_embeddings_are_the_identity_at_native_size():
    backbone = small()
    assert backbone.interpolate_pos_encoding(4, 4) is backbone.pos_embed


def test_other_sizes_work_and_sizes_between_patches_are_refused():
    assert small()(torch.randn(1, 3, 8, 20)).shape == (1, 24)
    with pytest.raises(EinopsError):
        small()(torch.randn(1, 3, 16, 18))


@pytest.mark.filterwarnings("ignore")
def test_exported_it_gives_the_same_at_another_size_than_its_own():
    backbone, images = small(), torch.randn(2, 3, 24, 20)
    expected = backbone(images)
    exported = torch.export.export(backbone, (images,)).module()
    torch.testing.assert_close(exported(images), expected)


def test_drop_path_is_the_students_alone_and_keeps_the_mean():
    block, x = vit.Block(8, 2, drop_path=0.5), torch.ones(20_000, 1, 8)
    dropped = block.train().drop(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(dropped.mean().item() - 1) < 0.05
    assert block.eval().drop(x) is x
    rates = [b.drop_path for b in small(drop_path_rate=0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


def test_recomputed_activations_give_the_same_gradients_from_less_memory():
    images, gradients, kept = torch.randn(4, 3, 16, 16), [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = small(drop_path_rate=0.5).train()
        if recompute:
            recompute_activations(backbone)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            loss = backbone(images).square().sum()
        loss.backward()
        gradients.append([p.grad for p in backbone.parameters()])
        kept.append(sum(sizes))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert kept[1] < kept[0] / 4


class LowRank(torch.nn.Module):
    """An adapter around a linear layer, as LoRA has it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.change = torch.nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.change(x)


def test_hooks_and_adapters_see_every_block_the_last_one_too():
    """Only the class token goes through all of the last block, but every module is called."""
    backbone, images, seen = small(), torch.randn(2, 3, 16, 16), []
    plain = backbone(images)
    for i, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda module, x, y, i=i: seen.append(i))
        for name, module in block.named_modules():
            if name:
                hook = lambda module, x, y, name=f"{i} {name}": seen.append(name)
                module.register_forward_hook(hook)
    backbone(images)
    names = [name for name, _ in backbone.blocks[0].named_modules() if name]
    assert sorted(map(str, seen)) == sorted(
        [str(i) for i in range(3)] + [f"{i} {name}" for i in range(3) for name in names]
    )
    last = backbone.blocks[-1].attn
    last.qkv = LowRank(last.qkv)
    assert not torch.allclose(backbone(images), plain)
    torch.testing.assert_close(backbone(images), backbone.get_intermediate_layers(images)[-1][:, 0])
    changed = backbone.get_last_selfattention(images)
    torch.nn.init.zeros_(last.qkv.change.weight)
    torch.nn.init.zeros_(last.qkv.change.bias)
    torch.testing.assert_close(backbone(images), plain)
    assert not torch.allclose(backbone.get_last_selfattention(images), changed)


@pytest.mark.parametrize(
    "arch, millions", [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8)]
)
def test_parameter_counts_are_the_papers(arch, millions):
    with torch.device("meta"):
        backbone = backbone_of(arch, 16, 224)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_untrained_has_the_same_shape_and_other_weights():
    backbone = backbone_of("vit_tiny", 8, 32)
    other = untrained(backbone, seed=1)
    assert {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in backbone.state_dict().items()
    }
    assert not torch.equal(other.cls_token, backbone.cls_token)
    assert other.num_heads == other.blocks[0].attn.num_heads == 3
