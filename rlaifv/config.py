"""Everything that may change a number: one frozen `RunConfig`, one section per stage.

Defaults are the paper's (arXiv 2405.17220) or, where it is silent, the reference release's
(RLHF-V/RLAIF-V at 83d917b); each field says which. Cluster facts are not here: they must not
change results.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlaifv.trust import trusted

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Labelling = Literal["prepare", "sample", "claim", "verify", "pair"]
Training = Literal["reflogp", "train", "respond", "grade", "choose", "merge"]
StageName = Literal[Labelling, Training]
"""In the pipeline's order; `rlaifv.pipeline.STAGES` says what each does."""


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EndpointConfig(Section):
    """An OpenAI-compatible server that runs a model. Its key comes from OPENAI_API_KEY."""

    url: Annotated[str, Field(min_length=1)]
    """Base URL, usually ending in `/v1`."""
    concurrency: Positive = 16
    attempts: Positive = 6
    """Requests per prompt before the shard is given back to be tried again."""
    timeout_seconds: PositiveFloat = 120.0
    backoff_seconds: PositiveFloat = 1.0
    """Wait before the second request; doubles up to 60 s, with jitter, or as the server says."""
    top_logprobs: Positive = 20
    """Tokens whose probabilities are asked for when labelling; OpenAI's and vLLM's most is 20."""
    label_token_ids: tuple[int, ...] = ()
    """Or the model's ids of yes, Yes, no, No: exact, where the server takes `logprob_token_ids`."""
    input_price: Annotated[float, Field(ge=0)] = 0.0
    """Per million tokens, in the currency of your choice: the provenance sums up the cost."""
    output_price: Annotated[float, Field(ge=0)] = 0.0


PromptName = Literal["auto", "chat_template", "llava_v1", "vicuna_v1"]


class ModelSpec(Section):
    """Which model, and how it is run."""

    path: Annotated[str, Field(min_length=1)]
    """A folder, a hub id, a store URI, or `package:<module>/<folder>` for shipped weights."""
    family: Literal["auto", "llava", "omnilmm", "minicpmv", "rules", "text"] = "auto"
    """`auto` reads the checkpoint's config; `rules` is the claim splitter without a model."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run the code beside the weights (`minicpmv` only); `revision` is then a commit."""
    prompt: PromptName = "auto"
    """`auto`: the checkpoint's chat template if it has one, else `llava_v1`, as the release."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Reference release: fp16 for sampling, bf16 for training; bf16 for both here."""
    batch_size: Annotated[int, Field(ge=0)] = 8
    """Prompts, images (verifying) or pairs (log-probs) per forward; 0: as many as fit, by trying."""
    endpoint: EndpointConfig | None = None
    """None: the model is run here; else `path` is the server's name of it (not for training)."""

    @model_validator(mode="after")
    def _code_is_trusted_on_purpose(self) -> Self:
        return trusted(self)


class PrepareConfig(Section):
    """Where instructions come from."""

    source: Annotated[str, Field(min_length=1)] = "openbmb/RLAIF-V-Dataset"
    """JSONL, parquet (file or folder), a folder of images, or a hub id with RLAIF-V's columns."""
    questions: str | None = None
    """For a folder of images: a text file with one question per line; default: our own list."""
    instructions_per_iteration: Positive = 4000
    """About 4k instructions per iteration (paper, section 3)."""
    when_exhausted: Literal["stop", "reuse"] = "stop"
    """What happens when the source has no unused instructions left."""
    max_image_pixels: Positive = 50_000_000
    """Larger images are quarantined."""


class SampleConfig(Section):
    """How candidate answers are drawn (paper: 10 answers under one decoding setting)."""

    num_answers: Annotated[int, Field(ge=2)] = 10
    temperature: PositiveFloat = 0.7
    """The release's value."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 50
    """transformers' default, which the release leaves in place; 0: off."""
    repetition_penalty: PositiveFloat = 1.0
    max_new_tokens: Positive = 512


class ClaimConfig(Section):
    """How answers are split into claims and claims turned into questions."""

    model: ModelSpec = ModelSpec(path="rules", family="rules")
    split_prompt: str | None = None
    """File with a prompt that replaces our own; `{question}` and `{answer}` are filled in."""
    question_prompt: str | None = None
    """File with a prompt that replaces our own; `{claims}` is filled in."""
    temperature: NonNegative = 0.2
    """Release: 0.2, top-p 0.9."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: Positive = 1024
    """Release: 256, which cuts long lists; ours never truncates silently."""


class VerifyConfig(Section):
    """How the labeller is asked."""

    labeller: ModelSpec = ModelSpec(path="llava-hf/llava-v1.6-34b-hf")
    """The paper's labeller of the 7B policy is LLaVA-NeXT-34B."""
    suffix: str = " Please answer yes or no."
    """Appended to every question, as the release does."""
    control: Literal["none", "shuffled"] = "none"
    """`shuffled`: verdicts are dealt at random among the claims of a group, seeded. The control
    experiment: training on them must not help."""


