"""The 96 languages of mBLIP: their names, shares and scripts, and how a user names a language or a mixture of them.

mBLIP (arXiv 2307.06930) turns an English vision-language model into a multilingual one by translating its training
texts into the 96 languages of mT5's corpus mC4. How much of each language it sees is a choice, and two tables of shares
are around:

- `mc4`: proportional to the size of each language in mC4. The released mBLIP data follow it. English gets 44 %, and 19
  languages get fewer than 100 of the 2.27 million web captions.
- `mt5`: flattened, the rates at which mT5 itself was trained (arXiv 2010.11934: p proportional to |L|^0.3). English
  gets 8.5 % and the rarest language 0.2 %.

Codes are those of mC4, some of them old: `iw` is Hebrew, `fil` Filipino (Tagalog), `no` Norwegian Bokmål.
"""

import difflib
import math
import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """One language of mC4 that mBLIP's translator knows.

    name is the English name that prompts use ("Caption the image in Swahili."); mc4 and mt5 are shares in percent;
    nllb is the code of the NLLB-200 model that translated mBLIP's data; scripts are the ISO 15924 codes of the writing
    systems found in human-written text of the language, leaving out the odd Latin loan word.
    """

    code: str
    name: str
    mc4: float
    mt5: float
    nllb: str
    scripts: tuple[str, ...]


