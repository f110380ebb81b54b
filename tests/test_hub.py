"""The weight grammar: path, hf:, timm:, official:. No test needs a network. Run: python -m pytest tests/test_hub.py"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models_mae import MaskedAutoencoder
from util.run.errors import UserError
from util.training import hub
from util.training.convert import hf_config, official_to_hf, official_to_timm, save_hf
from util.training.hub import load_weights

NAMES = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def state() -> dict:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        img_size=16, **NAMES, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
    ).state_dict()


@pytest.fixture
def config(state) -> dict:
    return hf_config(state, num_heads=2, decoder_num_heads=2, norm_pix_loss=True)


def assert_same(weights: hub.Weights, state: dict) -> None:
    assert sorted(weights.state) == sorted(state)
    assert all(torch.equal(weights.state[name], state[name]) for name in state)


def error_of(spec) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(str(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- files and folders


def test_official_checkpoint_with_a_namespace(state, tmp_path):
    """What a user of the official code has: {"model", "optimizer", "epoch", "scaler", "args": Namespace}."""
    path = tmp_path / "checkpoint-799.pth"
    args = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=True, input_size=224)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": args}, path)
    weights = load_weights(str(path))
    assert_same(weights, state)
    assert weights.args == {"model": "mae_vit_base_patch16", "norm_pix_loss": True, "input_size": 224}
    assert (weights.kind, weights.source) == ("path", str(path))


def test_own_checkpoint_with_plain_args(state, tmp_path):
    torch.save({"model": state, "args": {"model": "mae_vit_nano_patch8"}}, tmp_path / "a.pth")
    assert load_weights(str(tmp_path / "a.pth")).args == {"model": "mae_vit_nano_patch8"}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
def test_bare_and_wrapped_state_dicts(state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "a.pth")
    weights = load_weights(str(tmp_path / "a.pth"))
    assert_same(weights, state)
    assert weights.args == {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_stripped(state, tmp_path, prefix):
    torch.save({"model": {prefix + name: value for name, value in state.items()}}, tmp_path / "a.pth")
    assert_same(load_weights(str(tmp_path / "a.pth")), state)


def test_safetensors(state, tmp_path):
    from safetensors.torch import save_file

    save_file(state, tmp_path / "a.safetensors")
    assert_same(load_weights(str(tmp_path / "a.safetensors")), state)


def test_hugging_face_folder_and_the_file_in_it(state, config, tmp_path):
    folder = save_hf(tmp_path / "export", state, config)
    for spec in (folder, folder / "model.safetensors"):
        weights = load_weights(str(spec))
        assert_same(weights, state)
        assert weights.args["norm_pix_loss"] is True and weights.args["input_size"] == 16


def test_hugging_face_folder_of_the_older_kind(state, config, tmp_path):
    torch.save(official_to_hf(state), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_weights(str(tmp_path))
    assert_same(weights, state)
    assert weights.args["norm_pix_loss"] is True


def test_run_folder(state, tmp_path):
    torch.save({"model": state}, tmp_path / "checkpoint-last.pth")
    (tmp_path / "log.txt").write_text("{}")
    assert_same(load_weights(str(tmp_path)), state)


def test_encoder_only(state, tmp_path):
    encoder = official_to_timm(state)
    torch.save({"model": encoder}, tmp_path / "a.pth")
    assert_same(load_weights(str(tmp_path / "a.pth")), encoder)


def test_a_released_file_by_hand_tells_its_objective(state, tmp_path):
    for name, normalised in (("mae_pretrain_vit_huge_full", True), ("mae_visualize_vit_huge", False)):
        torch.save({"model": state}, tmp_path / f"{name}.pth")
        args = load_weights(str(tmp_path / f"{name}.pth")).args
        assert args == {"model": "mae_vit_huge_patch14", "norm_pix_loss": normalised}


# --- what is refused


class Marker:
    """A pickle that writes a file when it is loaded by the ordinary pickle machine."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(state, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"model": state, "args": Marker(marker)}, path)
    assert str(path) in error_of(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap is real: it goes off where code is allowed
    assert marker.exists()


def test_nothing_but_the_namespace_is_allowed_and_only_while_loading(state, tmp_path):
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "a.pth")
    load_weights(str(tmp_path / "a.pth"))
    with pytest.raises(Exception, match="Namespace"):
        torch.load(tmp_path / "a.pth", weights_only=True)


def _write_text(path, state):
    path.write_text("these are not weights\n" * 50)


def _write_empty(path, state):
    path.write_bytes(b"")


def _write_truncated(path, state):
    torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_list(path, state):
    torch.save([1, 2, 3], path)


def _write_no_tensors(path, state):
    torch.save({"epoch": 3}, path)


def _write_other_network(path, state):
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, path)


FAULTS = [_write_text, _write_empty, _write_truncated, _write_list, _write_no_tensors, _write_other_network]


