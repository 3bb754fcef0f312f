"""The paper's figure, and what makes it affordable: image encoder, Q-Former, language model, LoRA, int8, writing text.

Start with mblip.py, then attention.py, vit.py, qformer.py and mt5.py. nllb.py is the translator that wrote the training
texts. Torch and nothing else is imported here: no files, no pictures, no tokenizer.
"""
