"""What a GPU runs, on the CPU: rows in a line with block masks, decoding over fixed buffers."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch.nn.attention import flex_attention

from rlaifv.config import LoraConfig
from rlaifv.models import kernels_plain, lines, steps
from rlaifv.models.base import Decoding, ImageQuestions
from rlaifv.models.branches import PackedRows, TokenRow, pack_line
from rlaifv.models.decoder import Decoder
from rlaifv.models.llava import layer_outputs
from rlaifv.models.shared_prefix import SharedPrefixModel
from rlaifv.training import adapters
from tests.models_kit import IMAGES, QUESTIONS, load_engine, make_prompts, make_rows, spec, with_eos
from tests.tiny import make_tiny_llava

UNFUSED = "ignore:flex_attention called without torch.compile:UserWarning"
pytestmark = pytest.mark.filterwarnings(UNFUSED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_eos(make_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture
def model(folder: Path) -> SharedPrefixModel:
    return load_engine(spec(folder))


@pytest.fixture
def in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "in_lines", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _rows() -> list[TokenRow]:
    return [
        TokenRow([1] * 150, [[2] * 40, [3] * 7, [4] * 90]),
        TokenRow([5] * 3, [[6]]),
        TokenRow([7] * 300, [[8] * 128, [9] * 20]),
    ]


def _line() -> PackedRows:
    return pack_line(_rows(), pad_id=0, multiple=lines.BLOCK)


def test_blocks_of_the_mask_are_those_of_the_dense_one() -> None:
    packed = _line()
    owners = lines.Owners(packed.segments_BL[0], packed.prefixes_BL[0])
    at_L = torch.arange(packed.ids_BL.shape[1])
    dense_LL = owners.visible(at_L[:, None], at_L[None, :])
    count = len(at_L) // lines.BLOCK
    tiles = dense_LL.view(count, lines.BLOCK, count, lines.BLOCK)
    tiles_QQXX = tiles.transpose(1, 2).flatten(2)
    mask = lines.block_mask(owners)
    full = _dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    some = _dense(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(full, tiles_QQXX.all(-1) & ~torch.eye(len(full), dtype=torch.bool))
    assert torch.equal(some | full, tiles_QQXX.any(-1))
    assert not (some & full).any()
    assert dense_LL.any(1).all(), "softmax of nothing"


def _dense(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    assert counts is not None
    assert indices is not None
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts.flatten().tolist()):
        dense[row, indices[0, 0, row, :count].long()] = True
    return dense


def dense_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """FlexAttention has no gradients on a CPU."""
    at_L = torch.arange(query.shape[2])
    mask_LL = options["block_mask"].mask_mod(at_L, at_L, at_L[:, None], at_L[None, :])
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_LL, scale=options["scale"], enable_gqa=True
    )


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "flex_attention", dense_attention)


@pytest.mark.usefixtures("in_lines", "dense")
def test_rows_in_a_line_score_like_padded_ones(folder: Path) -> None:
    model = load_engine(spec(folder))
    batch = model.encode_branches(make_rows())
    assert batch.packed.ids_BL.shape == (1, 128)
    weights = [
        model.module.model.multi_modal_projector.linear_1.weight,
        model.module.get_decoder().layers[0].self_attn.k_proj.weight,
        model.module.get_decoder().layers[-1].mlp.up_proj.weight,
    ]
    ours = torch.cat([part for row in model.branch_logps(batch) for part in row])
    plain = torch.cat([part for row in model.two_row_logps(make_rows()) for part in row])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    pairs = zip(
        torch.autograd.grad(ours.sum(), weights),
        torch.autograd.grad(plain.sum(), weights),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_verdicts_in_a_line_are_those_of_padded_rows(
    model: SharedPrefixModel, request: pytest.FixtureRequest
) -> None:
    rows = [ImageQuestions(image, QUESTIONS[: i + 1]) for i, image in enumerate(IMAGES)]
    padded = model.yes_no(rows)
    request.getfixturevalue("in_lines")
    for one, other in zip(model.yes_no(rows), padded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_over_fixed_buffers_are_the_same_texts(
    model: SharedPrefixModel,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    prompts = [
        prompt._replace(seeds=tuple(range(i % 4 + 1))) for i, prompt in enumerate(make_prompts())
    ]
    decoding = Decoding(24, temperature=temperature, top_k=50)
    expected = model.answer(prompts, decoding=decoding)
    request.getfixturevalue("in_lines")
    monkeypatch.setattr(steps, "FIRST_ROOM", 4)
    monkeypatch.setattr("rlaifv.models.decoder.LINE_TOKENS", 64)
    assert model.answer(prompts, decoding=decoding) == expected
    state = model.module.get_decoder().layers[0].self_attn
    assert state.q_proj.weight._base is state.v_proj.weight._base, "held once"


def test_the_tower_stops_at_the_layer_that_is_read(model: SharedPrefixModel) -> None:
    tower = model.module.model.vision_tower
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    every = tower(pixels, output_hidden_states=True).hidden_states
    for index in (-2, 1, -1):
        assert torch.equal(layer_outputs(tower, pixels, index), every[index])


def test_bytes_normalised_on_the_device_are_what_the_processor_makes(model: Any) -> None:
    prompter = model._prompter
    (whole,) = prompter.read(IMAGES[:1], [0], raw=False)
    (raw,) = prompter.read(IMAGES[:1], [0], raw=True)
    assert raw.result().dtype == torch.uint8
    torch.testing.assert_close(
        prompter.normalised(raw.result()), whole.result(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.usefixtures("in_lines", "dense")
def test_checkpointing_in_a_line_changes_no_gradient(model: SharedPrefixModel) -> None:
    weight: Tensor = model.module.get_decoder().layers[0].mlp.down_proj.weight
    batch = model.encode_branches(make_rows())

    def gradient() -> Tensor:
        logps = torch.cat([part for row in model.branch_logps(batch) for part in row])
        return torch.autograd.grad(logps.sum(), weight)[0]

    kept = gradient()
    for layer in model.module.get_decoder().layers:
        layer.gradient_checkpointing = True
    model.module.train()
    assert torch.equal(gradient(), kept)


@pytest.mark.usefixtures("in_lines", "dense")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_with_dropout_are_recomputed_whole_and_draw_the_same_numbers(
    model: SharedPrefixModel, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    config = LoraConfig(rank=4, dropout=dropout)
    adapters.attach(cast(Any, model.module), config, base="tiny")
    trained = [part for part in model.module.parameters() if part.requires_grad]
    for part in trained:  # or B, zero at first, hides what A does
        torch.nn.init.normal_(part, std=0.1)
    batch = model.encode_branches(make_rows())
    inner: list[Any] = []
    whole = lines._recomputed_layer

    def spy(layer: Any, *rest: Any) -> Tensor:
        inner.append(layer)
        return whole(layer, *rest)

    monkeypatch.setattr(lines, "_recomputed_layer", spy)

    def gradients() -> list[Tensor]:
        torch.manual_seed(7)
        logps = torch.cat([part for row in model.branch_logps(batch) for part in row])
        return list(torch.autograd.grad(logps.sum(), trained))

    model.module.train()
    kept, layers = gradients(), model.module.get_decoder().layers
    for layer in layers:
        layer.gradient_checkpointing = True
    for one, other in zip(gradients(), kept, strict=True):
        assert torch.equal(one, other)
    assert len(inner) == (0 if dropout else len(layers) - 1)


@pytest.fixture
def compiler() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()  # what was compiled here concerns no other test


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_layers_are_compiled_once_for_lengths_that_are_known_to_divide(
    model: SharedPrefixModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU up to the partition into forward and backward; no kernels are made."""
    lengths, real = list[str](), cast(Any, lines.compiled)

    def backend(graph: Any, inputs: Any) -> Any:
        parts = [node for part in graph.modules() for node in getattr(part, "graph", graph).nodes]
        lengths.extend(
            str(node.args[0].meta["example_value"].shape[2])
            for node in dict.fromkeys(parts)
            if "flex_attention" in str(node.target)
        )
        return aot_eager_decomp_partition(graph, inputs)

    def as_on_a_gpu(function: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
            return real.__wrapped__(function)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(lines, "compiled", functools.cache(as_on_a_gpu))
    decoder = model.module.get_decoder().train()
    weights = [decoder.layers[0].mlp.down_proj.weight, decoder.layers[0].self_attn.q_proj.weight]
    for repeats in (1, 2, 3):
        packed = pack_line(_rows() * repeats, pad_id=0, multiple=lines.BLOCK)
        owners = lines.Owners(packed.segments_BL[0], packed.prefixes_BL[0])
        found = []
        for recomputed in (False, True):
            for layer in decoder.layers:
                layer.gradient_checkpointing = recomputed
            embeds = decoder.embed_tokens(packed.ids_BL).detach()
            sources = torch.tensor([149, 160])
            hidden = lines.run(decoder, embeds, packed.positions_BL, owners, sources)
            found.append([hidden, *torch.autograd.grad(hidden.square().sum(), weights)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert {re.sub(r"\bs\d+", "s", length) for length in lengths} == {"128*s"}
    assert len(lengths) == 3, "kept, recomputed, and that one's inner part"


def random_step(groups: int) -> dict[str, Any]:
    """Arguments of the attention kernels: 2 prompts of different length, 3 samples each."""
    generator = torch.Generator().manual_seed(groups)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kv_heads, width, total = 2, 16, 150
    return {
        "qkv": rand(6, (groups * kv_heads + 2 * kv_heads) * width),
        "angles": rand(6, width // 2).repeat(1, 2),
        "prefix": (rand(kv_heads, total, width), rand(kv_heads, total, width)),
        "spans": (torch.tensor([0, 30]).int(), torch.tensor([30, 120]).int()),
        "private": (rand(6, kv_heads, 80, width), rand(6, kv_heads, 80, width)),
        "step": torch.tensor([70]).int(),
    }


def run_kernels(ops: Any, groups: int) -> list[Tensor]:
    """Everything that a layer's kernels leave."""
    made = random_step(groups)
    keys, values = (part.clone() for part in made["private"])
    x, delta, weight = made["qkv"].clone(), made["qkv"].flip(0), made["qkv"][0].clone()
    query = ops.rotate_and_keep(
        made["qkv"], made["angles"].cos(), made["angles"].sin(), keys, values, made["step"]
    )
    prefix = ops.prefix_attention(query, *made["prefix"], *made["spans"], 0.25)
    mixed = ops.private_attention(query, keys, values, made["step"], prefix, 0.25)
    normed = ops.add_norm(x, delta, weight, 1e-5)
    first = ops.add_norm(x, None, weight, 1e-5)
    return [query, keys, values, *prefix, mixed, normed, x, first, ops.gate(made["qkv"])]


@pytest.mark.parametrize("groups", [1, 6])
def test_prefix_and_own_tokens_merge_to_plain_attention(groups: int) -> None:
    made = random_step(groups)
    query, keys, values, _, _, mixed, *_ = run_kernels(kernels_plain, groups)
    for row in range(6):
        start, length = (int(part[row // 3]) for part in made["spans"])
        both = [
            torch.cat([shared[:, start : start + length], own[row, :, :71]], 1)
            for shared, own in zip(made["prefix"], (keys, values), strict=True)
        ]
        all_keys, all_values = (part.repeat_interleave(groups, 0) for part in both)
        weights = (torch.einsum("hd,hld->hl", query[row], all_keys) * 0.25).softmax(-1)
        expected = torch.einsum("hl,hld->hd", weights, all_values).flatten()
        torch.testing.assert_close(mixed[row], expected)


@pytest.mark.slow
def test_triton_kernels_compute_what_the_plain_ones_do() -> None:
    """In Triton's interpreter, which must be chosen before the import."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_models_lines"], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def _compare_kernels() -> None:
    from rlaifv.models import kernels

    for groups in (1, 6):
        pairs = zip(run_kernels(kernels, groups), run_kernels(kernels_plain, groups), strict=True)
        for number, (one, other) in enumerate(pairs):
            message = f"output {number}, {groups} queries per key"
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=message)


if __name__ == "__main__":
    _compare_kernels()
