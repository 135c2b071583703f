"""Vision-language models as judges: what each is asked, and how its answer becomes a number.

A judge is served by anything that speaks OpenAI's chat completions (vLLM, SGLang). A reward model
answers in its trained form only when asked in its trained words; questions that are quoted here
say from where. A number outside the scale, or none, is a failure and never a low score.

| judge | served model | number | convention of |
|---|---|---|---|
| score | UnifiedReward 1.0, 1.5 | final score, 1..5 | MixGRPO |
| score_only | UnifiedReward-7b-v1.5 | final score / 5, 0.2..1 | Flow-GRPO |
| semantic | UnifiedReward 1.0, 1.5 | alignment score, 1..5 | MixGRPO |
| axes | UnifiedReward 2.0 | (mean of three axes - 1) / 4, 0..1 | verl-omni |
| yes_no | any with log-probabilities | P(yes) / (P(yes) + P(no)), 0..1 | Flow-Factory, GenEval 2 |
| rational | RationalRewards-8B-T2I | (mean of the aspects - 1) / 3, 0..1 | Flow-Factory |

Source: CodeGoat24/UnifiedReward@ed52f98 (MIT); zqqqqz2000/MixGRPO@75c797f:
    fastvideo/models/reward_model/unified_reward.py; yifan123/flow_grpo@54809b5:
    flow_grpo/rewards.py; verl-project/verl-omni@0ef63e5:
    verl_omni/utils/reward_score/unified_reward.py; X-GenGroup/Flow-Factory@6f3a641:
    src/flow_factory/rewards/vllm_evaluate.py, @99ed286: .../rational_rewards_t2i.py.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pec_jax.host.client import Failure

COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
MIME_TYPES = {"png": "image/png", "jpeg": "image/jpeg"}
PROMPT, IMAGE = "{prompt}", "<image>"  # what a question has in their place
TOP_LOGPROBS = 20  # the most that vLLM and OpenAI give
LEAST_MASS = 0.01  # of yes and no together; below it the model answers something else

# UnifiedReward's trained questions: inference_qwen/image_generation/qwen_point_score_*.py and
# inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py. The LLaVA models
# are asked the same after an image token, which the server puts in front.
_CAPTION = "Your task is provided as follows:\nText Caption: [{prompt}]"
_SCORE = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, "
    "detail preservation, color accuracy, and overall aesthetic appeal.\n"
)
_ELEMENTS = (
    "Extract key elements from the provided text caption, evaluate their presence in the generated "
    "image using the format: 'element (type): value' (where value=0 means not generated, and "
    "value=1 means generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
)
_NO_ELEMENTS = "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
_DIMENSIONS = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
)
_WORDS = (
    "\n1. Evaluate each word in the caption based on how well it is visually represented in the "
    "image. Assign a numerical score to each word using the format:\n"
    '   Word-wise Scores: [["word1", score1], ["word2", score2], ..., ["wordN", scoreN], '
    '["[No_mistakes]", scoreM]]\n'
    "   - A higher score indicates that the word is less well represented in the image.\n"
    "   - The special token [No_mistakes] represents whether all elements in the caption were "
    "correctly depicted. A high score suggests no mistakes; a low score suggests missing or "
    "incorrect elements.\n\n2. "
)
_AXES = (
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n"
    "\nOutput your evaluation using the format below:\n\n"
)
_WORDS_FORMAT = '---\n\nWord-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]\n\n'
_AXES_FORMAT = "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"

_YES_NO = (
    "Does this image show what its caption asks for, with every object, number, colour and "
    'relation right? Caption: "{prompt}". Answer with one word, Yes or No.'
)

# Our wording of RationalRewards' task; the headings are those it was trained on.
ASPECTS = ("Text Faithfulness", "Physical and Visual Quality", "Text Rendering")
_RATIONAL_SYSTEM = (
    "You are an expert image generation evaluator. You judge how good a generated image is for a "
    "user instruction, and then suggest how the instruction could be refined."
)
_RATIONAL = """User Instruction: {prompt}
You are provided with one image:
1. Generated Image <image>

