"""Models on the Hugging Face hub: saved, pushed, loaded again, pinned, resumed, offline; their cards and licences.

The hub is a stand-in on the loopback interface. Run: python -m pytest tests/test_hub_push.py
"""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from models_hub import HubMAE, HubViT, hub_spec, load_adapters
from models_mae import MaskedAutoencoder
from models_mae_weights import load_mae
from models_transfer import attach_head, load_recogniser, start_backbone
from models_vit import build_vit
from tests.conftest import SMALL_MAE
from tests.helpers import fails
from tests.loopback import commit_of, serve
from util.run.errors import UserError
from util.training import hub
from util.training.convert import hf_config, save_hf
from util.training.hub import load_weights
from util.training.lineage import licence_of, lineage
from util.transfer.lora import LoRAConfig, add_lora

SIZE = 16
IMAGES = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The hub's library, led to a folder that is served here; the cache is empty."""
    with serve(tmp_path / "hub", cut=set()) as url:
        use(url, tmp_path, monkeypatch)
        yield tmp_path / "hub"


def use(url, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", str(url))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()


# --- masked autoencoders


@pytest.fixture(scope="module")
def mae() -> HubMAE:
    torch.manual_seed(0)
    return randomised(HubMAE(**SMALL_MAE, norm_pix_loss=True, decoder="cross"))


def predicted(model) -> torch.Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(2, 16)
    mask[:, ::2] = 1
    with torch.inference_mode():
        return model.reconstruct(images, mask)["pred"]


def test_a_pushed_autoencoder_comes_back(host, mae):
    mae.push_to_hub("team/mae")
    assert {path.name for path in (host / "models/team/mae").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    again = HubMAE.from_pretrained("team/mae")
    torch.testing.assert_close(predicted(again), predicted(mae), rtol=0, atol=0)
    assert again.norm_pix_loss and again.decoder == "cross" and not again.training
    config = json.loads((host / "models/team/mae/config.json").read_text())
    assert config["decoder_num_heads"] == SMALL_MAE["decoder_num_heads"] and config["norm_pix_loss"] is True
    weights = load_weights("hf:team/mae")
    assert weights.args["input_size"] == 32 and weights.args["norm_pix_loss"] is True


@pytest.mark.parametrize("repo", ["Max13241/MAE_Anime", "JackZzz233/MAE_Anime"])
def test_the_teams_repositories_load_by_name_in_any_layout(host, repo):
    torch.manual_seed(0)
    plain = load_mae_from_shape()
    folder = host / "models" / repo
    if repo.startswith("Max"):
        folder.mkdir(parents=True)
        state = {"model": plain.state_dict(), "epoch": 3, "args": {"model": "mae_vit_nano_patch8", "input_size": 32}}
        torch.save(state, folder / "checkpoint-3.pth")
    else:
        save_hf(folder, plain.state_dict(), hf_config(plain.state_dict(), num_heads=4, decoder_num_heads=4))
    for again in (HubMAE.from_pretrained(repo), load_mae(f"hf:{repo}")):
        torch.testing.assert_close(predicted(again), predicted(plain), rtol=0, atol=0)
    encoder = HubViT.from_pretrained(repo)
    expected = load_recogniser(f"hf:{repo}", model="vit_nano_patch8", input_size=32).model
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(encoder.embed(images), expected.embed(images), rtol=0, atol=0)


def load_mae_from_shape() -> MaskedAutoencoder:
    from models_mae import build_mae

    return randomised(build_mae("mae_vit_nano_patch8", 32))


# --- recognisers and adapters


def checkpoint_of(tmp_path: Path, lora: LoRAConfig | None = None, init: str | None = None, **more) -> Path:
    """A checkpoint as main_lora.py and main_finetune.py leave one."""
    args = {
        "model": "vit_nano_patch8",
        "input_size": SIZE,
        "global_pool": True,
        "seed": 0,
        "init": init,
        "head": "linear",
    }
    args |= {"head_norm": True, "data_path": "some/where/faces", "epochs": 5, **more}
    model = start_backbone(args)
    if lora:
        add_lora(model, lora)
    attach_head(model, args, 3)
    randomised(model) if not lora else randomised_adapters(model)
    state = model.state_dict()
    note = {"classes": ["asuka", "rei", "初音ミク"], "args": args}
    if lora:
        state = {name: value for name, value in state.items() if "lora_" in name or name.startswith("head.")}
        note |= {"lora": vars(lora), "base": model.origin}
    path = tmp_path / "run" / "checkpoint-best.pth"
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": state, **note}, path)
    return path


def randomised_adapters(model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("head."):
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()


@pytest.fixture(scope="module")
def push(import_script):
    return import_script("scripts/push_to_hub.py").main


def test_a_pushed_recogniser_keeps_its_scores_and_names(host, push, tmp_path, capsys):
    ckpt = checkpoint_of(tmp_path)
    push(["--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--repo", "team/faces"])
    assert "pushed: " in capsys.readouterr().out
    model = HubViT.from_pretrained("team/faces")
    expected = load_recogniser(str(ckpt))
    assert model.classes == expected.classes == ("asuka", "rei", "初音ミク")
    torch.testing.assert_close(model(IMAGES), expected.model(IMAGES), rtol=0, atol=1e-6)
    plain = load_recogniser("hf:team/faces")  # as an encoder, by the grammar of weights
    torch.testing.assert_close(plain.model.embed(IMAGES), expected.model.embed(IMAGES), rtol=0, atol=1e-6)


def test_adapters_come_back_with_their_head(host, push, tmp_path):
    start = tmp_path / "start.pth"
    torch.save({"model": randomised(build_vit("vit_nano_patch8", img_size=SIZE)).state_dict(), "args": {}}, start)
    ckpt = checkpoint_of(tmp_path, LoRAConfig(2, 4.0, ("q", "v", "fc1")), str(start))
    push(["--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--repo", "team/adapters", "--license", "mit"])
    config = (tmp_path / "out/config.json").read_text() + (tmp_path / "out/adapter_config.json").read_text()
    assert str(tmp_path) not in config and "start.pth" in config
    trained = load_adapters("team/adapters", init=str(start))
    expected = load_recogniser(str(ckpt))
    assert trained.classes == expected.classes
    torch.testing.assert_close(trained.model(IMAGES), expected.model(IMAGES), rtol=0, atol=1e-5)
    merged = HubViT.of(trained)
    torch.testing.assert_close(merged(IMAGES), expected.model(IMAGES), rtol=0, atol=1e-5)
    other = tmp_path / "other.pth"
    torch.save({"model": build_vit("vit_nano_patch8", img_size=SIZE).state_dict(), "args": {}}, other)
    with pytest.raises(UserError, match="other start weights"):
        load_adapters("team/adapters", init=str(other))
    with pytest.raises(UserError, match=r"start\.pth do not exist"):
        load_adapters("team/adapters")


def test_nothing_is_uploaded_without_a_repository(tmp_path, push, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("it was uploaded"))
    push(["--ckpt", str(checkpoint_of(tmp_path)), "--out", str(tmp_path / "out")])
    assert "nothing was uploaded" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert "is not empty" in fails(
        push, capsys, ["--ckpt", str(tmp_path / "run/checkpoint-best.pth"), "--out", str(tmp_path / "out")]
    )


# --- downloads


def test_a_pinned_revision_is_the_one_that_is_loaded(host, mae):
    mae.push_to_hub("team/mae")
    other = randomised(HubMAE(**SMALL_MAE, norm_pix_loss=True, decoder="cross"))
    other.save_pretrained(host / "models/team/mae@v1")
    assert not torch.equal(predicted(other), predicted(mae))
    for revision in ("v1", commit_of(host / "models/team/mae@v1")):
        again = HubMAE.from_pretrained("team/mae", revision=revision)
        torch.testing.assert_close(predicted(again), predicted(other), rtol=0, atol=0)
    torch.testing.assert_close(predicted(HubMAE.from_pretrained("team/mae")), predicted(mae), rtol=0, atol=0)
    assert hub_spec("a/b", "v1") == "hf:a/b@v1" and hub_spec("hf:a/b") == "hf:a/b"
    with pytest.raises(UserError, match="no revisions"):
        hub_spec(str(host), "v1")


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path, mae, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    mae.save_pretrained(tmp_path / "hub/models/team/mae")
    path = "/team/mae/resolve/main/model.safetensors"
    sha = commit_of(tmp_path / "hub/models/team/mae")
    with serve(tmp_path / "hub", cut={path, path.replace("main", sha)}) as url:
        use(url, tmp_path, monkeypatch)
        again = HubMAE.from_pretrained("team/mae")
        spans = [span for method, asked, span in url.asked if method == "GET" and asked.endswith(".safetensors")]
    torch.testing.assert_close(predicted(again), predicted(mae), rtol=0, atol=0)
    size = (tmp_path / "hub/models/team/mae/model.safetensors").stat().st_size
    assert len(spans) == 2 and 0 < int(spans[1].removeprefix("bytes=").split("-")[0]) <= size // 2


def test_what_was_downloaded_is_there_without_a_connection(host, mae, monkeypatch):
    mae.push_to_hub("team/mae")
    shutil.copy(host / "models/team/mae/model.safetensors", host / "models/team/mae/odd_name.safetensors")
    (host / "models/team/mae/model.safetensors").unlink()
    online = HubMAE.from_pretrained("team/mae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_reachable", lambda url: pytest.fail("the host was asked"))
    torch.testing.assert_close(predicted(HubMAE.from_pretrained("team/mae")), predicted(online), rtol=0, atol=0)
    assert load_weights("hf:team/mae").source == "hf:team/mae/odd_name.safetensors"
    with pytest.raises(UserError, match="no connection"):
        HubMAE.from_pretrained("team/other")


# --- cards and licences


def front_matter(text: str) -> dict[str, str]:
    import yaml

    return yaml.safe_load(text.split("---")[1])


def test_the_card_says_what_it_is_and_how_it_scored(push, tmp_path):
    ckpt = checkpoint_of(tmp_path)
    ckpt.with_name("results.json").write_text(
        json.dumps({"val": {"top1": 0.5}, "args": {"data_path": "/home/me/faces"}})
    )
    scores = {"closed_set": {"top1": 0.75, "top1_ci95": [0.7, 0.8]}, "few_shot": {"skipped": "none"}}
    (tmp_path / "eval.json").write_text(json.dumps({**scores, "args": {"data_path": "data/cards"}}))
    push(["--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "eval.json")])
    text = (tmp_path / "out/README.md").read_text()
    about = front_matter(text)
    assert about["license"] == "apache-2.0" and "anime" in about["tags"]
    assert "| validation Top-1 | 0.5 | `faces` |" in text and "/home/me" not in text
    assert "| closed-set Top-1 | 0.75 (0.7 to 0.8) | `cards` |" in text
    assert 'HubViT.from_pretrained("OWNER/NAME")' in text and "- epochs: 5" in text and "classes: 3" in text
    example = text.split("```python")[1].split("```")[0]
    space = {"images": IMAGES}
    exec(example.replace("OWNER/NAME", str(tmp_path / "out")), space)
    assert len(space["names"]) == 2 and set(space["names"]) <= {"asuka", "rei", "初音ミク"}


@pytest.mark.parametrize(
    ("init", "licence"),
    [
        (None, "apache-2.0"),
        ("official:mae_pretrain_vit_base", "cc-by-nc-4.0"),
        ("timm:vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        ("hf:facebook/vit-mae-base", "cc-by-nc-4.0"),
        ("weights/mae_visualize_vit_large.pth", "cc-by-nc-4.0"),
        ("timm:resnet50", None),
        ("hf:Max13241/MAE_Anime", None),
        ("somewhere/unknown.pth", None),
    ],
)
def test_the_licence_follows_from_the_start_weights(init, licence):
    found = licence_of(lineage({"init": init}))
    assert (found.name if found else None) == licence


def test_the_licence_is_passed_on_from_run_to_run(push, tmp_path, capsys):
    """The official weights, adapted to anime, fine-tuned from there."""
    adapted = tmp_path / "adapted.pth"
    torch.save({"model": {}, "args": {"init": "official:mae_pretrain_vit_base"}}, adapted)
    assert lineage({"init": str(adapted)}) == ["adapted.pth", "official:mae_pretrain_vit_base"]
    ckpt = checkpoint_of(tmp_path)
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "args": state["args"] | {"init": str(adapted)}}, ckpt)
    push(["--ckpt", str(ckpt), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    assert front_matter(text)["license"] == "cc-by-nc-4.0" and "may not be used commercially" in text
    argv = ["--ckpt", str(ckpt), "--out", str(tmp_path / "o"), "--license"]
    assert "does not agree" in fails(push, capsys, [*argv, "mit"])
    torch.save({**state, "args": state["args"] | {"init": "timm:resnet50"}}, ckpt)
    assert "licence of timm:resnet50 is not known" in fails(push, capsys, argv[:-1])
    push([*argv, "mit"])
    assert front_matter((tmp_path / "o/README.md").read_text())["license"] == "mit"
