"""A folder of random weights whose code lies beside them: `python -m tests.tiny_remote FOLDER`.

It has the public interface of MiniCPM-Llama3-V 2.5 and can be made and read with transformers 4.40
(where that model's own code runs) and with 5.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CODE = Path(__file__).parent / "remote_code"
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "</image>", "<|eot_id|>")
WORDS = (
    "yes Yes no No Is there a dog in the image ? Please answer or . red cup Do you see on table "
    "USER: ASSISTANT: What is it Describe A runs 1 near blue chair lamp wooden window"
)
TEMPLATE = (
    "<s>{% for message in messages %}USER: {{ message['content'] }} <|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_tiny_remote(path: Path, *, seed: int = 0) -> Path:
    """Weights, tokenizer and code in `path`."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS.split()]))}
    inner = Tokenizer(models.WordLevel(vocabulary, **{"unk_token": SPECIAL[0]}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=list(SPECIAL[3:]),
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    modeling = importlib.import_module("tests.remote_code.modeling_tiny")
    config = importlib.import_module("tests.remote_code.configuration_tiny").TinyConfig(
        **{"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2},
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    modeling.TinyRemote(config).save_pretrained(path)
    for code in sorted(CODE.glob("*.py")):
        shutil.copyfile(code, path / code.name)
    values = json.loads((path / "config.json").read_text())
    values["auto_map"] = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModel": "modeling_tiny.TinyRemote",
    }
    (path / "config.json").write_text(json.dumps(values))
    named = {
        "processor_class": "TinyProcessor",
        "auto_map": {"AutoProcessor": "processing_tiny.TinyProcessor"},
    }
    (path / "processor_config.json").write_text(json.dumps(named))
    return path


if __name__ == "__main__":
    print(make_tiny_remote(Path(sys.argv[1])))
