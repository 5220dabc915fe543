"""The fused vision tower against transformers' modules: kinds of towers, roundings, and the kernels inside it."""

from __future__ import annotations

import copy

import pytest
import torch
from image_checkpoints import native_model
from transformers import InternVLConfig

from kvarena.engine.kernels import norm, patches
from kvarena.engine.vision import internvl_fused
from kvarena.engine.vision.encoder import ImageEncoder
from kvarena.engine.vision.internvl_fused import TowerOps
from kvarena.engine.vision.internvl_tower import InternVLTower
from kvarena.engine.vision.processing import TILES_AT_ONCE
from kvarena.engine.vision.tiles import Tiling

TILING = Tiling((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 3, 56, 1, 4, True, 4)
TILES = torch.randint(0, 256, (3, 3, 56, 56), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def config(*, whole: dict | None = None, **vision) -> InternVLConfig:
    values = native_model().config.to_dict()
    values["vision_config"] |= vision
    return InternVLConfig.from_dict(values | (whole or {}))


def make_tower(changed: InternVLConfig) -> InternVLTower:
    """On its modules, with nothing at the values that a network begins with."""
    torch.manual_seed(0)
    tower = InternVLTower(changed, TILING).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.3 if "lambda" in name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    return tower


def encode(tower: InternVLTower, tiles: torch.Tensor = TILES) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack(tower(list(tiles)))


def fused_pair(changed: InternVLConfig) -> tuple[InternVLTower, InternVLTower]:
    plain = make_tower(changed)
    tower = copy.deepcopy(plain)
    tower.fuse()
    assert tower.fused is not None
    return plain, tower


def assert_alike(got: torch.Tensor, wanted: torch.Tensor, share: float = 1e-5) -> None:
    assert (got - wanted).norm() <= share * wanted.norm() > 0


KINDS = {
    "as it is": {},
    "no biases": {"attention_bias": False},
    "no positions": {"use_absolute_position_embeddings": False},
    "positions of larger tiles": {"image_size": [84, 84]},
    "transposed": {"whole": {"transposed_features": True}},
    "no neighbours": {"whole": {"downsample_ratio": 1.0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_tower_computes_what_its_modules_do(kind):
    plain, tower = fused_pair(config(**KINDS[kind]))
    wanted = encode(plain)
    assert_alike(encode(tower), wanted)
    # They share its weights, and go on to be right.
    tower.fused = None
    assert_alike(encode(tower), wanted)
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in plain.parameters())
    layer = tower.vision_tower.encoder.layer[0].attention
    assert layer.k_proj.weight.untyped_storage().data_ptr() == layer.q_proj.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "rms_norm"}, "no layer norms"),
        ({"use_qk_norm": True}, "queries and keys"),
        ({"hidden_act": "gelu_new"}, "activation is gelu_new"),
        ({"use_mean_pooling": False}, "normed once more"),
        ({"whole": {"vision_feature_layer": -2}}, "inner layer"),
    ],
)
def test_towers_of_another_kind_run_on_their_modules(changes, words):
    changed = config(**changes)
    tower = make_tower(changed)
    wanted = encode(tower)
    tower.fuse()
    assert tower.fused is None and words in internvl_fused.reason(tower.vision_tower, changed)
    assert torch.equal(encode(tower), wanted)


def test_in_16_bit_it_is_no_further_from_the_truth_than_the_modules():
    plain = make_tower(config())
    wanted = encode(plain)
    errors = []
    for fuse in (False, True):
        short = copy.deepcopy(plain)
        short = short.to(torch.bfloat16)
        short.restore(torch.device("cpu"))
        if fuse:
            short.fuse()
        errors.append(float((encode(short).float() - wanted).norm() / wanted.norm()))
    assert 0 < errors[1] <= 1.1 * errors[0] < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_the_kernels_give_the_tower_what_torch_gives(monkeypatch):
    plain = make_tower(config())
    monkeypatch.setattr(internvl_fused, "tower_ops", lambda _: TowerOps(patches.patch_rows, norm.layer_norm))
    tower = copy.deepcopy(plain)
    tower.fuse()
    assert_alike(encode(tower, TILES[:2]), encode(plain, TILES[:2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_computes_what_it_does_on_a_cpu():
    plain = make_tower(config())
    wanted = encode(plain)
    for dtype, share in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        moved = copy.deepcopy(plain).to("cuda", dtype)
        moved.restore(torch.device("cuda"))
        moved.fuse()
        assert_alike(encode(moved, TILES.cuda()).float().cpu(), wanted, share)


def test_a_warm_up_encodes_each_number_of_tiles_once():
    tower = make_tower(config())
    tower.fuse()
    seen = []
    tower.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    images = ImageEncoder(tower, torch.nn.Embedding(8, tower.hidden_size), 0)
    images.warm_up(99)
    assert seen == list(range(TILES_AT_ONCE, 0, -1)) and TILES_AT_ONCE == 16
    images.run_largest(99)
    assert seen[-1] == 16 and images.num_encoded == 0
