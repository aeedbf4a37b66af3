"""One question about one image: `RLAIFVChat`, and `python -m rlaifv.chat`.

    RLAIFVChat("openBMB/RLAIF-V-7B").chat({"image": "cat.jpg", "question": "What is it?"})

The call of the reference release. A LoRA checkpoint is given as its own folder; its base is the
one that its adapter_config.json names.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("chat")

import base64
import binascii
import io
import json
import sys
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image

from rlaifv.cli import ending
from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError
from rlaifv.models import load_local
from rlaifv.models.base import Decoding, Prompt
from rlaifv.places import local_path

NUM_BEAMS, MAX_NEW_TOKENS = 3, 1024
"""The release's for the 7B: beam search, no sampling."""
SAMPLED = Decoding(MAX_NEW_TOKENS, temperature=0.6, top_p=0.9, top_k=30, repetition_penalty=1.1)
"""The release's for the 12B, which samples three beams; here one, always with the same seed."""


class ChatInput(TypedDict):
    """What `RLAIFVChat.chat` takes."""

    image: str | bytes | Path | Image.Image
    """A path, base64 text, the bytes of a file, or a picture."""
    question: str


class RLAIFVChat:
    """A checkpoint that answers. Errors as for `rlaifv.models.load_model`."""

    def __init__(
        self, path: str, *, base: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> None:
        """`base`: of a LoRA checkpoint, instead of the one that it names."""
        adapter = local_path(path)
        config = adapter / "adapter_config.json"
        adapted = config.is_file()
        if adapted and base is None:
            base = json.loads(config.read_bytes()).get("base_model_name_or_path")
            if not base:
                raise ArtifactError(f"{config}: names no base_model_name_or_path; give one")
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        spec = {"path": base if adapted else path, "dtype": dtype, "batch_size": 1}
        self._model = load_local(ModelSpec.model_validate(spec))
        if adapted:
            from rlaifv.training.adapters import load_adapter  # PEFT takes seconds to import

            load_adapter(self._model.module, adapter)
        self._decoding = Decoding(max_new_tokens, num_beams=NUM_BEAMS)
        if self._model.module.config.model_type == "omnilmm":
            self._decoding = SAMPLED._replace(max_new_tokens=max_new_tokens)

    def chat(self, inputs: ChatInput) -> str:
        """The answer; raises ArtifactError when the image or the prompt cannot be used."""
        prompt = Prompt(image_bytes(inputs["image"]), inputs["question"])
        ((answer,),) = self._model.answer([prompt], decoding=self._decoding)
        return answer.text.strip()


def img2base64(path: str | Path) -> str:
    """The bytes of a file as base64 text."""
    return base64.b64encode(Path(path).read_bytes()).decode("ascii")


def image_bytes(image: str | bytes | Path | Image.Image) -> bytes:
    """An image in any of the forms of `ChatInput` as the bytes of a file."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:  # base64 is no file's name, or too long for one
        try:
            if isinstance(image, str):
                return base64.b64decode(image.rpartition("base64,")[2], validate=True)
        except binascii.Error:
            pass
        raise ArtifactError(
            f"image {str(image)[:80]!r}: neither a file that can be read nor base64: {error}"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or the error's exit code."""
    given = flags.chat().parse_args(arguments)

    def work() -> int:
        length = given.max_new_tokens or MAX_NEW_TOKENS
        model = RLAIFVChat(given.model, base=given.base, max_new_tokens=length)
        print(model.chat({"image": given.image, "question": given.question}))
        return 0

    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
