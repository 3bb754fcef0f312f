"""Train nano's tokenizer: `python data/train_tokenizer.py` writes data/spiece.model (8,000 pieces).

A unigram SentencePiece model like mT5's (ids pad 0, eos 1, unk 2; byte fallback, so that every text can be written),
trained on what nano reads and writes: the names and keywords of 85 languages, the prompts that name these languages, and
the Universal Declaration of Human Rights. Two runs give the same file.

Unlike mT5's, it does not normalise its input (mT5 applies NFKC): a name must come back exactly as people write it, and
NFKC would rewrite, for example, the zero-width non-joiner in Persian names.
"""

import io
import sys
from collections import Counter
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanomblip.data.emoji import load_emoji, load_udhr  # noqa: E402
from nanomblip.data.languages import LANGUAGES  # noqa: E402
from nanomblip.data.prompts import CAPTION, KEYWORDS, MATCH, NAMING, VQA  # noqa: E402

PIECES = 8000
NAME_WEIGHT = 4  # names are what nano is asked for; keywords and running text only help the pieces along
PROMPT_WEIGHT = 40  # prompts repeat for ever: their words should be whole pieces


def corpus() -> Counter:
    """Text -> how often the trainer sees it."""
    emoji = load_emoji("all")
    texts = Counter()
    for names in emoji.names.values():
        for name in names.values():
            texts[name] += NAME_WEIGHT
    for keywords in emoji.keywords.values():
        for words in keywords.values():
            texts.update(words)
    for paragraphs in load_udhr().values():
        texts.update(paragraphs)
    choice = VQA[0], VQA[1], VQA[5]  # what there was of them when the shipped tokenizer was made
    templates = CAPTION + NAMING + KEYWORDS + choice + tuple(text for row in MATCH for text in row)
    for lang in emoji.langs:
        for template in templates:
            texts[template.format(L=LANGUAGES[lang].name, c="", q="")] += PROMPT_WEIGHT
    return texts


def main():
    out = ROOT / "data" / "spiece.model"
    model = io.BytesIO()
    texts = corpus()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in sorted(texts) for _ in range(texts[text])),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9998,
        normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        max_sentence_length=16384,
        num_threads=1,  # more threads would make the sums, and so the pieces, depend on timing
        minloglevel=1,
    )  # fmt: skip
    out.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = [name for of_lang in load_emoji("core").names.values() for name in of_lang.values()]
    lengths = [len(ids) for ids in pieces.encode(names)]
    print(f"{out.relative_to(ROOT)}: {len(model.getvalue()):,} bytes, {pieces.get_piece_size()} pieces, "
          f"{sum(lengths) / len(lengths):.2f} pieces a core name, longest {max(lengths)}")  # fmt: skip


if __name__ == "__main__":
    main()
