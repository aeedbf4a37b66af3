"""`score object_halbench`: our fields, and those that users of the release know."""

from collections.abc import Sequence
from typing import cast

from rlaifv.benchmarks import object_halbench as objhal
from rlaifv.benchmarks.base import over_repeats
from rlaifv.benchmarks.captions import CaptionGrade, caption_metrics, caption_sums
from rlaifv.benchmarks.files import NumberedRow, read_rows, text_field
from rlaifv.benchmarks.language import NltkTools
from rlaifv.benchmarks.prompts import OBJECTS, load_prompt
from rlaifv.benchmarks.replies import Replier
from rlaifv.benchmarks.scoring import (
    Options,
    Result,
    grade,
    judge_report,
    make_replier,
    prompt_file,
)
from rlaifv.errors import ConfigError
from rlaifv.records import Grade


def score_object_halbench(options: Options) -> Result:
    """Modes judge, rules, chair; `--ground-truth` or the COCO files in `--coco`."""
    judged = bool(options.judge or options.reviews)
    mode = options.mode or ("judge" if judged else "rules")
    if mode not in ("judge", "rules", "chair"):
        raise ConfigError(f"object_halbench: --mode must be judge, rules or chair, got {mode!r}")
    mode = cast(objhal.Mode, mode)
    captions = [_caption(row, mode) for row in read_rows(options.answers)]
    prompt = load_prompt(OBJECTS, prompt_file(options))
    published = objhal.JUDGE_MODEL, objhal.MAX_TOKENS
    replier = make_replier(options, *published) if mode == "judge" else None
    scorer = objhal.Scorer(
        mode,
        synonyms=objhal.read_synonyms(options.synonyms, mode),
        tools=NltkTools(options.nltk_data),
        replier=replier,
        prompt=prompt,
    )
    if options.ground_truth is not None:
        truth = objhal.read_ground_truth(options.ground_truth)
    elif options.coco is not None:
        truth = scorer.truth(options.coco, {caption.image_id for caption in captions})
    else:
        raise ConfigError("object_halbench: --coco DIR or --ground-truth FILE.json is needed")
    scored = list(scorer.score(captions, truth))
    grades = [grade(one.position, one.repeat, one.value, one.reply) for one in scored]
    return {
        "benchmark": "object_halbench",
        "mode": mode,
        "overall": _object_overall(grades),
        "overall_metrics": _release_metrics(grades, mode, replier),
        "judge": judge_report(scorer.identity, replier),
        "sentences": [_sentence(captions[one.position], one, mode) for one in scored],
    }


def _caption(row: NumberedRow, mode: objhal.Mode) -> objhal.Caption:
    """`caption` as it is; the release's `text` or `answer` cleaned as the release does."""
    if "caption" in row.row:
        text = text_field(row, "caption")
    else:
        text = text_field(row, "text", "answer")
        text = text if mode == "chair" else objhal.clean_answer(text)
    question = next((row.row[name] for name in ("prompt", "question") if name in row.row), "")
    image_id = objhal.parse_image_id(row, "image_id", "image_url", "image")
    return objhal.Caption(row.where, row.number, image_id, text, str(question))


def _object_overall(grades: Sequence[Grade]) -> Result:
    """The sums of the first repeat and the ratios, averaged over repeats."""
    sums = caption_sums([grade for grade in grades if grade.repeat == 0])
    names = {
        "chair_s": "chair_s",
        "chair_s_with_objects": "response_hallucination",
        "chair_i": "mention_hallucination",
        "object_recall": "recall",
        "mean_words": "mean_words",
    }
    metrics = over_repeats(grades, caption_metrics)
    overall: Result = {ours: metrics[theirs] for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if f"{theirs}_spread" in metrics:
            overall[f"{ours}_spread"] = metrics[f"{theirs}_spread"]
    if "repeats_differ" in metrics:
        overall["repeats_differ"] = metrics["repeats_differ"]
    return overall | {
        "captions": sums.captions,
        "captions_with_objects": sums.captions_with_objects,
        "hallucinated_captions": sums.hallucinated_captions,
        "mentions": sums.mentions,
        "hallucinated_mentions": sums.hallucinated_mentions,
        "correct_objects": sums.correct,
        "ground_truth_objects": sums.truth,
    }


def _release_metrics(grades: Sequence[Grade], mode: objhal.Mode, replier: Replier | None) -> Result:
    """The first repeat under the names that users of the release (or of CHAIR) know."""
    first = [grade for grade in grades if grade.repeat == 0]
    sums = caption_sums(first)
    if mode == "chair":
        items = sum(len(CaptionGrade.model_validate_json(grade.value).words) for grade in first)
        return {
            "CHAIRs": sums.chair_s,
            "CHAIRi": sums.mention_hallucination,
            "Recall": sums.recall,
            "Len": 0.01 * items / sums.captions if sums.captions else None,
        }
    response, mention = sums.response_hallucination, sums.mention_hallucination
    tally = replier.tally() if replier else None
    inputs, outputs = (tally.input_tokens, tally.output_tokens) if tally else (0, 0)
    return {
        "CHAIRs": sums.chair_s,
        "CHAIRs_refine": response,
        "CHAIRi": mention,
        "obj_rec": sums.recall,
        "sentence_num": sums.captions,
        "coco_sentence_num": sums.captions_with_objects,
        "coco_word_count": sums.correct,  # not the mentions, despite the name
        "gt_word_count": sums.truth,
        "avg_word_len": sums.mean_words,
        "all_gpt_used_tokens": {"total": inputs + outputs, "input": inputs, "output": outputs},
        "correct_rate": None if response is None else 1 - response,
        "object_correct_rate": None if mention is None else 1 - mention,
    }


def _sentence(caption: objhal.Caption, scored: objhal.Scored, mode: objhal.Mode) -> Result:
    value = scored.value
    result = value.score()
    pairs = [[mention.word, mention.object_class] for mention in result.found]
    wrong = [[mention.word, mention.object_class] for mention in result.hallucinated]
    mentions, bad = len(pairs), len(wrong)
    metrics = {"CHAIRs": int(bool(wrong)), "CHAIRi": bad / mentions if mentions else 0.0}
    if mode == "chair":
        metrics["Recall"] = result.recall
    return {
        "image_id": caption.image_id,
        "repeat": scored.repeat,
        "caption": caption.text,
        "objects": [mention.object_class for mention in result.found],
        "hallucinated": [mention.object_class for mention in result.hallucinated],
        "recall": result.recall,
        "mscoco_hallucinated_words": (
            wrong if mode == "chair" else [[word, [word, name]] for word, name in wrong]
        ),
        "mscoco_gt_words": list(value.truth),
        "mscoco_generated_words": ([name for _, name in pairs] if mode == "chair" else pairs),
        "hallucination_idxs": [mention.position for mention in result.hallucinated],
        "words": list(value.words),
        "metrics": metrics,
        "judge_reply": scored.reply,
    }
