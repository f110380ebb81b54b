"""What the masked autoencoder makes of a picture of which patches are removed: by chance, by content, or by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from util.benchmark.reconstruction import psnr
from util.data.augment import EvalCrop, View, to_unit
from util.data.faces import Face
from util.data.foreground import estimate_foreground
from util.data.map_rows import cell_means, coverage, predicted_eyes
from util.data.sheet import to_pil
from util.mae.masking import Masking, random_mask
from util.run.errors import UserError
from visualize.demo.models import Models
from visualize.demo.pictures import enlarged, note
from visualize.pictures import GREY

PAINTED = "paint your own"
# what a visitor reads -> a masking strategy of util.mae.masking; None: the painting
STRATEGIES = {
    "random": "random", "lines and detail": "lineart", "figure": "foreground", "face and eyes": "face",
    "rectangles": "block", "regular grid": "grid", PAINTED: None,
}  # fmt: skip
MOST = 0.95  # largest mask ratio
TOUCHED = 0.1  # share of a patch that must be painted over for it to be removed


@dataclass(frozen=True)
class Result:
    """Pictures of the model's size. removed, patches: counts. psnr_db: over the whole pasted picture."""

    masked: Image.Image
    predicted: Image.Image
    pasted: Image.Image
    removed: int
    patches: int
    psnr_db: float


def reconstruct(models: Models, picture: Image.Image, mask_of) -> Result:
    """Remove patches of the smart crop of a picture and predict them.

    mask_of(images (1, 3, H, W), view, grid) -> (1, L), 1 = removed. UserError where no patch stays visible.
    """
    mae = models.mae
    crop = EvalCrop(tuple(side * mae.patch_size for side in mae.grid))
    faces = models.faces(picture)
    view = crop.draw(picture, {"box": list(faces[0].box)} if faces else {})
    images = to_unit(view.apply(picture, crop.size)[None].to(models.device))
    mask = mask_of(images, view, faces)
    removed, patches = int(mask.sum()), mask.numel()
    if removed == patches:
        raise UserError("no patch is left visible: remove fewer")
    out = mae.reconstruct(images, mask.to(models.device))
    masked = torch.where(out["mask"] > 0, GREY, images)
    shown = (enlarged(to_pil(one[0])) for one in (masked, out["pred"], out["pasted"]))
    return Result(*shown, removed, patches, psnr(images, out["pasted"]).item())


def strategy_mask(models: Models, picture: Image.Image, strategy: str, mask_ratio: float, seed: int):
    """A `mask_of` of `reconstruct` by a masking strategy. seed: another one draws another mask."""
    masking = Masking(strategy, random_share=0.0, seed=seed)

    def mask_of(images: torch.Tensor, view: View, faces: Sequence[Face]) -> torch.Tensor:
        grid, index = models.mae.grid, torch.zeros(1, dtype=torch.int64, device=images.device)
        maps = None
        if masking.maps:
            drawn = np.stack([_map(name, picture, faces) for name in masking.maps])
            maps = torch.from_numpy(view.crop_map(drawn, picture.size, grid))[None].to(images.device)
        return random_mask(masking.order(images, grid, 0, index, maps), mask_ratio)

    return mask_of


def _map(name: str, picture: Image.Image, faces: Sequence[Face]) -> np.ndarray:
    """A semantic map of the whole picture, uint8 (32, 32), as datasets/prepare_maps.py draws it."""
    boxes = [face.box for face in faces]
    if name == "foreground":
        return cell_means(estimate_foreground(picture, boxes) * 255)
    if not boxes:
        raise UserError("no face was found in the picture: choose what else to remove")
    if name == "face":
        return coverage(boxes, picture.size)
    eyes = [eye for face in faces for eye in face.eyes]
    return coverage(eyes or predicted_eyes(boxes, picture), picture.size)


