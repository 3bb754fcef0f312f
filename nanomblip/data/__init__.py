"""What the model reads: languages, prompts, tokens, pictures, and the two sources of training examples.

Start with prompts.py and mixture.py. emoji.py is the embedded data; json_index.py and json_mixture.py read the released
format, which builders.py writes; filters.py judges translations (scripts.py, language_id.py, parallel.py).
"""