# Rows where the translator's choice surprises: zh is Traditional Chinese, though most benchmarks are Simplified (Hani
# covers both); ku is Sorani in Arabic letters; mn is Khalkha; no is Bokmål.
_ROWS = (
    #            code   name               mC4 %       mT5 %  NLLB        scripts
    Language("af", "Afrikaans", 0.019744, 0.642, "afr_Latn", ("Latn",)),
    Language("am", "Amharic", 0.0032516, 0.295, "amh_Ethi", ("Ethi",)),
    Language("ar", "Arabic", 1.0311, 1.691, "arb_Arab", ("Arab",)),
    Language("az", "Azerbaijani", 0.080064, 0.835, "azj_Latn", ("Latn",)),
    Language("be", "Belarusian", 0.02405, 0.601, "bel_Cyrl", ("Cyrl",)),
    Language("bg", "Bulgarian", 0.36257, 1.314, "bul_Cyrl", ("Cyrl",)),
    Language("bn", "Bangla", 0.16933, 0.927, "ben_Beng", ("Beng",)),
    Language("ca", "Catalan", 0.21678, 1.141, "cat_Latn", ("Latn",)),
    Language("ceb", "Cebuano", 0.0046304, 0.367, "ceb_Latn", ("Latn",)),
    Language("cs", "Czech", 0.91739, 1.752, "ces_Latn", ("Latn",)),
    Language("cy", "Welsh", 0.011895, 0.774, "cym_Latn", ("Latn",)),
    Language("da", "Danish", 0.41134, 1.406, "dan_Latn", ("Latn",)),
    Language("de", "German", 6.0886, 3.107, "deu_Latn", ("Latn",)),
    Language("el", "Greek", 0.76478, 1.569, "ell_Grek", ("Grek",)),
    Language("en", "English", 43.843, 8.485, "eng_Latn", ("Latn",)),
    Language("eo", "Esperanto", 0.0062469, 0.407, "epo_Latn", ("Latn",)),
    Language("es", "Spanish", 6.5939, 3.148, "spa_Latn", ("Latn",)),
    Language("et", "Estonian", 0.116, 0.907, "est_Latn", ("Latn",)),
    Language("eu", "Basque", 0.023164, 0.581, "eus_Latn", ("Latn",)),
    Language("fa", "Persian", 0.90614, 1.701, "pes_Arab", ("Arab",)),
    Language("fi", "Finnish", 0.41048, 1.375, "fin_Latn", ("Latn",)),
    Language("fil", "Filipino", 0.025998, 0.632, "tgl_Latn", ("Latn",)),
    Language("fr", "French", 5.0656, 2.944, "fra_Latn", ("Latn",)),
    Language("ga", "Irish", 0.006819, 0.407, "gle_Latn", ("Latn",)),
    Language("gd", "Scottish Gaelic", 0.0022442, 0.306, "gla_Latn", ("Latn",)),
    Language("gl", "Galician", 0.041957, 0.805, "glg_Latn", ("Latn",)),
    Language("gu", "Gujarati", 0.014411, 0.438, "guj_Gujr", ("Gujr",)),
    Language("ha", "Hausa", 0.0040482, 0.336, "hau_Latn", ("Latn",)),
    Language("hi", "Hindi", 0.29771, 1.233, "hin_Deva", ("Deva",)),
    Language("ht", "Haitian", 0.0025912, 0.306, "hat_Latn", ("Latn",)),
    Language("hu", "Hungarian", 0.63172, 1.508, "hun_Latn", ("Latn",)),
    Language("hy", "Armenian", 0.043192, 0.662, "hye_Armn", ("Armn",)),
    Language("id", "Indonesian", 0.21662, 1.834, "ind_Latn", ("Latn",)),
    Language("ig", "Igbo", 0.0012332, 0.244, "ibo_Latn", ("Latn",)),
    Language("is", "Icelandic", 0.03501, 0.632, "isl_Latn", ("Latn",)),
    Language("it", "Italian", 2.9853, 2.475, "ita_Latn", ("Latn",)),
    Language("iw", "Hebrew", 0.19636, 1.080, "heb_Hebr", ("Hebr",)),
    Language("ja", "Japanese", 0.95045, 1.956, "jpn_Jpan", ("Hani", "Hira", "Kana")),
    Language("jv", "Javanese", 0.002442, 0.428, "jav_Latn", ("Latn",)),
    Language("ka", "Georgian", 0.041562, 0.652, "kat_Geor", ("Geor",)),
    Language("kk", "Kazakh", 0.038153, 0.662, "kaz_Cyrl", ("Cyrl",)),
    Language("km", "Khmer", 0.015436, 0.469, "khm_Khmr", ("Khmr",)),
    Language("kn", "Kannada", 0.021372, 0.520, "kan_Knda", ("Knda",)),
    Language("ko", "Korean", 0.26805, 1.161, "kor_Hang", ("Hang",)),
    Language("ku", "Kurdish", 0.00445, 0.346, "ckb_Arab", ("Arab",)),
    Language("ky", "Kyrgyz", 0.013366, 0.509, "kir_Cyrl", ("Cyrl",)),
    Language("lb", "Luxembourgish", 0.0094896, 0.693, "ltz_Latn", ("Latn",)),
    Language("lo", "Lao", 0.0033748, 0.285, "lao_Laoo", ("Laoo",)),
    Language("lt", "Lithuanian", 0.20335, 1.059, "lit_Latn", ("Latn",)),
    Language("lv", "Latvian", 0.11021, 0.886, "lvs_Latn", ("Latn",)),
    Language("mg", "Malagasy", 0.0029366, 0.367, "plt_Latn", ("Latn",)),
    Language("mi", "Maori", 0.0016521, 0.255, "mri_Latn", ("Latn",)),
    Language("mk", "Macedonian", 0.040144, 0.632, "mkd_Cyrl", ("Cyrl",)),
    Language("ml", "Malayalam", 0.040198, 0.632, "mal_Mlym", ("Mlym",)),
    Language("mn", "Mongolian", 0.032869, 0.632, "khk_Cyrl", ("Cyrl",)),
    Language("mr", "Marathi", 0.050804, 0.947, "mar_Deva", ("Deva",)),
    Language("ms", "Malay", 0.052281, 1.110, "zsm_Latn", ("Latn",)),
    Language("mt", "Maltese", 0.01237, 0.652, "mlt_Latn", ("Latn",)),
    Language("my", "Burmese", 0.013921, 0.479, "mya_Mymr", ("Mymr",)),
    Language("ne", "Nepali", 0.052185, 0.703, "npi_Deva", ("Deva",)),
    Language("nl", "Dutch", 1.5209, 2.017, "nld_Latn", ("Latn",)),
    Language("no", "Norwegian", 0.34175, 1.355, "nob_Latn", ("Latn",)),
    Language("ny", "Nyanja", 0.001282, 0.295, "nya_Latn", ("Latn",)),
    Language("pa", "Punjabi", 0.0081343, 0.377, "pan_Guru", ("Guru",)),
    Language("pl", "Polish", 1.9928, 2.190, "pol_Latn", ("Latn",)),
    Language("ps", "Pashto", 0.0055462, 0.367, "pbt_Arab", ("Arab",)),
    Language("pt", "Portuguese", 2.7479, 2.404, "por_Latn", ("Latn",)),
    Language("ro", "Romanian", 0.74161, 1.609, "ron_Latn", ("Latn",)),
    Language("ru", "Russian", 11.309, 3.779, "rus_Cyrl", ("Cyrl",)),
    Language("sd", "Sindhi", 0.0023513, 0.458, "snd_Arab", ("Arab",)),
    Language("si", "Sinhala", 0.0094361, 0.418, "sin_Sinh", ("Sinh",)),
    Language("sk", "Slovak", 0.298, 1.212, "slk_Latn", ("Latn",)),
    Language("sl", "Slovenian", 0.13808, 0.968, "slv_Latn", ("Latn",)),
    Language("sm", "Samoan", 0.0011389, 0.255, "smo_Latn", ("Latn",)),
    Language("sn", "Shona", 0.0013938, 0.357, "sna_Latn", ("Latn",)),
    Language("so", "Somali", 0.013027, 0.489, "som_Latn", ("Latn",)),
    Language("sq", "Albanian", 0.078328, 0.774, "als_Latn", ("Latn",)),
    Language("sr", "Serbian", 0.053254, 0.733, "srp_Cyrl", ("Cyrl",)),
    Language("st", "Southern Sotho", 0.0011149, 0.224, "sot_Latn", ("Latn",)),
    Language("su", "Sundanese", 0.0017096, 0.346, "sun_Latn", ("Latn",)),
    Language("sv", "Swedish", 0.70602, 1.640, "swe_Latn", ("Latn",)),
    Language("sw", "Swahili", 0.014268, 0.509, "swh_Latn", ("Latn",)),
    Language("ta", "Tamil", 0.064342, 0.744, "tam_Taml", ("Taml",)),
    Language("te", "Telugu", 0.022693, 0.530, "tel_Telu", ("Telu",)),
    Language("tg", "Tajik", 0.017434, 0.550, "tgk_Cyrl", ("Cyrl",)),
    Language("th", "Thai", 0.3125, 1.161, "tha_Thai", ("Thai",)),
    Language("tr", "Turkish", 1.4795, 1.966, "tur_Latn", ("Latn",)),
    Language("uk", "Ukrainian", 0.6263, 1.538, "ukr_Cyrl", ("Cyrl",)),
    Language("ur", "Urdu", 0.038279, 0.621, "urd_Arab", ("Arab",)),
    Language("uz", "Uzbek", 0.0132, 0.469, "uzn_Latn", ("Latn",)),
    Language("vi", "Vietnamese", 1.4795, 1.905, "vie_Latn", ("Latn",)),
    Language("xh", "Xhosa", 0.0013631, 0.224, "xho_Latn", ("Latn",)),
    Language("yi", "Yiddish", 0.001935, 0.285, "ydd_Hebr", ("Hebr",)),
    Language("yo", "Yoruba", 0.00096673, 0.204, "yor_Latn", ("Latn",)),
    Language("zh", "Chinese", 2.3961, 1.701, "zho_Hant", ("Hani",)),
    Language("zu", "Zulu", 0.0029134, 0.428, "zul_Latn", ("Latn",)),
)