@pytest.mark.parametrize("write", FAULTS)
def test_what_is_no_checkpoint_is_named(state, tmp_path, write):
    path = tmp_path / "a.pth"
    write(path, state)
    assert str(path) in error_of(path)


@pytest.mark.parametrize("write", [_write_text, _write_empty, _write_truncated])
def test_what_is_no_safetensors_file_is_named(state, tmp_path, write):
    path = tmp_path / "a.safetensors"
    write(path, state)
    assert str(path) in error_of(path)


def test_missing_paths_and_empty_folders(state, tmp_path):
    assert "official:NAME" in error_of(tmp_path / "none.pth")
    assert "holds no checkpoint" in error_of(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save({"model": state}, tmp_path / name)
    assert "a.pth, b.pth" in error_of(tmp_path)


def test_a_damaged_config_is_named(state, config, tmp_path):
    folder = save_hf(tmp_path, state, config)
    (folder / "config.json").write_text("{")
    assert "config.json" in error_of(folder)


# --- hf:


class Repository:
    """Stands in for the Hugging Face hub: a folder of files, and a record of what was asked for."""

    def __init__(self, folder: Path, monkeypatch):
        import huggingface_hub

        self.folder, self.asked = folder, []
        monkeypatch.setattr(hub, "_offline", lambda: False)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", self.list)

    def list(self, repo, revision=None):
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def download(self, repo, file, revision=None, local_files_only=False):
        self.asked.append((repo, file, revision))
        path = self.folder / file
        if not path.is_file():
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError(f"404 for {file}")
        return str(path)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    (tmp_path / "repository").mkdir()
    return Repository(tmp_path / "repository", monkeypatch)


@pytest.mark.parametrize("repo", ["Max13241/MAE_Anime", "JackZzz233/MAE_Anime"])
def test_team_repository_in_the_official_layout(state, repository, repo):
    args = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=False)
    torch.save({"model": state, "epoch": 1, "args": args}, repository.folder / "checkpoint-last.pth")
    (repository.folder / "README.md").write_text("weights")
    weights = load_weights(f"hf:{repo}")
    assert_same(weights, state)
    assert (weights.kind, weights.source) == ("hf", f"hf:{repo}/checkpoint-last.pth")
    assert weights.args["model"] == "mae_vit_base_patch16"


def test_repository_in_the_hugging_face_layout(state, config, repository):
    save_hf(repository.folder, state, config)
    weights = load_weights("hf:JackZzz233/MAE_Anime")
    assert_same(weights, state)
    assert weights.args["norm_pix_loss"] is True


def test_repository_without_a_usual_name_takes_the_latest_epoch(state, repository):
    for epoch in (20, 100, 40):
        torch.save({"model": state, "epoch": epoch}, repository.folder / f"checkpoint-{epoch}.pth")
    assert load_weights("hf:a/b").source == "hf:a/b/checkpoint-100.pth"


def test_file_and_revision(state, repository):
    (repository.folder / "runs").mkdir()
    torch.save(state, repository.folder / "runs" / "mine.pth")
    assert_same(load_weights("hf:a/b/runs/mine.pth@v1.0"), state)
    assert repository.asked == [("a/b", "runs/mine.pth", "v1.0")]
    assert "several" not in load_weights("hf:a/b@v1.0").source


def test_weights_without_a_config_are_accepted(state, repository):
    torch.save(official_to_hf(state), repository.folder / "pytorch_model.bin")
    assert load_weights("hf:a/b/pytorch_model.bin").args == {}


@pytest.mark.parametrize("spec", ["hf:", "hf:owner", "hf:/x", "hf:a/b/c@"])
def test_malformed_hub_names(spec):
    assert "hf:OWNER/REPO" in error_of(spec)


