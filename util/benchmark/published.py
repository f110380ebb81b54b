"""Published results on anime characters, as commands of this project with the numbers that they are to reach.

A preset has the published data, input size, network, batch, epochs and regularization; where this project does a thing
in its own way, `differs` says so, and a gap may come from there. Numbers are fractions in 0..1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A script and its flags; {data} in them is the data, {NAME} the folder of the stage of that name."""

    name: str
    words: str


@dataclass(frozen=True)
class Expected:
    """A figure that a stage's results.json is to have. source: who published it."""

    stage: str
    figure: str
    value: float
    source: str


@dataclass(frozen=True)
class Preset:
    """A published experiment. prepare: the script of datasets/ that makes its data. differs: from the publication."""

    title: str
    prepare: str
    stages: tuple[Stage, ...]
    expected: tuple[Expected, ...]
    differs: tuple[str, ...] = ()


_ADAMW = "AdamW with this project's rates; published: SGD with momentum 0.9"
_VIT = "--model timm:vit_large_patch16_224.orig_in21k --init timm:vit_large_patch16_224.orig_in21k"
_BEIT = "timm:beit_base_patch16_224.in22k_ft_in22k"
_DAFRE = "--data_path {data} --input_size 224 --batch_size 128 --min_crop 0.8"
# 50,000 steps of 128 of the 322,947 training images are 20 epochs, 10,000 steps are 4
_MIXED = "--reprob 0.25 --mixup 1 --cutmix 1 --smoothing 0.1"

_ANIMESION = "github.com/arkel23/animesion, README; DAF:re, arXiv 2101.08674"
_BWCONRAD = "github.com/bwconrad/dafre, README"
_PADDLE = "PaddleClas, docs/en/application/cartoon_character_recognition_en.md"

PRESETS = {
    "dafre_vitl16_128": Preset(
        "DAF:re, ViT-L/16 at 128 px, fully fine-tuned",
        "datasets/prepare_dafre.py",
        (
            Stage(
                "full",
                f"main_finetune.py --data_path {{data}} {_VIT} --input_size 128 --batch_size 64 --epochs 50 "
                "--warmup_epochs 0.2 --min_lr 0 --min_crop 0.64 --color_jitter 0.1",
            ),
        ),
        (
            Expected("full", "test.top1", 0.8595, _ANIMESION),
            Expected("full", "test.top5", 0.9423, _ANIMESION),
        ),
        (
            _ADAMW,
            "crops of 64 to 100 % of the area; published: a crop of 128 px out of 160 px, which is 64 %",
            "the best epoch by validation; published: the last one",
        ),
    ),
    "dafre_beit_224": Preset(
        "DAF:re, BEiT-B/16 at 224 px: linear probe, full fine-tuning from that head, class-balanced head",
        "datasets/prepare_dafre.py",
        (
            Stage(
                "linear",
                f"main_linprobe.py {_DAFRE} --model {_BEIT} --init {_BEIT} --epochs 20 --warmup_epochs 0.4 --views 4",
            ),
            Stage(
                "full",
                f"main_finetune.py {_DAFRE} --model {_BEIT} --init {_BEIT} --head_init {{linear}}/checkpoint-best.pth "
                f"--epochs 20 --warmup_epochs 0.8 --min_lr 0 {_MIXED}",
            ),
            Stage(
                "balanced",
                f"main_linprobe.py {_DAFRE} --model {_BEIT} --init {{full}}/checkpoint-best.pth --balanced --epochs 4 "
                "--warmup_epochs 0.2 --views 4",
            ),
        ),
        (
            Expected("linear", "val.top1", 0.7572, _BWCONRAD),
            Expected("full", "val.top1", 0.9493, _BWCONRAD),
            Expected("balanced", "val.top1", 0.9526, _BWCONRAD),
            Expected("balanced", "test.top1", 0.9484, _BWCONRAD),
            Expected("balanced", "test.top5", 0.9830, _BWCONRAD),
        ),
        (
            _ADAMW,
            "no TrivialAugment; pictures are cropped to a square, published: squeezed into one",
            "the heads are trained on four views of each image, without erasing, mixup and label smoothing",
            "the balanced head begins anew, as in arXiv 1910.09217; published: it goes on from the one before",
        ),
    ),
    "icartoonface_resnet50_224": Preset(
        "iCartoonFace, ResNet-50 at 224 px, boxes of twice the side",
        "datasets/prepare_icartoonface_rec.py",
        (
            Stage(
                "full",
                "main_finetune.py --data_path {data} --model resnet50 --init timm:resnet50.a1_in1k --face_padding 0.5 "
                "--input_size 224 --batch_size 256 --epochs 120 --warmup_epochs 0 --min_lr 0 --lr 1e-3 --head_lr 1e-3 "
                "--weight_decay 1e-4 --min_crop 0.2",
            ),
            Stage(
                "test",
                "eval_recognition.py --ckpt {full}/checkpoint-best.pth --data_path {data} --face_padding 0.5 "
                "--protocols icartoonface",
            ),
        ),
        (Expected("test", "icartoonface.rank1", 0.8324, _PADDLE),),
        (
            "AdamW and a cosine; published: SGD of 0.1 in three steps of a tenth",
            "ImageNet weights of timm; published: weights distilled from a larger network",
            "the official Rank-1 with its trial list; published: recall@1 by lists of queries and gallery of its own",
        ),
    ),
}