Assess the image on three aspects. Justify each score by what is visible, begin with the whole \
number that fits best, and refine it to a decimal number by the flaws and merits you find.
1. Text Faithfulness: does the image follow the instruction? 4: every object, colour and action \
is as described and nothing is added. 3: minor details are missing or wrong. 2: some key elements \
are missing or altered. 1: the instruction is contradicted or ignored.
2. Physical and Visual Quality: is it free of technical and physical errors? 4: light, geometry \
and anatomy are plausible and there are no artifacts. 3: small flaws that do not disturb. 2: clear \
errors that disturb. 1: severe errors such as distorted bodies or impossible geometry.
3. Text Rendering: only if the instruction asks for text in the image, otherwise N/A. 4: correct \
and legible. 3: minor misspellings. 2: major misspellings or distorted letters. 1: unreadable or \
missing.

Output your evaluation in the following format:
# User Request Analysis
[ what the instruction asks for and implies ]
# Detailed Judgement
1. Text Faithfulness:
## Justification: [ assessment ]
## Score: [ float score ]
2. Physical and Visual Quality:
## Justification: [ assessment ]
## Score: [ float score ]
3. Text Rendering:
## Justification: [ assessment ]
## Score: [ float score or N/A ]
# Summary: [ summary of the evaluation ]

# User Request Refinement:
## Refinement Comments: [ how the instruction could be improved ]
## Refined Request: [ the improved instruction ]"""

_NUMBER = r"[\s*]*([-+]?\d+(?:\.\d+)?)(?![\d.]*\d)"


Reader = Callable[[Mapping[str, Any]], float | Failure]  # choices[0] of an answer -> its number


@dataclasses.dataclass(frozen=True)
class Judge:
    """A question and how its answer is read.

    Attributes:
        question: with `{prompt}` in place of the prompt, and optionally `<image>` in place of the
            image, which otherwise comes first.
        read: choices[0] of the answer -> the number.
        max_tokens: of the answer.
        system: the system message; '' for none.
        logprobs: asks for the log-probabilities of the first token.
    """

    question: str
    read: Reader
    max_tokens: int
    system: str = ""
    logprobs: bool = False


