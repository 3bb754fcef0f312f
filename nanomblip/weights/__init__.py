"""Weights in and out, strictly: the official layout, LoRA in PEFT's files, downloads from the hub.

Start with layout.py, the table of official names. What a tensor means belongs to model/.
"""
