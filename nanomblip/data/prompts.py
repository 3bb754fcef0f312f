"""What mBLIP is asked: the prompt templates of all task families of the paper (arXiv 2307.06930, section 3.2), and
their targets.

The templates are the model's interface, so they are the paper's, letter by letter, odd spaces and all: {L} is the
English name of a language, {q} a question, {a} an answer, {c} a caption, {n} the name of a thing. Instructions are
English always. The target is in the language that the instruction names; yes and no, reasoning and explanation are
English, as in the paper.

    family          prompt -> target                                      nano's texts         full size
    caption         CAPTION -> caption                                    names                COCO, web captions
    vqa             VQA around a question -> answer                       choices, categories  VQAv2
    question        QUESTION around an answer -> question                 choices reversed     VQAv2
    reasoning       REASONING around a question -> rationale and answer   -                    A-OKVQA
    explanation     EXPLANATION around both -> rationale                  -                    A-OKVQA
    match           MATCH around a caption -> yes or no                   names                web captions
    naming          NAMING -> name                                        names                ImageNet
    exists          EXISTS around a name -> yes or no                     names                ImageNet
    detail, conversation   the data set's own question -> its answer      -                    LLaVA

One function a family turns texts into (prompt, target); mixture.py and builders.py call them. Three slips of the
original code are not repeated: a prompt that names another language than its target is in, a question whose answer
belongs to another picture, and "X because X".
"""

import random

CAPTION = (
    "Caption the image in {L}.",
    "Short {L} image caption: ",
    "Image caption (in {L}): ",
    "Briefly describe the image in {L}.",
    "Write a short {L} image description.",
    "Summarize the image in {L}.",
)
CAPTION_UNNAMED = (  # English; for other languages the paper translated them by machine, here none is made up
    "Caption the image.",
    "Short image caption: ",
    "Briefly describe the image.",
    "Write a short image description.",
    "Summarize the image.",
)
VQA = (
    "{q} Short {L} answer:",
    "Question: {q} Brief answer (in {L}):",
    "Give a short answer in {L} to the following question. {q}",
    "Answer the provided question in {L} with three words or less. {q}",
    "What is the {L} answer to this question? {q}",
    "Briefly answer in {L}. {q}",
)
QUESTION = (
    "Given the image, generate a question in {L} whose answer is: {a}. Question:",
    'Based on the image, create a question (in {L}) for which the answer is "{a}".',
    "From the image provided, come up with a {L} question that leads to the reply: {a}. Question:",
    'What is a {L} question for the image with the answer "{a}"?',
    'Given the image, what would be a {L} question that has as answer "{a}"?',
)
REASONING = (
    "Reason the answer to the following question. {q}",
    "Use reasoning to come to an answer for this question. {q}",
    "Think step-by-step to answer this question. {q}",
    "Answer the following question and explain your answer. {q}",
    "{q} What is the answer and why?",
)
REASONED = (  # targets; {r}: the rationale without its full stop
    "{r}. So the answer is {a}",
    "{r} so {a}",
    "{r}. This means the answer is {a}",
    "The answer is {a} because {r}.",
    "{a} because {r}.",
)
EXPLANATION = (
    "Question: {q}: Answer: {a}. Explanation:",
    "Question: {q}: Answer: {a}. The reason is because ",
    'The answer to the question "{q}" is "{a}". Why?',
    'Why is the answer to the question "{q}"  "{a}"?',
    'Explain why the answer to the question "{q}" is "{a}".',
)
MATCH = (  # prompt, target if the caption fits, target if not
    ('Does "{c}" accurately describe the image?', "Yes, it does.", "No, it does not."),
    ('Does the caption "{c}" fit the picture?', "Yes, it does.", "No, it does not."),
    ('Does  "{c}" correctly summarize the image?', "Yes, it does.", "No, it does not."),
    (
        "Decide if the following caption accurately describes the image: {c}. Answer:",
        "Yes, it does.",
        "No, it does not.",
    ),
    ('Is "{c}" a good image description?', "Yes, it is.", "No, it is not."),
    ('Is "{c}" a correct caption for the picture?', "Yes, it is.", "No, it is not."),
    ('Is the caption "{c}" a good match for the image?', "Yes, it is.", "No, it is not."),
    ("Is this caption a good match for the picture? {c}. Answer: ", "Yes, it is.", "No, it is not."),
    ("Decide if this captions is a correct summary of the image: {c}.", "Yes, it is.", "No, it is not."),
    ('Would "{c}" be a good image summary?', "Yes, it would.", "No, it would not."),
    ('Would the caption "{c}" fit the picture?', "Yes, it would.", "No, it would not."),
    ('Could you use "{c}" as a caption for the image?', "Yes, you could.", "No, you could not."),
)
NAMING = (
    "What is the main focus of the image? Short {L} answer:",
    "What is in the image? Answer briefly in {L}.",
    "This is an image of what? Answer briefly in {L}.",
    "What is the central object in the image? Give a short {L} answer.",
    "The focus of the image is of what? Short {L} answer:",
    "Question: This is an image of what? Answer briefly in {L}.",
    "What is at the center of this picture? Short {L} answer:",
    "Give a short answer in {L} to the following question. What is the main thing shown in the image?",
    "Complete the sentence in {L}. This is a photo of a",
    "Name the main thing of this photo in {L}:",
    "In less than 3 words in {L}, what can be seen in this image?",
)
EXISTS = (  # prompt, target if it is there, target if not
    ("Does this image show a {n}?", "Yes, it does.", "No, it does not."),
    ("Is there a {n}?", "Yes, there is.", "No, there is not."),
    ("Are there any {n} in the picture?", "Yes, there are.", "No, there are not."),
    ("Does the image contain a {n}?", "Yes, it does.", "No, it does not."),
    ("Yes or no, there is a {n} in the photo.", "Yes", "No"),
    ("Yes or no, there is a {n} visible in the image.", "Yes", "No"),
    ("Does this picture have a {n} in it?", "Yes, it does.", "No, it does not."),
    ("Can you see a {n} in the image?", "Yes, you can.", "No, you can not."),
)
KEYWORDS = ("List keywords for the image in {L}.",)  # ours: the paper has no such task

