"""Make randaugment.npz: what torchvision's v2 operations give on two small real pictures, at every bin and sign.

    python tests/reference/make_randaugment.py --data-dir FOLDER

FOLDER holds cifar10_train.npz, whose `jpeg` are JPEG files one after another, and `offsets` where each begins.
torchvision is needed; one that does not load beside a torch of another build is helped by declaring its compiled
operators, of which none is used here.

The file has `picture0`, `picture1`: uint8 (3, H, W); and, for each space, picture and operation, `Space/0/Name`: uint8
(signs, bins, 3, H, W), of which each bin but the first is stored as its difference from the bin before, modulo 256:
neighbours are alike, and what is alike compresses. `np.cumsum(array, axis=1, dtype=np.uint8)` gives the pictures.
"""

import argparse
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

BINS = 31


def torchvision_v2():
    try:
        from torchvision.transforms import v2
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        pools = ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
        for name in ["nms", "qnms", *pools, *(f"_{name}_backward" for name in pools)]:
            library.define(f"{name}(Tensor a) -> Tensor")
        from torchvision.transforms import v2
    return v2


def pictures(folder):
    """A square piece of a picture, and one of two others side by side that is not square."""
    with np.load(folder / "cifar10_train.npz") as data:
        jpeg, offsets = data["jpeg"].tobytes(), data["offsets"]

    def picture(index):
        return np.asarray(Image.open(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]])).convert("RGB"))

    square, wide = picture(0)[6:26, 6:26], np.concatenate([picture(1), picture(2)], axis=1)[9:24, 18:40]
    return [torch.from_numpy(np.ascontiguousarray(each.transpose(2, 0, 1))) for each in (square, wide)]


def augmented(space, name, image):
    """The image at each sign and bin: (signs, bins, 3, H, W)."""
    magnitudes, signed = space._AUGMENTATION_SPACE[name]
    values = magnitudes(BINS, *image.shape[-2:])
    values = [0.0] if values is None else [float(value) for value in values]
    signs = (1, -1) if signed else (1,)
    policy = space()
    settings = {"interpolation": policy.interpolation, "fill": policy._fill}
    apply = partial(policy._apply_image_or_video_transform, image, name, **settings)
    return torch.stack([torch.stack([apply(sign * value) for value in values]) for sign in signs]).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of cifar10_train.npz")
    v2, arrays = torchvision_v2(), {}
    for index, image in enumerate(pictures(parser.parse_args().data_dir)):
        arrays[f"picture{index}"] = image.numpy()
        for space in (v2.RandAugment, v2.TrivialAugmentWide):
            for name in space._AUGMENTATION_SPACE:
                rows = augmented(space, name, image)
                rows[:, 1:] -= rows[:, :-1].copy()
                arrays[f"{space.__name__}/{index}/{name}"] = rows
    np.savez_compressed(Path(__file__).with_name("randaugment.npz"), **arrays)