LANGUAGES: dict[str, Language] = {row.code: row for row in _ROWS}

# Where the original code calls a language something else than `Language.name`. The released training mix says "former
# Hebrew" in captions and VQA; the captioning evaluation names five languages in another way, two of them misspelt.
# Only a repetition of the paper's own numbers needs these.
PAPER_NAMES: dict[str, dict[str, str]] = {
    "train": {"iw": "former Hebrew"},
    "eval": {"bn": "Bengali", "fa": "Farsi", "iw": "Hebrew", "pt": "Portugese", "uk": "Ukranian"},
}

# Other ways to say it. Codes of other standards first, then names; written as `_key` makes them (lower case, no
# accents). Nynorsk (nn) is not here: the data are Bokmål, and another written language would be a silent mistake.
ALIASES: dict[str, str] = {
    "he": "iw",
    "tl": "fil",
    "nb": "no",
    "jw": "jv",
    "in": "id",
    "ji": "yi",
    "mo": "ro",
    "ckb": "ku",
    "cmn": "zh",
    "ara": "ar",
    "aze": "az",
    "chi": "zh",
    "fas": "fa",
    "kur": "ku",
    "lav": "lv",
    "mlg": "mg",
    "mon": "mn",
    "msa": "ms",
    "nep": "ne",
    "nor": "no",
    "pus": "ps",
    "sqi": "sq",
    "swa": "sw",
    "uzb": "uz",
    "yid": "yi",
    "bengali": "bn",
    "bokmal": "no",
    "castilian": "es",
    "catalan valencian": "ca",
    "central khmer": "km",
    "chewa": "ny",
    "chichewa": "ny",
    "chinese simplified": "zh",
    "chinese traditional": "zh",
    "farsi": "fa",
    "flemish": "nl",
    "former hebrew": "iw",
    "haitian creole": "ht",
    "irish gaelic": "ga",
    "kirghiz": "ky",
    "kiswahili": "sw",
    "letzebuergesch": "lb",
    "mandarin": "zh",
    "mandarin chinese": "zh",
    "modern greek": "el",
    "moldovan": "ro",
    "myanmar": "my",
    "norwegian bokmal": "no",
    "panjabi": "pa",
    "portugese": "pt",
    "pushto": "ps",
    "scots gaelic": "gd",
    "sesotho": "st",
    "simplified chinese": "zh",
    "sinhalese": "si",
    "slovene": "sl",
    "sorani": "ku",
    "sotho": "st",
    "tagalog": "fil",
    "traditional chinese": "zh",
    "ukranian": "uk",
    "valencian": "ca",
}

