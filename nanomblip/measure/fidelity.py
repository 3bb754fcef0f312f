"""Language fidelity: how much of a text is in the script that was asked for, and how to make a model stay in a
language.

Asked for Tamil, multilingual vision-language models like to answer in English: the paper leaves the problem open, and
later ones score such answers as zero. The cheapest cure needs no training. Before each step of decoding, the pieces
that the language cannot use are forbidden (`generate(allowed=...)`). Which those are is found once, as a mask over the
vocabulary (`language_pieces`), in one of two ways:

- vocabulary: the pieces into which the language's names, keywords and phrases of the embedded data fall, as far as they
  are in its scripts. For nano, whose tokenizer was made from these texts. The words of held-out pairs are in it too:
  the language model has read them as text, only no picture of them, and the mask knows no pictures either.
- script: the pieces whose letters belong to the language's scripts. For a tokenizer of 250,100 pieces. Where
  languages share a script (57 use Latin) the letters must also occur in texts of that language: ß for German, not for
  English. It tells Thai from English surely, German from English hardly.

With nano's masks 99.9 % of the names can still be written in their own language, and of the core English names 34 % in
another Latin language, none in any other script. And a mask can only forbid: a model that does not know the word in
Tamil now writes another Tamil word, or digits, which all languages share. So it is measured, on and off.
"""

import math
import unicodedata
from collections import Counter, defaultdict
from functools import cache

import torch

from nanomblip.data.emoji import ROOT, Emoji, load_udhr
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.measure.metrics import normal

# The first word of a character's Unicode name tells its script, which Python's unicodedata does not.
SCRIPT_WORDS = {
    "LATIN": "Latn", "CYRILLIC": "Cyrl", "ARABIC": "Arab", "BENGALI": "Beng", "DEVANAGARI": "Deva", "GUJARATI": "Gujr",
    "GURMUKHI": "Guru", "KANNADA": "Knda", "MALAYALAM": "Mlym", "SINHALA": "Sinh", "TAMIL": "Taml", "TELUGU": "Telu",
    "CJK": "Hani", "IDEOGRAPHIC": "Hani", "HIRAGANA": "Hira", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana", "HANGUL": "Hang",
    "KHMER": "Khmr", "LAO": "Laoo", "MYANMAR": "Mymr", "THAI": "Thai", "ARMENIAN": "Armn", "ETHIOPIC": "Ethi", "GEORGIAN": "Geor",
    "GREEK": "Grek", "HEBREW": "Hebr",
}  # fmt: skip


@cache
def script_of(char: str) -> str | None:
    """The ISO 15924 code of a letter's or mark's script; "Zyyy" for another script, None for what belongs to all of
    them (digits, punctuation, spaces, symbols, combining accents)."""
    if unicodedata.category(char)[0] not in "LM":
        return None
    words = unicodedata.name(char, "UNKNOWN").split()
    first = words[1] if words[0] in ("HALFWIDTH", "FULLWIDTH") else words[0]
    return (
        None
        if first in ("COMBINING", "MODIFIER", "VARIATION", "MASCULINE", "FEMININE")
        else SCRIPT_WORDS.get(first, "Zyyy")
    )


def script_share(text: str, lang: str) -> float | None:
    """The share of a text's letters that are in a script of the language, in 0..1; None for a text without letters."""
    scripts = [script for script in map(script_of, text) if script is not None]
    return sum(script in LANGUAGES[lang].scripts for script in scripts) / len(scripts) if scripts else None


@cache
def script_characters(script: str) -> frozenset[str]:
    """All letters and marks of a script in Unicode's first three planes."""
    return frozenset(c for c in map(chr, range(0x30000)) if script_of(c) == script)


SHARED = {script for row in LANGUAGES.values() for script in row.scripts
          if script != "Hani" and sum(script in other.scripts for other in LANGUAGES.values()) > 1}  # fmt: skip


def language_texts(emoji: Emoji, lang: str) -> list[str]:
    """What people wrote in a language in the embedded data: names, keywords and phrases, as the model may write them."""
    phrases = emoji.phrases.get(lang, {})
    texts = [*emoji.names.get(lang, {}).values(), *phrases.get("labels", {}).values()]
    texts += [phrases[key] for key in ("yes", "no", "autonym") if key in phrases]
    for words in emoji.keywords.get(lang, {}).values():
        texts.append(", ".join(words))
    return texts


declaration = cache(load_udhr)  # of Human Rights, in 95 languages; read once


