"""The README.md of weights on the Hugging Face hub: what they are, how they were made, what they score, how to use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from util.training.lineage import Licence

# flags that say how weights were trained, in the order of the card
_RECIPE = (
    "model", "input_size", "patch_size", "mask_ratio", "masking", "norm_pix_loss", "head", "rank", "epochs",
    "batch_size", "accum_iter", "lr", "blr", "warmup_epochs", "weight_decay", "face_padding", "seed",
)  # fmt: skip
# figures of results.json -> heading
_FIGURES = {
    "val.top1": "validation Top-1", "val.top5": "validation Top-5", "val.macro_f1": "validation macro-F1",
    "val.loss": "validation loss", "val.psnr_db": "validation PSNR, dB",
    "closed_set.top1": "closed-set Top-1", "closed_set.top5": "closed-set Top-5",
    "closed_set.macro_f1": "closed-set macro-F1", "verification.auc": "verification ROC-AUC",
    "verification.eer": "verification EER", "open_set.auroc": "open-set AUROC",
    "few_shot.5way_1shot.mean": "5-way 1-shot", "few_shot.5way_5shot.mean": "5-way 5-shot",
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a model card says. args: flags of the training run. results: its results.json, and of evaluations of it.

    sources: start weights (util.training.lineage). example: Python code that loads it. tags: of the hub.
    """

    title: str
    summary: str
    example: str
    licence: Licence
    args: Mapping = field(default_factory=dict)
    results: Sequence[Mapping] = ()
    sources: Sequence[str] = ()
    classes: Sequence[str] = ()
    tags: Sequence[str] = ()

    def text(self) -> str:
        """The whole README.md, with the hub's YAML block."""
        tags = ["animask", "anime", "masked-autoencoder", *self.tags]
        lines = [
            "---",
            f"license: {self.licence.name}",
            "library_name: animask",
            "pipeline_tag: image-feature-extraction",
        ]
        lines += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---", "", f"# {self.title}", "", self.summary]
        lines += ["", "## Use", "", "```python", self.example.strip(), "```"]
        lines += ["", "## Figures", "", *self._figures()]
        lines += ["", "## Training", "", *self._training()]
        lines += ["", "## Licence", "", self.licence.reason, "", _PICTURES]
        return "\n".join(lines) + "\n"

    def _figures(self) -> list[str]:
        rows = []
        for results in self.results:
            on = _data_of(results)
            for key, title in _FIGURES.items():
                value = _get(results, key)
                if isinstance(value, (int, float)):
                    rows.append(f"| {title} | {value:.4g}{_interval(results, key)} | {on} |")
        if not rows:
            return ["None were measured."]
        return ["| figure | value | data |", "|---|---|---|", *rows, "", "Rates are fractions in 0..1."]

    def _training(self) -> list[str]:
        origin = ", which began with ".join(f"`{source}`" for source in self.sources) or "random weights"
        lines = [f"- start: {origin}", f"- data: {_data_of({'args': self.args})}"]
        given = {key: self.args[key] for key in _RECIPE if self.args.get(key) is not None}
        lines += [f"- {key}: {value}" for key, value in given.items()]
        if self.results:
            facts = {key: self.results[0].get(key) for key in ("git_commit", "device", "data_fingerprint")}
            lines += [f"- {key}: {value}" for key, value in facts.items() if value]
        if self.classes:
            lines += [f"- classes: {len(self.classes)}, listed in `config.json`"]
        return lines


_PICTURES = (
    "The pictures that a network was trained on belong to their artists and publishers; they are not part of this "
    "repository. A character's name here is a label of a data set, not a statement about any person."
)


def _data_of(results: Mapping) -> str:
    path = (results.get("args") or {}).get("data_path")
    return f"`{path if str(path).startswith('hf:') else PurePath(path).name}`" if path else "not recorded"


def _get(results: Mapping, key: str):
    value = results
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _interval(results: Mapping, key: str) -> str:
    found = _get(results, f"{key}_ci95")
    if not isinstance(found, (list, tuple)) or None in found:
        return ""
    return f" ({found[0]:.4g} to {found[1]:.4g})"
