"""Small valid files of every kind that the project reads, for scripts/fuzz_readers.py to damage."""

import argparse
import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from models_transfer import attach_head, start_backbone
from util.benchmark.few_shot import Episodes
from util.benchmark.lists import write_csv
from util.benchmark.pairs import KINDS
from util.benchmark.release import SPLIT_COLUMNS, Release, episode_columns, write_release
from util.benchmark.scores import Measured, write_scores
from util.data.manifest import write_manifest
from util.data.maps import ROWS_FILE, row_keys
from util.data.trials import ICARTOONFACE, write_protocol
from util.run.seed import rng_for
from util.training.checkpoint import Progress, save_checkpoint
from util.training.convert import official_to_hf
from util.transfer.face_store import Faces, FaceStore, PictureFile
from util.transfer.face_table import HEADER
from util.transfer.gallery import Gallery
from util.transfer.lora import LoRAConfig, add_lora, save_peft

SIDE, DIM = 16, 6  # px of a model's picture; length of an embedding
MODEL = "vit_nano_patch8"
FLAGS = {
    "model": MODEL, "init": None, "seed": 0, "input_size": SIDE, "global_pool": True, "head": "linear",
    "batch_size": 4,
}  # fmt: skip
PEOPLE = ("asuka", "rei")


def picture(seed: int, width: int = 24, height: int = 20, mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    coarse = Image.fromarray(rng_for(seed, "corpus").integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def save(path: Path, content: bytes | str | Image.Image) -> None:
    """Write a file, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


class Command:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


# --- pictures and tables --------------------------------------------------------------------------------------------


def images(folder: Path) -> None:
    """One of each format that is read, and of the modes that are converted."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture(i, mode="P") for i in range(3)]
    deep = Image.fromarray(rng_for(0, "deep").integers(0, 65536, (20, 24), dtype=np.uint16))
    grey = Image.fromarray(rng_for(0, "float").random((20, 24), dtype=np.float32))
    files = {
        "a.png": encoded(picture(0), "PNG"),
        "alpha.png": encoded(picture(1, mode="RGBA"), "PNG"),
        "palette.png": encoded(picture(2, mode="P"), "PNG", transparency=3),
        "deep.png": encoded(deep, "PNG"),
        "frames.apng": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "b.jpg": encoded(picture(3), "JPEG", exif=exif),
        "cmyk.jpeg": encoded(picture(4, mode="CMYK"), "JPEG"),
        "progressive.jpg": encoded(picture(5), "JPEG", progressive=True),
        "c.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "d.webp": encoded(picture(6), "WEBP"),
        "lossless.webp": encoded(picture(7, mode="RGBA"), "WEBP", lossless=True),
        "e.bmp": encoded(picture(8), "BMP"),
        "f.tif": encoded(picture(9), "TIFF"),
        "packed.tif": encoded(picture(9), "TIFF", compression="tiff_lzw"),
        "float.tiff": encoded(grey, "TIFF"),
        "g.jp2": encoded(picture(10), "JPEG2000"),
        "h.avif": encoded(picture(11), "AVIF"),
    }
    for name, data in files.items():
        save(folder / name, data)


def prepared(folder: Path) -> None:
    """A prepared folder whose rows use every column."""
    rows = [
        {
            "sample_id": f"s{i}", "file_name": f"p/{i}.png", "identity": PEOPLE[i % 2], "split": split,
            "box": [2.0, 3.0, 20.0, 18.0], "eyes": [[4.0, 5.0, 8.0, 7.0]], "source": f"album {i}", "style": "moe",
            "pose": "front", "occlusion": None, "expression": "smile", "mask_file": f"m/{i}.png",
        }
        for i, split in enumerate(("pretrain", "train", "val", "test", "open_test", "train"))
    ]  # fmt: skip
    write_manifest(folder, rows, extra={"writer": "fuzz"})
    for i in range(len(rows)):
        save(folder / f"p/{i}.png", picture(i))


def protocols(folder: Path) -> None:
    """Trials."""
    columns = {"id_a": ["a", "b"], "id_b": ["c", None], "label": [1, 0], "kind": ["trial", "distractor"]}
    write_protocol(folder, ICARTOONFACE, columns)


def pool(folder: Path) -> None:
    """A Hugging Face data set of pictures in Parquet, as huggan and AnimeDiffusion are."""
    cells = [{"bytes": encoded(picture(i), "PNG"), "path": f"{i}.png"} for i in range(6)]
    table = pa.table({"image": cells, "long_prompt": ["text"] * 6, "image_url": ["http://a"] * 6})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")


# --- label formats ----------------------------------------------------------------------------------------------------


def icartoonface_det(folder: Path) -> None:
    """The lists and pictures of iCartoonFace detection."""
    train, test = "personai_icartoonface_dettrain", "personai_icartoonface_detval"
    rows = [f"{train}_{i // 2:05d}.jpg,{2 + i},3,{14 + i},18" for i in range(8)]
    save(folder / f"{train}_anno_updatedv1.0.csv", "\n".join(rows) + "\n")
    save(folder / f"{test}.csv", "".join(f"{test}_{i:05d}.jpg,3,4,12,16\n" for i in range(3)))
    for name in {row.split(",")[0] for row in rows} | {f"{test}_{i:05d}.jpg" for i in range(3)}:
        save(folder / "pictures" / name, picture(len(name)))


def icartoonface_rec(folder: Path) -> None:
    """The lists and pictures of iCartoonFace recognition, training and test part."""
    stem = "personai_icartoonface_"
    train = [f"{stem}rectrain_{i // 4:05d}/{stem}rectrain_{i // 4:05d}_{i:07d}.jpg" for i in range(12)]
    save(folder / "icartoonface_rectrain_det.txt", "".join(f"{name}\t2\t3\t20\t18\n" for name in train))
    test = [f"{stem}rectest_{i:07d}.jpg" for i in range(5)]
    lines = [f"{name} 2 3 20 18 {label}" for name, label in zip(test, (0, 0, 1, 1, -1), strict=True)]
    save(folder / "icartoonface_rectest_info.txt", "\n".join([*lines, f"{test[0]} {test[1]}", f"{test[2]} {test[3]}"]))
    save(folder / "icartoonface_rectest_det.txt", "".join(f"{name}\t2\t3\t20\t18\n" for name in test))
    names = [{"id": f"{stem}rectrain_{i:05d}", "name": f"n{i}", "url": "http://a"} for i in range(3)]
    save(folder / "icartoonface_rectest_idInfo.txt", "".join(f"{name}\n" for name in names))
    for i, name in enumerate(train + test):
        save(folder / "pictures" / name, picture(i))


def acrd(folder: Path) -> None:
    """The lists and pictures of ACRD."""
    save(folder / "tagIds.tsv", 'miyu\t0\n"nene"_x\t1\nmithra\t2\n')
    numbers = [1001, 1002, 2001, 2002, 3001, 3002]
    place = "0.25, 0.1, 0.75, 0.6 0.950000"
    lines = (f'{n % 1000:04d}\\{n}.jpg\t{i % 2}\t"{place}"\r\n' for i, n in enumerate(numbers))
    save(folder / "faces.tsv", "".join(lines))
    for split, listed in (("train", numbers[:4]), ("val", numbers[4:5]), ("test", numbers[5:])):
        save(folder / f"{split}Split.tsv", "\n".join(map(str, listed)))
    for n in numbers:
        save(folder / f"{n % 1000:04d}" / f"{n}.jpg", picture(n))


def dafre(folder: Path) -> None:
    """The lists and pictures of DAF:re."""
    save(folder / "labels/classid_classname.csv", "0,morrigan_aensland\n1,uchiha_sasuke\n")
    lists = {
        "train": "0,0545/676545.jpg\n0,0950/1390950.jpg\n1,0750/1848750.jpg\n",
        "val": "0,0933/194933.jpg\n1,0361/75361.jpg\n",
        "test": "0,0291/1796291.jpg\n1,0816/277816.jpg\n",
    }
    for split, text in lists.items():
        save(folder / f"labels/{split}.csv", text)
        for line in text.splitlines():
            save(folder / "faces" / line.split(",")[1], picture(len(line)))


def moeimouto(folder: Path) -> None:
    """The lists of GLSim and the pictures of moeImouto."""
    classes = ("103_reinforce_zwei", "004_takamachi_nanoha")
    save(folder / "classid_classname.csv", "class_id,class_name\n0,103_reinforce_zwei\n1,004_takamachi_nanoha\n")
    for number, split in enumerate(("train", "val", "test")):
        places = [f"{name}/face_{number}_{i}_66.png" for name in classes for i in range(2)]
        rows = "".join(f"{i // 2},{place}\n" for i, place in enumerate(places))
        save(folder / f"{split}.csv", "class_id,dir\n" + rows)
        for i, place in enumerate(places):
            save(folder / place, picture(i))


def listed(folder: Path) -> None:
    """A list of pictures with splits, and what a detector found in them, as prepare_folder.py takes them."""
    names = [f"p/{i}.png" for i in range(5)]
    splits = ("pretrain", "train", "recon_val", "test", "train")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(name, split, "a", PEOPLE[0], i) for i, (name, split) in enumerate(zip(names, splits, strict=True))]
    write_csv(folder / "splits.csv", ["path", "split", "set", "identity", "component"], rows)
    face = {"score": 0.9, "face": [2, 3, 15, 14], "left_eye": [4, 5, 3, 2], "right_eye": [9, 5, 3, 2]}
    save(folder / "parts.json", json.dumps({name: {"size": [24, 20], "faces": [face]} for name in names}))
    for i, name in enumerate(names):
        save(folder / name, picture(i))


def names(folder: Path) -> None:
    """The label files whose names identity_map.py compares."""
    moeimouto(folder / "moe")
    dafre(folder / "dafre")
    acrd(folder / "acrd")


# --- weights --------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> None:
    """An encoder as .pth (bare, and as the official code writes it), .bin, .safetensors and a Hugging Face folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = start_backbone(FLAGS).state_dict()
    encoder = {name: value for name, value in state.items() if not name.startswith(("head.", "pixel_", "fc_norm."))}
    save_checkpoint(folder / "bare.pth", encoder)
    official = {"model": encoder, "args": argparse.Namespace(**FLAGS), "epoch": 3, "optimizer": {"state": {}}}
    save_checkpoint(folder / "official.pth", official)
    torch.save({"state_dict": encoder}, folder / "old.bin", _use_new_zipfile_serialization=False)
    save_file(encoder, folder / "flags.safetensors", metadata={"format": "pt", "args": json.dumps(FLAGS)})
    torch.save({"model": encoder, "args": {"model": Command()}, "epoch": 3}, folder / "evil.pth")
    (folder / "hf").mkdir(exist_ok=True)
    save_file(_contiguous(official_to_hf(encoder)), folder / "hf/model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "vit_mae", "image_size": SIDE, "patch_size": 8, "num_attention_heads": 3}
    save(folder / "hf/config.json", json.dumps(config))


def _contiguous(state: dict) -> dict:
    return {name: value.clone().contiguous() for name, value in state.items()}


def transfer(folder: Path) -> None:
    """Checkpoints of a transfer run, with a trained head; one of them holds adapters and no encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = start_backbone(FLAGS)
    origin = model.origin
    attach_head(model, FLAGS, len(PEOPLE))
    notes = {"classes": list(PEOPLE), "args": FLAGS, "epoch": 1}
    save_checkpoint(folder / "finetune.pth", {**notes, "model": model.state_dict()})
    model = start_backbone(FLAGS)
    config = LoRAConfig(rank=2)
    add_lora(model, config)
    attach_head(model, FLAGS, len(PEOPLE))
    own = {name: value for name, value in model.state_dict().items() if "lora_" in name or name.startswith("head.")}
    adapted = {**notes, "model": own, "base": origin, "lora": {**asdict(config), "targets": list(config.targets)}}
    save_checkpoint(folder / "lora.pth", adapted)


def resume(folder: Path) -> None:
    """The checkpoint of a run that goes on."""
    model = start_backbone(FLAGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 3, SIDE, SIDE)).sum().backward()
    optimizer.step()
    save_checkpoint(
        folder / "checkpoint-last.pth",
        {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "epoch": 0, "args": FLAGS,
            "progress": asdict(replace(Progress(), epoch=1, global_step=4, step_images=4, data="d", sums=[{}])),
        },
    )  # fmt: skip


