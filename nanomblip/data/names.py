"""Other names for the embedded pictures: by a translator instead of by people, or with planted errors.

Both are for training. Whoever measures takes the human names of `load_emoji`.
"""

from dataclasses import replace
from pathlib import Path

from nanomblip.data.emoji import Emoji, pair_split, unit_hash
from nanomblip.data.json_index import JsonExamples
from nanomblip.data.languages import LANGUAGES


def load_translated(path: Path | str) -> JsonExamples:
    """The examples of a file that `translate --input emoji` wrote."""
    return JsonExamples(path, flag="--names")


def with_translated(emoji: Emoji, file: JsonExamples) -> Emoji:
    """The data with the names of a file: its image_id is a concept, its label the name in `lang`. English stays.

    A name that was rejected is missing, and so is a language that has none. ValueError for a file of other pictures.
    """
    names = {}
    for n in range(len(file)):
        row = file.row(n)
        lang, concept, name = row.get("lang"), row["image_id"], row["label"]
        if lang not in LANGUAGES or concept not in emoji.names["en"] or not name.strip():
            what = "written by: python -m nanomblip.data.translate --input emoji"
            raise ValueError(
                f"--names {file.path}: example {n:,} is no name of an embedded picture; give a file {what}"
            )
        names.setdefault(lang, {})[concept] = name
    names["en"] = emoji.names["en"]
    return replace(emoji, names={lang: names[lang] for lang in emoji.names if lang in names})


def with_errors(emoji: Emoji, share: float) -> Emoji:
    """The data with a `share` of the names in other languages replaced by another thing's name in the same language.

    Fluent and wrong: no filter sees it. Of the names of the train split, the others are not trained on. Chosen by hash,
    so that a smaller share is part of a larger one.
    """
    names = {}
    for lang, of_lang in emoji.names.items():
        concepts, bad = [concept for concept in sorted(of_lang) if pair_split(lang, concept) == "train"], {}
        for i, concept in enumerate(concepts):
            if lang != "en" and unit_hash("error", lang, concept) < share:
                step = 1 + int(unit_hash("other", lang, concept) * (len(concepts) - 1))
                bad[concept] = of_lang[concepts[(i + step) % len(concepts)]]
        names[lang] = {concept: bad.get(concept, name) for concept, name in of_lang.items()}
    return replace(emoji, names=names)
