"""What train.py needs beside the model: the warm-up, the optimizers, and stopping and going on.

The recipe itself is train.py, at the top.
"""
