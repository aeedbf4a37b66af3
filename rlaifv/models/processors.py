"""Loading a checkpoint's processor, also where its video part cannot be: that needs torchvision."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from rlaifv.errors import ArtifactError


def load_processor(source: str) -> ProcessorMixin:
    """The processor in the folder `source`, with PIL's image transform.

    Raises ArtifactError when it cannot be loaded.
    """
    try:
        return AutoProcessor.from_pretrained(source, local_files_only=True, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        if "video" in str(error).lower():
            return _without_video(source)
        raise ArtifactError(f"{source}: the processor cannot be loaded: {error}") from error


class _NoVideo:
    """In the place of a video processor: settings are the image processor's, videos are refused."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, *_videos: Any, **_options: Any) -> Any:
        raise ArtifactError("videos need torchvision")


def _without_video(source: str) -> ProcessorMixin:
    try:
        known: Any = PROCESSOR_MAPPING[
            type(AutoConfig.from_pretrained(source, local_files_only=True))
        ]
        image_processor = AutoImageProcessor.from_pretrained(
            source, local_files_only=True, backend="pil"
        )
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        parts = {
            "image_processor": image_processor,
            "tokenizer": tokenizer,
            "video_processor": _NoVideo(image_processor),
        }

        class WithoutVideo(known):  # type: ignore[misc]
            def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
                if isinstance(argument, _NoVideo):
                    return _NoVideo
                return super().check_argument_for_proper_class(name, argument)

            def to_dict(self) -> dict[str, Any]:
                return {k: v for k, v in super().to_dict().items() if not isinstance(v, _NoVideo)}

        values, _ = known.get_processor_dict(source, local_files_only=True)
        WithoutVideo.__name__ = known.__name__
        arguments = [parts[name] for name in known.get_attributes()]
        processor: ProcessorMixin = WithoutVideo.from_args_and_dict(arguments, values)
        return processor
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ArtifactError(f"{source}: the processor cannot be loaded: {error}") from error