def painted_mask(models: Models, picture: Image.Image, layers: Sequence[Image.Image]):
    """A `mask_of` of `reconstruct`: patches that paint covers by TOUCHED or more. layers: RGBA, over the picture."""
    alpha = np.zeros((picture.height, picture.width), np.uint8)
    for layer in layers:
        alpha = np.maximum(alpha, np.asarray(layer.resize(picture.size).getchannel("A")))

    def mask_of(images: torch.Tensor, view: View, faces: Sequence[Face]) -> torch.Tensor:
        share = view.crop_map(alpha, picture.size, models.mae.grid)
        return torch.from_numpy(share >= 255 * TOUCHED).float().reshape(1, -1)

    return mask_of


def answer(models: Models, editor: dict | None, choice: str, mask_ratio: float, seed: int) -> tuple:
    """The tab's job: the three pictures, and a line as HTML. UserError where there is nothing to do."""
    picture = (editor or {}).get("background")
    if picture is None:
        raise UserError("there is no picture yet: upload one, paste one or pick an example")
    if choice == PAINTED:
        mask_of = painted_mask(models, picture, editor["layers"])
    else:
        mask_of = strategy_mask(models, picture, STRATEGIES[choice], mask_ratio, int(seed))
    result = reconstruct(models, picture, mask_of)
    return result.masked, result.predicted, result.pasted, note(_line(models, result, choice))


def _line(models: Models, result: Result, choice: str) -> str:
    if not result.removed:
        return "nothing is removed: " + ("paint over what shall be removed" if choice == PAINTED else "raise the ratio")
    oracle = "; with oracle statistics, as the model predicts normalised patches" if models.mae.norm_pix_loss else ""
    share = f"{result.removed} of {result.patches} patches removed ({result.removed / result.patches:.0%})"
    return f"{share}; PSNR of reconstruction + visible {result.psnr_db:.1f} dB{oracle}"


def tab(models: Models, examples: list[str]) -> None:
    """The tab, inside a gradio.Blocks."""
    import gradio as gr

    from visualize.demo.inputs import answered, paint_input

    with gr.Row():
        with gr.Column(scale=2):
            brush = gr.Brush(default_size=24, colors=["#0072B2"], color_mode="fixed")
            editor = paint_input(
                models.limits, label="picture", brush=brush, layers=False, transforms=[], height=420,
                canvas_size=(360, 360), elem_id="reconstruct-editor",
            )  # fmt: skip
            if examples:
                gr.Examples(examples, editor, label="examples, drawn by ToonFaces", examples_per_page=12)
        with gr.Column(scale=3):
            choice = gr.Radio(list(STRATEGIES), value="random", label="what is removed", elem_id="reconstruct-strategy")
            with gr.Row(equal_height=True):
                ratio = gr.Slider(
                    0, MOST, value=0.75, step=0.05, label="mask ratio", scale=4, elem_id="reconstruct-ratio"
                )
                seed = gr.Number(0, label="seed of the mask", precision=0, minimum=0, scale=1, min_width=110)
            line = gr.HTML(note("upload, paste or pick a picture"), elem_id="reconstruct-note")
            with gr.Row():
                names = ("masked", "reconstruction", "reconstruction + visible")
                shown = [
                    gr.Image(label=name, interactive=False, format="png", buttons=["fullscreen"], min_width=150,
                             elem_id=f"reconstruct-{number}")
                    for number, name in enumerate(names)
                ]  # fmt: skip
    waiting = (None, None, None, note("upload, paste or pick a picture"))
    # an editor announces itself before there is a picture in it
    fn = answered(
        lambda editor, *inputs: answer(models, editor, *inputs) if (editor or {}).get("background") else waiting,
        (None,) * 3,
    )
    options = {"api_visibility": "private", "show_progress": "minimal", "trigger_mode": "always_last"}
    # picking an example is an input of the editor, uploading and painting change it; the slider's handle is an input, a
    # ratio that is typed only a release
    triggers = [editor.input, editor.change, choice.change, ratio.input, ratio.release, seed.change]
    gr.on(triggers, fn, [editor, choice, ratio, seed], [*shown, line], **options)
