"""What the model reads and writes: languages, prompts, tokens, pictures, and the sources of training examples.

Start with prompts.py and mixture.py; emoji.py is the embedded data. folder.py loads a model with its tokenizer,
answers.py keeps what it writes. decode.py (with metadata.py) reads picture files, image.py makes tensors of them.
json_index.py and json_mixture.py read the released format, which builders.py writes. translate.py puts it into other
languages (translation.py, translators.py), and filters.py judges what comes out (scripts.py, language_id.py,
parallel.py); names.py gives the embedded pictures such names.
"""
