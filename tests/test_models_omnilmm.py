"""OmniLMM-12B: its parts against formulas and timm, its checkpoints, prompt, answers, training."""

import json
import math
from pathlib import Path
from shutil import copytree

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlaifv.chat import ChatInput, RLAIFVChat, img2base64
from rlaifv.config import LoraConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.images import decode
from rlaifv.models import load_trainable
from rlaifv.models.base import Branches, Decoding, ImageQuestions, Prompt
from rlaifv.models.check import CHECKS, main
from rlaifv.models.eva import EvaTower, TowerShape
from rlaifv.models.omnilmm import (
    CLIP_MEAN,
    CLIP_STD,
    OmniLMMConfig,
    OmniLMMForCausalLM,
    Resampler,
    published,
    rename,
    sincos_table,
)
from rlaifv.models.random_weights import OMNILMM_12B, TINY_OMNILMM, save_random_omnilmm
from rlaifv.models.shared_prefix import SharedPrefixModel
from rlaifv.training import train
from tests.models_kit import IMAGES, QUESTIONS, spec
from tests.timm_tower import GOLDEN, SIZES, SMALL, digest, fill, pixels, shapes
from tests.training_support import Folders, make_pair, make_request, reference_logps, with_config

Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_omnilmm(tmp_path_factory.mktemp("omni"), TINY_OMNILMM)


@pytest.fixture
def model(folder: Path) -> SharedPrefixModel:
    loaded = load_trainable(spec(folder))
    assert isinstance(loaded, SharedPrefixModel)
    return loaded


# --- parts -------------------------------------------------------------------------------------


def test_the_tower_has_the_names_and_the_outputs_of_timms() -> None:
    golden = np.load(GOLDEN)
    with torch.device("meta"):
        assert digest(shapes(EvaTower(TowerShape()))) == str(golden["full"])
    tower = fill(EvaTower(SMALL))
    assert digest(shapes(tower)) == str(golden["small"])
    with torch.inference_mode():
        for size in SIZES:
            expected = torch.from_numpy(golden["{}x{}".format(*size)])
            torch.testing.assert_close(tower(pixels(size)), expected, atol=1e-5, rtol=0)


def test_positions_of_the_resampler_are_sines_and_cosines_of_column_and_row() -> None:
    width, side = 16, 3
    table = sincos_table(width, side)
    for row in range(side):
        for column in range(side):
            expected = [
                wave(where / 10000 ** (i / (width / 4)))
                for where in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(width // 4)
            ]
            assert table[row * side + column].tolist() == pytest.approx(expected, abs=1e-6)


def cubic(table: Array, size: int) -> Array:
    """Bicubic interpolation (a = -0.75) of [n, n, W] by its definition; borders are repeated."""
    n, a = len(table), -0.75

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = np.zeros((size, n))
    for i in range(size):
        place = (i + 0.5) * n / size - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(k, 0), n - 1)] += kernel(place - k)
    stretched: Array = np.einsum("ia,jb,abw->ijw", weights, weights, table)
    return stretched