def adapters(folder: Path) -> None:
    """A LoRA folder in PEFT's layout."""
    model, config = start_backbone(FLAGS), LoRAConfig(rank=2)
    add_lora(model, config)
    save_peft(folder, model, config, "vit")


# --- what is computed -----------------------------------------------------------------------------------------------


def arrays(path: Path, **content) -> None:
    """An .npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **content)


def embeddings(folder: Path) -> None:
    """Anybody's embeddings, compressed and not."""
    rows = rng_for(0, "embeddings").normal(size=(9, DIM)).astype(np.float32)
    content = {"embeddings": rows, "sample_id": np.array([f"s{i}" for i in range(9)])}
    arrays(folder / "embeddings.npz", **content)
    np.savez_compressed(folder / "small.npz", **content)
    arrays(folder / "evil.npz", **content, more=np.array([Command()], dtype=object))


def release(folder: Path) -> None:
    """A benchmark as files, and a submission of scores."""
    ids = {split: [f"{split}{i}" for i in range(4)] for split in ("train", "val", "test", "open_test", "open_val")}
    splits = [
        dict(zip(SPLIT_COLUMNS, (name, split, f"{'new_' * ('open' in split)}{PEOPLE[i % 2]}", name), strict=True))
        for split, own in ids.items()
        for i, name in enumerate(own)
    ]
    pairs = {
        "id_a": ["test0", "test1", "test0", "test1"], "id_b": ["test2", "test3", "test1", "test2"],
        "label": [1, 1, 0, 0], "kind": [KINDS[0], KINDS[0], KINDS[1], KINDS[1]],
    }  # fmt: skip
    listed = {"verification": pairs, "verification_tuning": pairs}
    classes = np.array([[0, 1]])
    drawn = Episodes(np.array([[[0], [1]]]), np.array([[[2], [3]]]), classes, classes[0], 0)
    few = episode_columns(drawn, np.array(ids["test"]), list(PEOPLE))
    write_release(folder / "release", Release("1.0.0", {"seed": 0}, splits, listed, {"2way_1shot": few}))
    every = [name for own in ids.values() for name in own]
    rng = rng_for(0, "scores")
    arrays(
        folder / "scores.npz", sample_id=np.array(every), class_scores=rng.random((len(every), 2)),
        classes=np.array(PEOPLE), pair_scores=rng.random(4), tuning_pair_scores=rng.random(4),
    )  # fmt: skip


