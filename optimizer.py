"""The optimiser of the student: AdamW, or SGD for ResNet-50 (section 3.2)."""

import torch


def build_optimizer(name, network, device, dtype):
    """Return the optimizer and the scaler of its gradients. dtype: autocast's, or None.

    The scaler is there in every precision, since it skips a step whose gradient is not finite; in
    fp16 alone it scales.
    """
    groups = parameter_groups(network)
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        # torch makes these buffers at its first step, and none for what is frozen then
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    if dtype is torch.float16:
        scaler = torch.amp.GradScaler(device.type)
    else:
        scaler = torch.amp.GradScaler(device.type, 1.0, growth_interval=2**31 - 1)
    return optimizer, scaler


def parameter_groups(network):
    """Split what is trained: tensors of two or more dimensions decay, biases and norms do not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim == 1], "decays": False},
    ]


def set_rates(optimizer, lr, weight_decay):
    """Set the learning rate and the weight decay of a step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