@pytest.mark.parametrize("side", [3, 5, 2])
def test_the_resampler_computes_attention_over_stretched_positions(side: int) -> None:
    queries, width, heads, features = 9, 16, 4, 10
    module = Resampler(queries=queries, width=width, heads=heads, features=features)
    table = module.pos_embed.clone()
    fill(module)
    module.pos_embed.copy_(table)
    w = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(2, side * side, features))

    def norm(values: Array, name: str) -> Array:
        mean, var = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
        normed: Array = (values - mean) / np.sqrt(var + 1e-6) * w[f"{name}.weight"]
        normed += w[f"{name}.bias"]
        return normed

    stretched = cubic(table.double().numpy().reshape(3, 3, width), side).reshape(-1, width)
    values = norm(x @ w["kv_proj.weight"].T, "ln_kv")
    inputs = (norm(w["query"], "ln_q") + w["pos_embed"], values + stretched, values)
    parts = np.split(w["attn.in_proj_weight"], 3), np.split(w["attn.in_proj_bias"], 3)
    q, k, v = (each @ m.T + b for each, m, b in zip(inputs, *parts, strict=True))
    expected = np.zeros((2, queries, width))
    for image in range(2):
        for head in range(heads):
            cut = slice(head * width // heads, (head + 1) * width // heads)
            scores = np.exp(q[:, cut] @ k[image][:, cut].T / math.sqrt(width / heads))
            expected[image][:, cut] = scores / scores.sum(-1, keepdims=True) @ v[image][:, cut]
    expected = expected @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
    expected = norm(expected, "ln_post") @ w["proj"]
    with torch.inference_mode():
        out = module(torch.from_numpy(x).float())
    assert out.numpy() == pytest.approx(expected, abs=1e-5)


# --- checkpoints -------------------------------------------------------------------------------


def test_the_published_names_are_complete_for_the_12b() -> None:
    config = OmniLMMConfig(vocab_size=32009, **OMNILMM_12B)
    with torch.device("meta"):
        module = OmniLMMForCausalLM(config)
    names = published(module.state_dict())
    layer: tuple[str, ...] = (
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.down_proj",
        "mlp.gate_proj",
    )
    layer += ("mlp.up_proj", *(f"self_attn.{x}_proj" for x in "qkvo"))
    decoder = {f"model.layers.{n}.{part}.weight" for n in range(32) for part in layer}
    decoder |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    resampler = {f"ln_{x}.{kind}" for x in ("q", "kv", "post") for kind in ("weight", "bias")}
    resampler |= {"query", "pos_embed", "kv_proj.weight", "proj", "attn.in_proj_weight"}
    resampler |= {"attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"}
    tower = {f"model.vision_tower.{name}" for name in shapes(module.model.vision_tower)}
    assert names.keys() == decoder | {f"model.resampler.{name}" for name in resampler} | tower
    assert rename([*names, "model.layers.0.self_attn.rotary_emb.inv_freq"]) == dict(
        zip(names, module.state_dict(), strict=True)
    )
    assert names["model.resampler.pos_embed"].shape == (256, 4096)
    assert sum(tensor.numel() for tensor in names.values()) == pytest.approx(11.6e9, rel=0.01)


def test_every_way_of_keeping_the_weights_loads(folder: Path, tmp_path: Path) -> None:
    rows = [Branches(IMAGES[0], "What?", ("A dog.",))]
    ((expected,),) = load_trainable(spec(folder)).sequence_logps(rows)
    weights = load_file(folder / "model.safetensors")
    for variant in ("bin", "sharded"):
        copy = copytree(folder, tmp_path / variant)
        (copy / "model.safetensors").unlink()
        if variant == "bin":
            torch.save(weights, copy / "pytorch_model.bin")
        else:
            where = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(weights)}
            for shard in set(where.values()):
                held = {name: weights[name] for name in weights if where[name] == shard}
                save_file(held, copy / shard)
            (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        ((logps,),) = load_trainable(spec(copy)).sequence_logps(rows)
        assert logps.tolist() == expected.tolist()
    (copy / "model-1.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-1\.safetensors: shard is missing"):
        load_trainable(spec(copy))


def test_a_checkpoint_without_its_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    save_file(kept, copy / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"missing keys, first model\.vision_tower\."):
        load_trainable(spec(copy))


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OmniLMM has its own"):
        load_trainable(spec(folder).model_copy(update={"prompt": "llava_v1"}))
    copy = copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for change, message in (
        ({"mm_use_im_start_end": False}, "mm_use_im_start_end is False"),
        ({"num_query": 5}, "num_query is 5, expected a square"),
        ({"im_patch_token": 7}, "expected three tokens, the first 7"),
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            load_trainable(spec(copy))


# --- prompts and images ------------------------------------------------------------------------


def test_the_prompt_is_zephyrs_and_an_answer_is_what_follows_it(model: SharedPrefixModel) -> None:
    prompter = model._prompter
    tokenizer = prompter._tokenizer
    system = (
        "You are an artificial intelligence assistant, which gives helpful, detailed, and polite "
        "answers to the human's questions."
    )
    image = "<im_start>" + 4 * "<im_patch>" + "<im_end>"
    text = f"<|system|>\n{system}</s>\n<|user|>\n{image}\nWhat is it?</s>\n<|assistant|>\n"
    expected = tokenizer(text)["input_ids"]
    ids = prompter.with_image(prompter.prompt("What is it?", row=0), 4)
    assert ids == expected
    whole = tokenizer(f"{text}A red cup.</s>")["input_ids"]
    assert ids + prompter.answer("A red cup.") == whole
    with pytest.raises(ArtifactError, match="row 3: the prompt has 2 image placeholders"):
        prompter.prompt("What is <im_patch>?", row=3)


def test_a_picture_is_squeezed_into_a_square_and_normalised(model: SharedPrefixModel) -> None:
    (pixels,) = model._prompter.pixels([IMAGES[0]], [0])
    resized = np.asarray(decode(IMAGES[0]).resize((40, 40), 3)).astype(np.float64)
    expected = (resized / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert pixels.permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)


# --- as policy and labeller --------------------------------------------------------------------


def test_it_conforms(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.count("holds") == len(CHECKS)


def plain_logits(model: SharedPrefixModel, image: bytes, question: str, tail: list[int]) -> Tensor:
    """Through the module's own forward, one row."""
    prompter = model._prompter
    ids = [*prompter.with_image(prompter.prompt(question, row=0), 4), *tail]
    with torch.inference_mode():
        logits: Tensor = model.module(
            input_ids=torch.tensor([ids]), pixel_values=prompter.pixels([image], [0])
        ).logits
    return logits[0]


def test_it_answers_and_labels_as_its_own_forward(model: SharedPrefixModel) -> None:
    ((answer,),) = model.answer([Prompt(IMAGES[0], "What?")], decoding=Decoding(5))
    tokens: list[int] = []
    while len(tokens) < answer.num_tokens:
        tokens.append(int(plain_logits(model, IMAGES[0], "What?", tokens)[-1].argmax()))
    assert answer == model._prompter.generation(tokens, model._eos_ids)
    (verdicts,) = model.yes_no([ImageQuestions(IMAGES[1], QUESTIONS)])
    ids = model._prompter._tokenizer.convert_tokens_to_ids(["yes", "Yes", "no", "No"])
    for question, verdict in zip(QUESTIONS, verdicts, strict=True):
        p = plain_logits(model, IMAGES[1], question, [])[-1].softmax(-1)[ids]
        assert verdict == pytest.approx((float(p[:2].sum()), float(p[2:].sum())), abs=1e-6)


def test_a_sliding_window_is_not_overrun(folder: Path, tmp_path: Path) -> None:
    copy = copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    with pytest.raises(ArtifactError, match="more than 64"):
        load_trainable(spec(copy)).yes_no([ImageQuestions(IMAGES[0], QUESTIONS)])


def test_chat_answers_from_a_path_base64_and_a_picture(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(IMAGES[0])
    chat = RLAIFVChat(str(folder), max_new_tokens=6)
    forms: list[ChatInput] = [
        {"image": image, "question": "What?"}
        for image in (str(path), img2base64(path), decode(IMAGES[0]))
    ]
    answers = {chat.chat(form) for form in forms}
    assert len(answers) == 1
    assert answers.pop()


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4)])
def test_it_trains_and_what_is_trained_loads(
    folder: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    pairs = [make_pair(index) for index in range(10)]
    request = make_request(spec(folder), reference_logps(spec(folder), pairs))
    request = with_config(request._replace(base=str(folder), steps=(2,)), lora=lora)
    sink = Folders(tmp_path)
    train(request, sink)
    assert sink.metrics[0].loss == pytest.approx(math.log(2), abs=1e-4)
    made = tmp_path / f"checkpoint-{sink.offered[-1]}"
    if lora is not None:
        names = load_file(made / "adapter_model.safetensors")
        assert not [name for name in names if "vision_tower" in name]
        assert any("resampler" in name for name in names)
        assert RLAIFVChat(str(made), max_new_tokens=4).chat({"image": IMAGES[0], "question": "a"})
        return
    before, after = (load_file(where / "model.safetensors") for where in (folder, made))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fixed = {name for name in before if "vision_tower" in name or name.endswith("pos_embed")}
    assert not changed & fixed
    assert {"model.resampler.proj", "model.layers.0.mlp.up_proj.weight"} <= changed
    rows = [Branches(IMAGES[0], "What?", ("A dog.",))]
    ((one,),), ((two,),) = (load_trainable(spec(f)).sequence_logps(rows) for f in (folder, made))
    assert not np.allclose(one, two)