def letters_of(emoji: Emoji, lang: str) -> set[str]:
    """The letters and marks that a language may use: its scripts, cut down to what its texts have where scripts are shared."""
    scripts = LANGUAGES[lang].scripts
    letters = set().union(*(script_characters(script) for script in scripts))
    if SHARED & set(scripts):
        seen = "".join([*language_texts(emoji, lang), *declaration(emoji.root).get(lang, [])])
        seen = {form for c in set(unicodedata.normalize("NFC", seen)) for form in (c, *c.lower(), *c.upper())}
        if "Latn" in scripts:  # a to z: names from abroad
            seen |= set(map(chr, range(65, 123)))
        if lang == "ru":  # ё is optional in Russian, and these texts do without
            seen |= {"ё", "Ё"}
        if len(letters & seen) > 20:  # else the texts are in another script than the language is listed with: Kurdish
            letters &= seen
    return letters


def language_pieces(tokenizer: Tokenizer, lang: str, emoji: Emoji) -> torch.Tensor:
    """The pieces that a language can use: bool (V,), V = len(tokenizer). eos is allowed by `generate` itself.

    For nano's own tokenizer by vocabulary, for any other by script (see above). Pieces for single bytes are allowed
    where the texts need them, or, by script, where they occur in the UTF-8 of the language's letters. ValueError for a
    language of which the embedded data have no text, with nano's tokenizer.
    """
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    if tokenizer.path.read_bytes() == (ROOT / "spiece.model").read_bytes():
        texts = language_texts(emoji, lang)
        if not texts:
            raise ValueError(f"--force_lang: the embedded data have no text in {LANGUAGES[lang].name}")
        # With an upper-case first letter too: sentences begin with it. Digits and punctuation come with the texts.
        for ids in tokenizer.pieces.encode([form for text in texts for form in (text, text[:1].upper() + text[1:])]):
            allowed[ids] = True
        scripts = LANGUAGES[lang].scripts
        for i in allowed.nonzero()[
            :, 0
        ].tolist():  # "LED" and "DVD" stand in texts of all scripts, but would let an English model spell on
            inside = all(script_of(c) is None or script_of(c) in scripts for c in tokenizer.pieces.id_to_piece(i))
            allowed[i] = inside or tokenizer.pieces.is_byte(i)
    else:
        letters = letters_of(emoji, lang)
        bytes_of = {byte for c in letters for byte in c.encode()} | set(range(0x20, 0x7F))
        for i in range(len(tokenizer)):
            if tokenizer.pieces.is_byte(i):
                allowed[i] = int(tokenizer.pieces.id_to_piece(i)[1:-1], 16) in bytes_of  # "<0xE0>"
            elif not (
                tokenizer.pieces.is_control(i) or tokenizer.pieces.is_unknown(i) or tokenizer.pieces.is_unused(i)
            ):
                allowed[i] = all(script_of(c) is None or c in letters for c in tokenizer.pieces.id_to_piece(i))
    allowed[[tokenizer.pad, tokenizer.unk]] = False
    return allowed


def language_masks(tokenizer: Tokenizer, langs, emoji: Emoji) -> dict[str, torch.Tensor]:
    """`language_pieces` of several languages, computed once."""
    return {lang: language_pieces(tokenizer, lang, emoji) for lang in langs}


class LanguageID:
    """Which language is a short text in? Exact look-up among all known names first, naive Bayes for the rest.

    names: language -> concept -> name. Of the core names 87 % occur in one language only, so the table settles most
    answers; the others are judged by their character 1- to 4-grams (add-one smoothing, all languages equally likely).
    """

    ORDERS = (1, 2, 3, 4)

    def __init__(self, names: dict[str, dict[str, str]]):
        self.table = defaultdict(set)  # name -> languages that use it
        self.seen = defaultdict(list)  # n-gram -> [(language, log(count + 1))] of the languages that have it
        totals = {}
        for lang, of_lang in names.items():
            counts = Counter()
            for name in map(normal, of_lang.values()):
                self.table[name].add(lang)
                counts.update(self.grams(name))
            totals[lang] = counts.total()
            for gram, n in counts.items():
                self.seen[gram].append((lang, math.log(n + 1)))
        # log((count + 1) / (total + kinds)) = log(count + 1) - log(total + kinds): the first term is 0 for nearly all
        # (n-gram, language), so only the others are stored, and a guess touches few of them.
        self.unseen = {lang: math.log(total + len(self.seen)) for lang, total in totals.items()}

    def grams(self, text: str) -> list[str]:
        text = f"^{text}$"
        return [text[i : i + n] for n in self.ORDERS for i in range(len(text) - n + 1)]

    def guess(self, text: str) -> str:
        """The most likely language by naive Bayes."""
        grams = self.grams(normal(text))
        score = {lang: -len(grams) * cost for lang, cost in self.unseen.items()}
        for gram in grams:
            for lang, log_count in self.seen.get(gram, ()):
                score[lang] += log_count
        return max(score, key=score.get)

    def is_in(self, text: str, lang: str) -> bool:
        """Is the text in `lang`? A name that several languages share is in each of them; an empty text in none."""
        if not normal(text):
            return False
        known = self.table.get(normal(text))
        return lang in known if known else self.guess(text) == lang