def request(
    judge: Judge, model: str, image: bytes, prompt: str, image_format: str = "png"
) -> dict[str, Any]:
    """The body of a POST to /v1/chat/completions.

    Args:
        judge: whose question is asked.
        model: the name under which it is served.
        image: a file in `image_format`.
        prompt: what the image shall show.
        image_format: a key of MIME_TYPES.
    """
    before, marked, after = judge.question.partition(IMAGE)
    if not marked:
        before, after = "", judge.question
    data = base64.b64encode(image).decode("ascii")
    url = f"data:{MIME_TYPES[image_format]};base64,{data}"
    content: list[dict[str, Any]] = [
        {"type": "text", "text": before.replace(PROMPT, prompt)},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": after.replace(PROMPT, prompt)},
    ]
    content = [part for part in content if part.get("text") != ""]
    system = [{"role": "system", "content": judge.system}] if judge.system else []
    extra = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if judge.logprobs else {}
    return {
        "model": model,
        "messages": [*system, {"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": judge.max_tokens,
        **extra,
    }


def parse(judge: Judge, answer: Any) -> float | Failure:
    """The number of an answer.

    Args:
        judge: whose answer it is.
        answer: decoded JSON, or the failure to get any.

    Returns:
        A finite number on the judge's scale, or a failure.
    """
    if isinstance(answer, Failure):
        return answer
    try:
        choice = answer["choices"][0]
    except (TypeError, KeyError, IndexError):
        return Failure("the answer has no choices")
    return judge.read(choice) if isinstance(choice, dict) else Failure("the answer has no choices")


def read_models(answer: Any) -> list[str] | Failure:
    """The names of the served models, from what GET /v1/models answers."""
    if isinstance(answer, Failure):
        return answer
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (TypeError, KeyError):
        return Failure(f"GET {MODELS} does not answer with a list of models")


def _text(choice: Mapping[str, Any]) -> str | Failure:
    """What the model wrote."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return text if isinstance(text, str) else Failure("the answer has no text")


def _find(label: str, text: str, low: float, high: float) -> float | Failure:
    """The number after a label, its last occurrence, which must lie in [low, high]."""
    found = re.findall(rf"{label}[\s*]*(?:\(1-5\))?[\s*]*:{_NUMBER}", text, re.IGNORECASE)
    if not found:
        return Failure(f"the answer has no '{label}:' with a number")
    value = float(found[-1])
    if not low <= value <= high:
        return Failure(f"the answer's '{label}' is not within {low:g} to {high:g}")
    return value


def _labelled(*labels: str, scale: Callable[[float], float] = lambda mean: mean) -> Reader:
    """Reads the mean of the numbers after some labels, all of which must be there, and scales it.

    Numbers a little below 1 do occur: 0 to 5 is accepted, as by MixGRPO.
    """

    def read(choice: Mapping[str, Any]) -> float | Failure:
        text = _text(choice)
        if isinstance(text, Failure):
            return text
        values = []
        for label in labels:
            value = _find(label, text, 0.0, 5.0)
            if isinstance(value, Failure):
                return value
            values.append(value)
        return scale(sum(values) / len(values))

    return read


def read_yes_no(choice: Mapping[str, Any]) -> float | Failure:
    """P(yes) / (P(yes) + P(no)) of the first token, each summed over case and white space.

    The one of the two that is not among the most probable tokens counts as 0. A failure if both
    together have less than LEAST_MASS, as with a model that thinks before it answers.
    """
    mass = {"yes": 0.0, "no": 0.0}
    try:
        for candidate in choice["logprobs"]["content"][0]["top_logprobs"]:
            word = candidate["token"].strip().lower()
            if word in mass:
                mass[word] += math.exp(candidate["logprob"])
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError):
        return Failure("the answer has no log-probabilities of its first token")
    total = mass["yes"] + mass["no"]
    if not LEAST_MASS <= total <= 1.01:  # the probabilities of fp16 logits may exceed 1 a little
        return Failure(f"yes and no together have a probability of {total:.2g}")
    return mass["yes"] / total


def read_rational(choice: Mapping[str, Any]) -> float | Failure:
    """(m - 1) / 3 of the mean m of the three aspects' scores, each clipped to 1..4.

    Text Rendering may be N/A, and then m is the mean of the other two.
    """
    text = _text(choice)
    if isinstance(text, Failure):
        return text
    judgement = text.rpartition("# Detailed Judgement")[2].partition("# Summary")[0]
    parts = re.split(rf"^\W*[123]\.\W*({'|'.join(ASPECTS)})\b", judgement, flags=re.MULTILINE)
    blocks = dict(zip(parts[1::2], parts[2::2], strict=True))
    scores = []
    for aspect in ASPECTS:
        line = re.search(r"^\W*Score[\s*]*:(.*)", blocks.get(aspect, ""), flags=re.MULTILINE)
        said = line[1] if line else ""
        if aspect == ASPECTS[2] and "N/A" in said:
            continue
        found = re.match(_NUMBER, said)
        if not found:
            return Failure(f"the answer has no score for {aspect!r}")
        scores.append(min(max(float(found[1]), 1.0), 4.0))
    return (sum(scores) / len(scores) - 1.0) / 3.0


JUDGES: Mapping[str, Judge] = {
    "score": Judge(_SCORE + _ELEMENTS + _CAPTION, _labelled("Final Score"), 4096),
    "score_only": Judge(
        _SCORE + _NO_ELEMENTS + _CAPTION, _labelled("Final Score", scale=lambda x: x / 5.0), 512
    ),
    "semantic": Judge(
        _DIMENSIONS + _WORDS + _AXES + _WORDS_FORMAT + _AXES_FORMAT + _CAPTION,
        _labelled("Alignment Score"),
        4096,
    ),
    "axes": Judge(
        _DIMENSIONS + _AXES + _AXES_FORMAT + _CAPTION,
        _labelled(
            *("Alignment Score", "Coherence Score", "Style Score"),
            scale=lambda mean: (min(max(mean, 1.0), 5.0) - 1.0) / 4.0,
        ),
        512,
    ),
    "yes_no": Judge(_YES_NO, read_yes_no, 1, logprobs=True),
    "rational": Judge(_RATIONAL, read_rational, 2048, system=_RATIONAL_SYSTEM),
}
UNIFIED_REWARD = ("score", "score_only", "semantic", "axes")
GENERAL = ("yes_no", "rational")
