"""What the tabs share: the networks, the gallery on disk, the folder of annotations."""

import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models_finders import WHOLE, open_finder
from models_mae import MaskedAutoencoder
from models_mae_weights import load_mae
from models_transfer import load_recogniser
from util.data.augment import EvalCrop
from util.data.face_crop import cut_face
from util.data.faces import Face, Finder, UnionFinder, find_faces
from util.run.args import height_width
from util.run.device import INFERENCE_BATCH, pick_device, pick_precision
from util.training.hub import load_weights
from util.training.pretrained import fingerprint_of
from util.transfer.encoder import Encoder
from util.transfer.gallery import Gallery
from visualize.demo.annotations import Annotations
from visualize.demo.pictures import Limits
from visualize.demo.weights import PADDING, read_facts, shipped

MIN_SCORE = 0.4  # finds below are left out: a visitor sees a wrong box before a missing one


@dataclass(frozen=True)
class Settings:
    """The flags. None: the weights that ship with the demo."""

    ckpt: str | None = None
    mae: str | None = None
    finder: str | None = None
    gallery: str = "runs/gallery"
    annotations: str = "runs/annotations"
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    enrol: str | None = None


@dataclass(frozen=True)
class Seen:
    """A face in a picture, cut out as the recogniser is shown it. face: None where the whole picture stands for one."""

    crop: Image.Image
    face: Face | None


class Models:
    """Networks ready to work, and what they have been told. UserError where weights or folders do not fit.

    lock: held while the gallery or the annotations are read or changed, as several visitors are served at once.
    """

    def __init__(self, settings: Settings):
        self.settings, self.limits = settings, settings.limits
        self.lock = threading.RLock()
        self.device = pick_device(settings.device, keep_memory=False)
        ckpt = settings.ckpt or shipped("recogniser")
        self.facts = read_facts(ckpt)
        self._open_recogniser(ckpt)
        self.finder = self._open_finder(settings.finder)
        self.mae_spec = settings.mae or shipped("mae")
        self.gallery = Gallery.open(settings.gallery, self.fingerprint, self.dim)
        self.is_new = not (Path(settings.gallery) / "gallery.json").is_file()
        if self.is_new:
            self.gallery.threshold = self.facts.threshold
        self.annotations = Annotations(settings.annotations)

    def _open_recogniser(self, ckpt: str) -> None:
        stored = load_weights(ckpt, official_names=False).args if ckpt.endswith(".safetensors") else {}
        trained = load_recogniser(ckpt, global_pool=stored.get("global_pool", True), device=self.device)
        self.fingerprint, self.dim = fingerprint_of(trained.model.state_dict()), trained.model.embed_dim
        self.crop = EvalCrop(height_width(trained.args["input_size"]))
        known = (self.facts.face_padding, trained.args.get("face_padding"), PADDING)
        self.padding: float = next(value for value in known if value is not None)
        precision = pick_precision("auto", self.device)
        self._encode = Encoder(trained.model, self.device, precision, most=INFERENCE_BATCH)

    def _open_finder(self, spec: str | None) -> Finder | None:
        if spec == WHOLE:
            return None
        finder = open_finder(spec or f"detector:{shipped('detector')}", self.device)
        return UnionFinder([finder])  # of boxes that overlap the best: a visitor sees one face, not two

    @cached_property
    def mae(self) -> MaskedAutoencoder:
        """The autoencoder, loaded when it is first asked for."""
        return load_mae(self.mae_spec, device=self.device)

    def faces(self, picture: Image.Image) -> list[Face]:
        """The faces of a picture, best first; none where pictures are taken whole."""
        return [] if self.finder is None else find_faces(picture, self.finder, min_score=MIN_SCORE)

    def look(self, picture: Image.Image) -> list[Seen]:
        """The faces of a picture, best first; the whole picture where none is found, as it may be a face already."""
        seen = [Seen(cut_face(picture, list(face.box), self.padding), face) for face in self.faces(picture)]
        return seen or [Seen(picture, None)]

    def embed(self, crops: list[Image.Image]) -> np.ndarray:
        """Embeddings (n, D) float32 of n >= 1 faces."""
        return self._encode(torch.stack([self.crop(crop, {}) for crop in crops])).cpu().numpy()
