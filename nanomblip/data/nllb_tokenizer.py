"""Text to token ids and back for the translator: SentencePiece with the ids of fairseq, and a token for each language.

The file (`sentencepiece.bpe.model`) has `<unk>` 0, `<s>` 1, `</s>` 2 and no padding; fairseq put its own four in front:

    0 <s>   1 <pad>   2 </s>   3 <unk>   4 .. n    token i of the file has id i + 1
    n + 1 .. n + 202                               the languages, in the order below; n = 256,000 in NLLB-200
    n + 203 .. n + 205                             rows for marks of how a text was made, never used here

A source is `[language] tokens </s>`, as in fairseq's own evaluation. Until April 2023 transformers wrote
`tokens </s> [language]`; `legacy=True` does so too.
"""

from pathlib import Path

from nanomblip.data.languages import LANGUAGES
from nanomblip.data.tokenizer import open_sentencepiece, pad_rows, valid_text

# FLORES-200's languages in fairseq's order, that of their older codes: pes was fas, and so comes after fao.
NLLB_CODES = """
ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab ars_Arab
ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl
bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn
cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn
est_Latn eus_Latn ewe_Latn fao_Latn pes_Arab fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn
gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn
ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab
kas_Deva kat_Geor knc_Arab knc_Latn kaz_Cyrl kbp_Latn kea_Latn khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn
kon_Latn kor_Hang kmr_Latn lao_Laoo lvs_Latn lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn
lua_Latn lug_Latn luo_Latn lus_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Latn mkd_Cyrl plt_Latn mlt_Latn
mni_Beng khk_Cyrl mos_Latn mri_Latn zsm_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nso_Latn nus_Latn
nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pol_Latn por_Latn prs_Arab pbt_Arab quy_Latn
ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn
sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn
szl_Latn tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi taq_Latn taq_Tfng tpi_Latn tsn_Latn
tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn
vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zul_Latn
""".split()


class NLLBTokenizer:
    """The tokens of one `sentencepiece.bpe.model`.

    `len(tokenizer)` is the number of ids that a text can have; languages come after. Languages are named by our codes
    ("sw") or NLLB's ("swh_Latn"). Raises FileNotFoundError or ValueError naming the file when it cannot be read.
    """

    pad, eos, unk = 1, 2, 3

    def __init__(self, path: Path | str, legacy: bool = False):
        self.path, self.legacy = Path(path), legacy
        self.sentencepiece = open_sentencepiece(self.path)
        ids = (
            self.sentencepiece.unk_id(),
            self.sentencepiece.bos_id(),
            self.sentencepiece.eos_id(),
            self.sentencepiece.pad_id(),
        )
        if ids != (0, 1, 2, -1):
            raise ValueError(f"{path}: unk, bos, eos, pad have ids {ids}, NLLB's are (0, 1, 2, -1)")

    def __len__(self) -> int:
        return self.sentencepiece.get_piece_size() + 1

    def language(self, code: str) -> int:
        """The token of a language; ValueError for one that NLLB does not know."""
        nllb = LANGUAGES[code].nllb if code in LANGUAGES else code
        if nllb not in NLLB_CODES:
            raise ValueError(f"unknown language {code!r}; give a code such as sw or swh_Latn")
        return len(self) + NLLB_CODES.index(nllb)

    def encode(self, text: str, language: str = "en") -> list[int]:
        """Ids of a text to be translated, its language and eos with it. Long texts are not cut.

        What the tokenizer has no token for becomes `unk`: `unknown` counts it.
        """
        # Id 0 of the file, <unk>, is the only one that does not move up by one: ours is 3.
        ids = [i + 1 if i else self.unk for i in self.sentencepiece.encode(valid_text(text).strip())]
        language_id = self.language(language)
        return [*ids, self.eos, language_id] if self.legacy else [language_id, *ids, self.eos]

    def unknown(self, ids) -> int:
        """How many of these ids are `unk`; neighbours without a token are one."""
        return sum(int(i) == self.unk for i in ids)

    def decode(self, ids) -> str:
        """The text of ids, up to the first eos. `unk` becomes " \u2047 "; padding and languages are left out."""
        kept = []
        for i in ids:
            if i == self.eos:
                break
            if i == self.unk or self.unk < i < len(self):
                kept.append(0 if i == self.unk else int(i) - 1)
        return self.sentencepiece.decode(kept)

    def batch(self, texts: list[str], language: str = "en"):
        """Several sources as one padded tensor: long (B, S), right-padded with pad."""
        return pad_rows([self.encode(text, language) for text in texts], self.pad)