class PairConfig(Section):
    """Which answers become preference pairs."""

    min_margin: Positive = 1
    """Smallest difference of scores (= minus rejected claims); release: 1."""
    max_per_image: Positive = 2
    """At most this many pairs per image (release: 2 per `ds_question_id`)."""
    limit_by: Literal["image", "question"] = "image"
    pick: Literal["random", "closest_length"] = "random"
    """Which of the possible pairs are taken; `random` is the release's rule."""
    balance_length: bool = True
    """The release's search for the length ratio that evens out mean lengths."""


class LoraConfig(Section):
    """Adapters on every linear layer of the language model (release's LoRA script)."""

    rank: Positive = 64
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    train_projector: bool = True
    """On in the release; the projector is then saved with each checkpoint."""


class LossConfig(Section):
    """What DPO minimises, `rlaifv.dpo.preference_losses`; the default is the paper's loss."""

    kind: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round; `sigmoid` becomes cDPO."""
    average: bool = False
    """Answers count with their mean per token (release: `dpo_use_average`; IPO's authors do so)."""
    changed_token_weight: PositiveFloat = 1.0
    """Weight of tokens in which the two answers differ: not 1 is DDPO (RLHF-V)."""
    sft_weight: NonNegative = 0.0
    """Of the chosen answer's negative log-probability (release: `SFT_weight`)."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing has no meaning with kind={self.kind}")
        return self


class TrainConfig(Section):
    """DPO (paper, equation 2; release's `llava15_train.sh`)."""

    learning_rate: PositiveFloat = 5e-7
    """Full fine-tuning 5e-7; the LoRA recipe sets 1e-5."""
    beta: PositiveFloat = 0.1
    epochs: Positive = 4
    global_batch_size: Positive = 8
    """Pairs per optimiser step, whatever the number of processes."""
    micro_batch_size: Positive = 1
    """Pairs per forward pass and process."""
    warmup_ratio: Fraction = 0.05
    weight_decay: NonNegative = 0.01
    max_grad_norm: PositiveFloat = 1.0
    checkpoints_per_epoch: Positive = 4
    """A candidate every quarter of an epoch."""
    min_pairs: Positive = 8
    """With fewer pairs the iteration keeps its policy, and the choice says so."""
    max_length: Positive = 2048
    """Longest prompt + answer in tokens; `reflogp` sets longer pairs aside, with their ids."""
    gradient_checkpointing: bool = False
    loss: LossConfig = LossConfig()
    zero_stage: Literal[0, 2, 3] = 0
    """DeepSpeed: 2 spreads gradients and optimiser over the processes, 3 the weights as well."""
    offload: bool = False
    """Keep the optimiser in host memory; needs `zero_stage` 2 or 3."""
    lora: LoraConfig | None = None
    """None: full fine-tuning of language model and projector."""
    keep_unselected: bool = False
    """Keep the trees of checkpoints that were not chosen."""

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> Self:
        if self.offload and not self.zero_stage:
            raise ValueError("offload needs zero_stage 2 or 3")
        return self


class JudgeConfig(Section):
    """An OpenAI-compatible endpoint that grades answers. Its key comes from the environment."""

    url: Annotated[str, Field(min_length=1)]
    """Base URL, usually ending in `/v1`."""
    model: str | None = None
    """None: the judge of the published scores (docs/benchmarks.md)."""
    prompt: str | None = None
    """File with a prompt that replaces our own wording."""
    temperature: NonNegative = 0.0
    """Release: 0 (MMHal-Bench), 1e-5 (RefoMB), 0.2 (Object HalBench's extraction)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    """Repeat r asks with seed + r."""
    repeats: Positive | None = None
    """Judgings per answer. None: 3 for RefoMB (its README recommends several), 1 otherwise."""
    swap: bool = False
    """RefoMB: ask in both orders of the two answers (the release asks in one)."""
    max_tokens: Positive | None = None
    """None: the release's: 512, for RefoMB 2048."""
    concurrency: Positive = 16
    attempts: Positive = 6
    """Requests per item before it counts as lost; the release tries 100 times or for ever."""
    timeout_seconds: PositiveFloat = 120.0
    backoff_seconds: PositiveFloat = 1.0
    """Wait before the second request; doubles up to 60 s, with jitter, or as the endpoint says."""
    input_price: NonNegative | None = None
    """Per million tokens, in any currency; None: cost is not estimated."""
    output_price: NonNegative | None = None


class BenchmarkSpec(Section):
    """One benchmark: its files, what it is for, how it is graded."""

    name: Annotated[str, Field(min_length=1)]
    kind: Literal["objects", "object_halbench", "mmhal", "refomb", "amber"] = "objects"
    path: Annotated[str, Field(min_length=1)]
    """Questions with images and ground truth; the format depends on `kind` (AMBER: a folder)."""
    vocabulary: str | None = None
    """Synonym table, one object class per line, entries separated by `, `, class name first."""
    images: str | None = None
    """Folder of the images that the questions name; default: the questions' own folder."""
    mode: Literal["judge", "rules", "chair", "vectors", "exact"] | None = None
    """Object HalBench: judge, rules or chair; AMBER: vectors or exact. None: `judge` with a judge
    and `rules` without; `vectors` when the vectors are installed, else `exact`."""
    coco: str | None = None
    """Object HalBench: folder of the COCO 2014 annotation files."""
    nltk_data: str | None = None
    """Folder with NLTK's data; default: where NLTK looks."""
    judge: JudgeConfig | None = None
    use: Literal["select", "report"] = "report"
    """`select`: the checkpoint is chosen on it; `report`: it never influences the choice."""


class RespondConfig(Section):
    """How benchmark questions are answered."""

    benchmarks: tuple[BenchmarkSpec, ...] = ()
    num_beams: Positive = 3
    """The release evaluates with 3 beams at temperature 0."""
    max_new_tokens: Positive = 1024

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks: names must differ, got {names}")
        return self


class Criterion(Section):
    """One figure that checkpoints are compared by."""

    metric: Annotated[str, Field(min_length=1)]
    """`recall`: its mean over the benchmarks that select; `mmhal/score`: of that one only."""
    better: Literal["lower", "higher"] = "lower"
    weight: PositiveFloat = 1.0
    """In the weighted mean over the criteria, which decides."""


class HeldOutConfig(Section):
    """Questions that nothing else uses, to choose on where no benchmark has `use: select`.

    `prepare` sets them aside: a picture that is among them is in no instruction.
    """

    coco: str | None = None
    """Folder of the COCO 2014 annotation files. With it, `images` and `vocabulary`: CHAIR (mode
    `chair`, no judge) on COCO images. Without: the labeller's rejected claims on instructions."""
    images: str | None = None
    """Folder of COCO images; they keep their names."""
    vocabulary: str | None = None
    """CHAIR's synonym table."""
    nltk_data: str | None = None
    exclude: tuple[str, ...] = ()
    """Files with ids or names of further images that must not be taken."""
    num_images: Positive = 500
    num_instructions: Positive = 200
    """Of a source with fewer than five times as many rows a fifth is held out."""

    @model_validator(mode="after")
    def _coco_is_whole(self) -> Self:
        given = {"coco": self.coco, "images": self.images, "vocabulary": self.vocabulary}
        lacking = [name for name, value in given.items() if value is None]
        if 0 < len(lacking) < len(given):
            raise ValueError(f"coco, images and vocabulary go together: {lacking[0]} is missing")
        return self


class ChooseConfig(Section):
    """How the checkpoint of an iteration is chosen."""

    rule: Literal["held_out", "paper"] = "held_out"
    """`held_out`: by the criteria on what selects, with guards on recall and length.
    `paper`: the same criteria without guards, for choosing on the benchmarks that are reported, as
    the authors did (Object HalBench and MMHal-Bench); the reason says so."""
    held_out: HeldOutConfig | None = None
    """What selects where no benchmark has `use: select`; None: the last checkpoint is taken."""
    criteria: tuple[Criterion, ...] = ()
    """Empty: `response_hallucination`, or `rejected_claims` on held-out instructions; lower wins."""
    tie_break: Literal["earliest", "latest", "recall"] = "earliest"
    """`recall`: the highest, then the earliest. The starting policy counts as the earliest."""
    max_recall_drop: Fraction = 0.02
    """Absolute, against the starting policy, on what selects."""
    max_length_drop: Fraction = 0.2
    """Relative, against the starting policy's mean words."""
    max_length_growth: NonNegative | None = 0.5
    """The same upwards; None: no bound."""


class ShardsConfig(Section):
    """Shards per stage: how far a stage spreads; never changes a row."""

    instructions: Positive = 8
    """prepare, sample, claim, verify."""
    reflogp: Positive = 8
    respond: Positive = 1
    """Slices of the questions, per checkpoint."""
    group_size: Positive = 32
    """Items are dealt to shards in groups of this size; batches never cross a group."""


class RunConfig(Section):
    """A whole run. Written once as `config.json`; only `iterations` may grow later."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$")]
    """Lower-case letters, digits, '-': it becomes part of Kubernetes names."""
    recipe: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    iterations: Positive = 4
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] = get_args(StageName)
    """Part of the pipeline: the run has these stages only and ends when they are complete. What
    they read must be there, or not be needed: `respond` without `train` asks the policy alone."""
    keep_compiled: bool = True
    """On a GPU: what a stage compiled is stored in the run, so that its next pod need not."""
    policy: ModelSpec
    prepare: PrepareConfig = PrepareConfig()
    sample: SampleConfig = SampleConfig()
    claim: ClaimConfig = ClaimConfig()
    verify: VerifyConfig = VerifyConfig()
    pair: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig()
    respond: RespondConfig = RespondConfig()
    choose: ChooseConfig = ChooseConfig()
    shards: ShardsConfig = ShardsConfig()

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        train = self.train
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                "train.global_batch_size must be a multiple of train.micro_batch_size, got "
                f"{train.global_batch_size} and {train.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages: must differ, got {self.stages}")
        carried = {"choose", "merge"} if self.train.lora else {"choose"}
        if self.iterations > 1 and (lacking := sorted(carried - set(self.stages))):
            raise ValueError(
                f"stages without {lacking[0]!r} leave no policy for a second iteration: "
                f"expected iterations 1, got {self.iterations}"
            )
        return self
