import torch

from head import DINOHead


def test_head_by_hand():
    head, x = DINOHead(6, out_dim=5, hidden_dim=8, bottleneck_dim=4), torch.randn(3, 6)
    for p in head.parameters():
        torch.nn.init.normal_(p) if p.requires_grad else None

    def gelu(z):
        return 0.5 * z * (1 + torch.erf(z / 2**0.5))

    state = head.state_dict()
    z = gelu(x @ state["mlp.0.weight"].T + state["mlp.0.bias"])
    z = gelu(z @ state["mlp.2.weight"].T + state["mlp.2.bias"])
    z = z @ state["mlp.4.weight"].T + state["mlp.4.bias"]
    z = z / z.norm(dim=1, keepdim=True)
    v = state["last_layer.weight_v"]
    expected = torch.stack([z @ (v[i] / v[i].norm()) for i in range(5)], 1)
    torch.testing.assert_close(head(x), expected)


def test_logits_are_as_precise_in_bf16_as_in_float32():
    head = DINOHead(64, out_dim=4096, hidden_dim=64, bottleneck_dim=256)
    features = torch.randn(8, 64).bfloat16()
    expected = head(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-3 * (expected.max() - expected.min())


def test_the_last_layers_norm_is_one_unless_asked():
    fixed, free = DINOHead(6, 5, 8, 4), DINOHead(6, 5, 8, 4, norm_last_layer=False)
    assert not fixed.last_layer.weight_g.requires_grad and (fixed.last_layer.weight_g == 1).all()
    assert free.last_layer.weight_g.requires_grad
    x = torch.randn(2, 6)
    before = free(x)
    with torch.no_grad():
        free.last_layer.weight_g *= 3
        free.last_layer.weight_v *= 7  # its length does not count
    torch.testing.assert_close(free(x), 3 * before)
    assert fixed(100 * x).abs().max() <= 1 + 1e-6  # cosines
