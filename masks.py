"""Masks of objects: the files they lie in, and images that have them.

A mask is uint8 [h, w]: 0 for the background, 1, 2, ... for objects, 255 (void) for what is left
open. A palette image holds these numbers. So does a grey one, unless it is a drawing: a JPEG, or
with no values but 0 and 255, with 255 and others above MOST_VALUES, or with more values than that.
Of a drawing, which may have soft edges, what is above 127 is the one object.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data import Folder, load
from decode import open_image
from files import write_whole

MOST_VALUES = 32
VOID = 255


def read_mask(path):
    """Read a mask: (uint8 [h, w], its palette or None). ValueError: it is no mask."""
    try:
        with open_image(path) as image:
            palette = image.getpalette()
            is_jpeg = image.format == "JPEG"
            if image.mode in ("1", "LA"):
                image = image.convert("L")
            pixels = pil_to_tensor(image)
    except Exception as error:  # whatever a decoder may raise
        raise ValueError(f"cannot read the mask {str(path)!r}: {error}") from None
    if pixels.dtype != torch.uint8 or (pixels[:3] != pixels[:1]).any():
        raise ValueError(
            f"{str(path)!r} is no mask: neither a palette image nor a grey one of 8 bits"
        )
    mask = pixels[0]
    if palette is None and (is_jpeg or is_drawing(mask)):
        mask = (mask > 127).byte()
    return mask, palette


def is_drawing(mask):
    """Whether grey values are brightness, and not the numbers of objects."""
    values = mask.unique().tolist()
    if len(values) > MOST_VALUES or set(values) <= {0, 255}:
        return True
    return 255 in values and any(MOST_VALUES < value < 255 for value in values)


def numbers_in(mask):
    """Return the numbers of the objects in a mask, in order."""
    return [number for number in mask.unique().tolist() if 0 < number < VOID]


def resize_mask(mask, height, width):
    """Resize a mask, each pixel from the nearest one."""
    return F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]


def write_mask(path, mask, palette):
    """Write a mask as a palette PNG. palette: 256 colours, their values in a row."""
    image = to_pil_image(mask)
    image.putpalette(palette)
    write_whole(path, lambda file: image.save(file, "PNG"))


def whole_palette(palette):
    """Return 256 colours: those of a palette, which may be shorter or None, then Pascal VOC's."""
    known = palette if palette and len(palette) > 3 else []
    return known + voc_palette()[len(known) :]


def voc_palette():
    """Pascal VOC's colours, DAVIS's too: the bits of a number in turn go to red, green and blue."""
    palette = []
    for number in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            color[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        palette += color
    return palette


class MaskedFolder(Folder):
    """The images of a folder that have a mask of the same name in another.

    names: those to take (default: all). ValueError: there is none.
    """

    def __init__(self, root, masks, names=None):
        super().__init__(root)
        self.masks = {stem_of(path): path for path in Folder(masks).paths}
        self.masks_root, self.labels, self.classes = Path(masks), None, None
        self.note = None
        known = self.masks.keys() if names is None else self.masks.keys() & names
        self.paths = [path for path in self.paths if stem_of(path) in known]
        if not self.paths:
            raise ValueError(f"no image below {str(root)!r} has a mask in {str(masks)!r}")

    def mask(self, i):
        return read_mask(self.masks_root / self.masks[stem_of(self.paths[i])])[0]


def stem_of(path):
    return str(Path(path).with_suffix(""))


def load_with_masks(data, masks=None):
    """Open images that say where their objects are, held-out ones if there are such.

    data: as for load(), or a folder in Pascal VOC's layout. masks: a folder of masks of the same
    names. ValueError: no such source, or nothing in it.
    """
    root = Path(data)
    if masks:
        return MaskedFolder(root, masks)
    for kind in ("SegmentationObject", "SegmentationClass"):
        if (root / "JPEGImages").is_dir() and (root / kind).is_dir():
            listed = root / "ImageSets" / "Segmentation" / "val.txt"
            names = set(listed.read_text().split()) if listed.exists() else None
            return MaskedFolder(root / "JPEGImages", root / kind, names)
    return load(data, "val") or load(data, "train")
