"""What the model reads: languages, prompts, tokens, pictures, and the two sources of training examples.

Start with prompts.py and mixture.py. folder.py loads a model with its tokenizer, answers.py keeps what it writes.
emoji.py is the embedded data; json_index.py and json_mixture.py read the released format; decode.py (with metadata.py)
reads picture files, image.py makes tensors of them.
"""
