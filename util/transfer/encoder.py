"""A frozen backbone at work: batches of pictures in, embeddings out, at the pace of its device."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from util.data.augment import to_unit
from util.run.device import autocast, inference_batch, use_compile
from util.training.compile import Compiled
from util.training.session import Session


class _Embedding(nn.Module):
    """What a backbone embeds, as a forward function."""

    def __init__(self, model):
        super().__init__()
        self.forward = model.embed


class Encoder:
    """Embeds pictures; its results stay on the device, and on CUDA nothing waits for them.

    model: a Backbone in eval mode, on `device`. precision: fp32, bf16 or fp16. most: images that the network is given
    at a time; halved as often as the device's memory asks for it. compiled: run it through torch.compile, for batches
    of `most` images; smaller ones are filled up, because every other shape would be compiled anew. flip: take the
    mean with the embedding of the mirrored picture. say: told where compiling fails.
    """

    def __init__(
        self,
        model,
        device: torch.device,
        precision: str,
        *,
        most: int,
        compiled: bool = False,
        flip: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.device, self.precision, self.most = device, precision, most
        self.compiled, self.flip = compiled, flip
        self._embed = Compiled(_Embedding(model), say) if compiled else model.embed

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W), N > 0, wherever they lie -> float32 (N, D) on the device."""
        while True:
            try:
                return torch.cat([self._part(part) for part in pictures.split(self.most)])
            except torch.OutOfMemoryError:
                if min(self.most, len(pictures)) == 1:
                    raise
            self.most = (min(self.most, len(pictures)) + 1) // 2

    @torch.inference_mode()
    def _part(self, pictures: torch.Tensor) -> torch.Tensor:
        pictures = pictures.to(self.device, non_blocking=self.device.type == "cuda")  # unsafe on MPS
        images = to_unit(pictures)
        if self.compiled and len(images) < self.most:
            images = functional.pad(images, (0, 0) * 3 + (0, self.most - len(images)))
        with autocast(self.device, self.precision):
            embeddings = self._embed(images).float()
            if self.flip:
                embeddings = (embeddings + self._embed(images.flip(-1)).float()) / 2
        return embeddings[: len(pictures)]


def make_encoder(here: Session, model, precision: str, images: int) -> Encoder:
    """The encoder for so many images; it is compiled where --compile, or their number, says so."""
    most = inference_batch(here.args.batch_size, here.device)
    compiled = use_compile(getattr(here.args, "compile", "auto"), here.device, images // most)
    return Encoder(model, here.device, precision, most=most, compiled=compiled, say=here.run.say)