def test_what_the_hub_lacks_is_named(repository):
    assert "hf:a/b holds no checkpoint" in error_of("hf:a/b")
    message = error_of("hf:a/b/none.pth@main")
    assert "404 for none.pth" in message and "/a/b/resolve/main/none.pth" in message


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No host answers, and every cache is empty."""
    import huggingface_hub

    monkeypatch.setattr(hub, "_offline", lambda: True)
    monkeypatch.setattr(hub, "RELEASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_offline_every_source_says_what_to_download(offline):
    assert "huggingface.co/a/b and give the file's path" in error_of("hf:a/b")
    assert "huggingface.co/a/b/resolve/main/c.pth" in error_of("hf:a/b/c.pth")
    assert "timm/vit_base_patch16_224.mae/resolve/main/model.safetensors" in error_of("timm:vit_base_patch16_224.mae")
    message = error_of("official:mae_visualize_vit_base")
    assert "/visualize/mae_visualize_vit_base.pth" in message
    assert str(Path(torch.hub.get_dir()) / "checkpoints" / "mae_visualize_vit_base.pth") in message


def test_offline_a_cached_repository_still_loads(state, config, offline, tmp_path, monkeypatch):
    """The cache of huggingface_hub as it lies on disk."""
    repo = tmp_path / "hf" / "models--a--b"
    save_hf(repo / "snapshots" / ("0" * 40), state, config)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    weights = load_weights("hf:a/b")
    assert_same(weights, state)
    assert weights.args["norm_pix_loss"] is True


@pytest.mark.parametrize("spec", ["hf:a/b", "timm:vit_base_patch16_224.mae"])
def test_offline_in_a_fresh_process(spec, tmp_path):
    """As a user meets it: nothing imported before, no host answers, and it does not take a minute to say so."""
    code = f"from util.training.hub import load_weights; load_weights({spec!r})"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].startswith("util.run.errors.UserError: hf:")
    assert "Retry" not in run.stderr


def test_an_unreachable_host_is_found_out():
    hub._reachable.cache_clear()
    assert not hub._reachable("http://127.0.0.1:9")


# --- timm:


def test_timm_encoder(repository):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    save_file(model.state_dict(), repository.folder / "model.safetensors")
    weights = load_weights("timm:vit_tiny_patch16_224")
    assert repository.asked == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors", None)]
    assert_same(weights, {n: v for n, v in model.state_dict().items() if not n.startswith("head.")})
    assert (weights.kind, weights.args) == ("timm", {})


def test_unknown_timm_model_and_one_that_is_no_vit(repository):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    assert "timm:vit_of_dreams" in error_of("timm:vit_of_dreams")
    model = timm.create_model("mobilenetv3_small_050", pretrained=False)
    save_file(model.state_dict(), repository.folder / "model.safetensors")
    assert "no plain vision transformer" in error_of("timm:mobilenetv3_small_050")


# --- official:


@pytest.fixture
def release(state, tmp_path, monkeypatch):
    """Serves "released" files from a folder; returns that folder."""
    for kind in ("pretrain", "visualize"):
        (tmp_path / "server" / kind).mkdir(parents=True)
    monkeypatch.setattr(hub, "RELEASE_URL", (tmp_path / "server").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "server"


def publish(release: Path, name: str, state: dict) -> Path:
    path = release / name.split("_")[1] / f"{name}.pth"
    torch.save({"model": state}, path)
    return path


def test_release_with_a_published_checksum(state, release, monkeypatch):
    served = publish(release, "mae_pretrain_vit_base", state)
    monkeypatch.setitem(hub.RELEASES, "mae_pretrain_vit_base", hashlib.md5(served.read_bytes()).hexdigest()[:6])
    weights = load_weights("official:mae_pretrain_vit_base")
    assert_same(weights, state)
    assert weights.kind == "official" and "as published" in weights.source
    served.unlink()
    assert_same(load_weights("official:mae_pretrain_vit_base"), state)  # from the cache now


def test_a_download_with_another_checksum_is_not_kept(state, release):
    publish(release, "mae_pretrain_vit_base", state)
    assert "MD5 does not begin with 8cad7c" in error_of("official:mae_pretrain_vit_base")
    assert list(Path(torch.hub.get_dir(), "checkpoints").iterdir()) == []


def test_release_without_a_published_checksum_is_pinned(state, release):
    publish(release, "mae_visualize_vit_base", state)
    assert "no checksum is published" in load_weights("official:mae_visualize_vit_base").source
    assert "as pinned" in load_weights("official:mae_visualize_vit_base").source
    cached = Path(torch.hub.get_dir(), "checkpoints", "mae_visualize_vit_base.pth")
    torch.save({"model": {**state, "cls_token": state["cls_token"] + 1}}, cached)
    assert "has changed" in error_of("official:mae_visualize_vit_base")


def test_a_file_put_there_by_hand_is_used_and_checked(state, release):
    folder = Path(torch.hub.get_dir(), "checkpoints")
    folder.mkdir(parents=True)
    torch.save({"model": state}, folder / "mae_visualize_vit_large.pth")
    assert_same(load_weights("official:mae_visualize_vit_large"), state)
    torch.save({"model": state}, folder / "mae_pretrain_vit_large.pth")
    assert "MD5 does not begin with b8b06e" in error_of("official:mae_pretrain_vit_large")


def test_an_interrupted_download_is_not_kept(state, release, monkeypatch):
    publish(release, "mae_visualize_vit_base", state)
    whole = hub.urllib.request.urlopen

    def cut(*args, **kwargs):
        response = whole(*args, **kwargs)
        response.headers.replace_header("Content-Length", "999999999")
        return response

    monkeypatch.setattr(hub.urllib.request, "urlopen", cut)
    assert "the transfer stopped after" in error_of("official:mae_visualize_vit_base")
    assert list(Path(torch.hub.get_dir(), "checkpoints").iterdir()) == []


def test_unknown_release_lists_the_known_ones():
    assert "mae_visualize_vit_huge" in error_of("official:mae_vit_base")
