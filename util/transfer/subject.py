"""What is evaluated: a frozen network that embeds the splits of a data set, or a file of anybody's embeddings."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from util.benchmark.embedded import FACTS, Split, embed_split, read_embeddings, unit_rows
from util.data.augment import EvalCrop
from util.data.colour import colour_signature
from util.data.face_crop import open_pictures
from util.data.roles import MissingRole
from util.data.sources import Source, Subset
from util.run.args import height_width
from util.run.errors import UserError
from util.training.pretrained import fingerprint_of
from util.training.session import Session
from util.transfer.features import cached_features

_EXAMPLES = 3  # of what is left out, in the log
LOOKS_SIZE = 64  # px of the crops whose colours are compared


class Colours(torch.nn.Module):
    """Stands where a backbone does: its embedding of a picture is its colour signature."""

    pixel_mean = pixel_std = torch.zeros(1)  # nothing is taken out

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> signatures (N, S)."""
        pixels = (images.cpu() * 255).round().to(torch.uint8)
        return torch.stack([torch.as_tensor(colour_signature(picture)) for picture in pixels])


class Pictures:
    """The splits of a data path, by role, each opened when it is first asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._sources: dict[str, Source | None] = {}

    def __call__(self, role: str) -> Source | None:
        """The pictures of a role, None where the data have none of their own for it."""
        if role not in self._sources:
            try:
                self._sources[role] = open_pictures(self.args, role)
            except MissingRole:
                self._sources[role] = None
            # where val stands in for test, it cannot be what thresholds are tuned on as well: it is test then
            if role == "val" and self._is_test():
                self._sources["val"] = None
        return self._sources[role]

    def _is_test(self) -> bool:
        test, val = self("test"), self._sources["val"]
        return test is not None and val is not None and test.fingerprint == val.fingerprint


class Subject:
    """Embeds the splits of a data set; what cannot be embedded is left out, and listed in `left_out` by role.

    folder: cache of embeddings. More than --max_bad of a split left out is a UserError.
    """

    name: str
    weights: str  # a fingerprint of what makes the embeddings

    def __init__(self, here: Session, pictures: Pictures, folder: Path):
        self.here, self.pictures, self.folder = here, pictures, folder
        self.left_out: dict[str, list[dict[str, str]]] = {}

    def looks(self, split: Split) -> np.ndarray:
        """Colour signatures (N, S) of a split's pictures, the same for every subject; zeros for a damaged picture."""
        source = Subset(self.pictures(split.name), split.rows)
        args = argparse.Namespace(**{**vars(self.here.args), "model": "colours", "compile": "off"})
        here = replace(self.here, args=args)
        crop = EvalCrop((LOOKS_SIZE, LOOKS_SIZE))
        features = cached_features(
            here, self.folder, Colours(), "colours", source, crop, name=f"{split.name} images, for their colours"
        )
        return np.nan_to_num(features.embeddings.numpy())

    def fingerprint(self) -> str:
        """16 hex digits that change with the data that were used."""
        sources = (self.pictures(role) for role in sorted(self.left_out))
        parts = " ".join(source.fingerprint for source in sources if source is not None)
        return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()

    def raw(self, role: str, source: Source) -> tuple[np.ndarray, dict[int, str]]:
        """(N, D) float32 embeddings of a source at their own length, NaN where there is none; {row: why}."""
        raise NotImplementedError

    def split(self, role: str) -> Split | None:
        """The embedded split of a role, None where the data have none."""
        source = self.pictures(role)
        if source is None:
            return None
        embeddings, reasons = self.raw(role, source)
        facts = {name: source.column(name) for name in FACTS}
        split, bad = embed_split(role, embeddings, facts)
        self.left_out[role] = [
            {"sample_id": facts["sample_id"][row], "reason": reasons.get(row, "the embedding is not finite, or zero")}
            for row in bad.tolist()
        ]
        self._say_left_out(role, len(source))
        return split

    def _say_left_out(self, role: str, total: int) -> None:
        bad = self.left_out[role]
        for entry in bad[:_EXAMPLES]:
            self.here.run.say(f"left out of {role}: {entry['sample_id']}: {entry['reason']}")
        if len(bad) > _EXAMPLES:
            self.here.run.say(f"left out of {role}: {len(bad) - _EXAMPLES} more, listed in left_out.json")
        if len(bad) > self.here.args.max_bad * total:
            raise UserError(
                f"{len(bad)} of {total} samples of {role} cannot be used, the first: {bad[0]['sample_id']} "
                f"({bad[0]['reason']}): mend them, or raise --max_bad"
            )


class EmbeddingFile(Subject):
    """Embeddings from an .npz file, joined to the data set by sample_id."""

    def __init__(self, here: Session, pictures: Pictures, folder: Path, path: str):
        super().__init__(here, pictures, folder)
        self.name = Path(path).name
        self.embeddings, sample_id = read_embeddings(path)
        self._places = {name: place for place, name in enumerate(sample_id.tolist())}
        self.weights = fingerprint_of({"embeddings": torch.from_numpy(self.embeddings)})

    def raw(self, role, source):
        """The rows of the file in the order of the source."""
        places = [self._places.get(name, -1) for name in source.column("sample_id")]
        embeddings = self.embeddings[places]
        missing = np.array(places) < 0
        embeddings[missing] = np.nan
        return embeddings, dict.fromkeys(np.flatnonzero(missing).tolist(), f"not in {self.name}")


class ModelSubject(Subject):
    """A backbone in eval mode; its embeddings come from the cache in `folder`, or are computed into it.

    size: (H, W) px of the pictures it is shown. flip_test: add the embedding of the mirrored picture.
    """

    def __init__(self, here: Session, pictures: Pictures, folder: Path, model, name: str, size, flip_test: bool):
        super().__init__(here, pictures, folder)
        self.model, self.name = model, name
        self.size, self.flip_test = height_width(size), flip_test
        self.weights = fingerprint_of(model.state_dict())

    def raw(self, role, source):
        """Embeddings of the smart crops."""
        return self.embed(source, f"{role} images")

    def embed(
        self, source: Source, label: str, view: Callable | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """`raw` under another view of the pictures: view(EvalCrop) -> transform; size: (H, W) px."""
        crops = [EvalCrop(size or self.size, flip) for flip in ((False, True) if self.flip_test else (False,))]
        total, reasons = 0, {}
        for crop in crops:
            features = cached_features(
                self.here, self.folder, self.model, self.weights, source, crop if view is None else view(crop),
                name=label,
            )  # fmt: skip
            total = total + features.embeddings.numpy()
            reasons = {row: f"{path}: {reason}" for row, path, reason in features.bad}
        return total / len(crops), reasons

    def again(self, split: Split, label: str, view: Callable | None = None, size=None) -> Split:
        """A split seen in another way; a picture that gives no embedding there points nowhere: it is nobody's."""
        source = Subset(self.pictures(split.name), split.rows)
        embeddings, _ = self.embed(source, label, view, size)
        return Split(split.name, *unit_rows(embeddings), split.rows, split.facts)

    @cached_property
    def head(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Raw embeddings (n, D) -> scores (n, C) of the trained head; None without one."""
        if isinstance(self.model.head, torch.nn.Identity):
            return None

        @torch.inference_mode()
        def scores(embeddings: np.ndarray) -> np.ndarray:
            device = self.model.pixel_mean.device
            return self.model.head(torch.from_numpy(np.ascontiguousarray(embeddings)).to(device)).float().cpu().numpy()

        return scores