EVAL_PROMPT = CAPTION[0]  # what evaluation and sample.py ask by default

# What the paper asks of each benchmark ({s}: a statement), with greedy exact match or CIDEr on what comes back.
BENCHMARK = {
    "xm3600": "Caption in {L}: ", "xflickrco": "Caption in {L}: ",
    "xgqa": "Question: {q} Short answer in English:", "vqav2": "Question: {q} Short answer in English:",
    "maxm": "Question: {q} Short answer in {L}:",
    "xvnli": 'Is it guaranteed true that "{s}"? Yes, no, or maybe? Answer in English:',
    "marvl": 'Based on the two images, is it correct to say "{s}"? Yes or no? Answer in English:',
    "pope": "{q}",
}  # fmt: skip


def caption(rng: random.Random, language: str, text: str) -> tuple[str, str]:
    """ "Caption the image in Swahili." -> the caption."""
    return rng.choice(CAPTION).format(L=language), text


def naming(rng: random.Random, language: str, name: str) -> tuple[str, str]:
    """ "What is in the image? Answer briefly in Swahili." -> the name."""
    return rng.choice(NAMING).format(L=language), name


def vqa(rng: random.Random, language: str, question: str, answer: str) -> tuple[str, str]:
    """A question, and the language that `answer` is in: the question itself may be in another."""
    return rng.choice(VQA).format(L=language, q=question), answer


def question(rng: random.Random, language: str, question: str, answer: str) -> tuple[str, str]:
    """An answer -> its question; `language` is the question's, whatever language the answer is in."""
    return rng.choice(QUESTION).format(L=language, a=answer), question


def reasoning(rng: random.Random, question: str, answer: str, rationale: str) -> tuple[str, str]:
    """A question -> why, and the answer; English."""
    return rng.choice(REASONING).format(q=question), rng.choice(REASONED).format(
        a=answer, r=rationale.strip().removesuffix(".")
    )


def explanation(rng: random.Random, question: str, answer: str, rationale: str) -> tuple[str, str]:
    """A question and its answer -> why; English."""
    return rng.choice(EXPLANATION).format(q=question, a=answer), rationale


def match(rng: random.Random, text: str, fits: bool) -> tuple[str, str]:
    """Does this caption (in any language) fit the picture? -> English yes or no."""
    prompt, yes, no = rng.choice(MATCH)
    return prompt.format(c=text), yes if fits else no


def exists(rng: random.Random, name: str, there: bool) -> tuple[str, str]:
    """Is a thing, named in any language, in the picture? -> English yes or no."""
    prompt, yes, no = rng.choice(EXISTS)
    return prompt.format(n=name), yes if there else no
