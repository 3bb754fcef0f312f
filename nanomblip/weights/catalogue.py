"""The official models on the hub: where each is, and which of its files are needed."""

from nanomblip.weights.files import SINGLE

# Name -> repository and revision. A branch can move, so the commit that it meant is kept in the record of the folder;
# see weights/OFFICIAL.md.
MODELS = {
    "mblip-mt0-xl": ("Gregor/mblip-mt0-xl", "main"),
    "blip2-flan-t5-xl": ("Salesforce/blip2-flan-t5-xl", "main"),
    **{f"mt0-{size}": (f"bigscience/mt0-{size}", "main") for size in ("small", "base", "large", "xl", "xxl")},
    "nllb-200-distilled-600M": ("facebook/nllb-200-distilled-600M", "refs/pr/29"),
    "nllb-200-distilled-1.3B": ("facebook/nllb-200-distilled-1.3B", "refs/pr/5"),
    "nllb-200-1.3B": ("facebook/nllb-200-1.3B", "refs/pr/5"),
    "nllb-200-3.3B": ("facebook/nllb-200-3.3B", "refs/pr/10"),
}
# The translators have only pickles on main. These branches hold what the hub's own bot made of them. Something else
# could be put there, so here is what it was: the start of the commit, and the sha256 of the weights where it is known.
PINNED = {
    "nllb-200-distilled-600M": ("38bd1c6", "ca41e084084466b348cdc519f9762bcfc6c352f35c2fbee5588194de8da63da8"),
    "nllb-200-distilled-1.3B": ("f9e6ff7", None),
    "nllb-200-1.3B": ("05f78f6", "ec6bf30b411f1714657b558ccc2ecc41d9b341c631f38a39fbcb4ec104d34796"),
    "nllb-200-3.3B": ("f046cc4", None),
}
NLLB_TOKENIZER = (4_852_054, "14bb8dfb35c0ffdea7bc01e56cea38b9e3d5efcdcb9c251d6b40538e1aab555a")  # of all four
WANTED = ("config.json", "preprocessor_config.json", "processor_config.json", "spiece.model", "sentencepiece.bpe.model",
          "tokenizer_config.json", "special_tokens_map.json")  # fmt: skip


class HubError(ValueError):
    """A download that did not succeed; the message names the file, what happened and what to do."""


def check_pinned(name: str, commit: str, offered: dict[str, tuple[int, str]]) -> None:
    """Raise HubError unless a branch has the known tokenizer and weights (or commit, where their sha256 is unknown)."""
    start, sha = PINNED[name]
    same = offered.get(SINGLE, (0, ""))[1] == sha if sha else commit.startswith(start)
    if not same or offered.get("sentencepiece.bpe.model") != NLLB_TOKENIZER:
        repository, revision = MODELS[name]
        raise HubError(
            f"{repository}@{revision}: has other files than it had (now at commit {commit}, once at {start}...); "
            f"look at them there, and if you trust them ask for {repository}@{commit}"
        )
