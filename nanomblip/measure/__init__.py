"""What a trained model can do: metrics, benchmarks, language fidelity, ablations.

Start with evaluate.py, the command.
"""