# ---------------------------------------------------------------------------------------------------------------------
# Groups of languages, as rows of a result table
# ---------------------------------------------------------------------------------------------------------------------

# 56 languages share Latin and 19 own their script, so single scripts would give a table of one long and many tiny rows.
# Neighbours are put together: the eleven Brahmic scripts of South Asia, those of South-East Asia, and a rest of six.
SCRIPT_GROUPS: dict[str, str] = {
    "Latn": "Latin",
    "Cyrl": "Cyrillic",
    "Arab": "Arabic",
    "Beng": "Indic",
    "Deva": "Indic",
    "Gujr": "Indic",
    "Guru": "Indic",
    "Knda": "Indic",
    "Mlym": "Indic",
    "Sinh": "Indic",
    "Taml": "Indic",
    "Telu": "Indic",
    "Hani": "CJK",
    "Hira": "CJK",
    "Kana": "CJK",
    "Hang": "CJK",
    "Khmr": "SE Asian",
    "Laoo": "SE Asian",
    "Mymr": "SE Asian",
    "Thai": "SE Asian",
    "Armn": "other",
    "Ethi": "other",
    "Geor": "other",
    "Grek": "other",
    "Hebr": "other",
}

# Cut-offs in percent of mC4, chosen by what they mean for mBLIP's 2.27 million web captions: at least 20,000 of them
# (16 languages), 1,000 to 20,000 (28), fewer than 1,000 (52).
HIGH_SHARE, LOW_SHARE = 0.9, 0.044


def script_group(code: str) -> str:
    """Return the script row of a result table: Latin, Cyrillic, Arabic, Indic, CJK, SE Asian or other."""
    return SCRIPT_GROUPS[LANGUAGES[code].scripts[0]]


def resource_group(code: str) -> str:
    """Return the resource row of a result table, by the language's share of mC4: high, mid or low."""
    share = LANGUAGES[code].mc4
    return "high" if share >= HIGH_SHARE else "mid" if share >= LOW_SHARE else "low"


# ---------------------------------------------------------------------------------------------------------------------
# --lang
# ---------------------------------------------------------------------------------------------------------------------


def _key(text: str) -> str:
    """Fold case, accents, punctuation and runs of spaces: "Norwegian (Bokmål)" -> "norwegian bokmal"."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[\W_]+", " ", "".join(letters).casefold()).split())


# Every accepted spelling -> code. The first part of an NLLB code is the three-letter ISO 639-3 code, so that is free.
_SPELLINGS: dict[str, str] = {
    **ALIASES,
    **{lang.nllb[:3]: lang.code for lang in _ROWS},
    **{_key(lang.name): lang.code for lang in _ROWS},
    **{lang.code: lang.code for lang in _ROWS},
}


def _show(code: str) -> str:
    return f"{LANGUAGES[code].name} ({code})"


def _quote(text: str) -> str:
    """Quote user text for a one-line message: control characters escaped, long text cut."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _list(codes: Collection[str]) -> str:
    return f"{len(codes)} language{'s' * (len(codes) != 1)}: {' '.join(sorted(codes))}"


