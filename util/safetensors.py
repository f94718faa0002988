"""The .safetensors format: eight bytes of length, a JSON header, then numbers, and no code.

For each tensor the header has its type, its shape, and where its numbers begin and end, as in
{"norm.bias": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}. The numbers lie one
tensor after another, without a gap, up to the end of the file.
"""

import json
import math
import os

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(path):
    """Return {name: tensor}. ValueError or the like: the header says what the file does not hold.

    No more is read or allocated than the file has bytes.
    """
    size = os.path.getsize(path) - 8
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"a header of {length} bytes, where {size} follow")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors, place = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if kind not in DTYPES:
                raise ValueError(f"{name} is of type {kind}, which is not read")
            fits = end - begin == math.prod(shape) * DTYPES[kind].itemsize
            if not fits or begin != place or end > size - length:
                raise ValueError(f"{name} of type {kind} and shape {shape} at {begin} to {end}")
            numbers = torch.zeros(0, dtype=DTYPES[kind])
            if end > begin:  # frombuffer() takes no empty one
                numbers = torch.frombuffer(bytearray(file.read(end - begin)), dtype=DTYPES[kind])
            tensors[name], place = numbers.reshape(shape), end
    if place != size - length:
        raise ValueError(f"{size - length - place} bytes that belong to no tensor")
    return tensors


def is_plain(tensor):
    """Return whether a tensor is numbers one after another, of a type that is read."""
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        return False
    held = tensor.untyped_storage().nbytes()  # less than it claims: expanded
    return tensor.dtype in DTYPES.values() and tensor.numel() * tensor.itemsize <= held
