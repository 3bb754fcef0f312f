"""What the model reads and writes: languages, prompts, tokens, pictures, and the sources of training examples.

Start with prompts.py and mixture.py; emoji.py is the embedded data. folder.py loads a model with its tokenizer,
answers.py keeps what it writes. decode.py (with metadata.py) reads picture files, image.py makes tensors of them.
json_index.py and json_mixture.py read the released format, which builders.py writes; filters.py judges translations
(scripts.py, language_id.py, parallel.py).
"""
