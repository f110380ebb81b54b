"""Key-name converters: official MAE <-> Hugging Face, official -> timm. Run: python -m pytest tests/test_convert.py"""

import json

import pytest
import torch

from models_mae import MaskedAutoencoder
from tests.conftest import SMALL_MAE
from util.mae.masking import rank_patches
from util.training.convert import (
    args_from_hf,
    detect_layout,
    hf_config,
    hf_to_official,
    official_to_hf,
    official_to_timm,
    save_hf,
    to_official,
)


@pytest.fixture
def model() -> MaskedAutoencoder:
    """A small autoencoder of which no two weights are equal, biases and norms included."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(**SMALL_MAE)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def assert_equal_states(one: dict, other: dict) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def config_of(state: dict, **more) -> dict:
    return hf_config(state, num_heads=4, decoder_num_heads=2, **more)


def test_classic_names_round_trip_bit_for_bit(model):
    state = model.state_dict()
    theirs = official_to_hf(state)
    assert len(theirs) == len(state) + 2 * 2 * (3 + 2)  # three matrices and biases for one, in five blocks
    assert detect_layout(theirs) == "hf" and detect_layout(state) == "official"
    assert_equal_states(hf_to_official(theirs), state)
    assert_equal_states(to_official(theirs), state)
    assert_equal_states(to_official(state), state)


def test_names_in_memory_of_transformers_round_trip(model, tmp_path):
    """Whatever the installed transformers calls its own weights, we read them back as they were written."""
    transformers = pytest.importorskip("transformers")
    state = model.state_dict()
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(save_hf(tmp_path, state, config_of(state)))
    assert_equal_states(hf_to_official(theirs.state_dict()), state)


def test_what_save_pretrained_writes_is_read(model, tmp_path):
    """transformers 5.x names the decoder's blocks decoder.decoder_encoder.layer.N on disk; 4.x does not."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    state = model.state_dict()
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(save_hf(tmp_path / "ours", state, config_of(state)))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal_states(hf_to_official(load_file(tmp_path / "theirs" / "model.safetensors")), state)


def in_memory_names_of_5x(classic: dict) -> dict:
    changes = {
        "vit.encoder.layer.": "vit.layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    return {_replaced(name, changes): value for name, value in classic.items()}


def on_disk_names_of_5x(classic: dict) -> dict:
    changes = {"decoder.decoder_layers.": "decoder.decoder_encoder.layer."}
    return {_replaced(name, changes): value for name, value in classic.items()}


def _replaced(name: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("respell", [in_memory_names_of_5x, on_disk_names_of_5x])
def test_other_spellings_of_hugging_face_are_read(model, respell):
    """Written out by hand, so that it holds with any installed version."""
    state = model.state_dict()
    respelt = respell(official_to_hf(state))
    assert sorted(respelt) != sorted(official_to_hf(state))
    assert_equal_states(hf_to_official(respelt), state)


def test_an_encoder_saved_on_its_own_is_read(model):
    encoder = official_to_timm(model.state_dict())
    bare = {name.removeprefix("vit."): value for name, value in official_to_hf(encoder).items()}
    assert "embeddings.cls_token" in bare and "encoder.layer.0.layernorm_before.weight" in bare
    assert_equal_states(to_official(bare), encoder)


@pytest.mark.parametrize("name", ["head.weight", "fc_norm.bias", "adapters.0.down.weight", "blocks.0.ls1.gamma"])
def test_a_key_without_counterpart_is_named(model, name):
    state = {**model.state_dict(), name: torch.zeros(1)}
    with pytest.raises(ValueError, match=name):
        official_to_hf(state)
    with pytest.raises(ValueError, match=name):
        hf_to_official({**official_to_hf(model.state_dict()), name: torch.zeros(1)})


def test_an_unknown_layout_is_refused():
    assert detect_layout({"conv1.weight": torch.zeros(1)}) is None
    with pytest.raises(ValueError, match="no vision transformer"):
        to_official({"conv1.weight": torch.zeros(1)})


def test_config_is_read_from_the_shapes(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    state = model.state_dict()
    folder = save_hf(tmp_path, state, config_of(state, norm_pix_loss=True, mask_ratio=0.6))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert isinstance(config, transformers.ViTMAEConfig)
    found = {name: getattr(config, name) for name in ("image_size", "patch_size", "hidden_size", "intermediate_size")}
    assert found == {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 192}
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 4)
    assert (config.decoder_num_hidden_layers, config.decoder_num_attention_heads) == (2, 2)
    assert (config.decoder_hidden_size, config.decoder_intermediate_size) == (32, 128)
    assert (config.layer_norm_eps, config.norm_pix_loss, config.mask_ratio) == (1e-6, True, 0.6)


def test_hugging_face_finds_every_weight(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    state = model.state_dict()
    folder = save_hf(tmp_path, state, config_of(state))
    _, report = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_config_travels_back_to_our_flags(model, tmp_path):
    state = model.state_dict()
    config = json.loads((save_hf(tmp_path, state, config_of(state, norm_pix_loss=True)) / "config.json").read_text())
    args = args_from_hf(config)
    assert (args["input_size"], args["norm_pix_loss"], args["mask_ratio"]) == (32, True, 0.75)
    assert (args["patch_size"], args["num_heads"], args["decoder_num_heads"]) == (8, 4, 2)


def test_a_grid_that_is_not_square_needs_its_image_size():
    state = MaskedAutoencoder(**{**SMALL_MAE, "img_size": (32, 48)}).state_dict()
    with pytest.raises(ValueError, match="image_size"):
        config_of(state)
    with pytest.raises(ValueError, match="24 patches"):
        config_of(state, image_size=(32, 32))
    assert config_of(state, image_size=(32, 48))["image_size"] == [32, 48]


def our_tokens(model: MaskedAutoencoder, images: torch.Tensor) -> torch.Tensor:
    """The encoder's tokens (N, 1 + L, D) at mask ratio 0, patches in raster order."""
    patches, (ids, _) = patches_of(model, images), rank_patches(torch.zeros(len(images), model.num_patches(images)))
    return model.encode(patches, ids, model.grid_of(*images.shape[-2:]))


def patches_of(model: MaskedAutoencoder, images: torch.Tensor) -> torch.Tensor:
    blocks = images.unfold(2, model.patch_size, model.patch_size).unfold(3, model.patch_size, model.patch_size)
    return blocks.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


@torch.no_grad()
def test_our_encoder_is_timms(model):
    timm = pytest.importorskip("timm")
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    theirs = timm.models.VisionTransformer(**{name: SMALL_MAE[name] for name in names}, num_classes=0).eval()
    theirs.load_state_dict(official_to_timm(model.state_dict()), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(our_tokens(model, images), theirs.forward_features(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_our_base_encoder_is_timms_mae():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = MaskedAutoencoder(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).eval()
    theirs = timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(official_to_timm(ours.state_dict()), strict=True)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(our_tokens(ours, images), theirs.forward_features(images), atol=1e-5, rtol=0)
