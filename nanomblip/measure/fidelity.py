"""Language fidelity: how to make a model stay in the language that was asked for. data/language_id.py tells which it is
in.

Asked for Tamil, multilingual vision-language models like to answer in English: the paper leaves the problem open, and
later ones score such answers as zero. The cheapest cure needs no training. Before each step of decoding, the tokens
that the language cannot use are forbidden (`generate(allowed=...)`). Which those are is found once, as a mask over the
vocabulary (`language_tokens`), in one of two ways:

- vocabulary: the tokens into which the language's names, keywords and phrases of the embedded data fall, as far as
  they are in its scripts. For nano, whose tokenizer was made from these texts. The words of held-out pairs are in it
  too: the language model has read them as text, only no picture of them, and the mask knows no pictures either.
- script: the tokens whose letters belong to the language's scripts. For a tokenizer of 250,100 tokens. Where
  languages share a script (57 use Latin) the letters must also occur in texts of that language: ß for German, not for
  English. It tells Thai from English surely, German from English hardly.

With nano's masks 99.9 % of the names can still be written in their own language, and of the core English names 34 %
in another Latin language, none in any other script. And a mask can only forbid: a model that does not know the word
in Tamil now writes another Tamil word, or digits, which all languages share. So it is measured, on and off.
"""

import unicodedata
from functools import cache

import torch

from nanomblip.data.emoji import ROOT, Emoji, load_udhr
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.scripts import script_characters, script_of
from nanomblip.data.tokenizer import Tokenizer

SHARED = {script for row in LANGUAGES.values() for script in row.scripts
          if script != "Hani" and sum(script in other.scripts for other in LANGUAGES.values()) > 1}  # fmt: skip


def language_texts(emoji: Emoji, lang: str) -> list[str]:
    """What people wrote in a language in the embedded data: names, keywords and phrases, as the model may write
    them."""
    phrases = emoji.phrases.get(lang, {})
    texts = [*emoji.names.get(lang, {}).values(), *phrases.get("labels", {}).values()]
    texts += [phrases[key] for key in ("yes", "no", "autonym") if key in phrases]
    for words in emoji.keywords.get(lang, {}).values():
        texts.append(", ".join(words))
    return texts


declaration = cache(load_udhr)  # of Human Rights, in 95 languages; read once


def letters_of(emoji: Emoji, lang: str) -> set[str]:
    """The letters and marks that a language may use: its scripts, cut down to what its texts have where scripts are
    shared."""
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


def language_tokens(tokenizer: Tokenizer, lang: str, emoji: Emoji) -> torch.Tensor:
    """The tokens that a language can use: bool (V,), V = len(tokenizer). eos is allowed by `generate` itself.

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
        for ids in tokenizer.sentencepiece.encode(
            [form for text in texts for form in (text, text[:1].upper() + text[1:])]
        ):
            allowed[ids] = True
        scripts = LANGUAGES[lang].scripts
        for i in allowed.nonzero()[
            :, 0
        ].tolist():  # "LED" and "DVD" stand in texts of all scripts, but would let an English model spell on
            inside = all(
                script_of(c) is None or script_of(c) in scripts for c in tokenizer.sentencepiece.id_to_piece(i)
            )
            allowed[i] = inside or tokenizer.sentencepiece.is_byte(i)
    else:
        letters = letters_of(emoji, lang)
        bytes_of = {byte for c in letters for byte in c.encode()} | set(range(0x20, 0x7F))
        for i in range(len(tokenizer)):
            if tokenizer.sentencepiece.is_byte(i):
                allowed[i] = int(tokenizer.sentencepiece.id_to_piece(i)[1:-1], 16) in bytes_of  # "<0xE0>"
            elif not (
                tokenizer.sentencepiece.is_control(i)
                or tokenizer.sentencepiece.is_unknown(i)
                or tokenizer.sentencepiece.is_unused(i)
            ):
                allowed[i] = all(script_of(c) is None or c in letters for c in tokenizer.sentencepiece.id_to_piece(i))
    allowed[[tokenizer.pad, tokenizer.unk]] = False
    return allowed


def language_masks(tokenizer: Tokenizer, langs, emoji: Emoji) -> dict[str, torch.Tensor]:
    """`language_tokens` of several languages, computed once."""
    return {lang: language_tokens(tokenizer, lang, emoji) for lang in langs}
