"""The engine behind `claim`."""

from jobs._entry import Job
from jobs._models import describe_model
from rlaifv.claiming import ModelSplitter, RuleSplitter, Splitter


def load_splitter(job: Job) -> Splitter:
    """The rules, or a chat model."""
    config = job.config.claim
    if config.model.family == "rules":
        return RuleSplitter()
    from rlaifv.models import load_text_model  # torch: not for the rules
    from rlaifv.models.base import Decoding

    job.notes["model"] = describe_model(config.model)
    decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p)
    return ModelSplitter(load_text_model(config.model), config, decoding, seed_of=job.seed)