def parse_lang(text: str, available: Collection[str] | None = None) -> str:
    """Return the language code that a user means by a code, an English name or an alias.

    Case, accents and surrounding spaces do not matter. A tag with a region or script ("pt-BR", "zh_Hans") means its
    first part. `available` are the codes that a model can speak; None allows all 96.
    Raises ValueError: with the nearest spellings for an unknown language, with the list of what the model speaks for a
    known one that is not among `available`.
    """
    key = _key(text)
    tag = re.fullmatch(r"([a-z]{2,3})([-_][a-z0-9]{1,8})+", text.strip().casefold())
    code = _SPELLINGS.get(key) or (_SPELLINGS.get(tag[1]) if tag else None)
    if code is None:
        # Two letters differ by half as soon as one is wrong, so short input gets a lower bar.
        close = difflib.get_close_matches(key[:40], _SPELLINGS, n=6, cutoff=0.5 if len(key) <= 3 else 0.6)
        codes = list(dict.fromkeys(_SPELLINGS[c] for c in close))[:3]
        hint = "give a code or an English name, such as sw or Swahili"
        if codes:
            *most, last = map(_show, codes)
            hint = f"did you mean {', '.join(most)}{' or ' if most else ''}{last}?"
        raise ValueError(f"unknown language {_quote(text)}; {hint}")
    if available is not None and code not in available:
        raise ValueError(f"this model cannot speak {_show(code)}; it speaks {_list(available)}")
    return code


# ---------------------------------------------------------------------------------------------------------------------
# --lang_mix and --lang_alpha
# ---------------------------------------------------------------------------------------------------------------------

MIXES = ("all", "uniform", "mc4", "mt5")


def parse_lang_mix(
    spec: str, available: Collection[str], alpha: float = 1.0, flag: str = "--lang_mix", has: str = "the data has"
) -> dict[str, float]:
    """Return the probability of each language in a training mixture, p_i = w_i^alpha / sum_j w_j^alpha.

    spec is one of
      all, uniform       w = 1 for every language that the data has (two names for the same mixture)
      mc4                w = the share of mC4, as in the released mBLIP data, over the languages that the data has
      mt5                w = the flattened share of mT5
      sw,de,hi           w = 1 for these; codes, names and aliases as in `parse_lang`; one language is a list too
      sw:2,de:1          w as given; a language without a weight has 1
    alpha (`--lang_alpha`) below 1 flattens the weights, above 1 sharpens them, and 0 makes all languages equal; it has
    no effect where they are equal already. `available` are the codes that the data has. The result sums to 1 and is in
    the order of LANGUAGES whatever the order of the spec, so "sw,de" and "de,sw" train the same model. flag, has: what
    errors call the spec, and whose languages `available` are.
    Raises ValueError naming the flag for anything else.
    """
    assert available and all(code in LANGUAGES for code in available), f"unknown codes among {sorted(available)}"

    def bad(problem: str) -> ValueError:
        allowed = f"give {', '.join(MIXES)} or languages such as sw,de,hi or sw:2,de:1"
        return ValueError(f"{flag} {_quote(spec)}: {problem}; {allowed}")

    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"--lang_alpha {alpha}: the exponent must be a finite number of at least 0, such as 1 or 0.3")

    name = spec.strip().casefold()
    if name in ("all", "uniform"):
        weights = {code: 1.0 for code in available}
    elif name in ("mc4", "mt5"):
        weights = {code: getattr(LANGUAGES[code], name) for code in available}
    else:
        weights = {}
        for item in spec.split(","):
            text, colon, number = item.partition(":")
            if not text.strip():
                raise bad("a language is missing" if spec.strip() else "it is empty")
            if text.strip().casefold() in MIXES:
                raise bad(f"{text.strip()} stands alone, it cannot be part of a list")
            try:
                code = parse_lang(text)
            except ValueError as error:
                raise bad(str(error).rstrip("?")) from None
            try:
                weight = float(number) if colon else 1.0
            except ValueError:
                weight = math.nan
            if not (math.isfinite(weight) and weight > 0):
                raise bad(f"the weight {_quote(number)} of {_show(code)} is not a positive number")
            if code in weights:
                raise bad(f"{_show(code)} comes twice")
            if code not in available:
                raise bad(f"{has} no {_show(code)}, it has {_list(available)}")
            weights[code] = weight

    # Dividing by the largest first keeps every power in [0, 1]: huge weights cannot overflow.
    largest = max(weights.values())
    powers = {code: (weights[code] / largest) ** alpha for code in LANGUAGES if code in weights}
    total = math.fsum(powers.values())
    mix = {code: power / total for code, power in powers.items()}
    if min(mix.values()) == 0:
        rarest = min(mix, key=mix.get)
        raise bad(f"with --lang_alpha {alpha} the weights are so far apart that {_show(rarest)} would never be drawn")
    return mix