def predictions(folder: Path) -> None:
    """What a detector found, in both forms."""
    found = [{"image_id": f"{i}.png", "category_id": 1 + i % 2, "bbox": [2, 3, 10, 12], "score": 0.5} for i in range(4)]
    save(folder / "coco.json", json.dumps(found))
    save(folder / "list.csv", "".join(f"{i}.png,2,3,12,15,face,0.{i}\n" for i in range(4)))
    face = {"score": 0.9, "face": [2, 3, 15, 14], "left_eye": [4, 5, 3, 2]}
    save(folder / "stored.json", json.dumps({f"{i}.png": {"faces": [face]} for i in range(3)}))


def gallery(folder: Path) -> None:
    """Enrolled characters."""
    shelf = Gallery.open(folder, weights="0123", dim=DIM)
    for i, name in enumerate(PEOPLE):
        shelf.enrol(name, rng_for(i, "gallery").normal(size=(2, DIM)), [picture(i), picture(i + 9)])
    shelf.threshold = 0.4
    shelf.save()


def faces(folder: Path) -> None:
    """Faces that were found and embedded, and the list that people write names into."""
    rng = rng_for(0, "faces")
    found = [
        Faces(
            PictureFile(f"{i}.png", f"1-{i}"), rng.random((2, 4), np.float32), rng.random(2, np.float32),
            rng.random((2, DIM), np.float32),
        )
        for i in range(3)
    ]  # fmt: skip
    FaceStore(folder / "store", {"finder": "a"}, DIM).add(found)
    rows = [(f"{i}.png", 1.0, 2.0, 9.0, 8.0, 0.9, "unknown", 0.1, "", 0, "") for i in range(3)]
    write_csv(folder / "faces.csv", HEADER, rows)


def maps(folder: Path) -> None:
    """Semantic maps, and the row names beside them."""
    prepared(folder)
    (folder / "maps").mkdir()
    np.save(folder / "maps/face.npy", rng_for(0, "maps").integers(0, 256, (6, 32, 32), dtype=np.uint8))
    with open(folder / "maps" / ROWS_FILE, "wb") as file:  # to a path NumPy would add .npy
        np.save(file, row_keys([f"s{i}" for i in range(6)]))


def measures(folder: Path) -> None:
    """The measures of a pre-trained model."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.array(["a", "b", "c"])
    write_scores(folder / "scores.npz", {"psnr_db": Measured(np.array([20.0, 21.0, 22.0]), ids, ids)}, {"seed": 0})
