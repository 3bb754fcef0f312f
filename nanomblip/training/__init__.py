"""What train.py needs beside the model: the warm-up, the optimizers, stopping and going on, and several processes.

The recipe itself is train.py, at the top.
"""
